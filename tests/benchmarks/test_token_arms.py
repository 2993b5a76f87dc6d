"""Token elimination in a whole model: plain PyTorch and ours train the same, and keep what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import model, model_arms, model_memory, plain_tokens, token_arms, token_tables
from benchmarks.harness import Plan
from benchmarks.model_arms import FROZEN, ModelArm
from benchmarks.suites import Suite, TokenModelCase
from benchmarks.token_arms import (
    BY_ATTENTION,
    BY_NORM,
    CHECKPOINTED,
    DENSE,
    DENSE_CHUNKED,
    PLAIN,
    PLAIN_OVER_OURS,
)
from peft_kernels import ops
from peft_kernels.training.models import LoadedModel, load_model

from .test_report import ratio

# The first layer stays dense: its inputs are embeddings, which are the same for the same bytes.
CASE = TokenModelCase("random:llama-tiny", 2, 44, 0.5, 4, torch.float32, block_size=8, dense_first=1, dense_last=0)
QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)
SUITE = Suite("test", "cpu", (), QUICK, (), QUICK, model_plan=QUICK)


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    torch.manual_seed(0)
    return load_model(CASE.model, CASE.dtype, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch(source: LoadedModel) -> torch.Tensor:
    return model_arms.batches(source.tokenizer, CASE, count=1)[0]


@pytest.fixture
def arms(source: LoadedModel) -> dict[str, ModelArm]:
    return {name: token_arms.build(name, source.model, CASE) for name in token_arms.arm_names(CASE)}


def by_layer(arm: ModelArm) -> dict[str, torch.nn.Parameter]:
    """The arm's factors by names that do not depend on what the layers are wrapped in."""
    found = {}
    for name, parameter in arm.trainable().items():
        for part in ("base_model.model.", ".default", ".weight", "layer."):
            name = name.replace(part, "")
        found[name.lower()] = parameter
    return found


def test_plain_pytorch_selects_as_our_operators_do() -> None:
    x = torch.randn(3, 45, 16, generator=torch.Generator().manual_seed(0))
    scores = torch.linalg.vector_norm(x, dim=-1)
    expected, _ = ops.select_tokens(scores, 0.5, 8)
    assert torch.equal(plain_tokens.kept_positions(x, 0.5, 8).int(), expected)


@pytest.mark.parametrize(
    ("names", "expected"), [((PLAIN, PLAIN_OVER_OURS), BY_NORM), ((DENSE_CHUNKED, CHECKPOINTED), DENSE)]
)
def test_arms_that_are_compared_train_alike(
    names: tuple[str, ...], expected: str, arms: dict[str, ModelArm], batch: torch.Tensor
) -> None:
    for _ in range(3):
        losses = {name: arms[name].step(batch) for name in (expected, *names)}
        for name in names:
            torch.testing.assert_close(losses[name], losses[expected], rtol=1e-5, atol=0, msg=name)
    factors = by_layer(arms[expected])
    for name in names:
        found = by_layer(arms[name])
        assert found.keys() == factors.keys()
        for path, parameter in found.items():
            torch.testing.assert_close(parameter, factors[path], rtol=1e-3, atol=1e-5, msg=f"{name} {path}")


def test_elimination_changes_the_loss_by_more_than_the_check_lets_pass(
    arms: dict[str, ModelArm], batch: torch.Tensor
) -> None:
    losses = {name: arm.forward_backward(batch).item() for name, arm in arms.items()}
    assert abs(losses[BY_NORM] - losses[DENSE]) > 1e-4 * losses[DENSE]
    assert losses[BY_ATTENTION] != losses[BY_NORM]


def test_steps_of_all_arms_leave_the_base_model_alone(source: LoadedModel, batch: torch.Tensor) -> None:
    before = {name: parameter.detach().clone() for name, parameter in source.model.named_parameters()}
    kinds = [type(module) for module in source.model.modules()]
    for name in token_arms.arm_names(CASE):
        token_arms.build(name, source.model, CASE).step(batch)
    assert all(torch.equal(parameter, before[name]) for name, parameter in source.model.named_parameters())
    assert [type(module) for module in source.model.modules()] == kinds


