"""A small call for every CUDA kernel of the sparse-delta family, checked against its definition on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels.reference import sparse_delta, sparse_selection

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from ..support.sparse_delta import CHANGED, random_delta
from . import cuda

LAYOUTS = {"aligned": "contiguous", "unaligned": "offset", "padded": "padded"}
"""The layouts that stand for `cuda.ROWS`."""


@dataclass(frozen=True)
class SparseInstance:
    """A call that runs one kernel of the library, and the kernel's name as a regular expression.

    Attributes:
        dtype: of the weight, the matrices or the positions.
        sizes: M, N and K of a product, `(0, N, K)` of a weight alone.
        density: of the entries.
    """

    kernel: str
    operator: str
    dtype: torch.dtype
    sizes: tuple[int, int, int]
    density: float

    def check(self, rows: str) -> None:
        """Runs the kernel on tensors that can be read as `rows` says, and checks its results."""
        checks = {
            "sampled_product": self._check_sampled,
            "product_above": self._check_above,
            "outer_product_topk": self._check_topk,
            "sorted_merge": self._check_sets,
            "sorted_contains": self._check_sets,
        }
        checks.get(self.operator, self._check_in_place)(LAYOUTS[rows], cuda.kernel(self.operator))

    def _check_sampled(self, layout: str, kernel: Callable[..., Tensor]) -> None:
        dy, x = self._matrices(lambda *size: torch.randn(*size, dtype=torch.float64))
        indices = self._positions().int()
        values = kernel(*self._laid_out(layout, dy, x), indices.to(cuda.DEVICE), torch.float32)
        own = sparse_delta.sampled_product(dy, x, indices, torch.float32)
        exact = sparse_delta.sampled_product(dy.double(), x.double(), indices, torch.float64)
        assert_accurate(values, own, exact, self.kernel)

    def _check_above(self, layout: str, kernel: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        dy, x = self._matrices(lambda *size: torch.randint(-2, 3, size))  # of which every sum is exact
        product = (dy.double().t() @ x.double()).abs().flatten()
        wanted = max(1, int(self.density * len(product)))
        threshold = float(product.topk(wanted).values[-1])
        capacity = int((product >= threshold).sum())
        expected = sparse_selection.product_above(dy.double(), x.double(), threshold, capacity)
        positions, values, count = kernel(*self._laid_out(layout, dy, x), threshold, capacity)
        assert int(count) == capacity
        assert_same_bits(positions, expected[0], f"{self.kernel} positions")
        assert_same_bits(values, expected[1].float(), f"{self.kernel} values")

    def _check_topk(self, layout: str, kernel: Callable[..., Tensor]) -> None:
        _, n, k = self.sizes
        generator = torch.Generator().manual_seed(0)
        rows, columns = ((4 * torch.rand(size, generator=generator)).round() for size in (n, k))  # with many ties
        exclude = self._positions().to(self.dtype)
        expected = sparse_selection.outer_product_topk(rows, columns, n * k // 5, exclude)
        operands = self._laid_out(layout, rows, columns)
        positions = kernel(*operands, n * k // 5, on_device(exclude, layout))
        assert_same_bits(positions, expected, self.kernel)

    def _check_sets(self, layout: str, kernel: Callable[..., Any]) -> None:
        first = self._positions().to(self.dtype)
        second = first + 1 if self.operator == "sorted_contains" else first[::3] + self.sizes[1] * self.sizes[2]
        results = kernel(on_device(first, layout), on_device(second, layout))
        expected = getattr(sparse_selection, self.operator)(first, second)
        for actual, exact in zip(_as_tuple(results), _as_tuple(expected), strict=True):
            assert_same_bits(actual, exact, self.kernel)

    def _check_in_place(self, layout: str, kernel: Callable[..., None]) -> None:
        _, n, k = self.sizes
        delta = random_delta((n, k), int(n * k * self.density), dtype=self.dtype)
        definition = getattr(sparse_delta, self.operator)
        own = delta.run(definition, self.operator)
        exact = delta.map(Tensor.double).run(definition, self.operator)
        arguments = {name: on_device(value, layout) for name, value in delta.arguments(self.operator).items()}
        kernel(*arguments.values())
        for name in CHANGED[self.operator]:
            assert_accurate(arguments[name], own[name], exact[name], f"{self.kernel} {name}")

    def _matrices(self, drawn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        m, n, k = self.sizes
        return drawn(m, n).to(self.dtype), drawn(m, k).to(self.dtype)

    def _positions(self) -> Tensor:
        _, n, k = self.sizes
        generator = torch.Generator().manual_seed(1)
        return torch.randperm(n * k, generator=generator)[: max(1, int(n * k * self.density))].sort().values

    def _laid_out(self, layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(laid_out(tensor.to(cuda.DEVICE), layout) for tensor in tensors)

    def __str__(self) -> str:
        return self.kernel.replace("\\", "")


def on_device(value: Any, layout: str) -> Any:
    """Contiguous, and in the unaligned layout one element behind where the allocator starts."""
    if not isinstance(value, Tensor):
        return value
    if layout != "offset":
        return value.to(cuda.DEVICE)
    memory = torch.empty(value.numel() + 1, dtype=value.dtype, device=cuda.DEVICE)
    return memory[1:].view(value.shape).copy_(value)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


_WEIGHT, _SMALL, _LARGE = (0, 61, 67), (133, 139, 203), (67, 1290, 1160)
"""A weight; some tiles of 64 x 64; 110 of 128 x 128."""
_TILES = (
    (64, "float", _SMALL),
    (64, "BFloat16", _SMALL),
    (64, "Half", _SMALL),
    (128, "BFloat16", _LARGE),
    (128, "Half", _LARGE),
)

INSTANCES = [
    SparseInstance("scatter_kernel", "scatter_write_", torch.bfloat16, _WEIGHT, 0.3),
    SparseInstance("sparse_adamw_kernel", "sparse_adamw_", torch.float16, _WEIGHT, 0.3),
    SparseInstance("sm3_step_kernel", "sparse_sm3_", torch.bfloat16, _WEIGHT, 0.3),
    SparseInstance("sm3_maxima_kernel", "sparse_sm3_", torch.float32, _WEIGHT, 0.1),
    SparseInstance("tile_starts_kernel", "sampled_product", torch.float32, _SMALL, 1.0),
    SparseInstance("order_entries_kernel", "product_above", torch.float32, _SMALL, 1.0),
    *(
        SparseInstance(
            f"{kernel}_kernel<BlockShape<{name}, {size}, {size}, .*> ?>", operator, cuda.ELEMENTS[name], sizes, 0.05
        )
        for kernel, operator in (("sampled_tiles", "sampled_product"), ("product_above", "product_above"))
        for size, name, sizes in _TILES
    ),
    *(
        SparseInstance(f"transpose_slab_kernel<unsigned {bits}>", "sampled_product", dtype, _SMALL, 0.002)
        for bits, dtype in (("int", torch.float32), ("short", torch.bfloat16))
    ),
    *(
        SparseInstance(f"sampled_dots_kernel<{name}>", "sampled_product", dtype, (1133, 139, 203), 0.005)
        for name, dtype in cuda.ELEMENTS.items()
    ),
    *(
        SparseInstance(kernel, "outer_product_topk", dtype, _WEIGHT, 0.2)
        for kernel, dtype in (
            ("check_factors_kernel", torch.int32),
            ("product_histogram_kernel", torch.int64),
            ("excluded_histogram_kernel", torch.int32),
            ("choose_digit_kernel", torch.int64),
            ("select_products_kernel<.*>", torch.int32),
        )
    ),
    SparseInstance("sorted_merge_kernel", "sorted_merge", torch.int32, _WEIGHT, 0.2),
    SparseInstance("sorted_contains_kernel", "sorted_contains", torch.int64, _WEIGHT, 0.2),
]
"""Every kernel of the family."""
