"""The operators of sparse deltas and the layer made of them, each beside the way without it.

    write     `scatter_write_` beside torch's gather-free `index_put_`, and a C loop that makes the same accesses: the
              bound, as it writes no sum
    adamw     `sparse_adamw_` with write-back beside `torch.optim.AdamW` on the same values and `index_put_`
    gradient  `sampled_product` beside the dense gradient `dy^T x` and a gather; the densities make the crossover table
    layer     forward + backward of `nn.SparseDeltaLinear` beside the frozen linear and PEFT's Super-Tuning

Weights rotate, so that none is in the cache when it is written to, as in a training step over many layers. Before an
arm is timed its results are compared with those of the arm it is measured against. On a GPU each arm is run after
`operations.head_start`, on the backends of `served.as_if_recorded`; its record says which served it. `gradient` is
measured on each backend of the suite, too, and there is no C loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.nn.positions import random_positions

from . import access, operations
from .cases import Progress, Record, run_cases
from .operations import OURS, Run, Work, attempt, copies, require_equal, turn
from .served import as_if_recorded
from .suites import SparseCase, Suite

BOUND = "C loop, same accesses"
INDEX_PUT = "torch, index_put_"
UNFUSED = "torch.optim.AdamW, index_put_"
DENSE = "dense gradient, gather"
FROZEN = "frozen linear"
SUPER_TUNING = "PEFT Super-Tuning"
BASES = {"write": (INDEX_PUT, BOUND), "adamw": (UNFUSED,), "gradient": (DENSE,), "layer": (FROZEN, SUPER_TUNING)}
"""By operation, what ours is compared with; the last one is what the table's factor is taken from."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class _Delta:
    """A weight with some of its entries."""

    weight: Tensor
    indices: Tensor
    wide: Tensor
    original: Tensor
    values: nn.Parameter

    @classmethod
    def random(cls, case: SparseCase, seed: int, device: torch.device) -> _Delta:
        generator, numel = torch.Generator(device).manual_seed(seed), case.N * case.K
        weight = torch.randn(case.N, case.K, generator=generator, device=device).to(case.dtype)
        # Positions are drawn on the CPU, with the same generator where that is the device.
        drawing = generator if device.type == "cpu" else torch.Generator().manual_seed(seed)
        indices = random_positions(numel, round(case.density * numel), drawing).to(device)
        wide = indices.long()
        values = nn.Parameter(torch.randn(wide.numel(), generator=generator, device=device) * 1e-2)
        values.grad = torch.randn(wide.numel(), generator=generator, device=device)
        return cls(weight, indices, wide, weight.view(-1)[wide].clone(), values)

    def index_put(self) -> None:
        """What `scatter_write_` does, in torch's operations."""
        sums = (self.original.float() + self.values.detach()).to(self.weight.dtype)
        self.weight.view(-1)[self.wide] = sums


def _rotation(case: SparseCase, device: torch.device) -> list[_Delta]:
    """So many weights that none stays in a cache until its next turn."""
    size = case.N * case.K * case.dtype.itemsize
    return [_Delta.random(case, seed, device) for seed in range(copies(size))]


