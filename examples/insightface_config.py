# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads configurations of insightface's arcface_torch, and checks them before anything starts."""

import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marginkernels import arguments

OPTIMIZERS = ("sgd", "adamw")
# keys of insightface that turn something on that is not here, and keys that go with them
MISSING = {"dali", "dali_aug", "using_wandb"}
SILENT = {
    "notes", "save_artifacts", "suffix_run_name", "wandb_entity", "wandb_key", "wandb_log_all",
    "wandb_project", "wandb_resume",
}  # fmt: skip
# least value of each integer, and of each number
INTEGERS = dict(
    num_classes=1, num_image=1, num_epoch=1, embedding_size=1, batch_size=1, verbose=1, frequent=1,
    gradient_acc=1, seed=0, num_workers=0, image_size=16,
)  # fmt: skip
NUMBERS: dict[str, float] = dict(
    sample_rate=0, interclass_filtering_threshold=0, momentum=0, weight_decay=0, lr=0,
    warmup_epoch=-1,
)  # fmt: skip
SWITCHES = ("resume", "save_all_states", "fp16", "fused_optimizer")


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds the settings under insightface's names, with the defaults of its ``base.py``.

    ``fused_optimizer`` and ``image_size`` are of this script alone.
    """

    rec: str  # "synthetic", "hanzi", or a folder with a folder of images per class
    num_classes: int
    num_image: int
    num_epoch: int
    output: str
    warmup_epoch: float = 0
    val_targets: tuple[str, ...] = ()
    margin_list: tuple[float, float, float] = (1.0, 0.5, 0.0)
    network: str = "r50"
    resume: bool = False
    save_all_states: bool = False
    embedding_size: int = 512
    sample_rate: float = 1.0
    interclass_filtering_threshold: float = 0.0
    fp16: bool = False
    batch_size: int = 128  # of each rank
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    verbose: int = 2000  # steps between verifications
    frequent: int = 10  # steps between reports
    gradient_acc: int = 1
    seed: int = 2048
    num_workers: int = 2
    fused_optimizer: bool = False  # moves the classes inside backward: marginkernels.optim
    image_size: int = 112  # of synthetic images, and of a folder's, which have to have it


def load(path: str | Path, changes: dict[str, Any]) -> Config:
    """Reads the file, before it a ``base.py`` in its folder as insightface does, then ``changes``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: a key is unknown or missing, or a value is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: expected a Python file with a config, got {path}")
    values: dict[str, Any] = {}
    for file in dict.fromkeys([path.with_name("base.py"), path]):
        if file.exists():
            values |= _read(file)
    values |= changes
    if values.get("output") is None:
        values["output"] = str(Path("work_dirs", path.stem))
    return checked(values)


def checked(values: dict[str, Any]) -> Config:
    """Returns the settings, or raises TypeError or ValueError for the first that is wrong."""
    on = sorted(key for key in MISSING if values.get(key))
    values = {key: value for key, value in values.items() if key not in MISSING | SILENT}
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for key in values.keys() - fields.keys():
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f", perhaps {close[0]}" if close else ""
        raise ValueError(f"{key}: expected a key of insightface's configurations{hint}")
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and key not in values:
            raise ValueError(f"{key}: expected a value in the configuration, got none")
    config = Config(**values)
    for key, least in INTEGERS.items():
        arguments.integer(key, getattr(config, key), least=least)
    for key, lowest in NUMBERS.items():
        arguments.number(key, getattr(config, key), least=lowest)
    for key in SWITCHES:
        arguments.boolean(key, getattr(config, key))
    _check_rest(config)
    if on:
        logging.getLogger("insightface").warning("%s: not here, and ignored", ", ".join(on))
    return config


def _check_rest(config: Config) -> None:
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected {' or '.join(OPTIMIZERS)}, got {config.optimizer!r}")
    if not isinstance(config.margin_list, tuple | list) or len(config.margin_list) != 3:
        raise ValueError(f"margin_list: expected (m1, m2, m3), got {config.margin_list!r}")
    if isinstance(config.val_targets, str):
        raise TypeError(f"val_targets: expected a list of names, got {config.val_targets!r}")
    if config.fused_optimizer and config.gradient_acc > 1 and config.sample_rate < 1:
        raise ValueError(
            f"gradient_acc: expected 1 with fused_optimizer and sample_rate={config.sample_rate}, "
            f"got {config.gradient_acc}: batches that accumulate do not share a sample of classes"
        )


def _read(file: Path) -> dict[str, Any]:
    with _easydict():
        scope = runpy.run_path(str(file))
    if not isinstance(scope.get("config"), dict):
        raise ValueError(f"config: expected a dictionary of this name in {file}")
    return dict(scope["config"])


class AttributeDict(dict):
    """Is a dictionary whose keys are attributes too: what easydict is used for in these files."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value


@contextlib.contextmanager
def _easydict() -> Iterator[None]:
    """Lets a file import easydict where that is not installed."""
    if importlib.util.find_spec("easydict") is not None:
        yield
        return
    stand_in: Any = types.ModuleType("easydict")
    stand_in.EasyDict = AttributeDict
    sys.modules["easydict"] = stand_in
    try:
        yield
    finally:
        del sys.modules["easydict"]
