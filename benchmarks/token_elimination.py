"""The operators of token elimination, each beside plain PyTorch.

    norm     `ops.split_rms_norm` forward + backward: the normalized kept rows and their gradient, added at rows of the
             residual's, beside transformers' RMSNorm of `index_select`
    scatter  `ops.scatter_add_rows` beside `index_add_` on a clone; and in place
    linear   `ops.gather_linear_scatter`, forward, beside the linear layer for all rows, and beside `index_select`, the
             linear layer and `index_add_` on a clone; and in place, beside the linear layer for all rows added in place
    scores   `ops.block_scores` beside products and reductions of the `[T, T]` matrix
    loss     `ops.linear_cross_entropy` forward + backward to its input, beside the logits in float32 and torch's
             cross_entropy, as transformers has it; with the peak of tensor bytes of each

Kept rows are those of random blocks, in order. Inputs rotate, so that none is in the cache when it is needed, but for
weights. Before an arm is timed its results are compared with those of the arm it is measured against. On a GPU each arm
is run after `operations.head_start`, on the backends of `served.as_if_recorded`; its record says which served it.
`linear`, `norm`, `scores` and `loss` are measured on each backend of the suite, too, where it has the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels as pk
from peft_kernels import backends

from . import memory, operations, token_limits
from .cases import Progress, Record, failure, run_cases
from .operations import OURS, Run, Work, attempt, copies, require_equal, turn
from .served import as_if_recorded
from .suites import Suite, TokenCase
from .token_limits import DENSE

SELECTED = "index_select, RMSNorm"
ADDED = "index_add_ on a clone"
IN_PLACE = f"{OURS}, in place"
UNFUSED = "index_select, linear, index_add_"
ADDED_DENSE = token_limits.ADDED_DENSE
MATRIX = "torch, [T, T] matrix"
LOGITS = "torch, all logits"
BASES: dict[str, tuple[str, ...]] = {
    "norm": (SELECTED,),
    "scatter": (ADDED,),
    "linear": (DENSE, UNFUSED, ADDED_DENSE),
    "scores": (MATRIX,),
    "loss": (LOGITS,),
}
FORMS = {ADDED_DENSE: IN_PLACE}
"""The arm of ours that another is compared with, where it is not `OURS`."""
_EPS = 1e-5
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_INPUTS = 12  # more would be slow to make


def _drawn(device: torch.device) -> Callable[..., Tensor]:
    """A function of (dtype, *shape): normal values, of a generator of the device."""
    generator = torch.Generator(device).manual_seed(1)
    return lambda dtype, *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


def kept_rows(case: TokenCase, seed: int = 0) -> Tensor:
    """Rows int32 `[S]` of random blocks of the case's sequence, in order."""
    blocks = case.M // case.block_size
    scores = torch.rand(1, blocks, generator=torch.Generator().manual_seed(seed))
    positions, _ = pk.ops.select_tokens(scores, case.keep, case.block_size, tokens=case.M)
    return pk.ops.flat_rows(positions, case.M)


def _count(*sizes: int) -> int:
    return min(_INPUTS, copies(sum(sizes)))


def _on_each_backend(suite: Suite, arm: Callable[[], Work]) -> list[Run]:
    """`arm` once more on each backend of the suite."""

    def forced(backend: str) -> Work:
        with backends.use_backend(backend):
            work = arm()

        def run(round_number: int) -> object:
            with backends.use_backend(backend):
                return work(round_number)

        return run

    return [attempt(f"{OURS} [{backend}]", partial(forced, backend)) for backend in suite.backends]


