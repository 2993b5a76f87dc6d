"""`lora_linear` over shapes, strides, dtypes and ranks that hypothesis chooses, on values whose sums are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_kernels

from ..support.layouts import LAYOUTS, laid_out
from ..support.lora import TENSORS, Layer, formula, gradients, mask_of_seeded_call, seeded_call
from ..support.operators import DROPPING, OPERATORS, random_call
from ..support.operators import formula as operator_formula
from ..support.places import ALL_DTYPES, LAYER_OPERATORS, places, places_and_dtypes

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
SIZE = st.integers(1, 70)
DROPOUT = st.sampled_from([0.0, 0.5, 0.75])
FACTOR_DTYPES = {torch.float64: (torch.float64,)}


@st.composite
def layers(draw, dtype, device):
    """A layer of small integers, each tensor in strides of its own."""
    leading = draw(st.lists(st.integers(0, 5), max_size=3)) if draw(st.booleans()) else [draw(st.integers(0, 40))]
    in_features, out_features, rank = draw(SIZE), draw(SIZE), draw(st.integers(1, 65))
    factors = draw(st.sampled_from(FACTOR_DTYPES.get(dtype, (dtype, torch.float32))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def integers(*shape, to=dtype):
        values = torch.randint(-2, 3, shape, generator=generator).to(to).to(device)
        return laid_out(values, draw(st.sampled_from(LAYOUTS)))

    return Layer(
        x=integers(*leading, in_features),
        weight=integers(out_features, in_features),
        bias=integers(out_features) if draw(st.booleans()) else None,
        lora_a=integers(rank, in_features, to=factors),
        lora_b=integers(out_features, rank, to=factors),
        scaling=draw(st.sampled_from([0.5, 1.0, 2.0])),
    )


def assert_within_rounding(actual, exact, magnitude, what):
    """Exact in float32 and float64; half precision may round four times, each time at most all of its terms."""
    assert actual.shape == exact.shape, what
    if actual.dtype in (torch.float32, torch.float64):
        assert torch.equal(actual.double(), exact), what
        return
    allowed = 4 * torch.finfo(actual.dtype).eps * magnitude
    assert bool(((actual.double() - exact).abs() <= allowed).all()), what


@EVERYWHERE
@given(data=st.data())
def test_forward_and_gradients_are_exact(place, dtype, data):
    layer = data.draw(layers(dtype, place.device)).training(*TENSORS)
    dropout_p = data.draw(DROPOUT)
    keep = mask_of_seeded_call(layer, dropout_p) if dropout_p else None
    with peft_kernels.use_backend(place.backend):
        y = seeded_call(layer, dropout_p)
    grad_out = torch.ones_like(y) if data.draw(st.booleans()) else torch.ones_like(y[..., :1]).expand_as(y)
    results = {"y": y.detach(), **gradients(y, grad_out, layer)}

    exact, magnitude = ({}, {})
    for found, change in ((exact, torch.Tensor.double), (magnitude, lambda t: t.double().abs())):
        twin = layer.map(lambda t, change=change: change(t.detach())).training(*TENSORS)
        found["y"] = formula(twin, keep, dropout_p)
        found.update(gradients(found["y"], grad_out.double(), twin))
    for name, actual in results.items():
        assert_within_rounding(actual, exact[name].detach(), magnitude[name].detach(), name)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("place", places(*OPERATORS))
@given(data=st.data())
def test_operators_are_exact(operator, place, data):
    dtype = data.draw(st.sampled_from([dtype for dtype in ALL_DTYPES if _served(place, operator, dtype)]))
    call = random_call(
        operator,
        rows=data.draw(st.integers(0, 80)),
        columns=data.draw(SIZE),
        out_columns=data.draw(SIZE),
        rank=data.draw(st.integers(1, 65)),
        dtype=dtype,
        dropout_p=data.draw(DROPOUT) if operator in DROPPING else 0.0,
        bias=data.draw(st.booleans()),
        transposed=data.draw(st.booleans()),
        needs=data.draw(st.tuples(*[st.booleans()] * 3)),
        integers=True,
        device=place.device,
        seed=data.draw(st.integers(0, 2**32)),
    )
    strided = call.map(lambda tensor: laid_out(tensor, data.draw(st.sampled_from(LAYOUTS))))
    if operator == "lora_accumulate_":  # written in place: rows may lie apart, their elements not
        layout = data.draw(st.sampled_from(["contiguous", "offset"]))
        strided = strided.map(lambda tensor: tensor, out=laid_out(call.arguments["out"], layout))
    magnitude = operator_formula(call.map(torch.abs), torch.float64)
    for index, (actual, exact) in enumerate(
        zip(strided.run(place.kernel(operator, dtype)), operator_formula(call, torch.float64), strict=True)
    ):
        assert_within_rounding(actual, exact, magnitude[index], f"result {index}")


def _served(place, operator, dtype):
    return peft_kernels.backends.obstacle(operator, place.backend, place.device, dtype) is None


@EVERYWHERE
@given(rows=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 1000))
def test_scaling_of_zero_leaves_the_frozen_layer(place, dtype, rows, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, lora_a, lora_b = (
        torch.randn(shape, generator=generator).to(dtype).to(place.device)
        for shape in ((rows, 33), (17, 33), (rank, 33), (17, rank))
    )
    with peft_kernels.use_backend(place.backend):
        y = peft_kernels.ops.lora_linear(x, weight, None, lora_a, lora_b, 0.0)
    torch.testing.assert_close(y, x @ weight.t())


@EVERYWHERE
@given(leading=st.lists(st.integers(1, 4), min_size=2, max_size=4), dropout_p=DROPOUT)
def test_leading_dimensions_are_rows(place, dtype, leading, dropout_p):
    generator = torch.Generator().manual_seed(7)
    x, weight, lora_a, lora_b = (
        torch.randint(-2, 3, shape, generator=generator).to(dtype).to(place.device)
        for shape in ((*leading, 20), (9, 20), (3, 20), (9, 3))
    )
    with peft_kernels.use_backend(place.backend):
        many = seeded_call(Layer(x, weight, None, lora_a, lora_b), dropout_p)
        flat = seeded_call(Layer(x.reshape(-1, 20), weight, None, lora_a, lora_b), dropout_p)
    assert torch.equal(many.reshape(-1, 9), flat)
