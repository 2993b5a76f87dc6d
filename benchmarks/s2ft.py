"""The operators of slices of channels and the layer made of them, each beside the way without it.

    gradient  the slice's gradient, for input channels with the gather that forward does for it, beside the gradient
              `dy^T x` of the whole weight, and beside the slice's by torch: `dy^T x[:, indices]` for input channels,
              `dy[:, indices]^T x` for output channels
    adamw     `slice_adamw_` with write-back beside torch's fused AdamW and `index_copy_`
    swiglu    forward + backward of `ops.swiglu_s2ft` beside `silu(gate) * up` and a gather
    layer     forward + backward of `nn.S2FTLinear` beside the frozen linear and, for input channels, PaCA (`paca.py`);
              of cases with a rank also beside PEFT's LoRA of that rank and the linear of which all trains
    switch    one adapter for another in a whole model, see `s2ft_switch.py`

Slices and their gradients are float32, weights and activations in the case's dtype. Inputs rotate, so that none is in
the cache when it is needed, but for those of `layer`. Before an arm is timed its results are compared with those of the
arm it is measured against. On a GPU each arm is run after `operations.head_start`, on the backends of
`served.as_if_recorded`; its record says which served it. `gradient` is measured on each backend of the suite, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.nn.s2ft_layer import random_channels

from . import lora, operations, peers, s2ft_limits, s2ft_switch
from .cases import Progress, Record, run_cases
from .operations import OURS, Run, Work, attempt, copies, require_equal, turn
from .paca import PaCALinear
from .s2ft_limits import DENSE, FROZEN
from .served import as_if_recorded
from .suites import S2FTCase, Suite

SLICED = "torch, slice"
UNFUSED = "torch.optim.AdamW, index_copy_"
SILU = "torch, silu * up, gather"
PACA = "PaCA"
LORA = "PEFT LoRA"
FULL = "linear, all of it trains"
_BASES: dict[str, tuple[str, ...]] = {
    "gradient": (DENSE, SLICED),
    "adamw": (UNFUSED,),
    "swiglu": (SILU,),
    "layer": (FROZEN, PACA),
    "switch": s2ft_switch.BASES,
}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_PAIRS = 12  # of activations: more would be slow to make


def bases(operation: str, dim: str, r: int | None) -> tuple[str, ...]:
    """What ours is compared with, from three values of a case."""
    found = tuple(base for base in _BASES[operation] if base != PACA or dim == "input")
    return (*found, LORA, FULL) if operation == "layer" and r is not None else found


def _axis(case: S2FTCase) -> int:
    return 1 if case.dim == "input" else 0


def _channels(case: S2FTCase, device: torch.device) -> Tensor:
    total = case.K if case.dim == "input" else case.N
    return random_channels(total, case.channels, torch.Generator().manual_seed(0)).to(device)


def _drawn(device: torch.device, seed: int) -> Callable[..., Tensor]:
    """A function of (dtype, *shape): normal values, of a generator of the device, where large inputs are drawn fast."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda dtype, *shape: torch.randn(shape, generator=generator, device=device).to(dtype)


def _slice_gradient(
    case: S2FTCase, indices: Tensor, backend: str | None = None
) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """The gradient of the slice from (dy, x) by our operators."""

    def run(pair: tuple[Tensor, Tensor]) -> Tensor:
        dy, x = pair
        product = backends.kernel("slice_grad", dy.device.type, case.dtype, backend)
        if case.dim == "output":
            return product(dy, x, indices, torch.float32)  # type: ignore[no-any-return]
        gather = backends.kernel("gather_columns", x.device.type, case.dtype, backend)
        return product(dy, gather(x, indices), None, torch.float32)  # type: ignore[no-any-return]

    return run


