"""What an operation of token elimination must move or compute at least.

With M tokens of which S are kept, K and N features in and out, e bytes per element:

    norm     forward reads the kept rows, writes them for backward and the normalized ones; backward reads these three
             (the kept rows, their gradient, the residual's at all rows) and writes the gradient at all rows
    scatter  reads and writes all rows of the residual, reads the values
    linear   2 S K N operations, beside 2 M K N for all rows; reads the kept rows of x and the weight, reads and writes
             the residual, in place its kept rows alone
    scores   M (M + 1) / 2 pairs of two operations for each feature of the queries; reads queries and keys
    loss     4 M K N operations with a frozen weight: the logits, and the gradient of hidden; reads hidden and weight,
             writes the gradient of hidden. The logits, M N, need not lie in memory
"""

from __future__ import annotations

from typing import Any

from peft_kernels import ops

from .suites import TokenCase

DENSE = "linear, all rows"
ADDED_DENSE = "linear, all rows, added in place"


def limits(case: TokenCase) -> dict[str, Any]:
    """The limits as they go into a result file; `times_faster` by the arm that ours is compared with."""
    M, K, N, size = case.M, case.K, case.N, case.dtype.itemsize
    kept = ops.kept_tokens(M, case.keep, case.block_size)
    if case.operation == "norm":
        return {"bytes": (5 * kept + 2 * M) * K * size}
    if case.operation == "scatter":
        return {"bytes": (2 * M + kept) * K * size}
    if case.operation == "linear":
        return {
            "bytes": (kept * K + N * K + 2 * M * N) * size,
            "bytes_in_place": (kept * K + N * K + 2 * kept * N) * size,
            "operations": 2 * kept * K * N,
            "times_faster": dict.fromkeys((DENSE, ADDED_DENSE), M / kept) if kept else {},
        }
    if case.operation == "scores":
        return {"bytes": M * (K + N) * size, "operations": M * (M + 1) * K}
    return {
        "bytes": (2 * M * K + N * K) * size,
        "operations": 4 * M * K * N,
        "bytes_of_logits": M * N * size,
    }
