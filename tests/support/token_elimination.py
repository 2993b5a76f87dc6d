"""Kept tokens to test with: lists of rows with and without holes, and calls of the operators that move them.

Letters as in `peft_kernels/reference/token_elimination.py`: M rows, S of them kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.reference import token_elimination as reference
from peft_kernels.reference.lora import accumulation_dtype

PATTERNS = ("none", "one", "all", "some", "holes", "only_holes", "sequences")
"""Which rows are kept: negative entries, holes, stand anywhere, or at the end of each of two sequences."""

SIZES = ((0, 5), (1, 1), (7, 33), (66, 130))
"""M and columns: nothing, one, around vectors, several threads' worth."""

OPERATORS = (
    "gather_rows",
    "scatter_add_rows",
    "scatter_add_rows_",
    "gather_rms_norm",
    "rms_norm_rows",
    "gather_rms_norm_backward",
    "rope_rows",
    "gather_linear_scatter",
    "gather_linear_scatter_",
)
IN_PLACE = ("scatter_add_rows_", "gather_linear_scatter_")
"""Operators that return nothing and change `out`."""
EXACT = ("gather_rows",)
"""Operators that move bits and round nothing."""


def rows_of(pattern: str, total: int, seed: int = 0) -> Tensor:
    """int32 rows of a matrix with `total`."""
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(total, generator=generator) < 0.5).nonzero()[:, 0]
    if pattern == "none":
        found: list[int] = []
    elif pattern == "one":
        found = [total // 2] if total else []
    elif pattern == "all":
        found = list(range(total))
    elif pattern == "some":
        found = kept.tolist()
    elif pattern == "holes":
        found = [row for kept_row in kept.tolist() for row in (-1, kept_row)] + [-7]
    elif pattern == "only_holes":
        found = [-1, -2, -1]
    elif pattern == "sequences":
        first, second = ([row for row in kept.tolist() if (row < total // 2) == early] for early in (True, False))
        found = [*first, -1, -1, *second, -1]
    else:
        raise ValueError(f"unknown pattern {pattern!r}")
    return torch.tensor(found, dtype=torch.int32)


def is_kept(rows: Tensor, total: int) -> Tensor:
    """bool `[total]`: whether the list names the row."""
    named = torch.zeros(total, dtype=torch.bool)
    named[rows[rows >= 0].long().cpu()] = True
    return named


def variants(operator: str) -> tuple[dict[str, Any], ...]:
    """What there is to choose in a call beside its sizes."""
    if operator == "gather_rms_norm":
        return {"rows": True, "offset": 0.0}, {"rows": False, "offset": 1.0}
    if operator == "rms_norm_rows":
        return {"offset": 0.0}, {"offset": 1.0}
    if operator == "gather_rms_norm_backward":
        flags = [
            (True, True, True, 0.0),
            (True, False, False, 1.0),
            (False, True, True, 1.0),
            (False, False, False, 0.0),
        ]
        return tuple(dict(zip(("rows", "residual", "weight_grad", "offset"), flag, strict=True)) for flag in flags)
    if operator == "rope_rows":
        flags = [(True, False, 1.0), (True, True, 0.5), (False, False, 0.5), (False, True, 1.0)]
        return tuple(dict(zip(("rows", "inverse", "share"), flag, strict=True)) for flag in flags)
    if operator in ("gather_linear_scatter", "gather_linear_scatter_"):
        flags = [
            (True, True, False, True),
            (True, False, True, False),
            (False, True, True, True),
            (False, False, False, False),
        ]
        if operator == "gather_linear_scatter_":  # there is always something to add to
            flags = [flag for flag in flags if flag[1]]
        return tuple(dict(zip(("gather", "residual", "transposed", "bias"), flag, strict=True)) for flag in flags)
    return ({},)


def arguments(
    operator: str,
    size: tuple[int, int],
    pattern: str,
    dtype: torch.dtype,
    device: str = "cpu",
    variant: dict[str, Any] | None = None,
    weight_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of `operator` on normal numbers: its arguments by name, in the order of the schema."""
    total, columns = size
    choice = variants(operator)[0] if variant is None else variant
    generator = torch.Generator().manual_seed(seed)
    rows = rows_of(pattern, total, seed)
    count = rows.shape[0]

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(to)

    weight = normal(columns, to=weight_dtype or dtype)
    if operator == "gather_rows":
        call = {"x": normal(total, columns), "rows": rows}
    elif operator in ("scatter_add_rows", "scatter_add_rows_"):
        name = "residual" if operator == "scatter_add_rows" else "out"
        call = {name: normal(total, columns), "values": normal(count, columns), "rows": rows}
    elif operator == "gather_rms_norm":
        x = normal(total, columns)
        call = {
            "x": x,
            "rows": rows if choice["rows"] else None,
            "weight": weight,
            "eps": 1e-6,
            "offset": choice["offset"],
        }
    elif operator == "rms_norm_rows":
        rstd = normal(count, to=torch.float64).exp().to(accumulation_dtype(dtype))
        call = {"kept": normal(count, columns), "rstd": rstd, "weight": weight, "offset": choice["offset"]}
    elif operator == "gather_rms_norm_backward":
        count = count if choice["rows"] else total
        kept = normal(count, columns)
        if choice["rows"]:
            kept = torch.where((rows >= 0)[:, None], kept, torch.zeros((), dtype=dtype))  # as they were gathered
        rstd = (
            kept.to(accumulation_dtype(dtype)).square().mean(1) + 1
        ).rsqrt()  # the one keeps a single column from cancelling
        call = {
            "grad_residual": normal(total, columns) if choice["residual"] else None,
            "grad_h": normal(count, columns),
            "kept": kept,
            "rstd": rstd,
            "weight": weight,
            "offset": choice["offset"],
            "rows": rows if choice["rows"] else None,
            "total": total,
            "weight_grad": choice["weight_grad"],
        }
    elif operator == "rope_rows":
        rotated = max(2, int(columns * choice["share"]) // 2 * 2) if columns > 1 else 0
        positions = 2 * total + 1 if choice["rows"] else count
        angles = normal(positions, rotated, to=torch.float64) * 3
        cos, sin = (part.to(weight_dtype or dtype) for part in (angles.cos(), angles.sin()))
        call = {"x": normal(count, 3, columns), "cos": cos, "sin": sin}
        call |= {"rows": rows.flip(0).contiguous() if choice["rows"] else None, "inverse": choice["inverse"]}
    elif operator in ("gather_linear_scatter", "gather_linear_scatter_"):
        x, out_columns = normal(total, columns), columns + 3
        matrix = normal(out_columns, columns) / columns**0.5
        call = {
            "x": x if choice["gather"] else reference.gather_rows(x, rows),
            "weight": (matrix.t().contiguous() if choice["transposed"] else matrix).to(dtype),
            "bias": normal(out_columns) if choice["bias"] else None,
            "rows": rows,
            "residual": normal(total, out_columns) if choice["residual"] else None,
            "gather": choice["gather"],
            "transposed": choice["transposed"],
        }
        if operator == "gather_linear_scatter_":
            call = {"out": call.pop("residual")} | call
    else:
        raise ValueError(f"unknown operator {operator!r}")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def run(kernel: Any, operator: str, call: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results; of operators that change `out`, a copy of it with the same strides."""
    if operator in IN_PLACE:
        out = call["out"]
        copy = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device).copy_(out)
        kernel(*{**call, "out": copy}.values())
        return (copy,)
    result = kernel(*call.values())
    return result if isinstance(result, tuple) else (result,)


def widened(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }
