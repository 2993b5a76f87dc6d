"""Sparse deltas over weights that bitsandbytes stores in 4 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn.quantized import dequantized

bnb = pytest.importorskip("bitsandbytes")
K, N = 128, 64


def quantized(kind: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Linear(K, N, bias=bias)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(K, N, bias=bias, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


EACH = pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_and_gradients_are_those_of_the_dense_weight(kind, dtype, bias):
    base = quantized(kind, bias)
    layer = pk.nn.QuantizedSparseDeltaLinear(base, density=0.05)
    with torch.no_grad():
        layer.values.normal_()
    x = torch.randn(2, 5, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    dx, dvalues = torch.autograd.grad(y, (x, layer.values), dy)

    weight = dequantized(base, torch.float64)
    weight.view(-1)[layer.indices.long()] += layer.values.detach().double()
    weight.requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = nn.functional.linear(wide, weight, None if base.bias is None else base.bias.double())
    exact_dx, exact_dw = torch.autograd.grad(exact, (wide, weight), dy.double())
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 6e-2}
    assert torch.allclose(y.double(), exact, **tolerance)
    assert torch.allclose(dx.double(), exact_dx, **tolerance)
    assert torch.allclose(dvalues.double(), exact_dw.view(-1)[layer.indices.long()], **tolerance)
    assert dvalues.dtype == torch.float32


@EACH
def test_what_is_stored_never_changes(kind):
    base = quantized(kind)
    before = base.weight.data.clone()
    layer = pk.nn.QuantizedSparseDeltaLinear(base, num_deltas=40)
    optimizer = pk.optim.SparseAdamW([layer.values], lr=0.1)
    x, target = torch.randn(16, K), torch.randn(16, N)
    losses = []
    for _ in range(10):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(base.weight.data, before)


def test_no_dense_weight_is_kept_for_backward():
    layer = pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), num_deltas=40)
    x = torch.randn(3, K, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert saved and all(tensor.numel() < N * K for tensor in saved)


def test_checkpointing_gives_the_same_gradient():
    layer = pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), num_deltas=40)
    x = torch.randn(3, K, requires_grad=True)
    layer(x).square().sum().backward()
    plain = layer.values.grad.clone()
    layer.values.grad = None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.values.grad, plain)


def test_autocast_computes_in_its_dtype():
    layer = pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), num_deltas=40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, K)).dtype == torch.bfloat16


def test_state_holds_values_and_positions():
    layer = pk.nn.QuantizedSparseDeltaLinear(quantized("int8"), num_deltas=40)
    assert {"values", "indices"} <= layer.state_dict().keys()


BAD = {
    "dense_base": (lambda: pk.nn.QuantizedSparseDeltaLinear(nn.Linear(4, 4), num_deltas=1), TypeError, "Linear4bit"),
    "not_quantised_yet": (
        lambda: pk.nn.QuantizedSparseDeltaLinear(bnb.nn.Linear4bit(K, N), num_deltas=1),
        ValueError,
        "not quantised yet",
    ),
    "two_numbers": (
        lambda: pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), density=0.1, num_deltas=3),
        ValueError,
        "either density or num_deltas",
    ),
    "unsorted": (
        lambda: pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), indices=torch.tensor([3, 1])),
        ValueError,
        "indices must be sorted",
    ),
    "float64": (
        lambda: pk.nn.QuantizedSparseDeltaLinear(quantized("nf4"), num_deltas=3)(torch.randn(2, K).double()),
        TypeError,
        "x must be float32, bfloat16 or float16",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_without_a_change_it_computes_what_bitsandbytes_does(kind):
    base = quantized(kind)
    x = torch.randn(7, K)
    expected = base(x)
    assert torch.allclose(pk.nn.QuantizedSparseDeltaLinear(base, num_deltas=5)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_quantised_layers_is_adapted_saved_and_loaded(tmp_path):
    def model():
        return nn.ModuleDict({"a": quantized("nf4"), "b": quantized("int8"), "c": nn.Linear(K, N)})

    first, second = model(), model()
    report = pk.inject(first, pk.SparseDeltaConfig(density=0.05), seed=3)
    assert len(report.fused) == 3
    kinds = [type(first[name]).__name__ for name in "abc"]
    assert kinds == ["QuantizedSparseDeltaLinear", "QuantizedSparseDeltaLinear", "SparseDeltaLinear"]
    with torch.no_grad():
        for name in "abc":
            first[name].values.normal_()
    pk.save_adapter(first, tmp_path)
    pk.load_adapter(second, tmp_path)
    x = torch.randn(5, K)
    for name in "abc":
        assert torch.equal(second[name](x), first[name](x))
    with pytest.raises(ValueError, match="quantised weight cannot hold"):
        pk.merge(first)
    pk.eject(first, merge=False)
    assert [type(first[name]).__name__ for name in "abc"] == ["Linear4bit", "Linear8bitLt", "Linear"]


def test_magnitudes_of_a_quantised_weight_are_refused():
    model = nn.ModuleDict({"a": quantized("nf4")})
    with pytest.raises(ValueError, match='a: selection "magnitude" needs a dense weight'):
        pk.inject(model, pk.SparseDeltaConfig(density=0.05, selection="magnitude"))
    assert type(model["a"]).__name__ == "Linear4bit"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_that_an_evaluation_has_packed_is_read_right(kind):
    base = quantized(kind)
    expected = dequantized(base, torch.float32)
    base.eval()
    x = torch.randn(4, K, dtype=torch.bfloat16)
    with torch.no_grad():
        evaluated = base.to(torch.bfloat16)(x)  # on some processors this packs the weight in place
    assert torch.allclose(dequantized(base, torch.float32), expected, rtol=1e-2, atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(base(x), evaluated, rtol=2e-2, atol=2e-2)


def test_nothing_is_merged_where_one_layer_cannot_be():
    model = nn.ModuleDict({"a": nn.Linear(K, N), "b": quantized("nf4")})
    pk.inject(model, pk.SparseDeltaConfig(density=0.05))
    for call in (pk.merge, pk.eject):
        with pytest.raises(ValueError, match="b cannot be merged: a quantised weight"):
            call(model)
        assert type(model["a"]).__name__ == "SparseDeltaLinear" and not model["a"].merged


def test_eject_trains_again_what_trained_before():
    model = nn.ModuleDict({"b": quantized("nf4")})
    model["b"].bias.requires_grad_(True)
    pk.inject(model, pk.SparseDeltaConfig(density=0.05))
    pk.eject(model, merge=False)
    assert model["b"].bias.requires_grad


def test_an_injection_that_fails_freezes_nothing():
    model = nn.ModuleDict({"b": quantized("nf4"), "c": nn.Linear(K, N)})
    model["b"].bias.requires_grad_(True)
    positions = {"b": torch.tensor([0, 5], dtype=torch.int32), "c": torch.tensor([5, 0], dtype=torch.int32)}
    with pytest.raises(ValueError, match="c: indices must be sorted"):
        pk.inject(model, pk.SparseDeltaConfig(selection="fixed"), positions=positions)
    assert model["b"].bias.requires_grad and model["c"].weight.requires_grad
