"""Layers over shapes, counts, strides and dtypes that hypothesis chooses, on values whose sums are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peft_kernels
from peft_kernels import ops
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.nn.positions import random_positions

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.places import ALL_DTYPES, places_and_dtypes
from ..support.sparse_layer import LAYER_OPERATORS, TENSORS, SparseLayer, dense_results, results, weight_with

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
SIZE = st.integers(1, 60)


@st.composite
def layers(draw, dtype, device):
    """A layer of small integers, each tensor in strides of its own."""
    leading = draw(st.lists(st.integers(0, 5), max_size=3)) if draw(st.booleans()) else [draw(st.integers(0, 40))]
    in_features, out_features = draw(SIZE), draw(SIZE)
    numel = in_features * out_features
    count = draw(st.one_of(st.integers(0, min(numel, 5)), st.integers(0, numel)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values_dtype = dtype if dtype == torch.float64 else draw(st.sampled_from((torch.float32, dtype)))

    def integers(*shape, to=dtype):
        values = torch.randint(-2, 3, shape, generator=generator).to(to).to(device)
        return laid_out(values, draw(st.sampled_from(LAYOUTS)))

    return SparseLayer(
        x=integers(*leading, in_features),
        weight=integers(out_features, in_features),
        bias=integers(out_features) if draw(st.booleans()) else None,
        values=integers(count, to=values_dtype),
        indices=random_positions(numel, count, generator).to(draw(st.sampled_from((torch.int32, torch.int64)))),
    )


@EVERYWHERE
@given(data=st.data())
def test_forward_and_gradients_are_exact(place, dtype, data):
    layer = data.draw(layers(dtype, place.device)).training(*TENSORS)
    grad_out = torch.ones(*layer.x.shape[:-1], layer.weight.shape[0], dtype=dtype, device=place.device)
    grad_out = grad_out if data.draw(st.booleans()) else grad_out[..., :1].expand_as(grad_out)
    with peft_kernels.use_backend(place.backend):
        found = results(layer, grad_out)
    # Sums of integers up to 4 * 60 or, over rows, 2 * 125 and 1 * 125: float16 holds them, bfloat16 rounds once.
    for name, expected in dense_results(layer, grad_out, torch.float64).items():
        if name in found:
            torch.testing.assert_close(
                found[name].double(), expected, rtol=2**-8 if found[name].dtype == torch.bfloat16 else 0, atol=0
            )


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@given(data=st.data())
def test_any_history_of_a_layer_ends_at_the_original_bits(dtype, data):
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    count = data.draw(st.integers(0, rows * columns))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    linear = nn.Linear(columns, rows, dtype=dtype)
    original, x = linear.weight.detach().clone(), torch.randn(2, columns).to(dtype)
    layer = SparseDeltaLinear.from_linear(linear, num_deltas=count, generator=generator)
    optimizer = torch.optim.SGD([layer.values], lr=0.1)

    def step():
        optimizer.zero_grad()
        layer(x).float().sum().backward()
        optimizer.step()

    def toggle_merge():
        layer.unmerge() if layer.merged else layer.merge()

    def move():
        if not layer.merged:
            layer.set_delta(random_positions(rows * columns, count, generator), torch.randn(count))

    def scale():
        with torch.no_grad():
            layer.values.mul_(3)

    def reload():
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})

    actions = {
        "forward": lambda: layer(x),
        "step": lambda: None if layer.merged else step(),
        "merge or unmerge": toggle_merge,
        "restore": lambda: None if layer.merged else layer.restore_weight(),
        "move": move,
        "scale": lambda: None if layer.merged else scale(),
        "reload": reload,
    }
    for name in data.draw(st.lists(st.sampled_from(sorted(actions)), max_size=12)):
        actions[name]()
        y = layer(x)
        assert_same_bits(layer.weight.detach(), weight_with(layer, original), name)
        assert_same_bits(y.detach(), nn.functional.linear(x, layer.weight, layer.bias).detach(), name)
    layer.restore_weight()
    assert_same_bits(layer.weight.detach(), original)


@given(numel=st.integers(0, 3000), share=st.floats(0, 1), seed=st.integers(0, 100))
def test_drawn_positions_are_positions(numel, share, seed):
    count = int(share * numel)
    chosen = random_positions(numel, count, torch.Generator().manual_seed(seed))
    assert chosen.shape == (count,)
    ops.check_indices(chosen, numel)


@given(numbers=st.lists(st.integers(-3, 12), max_size=8), dtype=st.sampled_from((torch.int32, torch.int64)))
def test_positions_are_accepted_when_they_are_sorted_unique_and_in_range(numbers, dtype):
    good = numbers == sorted(set(numbers)) and all(0 <= number < 10 for number in numbers)
    indices = torch.tensor(numbers, dtype=dtype)
    if good:
        ops.check_indices(indices, 10)
    else:
        with pytest.raises(ValueError, match=r"^indices must be (sorted|unique|in|at most)"):
            ops.check_indices(indices, 10)
