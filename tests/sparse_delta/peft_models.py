"""Small models with PEFT's SHiRA and Super-Tuning adapters, and their accelerated twins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels as pk

peft = pytest.importorskip("peft")
sparse = pytest.importorskip("peft_kernels.integrations.peft_sparse")
KINDS = ["shira", "super", "supra"]
if sparse.SupertuningLinear is None:
    KINDS = ["shira"]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
VOCABULARY = 64


def config_of(kind: str, **options: Any) -> Any:
    """A configuration whose values are drawn at random; keywords go to PEFT's class."""
    options = {"target_modules": TARGETS, "init_weights": False, **options}
    if kind == "shira":
        return peft.ShiraConfig(**{"r": 2, **options})
    if kind == "supra":
        options = {"r": 3, "lora_alpha": 5, **options}
    return peft.SupertuningConfig(**{"sparsity": 0.9, **options})


def shrink(model: nn.Module) -> None:
    """Makes the values of every adapter small enough for a model to still work with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_" in name or "supertuning_values" in name:
                parameter.mul_(0.1)


def small(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT model of one adapted `nn.Linear(11, 7)`."""
    torch.manual_seed(0)
    options = {"target_modules": ["0"], **({"sparsity": 0.6} if kind != "shira" else {"r": 1}), **options}
    return peft.get_peft_model(nn.Sequential(nn.Linear(11, 7, dtype=dtype)), config_of(kind, **options))


def layer_of(model: Any) -> Any:
    """The adapted layer of a model with one."""
    return model.base_model.model[0]


def values_of(layer: Any, name: str = "default") -> Any:
    """A layer's trained values."""
    return (layer.shira_weight if hasattr(layer, "shira_weight") else layer.supertuning_values)[name]


def weight_of(layer: Any) -> Tensor:
    """The base weight as it lies in memory now, with or without the values in it."""
    return layer._modules["base_layer"].weight


def holds_delta(layer: Any) -> bool:
    """Whether the layer has written its values into the base weight."""
    return layer.__dict__[sparse.STATE].weight.holds_delta


def twins(model: Any) -> tuple[Any, Any, Any]:
    """The model, an accelerated copy, and the report."""
    twin = copy.deepcopy(model)
    return model, twin, pk.accelerate(twin)


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A random Llama of 2 layers, hidden 32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, "use_cache": False, "attention_bias": True, **options},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama with an adapter on five of seven linear layers."""
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(dtype), config_of(kind, **options))
    shrink(model)
    return model


def tokens() -> Tensor:
    """Token ids `[2, 12]`."""
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))


def assert_same_state(model: nn.Module, twin: nn.Module) -> None:
    """The state_dicts hold the same names and bits."""
    theirs, ours = model.state_dict(), twin.state_dict()
    assert list(theirs) == list(ours)
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
