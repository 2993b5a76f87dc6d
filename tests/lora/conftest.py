"""Small models and batches for the tests of modules, injection, adapter files and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels

VOCABULARY = 64


@pytest.fixture(scope="session")
def llama() -> Callable[..., Any]:
    """Makes a random Llama of 2 layers, hidden 32, grouped queries; one seed, one model. Keywords go to its config."""
    transformers = pytest.importorskip("transformers")

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **{"tie_word_embeddings": False, "use_cache": False, **options},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(config).to(dtype)

    return make


@pytest.fixture
def tokens() -> Tensor:
    """Token ids `[2, 12]`."""
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def randomize() -> Callable[[nn.Module], None]:
    """Draws every adapter factor of a model (ours or PEFT's) anew, none zero, the same in any two equal models."""

    def draw(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
                    parameter.copy_(values)

    return draw


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every call of the fused operator since the test began."""
    calls: list[Any] = []
    original = peft_kernels.ops.lora_linear
    monkeypatch.setattr(peft_kernels.ops, "lora_linear", lambda *args: calls.append(args) or original(*args))
    return calls
