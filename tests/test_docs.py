# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The table of the losses is that of the code."""

import importlib.util
import re
from pathlib import Path

import torch

import marginkernels as mk


def load():
    path = Path(__file__).parents[1] / "docs" / "losses_table.py"
    spec = importlib.util.spec_from_file_location("losses_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date_and_complete():
    generator = load()
    assert generator.PATH.read_text() == generator.document(), "run python docs/losses_table.py"
    listed = {thing.__name__ for thing in generator.MARGINS}
    margins = {
        name
        for name, thing in vars(mk).items()
        if isinstance(thing, type)
        and issubclass(thing, torch.nn.Module)
        and thing.__module__.startswith("marginkernels.margins")
    }
    assert margins - listed == {"Margin", "AMSoftmax"}
    for thing in generator.MARGINS + generator.OTHERS:
        formula, papers = generator.first_paragraph(thing)
        assert formula and re.search(r"20\d\d", papers), thing
        if thing not in generator.OTHERS:
            assert generator.usual_values(thing), thing
