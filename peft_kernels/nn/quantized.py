"""Weights that are stored quantised, made dense for the length of one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_KINDS = {"Linear4bit": "bitsandbytes 4-bit", "Linear8bitLt": "bitsandbytes 8-bit"}


def quantized_kind(module: nn.Module) -> str | None:
    """What a layer with a quantised weight is, in words; None for every other module.

    Told by the names of its classes, so that bitsandbytes is imported only where a layer of it exists.
    """
    for kind in type(module).__mro__:
        if kind.__module__.startswith("bitsandbytes.") and kind.__name__ in _KINDS:
            return _KINDS[kind.__name__]
    return None


def dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` of a bitsandbytes layer, a new dense tensor of `dtype`.

    Raises:
        ValueError: the weight has not been quantised yet, which bitsandbytes does when it is moved to its device.
    """
    import bitsandbytes.functional as bnb

    weight = module.weight
    if quantized_kind(module) == _KINDS["Linear4bit"]:
        if getattr(weight, "quant_state", None) is None:
            raise ValueError("the 4-bit weight is not quantised yet; move the layer to its device first")
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            # An evaluation on the CPU has packed it for a kernel of its own. Brought back as bitsandbytes does before
            # it saves; the next evaluation packs it again.
            unpack = bnb._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)
        return bnb.dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[no-any-return]
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    if scales is None or weight.dtype != torch.int8:
        raise ValueError("the 8-bit weight is not quantised yet; move the layer to its device first")
    return (weight.data.float() * (scales.float() / 127.0)[:, None]).to(dtype)
