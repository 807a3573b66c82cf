# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Gives the site the pages that stand outside of docs/; a hook of mkdocs."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "csrc/README.md": "csrc.md",
    "tools/ptxsim/README.md": "ptxsim.md",
}
# code is matched first, to be left alone
_LINK = re.compile(
    r"```.*?```|`[^`]*`|(?P<image>!?)\[(?P<text>[^\]]+)\]\((?!https?://|#)(?P<to>[^)]+)\)",
    re.DOTALL,
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds these pages."""
    for source, page in PAGES.items():
        content = _LINK.sub(_moved, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=content))
    return files


def _moved(link: re.Match[str]) -> str:
    """Rewrites a link for the site, which holds docs/ and these pages."""
    if link["to"] is None:
        return link[0]
    path, hash_, anchor = link["to"].partition("#")
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
    elif path in PAGES:
        path = PAGES[path]
    else:
        return link["text"]  # a file that the site does not hold
    return f"{link['image']}[{link['text']}]({path}{hash_}{anchor})"
