"""The small model and its tokens that the tests of whole models share with LoRA's, and adapters that are not zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_kernels.nn import SparseDeltaLinear

from ..lora.conftest import llama, tokens  # noqa: F401


@pytest.fixture(scope="session")
def disturb() -> Callable[[nn.Module], None]:
    """Draws the values of every layer anew, the same in any two equal models."""

    def draw(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, SparseDeltaLinear):
                    layer.values.copy_(torch.randn(layer.num_deltas, generator=generator) * 0.3)

    return draw


@pytest.fixture
def one_thread():
    """Small layers spend their time on waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
