"""A small call for every CUDA kernel of token elimination, checked against its definition on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_kernels.reference import cross_entropy, token_elimination, token_selection

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import laid_out
from . import cuda
from .sparse_delta import LAYOUTS

_TOTAL = 37
_ROWS = torch.tensor([0, 1, -1, 4, 9, 10, 11, -1, 30, 36, -1], dtype=torch.int32)
_EPS = 1e-5


@dataclass(frozen=True)
class TokenInstance:
    """A call that runs one kernel of the library, and the kernel's name as a regular expression.

    Attributes:
        columns: of x; the next multiple of 8 where rows are to be aligned.
    """

    kernel: str
    operator: str
    dtype: torch.dtype
    columns: int = 525

    def check(self, rows: str) -> None:
        """Runs the kernel on tensors that can be read as `rows` says, and checks its results."""
        torch.manual_seed(0)
        columns = (self.columns + 7) // 8 * 8 if rows == "aligned" else self.columns
        checks: dict[str, Callable[[str, int], None]] = {
            "scatter_add_rows_": self._check_in_place,
            "rope_rows": self._check_rotation,
            "gather_rms_norm": self._check_norm,
            "select_tokens": self._check_selection,
            "block_scores": self._check_scores,
            "cross_entropy_rows_": self._check_losses,
        }
        checks.get(self.operator, self._check_rows)(LAYOUTS[rows], columns)

    def _check_rows(self, layout: str, columns: int) -> None:
        x, values = self._normal(_TOTAL, columns), self._normal(len(_ROWS), columns)
        arguments = (x, _ROWS) if self.operator == "gather_rows" else (x, values, _ROWS)
        expected = getattr(token_elimination, self.operator)(*arguments)
        assert_same_bits(cuda.kernel(self.operator)(*_placed(arguments, layout)), expected, self.kernel)

    def _check_in_place(self, layout: str, columns: int) -> None:
        arguments = (self._normal(_TOTAL, columns), self._normal(len(_ROWS), columns), _ROWS)
        placed = _placed(arguments, layout)
        cuda.kernel(self.operator)(*placed)
        token_elimination.scatter_add_rows_(*arguments)
        assert_same_bits(placed[0], arguments[0], self.kernel)

    def _check_rotation(self, layout: str, columns: int) -> None:
        width = columns % 16 + 64  # of a head; the tables rotate all but its last channels
        x, tables = (
            self._normal(len(_ROWS), 3, width),
            [self._normal(_TOTAL, 56 if width % 8 == 0 else 54) for _ in "cs"],
        )
        for inverse in (False, True):
            results = cuda.kernel("rope_rows")(*_placed((x, *tables, _ROWS, inverse), layout))
            own = token_elimination.rope_rows(x, *tables, _ROWS, inverse)
            exact = token_elimination.rope_rows(x.double(), *_wide(tables), _ROWS, inverse)
            assert_accurate(results, own, exact, self.kernel)

    def _check_norm(self, layout: str, columns: int) -> None:
        """Forward, forward again, and backward, each with its kernels."""
        x, weight = self._normal(_TOTAL, columns), self._normal(columns)
        forward = (x, _ROWS, weight, _EPS, 1.0)
        h, kept, rstd = cuda.kernel("gather_rms_norm")(*_placed(forward, layout))
        own, exact = (token_elimination.gather_rms_norm(*arguments) for arguments in (forward, _wide(forward)))
        assert_accurate(h, own[0], exact[0], f"{self.kernel} h")
        assert_same_bits(kept, own[1], f"{self.kernel} kept")
        assert_accurate(rstd, own[2], exact[2], f"{self.kernel} rstd")
        again = cuda.kernel("rms_norm_rows")(laid_out(kept, layout), rstd, weight.to(cuda.DEVICE), 1.0)
        assert_same_bits(again, h.cpu(), f"{self.kernel} h again")
        backward = (x, self._normal(*kept.shape), own[1], own[2], weight, 1.0, _ROWS, _TOTAL, True)
        results = cuda.kernel("gather_rms_norm_backward")(*_placed(backward, layout))
        own = token_elimination.gather_rms_norm_backward(*backward)
        exact = token_elimination.gather_rms_norm_backward(*_wide(backward))
        for name, *tensors in zip(("dx", "dweight"), results, own, exact, strict=True):
            assert_accurate(*tensors, f"{self.kernel} {name}")

    def _check_selection(self, layout: str, columns: int) -> None:
        scores = torch.randn(3, columns).mul(8).round()  # with many ties
        scores[1, ::7] = float("nan")
        for threshold in (None, torch.tensor(2.0)):
            arguments = (scores, 4 * columns + 3, columns // 3, 4, threshold)
            results = cuda.kernel("select_tokens")(*_placed(arguments, layout))
            for actual, expected in zip(results, token_selection.select_tokens(*arguments), strict=True):
                assert_same_bits(actual, expected, self.kernel)

    def _check_scores(self, layout: str, columns: int) -> None:
        q, k = (torch.randint(-2, 3, (2, heads, 203, columns)).to(self.dtype) for heads in (6, 2))
        starts = (torch.arange(203) // 70 * 70).int().expand(2, -1).contiguous()
        for block_size in (64, 24):
            scores = cuda.kernel("block_scores")(*_placed((q, k, block_size, starts), layout))
            exact = token_selection.block_scores(q.double(), k.double(), block_size, starts)  # sums of small integers
            assert_same_bits(scores, exact.float(), self.kernel)

    def _check_losses(self, layout: str, columns: int) -> None:
        logits, labels = 3 * self._normal(5, columns), torch.tensor([0, columns - 1, -100, 3, 77])
        placed = _placed((logits, labels, 0.25), layout)
        losses = cuda.kernel("cross_entropy_rows_")(*placed)
        own, exact = logits.clone(), logits.double()
        own_losses, exact_losses = (cross_entropy.cross_entropy_rows_(tensor, labels, 0.25) for tensor in (own, exact))
        assert_accurate(losses, own_losses, exact_losses, f"{self.kernel} losses")
        assert_accurate(placed[0], own, exact, f"{self.kernel} gradient")

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(self.dtype)

    def __str__(self) -> str:
        return self.kernel.replace("\\", "")


def _placed(arguments: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """On the GPU, matrices as `layout` says; so are heads, but lists and vectors stay as they are."""

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(cuda.DEVICE, copy=True)
        return laid_out(value, layout) if value.dim() >= 2 and value.is_floating_point() else value

    return tuple(place(value) for value in arguments)


def _wide(arguments: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments]


def _each(kernel: str, operator: str, columns: int = 525) -> list[TokenInstance]:
    return [TokenInstance(kernel.format(name), operator, dtype, columns) for name, dtype in cuda.ELEMENTS.items()]


INSTANCES = [
    *(
        TokenInstance(f"gather_rows_kernel<unsigned {bits}>", "gather_rows", dtype)
        for bits, dtype in (("int", torch.float32), ("short", torch.bfloat16))
    ),
    *_each("scatter_add_rows_kernel<{}>", "scatter_add_rows"),
    TokenInstance("row_map_kernel", "scatter_add_rows", torch.float32),
    *_each("add_rows_kernel<{}>", "scatter_add_rows_"),
    *_each("rope_rows_kernel<{}>", "rope_rows"),
    *(
        instance
        for kernel in ("gather_rms_norm_kernel", "gather_rms_norm_backward_kernel")
        for warps, columns in ((4, 525), (16, 2061))
        for instance in _each(f"{kernel}<{{}}, {warps}>", "gather_rms_norm", columns)
    ),
    *_each("rms_norm_rows_kernel<{}>", "gather_rms_norm"),
    *_each("norm_weight_grad_kernel<{}>", "gather_rms_norm"),
    *_each("cross_entropy_rows_kernel<{}>", "cross_entropy_rows_", 4101),
    *_each("block_scores_kernel<{}>", "block_scores", 75),
    TokenInstance("choose_blocks_kernel", "select_tokens", torch.float32),
    TokenInstance("write_tokens_kernel", "select_tokens", torch.float32),
]
"""Every kernel of the family."""
