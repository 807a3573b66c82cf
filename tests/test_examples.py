# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The short examples run, and show what they say."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_quickstart_finds_the_people_in_new_photographs(capsys):
    first, five = map(float, re.findall(r"([\d.]+)%", printed("quickstart", capsys))[-2:])
    assert 90 < first <= five


def test_a_custom_margin_equals_the_dense_formula(capsys):
    differences = re.findall(r"difference (\S+)", printed("custom_margin", capsys))
    assert len(differences) == 2 and all(float(d) < 1e-5 for d in differences)
