"""`lora_merged_weight`: the weight a merged layer multiplies by, formed exactly and rounded once, in a new tensor."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import ops

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS
from ..support.lora import random_layer
from ..support.places import dtype_name, places_and_dtypes

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes("lora_accumulate_"))


def merged(layer, place):
    with peft_kernels.use_backend(place.backend):
        return ops.lora_merged_weight(layer.weight, layer.lora_a, layer.lora_b, layer.scaling)


@EVERYWHERE
@pytest.mark.parametrize("rank", [1, 8, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_rounded_once(place, dtype, rank, layout):
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    layer = random_layer((1,), 70, 45, rank, dtype, factors, device=place.device).with_layout(layout)
    result = merged(layer, place)
    low_rank = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    exact = layer.weight.double() + low_rank
    # Half a unit in the last place of the element, beside what the sum over the rank may lose: float32's rounding, or
    # the 16 bits that a product of factors split into two bfloat16 keeps.
    unit = torch.finfo(dtype).eps
    lost = 8 * torch.finfo(factors).eps if dtype.itemsize > 2 else 2.0**-16
    magnitude = layer.weight.double().abs() + layer.scaling * layer.lora_b.double().abs() @ layer.lora_a.double().abs()
    allowed = unit / 2 * exact.abs() + lost * magnitude
    assert result.dtype == dtype
    assert bool(((result.double() - exact).abs() <= allowed).all())


@EVERYWHERE
def test_arguments_keep_their_bits(place, dtype):
    layer = random_layer((1,), dtype=dtype, device=place.device)
    before = layer.map(torch.clone)
    result = merged(layer, place)
    for name, tensor in layer.tensors().items():
        assert_same_bits(tensor, getattr(before, name), name)
    assert result.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr()
    assert not result.requires_grad


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
def test_wrong_shapes_are_refused(name):
    layer = random_layer((1,))
    arguments = {"weight": layer.weight, "lora_a": layer.lora_a, "lora_b": layer.lora_b}
    arguments[name] = arguments[name][0]
    with pytest.raises(ValueError, match=rf"{name} must be .* got float32"):
        ops.lora_merged_weight(*arguments.values(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_merged_layer_computes_what_the_layer_computes(dtype):
    layer = random_layer((9,), 40, 30, 4, dtype)
    weight = ops.lora_merged_weight(layer.weight, layer.lora_a, layer.lora_b, layer.scaling)
    y = torch.nn.functional.linear(layer.x, weight, layer.bias)
    torch.testing.assert_close(y, layer(), rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
