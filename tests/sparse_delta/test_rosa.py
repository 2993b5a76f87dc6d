"""`nn.RoSALinear`: low-rank update and sparse delta in one layer, against the dense formula, and its states."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels as pk
from peft_kernels.nn.merged import layer_of as keeper_of

K, N, NNZ, R = 13, 9, 31, 3


def rosa(dtype=torch.float32, **options):
    """A layer whose adapters are drawn at random, and a copy of the weight under them."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    original = linear.weight.detach().clone()
    options = {"r": R, "lora_alpha": 6, "num_deltas": NNZ, "init_lora_weights": False, **options}
    layer = pk.nn.RoSALinear.from_linear(linear, **options)
    with torch.no_grad():
        layer.values.normal_()
    return layer, original


def dense(x, layer, original):
    """The definition: one dense weight, all of it differentiable."""
    change = torch.zeros(original.numel(), dtype=layer.values.dtype).index_put((layer.indices.long(),), layer.values)
    weight = original + change.view(original.shape) + layer.scaling * layer.lora_b @ layer.lora_a
    return F.linear(x, weight.to(x.dtype), layer.bias)


@pytest.mark.parametrize("rows", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_are_the_dense_formula_s(rows, dtype, tolerance):
    layer, original = rosa(dtype)
    assert sorted(name for name, p in layer.named_parameters() if p.requires_grad) == ["lora_a", "lora_b", "values"]
    x = torch.randn(*rows, K, dtype=dtype, requires_grad=True)
    inputs = (x, layer.values, layer.lora_a, layer.lora_b)
    y, expected = layer(x), dense(x, layer, original)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(each, inputs, dy) for each in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=10 * tolerance)


def test_double_backward_is_the_dense_formula_s():
    layer, original = rosa(torch.float64)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    inputs, found = (x, layer.values, layer.lora_a, layer.lora_b), []
    for y in (layer(x), dense(x, layer, original)):
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), inputs))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_bfloat16_with_float32_adapters():
    layer, original = rosa(torch.bfloat16)
    assert {layer.values.dtype, layer.lora_a.dtype, layer.lora_b.dtype} == {torch.float32}
    x = torch.randn(64, K).bfloat16()
    exact = dense(x.double(), copy.deepcopy(layer).double(), original.double())
    assert (layer(x).double() - exact).norm() < 0.01 * exact.norm()
    half = rosa(torch.bfloat16, adapter_dtype=torch.bfloat16)[0]
    half(x).float().square().sum().backward()
    assert {half.values.grad.dtype, half.lora_a.grad.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, pk.optim.SparseAdamW])
