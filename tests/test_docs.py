# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the pages with the code: links, names, commands, settings, and generated tables."""

import contextlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import marginkernels as mk
from tools.docs import losses as generator
from tools.docs import trainers

ROOT = Path(__file__).parents[1]
GENERATED = ("docs/cuda_kernels.md", "docs/triton_kernels.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "csrc/README.md", "tools/ptxsim/README.md")
    for path in ROOT.glob(pattern)
)
WRITTEN = [page for page in PAGES if page not in GENERATED]
# the site has them beside the pages of docs/; tools/docs/site.py
FROM_ROOT = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "csrc.md": "csrc/README.md",
}
FOLDERS = "csrc|tests|tools|examples|benchmarks|marginkernels|docs"


def text(page: str) -> str:
    return (ROOT / page).read_text()


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", text(page), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).lower()) for heading in headings}


@pytest.mark.parametrize("page", WRITTEN)
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text(page), flags=re.S)
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if page.startswith("docs/") and path in FROM_ROOT:
            linked = ROOT / FROM_ROOT[path]
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(linked.resolve().relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", WRITTEN)
def test_files_modules_and_commands_that_pages_name_exist(page: str) -> None:
    content = text(page)
    for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./]+\w", content):
        assert (ROOT / path).exists(), f"{page}: {path}"
    for module in re.findall(r"python -m (?!pytest|torch)([\w.]+\w)", content):
        assert importlib.util.find_spec(module), f"{page}: {module}"
    targets = re.findall(r"^([\w-]+):", text("Makefile"), re.M)
    for target in re.findall(r"(?:`|\n)make ([a-z-]+)", content):
        assert target in targets, f"{page}: make {target}"


def test_the_walk_names_what_is_there() -> None:
    folders = ("marginkernels", "csrc/cpu", "csrc/cuda", "marginkernels/backends/triton")
    named = re.findall(r"`([\w/]+\.\w+)`: `(?:\w+\.)?(\w+)`", text("docs/design.md"))
    assert len(named) > 30
    for file, name in named:
        found = [path for folder in folders if (path := ROOT / folder / file).exists()]
        assert any(re.search(rf"\b{name}\b", path.read_text()) for path in found), (file, name)


@pytest.mark.parametrize("page", WRITTEN)
def test_code_that_claims_to_be_a_file_is_taken_from_it(page: str) -> None:
    """Checks that a block names a file, which takes its place, or is a copy of a part of it."""
    blocks = re.findall(r'^``` {[^\n]* title="(.*?)" }\n(.*?)^```', text(page), re.M | re.S)
    assert len(blocks) == text(page).count(" title=")
    for title, block in blocks:
        assert block == f'--8<-- "{title}"\n' or block in text(title), f"{page}: {title}"
        assert (ROOT / title).exists(), f"{page}: {title}"


def test_the_reference_has_every_public_name() -> None:
    pages = "".join(text(page) for page in PAGES if page.startswith("docs/api/"))
    documented = set(re.findall(r"^::: marginkernels\.(\w+)$", pages, re.M))
    missing = set(mk.__all__) - {"__version__", "AMSoftmax"} - documented
    assert not missing, f"document in docs/api, by ::: marginkernels.NAME: {missing}"
    unknown = documented - set(mk.__all__) - {"ops", "optim", "rounding", "testing", "transforms"}
    assert not unknown, f"docs/api documents what marginkernels does not export: {unknown}"


def test_docstrings_refer_to_what_is_there() -> None:
    sources = list((ROOT / "marginkernels").glob("**/*.py"))
    code = "".join(path.read_text() for path in sources)
    defined = set(re.findall(r"^ *(?:class|def) (\w+)|^(\w+)(?:: .*)? = ", code, re.M))
    names = {name for pair in defined for name in pair}
    names |= {part for path in sources for part in path.with_suffix("").parts}
    for target in re.findall(r":(?:class|func|meth|mod|data):`~?([\w.]+)`", code):
        assert target.rpartition(".")[2] in names, target


def test_the_table_of_environment_variables_is_complete() -> None:
    sources = [ROOT / "setup.py"]
    for folder in ("marginkernels", "csrc"):
        sources += [p for p in ROOT.glob(f"{folder}/**/*") if p.suffix in (".py", ".cpp", ".h")]
    read = r"""(?:environ(?:\.get)?[\[(]|getenv\(|setting\()["']([A-Z_]+)"""
    used = {name for path in sources for name in re.findall(read, path.read_text())}
    listed = set(re.findall(r"^\| `([A-Z_]+)` \| ", text("docs/install.md"), re.M))
    assert used and used <= listed
    assert {name for name in listed if name.startswith("MARGINKERNELS_")} <= used


def test_before_and_after_in_the_readme_are_the_same_loss() -> None:
    code = re.search(r"^# before.*?^```", text("README.md"), re.M | re.S)[0].removesuffix("```")
    before, after = code.split("# after")
    torch.manual_seed(0)
    scope = dict(torch=torch, F=F, ArcFace=mk.ArcFace, margin_cross_entropy=mk.margin_cross_entropy)
    scope |= dict(x=torch.randn(8, 16), w=torch.randn(50, 16), y=torch.randint(50, (8,)))
    losses = []
    for part in (before, "# after" + after):
        exec(part, scope)
        losses.append(scope["loss"])
    torch.testing.assert_close(*losses)


def test_the_loops_of_the_page_on_optimizers_train() -> None:
    torch.manual_seed(0)
    head = mk.MarginSoftmaxHead(8, 50, margin=mk.ArcFace(), scale=8.0, backend="reference")
    batches = [(torch.randn(12, 8), torch.randint(50, (12,))) for _ in range(3)]
    scope = dict(torch=torch, contextlib=contextlib, head=head, batches=batches, parts=batches)
    scope["backbone"] = torch.nn.Linear(8, 8)
    for code in re.findall(r"^```python\n(.*?)^```", text("docs/optimizers.md"), re.M | re.S):
        before = head.weight.detach().clone()
        exec(code, scope)
        assert head.weight.grad is None and not torch.equal(head.weight, before)


def test_the_table_of_losses_is_up_to_date_and_complete() -> None:
    listed = {thing.__name__ for thing in generator.MARGINS}
    margins = {
        name
        for name, thing in vars(mk).items()
        if isinstance(thing, type)
        and issubclass(thing, torch.nn.Module)
        and thing.__module__.startswith("marginkernels.margins")
    }
    missing = margins - listed
    unlisted = {"Margin", "ParametricMargin", "AMSoftmax"}
    assert missing == unlisted, f"add to MARGINS in tools/docs/losses.py: {missing - unlisted}"
    for thing in generator.MARGINS + generator.OTHERS:
        complaint = f"{thing.__name__}: expected {generator.FORM}, got {thing.__doc__!r}"
        formula, papers = generator.first_paragraph(thing)
        assert formula and re.search(r"20\d\d", papers), complaint
        if thing not in generator.OTHERS:
            assert generator.usual_values(thing), complaint
    assert generator.PATH.read_text() == generator.document(), "run python -m tools.docs.losses"


def test_the_table_of_trainers_is_that_of_the_records_and_has_every_example() -> None:
    assert trainers.PATH.read_text() == trainers.document(), "run python -m tools.docs.trainers"
    examples = {path.stem for path in (ROOT / "examples" / "trainers").glob("*.py")} - {"compare"}
    assert examples == set(re.findall(r"^\| `(\w+)\.py` \|", text("docs/trainers.md"), re.M))