def _norm(case: TokenCase, suite: Suite) -> list[Run]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    device = torch.device(suite.device_type)
    random, rows = _drawn(device), kept_rows(case).to(device)
    indices = rows.long()
    norm = LlamaRMSNorm(case.K, _EPS).to(device, case.dtype).requires_grad_(False)
    norm.weight.copy_(1 + 0.1 * random(torch.float32, case.K))
    size = case.M * case.K * case.dtype.itemsize
    inputs = [
        (
            random(case.dtype, case.M, case.K).requires_grad_(),
            random(case.dtype, case.M, case.K),
            random(case.dtype, rows.numel(), case.K),
        )
        for _ in range(_count(2 * size, round(size * case.keep)))
    ]

    def fused(item: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, grad_residual, grad_h = item
        residual, h, _ = pk.ops.split_rms_norm(x, rows, norm.weight, _EPS)
        (dx,) = torch.autograd.grad((residual, h), x, (grad_residual, grad_h))
        return h.detach(), dx

    def plain(item: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, grad_residual, grad_h = item
        h = norm(x.index_select(0, indices))
        (dx,) = torch.autograd.grad((x.view_as(x), h), x, (grad_residual, grad_h))
        return h.detach(), dx

    def ours() -> Work:
        for name, found, expected in zip(("h", "dx"), fused(inputs[0]), plain(inputs[0]), strict=True):
            require_equal(f"{name} of split_rms_norm", found, expected, _TOLERANCE[case.dtype])
        return turn(inputs, fused)

    return [(OURS, ours()), (SELECTED, turn(inputs, plain)), *_on_each_backend(suite, ours)]


def _scatter(case: TokenCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    random, rows = _drawn(device), kept_rows(case).to(device)
    indices = rows.long()
    size = case.M * case.K * case.dtype.itemsize
    inputs = [
        (random(case.dtype, case.M, case.K), random(case.dtype, rows.numel(), case.K)) for _ in range(_count(2 * size))
    ]

    def fused(item: tuple[Tensor, Tensor]) -> Tensor:
        return pk.ops.scatter_add_rows(*item, rows)

    def in_place(item: tuple[Tensor, Tensor]) -> Tensor:
        return pk.ops.scatter_add_rows(*item, rows, in_place=True)

    def plain(item: tuple[Tensor, Tensor]) -> Tensor:
        residual, values = item
        return residual.clone().index_add_(0, indices, values)

    require_equal("scatter_add_rows", fused(inputs[0]), plain(inputs[0]), _TOLERANCE[case.dtype])
    residual, values = inputs[0]
    changed = in_place((residual.clone(), values))
    require_equal("scatter_add_rows in place", changed, plain(inputs[0]), _TOLERANCE[case.dtype])
    own = [(residual.clone(), torch.zeros_like(values)) for residual, values in inputs]  # what is added does not grow
    return [(OURS, turn(inputs, fused)), (IN_PLACE, turn(own, in_place)), (ADDED, turn(inputs, plain))]


def _linear(case: TokenCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    random, rows = _drawn(device), kept_rows(case).to(device)
    indices = rows.long()
    weight = random(case.dtype, case.N, case.K) * case.K**-0.5
    count = _count(case.M * (case.K + case.N) * case.dtype.itemsize)
    inputs = [(random(case.dtype, case.M, case.K), random(case.dtype, case.M, case.N)) for _ in range(count)]

    def fused(item: tuple[Tensor, Tensor]) -> Tensor:
        x, residual = item
        return pk.ops.gather_linear_scatter(x, weight, None, rows, residual)

    def in_place(item: tuple[Tensor, Tensor]) -> Tensor:
        x, residual = item
        return pk.ops.gather_linear_scatter(x, weight, None, rows, residual, in_place=True)

    def dense(item: tuple[Tensor, Tensor]) -> Tensor:
        return F.linear(item[0], weight)

    def added_dense(item: tuple[Tensor, Tensor]) -> Tensor:
        x, residual = item
        return residual.addmm_(x, weight.t())

    def plain(item: tuple[Tensor, Tensor]) -> Tensor:
        x, residual = item
        return residual.clone().index_add_(0, indices, F.linear(x.index_select(0, indices), weight))

    def ours() -> Work:
        require_equal("gather_linear_scatter", fused(inputs[0]), plain(inputs[0]), _TOLERANCE[case.dtype])
        return turn(inputs, fused)

    def ours_in_place() -> Work:
        x, residual = inputs[0]
        found = in_place((x, residual.clone()))
        require_equal("gather_linear_scatter in place", found, plain(inputs[0]), _TOLERANCE[case.dtype])
        return turn(own, in_place)

    # What is added grows with the rounds, by the standard deviation of one each time: far below where sums overflow.
    own, others = ([(x, residual.clone()) for x, residual in inputs] for _ in range(2))
    return [
        *((OURS, ours()), (IN_PLACE, ours_in_place())),
        *((DENSE, turn(inputs, dense)), (UNFUSED, turn(inputs, plain)), (ADDED_DENSE, turn(others, added_dense))),
        *_on_each_backend(suite, ours),
    ]


def matrix_scores(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """`ops.block_scores` by products of all queries and keys: q `[1, heads, T, D]`, k `[1, key_value_heads, T, D]`."""
    heads, tokens = q.shape[1:3]
    keys = k.repeat_interleave(heads // k.shape[1], dim=1)
    matrix = torch.matmul(q, keys.transpose(2, 3)).relu_().float().sum(1).tril_()
    blocks, rest = tokens // block_size, -tokens % block_size
    padded = F.pad(matrix, (0, 0, 0, rest))[:, :, : blocks * block_size]
    of_blocks = padded.unflatten(2, (blocks, block_size)).unflatten(1, (-1, block_size)).amax((2, 4))
    return of_blocks.sum(1)


def _scores(case: TokenCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    random = _drawn(device)
    count = _count(case.M * (case.K + case.N) * case.dtype.itemsize)
    inputs = [
        tuple(
            random(case.dtype, 1, case.M, width // case.head, case.head).transpose(1, 2) for width in (case.K, case.N)
        )
        for _ in range(count)
    ]

    def fused(item: Sequence[Tensor]) -> Tensor:
        return pk.ops.block_scores(item[0], item[1], case.block_size)

    def plain(item: Sequence[Tensor]) -> Tensor:
        return matrix_scores(item[0], item[1], case.block_size)

    def ours() -> Work:
        require_equal("block_scores", fused(inputs[0]), plain(inputs[0]), _TOLERANCE[case.dtype])
        return turn(inputs, fused)

    return [(OURS, ours()), (MATRIX, turn(inputs, plain)), *_on_each_backend(suite, ours)]


def _loss(case: TokenCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    random = _drawn(device)
    weight = random(case.dtype, case.N, case.K) * case.K**-0.5
    labels = torch.randint(0, case.N, (case.M,), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = [random(case.dtype, case.M, case.K).requires_grad_() for _ in range(2)]

    def fused(hidden: Tensor) -> tuple[Tensor, Tensor]:
        loss = pk.ops.linear_cross_entropy(hidden, weight, labels)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    def plain(hidden: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(F.linear(hidden, weight).float(), labels)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    def ours() -> Work:
        for name, found, expected in zip(("the loss", "dhidden"), fused(inputs[0]), plain(inputs[0]), strict=True):
            require_equal(f"{name} of linear_cross_entropy", found, expected, _TOLERANCE[case.dtype])
        return turn(inputs, fused)

    return [(OURS, ours()), (LOGITS, turn(inputs, plain)), *_on_each_backend(suite, ours)]


_OPERATIONS: dict[str, Callable[[TokenCase, Suite], list[Run]]] = {
    "norm": _norm,
    "scatter": _scatter,
    "linear": _linear,
    "scores": _scores,
    "loss": _loss,
}


def _add_peaks(records: dict[str, Record], runs: Sequence[Run], device: torch.device) -> None:
    """Adds `peak_bytes` to the record of every arm that was timed: tensors alive at once, beyond its inputs."""
    for name, work in runs:
        if not callable(work) or records[name]["status"] != "measured":
            continue
        try:
            records[name]["peak_bytes"] = memory.peak_tensor_bytes(partial(work, 0), device)
        except Exception as error:
            records[name].update(failure(error))


def measure(case: TokenCase, suite: Suite) -> Record:
    """Seconds of every arm of one case; of "loss" the peaks of memory, too."""
    runs: list[Run] = []

    def make() -> Sequence[Run]:
        runs.extend(_OPERATIONS[case.operation](case, suite))
        return runs

    limits, compared = token_limits.limits(case), BASES[case.operation]
    record = operations.measure(make, limits, compared, suite.token_plan, suite.device_type)
    if case.operation == "loss":
        _add_peaks(record["arms"], runs, torch.device(suite.device_type))
    return record


def run(suite: Suite, progress: Progress) -> Record:
    """All cases of `suite` for the operators of token elimination."""
    with as_if_recorded(suite.device_type):
        return run_cases(suite.tokens, lambda case: measure(case, suite), describe, progress, {})


def shape_of(case: Record) -> str:
    """The sizes of a case, in words."""
    if case["operation"] == "scores":
        heads, others = (case[key] // case["head"] for key in ("K", "N"))
        return f"{heads} and {others} heads of {case['head']}, T={case['M']}"
    if case["operation"] in ("linear", "loss"):
        return f"{case['K']} to {case['N']}, M={case['M']}"
    return f"{case['K']}, M={case['M']}"


def describe(record: Record) -> str:
    """One line: the time of every arm."""
    case: dict[str, Any] = record["case"]
    return f"{case['operation']} {shape_of(case)} keep {case['keep']:g} {case['dtype']}: {operations.times(record)}"
