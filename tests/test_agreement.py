# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""What is wrong on one rank, or differs between ranks, is an error on all of them at once."""

import torch.distributed as dist

import workers
from marginkernels import distributed


def raised_by(function):
    """The type and text of its error."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


def raise_on(ranks, error):
    with distributed.raising_together(dist.group.WORLD):
        if dist.get_rank() in ranks:
            raise error


def errors_of_one_rank():
    rank = dist.get_rank()
    return [
        raised_by(lambda: raise_on([], ValueError("none"))),
        raised_by(lambda: raise_on([1], TypeError("k: expected an integer"))),
        raised_by(lambda: raise_on([0, 1], ValueError(f"k: {rank}"))),
        raised_by(lambda: raise_on([2], KeyError("odd"))),
    ]


def test_an_error_of_one_rank_is_raised_on_all():
    assert workers.run(3, errors_of_one_rank) == [
        [
            None,
            (TypeError, "rank 1: k: expected an integer"),
            (ValueError, "k: 0"),
            (RuntimeError, "rank 2: 'odd'"),
        ],
        [
            None,
            (TypeError, "k: expected an integer"),
            (ValueError, "k: 1"),
            (RuntimeError, "rank 2: 'odd'"),
        ],
        [
            None,
            (TypeError, "rank 1: k: expected an integer"),
            (ValueError, "rank 0: k: 0"),
            (KeyError, "'odd'"),
        ],
    ]
