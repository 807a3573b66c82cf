# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""A head with its classes split over processes equals the head that has them all."""

import pytest
import torch

import workers
from marginkernels import ArcFace
from problems import random_problem
from sharding import ShardedProblem, compare_losses

F32, BF16 = torch.float32, torch.bfloat16


def sharded_problem(world, n, c, d, dtypes=(F32, F32, None), **settings):
    problem = random_problem(n, c, d, dtypes=dtypes, **settings)
    return ShardedProblem(**vars(problem), world=world)


@pytest.mark.parametrize("dtypes", [(F32, F32, None), (BF16, F32, None)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_gradients_within_the_budget(world, dtypes, backend):
    """Classes that do not divide; a rank without rows; ignored rows."""
    problem = sharded_problem(world, 24, 61, 40, dtypes, margin=ArcFace(0.3), scale=24.0)
    problem.y[::6] = -100
    problem.check(backend)
    problem.y[:] = 1  # rank 0 holds all the targets
    problem.check(backend)


@pytest.mark.parametrize("world", [2, 3])
def test_every_loss_and_setting(world):
    """Row losses, statistics, gradients of everything learnable and state, over several steps."""
    workers.run(world, compare_losses)
