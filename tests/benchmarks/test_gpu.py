"""The parts of the suite that only a GPU can run: events, rotation beyond L2, the allocator's counters."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls, harness, lora, memory, metadata, peers
from benchmarks.harness import Arm, Plan, interleave
from benchmarks.suites import CallCase, LayerCase, Suite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUICK = Plan(warmup=1, min_rounds=2, max_rounds=2, seconds=0.0)
DEVICE = torch.device("cuda")


def suite(layer: LayerCase, call: CallCase) -> Suite:
    return Suite("test", "cuda", (layer,), QUICK, (call,), QUICK, backends=("reference", "triton", "cuda"))


def test_events_see_work_the_host_does_not_wait_for() -> None:
    x = torch.randn(4096, 4096, device=DEVICE)
    samples = interleave([Arm("one", lambda _: x @ x), Arm("four", lambda _: [x @ x for _ in range(4)])], QUICK, DEVICE)
    assert min(samples["four"]) > 2 * min(samples["one"]) > 0


def test_rotated_inputs_together_exceed_the_cache() -> None:
    size = torch.cuda.get_device_properties(DEVICE).L2_cache_size // 4
    inputs = harness.rotation(lambda i: torch.ones(size, dtype=torch.uint8, device=DEVICE), DEVICE, at_most=100)
    assert sum(x.nbytes for x in inputs) > 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size


def test_peak_is_the_most_that_lived_at_once() -> None:
    def step() -> None:
        first = torch.ones(1 << 20, device=DEVICE)
        del first
        torch.ones(1 << 19, device=DEVICE)

    assert memory.peak_tensor_bytes(step, DEVICE) == 4 << 20


def test_a_layer_and_a_call_are_measured() -> None:
    layer = LayerCase(128, 256, 192, 16, torch.bfloat16, 0.1)
    call = CallCase(1, 64, 64, 16, 0.0, iterations=2)
    record = lora.measure(layer, suite(layer, call), 3e12)
    statuses = {name: arm["status"] for name, arm in record["arms"].items()}
    assert set(statuses.values()) <= {"measured", "unavailable"}, record["arms"]
    assert statuses[peers.OURS] == statuses[peers.PEFT] == "measured"
    times = calls.measure(call, suite(layer, call))["arms"]
    assert all(arm["median_s"] > 0 for arm in times.values())
    assert metadata.system(DEVICE)["gpu"]["name"]
