# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lets several heads share one gather of the same embeddings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from ..update import version

_gathered: ContextVar[dict[tuple[object, ...], tuple[Tensor, Tensor]] | None] = ContextVar(
    "gathered", default=None
)


@contextmanager
def one_gather() -> Iterator[None]:
    """Gathers embeddings that go into several sharded heads once, for all of them::

        with one_gather():
            loss = sum(weight * head(embeddings, labels) for head, weight, labels in tasks)
        loss.backward()

    Without it each head gathers the embeddings of all ranks, and reduce-scatters their gradient.
    In the context all heads over one group that get the same tensor share one gather, and one
    reduce-scatter of the sum of their gradients. Every rank enters the context alike. The losses
    are the same numbers, the gradients within rounding.

    It is for heads with ``normalize="both"``: others convert the embeddings to another type first,
    and gather what comes out, unless the type is that already. In a graph of ``torch.compile`` each
    head gathers for itself.
    """
    token = _gathered.set({})
    try:
        yield
    finally:
        _gathered.reset(token)


def once(x: Tensor, key: tuple[object, ...], gather: Callable[[], Tensor]) -> Tensor:
    """Returns ``gather()`` of a tensor, or what it returned before in the same context."""
    known = _gathered.get()
    if known is None:
        return gather()
    place = (id(x), version(x), *key)
    if place not in known:
        known[place] = x, gather()  # x too, so that no other tensor gets its id
    return known[place][1]


def is_known(x: Tensor) -> bool:
    """Returns whether a tensor, as it is now, was gathered in this context."""
    return any(place[:2] == (id(x), version(x)) for place in _gathered.get() or {})
