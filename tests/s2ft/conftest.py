"""The small model and its tokens that the tests of whole models share with LoRA's, and slices that were trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_kernels.nn.s2ft_layer import S2FTLayer

from ..lora.conftest import llama, tokens  # noqa: F401


@pytest.fixture(scope="session")
def disturb() -> Callable[[nn.Module], None]:
    """Adds random numbers to every trained slice, the same in any two equal models."""

    def add(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, S2FTLayer):
                    layer.trainable.add_(torch.randn(layer.trainable.shape, generator=generator) * 0.3)

    return add
