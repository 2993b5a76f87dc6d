"""Which rows of a layer's input are kept for its weight gradient: winner-take-all column-row sampling (WTA-CRS).

Formulas, shapes and names are those of `peft_kernels/reference/wta_crs.py`. This file holds the checks, the fake kernel
and the registration; the layers that compute with a sample are in `sampled_linear.py`. Nothing here waits for the
device: the host knows how many rows there are, and the device alone which.

There is no compiled kernel on purpose, and every backend runs the definition. It sorts M numbers and makes about twenty
passes over M or k of them; beside the two passes over `[M, K]` that norms and gather need anyway that is little, and
torch has kernels for all of it on every device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..reference import wta_crs as reference
from ..reference.lora import as_rows
from ._autocast import autocast_dtype
from ._checks import FLOATING, describe
from ._register import register_operator
from .token_elimination import _check_floating, _taken_apart


def _fake_sampled_rows(norms: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    count = min(uniforms.shape[0], norms.shape[0])
    return norms.new_empty(count, dtype=torch.int32), norms.new_empty(count, dtype=torch.float32)


register_operator(
    "sampled_rows",
    reference=reference.sampled_rows,
    fake=_fake_sampled_rows,
    cuda=False,
    triton="sorting and prefix sums are torch's own",
)
if hasattr(torch.ops.peft_kernels, "sampled_rows"):  # for whoever calls the raw operator, on any device
    torch.library.impl("peft_kernels::sampled_rows", "CompositeExplicitAutograd")(reference.sampled_rows)


class RowSample(NamedTuple):
    """The rows of a layer's input that stand for all in its weight gradient.

    Attributes:
        kept: `[k, K]`, those rows of the input, in the dtype that the layer computes in.
        rows: `[k]`, int32, which they are, in any order; one may be there twice.
        scales: `[k]`, float32, what each counts.
        total: M, rows of the input.
    """

    kept: Tensor
    rows: Tensor
    scales: Tensor
    total: int


def check_keep_ratio(op: str, keep_ratio: float) -> None:
    """Raises ValueError unless it is a number in (0, 1]."""
    number = isinstance(keep_ratio, int | float) and not isinstance(keep_ratio, bool)
    if not number or not 0.0 < keep_ratio <= 1.0:  # written so that NaN fails
        raise ValueError(f"{op}: keep_ratio must be a number in (0, 1], got {keep_ratio!r}")


def refuse_transforms(op: str) -> None:
    """Raises RuntimeError inside of a `torch.func` transform."""
    if _taken_apart():
        raise RuntimeError(f"{op}: a sampled gradient has no rule for torch.func transforms; keep all rows there")


def kept_rows(total: int, keep_ratio: float) -> int:
    """How many rows are kept of `total`: `ceil(keep_ratio total)`, so at least one of any.

    Raises:
        ValueError: keep_ratio is not in (0, 1].
    """
    check_keep_ratio("kept_rows", keep_ratio)
    if keep_ratio == 1.0:
        return total
    count = math.ceil(keep_ratio * total - 1e-9 * total)  # 0.7 of 10 are 7, though the product lies above it
    return min(total, max(1, count))


def computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a layer computes with x in: autocast's where it is on, else x's."""
    dtype = autocast_dtype(x.device.type)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def draw_uniforms(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """float64 `[count]` in [0, 1), as `sampled_rows` takes them, from torch's generator of `device` unless given."""
    if generator is None:  # the overload with one does not take the symbolic sizes of a compiled call
        return torch.rand(count, dtype=torch.float64, device=device)
    return torch.rand(count, dtype=torch.float64, device=device, generator=generator)


def sampled_rows(
    norms: Tensor, k: int, uniforms: Tensor | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """At most k rows that stand for all M in a sum of outer products, and what each counts.

    `sum over i of a_i b_i^T` is, in expectation, `sum over s of scales[s] a[rows[s]] b[rows[s]]^T`. The rows of the
    largest norms are taken for certain, as many as make the variance least, the others are drawn.

    Args:
        norms: `[M]`, float32, bfloat16, float16 or float64: what probabilities are proportional to, `|a_i| |b_i|` at
            best; whoever knows `|b_i|` alone may give that. Zero or less says that the row contributes nothing. One
            that is not finite makes all scales NaN.
        k: rows to take.
        uniforms: `[k]`, float64, in [0, 1): random numbers that decide; None draws them.
        generator: of norms' device, to draw them from; None means torch's own.

    Returns:
        rows int32 and scales float32, both `[min(k, M)]`. For k of M and more they are all rows, with scale 1.

    No gradient. Same norms and numbers, same bits, on every device and for any number of threads.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run.

    Source: Liu et al., "Winner-Take-All Column Row Sampling", NeurIPS 2023; see `reference/wta_crs.py`.
    """
    op = "sampled_rows"
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"{op}: k must be an integer, got {k!r}")
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")
    if norms.dim() != 1:
        raise ValueError(f"{op}: norms must be 1-D, got {describe(norms)}")
    if norms.dtype not in FLOATING:
        raise TypeError(f"{op}: norms must be float32, bfloat16, float16 or float64, got {describe(norms)}")
    if uniforms is None:
        uniforms = draw_uniforms(k, norms.device, generator)
    elif uniforms.dtype != torch.float64:
        raise TypeError(f"{op}: uniforms must be float64, got {describe(uniforms)}")
    elif uniforms.shape != (k,) or uniforms.device != norms.device:
        raise ValueError(f"{op}: uniforms must be [{k}] on {norms.device}, got {describe(uniforms)}")
    elif generator is not None:
        raise ValueError(f"{op}: generator must be None when uniforms are given, got {generator!r}")
    return reference.sampled_rows(norms.detach(), uniforms.detach())  # on every backend; there is nothing to choose


def draw_rows(
    x: Tensor,
    keep_ratio: float,
    *,
    grad_norms: Tensor | None = None,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RowSample | None:
    """A sample of x's rows for the weight gradients of the layers that read x; see `sampled_linear`.

    Layers may share one. Their gradients are then unbiased each, though not independent.

    Args:
        x: `[..., K]`, seen as M rows; float32, bfloat16, float16 or float64; any strides.
        keep_ratio: share of the rows that are kept, in (0, 1]: `kept_rows(M, keep_ratio)`.
        grad_norms: M numbers, not negative, in any shape and floating dtype: about `|dy_i|`, of an earlier step, say.
            Probabilities are proportional to `|x_i|` times them, instead of to `|x_i|`. They may be as wrong as they
            like, but zero only for a row whose gradient is zero.
        uniforms, generator: as in `sampled_rows`, for `kept_rows(M, keep_ratio)` rows.

    Returns:
        The sample, its rows in the autocast dtype where autocast is on; None where all rows are kept, which needs none.

    Raises:
        ValueError, TypeError: an argument's value, shape, dtype or device is off; nothing has run.
        RuntimeError: inside a `torch.func` transform.
    """
    op = "draw_rows"
    check_keep_ratio(op, keep_ratio)
    refuse_transforms(op)
    _check_floating(op, "x", x, 1)
    matrix = as_rows(x.detach())
    total = matrix.shape[0]
    if grad_norms is not None:
        if grad_norms.numel() != total or grad_norms.device != x.device or grad_norms.dtype not in FLOATING:
            raise ValueError(
                f"{op}: grad_norms must be {total} floating numbers on {x.device}, one for each row of x, got "
                f"{describe(grad_norms)}"
            )
        grad_norms = grad_norms.detach().flatten()
    count = kept_rows(total, keep_ratio)
    if count >= total:
        return None
    with torch.no_grad():
        norms = reference.row_norms(matrix)
        if grad_norms is not None:
            norms = norms.double() * grad_norms.double()
        rows, scales = sampled_rows(norms, count, uniforms, generator=generator)
        gather = backends.kernel("gather_rows", x.device.type, x.dtype, backends.forced_backend())
        kept = gather(matrix, rows).to(computing_dtype(x))
    return RowSample(kept, rows, scales, total)
