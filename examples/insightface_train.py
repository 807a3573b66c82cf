# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains as insightface's arcface_torch/train_v2.py: its configurations, schedule and checkpoints.

    python examples/insightface_train.py examples/insightface_configs/hanzi.py
    torchrun --nproc-per-node 2 examples/insightface_train.py examples/insightface_configs/hanzi.py

A configuration is a Python file with a ``config`` of insightface's keys; insightface_config.py has
the keys and their defaults. ``--set resume=True`` changes one for a run. Each rank uses a GPU of
its own where there are GPUs.
"""

import argparse
import ast
import contextlib
import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import insightface_config
import insightface_data
import insightface_networks
import insightface_verification
from distributed import start
from insightface_config import Config
from insightface_steps import Steps
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2

SCALE = 64
log = logging.getLogger("insightface")


class Trainer:
    """Holds what a run trains, on this rank.

    Args:
        head_type: makes the head; insightface_parity.py gives another.
    """

    def __init__(
        self, config: Config, device: torch.device, head_type: type[PartialFC_V2] = PartialFC_V2
    ):
        self.config, self.device = config, device
        # fp16 is slow on CPUs, and lacks some operations
        self.narrow = torch.float16 if device.type == "cuda" else torch.bfloat16
        self.rank, self.world_size = 0, 1
        if dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        images = insightface_data.open_images(config)
        self.targets = insightface_verification.load(config, images)
        rows: Any = images  # the sampler asks for the length alone
        self.sampler: DistributedSampler = DistributedSampler(
            rows, num_replicas=self.world_size, rank=self.rank, seed=config.seed
        )
        pin = device.type == "cuda"
        self.loader = insightface_data.loader(images, config, self.sampler, pin)
        # an epoch leaves out the batches that do not fill a step
        self.batches = len(self.loader) // config.gradient_acc * config.gradient_acc
        if self.batches == 0:
            raise ValueError(
                f"batch_size, gradient_acc: expected at most {config.num_image} images in a step "
                f"of {self.world_size} ranks, got {config.batch_size} x {config.gradient_acc} each"
            )
        torch.manual_seed(config.seed)
        self.backbone = insightface_networks.make(
            config.network, config.embedding_size, *images.shape
        ).to(device)
        self.network = self.backbone
        if self.world_size > 1:
            self.network = DistributedDataParallel(self.backbone, broadcast_buffers=False)
        margin = CombinedMarginLoss(
            SCALE, *config.margin_list, config.interclass_filtering_threshold
        )
        self.head = head_type(
            margin, config.embedding_size, config.num_classes, config.sample_rate
        ).to(device)
        self.steps = Steps(config, self.backbone, self.head, self.batches)
        self.epoch, self.global_step = 0, 0
        if config.resume:
            self.resume()

    @property
    def total_steps(self) -> int:
        """Is the number of batches of all epochs."""
        return self.batches * self.config.num_epoch

    def train_epoch(self) -> Iterator[Tensor]:
        """Trains the next epoch and yields the loss of each batch."""
        # the next epoch draws the same numbers after a resume
        torch.manual_seed((self.config.seed + self.epoch) * self.world_size + self.rank)
        self.sampler.set_epoch(self.epoch)
        self.network.train()
        for _, (images, labels) in zip(range(self.batches), self.loader, strict=False):
            self.global_step += 1
            yield self._train_batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
        self.epoch += 1

    def _train_batch(self, images: Tensor, labels: Tensor) -> Tensor:
        part_of = self.config.gradient_acc
        is_last = self.global_step % part_of == 0
        with contextlib.ExitStack() as stack:
            if not is_last and isinstance(self.network, DistributedDataParallel):
                stack.enter_context(self.network.no_sync())
            with torch.autocast(self.device.type, self.narrow, enabled=self.config.fp16):
                embeddings = self.network(images)
            loss = self.head(embeddings.float(), labels)
            self.steps.backward(loss / part_of, is_last)
        return loss.detach()

    def checkpoint(self) -> Path:
        """Names this rank's file, as insightface does."""
        return Path(self.config.output, f"checkpoint_gpu_{self.rank}.pt")

    def save(self) -> None:
        """Saves this rank's state under insightface's keys, and the backbone of rank 0."""
        if self.config.save_all_states:
            state = {
                "epoch": self.epoch,
                "global_step": self.global_step,
                "state_dict_backbone": self.backbone.state_dict(),
                "state_dict_softmax_fc": self.head.state_dict(),
                **self.steps.state_dict(),
            }
            _write(state, self.checkpoint())
        if self.rank == 0:
            _write(self.backbone.state_dict(), Path(self.config.output, "model.pt"))

    def resume(self) -> None:
        """Goes on from this rank's file, of this script or of insightface.

        Raises:
            FileNotFoundError: there is none.
        """
        path = self.checkpoint()
        if not path.exists():
            raise FileNotFoundError(
                f"resume: expected {path} of a run with save_all_states, found none"
            )
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.steps.load_state_dict(state)
        self.backbone.load_state_dict(state["state_dict_backbone"])
        self.head.load_state_dict(state["state_dict_softmax_fc"])
        self.epoch, self.global_step = state["epoch"], state["global_step"]
        batches = state["state_lr_scheduler"]["total_iters"]
        if batches != self.total_steps:
            log.warning(
                f"resume: the schedule of {path} goes on, whose rate is 0 after {batches:.0f} "
                f"batches; this configuration has {self.total_steps}"
            )

    def verify(self) -> None:
        """Reports the accuracy on the targets."""
        for name, target in self.targets.items():
            result = insightface_verification.judge(self.backbone, target)
            log.info(
                "[%s][%d]Accuracy: %1.5f+-%1.5f",
                name, self.global_step, result.accuracy, result.deviation,
            )  # fmt: skip


