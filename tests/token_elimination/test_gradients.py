"""The public operators as autograd sees them: gradcheck, and against index_select, f, index_add in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.places import places, places_and_dtypes
from ..support.token_elimination import OPERATORS, PATTERNS, is_kept, rows_of

BLOCK = (*OPERATORS, "swiglu", "swiglu_backward")
EACH_PLACE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*BLOCK))
EACH_DOUBLE_PLACE = pytest.mark.parametrize("place", places(*BLOCK, dtypes=(torch.float64,)))
EACH_PATTERN = pytest.mark.parametrize("pattern", PATTERNS)
HIDDEN, WIDE = 6, 10


def leaf(*shape, dtype=torch.float64, device="cpu", seed=0):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(dtype).to(device).requires_grad_()


def angles(positions, width, dtype=torch.float64, device="cpu"):
    angle = torch.arange(positions * width).view(positions, width).double()
    return angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device)


COS, SIN = angles(8, 4)
FUNCTIONS = {
    "gather_rows": lambda x, values, norm, heads, rows: ops.gather_rows(x, rows),
    "scatter_add_rows": lambda x, values, norm, heads, rows: ops.scatter_add_rows(x, values, rows),
    "in_place": lambda x, values, norm, heads, rows: ops.scatter_add_rows(x * 1, values, rows, in_place=True),
    "split_rms_norm": lambda x, values, norm, heads, rows: ops.split_rms_norm(x, rows, norm, 1e-5, 1.0)[:2],
    "all_rows": lambda x, values, norm, heads, rows: ops.split_rms_norm(x, None, norm, 1e-5)[:2],
    "rope_rows": lambda x, values, norm, heads, rows: ops.rope_rows(heads, COS.to(x.device), SIN.to(x.device), rows),
}


@EACH_DOUBLE_PLACE
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("pattern", ["none", "all", "sequences", "only_holes"])
def test_gradcheck(place, name, pattern):
    rows = rows_of(pattern, 8).to(place.device)
    shapes = ((2, 4, 6), (rows.shape[0], 6), (6,), (rows.shape[0], 2, 6))
    inputs = [leaf(*shape, seed=seed, device=place.device) for seed, shape in enumerate(shapes)]

    def call(*tensors):
        with peft_kernels.use_backend(place.backend):
            return FUNCTIONS[name](*tensors, rows)

    assert torch.autograd.gradcheck(call, inputs)


@EACH_DOUBLE_PLACE
@pytest.mark.parametrize("pattern", ["none", "one", "all", "sequences", "only_holes"])
@pytest.mark.parametrize(
    ("residual", "gathered"), [("x", False), ("other", False), (None, False), ("other", True), (None, True)]
)
def test_gradcheck_of_the_layer(place, pattern, residual, gathered):
    rows, device = rows_of(pattern, 8).to(place.device), place.device
    x = leaf(rows.shape[0], 6, device=device) if gathered else leaf(2, 4, 6, device=device)
    others = [leaf(6, 6, seed=1, device=device), leaf(6, seed=2, device=device), leaf(2, 4, 6, seed=3, device=device)]

    def call(x, weight, bias, other):
        onto = {"x": x, "other": other, None: None}[residual]
        with peft_kernels.use_backend(place.backend):
            return ops.gather_linear_scatter(x, weight, bias, rows, onto, gathered=gathered)

    assert torch.autograd.gradcheck(call, (x, *others))


@pytest.mark.parametrize("rows", [None, rows_of("some", 6)], ids=["all", "some"])
@pytest.mark.parametrize("transformed", [False, True])
def test_what_a_norm_is_formed_again_from_carries_no_gradient(rows, transformed):
    def kept_sum(x):
        _, h, (kept, rstd) = ops.split_rms_norm(x, rows, torch.ones(4), 1e-5)
        assert not transformed or kept.shape == h.shape
        return h.sum() * 0 + kept.sum() + rstd.sum(), (kept, rstd)

    x = torch.randn(6, 4)
    if transformed:
        gradient, _ = torch.func.grad(kept_sum, has_aux=True)(x)
    else:
        total, (kept, rstd) = kept_sum(x.requires_grad_())
        assert not kept.requires_grad and not rstd.requires_grad
        assert torch.equal(kept, x if rows is None else x[rows.long()])
        (gradient,) = torch.autograd.grad(total, x)
    assert not gradient.any()


def test_transforms_return_what_an_addition_in_place_would_make_and_change_nothing():
    rows, values = torch.tensor([1, 4], dtype=torch.int32), torch.randn(2, 4)

    def loss(x):
        residual = x * 1
        out = ops.scatter_add_rows(residual, values, rows, in_place=True)
        return out.square().sum(), (out, residual)

    x = torch.randn(6, 4)
    gradient, (out, residual) = torch.func.grad(loss, has_aux=True)(x)
    expected = x.index_add(0, rows.long(), values)
    assert torch.equal(out, expected) and torch.equal(residual, x)
    torch.testing.assert_close(gradient, 2 * expected)


@EACH_DOUBLE_PLACE
@pytest.mark.parametrize("pattern", ["none", "all", "sequences", "only_holes"])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_gradcheck_of_the_layer_in_place(place, pattern, gathered, part):
    rows, device = rows_of(pattern, 8).to(place.device), place.device
    x = leaf(rows.shape[0], 6, device=device) if gathered else leaf(2, 4, 6, device=device)
    others = [leaf(5, 6, seed=1, device=device), leaf(5, seed=2, device=device), leaf(4, 4, 5, seed=3, device=device)]

    def call(x, weight, bias, other):
        whole = other * 1 if part else other[1:3] * 1
        residual = whole[1:3] if part else whole
        with peft_kernels.use_backend(place.backend):
            y = ops.gather_linear_scatter(x, weight, bias, rows, residual, gathered=gathered, in_place=True)
        return y, whole

    assert torch.autograd.gradcheck(call, (x, *others))


@EACH_PLACE
@pytest.mark.parametrize("gathered", [False, True])
def test_in_place_the_layer_changes_kept_rows_alone(place, dtype, gathered):
    rows, device = rows_of("sequences", 12).to(place.device), place.device
    x, weight = (leaf(*shape, dtype=dtype, device=device).detach() for shape in ((3, 4, 5), (7, 5)))
    if gathered:
        x = ops.gather_rows(x, rows)
    residual = leaf(3, 4, 7, dtype=dtype, device=device, seed=1).detach()
    residual.view(12, 7)[~is_kept(rows, 12).to(device), :2] = torch.tensor([float("nan"), -0.0]).to(residual)
    before, memory, version = residual.clone(), residual.data_ptr(), residual._version
    with peft_kernels.use_backend(place.backend):
        expected = ops.gather_linear_scatter(x, weight, None, rows, before, gathered=gathered)
        found = ops.gather_linear_scatter(x, weight, None, rows, residual, gathered=gathered, in_place=True)
    assert found is residual and found.data_ptr() == memory and found._version > version
    assert_same_bits(found, expected)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


CHANGES = {
    "scatter_add_rows": lambda residual, rows: ops.scatter_add_rows(residual, ones(2, 6), rows, in_place=True),
    "gather_linear_scatter": lambda residual, rows: ops.gather_linear_scatter(
        ones(4, 3), ones(6, 3), None, rows, residual, in_place=True
    ),
}
EACH_CHANGE = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
ENDS = torch.tensor([0, 3], dtype=torch.int32)


@EACH_CHANGE
def test_autograd_notices_that_somebody_else_keeps_what_was_changed(change):
    residual = leaf(4, 6) * 1
    squares = residual.square()  # keeps it for backward
    assert change(residual, ENDS) is residual
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


@EACH_CHANGE
def test_a_leaf_is_changed_only_where_no_gradients_are_recorded(change):
    residual = leaf(4, 6)
    before = residual.detach().clone()
    for given in (residual, residual.view(2, 12).view(4, 6)):
        with pytest.raises(ValueError, match=r"residual must be neither a leaf that requires grad nor a view of one"):
            change(given, ENDS)
        assert torch.equal(residual, before)
    with torch.no_grad():
        change(residual, ENDS)
    assert torch.equal(residual != before, is_kept(ENDS, 4)[:, None].expand(4, 6))


@EACH_CHANGE
def test_a_part_of_a_tensor_is_changed_in_place(change):
    source = leaf(6, 6)
    whole = source * 1
    change(whole[1:5], ENDS)
    assert whole._version == 1 and torch.equal(whole != source, is_kept(ENDS + 1, 6)[:, None].expand(6, 6))
    whole.square().sum().backward()
    torch.testing.assert_close(source.grad, 2 * whole.detach())


@EACH_DOUBLE_PLACE
def test_swiglu_can_be_differentiated_twice(place):
    def call(gate, up):
        with peft_kernels.use_backend(place.backend):
            return ops.swiglu(gate, up)

    inputs = leaf(2, 3, 5, device=place.device), leaf(2, 3, 5, seed=1, device=place.device)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    torch.testing.assert_close(call(*inputs), silu(inputs[0]) * inputs[1])


def block(x, rows, norm, gate, up, down):
    """An MLP block of the kept rows by these operators."""
    residual, h, _ = ops.split_rms_norm(x, rows, norm, 1e-5)
    inner = ops.swiglu(linear(h, gate), linear(h, up))
    return ops.gather_linear_scatter(inner, down, None, rows, residual, gathered=True)


def plain_block(x, rows, norm, gate, up, down):
    """The same by index_select, f, index_add, holes left out."""
    kept = rows[rows >= 0].long()
    flat = x.reshape(-1, x.shape[-1])
    h = rms_norm(flat.index_select(0, kept), norm.shape, norm, 1e-5)
    inner = silu(linear(h, gate)) * linear(h, up)
    return flat.index_add(0, kept, linear(inner, down)).view(x.shape)


def block_tensors(dtype, device):
    shapes = ((2, 16, HIDDEN), (HIDDEN,), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    return [leaf(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]


def with_gradients(function, x, rows, *weights):
    y = function(x, rows, *weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)], dy


@EACH_PLACE
@EACH_PATTERN
def test_a_block_equals_autograd_of_select_compute_and_add(place, dtype, pattern):
    rows = rows_of(pattern, 32).to(place.device)
    tensors = block_tensors(dtype, place.device)
    with peft_kernels.use_backend(place.backend):
        actual, dy = with_gradients(block, tensors[0], rows, *tensors[1:])
    own, _ = with_gradients(plain_block, tensors[0], rows, *tensors[1:])
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact, _ = with_gradients(plain_block, wide[0], rows, *wide[1:])
    for name, *found in zip(("y", "x", "norm", "gate", "up", "down"), actual, own, exact, strict=True):
        assert_accurate(*found, name)
    dropped = ~is_kept(rows, 32)
    for result, expected in ((actual[0], tensors[0]), (actual[1], dy)):
        assert_same_bits(result.cpu().view(32, -1)[dropped], expected.detach().cpu().view(32, -1)[dropped])


@EACH_PLACE
@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("residual",), ("x", "weight", "residual")])
@pytest.mark.parametrize("gathered", [False, True])
def test_only_what_asks_gets_a_gradient(place, dtype, trained, gathered):
    rows = rows_of("sequences", 12).to(place.device)
    shapes = {"x": (rows.shape[0] if gathered else 12, 5), "weight": (7, 5), "bias": (7,), "residual": (12, 7)}
    tensors = {
        name: leaf(*shape, dtype=dtype, device=place.device, seed=seed).detach().requires_grad_(name in trained)
        for seed, (name, shape) in enumerate(shapes.items())
    }

    def call(x, weight, bias, residual):
        with peft_kernels.use_backend(place.backend):
            return ops.gather_linear_scatter(x, weight, bias, rows, residual, gathered=gathered)

    def plain(x, weight, bias, residual):
        kept = (rows >= 0).nonzero()[:, 0]
        chosen = x[kept] if gathered else x[rows[kept].long()]
        return residual.index_add(0, rows[kept].long(), linear(chosen, weight, bias))

    wanted = [tensors[name] for name in trained]
    found, own = (torch.autograd.grad(f(**tensors).square().sum(), wanted) for f in (call, plain))
    wide = {name: tensor.detach().double().requires_grad_(name in trained) for name, tensor in tensors.items()}
    exact = torch.autograd.grad(plain(**wide).square().sum(), [wide[name] for name in trained])
    for name, *gradients in zip(trained, found, own, exact, strict=True):
        assert_accurate(*gradients, name)


@EACH_DOUBLE_PLACE
def test_functional_gradients(place):
    rows = rows_of("sequences", 32).to(place.device)
    x, *weights = (tensor.detach() for tensor in block_tensors(torch.float64, place.device))

    def loss(function):
        return lambda x, *weights: function(x, rows, *weights).square().sum()

    arguments = tuple(range(1 + len(weights)))
    with peft_kernels.use_backend(place.backend):
        found = torch.func.grad(loss(block), argnums=arguments)(x, *weights)
    expected = torch.func.grad(loss(plain_block), argnums=arguments)(x, *weights)
    for actual, own in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, own)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("onto", ["x", "residual", "in place"])
def test_autocast_multiplies_in_its_dtype_and_adds_in_the_residual_s(residual_dtype, onto):
    rows = rows_of("sequences", 12)
    x, weight = leaf(12, 6, dtype=torch.float32), leaf(6, 6, dtype=torch.float32, seed=1)
    residual = x if onto == "x" else leaf(12, 6, dtype=residual_dtype, seed=2)
    given = residual * 1 if onto == "in place" else residual
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.gather_linear_scatter(x, weight, None, rows, given, in_place=onto == "in place")
    assert y.dtype == residual.dtype and (y is given) == (onto == "in place")
    kept = rows[rows >= 0].long()
    product = linear(x.bfloat16()[kept], weight.bfloat16())
    assert_same_bits(y, residual.index_add(0, kept, product.to(residual.dtype)))
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call()
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}


@EACH_PLACE
@pytest.mark.parametrize("trained", [False, True])
def test_the_layer_keeps_rows_of_x_only_while_weight_trains(place, dtype, trained):
    rows = rows_of("sequences", 12).to(place.device)
    x, residual = leaf(12, 5, dtype=dtype, device=place.device), leaf(12, 7, dtype=dtype, device=place.device)
    weight = leaf(7, 5, dtype=dtype, device=place.device).detach().requires_grad_(trained)
    with peft_kernels.use_backend(place.backend):
        saved = saved_by(lambda: ops.gather_linear_scatter(x, weight, None, rows, residual))
    for tensor in (rows, weight):
        assert saved.pop(tensor.untyped_storage().data_ptr())
    assert sum(saved.values()) == (rows.shape[0] * 5 * x.element_size() if trained else 0)
