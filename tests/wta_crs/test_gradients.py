"""Layers with a sampled gradient against the plain formula with the same sample: output, dx and the rest are exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.layouts import LAYOUTS
from ..support.lora import TENSORS, gradients, mask_of_seeded_call, random_layer
from ..support.places import LAYER_OPERATORS, dtype_name, places_and_dtypes
from .definition import sampled_grad

KEEP = 0.3
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
NEEDED = (*LAYER_OPERATORS, "gather_rows", "lora_shrink", "lora_factor_grad", "dropout_mask")
EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*NEEDED))


def sample_of(layer, keep_ratio=KEEP):
    torch.manual_seed(1)
    return ops.draw_rows(layer.x, keep_ratio)


def sampled(layer, sample, dropout_p=0.0, seed=3):
    torch.manual_seed(seed)
    return ops.sampled_lora_linear(
        layer.x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.scaling, sample, dropout_p, True
    )


def rows_of(tensor):
    return tensor.reshape(-1, tensor.shape[-1])


def plain_grads(layer, grad_out, sample, keep=None, dropout_p=0.0):
    """The sampled gradients of lora_a and weight as PyTorch computes them, in grad_out's dtype."""
    dtype = grad_out.dtype
    x, dy = rows_of(layer.x.detach()).to(dtype), rows_of(grad_out)
    dropped = x if keep is None else x * keep / (1 - dropout_p)
    grad_hidden = layer.scaling * (dy @ layer.lora_b.detach().to(dtype))
    return {
        "lora_a": sampled_grad(grad_hidden, dropped, sample.rows, sample.scales),
        "weight": sampled_grad(dy, x, sample.rows, sample.scales),
    }


def check_sampled(layer, dropout_p=0.0, trained=TENSORS):
    layer = layer.training(*trained)
    sample = sample_of(layer)
    keep = mask_of_seeded_call(layer, dropout_p) if dropout_p else None
    y = sampled(layer, sample, dropout_p)
    torch.manual_seed(3)
    dense = layer(dropout_p)
    assert_same_bits(y.detach(), dense.detach())
    grad_out = torch.randn_like(y)
    found, exact = gradients(y, grad_out, layer), gradients(dense, grad_out, layer)
    assert found.keys() == exact.keys()
    own, double = (plain_grads(layer, grad, sample, keep, dropout_p) for grad in (grad_out, grad_out.double()))
    for name, grad in found.items():
        if name in ("lora_a", "weight"):
            assert grad.dtype == getattr(layer, name).dtype
            assert_accurate(grad, own[name], double[name], name)
        else:
            assert_same_bits(grad, exact[name], name)


@EVERYWHERE
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("leading", [(37,), (3, 11)], ids=str)
def test_lora_on_one_backend(place, dtype, dropout_p, leading):
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    with peft_kernels.use_backend(place.backend):
        check_sampled(random_layer(leading, 24, 20, 4, dtype, factors, device=place.device), dropout_p)


@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_in_any_strides(dtype, dropout_p, layout):
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    check_sampled(random_layer((3, 11), 24, 20, 4, dtype, factors).with_layout(layout), dropout_p)


@pytest.mark.parametrize(
    "trained",
    [("lora_a",), ("lora_b",), ("x",), ("x", "lora_a", "lora_b"), ("weight",), ("bias", "lora_a")],
    ids="+".join,
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_lora_with_parts_frozen(trained, dropout_p):
    check_sampled(random_layer((31,), 24, 20, 4), dropout_p, trained)
    check_sampled(random_layer((31,), 24, 20, 1, bias=False), dropout_p, [name for name in trained if name != "bias"])


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(37,), (3, 11), (2, 3, 6)], ids=str)
def test_linear_in_any_strides(dtype, layout, leading):
    trained = ("x", "weight", "bias")
    layer = random_layer(leading, 24, 20, 4, dtype).with_layout(layout).training(*trained)
    sample = sample_of(layer)
    y = ops.sampled_linear(layer.x, layer.weight, layer.bias, sample)
    dense = F.linear(layer.x, layer.weight, layer.bias)
    assert_same_bits(y.detach(), dense.detach())
    grad_out = torch.randn_like(y)
    found, exact = gradients(y, grad_out, layer), gradients(dense, grad_out, layer)
    own, double = (plain_grads(layer, grad, sample) for grad in (grad_out, grad_out.double()))
    assert_accurate(found["weight"], own["weight"], double["weight"], "weight")
    raised = layer.map(torch.Tensor.double).training(*trained)
    true = gradients(F.linear(raised.x, raised.weight, raised.bias), grad_out.double(), raised)
    for name in ("x", "bias"):
        assert_accurate(found[name], exact[name], true[name], name)


