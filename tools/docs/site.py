# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Gives the site the pages that stand in the root of the repository; hooks of mkdocs."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?://|#)([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root."""
    for page, source in PAGES.items():
        content = _LINK.sub(_moved, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=content))
    return files


def _moved(link: re.Match) -> str:
    """Rewrites a link of a page in the root for the site, which holds docs/ and these pages."""
    image, text, target = link.groups()
    path, hash_, anchor = target.partition("#")
    moved = {source: page for page, source in PAGES.items()}
    if path in moved:
        return f"{image}[{text}]({moved[path]}{hash_}{anchor})"
    if path.startswith("docs/"):
        return f"{image}[{text}]({target.removeprefix('docs/')})"
    return text  # a file that the site does not hold
