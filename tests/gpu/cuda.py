"""What the CUDA tests share: how to run an operator's kernel, what to expect, and a call for every kernel there is.

Only the kernels under test run on the GPU; the formulas are computed on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_kernels import libraries

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.operators import ACTIVATIONS, Call, formula, random_call, result_dtypes
from ..support.places import dtype_name

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def require() -> None:
    """Skips the module that calls this where there is no GPU or no CUDA library."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device", allow_module_level=True)
    if libraries.missing["_C_cuda"] is not None:
        pytest.skip(libraries.missing["_C_cuda"], allow_module_level=True)


def kernel(operator: str) -> Callable[..., Any]:
    """The operator as the dispatcher runs it on CUDA tensors."""
    return getattr(torch.ops.peft_kernels, operator).default


def gpu_call(operator: str, **options: Any) -> Call:
    """`random_call` on the GPU."""
    return random_call(operator, device=DEVICE, **options)


def on_host(call: Call) -> Call:
    """The same call with all tensors on the CPU."""
    tensors = {name: value.cpu() for name, value in call.arguments.items() if isinstance(value, Tensor)}
    return call.map(lambda tensor: tensor, **tensors)


def activation_dtype(call: Call) -> torch.dtype:
    """The dtype that the call is a call of."""
    return call.arguments[ACTIVATIONS[call.operator]].dtype


def check(call: Call) -> tuple[Tensor, ...]:
    """Runs the call and holds its results, which are returned, to promised dtypes, shapes and the accuracy rule."""
    results, host = call.run(kernel(call.operator)), on_host(call)
    expected = zip(
        results, result_dtypes(call), formula(host, activation_dtype(call)), formula(host, torch.float64), strict=True
    )
    for index, (actual, promised, own, exact) in enumerate(expected):
        assert actual.dtype == promised
        assert_accurate(actual, own, exact, f"{call.operator} result {index}")
    return results


def check_exact(call: Call, what: object = "result") -> tuple[Tensor, ...]:
    """For calls on small integers, of which every sum is exact: the bits, but for the sign of zero."""
    results, expected = call.run(kernel(call.operator)), formula(on_host(call), torch.float64)
    for actual, promised, exact in zip(results, result_dtypes(call), expected, strict=True):
        assert actual.shape == exact.shape
        # Flat, as einsum gives a column of one element each strides of its own.
        bits = (actual.cpu().flatten() + 0.0, exact.to(promised).flatten() + 0.0)
        assert_same_bits(*bits, f"{call.operator}, {what}")
    return results


ELEMENTS = {"float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16}
_RANKS = {16: 9, 32: 31, 64: 70}
"""Widths of the kernels' rank tiles to ranks that take them; the last one takes two."""


ROWS = ("aligned", "unaligned", "padded")
"""Rows that can be read 16 bytes at a time to their end, not at all, and to somewhere before their end."""


def _padded(tensor: Tensor) -> Tensor:
    """Padded along the dimension that is not contiguous."""
    if tensor.dim() == 2 and tensor.stride(0) < tensor.stride(1):
        return laid_out(tensor.t(), "padded").t()
    return laid_out(tensor, "padded")


@dataclass(frozen=True)
class Instance:
    """A small call that runs one kernel of the library, and the kernel's name as a regular expression.

    Attributes:
        along_depth: whether the right operand of `lora_matmul` has its neighbors along the depth.
    """

    kernel: str
    operator: str
    dtype: torch.dtype
    factor_dtype: torch.dtype
    sizes: dict[str, int] = field(default_factory=dict)
    along_depth: bool = False

    def call(self, rows: str) -> Call:
        """The call, with no whole tiles, and with `rows` of tensors as in ROWS."""
        sizes = {"rows": 67, "columns": 131, "rank": 33, **self.sizes}
        if rows == "aligned":
            sizes |= {name: (size + 7) // 8 * 8 for name, size in sizes.items() if name in ("columns", "out_columns")}
        call = gpu_call(self.operator, **sizes, dtype=self.dtype, factor_dtype=self.factor_dtype, dropout_p=0.3)
        if self.along_depth:
            call = call.map(lambda tensor: tensor, matrix=laid_out(call.arguments["matrix"], "transposed"))
        return call.map(_padded) if rows == "padded" else call

    def __str__(self) -> str:
        return self.kernel.replace(", .*", "").replace("\\", "")


_LARGE = {"rows": 1153, "columns": 67, "out_columns": 1225}
"""100 blocks of 128 x 128."""
_SMALL = {"rows": 67, "columns": 131, "out_columns": 77}


def _matmuls(name: str, dtype: torch.dtype) -> list[Instance]:
    return [
        Instance(
            rf"matmul_kernel<BlockShape<{name}, {size}, {size}, .*>, \(Along\){along}>",
            *("lora_matmul", dtype, torch.float32, sizes),
            along_depth=along == 0,
        )
        for size, sizes in ((128, _LARGE), (64, _SMALL))
        for along in (0, 1)
    ]


INSTANCES = [
    *(
        Instance(f"accumulate_kernel<{out}, {factor}>", "lora_accumulate_", ELEMENTS[out], ELEMENTS[factor])
        for out in ELEMENTS
        for factor in ELEMENTS
    ),
    *(
        Instance(f"{operator.removeprefix('lora_')}_kernel<{name}, {width}>", operator, dtype, other, {"rank": rank})
        for operator in ("lora_shrink", "lora_factor_grad")
        for (name, dtype), other in zip(ELEMENTS.items(), (torch.bfloat16, torch.float16, torch.float32), strict=True)
        for width, rank in _RANKS.items()
    ),
    *(instance for name in ("BFloat16", "Half") for instance in _matmuls(name, ELEMENTS[name])),
    Instance(
        "partial_sums_kernel", "lora_shrink", torch.bfloat16, torch.float32, {"rows": 5, "columns": 1097, "rank": 3}
    ),
]
"""Every kernel but that of the masks, which no random call runs."""
MASK_KERNEL = "dropout_mask_kernel"