@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
def test_linear_with_parts_frozen(trained):
    layer = random_layer((31,), 24, 20).training(*trained)
    sample = sample_of(layer)
    y = ops.sampled_linear(layer.x, layer.weight, layer.bias, sample)
    grad_out = torch.randn_like(y)
    exact = gradients(F.linear(layer.x, layer.weight, layer.bias), grad_out, layer)
    if "weight" in trained:
        exact["weight"] = plain_grads(layer, grad_out, sample)["weight"]
    found = gradients(y, grad_out, layer)
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, exact[name])


@pytest.mark.parametrize("leading", [(0,), (2, 0), ()], ids=str)
def test_no_rows_and_a_single_one_are_exact(leading):
    layer = random_layer(leading, 6, 5, 2).training(*TENSORS)
    assert sample_of(layer, 0.1) is None
    y, dense = sampled(layer, None), layer()
    grad_out = torch.randn_like(y)
    exact = gradients(dense, grad_out, layer)
    for name, grad in gradients(y, grad_out, layer).items():
        assert_same_bits(grad, exact[name], name)


def test_the_mean_over_all_random_numbers_is_the_exact_gradient():
    # Each number decides one draw, so that means over a grid of each add up to the expectation.
    layer = random_layer((9,), 5, 4, 2, torch.float64).training(*TENSORS)
    grad_out = torch.randn(9, 4, dtype=torch.float64)
    cells, means, largest = 200, {"lora_a": 0.0, "weight": 0.0}, {"lora_a": 0.0, "weight": 0.0}
    for cell in range(cells):
        uniforms = torch.full((3,), (cell + 0.5) / cells, dtype=torch.float64)
        found = gradients(sampled(layer, ops.draw_rows(layer.x, KEEP, uniforms=uniforms)), grad_out, layer)
        means = {name: mean + found[name] / cells for name, mean in means.items()}
        largest = {name: max(value, float(found[name].abs().max())) for name, value in largest.items()}
    exact = gradients(layer(), grad_out, layer)
    for name, mean in means.items():
        # Only a cell with a border between two rows in it errs: 9 rows, and 2 borders between 3 draws.
        torch.testing.assert_close(mean, exact[name], rtol=0, atol=11 * 2 * largest[name] / cells)


def test_gradient_norms_of_an_earlier_step_change_what_is_drawn_and_not_what_is_expected():
    x = torch.ones(50, 4)
    grad_norms = torch.cat((torch.full((5,), 100.0), torch.ones(45))).view(5, 10)
    uniforms = torch.rand(15, dtype=torch.float64)
    sample = ops.draw_rows(x, KEEP, grad_norms=grad_norms, uniforms=uniforms)
    assert sample.rows[:5].tolist() == list(range(5)) and sample.scales[:5].eq(1).all()
    torch.testing.assert_close(sample.scales[5:], torch.full((10,), 4.5))
    assert torch.equal(sample.rows, ops.sampled_rows(grad_norms.flatten(), 15, uniforms)[0])
    assert torch.equal(sample.kept, x[sample.rows.long()])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_equals_the_explicit_cast(half):
    layer = random_layer((3, 11), 24, 20, 4).training(*TENSORS)
    cast = layer.map(lambda t: t if t is layer.lora_a or t is layer.lora_b else t.detach().to(half)).training(*TENSORS)
    with torch.autocast("cpu", half):
        sample = sample_of(layer)
        assert sample.kept.dtype == half
        y, z = sampled(layer, sample), ops.sampled_linear(layer.x, layer.weight, layer.bias, sample)
    assert y.dtype == z.dtype == half
    grad_out = torch.randn_like(y)
    for actual, explicit in (
        (y, sampled(cast, sample)),
        (z, ops.sampled_linear(cast.x, cast.weight, cast.bias, sample)),
    ):
        assert_same_bits(actual.detach(), explicit.detach())
        names = TENSORS if actual is y else ("x", "weight", "bias")
        here = torch.autograd.grad(actual, [getattr(layer, name) for name in names], grad_out)
        there = torch.autograd.grad(explicit, [getattr(cast, name) for name in names], grad_out)
        for name, left, right in zip(names, here, there, strict=True):
            assert left.dtype == torch.float32
            assert_same_bits(left, right.float(), name)


