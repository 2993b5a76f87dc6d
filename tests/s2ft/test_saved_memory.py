"""What a layer keeps for backward, counted in bytes, and that none of it is a view of x where some columns suffice."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels import ops

from ..support.places import places_and_dtypes
from ..support.s2ft_layer import KINDS, LAYER_OPERATORS, random_s2ft_layer

KIND = pytest.mark.parametrize("kind", KINDS)
EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
# The reference is a formula: it casts its operands.
KERNELS = pytest.mark.parametrize(
    ("place", "dtype"),
    [case for case in places_and_dtypes(*LAYER_OPERATORS) if case.values[0].backend != "reference"],
)


def saved_by(call, named):
    """(names of the arguments saved, bytes of the storages of everything else) by the graph of one call."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = call()
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in saved}
    names = {owners[key] for key in storages if key in owners}
    assert y.requires_grad
    return names, sum(storage.nbytes() for key, storage in storages.items() if key not in owners)


@EVERYWHERE
@pytest.mark.parametrize("leading", [(3, 11), (40,)], ids=str)
@pytest.mark.parametrize("count", [1, 5, 24])
@pytest.mark.parametrize("trained", [("trainable",), ("x", "bias", "trainable")], ids="+".join)
@pytest.mark.parametrize("kind", ["input", "input of Conv1D"])
def test_input_channels_keep_their_columns_and_not_x(place, dtype, leading, count, trained, kind):
    layer = random_s2ft_layer(kind, leading, count=count, dtype=dtype, device=place.device).training(*trained)
    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(layer, {**layer.tensors(), "indices": layer.indices})
    assert names == {"weight", "trainable", "indices"}
    assert others == layer.x.numel() // 24 * count * layer.x.element_size()


@EVERYWHERE
def test_a_given_slice_is_kept_by_reference(place, dtype):
    layer = random_s2ft_layer("input", (3, 11), dtype=dtype, device=place.device).training("x", "trainable")
    x_slice = layer.x.detach()[..., layer.indices]
    with peft_kernels.use_backend(place.backend):
        named = {**layer.tensors(), "indices": layer.indices, "x_slice": x_slice}
        names, others = saved_by(lambda: layer(x_slice=x_slice), named)
    assert names == {"weight", "trainable", "indices", "x_slice"} and others == 0


@EVERYWHERE
@pytest.mark.parametrize("kind", ["output", "output of Conv1D"])
def test_output_channels_keep_x(place, dtype, kind):
    layer = random_s2ft_layer(kind, (3, 11), dtype=dtype, device=place.device).training("x", "trainable")
    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(layer, {**layer.tensors(), "indices": layer.indices})
    assert names == {"x", "weight", "trainable", "indices"} and others == 0


@EVERYWHERE
@KIND
@pytest.mark.parametrize("trained", [("x",), ("bias",), ("x", "bias")], ids="+".join)
def test_nothing_of_x_is_kept_while_trainable_and_weight_are_frozen(place, dtype, kind, trained):
    layer = random_s2ft_layer(kind, (3, 11), dtype=dtype, device=place.device).training(*trained)
    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(layer, {**layer.tensors(), "indices": layer.indices})
    assert "x" not in names and others == 0


@pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS, "swiglu", "swiglu_backward"))
def test_a_block_keeps_gate_up_and_the_columns(place, dtype):
    layer = random_s2ft_layer("input", (3, 11), dtype=dtype, device=place.device).training("trainable")
    gate, up = (torch.randn(3, 11, 24).to(dtype).to(place.device).requires_grad_() for _ in range(2))
    named = {"gate": gate, "up": up, **layer.tensors(), "indices": layer.indices}

    def block():
        h, x_slice = ops.swiglu_s2ft(gate, up, layer.indices)
        return ops.s2ft_linear(h, layer.weight, None, layer.trainable, layer.indices, "input", x_slice=x_slice)

    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(block, named)
    assert names == {"gate", "up", "weight", "trainable", "indices"}
    assert others == 3 * 11 * 5 * gate.element_size()


class Largest(TorchDispatchMode):
    """The largest tensor that an operator has returned in memory of its own."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, tensor.numel())
        return result


@KERNELS
@KIND
def test_nothing_of_the_weight_s_size_is_made(place, dtype, kind):
    layer = random_s2ft_layer(kind, (4,), 300, 200, 3, dtype, device=place.device).training("x", "trainable")
    with peft_kernels.use_backend(place.backend), Largest() as largest:
        layer().sum().backward()
    assert 3 * 200 <= largest.numel <= 4 * 300, "x is the largest tensor there is, beside a weight of 60000"