def test_training_equals_that_of_the_dense_formula(kind):
    layer, original = rosa(init_lora_weights=True)
    twin = copy.deepcopy(layer)
    x, target = torch.randn(40, K), torch.randn(40, N)
    curves = []
    for each, optimizer_kind, function in ((layer, kind, lambda x, each: each(x)), (twin, torch.optim.AdamW, None)):
        optimizer = optimizer_kind([p for p in each.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        curve = []
        for _ in range(25):
            y = function(x, each) if function else dense(x, each, original)
            loss = F.mse_loss(y, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.9 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)
    if kind is pk.optim.SparseAdamW:
        assert keeper_of(layer.values) is layer
    plain = layer.to_linear(merge=False)
    assert torch.equal(plain.weight, original), "training has left a trace"


@pytest.mark.parametrize("kind", ["RoSALinear", "SparseDeltaLinear"])
def test_an_optimizer_that_torch_knows_nothing_of(kind):
    layer = getattr(pk.nn, kind).from_linear(nn.Linear(K, N), num_deltas=NNZ)
    weight = layer.weight.detach().clone()
    x = torch.randn(4, K)
    for step in range(1, 4):
        layer(x).sum().backward()
        layer.values.data.fill_(step)
        layer.zero_grad()
        with torch.no_grad():
            expected = F.linear(x, weight.flatten().index_add(0, layer.indices, layer.values).view(N, K), layer.bias)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", ["RoSALinear", "SparseDeltaLinear"])
def test_backward_passes_may_overlap(kind):
    layer = getattr(pk.nn, kind).from_linear(nn.Linear(K, N), num_deltas=NNZ)
    x = torch.randn(4, K)
    first, second = layer(x).sum(), layer(x).square().sum()
    first.backward()
    third = layer(x).sum()
    second.backward()
    third.backward()
    assert layer.values.grad.abs().max() > 0


def test_dropout_touches_the_factors_only():
    layer, _ = rosa(lora_dropout=0.5)
    x = torch.randn(300, K)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.lora_b.zero_()
    assert torch.equal(layer(x), layer(x))
    layer.eval()
    layer_without = rosa(lora_dropout=0.0)[0]
    with torch.no_grad():
        layer_without.lora_b.zero_()
    torch.testing.assert_close(layer(x), layer_without(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging(dtype):
    layer, original = rosa(dtype)
    x = torch.randn(20, K).to(dtype)
    expected = layer(x)
    layer.merge()
    assert layer.merged and not layer(x).requires_grad
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    with pytest.warns(UserWarning, match="RoSALinear is merged already"):
        layer.merge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, original)
    with pytest.warns(UserWarning, match="RoSALinear is not merged"):
        layer.unmerge()
    assert torch.equal(layer(x), expected)


def test_merged_layers_follow_dtype_copies_and_new_state():
    layer, original = rosa()
    x = torch.randn(20, K)
    layer.merge()
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.merged and torch.equal(copied(x), expected)
        copied.unmerge()
        assert torch.equal(copied.weight, original)
    torch.testing.assert_close(layer.double()(x.double()).float(), expected, rtol=1e-5, atol=1e-5)
    layer.float()
    other, _ = rosa()
    with torch.no_grad():
        other.values.mul_(2.0)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged_before", [False, True])
def test_becoming_a_plain_layer(merged_before):
    layer, original = rosa()
    x = torch.randn(20, K)
    expected = layer(x)
    layer.marker = "kept"
    if merged_before:
        layer.merge()
    plain = layer.to_linear(merge=True)
    assert type(plain) is nn.Linear and plain.marker == "kept" and set(plain.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
    weight = layer.weight
    plain = layer.to_linear(merge=False)
    assert plain.weight is weight and torch.equal(plain.weight, original)
    assert vars(plain).keys() == {*vars(nn.Linear(1, 1)), "marker"}


def test_state_dicts_describe_the_layer():
    layer, _ = rosa()
    assert set(layer.state_dict()) == {"weight", "bias", "values", "indices", "original", "lora_a", "lora_b"}
    x = torch.randn(20, K)
    expected = layer(x)
    other = pk.nn.RoSALinear(K, N, num_deltas=NNZ, r=R, lora_alpha=6)
    assert not torch.equal(other.indices, layer.indices)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    reference = pk.nn.SparseDeltaLinear(K, N, num_deltas=NNZ)
    missing = reference.load_state_dict(layer.state_dict(), strict=False)
    assert missing.unexpected_keys == ["lora_a", "lora_b"] and not missing.missing_keys


def test_seeds_and_initial_values():
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        linear = nn.Linear(K, N)
        x = torch.randn(4, K)
        expected = linear(x)
        generator = torch.Generator().manual_seed(5)
        made.append(pk.nn.RoSALinear.from_linear(linear, density=0.1, r=2, generator=generator))
        assert torch.equal(made[-1](x), expected), "it starts as the linear layer"
    assert torch.equal(made[0].indices, made[1].indices) and torch.equal(made[0].lora_a, made[1].lora_a)
    assert made[0].num_deltas == 12 and made[0].options.r == 2
    bound = K**-0.5
    assert made[0].lora_a.abs().max() <= bound and not made[0].lora_b.any() and not made[0].values.any()
    layer = pk.nn.RoSALinear(K, N, density=0.1, selection="magnitude", device="meta")
    layer.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="RoSALinear was made on the meta device"):
        layer(torch.randn(2, K))
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(2, K))).all() and layer.lora_a.abs().max() <= bound
    assert "num_deltas=12" in repr(layer) and "r=8, lora_alpha=8, lora_dropout=0.0" in repr(layer)


def test_the_gradient_observer_sees_dy_and_x():
    layer, _ = rosa()
    x, seen = torch.randn(2, 3, K), []
    layer.gradient_observer = lambda dy, rows: seen.append((dy, rows))
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(seen[0][0], dy.view(6, N)) and torch.equal(seen[0][1], x.view(6, K))


def test_a_weight_that_was_gathered_anew_is_written_before_backward():
    layer, original = rosa()
    expected = copy.deepcopy(layer)
    x = torch.randn(4, K, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    expected(other).square().sum().backward()
    layer.weight = nn.Parameter(original.clone(), requires_grad=False)  # as FSDP puts a gathered one in its place
    y = layer(x)
    layer.weight.data.copy_(original)  # gathered again: autograd is not told
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(layer.values.grad, expected.values.grad)


def test_it_compiles_and_checkpoints():
    layer, _ = rosa()
    x = torch.randn(4, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.zero_grad()
    layer(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    for reentrant in (True, False):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(layer, inputs, use_reentrant=reentrant).square().sum().backward()
        for name, grad in plain.items():
            torch.testing.assert_close(layer.get_parameter(name).grad, grad, msg=name)


def test_nothing_of_the_weight_s_size_is_saved():
    layer, _ = rosa()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, K))
    assert not [t for t in saved if t.numel() >= N * K and t.data_ptr() != layer.weight.data_ptr()]


def test_an_input_on_offer_is_not_kept():
    layer, _ = rosa()
    h = torch.randn(4, K, requires_grad=True)
    source = h.detach().clone()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t),
        pk.ops.recompute.offered(h, (source,), torch.clone),
    ):
        y = layer(h)
    assert source.data_ptr() in saved and h.data_ptr() not in saved
    wanted = (h, layer.values, layer.lora_a, layer.lora_b)
    found, expected = (torch.autograd.grad(each.square().sum(), wanted) for each in (y, layer(h)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an integer >= 1, got 0"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout must be a probability"),
        ({"num_deltas": -1}, ValueError, "num_deltas must be an integer in"),
        ({"num_deltas": 3, "density": 0.1}, ValueError, "give either density or num_deltas"),
        ({"adapter_dtype": torch.float64}, ValueError, "adapter_dtype must be float32"),
        ({"selection": "best"}, ValueError, "selection must be one of random, magnitude"),
        ({"num_deltas": None, "indices": torch.tensor([3, 1])}, ValueError, "indices must be sorted"),
        ({"num_deltas": None, "indices": torch.tensor([1.0])}, TypeError, "indices must be int32 or int64"),
    ],
)
def test_bad_options_leave_the_layer_alone(options, error, message):
    linear = nn.Linear(K, N)
    before = dict(vars(linear)), linear.weight.detach().clone(), linear.weight.requires_grad
    with pytest.raises(error, match=message):
        pk.nn.RoSALinear.from_linear(linear, **{"num_deltas": 3, **options})
    assert dict(vars(linear)) == before[0] and torch.equal(linear.weight, before[1])
    assert linear.weight.requires_grad == before[2]
    with pytest.raises(TypeError, match=r"RoSALinear cannot replace this layer: it is a nn\.Bilinear"):
        pk.nn.RoSALinear.from_linear(nn.Bilinear(2, 2, 2), density=0.1)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_empty_and_tiny_layers(shape):
    layer = pk.nn.RoSALinear(*shape, density=1.0, r=1)
    x = torch.randn(3, shape[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (3, shape[1]) and layer.values.grad.shape == layer.values.shape


def test_an_adapter_file_that_would_lose_the_factors_is_refused(tmp_path):
    model = nn.Sequential(pk.nn.RoSALinear(8, 6, density=0.1, r=2))
    with pytest.raises(ValueError, match="0 is a RoSALinear, for which there is no adapter file"):
        pk.save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_them_is_merged_and_ejected():
    model = nn.Sequential(pk.nn.RoSALinear(8, 6, density=0.1, r=2))
    x = torch.randn(3, 8)
    expected = model(x)
    pk.merge(model)
    torch.testing.assert_close(model(x), expected)
    pk.unmerge(model)
    pk.eject(model, merge=False)
    assert type(model[0]) is nn.Linear


def test_its_output_may_be_changed_in_place():
    torch.manual_seed(0)
    layer = pk.nn.RoSALinear(8, 6, density=0.2, r=2, init_lora_weights=False)
    x = torch.randn(3, 8, requires_grad=True)
    plain = torch.autograd.grad(torch.relu(layer(x)).sum(), (x, layer.values, layer.lora_a))
    changed = torch.autograd.grad(nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum(), (x, layer.values, layer.lora_a))
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_leaves_an_ejected_layer_alone():
    layer = pk.nn.RoSALinear.from_linear(nn.Linear(7, 5), num_deltas=4, r=2)
    original = layer.weight.detach().clone()
    optimizer = pk.optim.SparseAdamW([layer.values], lr=0.1)
    layer(torch.randn(3, 7)).sum().backward()
    linear = layer.to_linear(merge=False)
    optimizer.step()
    assert torch.equal(linear.weight, original)
