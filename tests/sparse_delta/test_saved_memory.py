"""What a layer keeps for backward and what it allocates: x and its arguments; nothing of the weight's size, ever."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels.optim import SparseAdamW

from ..support.places import places_and_dtypes
from ..support.sparse_layer import LAYER_OPERATORS, random_module, random_sparse_layer

EVERYWHERE = pytest.mark.parametrize(("place", "dtype"), places_and_dtypes(*LAYER_OPERATORS))
# The reference is a formula: it makes the dense gradient to gather from.
KERNELS = pytest.mark.parametrize(
    ("place", "dtype"),
    [case for case in places_and_dtypes(*LAYER_OPERATORS) if case.values[0].backend != "reference"],
)


def saved_by(call, named):
    """(names of the arguments saved, other tensors saved) by the graph of one call."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call()
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}
    names = {owners[key] for tensor in saved if (key := tensor.untyped_storage().data_ptr()) in owners}
    return names, [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in owners]


@EVERYWHERE
@pytest.mark.parametrize("trained", [("values",), ("x", "values"), ("weight",), ("x", "bias", "values")], ids="+".join)
def test_a_layer_keeps_its_arguments_and_nothing_else(place, dtype, trained):
    layer = random_sparse_layer((3, 11), dtype=dtype, device=place.device).training(*trained)
    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(layer, {**layer.tensors(), "indices": layer.indices})
    assert names == {"x", "weight", "values", "indices"} and not others


@EVERYWHERE
@pytest.mark.parametrize("trained", [("x",), ("bias",), ("x", "bias")], ids="+".join)
def test_x_is_not_kept_while_values_and_weight_are_frozen(place, dtype, trained):
    layer = random_sparse_layer((3, 11), dtype=dtype, device=place.device).training(*trained)
    with peft_kernels.use_backend(place.backend):
        names, others = saved_by(layer, {**layer.tensors(), "indices": layer.indices})
    assert "x" not in names and not others


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


def peak_of_allocations(call):
    """The most bytes that were allocated at once, beyond what was there, by torch's own count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@KERNELS
def test_no_step_makes_anything_of_the_weight_s_size(place, dtype):
    layer, _ = random_module(300, 200, 60, dtype)
    layer.to(place.device)
    optimizer = SparseAdamW([layer.values])
    x = torch.randn(4, 300).to(dtype).to(place.device).requires_grad_()

    def train():
        for _ in range(2):
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        layer.merge()
        layer(x)
        layer.unmerge()
        layer.set_delta(layer.indices.clone())
        layer(x)

    with Largest() as largest:
        train()
    assert 4 * 300 <= largest.numel < 2 * 4 * 300, "x is the largest tensor there is, beside a weight of 60000"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_kernel_allocates_the_weight_s_size(dtype):
    layer, _ = random_module(2048, 1024, 400, dtype)
    x = torch.randn(2, 2048).to(dtype)
    optimizer = SparseAdamW([layer.values])

    def step():
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    weight = layer.weight.numel() * layer.weight.element_size()
    assert peak_of_allocations(step) < weight // 10
    dense = torch.nn.Linear(2048, 1024, dtype=dtype)
    assert peak_of_allocations(lambda: dense(x).sum().backward()) >= weight, "the probe sees a dense gradient"