class Report:
    """Says every ``frequent`` steps how fast training is, in insightface's words."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.started = self.before = time.perf_counter()
        self.first_step, self.total = trainer.global_step, torch.zeros((), device=trainer.device)

    def __call__(self, loss: Tensor) -> None:
        """Takes the loss of a batch."""
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.global_step
        self.total += loss
        if step % config.frequent:
            return
        done = min(config.frequent, step - self.first_step)
        mean = self.total.item() / done
        now = time.perf_counter()
        speed = done * config.batch_size * trainer.world_size / (now - self.before)
        per_step = (now - self.started) / (step - self.first_step)
        scale = ""
        if config.fp16 and trainer.narrow == torch.float16:  # bfloat16 needs none
            scale = f"Fp16 Grad Scale: {trainer.steps.scaler.get_scale():.0f}   "
        log.info(
            f"Speed {speed:.2f} samples/sec   Loss {mean:.4f}   "
            f"LearningRate {trainer.steps.learning_rate():.6f}   Epoch: {trainer.epoch}   "
            f"Global Step: {step}   {scale}"
            f"Required: {per_step * (trainer.total_steps - step) / 3600:.1f} hours"
        )
        self.before = now
        self.total.zero_()


def train(trainer: Trainer) -> None:
    """Trains the epochs that are left, with reports, verifications and checkpoints."""
    report, config = Report(trainer), trainer.config
    while trainer.epoch < config.num_epoch:
        for loss in trainer.train_epoch():
            report(loss)
            if trainer.global_step % config.verbose == 0 and trainer.rank == 0:
                trainer.verify()
        trainer.save()


def _write(state: dict[str, Any], path: Path) -> None:
    """Writes a file that is whole from the moment it has its name."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _log_to(folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0:
        handlers.append(logging.FileHandler(folder / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("Training: %(asctime)s-%(message)s"))
    log.handlers = handlers


def _read(arguments: list[str] | None) -> Config:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="Python file with a config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="another value for a key, as Python writes it")  # fmt: skip
    given = parser.parse_args(arguments)
    values = {}
    for change in given.set:
        key, separator, value = change.partition("=")
        if not separator:
            parser.error(f"--set: expected KEY=VALUE, got {change}")
        try:
            values[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            values[key] = value  # a word
    return insightface_config.load(given.config, values)


def prepared(arguments: list[str] | None) -> Trainer:
    """Returns what the command line asks for, on this rank.

    Raises:
        FileNotFoundError, TypeError, ValueError: the configuration is wrong.
    """
    rank = int(os.getenv("RANK", "0"))
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    config = _read(arguments)
    _log_to(Path(config.output), rank)
    # as in insightface the schedule counts batches, of which several may make a step
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    device = start()
    torch.backends.cudnn.benchmark = True
    trainer = Trainer(config, device)
    for key, value in dataclasses.asdict(config).items():
        log.info(f": {key:32}{value}")
    return trainer


def main(arguments: list[str] | None = None) -> None:
    try:
        trainer = prepared(arguments)
    except (FileNotFoundError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    train(trainer)
    if dist.is_initialized():
        dist.destroy_process_group()
        if trainer.device.type == "cpu":
            # gloo's threads still hold the last tensors, and to free one while Python ends aborts
            time.sleep(0.5)


if __name__ == "__main__":
    main()
