# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with forward and backward of the head captured in CUDA graphs, and compares the losses.

python examples/cuda_graph.py    # needs a GPU
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marginkernels import CosFace, MarginSoftmaxHead

IDENTITIES, FEATURES, EMBEDDING_SIZE = 100_000, 128, 512
STEPS, BATCH_SIZE = 20, 256


def train(graphed: bool) -> tuple[Tensor, float]:
    """Returns the losses of some steps, and the milliseconds of one."""
    torch.manual_seed(0)
    backbone = nn.Linear(FEATURES, EMBEDDING_SIZE, device="cuda")
    head = MarginSoftmaxHead(
        EMBEDDING_SIZE, IDENTITIES, margin=CosFace(0.3), scale=32.0, device="cuda"
    )
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, fused=True)
    call: Callable[..., Any] = head
    if graphed:
        # operands of the shapes and types that every step will have; x needs a gradient
        x = torch.randn(BATCH_SIZE, EMBEDDING_SIZE, device="cuda", requires_grad=True)
        y = torch.randint(IDENTITIES, (BATCH_SIZE,), device="cuda")
        call = torch.cuda.make_graphed_callables(head, (x, y))
    torch.manual_seed(1)
    losses, events = [], [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for step in range(STEPS):
        if step == STEPS // 2:  # by then all kernels are compiled
            events[0].record()
        images = torch.randn(BATCH_SIZE, FEATURES, device="cuda")
        labels = torch.randint(IDENTITIES, (BATCH_SIZE,), device="cuda")
        loss = call(backbone(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())  # a replay writes to the same memory again
    events[1].record()
    torch.cuda.synchronize()
    return torch.stack(losses), events[0].elapsed_time(events[1]) / (STEPS - STEPS // 2)


def main() -> None:
    (eager, eager_ms), (graphed, graphed_ms) = train(False), train(True)
    print(f"a step takes {eager_ms:.2f} ms, with graphs {graphed_ms:.2f} ms")
    print(f"greatest difference of the losses {(eager - graphed).abs().max():.1e}")


if __name__ == "__main__":
    main()
