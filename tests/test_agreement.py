# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Raises errors of one rank, and settings that differ between ranks, on all ranks at once."""

import warnings

import pytest
import torch
import torch.distributed as dist

from marginkernels import (
    AdaCos,
    ArcFace,
    CosFace,
    MarginSoftmaxHead,
    NSoftmax,
    PartialFC,
    margin_cross_entropy,
)
from marginkernels.compat.insightface import PartialFC_V2
from marginkernels.distributed.shard import raising_together
from marginkernels.sampling import ChosenBy
from tests.support import workers
from tests.support.sharding import F64, my_shard


def raised_by(function):
    """Returns the type and text of the error that a function raises, None for no error."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


def raise_on(ranks, error):
    with raising_together(dist.group.WORLD):
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


C, N, D = 11, 6, 8


def call(shard=None, **changed):
    """Makes a training step of this rank, with some arguments changed."""
    torch.manual_seed(0)
    shard = shard or my_shard(C)
    arguments = dict(
        x=torch.randn(N, D, requires_grad=True),
        w=torch.randn(C, D)[shard.start : shard.stop].requires_grad_(),
        y=torch.randint(0, C, (N,)),
        margin=CosFace(0.2),
        scale=8.0,
        shard=shard,
    )
    loss = margin_cross_entropy(**arguments | changed)
    (loss[0] if isinstance(loss, tuple) else loss).sum().backward()
    return loss


PROMISES = [{}, dict(even_batches=True), dict(max_local_batch=N)]

# rank 1's value in place of rank 0's, and the name in the error of both
DIFFERENCES = {
    "label_smoothing": (0.1, "label_smoothing"),
    "z_loss": (0.1, "z_loss"),
    "focal_gamma": (1.0, "focal_gamma"),
    "reduction": ("sum", "reduction"),
    "normalize": ("none", "normalize"),
    "ignore_index": (-1, "ignore_index"),
    "scale": (16.0, "scale"),
    "scale that learns": (torch.nn.Parameter(torch.tensor(8.0)), "scale"),
    "margin": (CosFace(0.3), "margin"),
    "margin in eval mode": (CosFace(0.2).eval(), "training"),
    "compute_dtype": (torch.bfloat16, "compute_dtype"),
    "sampling rate": (PartialFC(0.5), "sampling"),
    "sampling with logq": (PartialFC(1.0, logq=True), "sampling"),
    "sampling by a function": (ChosenBy(lambda label: torch.arange(5)), "sampling"),
    "row_margin": (torch.zeros(N), "row_margin"),
}


def half(label):
    return torch.arange(C // 2)


def differing(promise):
    messages = {}
    for case, (value, _) in DIFFERENCES.items():
        name = case.split(" ")[0]
        changed = {name: value} if dist.get_rank() == 1 else {}
        messages[case] = raised_by(lambda c=changed: call(my_shard(C, **promise), **c))
    head = MarginSoftmaxHead(D, C, margin=CosFace(), scale=8.0, sharding=dist.group.WORLD)
    messages["k"] = raised_by(lambda: head.topk(torch.randn(N, D), 2 + dist.get_rank()))
    messages["grad mode"] = raised_by(without_gradient_on_one)
    odd = dist.get_rank() == 1
    for case, settings in {
        "margin's branch": dict(margin=ArcFace(0.2, branch="easy" if odd else "none")),
        "scale that sweeps twice": dict(margin=NSoftmax(), scale=AdaCos(C, delayed=odd)),
        "sample_weight's type": dict(sample_weight=torch.ones(N, dtype=F64 if odd else None)),
        "logq of a function": dict(sampling=ChosenBy(half, logq=odd)),
    }.items():
        messages[case] = raised_by(lambda s=settings: call(my_shard(C, **promise), **s))
    return messages


def without_gradient_on_one():
    with torch.set_grad_enabled(dist.get_rank() == 0):
        call()


@pytest.mark.parametrize("promise", PROMISES, ids=["sizes gathered", "even", "at most"])
def test_settings_that_differ_are_named_on_all_ranks(promise):
    first, second = workers.run(2, differing, promise)
    assert first == second
    names = {case: name for case, (_, name) in DIFFERENCES.items()}
    names |= {"k": "k", "grad mode": "torch.is_grad_enabled()", "margin's branch": "margin"}
    names |= {"scale that sweeps twice": "scale", "sample_weight's type": "sample_weight"}
    names |= {"logq of a function": "sampling"}
    for case, name in names.items():
        assert first[case] is not None, case
        kind, message = first[case]
        assert kind is ValueError and message.startswith(name), (case, first[case])
        assert "on rank 0" in message and "on rank 1" in message, message


def bad_arguments():
    x = torch.randn(N, D)
    return {
        "labels of int32": dict(y=torch.zeros(N, dtype=torch.int32)),
        "labels of a wrong shape": dict(y=torch.zeros(N - 1, dtype=torch.int64)),
        "a label out of range": dict(y=torch.full((N,), C)),
        "no tensor": dict(x=x.tolist()),
        "no weights": dict(w=None),
        "features of a wrong width": dict(x=x[:, 1:]),
        "a NaN": dict(x=x * torch.nan),
        "negative weights": dict(sample_weight=-torch.ones(N)),
        "too many rows": dict(x=x.repeat(2, 1), y=torch.zeros(2 * N, dtype=torch.int64)),
        "an unknown backend": dict(backend="cudnn"),
        "a NaN of a scale": dict(scale=torch.tensor(torch.nan)),
        "a module that raises": dict(scale=Raises()),
    }


class Raises(torch.nn.Module):
    def forward(self):
        raise RuntimeError("this scale is broken")


def with_one_bad_argument(promise):
    shard, bad = my_shard(C, **promise), dist.get_rank() == 1
    raised = {
        case: raised_by(lambda c=changed: call(shard, **(c if bad else {})))
        for case, changed in bad_arguments().items()
    }
    head = MarginSoftmaxHead(D, C, margin=CosFace(), scale=8.0, sharding=dist.group.WORLD)
    raised["k too large"] = raised_by(lambda: head.topk(torch.randn(N, D), 12 if bad else 2))
    assert call(shard).isfinite()  # the group can still be used
    return raised


@pytest.mark.parametrize("promise", PROMISES, ids=["sizes gathered", "even", "at most"])
def test_a_bad_argument_of_one_rank_is_an_error_of_all(promise):
    first, second = workers.run(2, with_one_bad_argument, promise)
    for case, own in second.items():
        if case == "too many rows" and not promise:
            assert own is None and first[case] is None
        elif case == "too many rows" and "even_batches" in promise:
            assert own == first[case] and "6 rows (even_batches=True) on rank 0" in own[1]
        else:
            assert own is not None and first[case] == (own[0], f"rank 1: {own[1]}"), case


def statistics_of_one_rank():
    everywhere = call(return_stats=True)
    if dist.get_rank() == 0:
        alone = call(return_stats=True)
        assert all(map(torch.equal, alone[1], everywhere[1]))
        return alone[0]
    return call()


def test_one_rank_alone_may_ask_for_statistics():
    """Covers trainers in which only rank 0 writes the log."""
    first, second = workers.run(2, statistics_of_one_rank)
    assert torch.equal(first, second)


def unfused_rows_of_other_widths():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that the loss is not fused
        head = PartialFC_V2(lambda logits, labels: logits, D, C)
    return raised_by(lambda: head(torch.randn(N, D + dist.get_rank()), torch.arange(N)))


def test_rows_of_another_width_are_named_on_all_ranks_where_logits_are_held_too():
    first, second = workers.run(2, unfused_rows_of_other_widths)
    message = f"local_embeddings: expected shape (N, {D}), got ({N}, {D + 1})"
    assert second == (ValueError, message) and first == (ValueError, f"rank 1: {message}")


def raised_on_a_rank_without_classes():
    """Splits four classes over three ranks, so that the last one has none."""
    shard = my_shard(4)

    def sample(label):
        return torch.arange({2: 2}[shard.size])

    arguments = dict(w=torch.randn(4, D)[shard.start : shard.stop], y=torch.randint(0, 4, (N,)))
    return shard.size, raised_by(lambda: call(shard, sampling=ChosenBy(sample), **arguments))


def test_a_sampler_that_fails_on_a_rank_without_classes():
    first, second, third = workers.run(3, raised_on_a_rank_without_classes)
    assert (first[0], second[0], third) == (2, 2, (0, (KeyError, "0")))
    assert first == second == (2, (RuntimeError, "rank 2: 0"))
