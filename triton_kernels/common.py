"""What every Triton kernel of the package shares: launching, matrix products, dropout masks, padding.

The kernels run on CUDA devices, or on CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`, read at import), where
bfloat16 arithmetic is wrong: interpreted kernels take float32 and float16.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.reference.philox import dropout_scale, dropout_threshold

INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Whether kernels of this process run in Triton's interpreter."""

COMPILE_OPTIONS = {"enable_fp_fusion": True}
"""Options of every kernel. Multiply-add stays one instruction in Triton 3.10 and later, where that is no default."""

_INTERPRETING = tl.constexpr(INTERPRETING)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Runs `kernel` over `grid` on `device`'s current stream; an empty grid runs nothing.

    Every launch of the package goes through here, so that the offline compile sees the arguments users' calls have.
    """
    if 0 in grid:
        return
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with guard:
        kernel[grid](*arguments, **COMPILE_OPTIONS, **options)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one block may use on `device`; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    available: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return available


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)


def padded(size: int, smallest: int, largest: int) -> int:
    """The power of two at or above `size`, kept within [smallest, largest]: the width of a tile over `size` elements.

    A rank above `largest` is walked in several tiles of that width.
    """
    return max(smallest, min(largest, 1 << max(0, size - 1).bit_length()))


def even_chunks(steps: int, parts: int) -> tuple[int, int]:
    """Cuts `range(steps)` into at most `parts` chunks of one length; (length, count), both at least 1."""
    length = max(1, ceil_div(steps, max(1, parts)))
    return length, max(1, ceil_div(steps, length))


# Warps to split a sum over: 16 on each of the 132 multiprocessors of an H100, enough loads in flight for its memory.
# A constant, not the device's own count: the order of summation must not depend on the machine.
TARGET_WARPS = 2112


@dataclass(frozen=True)
class Tile:
    """Tile of the activations (`rows` x `columns`) and how a program walks it; `inner` is the K step of a GEMM."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    inner: int = 0

    def splits(self, programs: int, steps: int) -> tuple[int, int]:
        """How to cut a loop of `steps` tiles, when `programs` run beside each other anyway: (steps per split, splits).

        A split is worth its partial sums only while it still takes four steps.
        """
        wanted = min(TARGET_WARPS // self.num_warps // max(1, programs), steps // 4)
        return even_chunks(steps, wanted)

    def options(self) -> dict[str, int]:
        """Triton's launch options for it."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Dropout:
    """The kernel arguments that stand for a dropout mask, or for none.

    Attributes:
        active: whether elements are dropped at all; a compile-time switch in the kernels.
        rng_state: int64 `[2]` (seed, offset) on the device, or None; read inside the kernel, so no host sync.
        threshold: 16-bit draws below it drop their element.
        scale: factor on kept elements. Kernels keep or zero an element exactly and fold this into their scaling.
    """

    def __init__(self, dropout_p: float, rng_state: Tensor | None) -> None:
        self.active = rng_state is not None and dropout_p != 0.0
        self.rng_state = rng_state.contiguous() if self.active and rng_state is not None else None
        self.threshold = dropout_threshold(dropout_p) if self.active else 0
        self.scale = dropout_scale(dropout_p) if self.active else 1.0


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles one kernel for all token counts and dropout probabilities.

    Triton otherwise specializes on each integer's being 1 or a multiple of 16, and a changing sequence length would
    recompile. Strides and feature counts do need that: wide loads follow from them.
    """
    return triton.jit(function, do_not_specialize=["M", "S", "T", "batch", "blocks", "threshold", "chunk", "splits"])


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a b` in float32: tensor cores for 16-bit operands, exact float32 products otherwise.

    TF32, also in three passes, would miss the accuracy rule for float32 at small inner sizes.
    """
    if _INTERPRETING:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def dot_to_16_bits(a, b, accumulator):
    """`accumulator + a b` of float32 `a` and any `b` on tensor cores, to 2**-16 of each product.

    A float32 number is the sum of its bfloat16 rounding and a rest, which is rounded to bfloat16 in turn; the product
    of two rests is left out.
    """
    if _INTERPRETING:
        return dot(a, b, accumulator)
    a_high = a.to(tl.bfloat16)
    a_low = (a - a_high.to(tl.float32)).to(tl.bfloat16)
    b_high = b.to(tl.bfloat16)
    if b.dtype != tl.bfloat16:
        b_low = (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16)
        accumulator = dot(a_high, b_low, accumulator)
    accumulator = dot(a_low, b_high, accumulator)
    return dot(a_high, b_high, accumulator)


@triton.jit
def pointers(base, rows, row_stride, columns, column_stride):
    """Pointers to the tile `rows x columns` of a strided matrix at `base`, 64-bit throughout."""
    return base + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def _keep_bits(word, threshold):
    """Bits 0 and 1: whether the low and the high half of a Philox word keep their elements."""
    return ((word & 0xFFFF) >= threshold).to(tl.uint32) | (((word >> 16) >= threshold).to(tl.uint32) << 1)


@triton.jit
def _group_keep_bits(rng_ptr, threshold, group, row):
    """Bits 0 to 7: whether elements 0 to 7 of the group are kept, from one Philox call; group and row uint32."""
    offset = tl.load(rng_ptr + 1)
    w0, w1, w2, w3 = tl.philox(tl.load(rng_ptr), group, row, offset.to(tl.uint32), (offset >> 32).to(tl.uint32))
    low = _keep_bits(w0, threshold) | (_keep_bits(w1, threshold) << 2)
    return low | (_keep_bits(w2, threshold) << 4) | (_keep_bits(w3, threshold) << 6)


@triton.jit
def dropout_keep(
    rng_ptr, threshold, row, first_column, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """The keep mask `[BLOCK_M, BLOCK_C]` of rows `row [BLOCK_M]` and columns from `first_column` (a multiple of 8).

    Bit for bit the layout of `peft_kernels/reference/philox.py`: one Philox call decides a group of eight elements.
    The decisions travel as bits, PACK groups to a register, and are spread over the elements in the end. PACK = 1 suits
    operands on their way from memory, where a thread holds whole groups. PACK = 4 suits accumulators, whose layout
    gives each thread two elements of many groups: the loop keeps the compiler from moving the Philox calls behind the
    exchange between threads, where four threads would repeat each of them.
    """
    threshold = threshold.to(tl.uint32)
    WORDS: tl.constexpr = BLOCK_C // (8 * PACK)
    row = tl.broadcast_to(row.to(tl.uint32)[:, None], (BLOCK_M, WORDS))
    group = tl.broadcast_to((first_column // 8 + PACK * tl.arange(0, WORDS)).to(tl.uint32)[None, :], (BLOCK_M, WORDS))
    if PACK == 1:
        bits = _group_keep_bits(rng_ptr, threshold, group, row)
    else:
        bits = tl.zeros((BLOCK_M, WORDS), tl.uint32)
        for part in range(PACK):
            bits |= _group_keep_bits(rng_ptr, threshold, group + part, row) << (8 * part)
    lane = tl.arange(0, 8 * PACK).to(tl.uint32)[None, None, :]
    keep = tl.broadcast_to(bits[:, :, None], (BLOCK_M, WORDS, 8 * PACK)) >> lane & 1
    return tl.reshape(keep, (BLOCK_M, BLOCK_C)) != 0


@jit
def sum_partials_kernel(partial_ptr, out_ptr, size, splits, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """`out[i] = sum over s of partial[s, i]`, the second stage of every split sum, always in the same order.

    partial `[splits, size]` float32, out `[size]`. Bytes: (4 splits + out's) size; FLOPs: splits * size.
    """
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S).to(tl.int64)
        inside = (split < splits)[:, None] & (positions < size)[None, :]
        terms = tl.load(partial_ptr + split[:, None] * size + positions[None, :], mask=inside, other=0.0)
        total += tl.sum(terms, 0)
    tl.store(out_ptr + positions, total.to(out_ptr.dtype.element_ty), mask=positions < size)


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Sums `partial [splits, ...]` over its first dimension into the contiguous `out`."""
    block = 512
    grid = (ceil_div(out.numel(), block),)
    arguments = (partial, out, out.numel(), partial.shape[0])
    launch(sum_partials_kernel, grid, out.device, *arguments, BLOCK_S=8, BLOCK=block, num_warps=4)
