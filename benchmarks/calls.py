"""Call overhead: forward + backward of one tiny layer, where the host's work per call is all that takes time.

One sample is a block of many calls, so that the clock's own cost and resolution do not show. On a GPU the blocks are
timed with events: kernels this small finish before the host has queued the next, so the time is the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from . import peers
from .cases import Progress, Record, run_cases
from .harness import Arm, interleave, summarize
from .peers import Layer, LayerSpec, Weights
from .suites import CallCase, Suite

_SECONDS = ("median_s", "q1_s", "q3_s", "min_s")


def make_layers(case: CallCase, device: torch.device) -> list[Layer]:
    """The arms: frozen linear, PEFT's layer, ours; float32."""
    sizes = asdict(case)
    del sizes["iterations"]
    spec = LayerSpec(**sizes, dtype=torch.float32, device=device)
    weights = Weights.random(spec)
    return [peers.frozen_linear(spec, weights), peers.peft_layer(spec, weights), peers.ours(spec, weights)]


def one_call(layer: Layer, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward + backward into fresh gradients, as a training step does it."""
    leaves = (x, *layer.factors)

    def call() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return call


def measure(case: CallCase, suite: Suite) -> Record:
    """Seconds per call of every arm."""
    device = torch.device(suite.device_type)
    x = torch.randn(case.M, case.K, device=device, requires_grad=True)
    dy = torch.randn(case.M, case.N, device=device)

    def block(layer: Layer) -> Callable[[int], None]:
        call = one_call(layer, x, dy)

        def run(_: int) -> None:
            for _ in range(case.iterations):
                call()

        return run

    arms = [Arm(layer.name, block(layer)) for layer in make_layers(case, device)]
    summary = summarize(interleave(arms, suite.call_plan, device), (peers.FROZEN, peers.PEFT))
    per_call = {
        name: {key: value / case.iterations if key in _SECONDS else value for key, value in arm.items()}
        for name, arm in summary.items()
    }
    return {"arms": per_call}


def run(suite: Suite, progress: Progress) -> Record:
    """All call cases of `suite`."""
    return run_cases(suite.calls, lambda case: measure(case, suite), describe, progress, {"dtype": "float32"})


def describe(record: Record) -> str:
    """One line: microseconds per call of every arm."""
    case = record["case"]
    times = ", ".join(f"{name} {arm['median_s'] * 1e6:.1f} us" for name, arm in record["arms"].items())
    return f"M={case['M']} {case['K']}x{case['N']} p={case['dropout_p']}: {times}"
