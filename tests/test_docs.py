# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The table of the losses is that of the code."""

import re

import torch

import marginkernels as mk
from tools.docs import losses as generator


def test_the_table_is_up_to_date_and_complete():
    assert generator.PATH.read_text() == generator.document(), "run python -m tools.docs.losses"
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
