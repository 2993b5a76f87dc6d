"""`WTACRSLinear` and `LoRALinear` with a `RowSampling`: what they keep, who shares, checkpointing, copies, compile."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import ops
from peft_kernels.nn import LoRALinear, RowSampling, WTACRSLinear
from peft_kernels.reference.wta_crs import row_norms

from ..support.accuracy import assert_same_bits
from .definition import sampled_grad

M, K, N, R = 40, 24, 20, 3
KEEP = 0.3
KEPT = 12
KINDS = pytest.mark.parametrize("kind", ["linear", "lora"])


def make(kind, keep_ratio=KEEP, dtype=torch.float32, out_features=N, **options):
    linear = nn.Linear(K, out_features, dtype=dtype)
    if kind == "linear":
        return WTACRSLinear.from_linear(linear, keep_ratio)
    layer = LoRALinear.from_linear(linear, r=R, init_lora_weights=False, **options)
    layer.row_sampling = RowSampling(keep_ratio)
    return layer


def trained(layer):
    """What gets a sampled gradient."""
    return layer.weight if isinstance(layer, WTACRSLinear) else layer.lora_a


def grads(module, x, seed=None):
    """Gradients by name after one step, and of x."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    module(x).square().sum().backward()
    named = {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {**named, "x": x.grad}


class Projections(nn.Module):
    """Layers that read one tensor, as q, k and v do, and one behind them."""

    def __init__(self, kind, dtype=torch.float32, dropout=0.0):
        super().__init__()
        options = {"lora_dropout": dropout} if kind == "lora" else {}
        self.q, self.k, self.v = (make(kind, dtype=dtype, **options) for _ in range(3))
        self.last = make(kind, dtype=dtype, out_features=K, **options)

    def forward(self, x):
        h = x.tanh()
        mixed = self.q(h) * self.k(h) + self.v(h)
        return self.last(F.pad(mixed, (0, K - N)))


def kept_storages(module, x):
    """Bytes of the storages that a call keeps, by address, but for parameters."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        y = module(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return {place: size for place, size in storages.items() if place not in own and size}, y


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_x", [True, False])
def test_a_layer_keeps_the_sampled_rows_and_no_more(kind, dtype, needs_x):
    layer = make(kind, dtype=dtype)
    found, y = kept_storages(layer, torch.randn(M, K, dtype=dtype, requires_grad=needs_x))
    hidden = [4 * M * R] if kind == "lora" else []
    assert y.requires_grad
    assert sorted(found.values()) == sorted([KEPT * K * dtype.itemsize, 4 * KEPT, 4 * KEPT, *hidden])


@KINDS
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_read_one_tensor_keep_one_sample(kind, autocast):
    module = Projections(kind)
    h = torch.randn(2, M // 2, K)
    layers = nn.ModuleList([module.q, module.k, module.v])
    layers.forward = lambda h: sum(layer(h) for layer in layers)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = kept_storages(layers, h)
    size = 2 if autocast else 4
    sample = [KEPT * K * size, 4 * KEPT, 4 * KEPT]
    if autocast:  # casts of weights, kept for nothing but dx where x needs none
        found = {place: nbytes for place, nbytes in found.items() if nbytes != N * K * size}
    assert sorted(found.values()) == sorted(sample + ([4 * M * R] * 3 if kind == "lora" else []))


@KINDS
def test_a_second_call_on_the_same_tensor_draws_anew(kind):
    layer, x = make(kind), torch.randn(M, K)
    first, second = grads_on(layer, x), grads_on(layer, x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = grads_on(layer, x)
    torch.manual_seed(1)
    assert torch.equal(grads_on(layer, x), third)


def grads_on(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), trained(layer))[0]


def test_who_does_not_share():
    x = torch.randn(M, K)
    first, other = RowSampling(KEEP), RowSampling(KEEP)
    sample = first.sample(x, True)
    assert other.sample(x, True) is sample
    assert RowSampling(0.5).sample(x, True).rows.shape == (20,)
    again = RowSampling(KEEP)  # the sample of 0.5 is the tensor's now
    assert again.sample(x, True) is not sample
    assert RowSampling(KEEP, torch.rand(M)).sample(x, True) is not again
    latest = RowSampling(KEEP)
    sample = latest.sample(x, True)
    x.mul_(2)
    changed = RowSampling(KEEP).sample(x, True)
    assert changed is not sample
    assert torch.equal(changed.kept, x[changed.rows.long()])
    with torch.autocast("cpu", torch.bfloat16):
        assert RowSampling(KEEP).sample(x, True).kept.dtype == torch.bfloat16


@KINDS
def test_the_gradient_is_that_of_the_sample_that_the_seed_draws(kind):
    layer, x = make(kind, dtype=torch.float64), torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(4)
    y = layer(x)
    (found,) = torch.autograd.grad(y.square().sum(), trained(layer))
    torch.manual_seed(4)
    uniforms = torch.rand(KEPT, dtype=torch.float64)
    rows, scales = ops.sampled_rows(row_norms(x), KEPT, uniforms)
    dy = 2 * y.detach()
    dy = dy if kind == "linear" else layer.scaling * dy @ layer.lora_b.detach()
    torch.testing.assert_close(found, sampled_grad(dy, x, rows, scales))


@KINDS
def test_gradients_are_unbiased(kind):
    layer, x = make(kind, dtype=torch.float64), torch.randn(M, K, dtype=torch.float64) * torch.rand(M, 1).exp()
    estimates = torch.stack([grads_on(layer, x) for _ in range(300)])
    layer.eval()
    error = estimates.mean(0) - grads_on(layer, x)
    assert (error.abs() < 6 * estimates.std(0) / 300**0.5 + 1e-9).all()


@KINDS
def test_keeping_everything_is_dense_to_the_bit(kind):
    x = torch.randn(3, 7, K)
    for keep_ratio, rows in ((1.0, x), (0.9, x[0, :2])):  # of 2 rows both
        layer = make(kind, keep_ratio)
        found = grads(layer, rows, seed=1)
        layer.eval()
        for name, grad in grads(layer, rows, seed=1).items():
            assert_same_bits(found[name], grad, name)


@KINDS
def test_all_but_the_sampled_gradient_is_dense_to_the_bit(kind):
    layer, x = make(kind), torch.randn(3, 17, K)
    assert_same_bits(layer(x).detach(), layer.eval()(x).detach())
    exact = grads(layer, x)
    found = grads(layer.train(), x)
    differing = [name for name, grad in found.items() if not torch.equal(grad, exact[name])]
    assert differing == ["weight" if kind == "linear" else "lora_a"]


@KINDS
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(kind, rows):
    found = grads(make(kind), torch.randn(2, rows, K) if rows == 0 else torch.randn(K))
    assert all(grad.isfinite().all() for grad in found.values())


@KINDS
def test_evaluation_and_frozen_parameters_keep_nothing_for_them(kind):
    layer, x = make(kind), torch.randn(M, K, requires_grad=True)
    trained(layer).requires_grad_(False)
    found, _ = kept_storages(layer, x)
    assert list(found.values()) == ([4 * M * R] if kind == "lora" else [])
    trained(layer).requires_grad_(True)
    state = torch.get_rng_state()
    layer.eval()
    found, _ = kept_storages(layer, x)
    assert x.untyped_storage().data_ptr() in found and torch.equal(torch.get_rng_state(), state)


@KINDS
def test_a_sample_is_not_kept_for_what_does_not_train(kind):
    layer, x = make(kind), torch.randn(M, K, requires_grad=True)
    trained(layer).requires_grad_(False)
    sample = ops.draw_rows(x, KEEP)
    calls = {
        "linear": lambda x: ops.sampled_linear(x, layer.weight, layer.bias, sample),
        "lora": lambda x: ops.sampled_lora_linear(
            x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scaling, sample
        ),
    }
    module = nn.Module()
    module.layer, module.forward = layer, calls[kind]
    found, y = kept_storages(module, x)
    assert y.requires_grad and list(found.values()) == ([4 * M * R] if kind == "lora" else [])


@KINDS
def test_gradients_accumulate(kind):
    layer, x = make(kind), torch.randn(M, K)
    torch.manual_seed(2)
    parts = [grads_on(layer, x), grads_on(layer, x)]
    torch.manual_seed(2)
    for _ in range(2):
        layer(x).square().sum().backward()
    assert_same_bits(trained(layer).grad, parts[0] + parts[1])


@KINDS
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_finds_the_same_sample(kind, use_reentrant, dropout):
    class Checkpointed(Projections):
        def forward(self, x):
            y = checkpoint(super().forward, x, use_reentrant=use_reentrant)
            torch.rand(5)  # what is between forward and backward must not matter
            return F.dropout(checkpoint(super().forward, y, use_reentrant=use_reentrant), 0.5)

    class Plain(Projections):
        def forward(self, x):
            y = super().forward(x)
            torch.rand(5)
            return F.dropout(super().forward(y), 0.5)

    module = Plain(kind, dropout=dropout)
    checkpointed = Checkpointed(kind, dropout=dropout)
    checkpointed.load_state_dict(module.state_dict())
    x = torch.randn(2, M // 2, K)
    expected, found = grads(module, x, seed=6), grads(checkpointed, x, seed=6)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_same_bits(grad, expected[name], name)


@KINDS
def test_an_offered_input_is_formed_again_and_its_gradient_exact(kind):
    layer = make(kind)
    source = torch.randn(M, K)
    expected = grads_on(make_eval(layer), source.tanh())
    h = source.tanh()
    with ops.recompute.offered(h, (source,), torch.tanh):
        found = grads_on(layer, h)
    if kind == "lora":
        assert_same_bits(found, expected)
    # A layer that computes with another tensor than the one on offer keeps its sample.
    h = source.tanh()
    with torch.autocast("cpu", torch.bfloat16), ops.recompute.offered(h, (source,), torch.tanh):
        storages, _ = kept_storages(layer, h)
    assert KEPT * K * 2 in storages.values() and M * K * 2 not in storages.values()


def make_eval(layer):
    return copy.deepcopy(layer).eval()


@KINDS
def test_copies_and_files_are_those_of_the_plain_layer(kind):
    layer, x = make(kind), torch.randn(M, K)
    names = {"weight", "bias"} | ({"lora_a", "lora_b"} if kind == "lora" else set())
    assert set(layer.state_dict()) == names
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    expected = grads(layer, x, seed=3)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.row_sampling is not layer.row_sampling and other.row_sampling.keep_ratio == KEEP
        for name, grad in grads(other, x, seed=3).items():
            assert_same_bits(grad, expected[name], name)


@KINDS
def test_gradient_norms_of_an_earlier_step(kind):
    layer, x = make(kind), torch.randn(M, K)
    layer.row_sampling.grad_norms = torch.zeros(M)
    assert not grads_on(layer, x).any()  # as it was said
    layer.row_sampling.grad_norms = torch.cat((torch.full((11,), 1e6), torch.ones(M - 11)))
    seen = []
    original = ops.draw_rows
    try:
        ops.draw_rows = lambda *a, **k: seen.append(original(*a, **k)) or seen[-1]
        grads_on(layer, x)
    finally:
        ops.draw_rows = original
    assert set(range(11)) <= set(seen[0].rows.tolist())
    layer.row_sampling.grad_norms = torch.ones(3)
    with pytest.raises(ValueError, match="grad_norms must be 40 floating numbers"):
        layer(x)


def test_a_compiled_layer_is_the_same_layer():
    torch.compiler.reset()
    module = nn.Sequential(make("lora", out_features=K), make("linear"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (M, M + 3):
        x = torch.randn(rows, K)
        expected = grads(module, x, seed=5)
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        compiled(leaf).square().sum().backward()
        torch.testing.assert_close(leaf.grad, expected["x"])
        for name in ("0.lora_a", "0.lora_b", "1.weight", "1.bias"):
            torch.testing.assert_close(module.get_parameter(name).grad, expected[name], msg=name)


def test_torch_func_transforms_are_refused():
    layer = make("linear")
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func transforms"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(M, K))


@pytest.mark.parametrize("keep_ratio", [0.0, -1, 1.5, float("nan"), None])
def test_ratios_out_of_range_are_refused(keep_ratio):
    linear = nn.Linear(3, 2)
    for refused in (
        lambda: WTACRSLinear(3, 2, keep_ratio=keep_ratio),
        lambda: WTACRSLinear.from_linear(linear, keep_ratio),
        lambda: RowSampling(keep_ratio),
        lambda: setattr(RowSampling(0.5), "keep_ratio", keep_ratio),
    ):
        with pytest.raises(ValueError, match=r"RowSampling: keep_ratio must be a number in \(0, 1\], got"):
            refused()


def test_only_plain_layers_are_taken_over_and_given_back():
    linear = nn.Linear(3, 2)
    linear.note = "kept"
    layer = WTACRSLinear.from_linear(linear, 0.5)
    assert layer.weight is linear.weight and layer.note == "kept" and not hasattr(linear, "row_sampling")
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.weight is linear.weight and back.note == "kept"
    assert not hasattr(back, "row_sampling") and "keep_ratio=0.5" in repr(layer)
    with pytest.raises(TypeError, match=r"WTACRSLinear cannot replace this layer: it is a nn\.Conv1d"):
        WTACRSLinear.from_linear(nn.Conv1d(3, 2, 1))
    lora = make("lora")
    assert "keep_ratio=0.3" in repr(lora)
    assert not hasattr(lora.to_linear(merge=False), "row_sampling")
