"""Philox4x32-10 and the dropout masks made of it, in Python integers: a second opinion on every backend.

Written from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3, and the layout that
`peft_kernels/reference/philox.py` documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**32

# Random123, tests/kat_vectors, philox 4x32 with 10 rounds: (counter, key, output).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_WORD - 1,) * 4, (_WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four output words for one counter and key."""
    left_0, right_0, left_1, right_1 = counter
    key_0, key_1 = key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * left_0, 0xCD9E8D57 * left_1
        left_0, right_0, left_1, right_1 = (
            product_1 // _WORD ^ right_0 ^ key_0,
            product_1 % _WORD,
            product_0 // _WORD ^ right_1 ^ key_1,
            product_0 % _WORD,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) % _WORD, (key_1 + 0xBB67AE85) % _WORD
    return left_0, right_0, left_1, right_1


def draws(row: int, columns: int, seed: int, offset: int) -> list[int]:
    """The 16-bit numbers of the first `columns` elements of a row; seed and offset are signed 64-bit numbers."""
    seed, offset = seed % 2**64, offset % 2**64
    numbers: list[int] = []
    for group in range((columns + 7) // 8):
        words = philox((group, row, offset % _WORD, offset // _WORD), (seed % _WORD, seed // _WORD))
        numbers += [half for word in words for half in (word % 2**16, word // 2**16)]
    return numbers[:columns]


def keep_mask(rows: int, columns: int, dropout_p: float, seed: int, offset: int) -> Tensor:
    """The keep mask, bool `[rows, columns]`."""
    threshold = round(dropout_p * 2**16)
    return torch.tensor(
        [[number >= threshold for number in draws(row, columns, seed, offset)] for row in range(rows)],
        dtype=torch.bool,
    ).reshape(rows, columns)
