"""`nn.LoRALinear` as a module: construction, what it shares and keeps, training, copies, compilation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels.nn import LoRALinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layer_with_update(**options):
    layer = LoRALinear(24, 20, r=4, lora_alpha=6, **{"init_lora_weights": False, **options})
    return layer


def formula(layer, x):
    update = layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)
    return nn.functional.linear(x, layer.weight, layer.bias) + update


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_formula(shape, bias):
    layer = layer_with_update(dtype=torch.float64, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(layer, x))


def test_a_new_layer_computes_what_its_linear_does():
    linear = nn.Linear(24, 20)
    x = torch.randn(3, 24)
    assert torch.equal(LoRALinear.from_linear(linear, r=4)(x), linear(x))


def test_from_linear_shares_and_freezes_the_parameters():
    linear = nn.Linear(24, 20).eval()
    linear.note = "kept"
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad
    assert layer.lora_a.requires_grad and layer.lora_b.requires_grad
    assert not layer.training and layer.note == "kept"
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b"]
    assert list(linear._parameters) == ["weight", "bias"], "the linear layer itself got nothing new"


def test_hooks_come_along_and_their_handles_remove_them():
    linear = nn.Linear(24, 20)
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(output))
    layer = LoRALinear.from_linear(linear, init_lora_weights=False)
    y = layer(torch.randn(3, 24))
    assert len(seen) == 1 and seen[0] is y
    handle.remove()
    layer(torch.randn(3, 24))
    assert len(seen) == 1


def with_forward_replaced():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


def with_state_dict_hook():
    linear = nn.Linear(4, 4)
    linear._register_state_dict_hook(lambda *args: None)
    return linear


def with_int8_weight():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


class Subclass(nn.Linear):
    """Could compute anything."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(4, 4), "it is a nn.Embedding, not an nn.Linear"),
        (lambda: Subclass(4, 4), "Subclass, whose own forward would be lost"),
        (lambda: LoRALinear(4, 4), "LoRALinear, whose own forward would be lost"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), "its weight is parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "its weight is not a parameter"),
        (with_int8_weight, "its weight is int8"),
        (with_forward_replaced, "its forward is replaced on the instance"),
        (with_state_dict_hook, "it has state_dict hooks"),
    ],
)
def test_what_cannot_be_replaced_is_refused_with_the_reason(make, message):
    linear = make()
    before = [parameter.requires_grad for parameter in linear.parameters()]
    with pytest.raises(TypeError, match=message):
        LoRALinear.from_linear(linear)
    assert [parameter.requires_grad for parameter in linear.parameters()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"r": 2.0}, "r must be an integer >= 1, got 2.0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
        ({"lora_dropout": 1.5}, r"lora_dropout must be a probability in \[0, 1\], got 1.5"),
        ({"lora_dropout": float("nan")}, r"lora_dropout must be a probability in \[0, 1\], got nan"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, False or 'gaussian', got 'pissa'"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be float32, bfloat16 or float16"),
        ({"adapter_dtype": torch.float64}, "adapter_dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_hyperparameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(4, 4, **options)
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(4, 4), **options)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_factors_are_float32_over_half_precision_unless_told_otherwise(dtype, adapter_dtype, expected):
    layer = layer_with_update(dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.lora_a.dtype == layer.lora_b.dtype == expected
    y = layer(torch.randn(3, 24, dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype and layer.lora_a.grad.dtype == layer.lora_b.grad.dtype == expected


def test_initializations():
    default, gaussian = LoRALinear(400, 50, r=8), LoRALinear(4000, 50, r=8, init_lora_weights="gaussian")
    both = LoRALinear(400, 50, r=8, init_lora_weights=False)
    assert default.lora_b.count_nonzero() == gaussian.lora_b.count_nonzero() == 0
    assert both.lora_b.count_nonzero() == both.lora_b.numel()
    assert 0.045 < default.lora_a.abs().max() <= 0.05  # uniform within 1 / sqrt(400)
    assert gaussian.lora_a.std().item() == pytest.approx(1 / 8, rel=0.05)


def test_one_seed_gives_one_adapter_and_leaves_torch_alone():
    def drawn():
        generator = torch.Generator().manual_seed(5)
        return LoRALinear.from_linear(nn.Linear(8, 8), generator=generator).lora_a

    first = drawn()
    state = torch.get_rng_state()
    layer = LoRALinear.from_linear(nn.Linear(8, 8, device="meta"), generator=torch.Generator())
    assert layer.lora_a.is_meta and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(first, drawn())


def test_a_layer_made_on_the_meta_device_is_initialized_when_it_gets_memory():
    layer = LoRALinear(400, 20, r=4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.lora_b.count_nonzero() == 0 and 0.045 < layer.lora_a.abs().max() <= 0.05
    assert 0.045 < layer.weight.abs().max() <= 0.05


def test_rank_stabilized_scaling():
    assert LoRALinear(4, 4, r=4, lora_alpha=6).scaling == 1.5
    assert LoRALinear(4, 4, r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


def test_dropout_acts_in_training_only_and_follows_the_seed():
    layer = layer_with_update(lora_dropout=0.5)
    x = torch.randn(5, 24)

    def seeded(seed):
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))
    layer.eval()
    assert torch.equal(seeded(1), seeded(2))


@pytest.mark.parametrize("frozen", ["lora_a", "lora_b"])
def test_a_frozen_factor_gets_no_gradient(frozen):
    layer = layer_with_update()
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.randn(3, 24)).sum().backward()
    trained = "lora_b" if frozen == "lora_a" else "lora_a"
    assert getattr(layer, frozen).grad is None and getattr(layer, trained).grad.count_nonzero() > 0


def test_gradients_accumulate_over_calls_and_backward_passes():
    layer = layer_with_update(dtype=torch.float64)
    x, y = torch.randn(2, 3, 24, dtype=torch.float64)
    layer(torch.cat([x, y])).square().sum().backward()
    together = layer.lora_a.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    layer(y).square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, together)
    layer.zero_grad()
    (layer(x).square().sum() + layer(y).square().sum()).backward()
    torch.testing.assert_close(layer.lora_a.grad, together)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_regenerates_the_same_mask(reentrant):
    layer = layer_with_update(lora_dropout=0.5)
    x = torch.randn(6, 24, requires_grad=True)

    def gradients(run):
        torch.manual_seed(3)
        layer.zero_grad()
        x.grad = None
        run().square().sum().backward()
        return layer.lora_a.grad, layer.lora_b.grad, x.grad

    plain = gradients(lambda: layer(x))
    checkpointed = gradients(lambda: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_share_nothing(copied):
    layer = layer_with_update(lora_dropout=0.25)
    twin = copied(layer)
    x = torch.randn(3, 24)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.lora_b.zero_()
    assert layer.lora_b.count_nonzero() > 0


def test_state_dict_round_trip_through_a_file():
    layer, other = layer_with_update(), layer_with_update()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), other(x))


def test_compiles_without_a_graph_break():
    layer = layer_with_update(lora_dropout=0.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    compiled(x).square().sum().backward()
    compiled_gradient = layer.lora_a.grad.clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(compiled_gradient, layer.lora_a.grad)


def test_repr_says_what_the_layer_is():
    layer = LoRALinear(24, 20, r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True)
    expected = "r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True"
    assert repr(layer) == f"LoRALinear(in_features=24, out_features=20, bias=True, {expected})"


@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)], ids=str)
def test_the_output_may_be_changed_in_place(shape):
    torch.manual_seed(0)
    layer = LoRALinear(24, 20, r=3, init_lora_weights=False)
    x = torch.randn(shape, requires_grad=True)
    plain = torch.autograd.grad(torch.relu(layer(x)).sum(), (x, layer.lora_a, layer.lora_b))
    changed = torch.autograd.grad(torch.relu_(layer(x)).sum(), (x, layer.lora_a, layer.lora_b))
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one, other)
