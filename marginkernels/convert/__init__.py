# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Converts checkpoints of one project into those of another, and to another number of ranks.

The command is ``python -m marginkernels.convert IN... OUT --to FORMAT``.

- Everything is checked before anything is written. The output gets its name at the end.
- Blocks of 16 MiB pass through memory: neither the input nor the output is ever there as a whole.
- No code of the files runs: ``torch.load(weights_only=True)`` reads them.
"""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint
from .files import mapped
from .formats import FORMATS
from .formats.base import Format
from .formats.one_file import matrices
from .tables import with_classes, with_one_center
from .trees import named

__all__ = ["FORMATS", "convert"]

_StrPath = str | os.PathLike[str]


def convert(
    inputs: Sequence[_StrPath],
    output: _StrPath,
    to: str,
    *,
    source: str | None = None,
    key: str | None = None,
    world_size: int = 1,
    num_classes: int | None = None,
    classes: _StrPath | None = None,
    sub_centers: int = 1,
    reduce: str | None = None,
    drop_state: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Converts a checkpoint, and returns what it did, line by line.

    Args:
        inputs: the files of all ranks, or one file, or a folder.
        output: a file or a folder that does not exist, as the format has it.
        to, source: names of ``FORMATS``; ``source`` None: by what the inputs have.
        key: the name of the class weights where it is not the usual one.
        world_size: the number of ranks, for a format with a file for each.
        num_classes: C, which the inputs have to have.
        classes: a table of the new class of each old one, -1 where it is dropped.
        sub_centers: K centres of each class in the inputs.
        reduce: "mean", or a file of counts (C, K), which leaves one centre of each class.
        drop_state: whether to leave out the optimizer's state of the classes.
        overwrite: whether ``output`` may be a file that exists.

    Raises:
        ValueError, OSError: before anything is written, where something does not fit.
    """
    paths, out = [Path(each) for each in inputs], Path(output)
    target = _format("--to", to)
    _check_output(out, target, overwrite)
    checkpoint = _source(paths, source, key).read(paths, key, not drop_state)
    if drop_state:
        left_out = ", ".join(map(named, checkpoint.states)) or "none, as there is none"
        checkpoint = checkpoint.without_state()
        checkpoint.notes.append(f"optimizer state left out: {left_out}")
    elif not _has_place(target, checkpoint):
        checkpoint = checkpoint.without_state()
        checkpoint.notes.append(
            f"dropped: the optimizer's state, which {target.name} has no place for"
        )
    _check_counts(checkpoint, sub_centers, num_classes)
    checkpoint.sub_centers = sub_centers
    old = {len(checkpoint.weight), checkpoint.num_classes}
    if reduce is not None:
        checkpoint = with_one_center(checkpoint, reduce)
    if classes is not None:
        checkpoint = with_classes(checkpoint, Path(classes))
    # a table gives other classes even where their number stays
    new = {len(checkpoint.weight), checkpoint.num_classes}
    changed = old if classes is not None else old - new
    target.check(checkpoint, out, world_size)
    _write(checkpoint, target, out, world_size)
    return [*checkpoint.notes, *_summary(checkpoint, target, out, world_size, changed)]


def _format(argument: str, name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"{argument}: expected one of {', '.join(FORMATS)}, got {name}")
    return FORMATS[name]


def _check_output(out: Path, target: Format, overwrite: bool) -> None:
    """Raises ValueError where the output would replace what may not be replaced."""
    if not os.path.lexists(out):
        return
    if target.folder:
        raise ValueError(f"OUT: expected a new folder, got {out}, which exists")
    if not overwrite:
        raise ValueError(f"OUT: expected a new file, got {out}, which exists (--overwrite)")
    if out.is_dir():
        raise ValueError(f"OUT: expected a file, got {out}, which is a folder")


def _source(inputs: list[Path], name: str | None, key: str | None) -> Format:
    """Returns the format of the inputs: as named, or the one that knows them."""
    for path in inputs:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if name is not None:
        return _format("--from", name)
    found = {}
    for each in FORMATS.values():
        reason = each.recognised(inputs, key)
        if reason is not None:
            found[each.name] = reason
    if len(found) == 1:
        return FORMATS[next(iter(found))]
    shown = ", ".join(map(str, inputs))
    if not found:
        raise ValueError(
            f"{shown}: expected class weights of a known name, got {_content(inputs)}; --from says "
            "the layout, and --key the name"
        )
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
    raise ValueError(f"{shown}: expected one format, got {reasons}; --from chooses")


def _content(inputs: list[Path]) -> str:
    """Names the matrices of a file."""
    if len(inputs) > 1 or inputs[0].is_dir():
        return "none"
    return ", ".join(matrices(mapped(inputs[0])))


def _check_counts(checkpoint: Checkpoint, sub_centers: int, num_classes: int | None) -> None:
    rows = len(checkpoint.weight)
    if sub_centers < 1 or rows % sub_centers:
        raise ValueError(
            f"--sub-centers: expected a divisor of the {rows} rows of classes, got {sub_centers}"
        )
    if num_classes is not None and rows != num_classes * sub_centers:
        raise ValueError(
            f"--num-classes: expected {num_classes} classes, got {rows // sub_centers}"
        )
    bias = checkpoint.parameters.get("bias")
    if bias is not None and len(bias.rows) != rows // sub_centers:
        raise ValueError(
            f"bias: expected one for each of {rows // sub_centers} classes, got {len(bias.rows)}; "
            "--sub-centers says how many centres a class has"
        )


def _write(checkpoint: Checkpoint, target: Format, out: Path, world_size: int) -> None:
    """Writes under a name for the time of writing, and renames at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.stem[:50]}.{secrets.token_hex(4)}.partial{out.suffix}")
    try:
        if target.per_rank:
            partial.mkdir()
        target.write(checkpoint, partial, world_size)
        partial.rename(out)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _has_place(target: Format, checkpoint: Checkpoint) -> bool:
    """Returns whether the target has a place for the optimizer's state, or there is none."""
    has_state = any(parameter.state for parameter in checkpoint.parameters.values())
    return target.has_optimizer or checkpoint.format == target.name or not has_state


def _summary(
    checkpoint: Checkpoint, target: Format, out: Path, world_size: int, changed: set[int]
) -> list[str]:
    """Says what was written, and what was not.

    Args:
        changed: the numbers of rows and of classes that are other ones now.
    """
    weight = checkpoint.parameters["weight"]
    size = f"{checkpoint.num_classes:,} classes of {weight.rows.shape[1]}"
    if checkpoint.sub_centers > 1:
        size += f", {checkpoint.sub_centers} centres each"
    lines = [f"weights: {size}, {weight.rows.dtype}, with {_states(checkpoint)}"]
    if checkpoint.others():
        if checkpoint.format == target.name and checkpoint.places:
            lines.append("everything else of the files: carried along as it is")
            for name in checkpoint.others_with(changed):
                lines.append(f"look at {name}: it has the old number of classes, and their order")
        else:
            lines.append("everything else of the files, such as a backbone: left out")
    ranks = f", {world_size} file{'s' * (world_size > 1)}" if target.per_rank else ""
    return [*lines, f"wrote {target.name}: {out}{ranks}"]


def _states(checkpoint: Checkpoint) -> str:
    names = sorted({key for p in checkpoint.parameters.values() for key in p.state})
    return f"the optimizer's {', '.join(names)}" if names else "no optimizer state"
