"""What a layer keeps for backward: x, the weight, the factors, `[M, r]` and 16 bytes; no mask, nothing of y's size."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels.reference.lora import accumulation_dtype

from ..support.lora import TENSORS, random_layer
from ..support.places import LAYER_OPERATORS, places_and_dtypes

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
ROWS, RANK = 3 * 11, 4


def new_tensors_saved_by(layer, place, dropout_p):
    """(arguments saved, other tensors saved) by the graph of one call."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with peft_kernels.use_backend(place.backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(dropout_p)
    assert y.requires_grad
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in layer.tensors().items()}
    arguments = {owners[key] for tensor in saved if (key := tensor.untyped_storage().data_ptr()) in owners}
    return arguments, [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in owners]


def layer_at(place, dtype, *trained, layout="contiguous"):
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    layer = random_layer((3, 11), 24, 20, RANK, dtype, factors, device=place.device)
    return layer.with_layout(layout).training(*trained)


@EVERYWHERE
@pytest.mark.parametrize("trained", [("lora_a", "lora_b"), ("x", "lora_a", "lora_b"), TENSORS], ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_beside_its_arguments_a_layer_keeps_hidden_and_16_bytes(place, dtype, trained, dropout_p, layout):
    arguments, others = new_tensors_saved_by(layer_at(place, dtype, *trained, layout=layout), place, dropout_p)
    assert arguments == {"x", "weight", "lora_a", "lora_b"}
    rng_states = [tensor for tensor in others if tensor.dtype == torch.int64]
    hidden = [tensor for tensor in others if tensor.dtype != torch.int64]
    assert [tensor.numel() * tensor.element_size() for tensor in rng_states] == ([16] if dropout_p else [])
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in hidden] == [((ROWS, RANK), accumulation_dtype(dtype))]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in others)


@EVERYWHERE
@pytest.mark.parametrize("trained", [("lora_b",), ("x",), ("x", "lora_b"), ("bias",), ("x", "bias")], ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_x_is_not_kept_while_lora_a_and_weight_are_frozen(place, dtype, trained, dropout_p):
    arguments, others = new_tensors_saved_by(layer_at(place, dtype, *trained), place, dropout_p)
    assert "x" not in arguments
    assert sum(tensor.numel() for tensor in others) <= ROWS * RANK + 2


@EVERYWHERE
def test_bytes_kept_do_not_grow_with_dropout(place, dtype):
    def kept(dropout_p):
        layer = layer_at(place, dtype, "x", "lora_a", "lora_b")
        return sum(t.numel() * t.element_size() for t in new_tensors_saved_by(layer, place, dropout_p)[1])

    assert kept(0.3) == kept(0.0) + 16
