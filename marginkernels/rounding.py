# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Rounds fp32 numbers to bfloat16 at random, up or down, so that the mean stays the number.

A weight in bfloat16 has 8 bits: to the nearest, a step smaller than 1/512 of it would be lost. The
random bits come from a counter, the number of the step, the class and the feature: so they are the
same for any number of threads, chunks or ranks, and on every backend. csrc/rounding.h and
backends/triton/update.py have the same.
"""

import torch
from torch import Tensor

# Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), of which 7
# rounds pass BigCrush. csrc/numerics.h has the number of rounds too.
PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns four random words from four words of a counter and two of a key.

    Words are int64 tensors with values of 32 bits, which broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower word of a product, which int64 does not hold as it is."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _LOW


def random_words(
    random: Tensor,  # (2,) int64: seed and step
    class_id: Tensor,  # (R,) of all ranks
    features: int,
    stream: int,
) -> Tensor:
    """Returns 32 random bits for each feature of the classes, (R, D) int64.

    Stream 0 has the bits of the weight, the lower 16, and of the first state, the upper 16. Stream
    1 has those of the second state, the lower 16.
    """
    seed, step = random & _LOW, random[1]
    key = seed[0], (random[0] >> 32) & _LOW
    groups = torch.arange(-(-features // 4), device=random.device)
    counter = (
        groups,
        class_id[:, None] & _LOW,
        step & _LOW,
        torch.full((), stream, dtype=torch.int64, device=random.device),
    )
    words = torch.broadcast_tensors(*philox(counter, key))
    return torch.stack(words, 2).flatten(1)[:, :features]


def stochastically_rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 numbers to bfloat16: away from 0 with the probability of the part cut off.

    Args:
        values: of any shape. Infinities and NaN stay.
        bits: 16 random bits for each, int64.
    """
    finite = values.isfinite()
    pattern = values.float().view(torch.int32) + bits.int()
    rounded = (pattern & ~0xFFFF).view(torch.float32)
    return torch.where(finite, rounded, values.float()).bfloat16()


def stored(
    values: Tensor,  # (R, D) weights or a state
    dtype: torch.dtype,
    position: int,  # 0 for the weight, then the states in their order
    random: Tensor,  # (2,) int64
    class_id: Tensor,  # (R,)
    of_bias: bool = False,
) -> Tensor:
    """Returns weights or a state as they are stored: bfloat16 is rounded at random.

    ``values`` may also be (R, 1), biases or their state, with streams 2 and 3 in place of 0 and 1.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    words = random_words(random, class_id, values.shape[1], position // 2 + 2 * of_bias)
    bits = words >> 16 if position == 1 else words & 0xFFFF
    return stochastically_rounded(values, bits)
