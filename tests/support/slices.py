"""Adapters of slices to test with: trained models, updates made by hand, and what they do to a dense weight."""

from __future__ import annotations

import copy

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_kernels as pk
from peft_kernels import S2FTConfig, slices
from peft_kernels.channels import Slice
from peft_kernels.slices import SliceUpdate

RATIOS = {"q": 0.5, "v": 0.5, "o": 0.5, "up": 0.2, "down": 0.2}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def trained(model, seed=3, scale=0.2, **options):
    """The model with slices that have been trained, in place."""
    pk.inject(model, S2FTConfig(**{"ratios": RATIOS, "budget": "per_layer", **options}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def adapter_of(make, seed=3, **options):
    return slices.take(trained(make(), seed, **options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def small():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def update(indices, dim="input", shape=(9, 6), value=None, dtype=torch.float32):
    indices = torch.tensor(indices, dtype=torch.int64)
    sizes = (shape[0], indices.numel()) if dim == "input" else (indices.numel(), shape[1])
    generator = torch.Generator().manual_seed(indices.numel() + int(indices.sum()))
    change = torch.randn(sizes, generator=generator) if value is None else torch.full(sizes, value)
    return SliceUpdate(Slice(indices, dim), change.to(dtype), shape)


def dense(part):
    """The change of the whole weight."""
    return torch.zeros(part.shape, dtype=part.change.dtype).index_copy_(part.axis, part.slice.indices, part.change)


def with_change(model, adapter):
    """A copy of the model whose weights have the adapter's change added, densely."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for path, part in adapter.items():
            weight = changed.get_submodule(path).weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + dense(part).to(wide))
    return changed


BAD_FOR_SMALL = {
    "missing": ({"7": update([1])}, "7 must be a plain nn.Linear or Conv1D, it is missing; eject adapters first"),
    "no linear": ({"1": update([1])}, "1 must be a plain nn.Linear or Conv1D, it is a Tanh"),
    "another size": ({"0": update([1], shape=(8, 6))}, r"0 must have a weight \[8, 6\], as the adapter, got \[9, 6\]"),
}
"""Updates that a `small` model cannot hold, and why."""


def edited(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
