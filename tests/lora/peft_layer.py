"""The smallest PEFT model there is, for tests of single layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def small(**options: Any) -> Any:
    """A PEFT model of one adapted `nn.Linear(6, 4)`, its factors drawn at random; keywords go to its LoraConfig."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **options}
    return peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(**config))


def layer_of(model: Any) -> Any:
    """The adapted layer of a model with one."""
    return model.base_model.model[0]