def test_what_cannot_be_differentiated_says_so():
    layer = random_layer((11,), 6, 5, 2).training(*TENSORS)
    sample = sample_of(layer)
    (dx,) = torch.autograd.grad(sampled(layer, sample).square().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    for call in (
        lambda weight: ops.sampled_linear(layer.x, weight, None, sample).sum(),
        lambda weight: ops.draw_rows(weight, 0.5).kept.sum(),
    ):
        with pytest.raises(RuntimeError, match=r"no rule for torch\.func transforms"):
            torch.func.grad(call)(layer.weight.detach())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"total": 12}, ValueError, "sample must be one of 11 rows of 6 numbers to match x, got one of 12 rows of 6"),
        ({"kept": torch.rand(4, 5)}, ValueError, "sample must be one of 11 rows of 6 numbers .* 11 rows of 5"),
        (
            {"kept": torch.rand(4, 6).double()},
            TypeError,
            r"sample\.kept must have x's dtype, torch\.float32, got float64",
        ),
        ({"rows": torch.zeros(4).long()}, ValueError, r"sample\.rows must be \[4\] in torch\.int32 on cpu, got int64"),
        (
            {"scales": torch.ones(3)},
            ValueError,
            r"sample\.scales must be \[4\] in torch\.float32 on cpu, got float32 \[3\]",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(change, error, message):
    layer = random_layer((11,), 6, 5, 2)
    sample = sample_of(layer)._replace(**change)
    for operator, call in (
        ("sampled_lora_linear", lambda: sampled(layer, sample)),
        ("sampled_linear", lambda: ops.sampled_linear(layer.x, layer.weight, layer.bias, sample)),
    ):
        with pytest.raises(error, match=f"{operator}: {message}"):
            call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.rand(5, 7)}, ValueError, r"sampled_linear: weight must be \[N, 6\] to match x, got float32"),
        ({"weight": torch.rand(5, 6).double()}, TypeError, "sampled_linear: weight must have x's dtype"),
        ({"bias": torch.rand(6)}, ValueError, r"sampled_linear: bias must be \[5\] to match weight, got float32 \[6\]"),
        ({"x": torch.ones(11, 6).int()}, TypeError, r"sampled_linear: x must be float32, .*, got int32 \[11, 6\]"),
    ],
)
def test_bad_input_of_a_linear_layer_is_refused(change, error, message):
    layer = random_layer((11,), 6, 5)
    arguments = {"x": layer.x, "weight": layer.weight, "bias": layer.bias, "sample": sample_of(layer), **change}
    with pytest.raises(error, match=message):
        ops.sampled_linear(**arguments)


def test_gradient_norms_that_do_not_fit_are_refused():
    for wrong in (torch.rand(3), torch.ones(11).int(), torch.rand(11, device="meta")):
        with pytest.raises(ValueError, match="draw_rows: grad_norms must be 11 floating numbers on cpu"):
            ops.draw_rows(torch.rand(11, 2), 0.5, grad_norms=wrong)
