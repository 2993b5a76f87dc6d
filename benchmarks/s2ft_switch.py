"""One adapter for another in the weights of a whole model: slices written in place, or LoRA merged.

    ours                            `slices.Switch.to`, from one adapter to the other and back
    ours, LoRA unmerge and merge    `pk.unmerge` and `pk.merge` of one LoRA adapter: less than a switch, as loading the
                                    other one is left out
    PEFT, LoRA unmerge and merge    `unmerge_adapter`, and `merge_adapter` of the other of two adapters

The model is the layers that the adapters are about. LoRA's factors are float32, the default of both. On a GPU many
small kernels are queued, so that a switch may take the host's time: what whoever waits for it waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.channels import Slice
from peft_kernels.nn.s2ft_layer import random_channels
from peft_kernels.slices import SliceAdapter, SliceUpdate, Switch

from .operations import OURS, Run, Work, attempt, require_equal, turn
from .suites import S2FTCase, Suite

OURS_LORA = "ours, LoRA unmerge and merge"
PEFT_LORA = "PEFT, LoRA unmerge and merge"
BASES = (PEFT_LORA, OURS_LORA)
_NAME = "down_proj"
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def model_of(case: S2FTCase, device: torch.device) -> nn.ModuleList:
    """`case.layers` linear layers of random weights, the same ones at each call."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = nn.ModuleList()
    for _ in range(case.layers):
        linear = nn.Linear(case.K, case.N, bias=False, device="meta")
        weight = torch.randn(case.N, case.K, generator=generator, device=device) * case.K**-0.5
        linear.weight = nn.Parameter(weight.to(case.dtype), requires_grad=False)
        blocks.append(nn.ModuleDict({_NAME: linear}))
    return blocks


def adapter_of(case: S2FTCase, seed: int) -> SliceAdapter:
    """Changes of `case.channels` random channels in every layer, float32, on the CPU as after loading."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for layer in range(case.layers):
        total, shape = (case.K, (case.N, case.channels)) if case.dim == "input" else (case.N, (case.channels, case.K))
        part = Slice(random_channels(total, case.channels, generator), case.dim)
        change = torch.randn(shape, generator=generator) * 0.1 * case.K**-0.5
        updates[f"{layer}.{_NAME}"] = SliceUpdate(part, change, (case.N, case.K))
    return SliceAdapter(updates)


def _weight(model: nn.Module) -> Tensor:
    """A copy of the first layer's weight, as the model computes with it."""
    layer: Any = model.get_submodule(f"0.{_NAME}")
    if isinstance(layer, pk.nn.LoRALinear):
        return (layer.weight if layer.merged_weight is None else layer.merged_weight).detach().clone()
    return getattr(layer, "base_layer", layer).weight.detach().clone()  # type: ignore[no-any-return]


def _ours(case: S2FTCase, device: torch.device) -> Run:
    model = model_of(case, device)
    switch = Switch(model)
    adapters = [adapter_of(case, seed) for seed in (1, 2)]
    before = _weight(model)
    for adapter in adapters:
        switch.to(adapter)
    update = adapter[f"0.{_NAME}"]
    indices, change = update.slice.indices.to(device), update.change.to(device)
    expected = before.float().index_add(update.axis, indices, change)
    require_equal("Switch.to", _weight(model), expected, _TOLERANCE[case.dtype])
    switch.to(None)
    if not torch.equal(_weight(model), before):
        raise RuntimeError("Switch.to(None) did not restore the weight, so it gets no time")
    return OURS, turn(adapters, switch.to)


def _ours_lora(case: S2FTCase, device: torch.device) -> Work:
    assert case.r is not None
    model = model_of(case, device)
    before = _weight(model)
    pk.inject(model, pk.LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=[_NAME], init_lora_weights=False))
    layer: Any = model.get_submodule(f"0.{_NAME}")
    pk.merge(model)
    expected = before.float() + layer.scaling * layer.lora_b.detach() @ layer.lora_a.detach()
    require_equal(OURS_LORA, _weight(model), expected, _TOLERANCE[case.dtype])

    def run(_: int) -> None:
        pk.unmerge(model)
        pk.merge(model)

    return run


def _peft_lora(case: S2FTCase, device: torch.device) -> Work:
    import peft

    assert case.r is not None
    model: Any = model_of(case, device)
    before = _weight(model)
    config = peft.LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=[_NAME], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    adapted.merge_adapter(adapter_names=["first"])
    layer: Any = model.get_submodule(f"0.{_NAME}")
    expected = before.float() + layer.get_delta_weight("first").detach().float()
    require_equal(PEFT_LORA, _weight(model), expected, _TOLERANCE[case.dtype])

    def to(name: str) -> None:
        adapted.unmerge_adapter()
        adapted.merge_adapter(adapter_names=[name])

    return turn(["first", "second"], to)


def arms(case: S2FTCase, suite: Suite) -> list[Run]:
    """Ours, and LoRA merged by PEFT and by us; raises when ours does not compute what it should."""
    device = torch.device(suite.device_type)
    return [
        _ours(case, device),
        attempt(PEFT_LORA, lambda: _peft_lora(case, device)),
        attempt(OURS_LORA, lambda: _ours_lora(case, device)),
    ]
