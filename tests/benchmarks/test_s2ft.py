"""Slices of channels: the arms compute the same, limits are the hand-counted ones, what is wrong gets no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import report, s2ft, s2ft_limits, s2ft_switch, tables
from benchmarks.harness import Plan
from benchmarks.paca import PaCAFunction, PaCALinear
from benchmarks.suites import S2FTCase, Suite
from peft_kernels import backends
from peft_kernels.nn import S2FTLinear

from .test_report import ratio

QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)
SUITE = Suite("test", "cpu", (), QUICK, (), QUICK, s2ft_plan=QUICK)
CASES = [
    S2FTCase("gradient", 24, 20, 28, 0.1, torch.float32),
    S2FTCase("gradient", 24, 20, 28, 0.1, torch.bfloat16, dim="output"),
    S2FTCase("adamw", 0, 20, 28, 0.1, torch.bfloat16),
    S2FTCase("adamw", 0, 20, 28, 0.1, torch.float32, dim="output"),
    S2FTCase("swiglu", 24, 20, 28, 0.1, torch.bfloat16),
    S2FTCase("layer", 24, 20, 28, 0.1, torch.bfloat16),
    S2FTCase("layer", 24, 20, 28, 0.1, torch.float32, dim="output"),
    S2FTCase("switch", 0, 20, 28, 0.1, torch.bfloat16, layers=2, r=3),
    S2FTCase("switch", 0, 20, 28, 0.1, torch.float32, dim="output", layers=2, r=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.dim}")
def test_every_arm_of_an_operation_is_timed(case: S2FTCase) -> None:
    record = s2ft.measure(case, SUITE)
    expected = {s2ft.OURS, *s2ft.bases(case.operation, case.dim, case.r)}
    assert set(record["arms"]) == expected
    for name, arm in record["arms"].items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["median_s"] > 0
    assert set(record["arms"][s2ft.OURS]["relative_to"]) == expected - {s2ft.OURS}


@pytest.mark.parametrize(
    ("operator", "case"),
    [("slice_grad", CASES[0]), ("slice_adamw_", CASES[3]), ("slice_write_", CASES[8])],
    ids=["slice_grad", "slice_adamw_", "slice_write_"],
)
def test_a_wrong_kernel_gets_no_time(operator: str, case: S2FTCase, monkeypatch: pytest.MonkeyPatch) -> None:
    right = backends.kernel

    def kernel(name: str, *where: Any) -> Any:
        found = right(name, *where)
        if name != operator:
            return found

        def broken(*arguments: Any) -> Any:
            result = found(*arguments)
            if result is None:  # in place: the first argument is what it changes
                arguments[0].view(-1)[-1] += 1
                return None
            return 1.1 * result

        return broken

    monkeypatch.setattr(backends, "kernel", kernel)
    arms = s2ft.measure(case, SUITE)["arms"]
    assert list(arms) == [s2ft.OURS]
    assert arms[s2ft.OURS]["status"] == "failed"
    assert "gets no time" in arms[s2ft.OURS]["reason"]


def test_paca_has_the_gradients_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, trainable, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 20), (28, 20), (28, 3), (2, 3, 28))
    )
    indices = torch.tensor([1, 7, 19])
    x.requires_grad_()
    trainable.requires_grad_()
    y = PaCAFunction.apply(x, weight.clone(), trainable, indices)
    expected = x @ weight.index_copy(1, indices, trainable).t()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, trainable), dy), torch.autograd.grad(expected, (x, trainable), dy)
    )


def test_paca_and_our_layer_train_the_same() -> None:
    torch.manual_seed(0)
    linears = [torch.nn.Linear(20, 28, bias=False) for _ in range(2)]
    linears[1].load_state_dict(linears[0].state_dict())
    indices, trainable = torch.tensor([0, 5, 6]), torch.randn(28, 3)
    ours, paca = S2FTLinear.from_linear(linears[0], indices=indices), PaCALinear(linears[1], indices, trainable)
    with torch.no_grad():
        ours.trainable.copy_(trainable)
    optimizers = [torch.optim.AdamW([layer.trainable], lr=1e-2) for layer in (ours, paca)]
    for _ in range(3):
        x = torch.randn(4, 20)
        results = []
        for layer, optimizer in zip((ours, paca), optimizers, strict=True):
            y = layer(x)
            y.square().sum().backward()
            results.append((y.detach(), layer.trainable.grad.clone()))
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="without bias"):
        PaCALinear(torch.nn.Linear(4, 4), torch.tensor([0]), torch.randn(4, 1))


def test_channels_are_a_share_of_those_of_the_dimension() -> None:
    case = S2FTCase("gradient", 8, 200, 100, 0.03, torch.float32)
    assert case.channels == 6
    assert replace(case, dim="output").channels == 3
    assert replace(case, ratio=1e-6).channels == 1


def test_a_gradient_s_limits_are_those_of_its_products() -> None:
    case = S2FTCase("gradient", 8, 64, 32, 1 / 64, torch.float32)  # one channel, so one line of 16 in each row of x
    limits = s2ft_limits.limits(case)
    assert limits["operations"] == 2 * 8 * 32
    assert limits["operations_of_dense"] == 2 * 8 * 32 * 64
    assert limits["times_faster"] == {s2ft.DENSE: 64}
    lines = 8 * 64 / 16 * (1 - (63 / 64) ** 16)
    assert limits["bytes"] == pytest.approx(8 * 32 * 4 + 64 * lines + 2 * 8 * 4 + 32 * 4)
    output = s2ft_limits.limits(replace(case, dim="output", ratio=1 / 32))
    assert output["times_faster"] == {s2ft.DENSE: 32}
    lines = 8 * 32 / 16 * (1 - (31 / 32) ** 16)
    assert output["bytes"] == pytest.approx(8 * 64 * 4 + 64 * lines + 64 * 4)


def test_the_other_limits_are_counted_by_hand() -> None:
    rows = S2FTCase("adamw", 0, 64, 32, 1 / 32, torch.float32, dim="output")  # a row of 256 bytes: four lines
    assert s2ft_limits.limits(rows) == {"bytes": 28 * 64 + 8 + 2 * 64 * 4}
    layer = s2ft_limits.limits(S2FTCase("layer", 8, 64, 32, 1 / 64, torch.float32))
    assert layer["operations"] == 4 * 8 * 64 * 32 + 2 * 8 * 32
    assert layer["times_faster"][s2ft.FROZEN] == pytest.approx(1 / (1 + 1 / 128))
    assert s2ft_limits.limits(S2FTCase("swiglu", 8, 64, 32, 1 / 64, torch.bfloat16)) == {"bytes": 2 * (8 * 8 * 64 + 8)}
    switch = s2ft_limits.limits(replace(rows, operation="switch", layers=3))
    assert switch == {"bytes": 3 * (4 * 64 * 4 + 64 * 12), "bytes_of_merging": 3 * 4 * 64 * 32 * 4}


def test_a_switch_s_adapters_are_about_every_layer_of_its_model() -> None:
    case = CASES[7]
    model, adapter = s2ft_switch.model_of(case, torch.device("cpu")), s2ft_switch.adapter_of(case, 1)
    assert set(adapter.linears(model)) == {"0.down_proj", "1.down_proj"}
    assert all(update.slice.indices.numel() == case.channels for update in adapter.values())
    other = s2ft_switch.adapter_of(case, 2)
    assert not torch.equal(adapter["0.down_proj"].change, other["0.down_proj"].change)


def section(*records: dict[str, Any], not_reached: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"train_info": {"cases": list(records), "not_reached": list(not_reached)}}


def test_the_table_of_operations_has_a_line_for_each_comparison() -> None:
    case = {
        "operation": "layer",
        "M": 8,
        "K": 64,
        "N": 32,
        "ratio": 0.03,
        "dtype": "float32",
        "dim": "input",
        "layers": 1,
    }
    ours = {"median_s": 2e-6, "relative_to": {"frozen linear": ratio(1.25), "PaCA": ratio(0.5)}}
    arms = {"ours": ours, "frozen linear": {"median_s": 1e-6}, "PaCA": {"median_s": 4e-6}}
    record = {"case": case, "limits": {"times_faster": {"frozen linear": 0.99}}, "arms": arms}
    del_paca = {name: arm for name, arm in arms.items() if name != "PaCA"}
    without = {"case": {**case, "dim": "output"}, "limits": {}, "arms": del_paca}
    failed = {"case": case, "arms": {"ours": {"status": "failed", "reason": "no", "median_s": 0}}}
    switch = {**case, "operation": "switch", "M": 0, "layers": 30}
    table = tables.s2ft_operations(section(record, without, failed, not_reached=(switch,)))
    start = "| layer | 64 to 32, M=8 | 3% of input | float32 |"
    assert f"{start} 2 | frozen linear | 1 | 1.250 (1.250-1.250) | 0.80 | 0.99 |" in table
    assert f"{start} 2 | PaCA | 4 | 0.500 (0.500-0.500) | 2.00 |  |" in table
    assert table.count("3% of output") == 1
    assert f"{start} failed | frozen linear |  | failed | failed |  |" in table
    assert "| switch | 30 x 64 to 32 | 3% of input | float32 | not measured |" in table
    widths = {line.count("|") for line in table.splitlines()}
    assert len(widths) == 1, table


def test_the_table_of_kept_bytes_is_relative_to_the_frozen_model() -> None:
    case = {"model": "m", "batch_size": 2, "sequence_length": 8, "down": 0.03, "o": 0.05, "r": 16, "dtype": "bfloat16"}
    arms = {
        "frozen model": {"saved": {"bytes": 2_000_000, "decoder_bytes": 1_000_000}},
        "PaCA": {
            "saved": {
                "bytes": 2_100_000,
                "decoder_bytes": 1_100_000,
                "relative_to_frozen": {"bytes": 1.05, "decoder_bytes": 1.1},
            }
        },
        "ours, inject": {"status": "wrong", "reason": "no"},
        "PEFT LoRA": {"median_s": 1.0},
    }
    table = tables.model_saved(section({"case": case, "arms": arms}, not_reached=(case,)))
    start = "| m, 2 x 8 | down 3%, o 5%; LoRA r=16 | bfloat16 |"
    assert f"{start} 2.0 / 1.0 | not measured | 2.1 / 1.1 (1.050 / 1.100) | wrong |" in table
    assert f"{start} not measured | not measured | not measured | not measured |" in table


def test_an_arm_may_need_less_memory_than_the_frozen_model() -> None:
    case = {"model": "m", "batch_size": 2, "sequence_length": 8, "down": 0.03, "o": 0.05, "r": 16, "dtype": "bfloat16"}
    peak = {"resident_bytes": 3_000_000, "tensor_bytes": 2_000_000}
    added = {"resident_bytes": -500_000, "tensor_bytes": 250_000}
    arms = {"frozen model": {"memory": peak}, "ours, inject": {"memory": {**peak, "added": added}}}
    table = tables.model_memory(section({"case": case, "arms": arms}))
    assert "| bfloat16 | 3.0 / 2.0 | -0.5 / +0.2 |" in table


def test_the_tables_are_known() -> None:
    for name in ("s2ft-operations", "s2ft-model-time", "s2ft-model-saved", "s2ft-model-memory", "model-saved"):
        assert f"{name}-cpu" in report.TABLES
