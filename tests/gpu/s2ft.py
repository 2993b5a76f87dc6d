"""A small call for every CUDA kernel of slices of channels, checked against its definition on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.reference import s2ft as reference

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.s2ft import CHANGED, random_slice
from . import cuda
from .sparse_delta import LAYOUTS, on_device

_ROWS, _COLUMNS = 37, 525
_CHANNELS = torch.tensor([*range(16, 48), *range(101, 140), *range(200, 520, 7), 524])
"""Runs that can be read and written 16 bytes at a time, runs that cannot, and channels alone."""


@dataclass(frozen=True)
class SliceInstance:
    """A call that runs one kernel of the library, and the kernel's name as a regular expression."""

    kernel: str
    operator: str
    dtype: torch.dtype

    def check(self, rows: str) -> None:
        """Runs the kernel on tensors that can be read as `rows` says, and checks its results."""
        layout = LAYOUTS[rows]
        if self.operator in CHANGED:
            for dim in (0, 1):
                self._check_in_place(layout, dim)
            return
        # Whole rows of 16 bytes, unless the layout says otherwise.
        columns = 528 if rows == "aligned" else _COLUMNS
        torch.manual_seed(0)
        matrices = [torch.randn(_ROWS, columns, dtype=torch.float64).to(self.dtype) for _ in range(3)]
        placed = [laid_out(matrix.to(cuda.DEVICE), layout) for matrix in matrices]
        channels, kernel = _CHANNELS.to(cuda.DEVICE), cuda.kernel(self.operator)
        if self.operator == "gather_columns":
            assert_same_bits(kernel(placed[0], channels), matrices[0][:, _CHANNELS], self.kernel)
        elif self.operator == "swiglu":
            h, kept = kernel(*placed[:2], channels)
            assert_same_bits(kept, h.cpu()[:, _CHANNELS], f"{self.kernel} slice")
            self._check_results([h], [*matrices[:2], _CHANNELS])
        else:
            self._check_results(kernel(*placed), matrices)

    def _check_results(self, results: list[Tensor], arguments: list[Tensor]) -> None:
        definition = getattr(reference, self.operator)
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
        for actual, own, exact in zip(results, definition(*arguments), definition(*wide), strict=False):
            assert_accurate(actual, own, exact, self.kernel)

    def _check_in_place(self, layout: str, dim: int) -> None:
        own_slice = random_slice((61, 68), 23, dim, dtype=self.dtype)
        definition = getattr(reference, self.operator)
        own = own_slice.run(definition, self.operator)
        exact = own_slice.map(Tensor.double).run(definition, self.operator)
        arguments = {name: on_device(value, layout) for name, value in own_slice.arguments(self.operator).items()}
        cuda.kernel(self.operator)(*arguments.values())
        for name in CHANGED[self.operator]:
            assert_accurate(arguments[name], own[name], exact[name], f"{self.kernel} {name}, dim {dim}")

    def __str__(self) -> str:
        return self.kernel.replace("\\", "")


INSTANCES = [
    *(
        SliceInstance(f"gather_columns_kernel<unsigned {bits}>", "gather_columns", dtype)
        for bits, dtype in (("int", torch.float32), ("short", torch.bfloat16))
    ),
    SliceInstance("slice_write_kernel", "slice_write_", torch.bfloat16),
    SliceInstance("slice_exchange_kernel", "slice_exchange_", torch.bfloat16),
    SliceInstance("slice_adamw_kernel", "slice_adamw_", torch.float16),
    *(
        SliceInstance(f"{operator}_kernel<{name}>", operator, dtype)
        for operator in ("swiglu", "swiglu_backward")
        for name, dtype in cuda.ELEMENTS.items()
    ),
]
"""Every kernel of the family."""