def test_saved_bytes_shrink_with_the_kept_tokens(arms: dict[str, ModelArm], batch: torch.Tensor) -> None:
    records: dict[str, dict[str, Any]] = {name: {} for name in arms}
    model_memory.add_saved(records, list(arms.values()), batch)
    saved = {name: record["saved"]["decoder_bytes"] for name, record in records.items()}
    assert saved[DENSE] == saved[DENSE_CHUNKED]
    assert saved[BY_NORM] < saved[PLAIN_OVER_OURS] < saved[DENSE]
    assert saved[CHECKPOINTED] < 0.5 * saved[DENSE]
    whole = {name: record["saved"]["bytes"] for name, record in records.items()}
    assert whole[DENSE_CHUNKED] < whole[DENSE]


def test_an_arm_of_another_selection_gets_no_time(
    source: LoadedModel, batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = plain_tokens.kept_positions
    monkeypatch.setattr(plain_tokens, "kept_positions", lambda x, keep, size: right(-x.flip(1), keep, size))
    records = model.measure(CASE, SUITE, source.model, [batch])["arms"]
    for name in (PLAIN, PLAIN_OVER_OURS):
        assert records[name]["status"] == "wrong", records[name]
        assert records[name]["reason"].endswith(f"of {BY_NORM}")
    assert {record["status"] for name, record in records.items() if name not in token_arms.PLAIN_ARMS} == {"measured"}
    assert set(records[BY_NORM]["relative_to"]) == {FROZEN, DENSE}


def test_padding_is_refused_by_plain_elimination(source: LoadedModel) -> None:
    layer = plain_tokens.PlainElimination(source.model.model.layers[0], 0.5, 8)
    with pytest.raises(ValueError, match="without padding"):
        layer(torch.zeros(1, 16, 64), position_embeddings=(), attention_mask=torch.ones(1, 16))


def test_the_ideal_ratio_counts_linears_and_attention(source: LoadedModel) -> None:
    tokens, kept, r = 44, 3 * 8 + 4, 4
    linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]
    per_token = sum(4 * K * N + 6 * r * (K + N) for K, N in linears)
    pairs = 7 * 4 * 16
    head = 4 * tokens * 64 * 512
    dense = 2 * (tokens * per_token + pairs * tokens**2) + head
    expected = (tokens * per_token + pairs * tokens**2 + kept * per_token + pairs * kept**2 + head) / dense
    assert token_arms.ideal_ratio(source.model, CASE) == pytest.approx(expected)


RECORD = {
    "model": "m",
    "batch_size": 1,
    "sequence_length": 8,
    "keep": 0.5,
    "block_size": 4,
    "r": 16,
    "dtype": "float32",
}
START = "| m, 1 x 8 | keep 0.5 in blocks of 4; LoRA r=16 | float32 |"


def section(arms: dict[str, Any], **limits: float) -> dict[str, Any]:
    return {"train_info": {"cases": [{"case": RECORD, "limits": limits, "arms": arms}], "not_reached": [RECORD]}}


def test_the_table_of_times_is_relative_to_dense_lora_and_to_ours() -> None:
    arms = {
        DENSE: {"median_s": 2.0},
        BY_NORM: {"median_s": 1.0, "relative_to": {DENSE: ratio(0.5)}},
        PLAIN: {"median_s": 1.5, "relative_to": {DENSE: ratio(0.75), BY_NORM: ratio(1.5)}},
    }
    table = token_tables.model_time(section(arms, ideal_ratio=0.4))
    cells = "0.500 (0.500-0.500) | 0.750 (0.750-0.750) | 1.500 (1.500-1.500) | 0.400 |"
    assert f"{START} 2.000 | {cells}" in table
    assert f"{START} not measured |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_tables_of_bytes_give_shares_of_dense_lora() -> None:
    peak = {"resident_bytes": 4_000_000, "tensor_bytes": 2_000_000}
    arms = {
        DENSE: {"memory": peak, "saved": {"bytes": 1_000_000, "decoder_bytes": 500_000}},
        BY_NORM: {
            "memory": {"resident_bytes": 3_000_000, "tensor_bytes": 1_000_000},
            "saved": {"bytes": 250_000, "decoder_bytes": 250_000},
        },
        PLAIN: {"memory": {"status": "failed", "reason": "no"}},
    }
    memory = token_tables.model_memory(section(arms))
    assert f"{START} 4.0 / 2.0 | 3.0 / 1.0 (0.750 / 0.500) | failed |" in memory
    saved = token_tables.model_saved(section(arms))
    assert f"{START} 1.0 / 0.5 | 0.2 / 0.2 (0.250 / 0.500) | not measured |" in saved
