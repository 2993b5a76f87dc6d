"""`nn.SwiGLUMLP`: what it computes, keeps and leaves as it was, and which modules it may not take the place of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peft_kernels as pk
from peft_kernels.nn import S2FTLinear, SwiGLUMLP
from peft_kernels.nn.swiglu_mlp import swiglu_obstacle
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_accurate, assert_same_bits

ROLES = ("gate_proj", "up_proj", "down_proj")
HIDDEN, CHANNELS, COUNT = 12, 21, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


class Mlp(nn.Module):
    """An MLP as transformers' Llama has it."""

    def __init__(self, activation=nn.functional.silu, bias=True, dtype=torch.float32, dropout=0.0):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, CHANNELS, bias=bias, dtype=dtype)
        self.up_proj = nn.Linear(HIDDEN, CHANNELS, bias=bias, dtype=dtype)
        self.down_proj = nn.Linear(CHANNELS, HIDDEN, bias=bias, dtype=dtype)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.note = "kept"

    def forward(self, x):
        return self.down_proj(self.dropout(self.activation(self.gate_proj(x)) * self.up_proj(x)))


def plain_mlp(dtype=torch.float32, bias=True, seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mlp(bias=bias, **options).to(dtype)


def fused_mlp(plain, dim="input", count=COUNT):
    """A `SwiGLUMLP` over a copy of `plain`, whose last layer trains some channels; other parameters as they were."""
    mlp = copy.deepcopy(plain)
    channels = CHANNELS if dim == "input" else HIDDEN
    indices = torch.randperm(channels, generator=torch.Generator().manual_seed(3))[:count].sort().values
    mlp.down_proj = S2FTLinear.over(mlp.down_proj, indices, dim)
    mlp.down_proj.weight.requires_grad_(False)
    return SwiGLUMLP.over(mlp, *ROLES)


def gradients(mlp, x):
    """y and the gradients of x and of every parameter that trains, by name."""
    x = x.detach().clone().requires_grad_()
    mlp.zero_grad()
    y = mlp(x)
    y.double().square().sum().backward()
    found = {name: value.grad for name, value in mlp.named_parameters() if value.requires_grad}
    return {"y": y.detach(), "x": x.grad, **found}


@DTYPES
@pytest.mark.parametrize("dim", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(HIDDEN,), (3, 5, HIDDEN), (0, HIDDEN)], ids=str)
def test_values_and_every_gradient_are_those_of_the_plain_module(dtype, dim, bias, shape):
    plain, x = plain_mlp(dtype, bias), torch.randn(shape).to(dtype)
    fused = fused_mlp(plain, dim)
    own, exact, found = gradients(plain, x), gradients(copy.deepcopy(plain).double(), x.double()), gradients(fused, x)
    layer = fused.down_proj
    for results in (own, exact):
        results["down_proj.trainable"] = results.pop("down_proj.weight").index_select(layer.axis, layer.indices)
    assert found.keys() == own.keys() and "gate_proj.weight" in found
    assert found["down_proj.trainable"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in found.items():
        assert_accurate(value, own[name], exact[name], name)


@DTYPES
def test_the_same_bits_with_and_without_gradients_and_merged(dtype):
    mlp, x = fused_mlp(plain_mlp(dtype)), torch.randn(3, 5, HIDDEN).to(dtype)
    with torch.no_grad():
        mlp.down_proj.trainable.add_(0.5)
    expected = mlp(x).detach()
    with torch.no_grad():
        assert_same_bits(mlp(x), expected)
    mlp.down_proj.merge()
    assert_same_bits(mlp(x).detach(), expected)


def storages_saved_by(call, owned):
    """Bytes of the storages that the graph of one call keeps, besides those of `owned`, and its result."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = call()
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    assert y.requires_grad
    return sum(size for place, size in storages.items() if place not in known)


@DTYPES
@pytest.mark.parametrize("count", [1, COUNT, CHANNELS])
@pytest.mark.parametrize("x_trains", [True, False])
def test_gate_up_and_the_slice_are_kept_and_nothing_else(dtype, count, x_trains):
    plain = plain_mlp(dtype).eval()
    mlp, rows = fused_mlp(plain, count=count), 3 * 11
    for model, trained in ((plain, plain.down_proj.weight), (mlp, mlp.down_proj.trainable)):
        model.requires_grad_(False)
        trained.requires_grad_()
    x = torch.randn(3, 11, HIDDEN).to(dtype).requires_grad_(x_trains)
    found = storages_saved_by(lambda: mlp(x), [x, *mlp.parameters(), *mlp.buffers()])
    numbers = rows * count
    if x_trains:  # only then is there a gradient of gate and up
        numbers += 2 * rows * CHANNELS
    assert found == numbers * x.element_size()
    dense = storages_saved_by(lambda: plain(x), [x, *plain.parameters()])
    assert dense == (4 if x_trains else 1) * rows * CHANNELS * x.element_size(), "gate, silu, up and their product"


def test_one_call_leaves_nothing_for_the_next():
    mlp, x = fused_mlp(plain_mlp()), torch.randn(5, HIDDEN)
    first, second = gradients(mlp, x), gradients(mlp, x)
    for name in first:
        assert_same_bits(second[name], first[name], name)


def test_gradients_accumulate():
    mlp, x = fused_mlp(plain_mlp(torch.float64)), torch.randn(6, HIDDEN, dtype=torch.float64)
    together = gradients(mlp, x)["down_proj.trainable"].clone()
    mlp.zero_grad()
    for part in x.chunk(2):
        mlp(part).square().sum().backward()
    torch.testing.assert_close(mlp.down_proj.trainable.grad, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_the_plain_module_does(dtype):
    plain, x = plain_mlp(dtype), torch.randn(7, HIDDEN).to(dtype)
    fused = fused_mlp(plain)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = gradients(plain, x), gradients(fused, x)
    own["down_proj.trainable"] = own.pop("down_proj.weight")[:, fused.down_proj.indices]
    for name, value in found.items():
        torch.testing.assert_close(
            value.float(), own[name].float(), rtol=0.05, atol=0.05 * float(own[name].abs().max())
        )


def test_what_the_last_layer_s_hook_changes_is_what_it_trains_on():
    plain = plain_mlp(torch.float64)
    fused, x = fused_mlp(plain), torch.randn(5, HIDDEN, dtype=torch.float64)
    for mlp in (plain, fused):
        mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1, *args[1:]))
    own, found = gradients(plain, x), gradients(fused, x)
    own["down_proj.trainable"] = own.pop("down_proj.weight")[:, fused.down_proj.indices]
    for name, value in found.items():
        torch.testing.assert_close(value, own[name], msg=name)


def test_training_is_that_of_the_plain_module():
    plain = plain_mlp(torch.float64)
    fused = fused_mlp(plain)
    unfused = copy.deepcopy(fused).restored()
    assert type(unfused) is Mlp and isinstance(unfused.down_proj, S2FTLinear)
    losses = []
    for mlp in (fused, unfused):
        optimizer = SparseAdamW([p for p in mlp.parameters() if p.requires_grad], lr=0.02)
        generator = torch.Generator().manual_seed(4)
        for _ in range(10):
            x = torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64)
            loss = (mlp(x) - x.roll(1, -1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[:10]), torch.stack(losses[10:]))
    assert losses[9] < 0.9 * losses[0]


def test_second_derivatives_are_those_of_the_plain_module():
    plain = plain_mlp(torch.float64)
    fused, x = fused_mlp(plain), torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)

    def second(mlp):
        (first,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, mlp.gate_proj.weight, mlp.up_proj.weight])

    for actual, expected in zip(second(fused), second(plain), strict=True):
        torch.testing.assert_close(actual, expected)


def test_state_names_hooks_and_attributes_are_those_of_the_module():
    plain = plain_mlp().eval()
    seen = []
    handle = plain.register_forward_hook(lambda module, args, output: seen.append(output))
    fused = SwiGLUMLP.over(plain, *ROLES)
    assert list(fused.state_dict()) == list(plain.state_dict()) and fused.note == "kept" and not fused.training
    assert fused.replaced_type is Mlp and fused.roles == ROLES
    x = torch.randn(2, HIDDEN)
    y = fused(x)
    assert len(seen) == 1 and seen[0] is y
    handle.remove()
    torch.testing.assert_close(fused(x), plain(x))
    assert len(seen) == 1
    back = fused.restored()
    assert type(back) is Mlp and set(back.__dict__) == set(plain.__dict__)
    assert back.gate_proj is plain.gate_proj


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same_and_share_nothing(copied):
    mlp, x = fused_mlp(plain_mlp()), torch.randn(3, HIDDEN)
    twin = copied(mlp)
    expected = gradients(mlp, x)
    found = gradients(twin, x)
    for name, value in found.items():
        assert_same_bits(value, expected[name], name)
    SparseAdamW([twin.down_proj.trainable], lr=0.1).step()
    assert not torch.equal(twin(x), expected["y"])
    assert_same_bits(mlp(x).detach(), expected["y"])
    assert type(twin.restored()) is Mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles_into_one_graph_for_every_length(dtype):
    torch._dynamo.reset()
    mlp, counter = fused_mlp(plain_mlp(dtype)), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=counter)
    for length in (5, 9, 64, 7):
        x = torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length)).to(dtype)
        expected, found = gradients(mlp, x), gradients(compiled, x)
        for name, value in expected.items():
            key = name if name in found else f"_orig_mod.{name}"
            torch.testing.assert_close(found[key], value, msg=name)
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Swapped(Mlp):
    def forward(self, x):
        return self.down_proj(self.activation(self.up_proj(x)) * self.gate_proj(x))


class Scaled(Mlp):
    def forward(self, x):
        return 1.01 * super().forward(x)


class Pair(Mlp):
    def forward(self, x):
        return super().forward(x), None


class Two(Mlp):
    def forward(self, x, y):
        return super().forward(x + y)


class Noisy(Mlp):
    """Drops some channels in training by a function, not a module."""

    def forward(self, x):
        h = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(h, 0.3, self.training))


def with_change(change):
    mlp = plain_mlp()
    change(mlp)
    return mlp


OBSTACLES = {
    "gelu": (lambda: plain_mlp(activation=nn.functional.gelu), r"Mlp does not compute down\(silu\(gate\(x\)\) \* up"),
    "relu": (lambda: plain_mlp(activation=nn.functional.relu), r"does not compute down\("),
    "quick gelu": (lambda: plain_mlp(activation=lambda g: g * torch.sigmoid(1.702 * g)), r"does not compute down\("),
    "swapped": (Swapped, r"Swapped does not compute down\("),
    "scaled": (Scaled, r"does not compute down\("),
    "pair": (Pair, r"does not compute down\("),
    "two inputs": (Two, "it does not compute with one input: .*missing 1 required positional argument"),
    "dropout": (lambda: plain_mlp(dropout=0.1), "in training"),
    "dropout in evaluation": (lambda: plain_mlp(dropout=0.1).eval(), "in training"),
    "functional dropout": (Noisy, "in training"),
    "instance forward": (lambda: with_change(lambda mlp: setattr(mlp, "forward", abs)), "its forward is replaced on"),
    "another layer": (lambda: with_change(lambda mlp: setattr(mlp, "up_proj", nn.Identity())), "are not all nn.Linear"),
    "no layer": (lambda: with_change(lambda mlp: delattr(mlp, "up_proj")), "its layers are not all nn.Linear"),
    "hook": (lambda: with_change(lambda mlp: mlp.down_proj.register_forward_pre_hook(print)), "have forward hooks"),
    "output hook": (lambda: with_change(lambda mlp: mlp.up_proj.register_forward_hook(print)), "have forward hooks"),
    "meta": (lambda: plain_mlp().to("meta"), "it is on the meta device"),
}


@pytest.mark.parametrize(("make", "message"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_cannot_be_replaced_is_told_with_the_reason_and_left_as_it_was(make, message):
    mlp = make()
    flags, state = {name: module.training for name, module in mlp.named_modules()}, torch.get_rng_state()
    reason = swiglu_obstacle(mlp, *ROLES)
    assert reason is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(reason)
    assert {name: module.training for name, module in mlp.named_modules()} == flags
    assert torch.equal(torch.get_rng_state(), state)


@DTYPES
@pytest.mark.parametrize("std", [1e-3, 0.02, 1.0])
@pytest.mark.parametrize(
    ("activation", "fits"),
    [
        (nn.functional.silu, True),
        (nn.SiLU(), True),
        (lambda g: g * torch.sigmoid(g), True),
        (nn.functional.gelu, False),
        (lambda g: nn.functional.gelu(g, approximate="tanh"), False),
        (nn.functional.mish, False),
    ],
    ids=["silu", "module", "by hand", "gelu", "gelu by tanh", "mish"],
)
def test_the_activation_is_told_at_any_scale_of_the_weights(dtype, std, activation, fits):
    mlp = plain_mlp(dtype, bias=False, activation=activation)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(std=std, generator=torch.Generator().manual_seed(1))
    reason = swiglu_obstacle(mlp, *ROLES)
    assert (reason is None) == fits, reason


@pytest.mark.parametrize("co_permute", [False, True])
def test_injecting_fuses_the_mlps_and_ejecting_restores_their_class(llama, tokens, co_permute):
    model = llama()
    kinds = [type(module) for module in model.modules()]
    expected = model(tokens).logits.detach()
    config = pk.S2FTConfig(ratios={"down": 0.1}, budget="per_layer", co_permute=co_permute)
    report = pk.inject(model, config, seed=1)
    fused = [module for module in model.modules() if isinstance(module, SwiGLUMLP)]
    assert len(fused) == 2 and "2 MLPs run with a fused SwiGLU" in report.notes
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    pk.eject(model, merge=False)
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize(
    ("options", "model_options", "note"),
    [
        ({"fuse_swiglu": False}, {}, None),
        ({"ratios": {"up": 0.1}}, {}, None),
        ({}, {"hidden_act": "gelu"}, r"2 MLPs, model.layers.0.mlp first, run without a fused SwiGLU: .*does not comp"),
    ],
    ids=["off", "no down", "gelu"],
)
def test_where_nothing_is_fused_the_classes_stay(llama, tokens, options, model_options, note):
    model = llama(**model_options)
    expected = model(tokens).logits.detach()
    report = pk.inject(model, pk.S2FTConfig(**{"ratios": {"down": 0.1}, **options}), seed=1)
    assert not any(isinstance(module, SwiGLUMLP) for module in model.modules())
    assert torch.equal(model(tokens).logits, expected)
    if note is None:
        assert not any("SwiGLU" in text for text in report.notes)
    else:
        with pytest.raises(ValueError, match=note):
            raise ValueError("\n".join(report.notes))


def test_an_mlp_that_is_the_whole_model_stays_what_it_is():
    mlp = plain_mlp()
    names = list(mlp.state_dict())
    report = pk.inject(mlp, pk.S2FTConfig(ratios={"down": 0.2}))
    assert report.notes == (
        "1 MLPs, the model first, run without a fused SwiGLU: it is the whole model, whose place nothing can take",
    )
    assert type(mlp) is Mlp and isinstance(mlp.down_proj, S2FTLinear) and "" not in mlp._modules
    pk.eject(mlp)
    assert list(mlp.state_dict()) == names


def test_an_mlp_used_at_two_places_stays_one():
    mlp = plain_mlp()
    model = nn.ModuleDict({"first": nn.Sequential(mlp), "second": nn.Sequential(mlp)})
    pk.inject(model, pk.S2FTConfig(ratios={"down": 0.2}))
    assert model["first"][0] is model["second"][0] and isinstance(model["first"][0], SwiGLUMLP)
    pk.eject(model)
    assert model["first"][0] is model["second"][0] and type(model["first"][0]) is Mlp
