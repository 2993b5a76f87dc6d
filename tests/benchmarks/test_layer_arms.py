"""What is compared computes the same thing, and what does not gets no time."""

from __future__ import annotations

import pytest
import torch

import peft_kernels as pk
from benchmarks import lora, peers
from benchmarks.harness import Plan
from benchmarks.peers import AddmmLoRAFunction, LayerSpec, Weights
from benchmarks.suites import LayerCase, Suite

CPU = torch.device("cpu")
QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)


def spec(dtype: torch.dtype = torch.float32, dropout_p: float = 0.0) -> LayerSpec:
    return LayerSpec(M=24, K=20, N=28, r=3, dtype=dtype, dropout_p=dropout_p, device=CPU)


def suite(case: LayerCase, backends: tuple[str, ...] = ()) -> Suite:
    return Suite("test", "cpu", (case,), QUICK, (), QUICK, backends=backends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_arm_computes_the_formulas(dtype: torch.dtype) -> None:
    layer_spec = spec(dtype)
    weights = Weights.random(layer_spec)
    x, dy = torch.randn(24, 20).to(dtype), torch.randn(24, 28).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    arms = peers.layers(layer_spec, weights)
    for layer in arms:
        found = lora.errors(layer_spec, weights, layer, x, dy)
        assert set(found) == (set() if layer.name == peers.FROZEN else {"y", "dx", "grad_a", "grad_b"})
        assert all(error < tolerance for error in found.values()), (layer.name, found)


def test_our_dropout_is_checked_against_its_own_mask() -> None:
    layer_spec = spec(dropout_p=0.4)
    weights = Weights.random(layer_spec)
    found = lora.errors(layer_spec, weights, peers.ours(layer_spec, weights), torch.randn(24, 20), torch.randn(24, 28))
    assert len(found) == 4
    assert max(found.values()) < 1e-5


def test_arms_share_the_weight_and_copy_the_factors() -> None:
    layer_spec = spec(torch.bfloat16)
    weights = Weights.random(layer_spec)
    arms = peers.layers(layer_spec, weights)
    assert {layer.weight.data_ptr() for layer in arms} == {weights.weight.data_ptr()}
    factors = [factor for layer in arms for factor in layer.factors]
    assert len({factor.data_ptr() for factor in factors}) == len(factors)
    assert all(factor.requires_grad and factor.any() for factor in factors)


def test_peft_arms_have_the_factor_dtype_they_are_named_for() -> None:
    layer_spec = spec(torch.bfloat16)
    weights = Weights.random(layer_spec)
    assert {factor.dtype for factor in peers.peft_layer(layer_spec, weights).factors} == {torch.float32}
    base_dtype = peers.peft_layer(layer_spec, weights, base_dtype=True)
    assert {factor.dtype for factor in base_dtype.factors} == {torch.bfloat16}


def test_addmm_sequence_with_dropout_has_the_gradients_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, a, b, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((24, 20), (28, 20), (3, 20), (28, 3), (24, 28))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    torch.manual_seed(5)
    y = AddmmLoRAFunction.apply(x, weight, a, b, 0.7, 0.3)
    torch.manual_seed(5)
    dropped, _ = torch.native_dropout(x, 0.3, True)
    expected = x @ weight.t() + 0.7 * dropped @ a.t() @ b.t()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy))


def test_a_measured_case_has_times_bytes_and_limits_for_every_arm() -> None:
    case = LayerCase(24, 20, 28, 3, torch.bfloat16, 0.1)
    record = lora.measure(case, suite(case), 1e10)
    for name, arm in record["arms"].items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["peak_bytes"] > 0
        for mode in (lora.FORWARD, lora.FORWARD_BACKWARD):
            assert arm[mode]["median_s"] > 0
    assert record["limits"][lora.FORWARD]["ideal_ratio"] > 1
    ours = record["arms"][peers.OURS]
    assert set(ours[lora.FORWARD]["relative_to"]) == {peers.FROZEN, peers.PEFT}


def test_a_wrong_arm_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pk.ops.lora_linear
    monkeypatch.setattr(pk.ops, "lora_linear", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    case = LayerCase(24, 20, 28, 3, torch.float32, 0.0)
    record = lora.measure(case, suite(case), 1e10)
    ours = record["arms"][peers.OURS]
    assert ours["status"] == "wrong"
    assert "y 1.0" in ours["reason"]
    assert lora.FORWARD not in ours
    assert record["arms"][peers.PEFT]["status"] == "measured"


def test_a_backend_that_is_not_here_is_unavailable_with_the_reason() -> None:
    case = LayerCase(24, 20, 28, 3, torch.float32, 0.0)
    record = lora.measure(case, suite(case, backends=("cuda",)), 1e10)
    arm = record["arms"]["ours [cuda]"]
    assert arm["status"] == "unavailable"
    assert "cuda" in arm["reason"]
