"""One LoRA linear: time of forward and of forward + backward, bytes saved for backward, peak bytes.

Before an arm is timed its results are compared with the formulas in float64; a wrong arm gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from peft_kernels import backends
from peft_kernels.backends import BackendUnavailable
from peft_kernels.ops.lora import draw_rng_state
from peft_kernels.reference.philox import dropout_mask, dropout_scale

from . import memory, peers
from .cases import Progress, Record, failure, run_cases
from .harness import Arm, Plan, interleave, rotation, spread, summarize
from .limits import Shape
from .peers import Layer, LayerSpec, Weights
from .suites import LayerCase, Suite

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
BASES = (peers.FROZEN, peers.PEFT)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest accepted ||result - exact|| / ||exact||: a gate against timing something broken, not an accuracy test."""


def _expected(spec: LayerSpec, weights: Weights, x: Tensor, dy: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """y, dx, grad_a and grad_b in float64; `mask` is D, or None without dropout."""
    x, dy, weight = x.double(), dy.double(), weights.weight.double()
    a, b = weights.lora_a.double(), weights.lora_b.double()
    inputs = x if mask is None else x * mask
    hidden, grad_hidden = inputs @ a.t(), spec.scaling * dy @ b
    low_rank = grad_hidden @ a
    return {
        "y": x @ weight.t() + spec.scaling * hidden @ b.t(),
        "dx": dy @ weight + (low_rank if mask is None else low_rank * mask),
        "grad_a": grad_hidden.t() @ inputs,
        "grad_b": spec.scaling * dy.t() @ hidden,
    }


def _relative_error(result: Tensor, exact: Tensor) -> float:
    return (torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact)).item()


