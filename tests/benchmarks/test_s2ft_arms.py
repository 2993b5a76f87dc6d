"""Slices in a whole model: PaCA and ours train the same, begin alike, and keep the bytes that the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import model, model_arms, model_memory, s2ft_arms
from benchmarks.harness import Plan
from benchmarks.model_arms import FROZEN, ModelArm
from benchmarks.s2ft_arms import FULL, INJECT, INJECT_NOT_FUSED, INJECT_SPARSE_ADAMW, LORA, PACA
from benchmarks.suites import S2FTModelCase, Suite
from peft_kernels.training.models import LoadedModel, load_model

CASE = S2FTModelCase("random:llama-tiny", 2, 16, 0.1, 0.3, 4, torch.float32)
QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)
SUITE = Suite("test", "cpu", (), QUICK, (), QUICK, model_plan=QUICK)
OURS = (INJECT, INJECT_SPARSE_ADAMW, INJECT_NOT_FUSED)


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    torch.manual_seed(0)
    return load_model(CASE.model, CASE.dtype, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch(source: LoadedModel) -> torch.Tensor:
    return model_arms.batches(source.tokenizer, CASE, count=1)[0]


@pytest.fixture
def arms(source: LoadedModel) -> dict[str, ModelArm]:
    return {name: s2ft_arms.build(name, source.model, CASE) for name in s2ft_arms.arm_names(CASE)}


def weights(base: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base.named_parameters()}


def test_slices_are_the_input_channels_of_two_roles(source: LoadedModel) -> None:
    found = s2ft_arms.slices(source.model, CASE)
    assert {path.rpartition(".")[2] for path in found} == {"o_proj", "down_proj"}
    assert {part.dim for part in found.values()} == {"input"}
    heads = [part.indices.numel() for path, part in found.items() if path.endswith("o_proj")]
    assert sum(heads) == 2 * 16  # floor(0.3 * 8) heads of 16 channels
    assert sum(part.indices.numel() for path, part in found.items() if path.endswith("down_proj")) == 32


def test_paca_and_ours_train_the_same_slices_alike(arms: dict[str, ModelArm], batch: torch.Tensor) -> None:
    for _ in range(3):
        losses = {name: arms[name].step(batch) for name in (PACA, *OURS)}
        for name in OURS:
            torch.testing.assert_close(losses[name], losses[PACA], msg=name)
    expected = arms[PACA].trainable()
    for name in OURS:
        found = arms[name].trainable()
        assert found.keys() == expected.keys()
        for path, parameter in found.items():
            torch.testing.assert_close(parameter, expected[path], rtol=1e-4, atol=1e-5, msg=f"{name} {path}")


def test_gradients_of_ours_are_pacas(arms: dict[str, ModelArm], batch: torch.Tensor) -> None:
    for name in (PACA, *OURS):
        arms[name].forward_backward(batch)
    for path, parameter in arms[PACA].trainable().items():
        for name in OURS:
            grad = arms[name].model.get_parameter(path).grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=f"{name} {path}")


def test_an_arm_trains_what_its_name_says(arms: dict[str, ModelArm]) -> None:
    counts = {name: sum(p.numel() for p in arm.trainable().values()) for name, arm in arms.items()}
    linears = model_arms.decoder_linears(arms[FULL].model)
    assert counts[FROZEN] == 0
    assert counts[FULL] == sum(linear.weight.numel() for linear in linears.values())
    assert counts[LORA] == sum(4 * (linear.in_features + linear.out_features) for linear in linears.values())
    assert {counts[name] for name in (PACA, *OURS)} == {64 * 64}  # 32 channels of heads and 32 of the MLPs
    assert {p.dtype for p in arms[INJECT].trainable().values()} == {torch.float32}


def test_steps_of_all_arms_leave_the_base_model_alone(source: LoadedModel, batch: torch.Tensor) -> None:
    before = weights(source.model)
    for name in s2ft_arms.arm_names(CASE):
        s2ft_arms.build(name, source.model, CASE).step(batch)
    for name, weight in weights(source.model).items():
        assert torch.equal(weight, before[name]), name


def test_first_losses_are_pacas_or_the_frozen_models(arms: dict[str, ModelArm], batch: torch.Tensor) -> None:
    losses = {name: arm.forward_backward(batch).item() for name, arm in arms.items()}
    for name in (LORA, FULL):
        assert losses[name] == pytest.approx(losses[FROZEN], rel=1e-5)
    for name in OURS:
        assert losses[name] == pytest.approx(losses[PACA], rel=1e-5)
    assert abs(losses[PACA] - losses[FROZEN]) > 1e-4 * losses[FROZEN], "the check could not tell them apart"


def test_saved_bytes_are_the_slices_and_less_the_activation(arms: dict[str, ModelArm], batch: torch.Tensor) -> None:
    records: dict[str, dict[str, Any]] = {name: {} for name in arms}
    model_memory.add_saved(records, list(arms.values()), batch)
    saved = {name: record["saved"] for name, record in records.items()}
    parts = s2ft_arms.slices(arms[FROZEN].model, CASE)
    slices = 4 * batch.numel() * sum(part.indices.numel() for part in parts.values())
    activations = 4 * batch.numel() * 160 * 2  # silu(gate), which torch keeps and ours does not, of two layers
    for key in ("bytes", "decoder_bytes"):
        frozen = saved[FROZEN][key]
        assert saved[PACA][key] == saved[INJECT_NOT_FUSED][key] == frozen + slices
        assert saved[INJECT][key] == saved[INJECT_SPARSE_ADAMW][key] == frozen + slices - activations
        assert saved[FULL][key] > frozen + slices
        assert saved[INJECT]["relative_to_frozen"][key] == pytest.approx(saved[INJECT][key] / frozen)
    assert "relative_to_frozen" not in saved[FROZEN]


def test_an_arm_that_begins_elsewhere_gets_no_time(
    source: LoadedModel, batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = s2ft_arms._inject

    def unperturbed(module: Any, parts: Any, case: S2FTModelCase, fused: bool) -> None:
        right(module, parts, case, fused)
        for path in parts:
            layer = module.get_submodule(path)
            layer.trainable.data.copy_(layer.original)
            layer.restore_weight()

    monkeypatch.setattr(s2ft_arms, "_inject", unperturbed)
    records = model.measure(CASE, SUITE, source.model, [batch])["arms"]
    for name in OURS:
        assert records[name]["status"] == "wrong", name
        assert records[name]["reason"].endswith(f"of {PACA}")
    assert {records[name]["status"] for name in (FROZEN, LORA, FULL, PACA)} == {"measured"}


def test_the_ideal_ratio_counts_the_products_of_the_slices(source: LoadedModel) -> None:
    linears = [m for m in source.model.modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(4 * 32 * linear.weight.numel() for linear in linears)
    expected = 1 + 2 * 32 * 64 * (32 + 32) / frozen
    assert s2ft_arms.ideal_ratio(source.model, CASE) == pytest.approx(expected)
