"""The operators of slices of channels and the layer made of them, each beside the way without it.

    gradient  the slice's gradient, for input channels with the gather that forward does for it, beside the gradient
              `dy^T x` of the whole weight, and beside the slice's by torch: `dy^T x[:, indices]` for input channels,
              `dy[:, indices]^T x` for output channels
    adamw     `slice_adamw_` with write-back beside torch's fused AdamW and `index_copy_`
    swiglu    forward + backward of `ops.swiglu_s2ft` beside `silu(gate) * up` and a gather
    layer     forward + backward of `nn.S2FTLinear` beside the frozen linear and, for input channels, PaCA (`paca.py`)
    switch    one adapter for another in a whole model, see `s2ft_switch.py`

Slices and their gradients are float32, weights and activations in the case's dtype. Inputs rotate, so that none is in
the cache when it is needed, but for those of `layer`. Before an arm is timed its results are compared with those of the
arm it is measured against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.nn.s2ft import random_channels

from . import operations, s2ft_limits, s2ft_switch
from .cases import Progress, Record, run_cases
from .operations import OURS, Run, copies, require_equal, turn
from .paca import PaCALinear
from .s2ft_limits import DENSE, FROZEN
from .suites import S2FTCase, Suite

SLICED = "torch, slice"
UNFUSED = "torch.optim.AdamW, index_copy_"
SILU = "torch, silu * up, gather"
PACA = "PaCA"
BASES = {
    "gradient": (DENSE, SLICED),
    "adamw": (UNFUSED,),
    "swiglu": (SILU,),
    "layer": (FROZEN, PACA),
    "switch": s2ft_switch.BASES,
}
"""By operation, what ours is compared with."""

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_PAIRS = 12  # of activations: more would be slow to make


def _axis(case: S2FTCase) -> int:
    return 1 if case.dim == "input" else 0


def _channels(case: S2FTCase) -> Tensor:
    total = case.K if case.dim == "input" else case.N
    return random_channels(total, case.channels, torch.Generator().manual_seed(0))


def _random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _gradient(case: S2FTCase) -> list[Run]:
    indices, generator = _channels(case), torch.Generator().manual_seed(1)
    count = min(_PAIRS, copies(case.M * (case.N + case.K) * case.dtype.itemsize))
    pairs = [
        (_random(generator, case.dtype, case.M, case.N), _random(generator, case.dtype, case.M, case.K))
        for _ in range(count)
    ]
    gather = backends.kernel("gather_columns", "cpu", case.dtype)
    product = backends.kernel("slice_grad", "cpu", case.dtype)

    def ours(pair: tuple[Tensor, Tensor]) -> Tensor:
        dy, x = pair
        if case.dim == "input":
            return product(dy, gather(x, indices), None, torch.float32)
        return product(dy, x, indices, torch.float32)

    def dense(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0].t() @ pair[1]

    def sliced(pair: tuple[Tensor, Tensor]) -> Tensor:
        dy, x = pair
        return (dy.t() @ x[:, indices] if case.dim == "input" else dy[:, indices].t() @ x).float()

    expected = dense(pairs[0]).index_select(_axis(case), indices)
    require_equal("slice_grad", ours(pairs[0]), expected, _TOLERANCE[case.dtype])
    require_equal(SLICED, sliced(pairs[0]), expected, _TOLERANCE[case.dtype])
    return [(OURS, turn(pairs, ours)), (DENSE, turn(pairs, dense)), (SLICED, turn(pairs, sliced))]


@dataclass
class _Slice:
    """A weight, the slice of it that trains with a gradient, and moments of ours."""

    weight: Tensor
    trainable: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def random(cls, case: S2FTCase, seed: int) -> _Slice:
        generator = torch.Generator().manual_seed(seed)
        shape = (case.N, case.channels) if case.dim == "input" else (case.channels, case.K)
        trainable = nn.Parameter(_random(generator, torch.float32, *shape))
        trainable.grad = _random(generator, torch.float32, *shape)
        weight = torch.zeros(case.N, case.K, dtype=case.dtype)
        return cls(weight, trainable, torch.zeros(shape), torch.zeros(shape))


def _adamw(case: S2FTCase) -> list[Run]:
    update = backends.kernel("slice_adamw_", "cpu", torch.float32)
    indices, axis = _channels(case), _axis(case)
    count = copies(case.N * case.K * case.dtype.itemsize)
    # Optimizers keep state, so each has slices of its own; both start from the same ones.
    ours = [_Slice.random(case, seed) for seed in range(count)]
    slices = [_Slice.random(case, seed) for seed in range(count)]
    theirs = [(item, torch.optim.AdamW([item.trainable], lr=1e-3, fused=True)) for item in slices]

    def one(item: _Slice) -> None:
        moments, target = (item.exp_avg, item.exp_avg_sq), (item.weight, indices, axis)
        update(item.trainable.detach(), item.trainable.grad, *moments, *target, 1, 1e-3, 0.9, 0.999, 1e-8, 1e-2)

    def other(item: tuple[_Slice, torch.optim.Optimizer]) -> None:
        taken, optimizer = item
        optimizer.step()
        taken.weight.index_copy_(axis, indices, taken.trainable.detach().to(case.dtype))

    one(ours[0])
    other(theirs[0])
    require_equal("slice_adamw_", ours[0].trainable.detach(), slices[0].trainable.detach(), 1e-6)
    require_equal("the written slice", ours[0].weight, slices[0].weight, _TOLERANCE[case.dtype])
    return [(OURS, turn(ours, one)), (UNFUSED, turn(theirs, other))]


def _swiglu(case: S2FTCase) -> list[Run]:
    if case.dim != "input":
        raise ValueError("swiglu writes input channels of the layer behind it")
    indices, generator = _channels(case), torch.Generator().manual_seed(1)
    count = min(_PAIRS, copies(3 * case.M * case.K * case.dtype.itemsize))
    inputs = [[_random(generator, case.dtype, case.M, case.K) for _ in range(3)] for _ in range(count)]
    for gate, up, _ in inputs:
        gate.requires_grad_()
        up.requires_grad_()

    def fused(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return pk.ops.swiglu_s2ft(gate, up, indices)

    def plain(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        h = F.silu(gate) * up
        return h, h.detach()[:, indices]

    def results(form: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], item: list[Tensor]) -> list[Tensor]:
        gate, up, dh = item
        h, x_slice = form(gate, up)
        return [h.detach(), x_slice.detach(), *torch.autograd.grad(h, (gate, up), dh)]

    names = ("h", "h[:, indices]", "dgate", "dup")
    for name, found, expected in zip(names, results(fused, inputs[0]), results(plain, inputs[0]), strict=True):
        require_equal(f"{name} of swiglu_s2ft", found, expected, _TOLERANCE[case.dtype])
    return [
        (OURS, turn(inputs, lambda item: results(fused, item))),
        (SILU, turn(inputs, lambda item: results(plain, item))),
    ]


def _layer(case: S2FTCase) -> list[Run]:
    indices, generator = _channels(case), torch.Generator().manual_seed(1)
    x = _random(generator, case.dtype, case.M, case.K).requires_grad_()
    dy = _random(generator, case.dtype, case.M, case.N)
    weight = _random(generator, case.dtype, case.N, case.K) * case.K**-0.5

    def linear() -> nn.Linear:
        layer = nn.Linear(case.K, case.N, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return layer

    ours = pk.nn.S2FTLinear.from_linear(linear(), indices=indices, dim=case.dim)
    layers: dict[str, nn.Module] = {OURS: ours, FROZEN: linear()}
    if case.dim == "input":
        layers[PACA] = PaCALinear(linear(), indices, ours.trainable.detach())
    expected = dy.t() @ x.detach()

    def step(layer: nn.Module) -> Callable[[int], object]:
        def run(_: int) -> None:
            layer(x).backward(dy)
            x.grad = None
            layer.zero_grad(set_to_none=True)

        return run

    for name, layer in layers.items():
        y = layer(x)
        require_equal(f"y of {name}", y.detach(), (x @ weight.t()).detach(), _TOLERANCE[case.dtype])
        if name != FROZEN:
            (grad,) = torch.autograd.grad(y, [layer.trainable], dy)
            require_equal(
                f"the gradient of {name}", grad, expected.index_select(_axis(case), indices), _TOLERANCE[case.dtype]
            )
    return [(name, step(layer)) for name, layer in layers.items()]


_OPERATIONS: dict[str, Callable[[S2FTCase], list[Run]]] = {
    "gradient": _gradient,
    "adamw": _adamw,
    "swiglu": _swiglu,
    "layer": _layer,
    "switch": s2ft_switch.arms,
}


def measure(case: S2FTCase, suite: Suite) -> Record:
    """Seconds of every arm of one case."""
    limits, bases = s2ft_limits.limits(case), BASES[case.operation]
    return operations.measure(lambda: _OPERATIONS[case.operation](case), limits, bases, suite.s2ft_plan, "cpu")


def run(suite: Suite, progress: Progress) -> Record:
    """All cases of `suite` for the operators of slices."""
    return run_cases(suite.s2ft, lambda case: measure(case, suite), describe, progress, {})


def shape_of(case: Record) -> str:
    """The weights of a case and its tokens, in words."""
    size = f"{case['K']} to {case['N']}"
    if case["layers"] > 1:
        size = f"{case['layers']} x {size}"
    return f"{size}, M={case['M']}" if case["M"] else size


def describe(record: Record) -> str:
    """One line: the case and every arm's time."""
    case = record["case"]
    label = f"{case['operation']} {shape_of(case)}, {case['ratio']:.0%} of {case['dim']} channels, {case['dtype']}"
    return f"{label}: {operations.times(record)}"