def errors(spec: LayerSpec, weights: Weights, layer: Layer, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Relative errors of y, dx, grad_a and grad_b against float64.

    With dropout only our layers can be checked, because only their mask can be had again; peers return {}, and are
    checked by the cases without dropout. The frozen linear returns {}.
    """
    if not layer.factors or (spec.dropout_p > 0.0 and not layer.name.startswith(peers.OURS)):
        return {}
    mask = None
    if spec.dropout_p > 0.0:
        torch.manual_seed(1)
        kept = dropout_mask(spec.M, spec.K, spec.dropout_p, draw_rng_state(spec.device))
        mask = kept.double() * dropout_scale(spec.dropout_p)
    torch.manual_seed(1)
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    grads = torch.autograd.grad(y, (leaf, *layer.factors), dy)
    results = dict(zip(("y", "dx", "grad_a", "grad_b"), (y.detach(), *grads), strict=True))
    exact = _expected(spec, weights, x, dy, mask)
    return {name: _relative_error(results[name], exact[name]) for name in exact}


def _try(spec: LayerSpec, weights: Weights, layer: Layer, x: Tensor, dy: Tensor) -> Record:
    """The record of an arm before it is timed: `status` is `ready`, `unavailable`, `wrong` or `failed`."""
    try:
        found = errors(spec, weights, layer, x, dy)
        step = _step(layer, [x.detach().clone().requires_grad_()], [dy])
        step(0)
    except BackendUnavailable as error:
        return {"status": "unavailable", "reason": str(error)}
    except Exception as error:
        return failure(error)
    bad = {name: value for name, value in found.items() if not value <= _TOLERANCE[spec.dtype]}
    if bad:
        listed = ", ".join(f"{name} {value:.2e}" for name, value in bad.items())
        reason = f"relative error against float64 above {_TOLERANCE[spec.dtype]:.0e}: {listed}"
        return {"status": "wrong", "reason": reason, "errors": {k: repr(v) for k, v in found.items()}}
    return {"status": "ready", "errors": found}


def _step(layer: Layer, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Callable[[int], None]:
    """Forward + backward over inputs that rotate with the round; gradients end up in `.grad` as in training."""

    def step(i: int) -> None:
        layer(inputs[i % len(inputs)]).backward(gradients[i % len(gradients)])

    return step


def _forward(layer: Layer, inputs: Sequence[Tensor]) -> Callable[[int], Tensor]:
    """Forward with its graph recorded, as in training."""
    return lambda i: layer(inputs[i % len(inputs)])


def _drop_gradients(layer: Layer, inputs: Sequence[Tensor]) -> Callable[[], None]:
    def drop() -> None:
        for tensor in (*layer.factors, *inputs):
            tensor.grad = None

    return drop


def _measure_memory(layer: Layer, x: Tensor, dy: Tensor) -> dict[str, int]:
    total, storages = memory.saved_bytes(lambda: layer(x), layer.parameters)
    drop = _drop_gradients(layer, [x])
    drop()
    peak = memory.peak_tensor_bytes(lambda: _step(layer, [x], [dy])(0), x.device)
    drop()
    own = storages.get(x.untyped_storage().data_ptr(), 0)
    return {"saved_bytes": total, "saved_bytes_beyond_x": total - own, "peak_bytes": peak}


def copy_rate(device: torch.device, plan: Plan) -> float:
    """Bytes per second, reads and writes counted, of a copy larger than any cache of the device."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    samples = interleave([Arm("copy", lambda _: target.copy_(source))], plan, device)
    return 2 * size / spread(samples["copy"])[1]


def _time(
    layers: Sequence[Layer], inputs: Sequence[Tensor], gradients: Sequence[Tensor], plan: Plan, device: torch.device
) -> dict[str, Record]:
    """Mode to arm to summary."""
    forward = [Arm(layer.name, _forward(layer, inputs)) for layer in layers]
    both = [Arm(layer.name, _step(layer, inputs, gradients), _drop_gradients(layer, inputs)) for layer in layers]
    arms = {FORWARD: forward, FORWARD_BACKWARD: both}
    return {mode: summarize(interleave(timed, plan, device), BASES) for mode, timed in arms.items()}


def measure(case: LayerCase, suite: Suite, bytes_per_second: float) -> Record:
    """Everything measured about one case, as it goes into the result file."""
    device = torch.device(suite.device_type)
    spec = LayerSpec(**asdict(case), device=device)
    weights = Weights.random(spec)
    layers = peers.layers(spec, weights, suite.backends)
    generator = torch.Generator(device).manual_seed(1)

    def normal(columns: int) -> Callable[[int], Tensor]:
        return lambda _: torch.randn(spec.M, columns, generator=generator, device=device).to(spec.dtype)

    inputs = [x.requires_grad_() for x in rotation(normal(spec.K), device)]
    gradients = rotation(normal(spec.N), device)
    arms = {layer.name: _try(spec, weights, layer, inputs[0], gradients[0]) for layer in layers}
    if arms[peers.FROZEN]["status"] != "ready":
        raise RuntimeError(f"the frozen linear itself did not run: {arms[peers.FROZEN]['reason']}")
    ready = [layer for layer in layers if arms[layer.name]["status"] == "ready"]
    for layer in ready:
        _drop_gradients(layer, inputs)()
        arms[layer.name].update(_measure_memory(layer, inputs[0], gradients[0]))
    times = _time(ready, inputs, gradients, suite.layer_plan, device)
    for layer in ready:
        arms[layer.name].update({mode: times[mode][layer.name] for mode in times}, status="measured")
    shape = Shape(spec.M, spec.K, spec.N, spec.r, weights.weight.element_size())
    frozen = {mode: times[mode][peers.FROZEN]["median_s"] for mode in times}
    limits = shape.record(frozen, bytes_per_second)
    return {"limits": {**limits, "saved_bytes": shape.saved_bytes()}, "arms": arms}


def default_backends(device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Which backend serves each of the family's operators when none is forced."""
    names = [name for name in backends.operators() if name.startswith("lora_")]
    return {name: backends.choice(name, device_type, dtype)[0] for name in names}


def run(suite: Suite, progress: Progress) -> Record:
    """All layer cases of `suite`."""
    device = torch.device(suite.device_type)
    bytes_per_second = copy_rate(device, Plan(warmup=2, min_rounds=5, max_rounds=15, seconds=0.5))
    dtypes = sorted({case.dtype for case in suite.layers}, key=str)
    train_info = {
        "copy_bytes_per_second": bytes_per_second,
        "default_backends": {
            str(dtype).removeprefix("torch."): default_backends(device.type, dtype) for dtype in dtypes
        },
    }
    return run_cases(suite.layers, lambda case: measure(case, suite, bytes_per_second), describe, progress, train_info)


def describe(record: Record) -> str:
    """One line: the case and every arm's forward + backward time relative to the frozen linear."""
    case = record["case"]
    shape = f"M={case['M']} {case['K']}->{case['N']} r={case['r']} {case['dtype']} p={case['dropout_p']}"
    parts = []
    for name, arm in record["arms"].items():
        if name == peers.FROZEN:
            parts.append(f"{name} {arm[FORWARD_BACKWARD]['median_s'] * 1e3:.2f} ms")
        elif arm["status"] == "measured":
            ratio = arm[FORWARD_BACKWARD]["relative_to"][peers.FROZEN]["median_of_ratios"]
            parts.append(f"{name} {ratio:.3f}")
        else:
            parts.append(f"{name} {arm['status']}")
    return f"{shape}: " + ", ".join(parts)