def _write(case: SparseCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    deltas = _rotation(case, device)

    def ours(d: _Delta) -> None:
        write = backends.kernel("scatter_write_", device.type, case.dtype)
        write(d.weight, d.indices, d.original, d.values.detach())

    ours(deltas[0])
    written = deltas[0].weight.clone()
    deltas[0].index_put()
    require_equal("scatter_write_", written, deltas[0].weight, 0.0)
    arms: list[Run] = [(OURS, turn(deltas, ours)), (INDEX_PUT, turn(deltas, _Delta.index_put))]
    if device.type != "cpu":
        return arms
    bound = access.scattered_write()
    return [*arms, (BOUND, turn(deltas, lambda d: bound(d.weight, d.indices, d.original, d.values)))]


def _adamw(case: SparseCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    # Optimizers keep state, so each has deltas of its own; both start from the same ones.
    ours = [(d, torch.zeros_like(d.values), torch.zeros_like(d.values)) for d in _rotation(case, device)]
    theirs = [(d, torch.optim.AdamW([d.values], lr=1e-3)) for d in _rotation(case, device)]

    def one(item: tuple[_Delta, Tensor, Tensor]) -> None:
        d, exp_avg, exp_avg_sq = item
        target = (d.weight, d.indices, d.original)
        update = backends.kernel("sparse_adamw_", device.type, torch.float32)
        update(d.values.detach(), d.values.grad, exp_avg, exp_avg_sq, *target, 1, 1e-3, 0.9, 0.999, 1e-8, 1e-2)

    def other(item: tuple[_Delta, torch.optim.Optimizer]) -> None:
        item[1].step()
        item[0].index_put()

    one(ours[0])
    other(theirs[0])
    require_equal("sparse_adamw_", ours[0][0].values, theirs[0][0].values, 1e-6)
    return [(OURS, turn(ours, one)), (UNFUSED, turn(theirs, other))]


def _gradient(case: SparseCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    delta = _Delta.random(case, 0, device)
    generator = torch.Generator(device).manual_seed(1)
    pairs = [
        tuple(torch.randn(case.M, n, generator=generator, device=device).to(case.dtype) for n in (case.N, case.K))
        for _ in range(4)
    ]

    def dense(pair: tuple[Tensor, ...]) -> Tensor:
        return (pair[0].t() @ pair[1]).view(-1)[delta.wide].float()

    expected = dense(pairs[0])

    def ours(backend: str | None = None) -> Work:
        def run(pair: tuple[Tensor, ...]) -> Tensor:
            sampled = backends.kernel("sampled_product", device.type, case.dtype, backend)
            return sampled(*pair, delta.indices, torch.float32)  # type: ignore[no-any-return]

        require_equal("sampled_product", run(pairs[0]), expected, _TOLERANCE[case.dtype])
        return turn(pairs, run)

    return [
        *((OURS, ours()), (DENSE, turn(pairs, dense))),
        *(attempt(f"{OURS} [{backend}]", lambda backend=backend: ours(backend)) for backend in suite.backends),  # type: ignore[misc]
    ]


def _layer(case: SparseCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(case.M, case.K, generator=generator, device=device).to(case.dtype).requires_grad_()
    dy = torch.randn(case.M, case.N, generator=generator, device=device).to(case.dtype)

    def linear() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(case.K, case.N, bias=False, dtype=case.dtype, device=device).requires_grad_(False)

    ours = pk.nn.SparseDeltaLinear.from_linear(linear(), density=case.density, selection="magnitude")
    frozen = linear()
    require_equal("SparseDeltaLinear", ours(x).detach(), frozen(x).detach(), _TOLERANCE[case.dtype])

    def step(layer: nn.Module) -> Work:
        def run(_: int) -> None:
            layer(x).backward(dy)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        return run

    def super_tuning() -> Work:
        import peft

        host = nn.Sequential(linear())
        peft.get_peft_model(host, peft.SupertuningConfig(sparsity=1.0 - case.density, target_modules=["0"]))
        require_equal(SUPER_TUNING, host[0](x).detach(), frozen(x).detach(), _TOLERANCE[case.dtype])
        return step(host[0])

    return [(OURS, step(ours)), (FROZEN, step(frozen)), attempt(SUPER_TUNING, super_tuning)]


_OPERATIONS: dict[str, Callable[[SparseCase, Suite], list[Run]]] = {
    "write": _write,
    "adamw": _adamw,
    "gradient": _gradient,
    "layer": _layer,
}


def _limits(case: SparseCase) -> dict[str, float]:
    """What the operation has to move or compute at least."""
    count, size = round(case.density * case.N * case.K), case.dtype.itemsize
    per_line = 64 // size
    lines = case.N * case.K / per_line * (1.0 - (1.0 - case.density) ** per_line)  # expected, for random positions
    scattered = 128 * lines
    if case.operation == "write":
        return {"bytes": count * (4 + 4 + size) + scattered}
    if case.operation == "adamw":  # value, both moments: read and written; gradient, index, original: read
        return {"bytes": count * (24 + 4 + 4 + size) + scattered}
    return {"operations_of_dense_gradient": 2.0 * case.M * case.N * case.K, "operations": 2.0 * case.M * count}


def measure(case: SparseCase, suite: Suite) -> Record:
    """Seconds of every arm of one case."""
    bases = BASES[case.operation]
    return operations.measure(
        lambda: _OPERATIONS[case.operation](case, suite), _limits(case), bases, suite.sparse_plan, suite.device_type
    )


def run(suite: Suite, progress: Progress) -> Record:
    """All cases of `suite` for the operators of sparse deltas."""
    with as_if_recorded(suite.device_type):
        return run_cases(suite.sparse, lambda case: measure(case, suite), describe, progress, {})


def describe(record: Record) -> str:
    """One line: the case and every arm's time."""
    case = record["case"]
    label = f"{case['operation']} M={case['M']} {case['K']}->{case['N']} {case['density']:.2%} {case['dtype']}"
    return f"{label}: {operations.times(record)}"
