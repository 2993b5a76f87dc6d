"""The parts of the suite that only a GPU can run: events, rotation beyond L2, the allocator's counters."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls, harness, lora, memory, metadata, model, operations, peers, s2ft, sparse_delta
from benchmarks.cases import Progress
from benchmarks.harness import Arm, Plan, interleave
from benchmarks.suites import BF16, CallCase, LayerCase, S2FTCase, S2FTModelCase, SparseCase, Suite

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


def test_slices_sparse_deltas_and_a_model_are_measured() -> None:
    """That they run: whether kernels without a record are right is a matter of other tests."""
    slices = [S2FTCase(name, 128, 256, 192, 0.1, BF16) for name in ("gradient", "adamw", "swiglu")]
    slices += [
        S2FTCase("layer", 128, 256, 192, 0.1, BF16, r=8),
        S2FTCase("switch", 0, 256, 192, 0.1, BF16, layers=2, r=8),
    ]
    some = Suite(
        name="test",
        device_type="cuda",
        layers=(),
        layer_plan=QUICK,
        calls=(),
        call_plan=QUICK,
        s2ft=tuple(slices),
        s2ft_plan=QUICK,
        sparse=tuple(SparseCase(name, 128, 256, 192, 0.05, BF16) for name in ("write", "adamw", "gradient", "layer")),
        sparse_plan=QUICK,
        s2ft_models=(S2FTModelCase("random:llama-tiny", 2, 16, 0.1, 0.3, 4, BF16),),
        model_plan=QUICK,
        backends=("reference", "triton", "cuda"),
        memory_of_model=True,
    )
    progress = Progress(lambda _: None, lambda _: None, lambda: 1.0)
    for run in (s2ft.run, sparse_delta.run, model.run_s2ft):
        for record in run(some, progress)["cases"]:
            for name, arm in record["arms"].items():
                assert arm["status"] in ("measured", "unavailable"), (record["case"], name, arm)
                if name.startswith(operations.OURS) and arm["status"] == "measured":
                    assert set(arm["backends"].values()) <= {"cuda", "triton", "reference"}
