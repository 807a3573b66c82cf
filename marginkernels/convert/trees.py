# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Walks nested dictionaries and lists, as checkpoints are, by paths of keys and numbers."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[Any, ...]


def named(path: Path) -> str:
    """Returns a path as one name."""
    return ".".join(str(key) for key in path) or "the tensor"


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields everything that is neither a dictionary nor a list, with its path."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, (*path, i))
    else:
        yield path, tree


def at(tree: Any, path: Path) -> Any:
    """Returns what is at a path."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """Returns the tree with a value at a path, which existed. The tree given stays as it is."""
    if not path:
        return value
    changed = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    changed[path[0]] = replaced(tree[path[0]], path[1:], value)
    return type(tree)(changed) if isinstance(tree, tuple) else changed


def removed(tree: Any, path: Path) -> Any:
    """Returns the tree without the entry of a dictionary at a path."""
    parent = copy.copy(at(tree, path[:-1]))
    del parent[path[-1]]
    return replaced(tree, path[:-1], parent)