def _gradient(case: S2FTCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    indices, random = _channels(case, device), _drawn(device, 1)
    count = min(_PAIRS, copies(case.M * (case.N + case.K) * case.dtype.itemsize))
    pairs = [(random(case.dtype, case.M, case.N), random(case.dtype, case.M, case.K)) for _ in range(count)]

    def dense(pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0].t() @ pair[1]

    def sliced(pair: tuple[Tensor, Tensor]) -> Tensor:
        dy, x = pair
        return (dy.t() @ x[:, indices] if case.dim == "input" else dy[:, indices].t() @ x).float()

    expected = dense(pairs[0]).index_select(_axis(case), indices)

    def ours(backend: str | None = None) -> Work:
        form = _slice_gradient(case, indices, backend)
        require_equal("slice_grad", form(pairs[0]), expected, _TOLERANCE[case.dtype])
        return turn(pairs, form)

    require_equal(SLICED, sliced(pairs[0]), expected, _TOLERANCE[case.dtype])
    return [
        *((OURS, ours()), (DENSE, turn(pairs, dense)), (SLICED, turn(pairs, sliced))),
        *(attempt(f"{OURS} [{backend}]", lambda backend=backend: ours(backend)) for backend in suite.backends),  # type: ignore[misc]
    ]


@dataclass
class _Slice:
    """A weight, the slice of it that trains with a gradient, and moments of ours."""

    weight: Tensor
    trainable: nn.Parameter
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def random(cls, case: S2FTCase, seed: int, device: torch.device) -> _Slice:
        random = _drawn(device, seed)
        shape = (case.N, case.channels) if case.dim == "input" else (case.channels, case.K)
        trainable = nn.Parameter(random(torch.float32, *shape))
        trainable.grad = random(torch.float32, *shape)
        weight = torch.zeros(case.N, case.K, dtype=case.dtype, device=device)
        exp_avg, exp_avg_sq = (torch.zeros(shape, device=device) for _ in range(2))
        return cls(weight, trainable, exp_avg, exp_avg_sq)


def _adamw(case: S2FTCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    indices, axis = _channels(case, device), _axis(case)
    count = copies(case.N * case.K * case.dtype.itemsize)
    # Optimizers keep state, so each has slices of its own; both start from the same ones.
    ours = [_Slice.random(case, seed, device) for seed in range(count)]
    slices = [_Slice.random(case, seed, device) for seed in range(count)]
    theirs = [(item, torch.optim.AdamW([item.trainable], lr=1e-3, fused=True)) for item in slices]

    def one(item: _Slice) -> None:
        moments, target = (item.exp_avg, item.exp_avg_sq), (item.weight, indices, axis)
        update = backends.kernel("slice_adamw_", device.type, torch.float32)
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


def _swiglu(case: S2FTCase, suite: Suite) -> list[Run]:
    if case.dim != "input":
        raise ValueError("swiglu writes input channels of the layer behind it")
    device = torch.device(suite.device_type)
    indices, random = _channels(case, device), _drawn(device, 1)
    count = min(_PAIRS, copies(3 * case.M * case.K * case.dtype.itemsize))
    inputs = [[random(case.dtype, case.M, case.K) for _ in range(3)] for _ in range(count)]
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


def _layer(case: S2FTCase, suite: Suite) -> list[Run]:
    device = torch.device(suite.device_type)
    indices, random = _channels(case, device), _drawn(device, 1)
    x = random(case.dtype, case.M, case.K).requires_grad_()
    dy = random(case.dtype, case.M, case.N)
    weight = random(case.dtype, case.N, case.K) * case.K**-0.5

    def linear() -> nn.Linear:
        layer = nn.Linear(case.K, case.N, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return layer

    ours = pk.nn.S2FTLinear.from_linear(linear(), indices=indices, dim=case.dim)
    layers: dict[str, nn.Module] = {OURS: ours, FROZEN: linear()}
    if case.dim == "input":
        layers[PACA] = PaCALinear(linear(), indices, ours.trainable.detach())
    expected = dy.t() @ x.detach()

    def step(layer: Callable[[Tensor], Tensor], parameters: Iterable[Tensor]) -> Work:
        leaves = (x, *parameters)

        def run(_: int) -> None:
            layer(x).backward(dy)
            for leaf in leaves:
                leaf.grad = None

        return run

    def peft_lora() -> Work:
        assert case.r is not None
        spec = peers.LayerSpec(case.M, case.K, case.N, case.r, case.dtype, 0.0, device)
        random = peers.Weights.random(spec)
        weights = peers.Weights(weight, random.lora_a, random.lora_b)
        layer = peers.peft_layer(spec, weights)
        for name, error in lora.errors(spec, weights, layer, x, dy).items():
            if not error <= _TOLERANCE[case.dtype]:
                raise RuntimeError(f"{name} of {LORA} is {error:.1e} off, so it gets no time")
        return step(layer, layer.factors)

    for name, layer in layers.items():
        y = layer(x)
        require_equal(f"y of {name}", y.detach(), (x @ weight.t()).detach(), _TOLERANCE[case.dtype])
        if name != FROZEN:
            (grad,) = torch.autograd.grad(y, [layer.trainable], dy)
            require_equal(
                f"the gradient of {name}", grad, expected.index_select(_axis(case), indices), _TOLERANCE[case.dtype]
            )
    arms: list[Run] = [(name, step(layer, layer.parameters())) for name, layer in layers.items()]
    if case.r is not None:
        full = linear().requires_grad_(True)
        arms += [attempt(LORA, peft_lora), (FULL, step(full, full.parameters()))]
    return arms


_OPERATIONS: dict[str, Callable[[S2FTCase, Suite], list[Run]]] = {
    "gradient": _gradient,
    "adamw": _adamw,
    "swiglu": _swiglu,
    "layer": _layer,
    "switch": s2ft_switch.arms,
}


def measure(case: S2FTCase, suite: Suite) -> Record:
    """Seconds of every arm of one case."""
    limits, compared = s2ft_limits.limits(case), bases(case.operation, case.dim, case.r)
    make = _OPERATIONS[case.operation]
    return operations.measure(lambda: make(case, suite), limits, compared, suite.s2ft_plan, suite.device_type)


def run(suite: Suite, progress: Progress) -> Record:
    """All cases of `suite` for the operators of slices."""
    with as_if_recorded(suite.device_type):
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
