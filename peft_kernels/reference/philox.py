"""Philox4x32-10 dropout masks in plain PyTorch.

The mask of a `[rows, columns]` activation is a pure function of `rng_state`, an int64 tensor `(seed, offset)`, so it is
never stored: forward and backward regenerate it. Row `m` owns its own random stream, the concatenation over
`g = 0, 1, ...` of the four output words of

    Philox4x32-10(counter = (g, m, offset_low, offset_high), key = (seed_low, seed_high))

read as little-endian 16-bit numbers: element `(m, c)` takes number `c % 8` of group `c // 8` and is kept when that
number is at least `dropout_threshold(p)`. One Philox call thus decides eight elements, and no group crosses a row.
Every backend follows this layout bit for bit.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def dropout_threshold(dropout_p: float) -> int:
    """The number below which a 16-bit draw drops its element: `dropout_p` in units of 2**-16, rounded to nearest."""
    return int(dropout_p * 65536.0 + 0.5)


def dropout_scale(dropout_p: float) -> float:
    """The factor on kept elements, `1 / (1 - p)`; 0 at `p = 1`, where nothing is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def _multiply_32(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `x * multiplier`; `x` holds 32-bit numbers in int64, which a whole product overflows."""
    low_half = x * (multiplier & 0xFFFF)
    middle = x * (multiplier >> 16) + (low_half >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox_4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit numbers; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _multiply_32(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply_32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL[0]) & _LOW_32, (k1 + _WEYL[1]) & _LOW_32
    return c0, c1, c2, c3


def dropout_mask(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """The keep mask, bool `[rows, columns]`, that `rng_state` stands for.

    Args:
        rows: number of rows (tokens) M.
        columns: number of columns (features).
        dropout_p: probability of dropping an element, in [0, 1]; honoured in steps of 2**-16.
        rng_state: int64 `[2]`, (seed, offset), on the device of the result.
    """
    device = rng_state.device
    groups = (columns + 7) // 8
    group = torch.arange(groups, dtype=torch.int64, device=device)[None, :]
    row = torch.arange(rows, dtype=torch.int64, device=device)[:, None]
    seed, offset = rng_state[0], rng_state[1]
    words = philox_4x32_10(
        (group, row, offset & _LOW_32, (offset >> 32) & _LOW_32), (seed & _LOW_32, (seed >> 32) & _LOW_32)
    )
    halves = [half.expand(rows, groups) for word in words for half in (word & 0xFFFF, word >> 16)]
    draws = torch.stack(halves, dim=-1).reshape(rows, groups * 8)[:, :columns]
    return draws >= dropout_threshold(dropout_p)
