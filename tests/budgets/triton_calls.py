"""The operator calls whose Triton kernels are held to a budget, one function per family, on tensors without memory.

Sizes are those of a Llama-3-8B layer's attention projections over 8192 tokens, where tiles are largest, and a few
smaller ones for the tiles that serve those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft_kernels.triton_kernels import lora, s2ft, sparse_delta, token_elimination, token_selection
from torch import Tensor

Calls = Callable[[], None]
M, K, N = 8192, 4096, 4096


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _forward(dtype: torch.dtype, factors: torch.dtype, rank: int, dropout_p: float, rows: int = M) -> None:
    x, weight, bias = _empty(rows, K, dtype=dtype), _empty(N, K, dtype=dtype), _empty(N, dtype=dtype)
    lora_a, lora_b = _empty(rank, K, dtype=factors), _empty(N, rank, dtype=factors)
    rng_state = _empty(2, dtype=torch.int64) if dropout_p else None
    lora.lora_linear_forward(x, weight, bias, lora_a, lora_b, 2.0, dropout_p, rng_state)


def _backward(dtype: torch.dtype, factors: torch.dtype, rank: int, dropout_p: float, rows: int = M) -> None:
    x, dy, weight = _empty(rows, K, dtype=dtype), _empty(rows, N, dtype=dtype), _empty(N, K, dtype=dtype)
    lora_a, lora_b = _empty(rank, K, dtype=factors), _empty(N, rank, dtype=factors)
    hidden = _empty(rows, rank, dtype=torch.float32)
    rng_state = _empty(2, dtype=torch.int64) if dropout_p else None
    lora.lora_linear_backward(dy, x, weight, lora_a, lora_b, hidden, 2.0, dropout_p, rng_state, True, True, True)


def _accumulate(dtype: torch.dtype, factors: torch.dtype, rank: int, dropout_p: float) -> None:
    rng_state = _empty(2, dtype=torch.int64) if dropout_p else None
    out, hidden = _empty(M, K, dtype=dtype), _empty(M, rank, dtype=torch.float32)
    lora.lora_accumulate_(out, hidden, _empty(rank, K, dtype=factors), 1.0, dropout_p, rng_state)


def _mask() -> None:
    lora.dropout_mask(M, K, 0.1, _empty(2, dtype=torch.int64))


def _sampled(dtype: torch.dtype, rows: int = M, columns: int = K, index_dtype: torch.dtype = torch.int32) -> None:
    dy, x = _empty(rows, columns, dtype=dtype), _empty(rows, columns, dtype=dtype)
    indices = _empty(columns * columns // 100, dtype=index_dtype)
    sparse_delta.sampled_product(dy, x, indices, torch.float32)


def _slice_grad(dtype: torch.dtype, channels: int, dim: int, rows: int = M, columns: int = K, out: int = N) -> None:
    """Of some of x's columns at dim 1, which come as a matrix, or of grad_out's at dim 0."""
    dy, x = _empty(rows, out, dtype=dtype), _empty(rows, channels if dim == 1 else columns, dtype=dtype)
    indices = _empty(channels, dtype=torch.int64) if dim == 0 else None
    s2ft.slice_grad(dy, x, indices, torch.float32)


def _gather(dtype: torch.dtype, channels: int) -> None:
    s2ft.gather_columns(_empty(M, K, dtype=dtype), _empty(channels, dtype=torch.int64))


def _product(
    dtype: torch.dtype,
    kept: int,
    added: bool = True,
    transposed: bool = False,
    fused: bool = False,
    sizes: tuple[int, int, int] = (2 * M, K, N),
) -> None:
    """`gather_linear_scatter` of kept rows: with a residual from all of x, without one and with a bias from theirs."""
    rows, inner, out = sizes
    x, weight = _empty(rows if added else kept, inner, dtype=dtype), _empty(out, inner, dtype=dtype)
    residual, bias = (_empty(rows, out, dtype=dtype), None) if added else (None, _empty(out, dtype=dtype))
    if transposed:
        weight = weight.t().contiguous()
    launcher = token_elimination.fused_gather_linear_scatter if fused else token_elimination.gather_linear_scatter
    launcher(x, weight, bias, _empty(kept, dtype=torch.int32), residual, added, transposed)


def _moved(dtype: torch.dtype) -> None:
    rows = _empty(M, dtype=torch.int32)
    values = token_elimination.gather_rows(_empty(2 * M, K, dtype=dtype), rows)
    token_elimination.scatter_add_rows_(_empty(2 * M, K, dtype=dtype), values, rows)


def _scores(
    dtype: torch.dtype,
    block_size: int,
    key_heads: int = 8,
    channels: int = 128,
    documents: bool = False,
    tokens: int = M,
    heads: int = 32,
) -> None:
    q, k = _empty(1, heads, tokens, channels, dtype=dtype), _empty(1, key_heads, tokens, channels, dtype=dtype)
    token_selection.block_scores(q, k, block_size, _empty(1, tokens, dtype=torch.int32) if documents else None)


_BF16, _FP32 = torch.bfloat16, torch.float32

BUDGETED: dict[str, Calls] = {
    "forward bf16 r16": lambda: _forward(_BF16, _BF16, 16, 0.0),
    "forward bf16 r16 dropout": lambda: _forward(_BF16, _BF16, 16, 0.1),
    "forward bf16 r64 fp32-factors dropout": lambda: _forward(_BF16, _FP32, 64, 0.1),
    "forward bf16 r16 1024-rows": lambda: _forward(_BF16, _BF16, 16, 0.0, rows=1024),
    "forward bf16 r16 32-rows": lambda: _forward(_BF16, _BF16, 16, 0.0, rows=32),
    "forward fp32 r16 dropout": lambda: _forward(_FP32, _FP32, 16, 0.1),
    "backward bf16 r16": lambda: _backward(_BF16, _BF16, 16, 0.0),
    "backward bf16 r16 dropout": lambda: _backward(_BF16, _BF16, 16, 0.1),
    "backward bf16 r64 fp32-factors dropout": lambda: _backward(_BF16, _FP32, 64, 0.1),
    "backward fp32 r16 dropout": lambda: _backward(_FP32, _FP32, 16, 0.1),
    "accumulate bf16 r16": lambda: _accumulate(_BF16, _BF16, 16, 0.0),
    "accumulate bf16 r64 fp32-factors dropout": lambda: _accumulate(_BF16, _FP32, 64, 0.1),
    "dropout_mask": _mask,
    "sampled_product bf16": lambda: _sampled(_BF16),
    "sampled_product fp32": lambda: _sampled(_FP32),
    "slice_grad bf16 of 128 inputs": lambda: _slice_grad(_BF16, 128, 1),
    "slice_grad bf16 of 430 inputs": lambda: _slice_grad(_BF16, 430, 1),
    "slice_grad bf16 of 12 inputs": lambda: _slice_grad(_BF16, 12, 1),
    "slice_grad bf16 of 430 outputs": lambda: _slice_grad(_BF16, 430, 0),
    "slice_grad bf16 of 40 outputs, 256 columns": lambda: _slice_grad(_BF16, 40, 0, columns=256),
    "slice_grad fp32 of 430 inputs": lambda: _slice_grad(_FP32, 430, 1),
    "slice_grad fp32 of 40 outputs, 128 columns": lambda: _slice_grad(_FP32, 40, 0, columns=128),
    "gather_columns bf16": lambda: _gather(_BF16, 430),
    "gather_linear_scatter bf16": lambda: _product(_BF16, M),
    "gather_linear_scatter bf16 transposed": lambda: _product(_BF16, M, transposed=True),
    "gather_linear_scatter bf16 gathered": lambda: _product(_BF16, M, added=False),
    "gather_linear_scatter bf16 512-rows": lambda: _product(_BF16, 512),
    "gather_linear_scatter bf16 32-rows": lambda: _product(_BF16, 32),
    "gather_linear_scatter fp32": lambda: _product(_FP32, M),
    "gather_linear_scatter fp32 fused": lambda: _product(_FP32, M, fused=True),
    "moved rows bf16": lambda: _moved(_BF16),
    "block_scores bf16 of 64": lambda: _scores(_BF16, 64),
    "block_scores bf16 of 64 documents": lambda: _scores(_BF16, 64, documents=True),
    "block_scores bf16 of 64, 64 channels": lambda: _scores(_BF16, 64, channels=64),
    "block_scores bf16 of 64, 256 channels": lambda: _scores(_BF16, 64, channels=256),
    "block_scores bf16 of 100": lambda: _scores(_BF16, 100),
    "block_scores bf16 of 128, 32 key heads": lambda: _scores(_BF16, 128, key_heads=32),
    "block_scores fp32 of 64": lambda: _scores(_FP32, 64),
}
"""Description to calls; every kernel they launch has a budget on every architecture."""


def _of_sizes(rows: int, columns: int, rank: int) -> None:
    """Every operator, with dropout, on sizes that rule out wide loads."""
    half = {"dtype": torch.float16}
    x, square = _empty(rows, columns, **half), _empty(columns, columns, **half)
    hidden, factor = _empty(rows, rank, dtype=torch.float32), _empty(rank, columns, **half)
    dropout = (0.1, _empty(2, dtype=torch.int64))
    lora.dropout_mask(rows, columns, *dropout)
    lora.lora_shrink(x, factor, 1.0, *dropout)
    lora.lora_accumulate_(x, hidden, factor, 1.0, *dropout)
    lora.lora_matmul(x, square, _empty(columns, **half), hidden, factor, 1.0, *dropout)
    lora.lora_factor_grad(x, hidden, 1.0, *dropout, torch.float16, False)
    lora.lora_grad_b(x, hidden, factor.t(), 1.0)


COMPILED: dict[str, Calls] = {
    "sizes of 1": lambda: _of_sizes(1, 1, 1),
    "odd sizes": lambda: _of_sizes(1003, 2047, 5),
    "sampled_product of odd sizes": lambda: _sampled(torch.float16, 1003, 517, torch.int64),
    "slice_grad of one": lambda: _slice_grad(torch.float16, 1, 0, 1, 1, 1),
    "slice_grad of odd inputs": lambda: _slice_grad(torch.float16, 33, 1, 1003, 517, 2047),
    "slice_grad of odd outputs": lambda: _slice_grad(torch.float16, 33, 0, 1003, 517, 2047),
    "slice_grad of odd outputs, few columns": lambda: _slice_grad(torch.float16, 33, 0, 1003, 117, 2047),
    "gather_linear_scatter of one": lambda: _product(torch.float16, 1, sizes=(1, 1, 1)),
    "gather_linear_scatter of odd sizes": lambda: _product(torch.float16, 333, sizes=(1003, 517, 2047)),
    "gather_linear_scatter fp32 of odd sizes": lambda: _product(_FP32, 333, sizes=(1003, 517, 2047)),
    "block_scores of one": lambda: _scores(torch.float16, 1, 1, 1, True, 1, 1),
    "block_scores of odd sizes": lambda: _scores(torch.float16, 7, 3, 33, True, 1003, 9),
    "block_scores of long blocks": lambda: _scores(torch.float16, 300, 3, 33, True, 1003, 9),
}
"""Calls whose kernels must compile, at whatever cost."""

LARGEST: dict[str, Calls] = {
    "forward bf16 r128 fp32-factors": lambda: _forward(_BF16, _FP32, 128, 0.0),
    "forward fp32 r128": lambda: _forward(_FP32, _FP32, 128, 0.0),
    "backward bf16 r32 fp32-factors": lambda: _backward(_BF16, _FP32, 32, 0.0),
    "backward bf16 r128 fp32-factors dropout": lambda: _backward(_BF16, _FP32, 128, 0.1),
    "backward fp32 r128 dropout": lambda: _backward(_FP32, _FP32, 128, 0.1),
    "sampled_product bf16": lambda: _sampled(_BF16),
    "slice_grad bf16": lambda: _slice_grad(_BF16, 430, 1),
    "slice_grad fp32": lambda: _slice_grad(_FP32, 430, 1),
    "gather_linear_scatter bf16": lambda: _product(_BF16, M),
    "gather_linear_scatter fp32 fused": lambda: _product(_FP32, M, fused=True),
    "block_scores bf16": lambda: _scores(_BF16, 128, key_heads=32),
    "block_scores fp32": lambda: _scores(_FP32, 64),
}
"""Calls that take the most shared memory, which must still fit into cards that have little."""
