"""Token elimination's operators: the arms compute the same, limits are counted by hand, what is wrong gets no time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import report, token_elimination, token_limits, token_tables
from benchmarks.harness import Plan
from benchmarks.suites import SUITES, Suite, TokenCase
from peft_kernels import backends
from peft_kernels.reference import token_selection

from .test_report import ratio

QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)
SUITE = Suite("test", "cpu", (), QUICK, (), QUICK, token_plan=QUICK, backends=("reference", "triton"))
CASES = [
    TokenCase("norm", 44, 20, 20, 0.5, torch.float32, block_size=8),
    TokenCase("norm", 44, 20, 20, 0.5, torch.bfloat16, block_size=8),
    TokenCase("scatter", 44, 20, 20, 0.25, torch.bfloat16, block_size=8),
    TokenCase("linear", 44, 20, 28, 0.5, torch.float32, block_size=8),
    TokenCase("linear", 44, 20, 28, 0.5, torch.bfloat16, block_size=8),
    TokenCase("scores", 44, 48, 24, 1.0, torch.float32, head=12, block_size=8),
    TokenCase("scores", 40, 48, 24, 1.0, torch.bfloat16, head=12, block_size=8),
    TokenCase("loss", 44, 20, 37, 1.0, torch.float32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.dtype}")
def test_every_arm_of_an_operation_is_timed(case: TokenCase) -> None:
    record = token_elimination.measure(case, SUITE)
    arms = record["arms"]
    expected = {token_elimination.OURS, *token_elimination.BASES[case.operation]}
    if case.operation in ("scatter", "linear"):
        expected |= {token_elimination.IN_PLACE}
    if case.operation != "scatter":
        expected |= {"ours [reference]", "ours [triton]"}
        assert arms.pop("ours [triton]")["status"] == "unavailable"
        assert set(arms["ours [reference]"]["backends"].values()) == {"reference"}
        expected -= {"ours [triton]"}
    assert set(arms) == expected
    for name, arm in arms.items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["median_s"] > 0
        assert ("peak_bytes" in arm) == (case.operation == "loss")
    assert set(arms["ours"]["relative_to"]) == set(token_elimination.BASES[case.operation])


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("gather_rms_norm", CASES[0]),
        ("gather_rms_norm_backward", CASES[0]),
        ("scatter_add_rows", CASES[2]),
        ("gather_linear_scatter", CASES[3]),
        ("gather_linear_scatter_", CASES[3]),
        ("block_scores", CASES[5]),
        ("cross_entropy_rows_", CASES[7]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_kernel_gets_no_time(operator: str, case: TokenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    right = backends.kernel

    def kernel(name: str, *where: Any) -> Any:
        found = right(name, *where)
        if name != operator:
            return found

        def broken(*arguments: Any) -> Any:
            result = found(*arguments)
            if result is None:  # what it changes comes first
                arguments[0].mul_(1.1)
                return None
            return tuple(1.1 * part for part in result) if isinstance(result, tuple) else 1.1 * result

        return broken

    monkeypatch.setattr(backends, "kernel", kernel)
    arms = token_elimination.measure(case, SUITE)["arms"]
    assert list(arms) == [token_elimination.OURS]
    assert arms["ours"]["status"] == "failed"
    assert "gets no time" in arms["ours"]["reason"]


def test_in_place_additions_stay_as_they_are_over_rounds() -> None:
    suite = replace(SUITE, token_plan=Plan(warmup=3, min_rounds=20, max_rounds=20, seconds=0.0), backends=())
    assert token_elimination.measure(CASES[2], suite)["arms"][token_elimination.IN_PLACE]["rounds"] == 20


@pytest.mark.parametrize("tokens", [24, 29])
def test_the_matrix_of_scores_is_the_definition(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, 6, generator=generator, dtype=torch.float64) for heads in (4, 2))
    expected = token_selection.block_scores(q, k, 8, None)
    found = token_elimination.matrix_scores(q, k, 8)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_rows_are_those_of_whole_blocks_and_the_rest() -> None:
    rows = token_elimination.kept_rows(CASES[3])
    assert rows.dtype == torch.int32
    assert rows.numel() == 3 * 8 + 4  # of five blocks three, and 4 tokens behind them
    assert rows.tolist() == sorted(set(rows.tolist())) and rows[-4:].tolist() == [40, 41, 42, 43]
    assert all((rows[:24].view(3, 8) % 8 == torch.arange(8)).all(1))


def test_limits_are_counted_by_hand() -> None:
    linear = token_limits.limits(TokenCase("linear", 128, 16, 32, 0.25, torch.bfloat16, block_size=32))
    assert linear["operations"] == 2 * 32 * 16 * 32
    assert linear["times_faster"] == {token_limits.DENSE: 4.0, token_limits.ADDED_DENSE: 4.0}
    assert linear["bytes"] == 2 * (32 * 16 + 32 * 16 + 2 * 128 * 32)
    assert linear["bytes_in_place"] == 2 * (32 * 16 + 32 * 16 + 2 * 32 * 32)
    norm = token_limits.limits(TokenCase("norm", 128, 16, 16, 0.25, torch.float32, block_size=32))
    assert norm == {"bytes": 4 * 16 * (5 * 32 + 2 * 128)}
    scatter = token_limits.limits(TokenCase("scatter", 128, 16, 16, 0.25, torch.float32, block_size=32))
    assert scatter == {"bytes": 4 * 16 * (2 * 128 + 32)}
    scores = token_limits.limits(TokenCase("scores", 128, 16, 8, 1.0, torch.bfloat16, head=4))
    assert scores == {"bytes": 2 * 128 * 24, "operations": 128 * 129 * 16}
    loss = token_limits.limits(TokenCase("loss", 128, 16, 100, 1.0, torch.bfloat16))
    assert loss == {
        "bytes": 2 * (2 * 128 * 16 + 100 * 16),
        "operations": 4 * 128 * 16 * 100,
        "bytes_of_logits": 2 * 128 * 100,
    }
    nothing = token_limits.limits(TokenCase("linear", 128, 16, 32, 0.0, torch.bfloat16, block_size=32))
    assert nothing["operations"] == 0 and nothing["times_faster"] == {}


def test_the_chunked_loss_takes_less_memory_where_logits_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kernels.ops import cross_entropy

    monkeypatch.setitem(cross_entropy.LOGITS_BYTES, "cpu", 64 * 1000 * 4)
    case = TokenCase("loss", 640, 16, 1000, 1.0, torch.float32)
    arms = token_elimination.measure(case, replace(SUITE, backends=()))["arms"]
    assert arms["ours"]["peak_bytes"] < 0.2 * arms[token_elimination.LOGITS]["peak_bytes"]
    assert arms[token_elimination.LOGITS]["peak_bytes"] > 640 * 1000 * 4


def section(*records: dict[str, Any], not_reached: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"train_info": {"cases": list(records), "not_reached": list(not_reached)}}


LINEAR = {"operation": "linear", "M": 8, "K": 64, "N": 32, "keep": 0.5, "dtype": "float32", "head": 0, "block_size": 4}


def test_the_table_of_operations_has_a_line_for_each_comparison() -> None:
    dense, unfused, added = token_elimination.BASES["linear"]
    ours = {"median_s": 2e-6, "relative_to": {dense: ratio(0.5), unfused: ratio(0.8)}}
    in_place = {"median_s": 1e-6, "relative_to": {added: ratio(0.2)}}
    arms = {"ours": ours, token_elimination.IN_PLACE: in_place}
    arms |= {dense: {"median_s": 4e-6}, unfused: {"median_s": 3e-6}, added: {"median_s": 5e-6}}
    record = {"case": LINEAR, "limits": {"times_faster": {dense: 2.0, added: 2.0}}, "arms": arms}
    loss = {**LINEAR, "operation": "loss", "keep": 1.0}
    taken = {"median_s": 1e-6, "peak_bytes": 1_000_000, "relative_to": {token_elimination.LOGITS: ratio(0.25)}}
    other = {"case": loss, "arms": {"ours": taken, token_elimination.LOGITS: {"median_s": 4e-6, "peak_bytes": 5e6}}}
    failed = {"case": LINEAR, "arms": {"ours": {"status": "failed", "reason": "no", "median_s": 0}}}
    scores = {**LINEAR, "operation": "scores", "head": 16, "keep": 1.0}
    table = token_tables.operations(section(record, other, failed, not_reached=(scores,)))
    start = "| linear | 64 to 32, M=8 | keep 0.5 | float32 |"
    assert f"{start} 2 | {dense} | 4 | 0.500 (0.500-0.500) | 2.00 | 2.00 |  |" in table
    assert f"{start} 2 | {unfused} | 3 | 0.800 (0.800-0.800) | 1.25 |  |  |" in table
    line = start.replace("linear", "linear, in place")
    assert f"{line} 1 | {added} | 5 | 0.200 (0.200-0.200) | 5.00 | 2.00 |  |" in table
    assert "| 1 | torch, all logits | 4 | 0.250 (0.250-0.250) | 4.00 |  | 1.0 / 5.0 |" in table
    assert f"{start} failed | {dense} |  | failed | failed |  |  |" in table
    assert "| scores | 4 and 2 heads of 16, T=8 |  | float32 | not measured |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_every_table_is_known_and_says_where_nothing_was_measured(tmp_path: Any) -> None:
    for name in ("token-operations", "token-model-time", "token-model-memory", "token-model-saved"):
        for suite in ("cpu", "gpu"):
            assert report.table(f"{name}-{suite}", tmp_path) == "not measured"


def test_the_cpu_suite_asks_for_what_is_claimed() -> None:
    suite = SUITES["cpu"]()
    assert {case.operation for case in suite.tokens} == set(token_elimination.BASES)
    first = suite.token_models[0]
    assert (first.model, first.batch_size * first.sequence_length, first.keep, first.r) == ("smollm2", 2048, 0.5, 16)
    assert (first.dense_first, first.dense_last) == (2, 1)
