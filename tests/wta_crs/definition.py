"""Winner-take-all column-row sampling once more, in exact fractions and as the authors write it."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def certain_rows(norms: list[int], k: int) -> list[int]:
    """C: the largest rows, so many that `(1 - P_C) / (k - |C|)` is least; of equal minima the smallest."""
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    total = sum(norms)
    quotients = [Fraction(total - sum(norms[i] for i in order[:c]), k - c) for c in range(k)]
    return order[: quotients.index(min(quotients))]


def expected_sample(norms: list[int], uniforms: list[float]) -> tuple[list[int], list[Fraction]]:
    """Rows and scales: C, then from each of k - |C| equal parts of what is left the row that the number points at."""
    k = len(uniforms)
    rows = certain_rows(norms, k)
    scales = [Fraction(1)] * len(rows)
    others = [i for i in sorted(range(len(norms)), key=lambda i: -norms[i]) if i not in rows]
    rest, draws = sum(norms[i] for i in others), k - len(rows)
    for part in range(draws):
        point = (part + Fraction(uniforms[k - draws + part])) * rest / draws
        for i in others:
            if point < norms[i]:
                break
            point -= norms[i]
        rows.append(i)
        scales.append(Fraction(rest, draws * norms[i]))
    return rows, scales


def sampled_grad(dy: Tensor, x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """`sum over s of scales[s] dy[rows[s]] x[rows[s]]^T`, in the dtype of dy and x."""
    return torch.einsum("sn,sk,s->nk", dy[rows.long()], x[rows.long()], scales.to(dy.dtype))
