# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs functions in groups of processes over gloo.

The processes fork from a server that has imported torch, so that they start in no time.
"""

import atexit
import datetime
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds, of a collective and of a call

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.nn.parallel", "torch._dynamo", "marginkernels"]
)
_pools: dict[int, "Pool"] = {}


def run(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Runs function(*args) in ``world_size`` processes and returns the results by rank.

    gloo is the default group of the processes. They import the function, which has to be one of a
    module, and live on for the next call.

    Raises:
        RuntimeError: a process failed; the text has its traceback.
    """
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    pool = _pools[world_size]
    try:
        return pool.run(function, *args)
    except BaseException:
        pool.kill()  # a rank may be waiting for another that failed
        del _pools[world_size]
        raise


class Pool:
    """Holds the processes of one group. Tests that end processes have a pool of their own."""

    def __init__(self, world_size: int, timeout: float = TIMEOUT) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.pipes, self.processes, self.patience = [], [], max(timeout, TIMEOUT) + 30
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve,
                args=(theirs, rank, world_size, f"file://{self.directory.name}/store", timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.kill)

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """Runs the function in each process and returns the results by rank.

        Raises:
            RuntimeError: a process failed; the text has its traceback.
        """
        self.start(function, *args)
        results = self.outcomes()
        for rank, (succeeded, result) in enumerate(results):
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(results)}: {result}")
        return [result for _, result in results]

    def start(self, function: Callable, *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))

    def outcomes(self) -> list[tuple[bool, Any]]:
        """Returns for each rank whether it succeeded, and its result or traceback.

        A process that ended has None.
        """
        return [self._outcome(pipe) for pipe in self.pipes]

    def _outcome(self, pipe: Connection) -> tuple[bool, Any]:
        try:
            if not pipe.poll(self.patience):
                return False, "no answer in time"
            return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return False, None

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.directory.cleanup()


def _serve(pipe: Connection, rank: int, world_size: int, url: str, timeout: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=url,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            outcome = True, function(*args)
        except Exception:
            outcome = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(outcome))
