"""Call overhead under pytest-benchmark: forward + backward of a layer of 64 x 64 at M=1, where only the host works.

Times are reported, not asserted: they belong to the machine. The interleaved comparison with PEFT's layer is
`python -m benchmarks --suite cpu --only call_overhead`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import calls, peers
from benchmarks.suites import CallCase

ARMS = (peers.FROZEN, peers.PEFT, peers.OURS)


@pytest.fixture(autouse=True)
def fresh_memory_is_not_filled() -> Iterator[None]:
    """Filling every allocation with NaN, as the other tests do, is work of its own."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("name", ARMS)
def test_call_overhead(benchmark, name: str, dropout_p: float) -> None:  # type: ignore[no-untyped-def]
    case = CallCase(M=1, K=64, N=64, r=16, dropout_p=dropout_p, iterations=1)
    layers = {layer.name: layer for layer in calls.make_layers(case, torch.device("cpu"))}
    assert tuple(layers) == ARMS
    call = calls.one_call(layers[name], torch.randn(1, 64, requires_grad=True), torch.randn(1, 64))
    benchmark.group = f"forward + backward, 64 x 64, M=1, p={dropout_p}"
    benchmark.pedantic(call, rounds=10, iterations=20, warmup_rounds=2)
    if benchmark.enabled:
        assert benchmark.stats.stats.median > 0
