"""Tiny random models of the architectures that heads and channels are found in, and what there is to find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 64


@dataclass(frozen=True)
class Architecture:
    """A configuration of transformers' and the structure of its blocks.

    Attributes:
        config: name of its class.
        options: what to call it with.
        heads: query heads, key-value heads and channels of a head.
        channels: of the MLP.
        layers: paths of the first block's layers below `prefix`: role by role, q, k, v, o, up, gate (or None), down.
        prefix: path of the first decoder layer.
    """

    config: str
    options: dict[str, Any]
    heads: tuple[int, int, int]
    channels: int
    layers: tuple[str | None, ...]
    prefix: str = "model.layers.0"


_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_GATED = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")


def _options(heads: int, key_value_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 39, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        **sizes,
        **tokens,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": False,
        "use_cache": False,
        **more,
    }


ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", _options(4, 4), (4, 4, 6), 39, _SPLIT + _GATED),
    "llama-grouped": Architecture(
        "LlamaConfig", _options(6, 3, attention_bias=True, mlp_bias=True), (6, 3, 4), 39, _SPLIT + _GATED
    ),
    "mistral": Architecture("MistralConfig", _options(6, 2), (6, 2, 4), 39, _SPLIT + _GATED),
    "qwen2": Architecture("Qwen2Config", _options(4, 2), (4, 2, 6), 39, _SPLIT + _GATED),
    "qwen3": Architecture("Qwen3Config", _options(4, 2, head_dim=8), (4, 2, 8), 39, _SPLIT + _GATED),
    "gemma": Architecture("GemmaConfig", _options(4, 1, head_dim=8), (4, 1, 8), 39, _SPLIT + _GATED),
    "gemma2": Architecture("Gemma2Config", _options(4, 2, head_dim=6), (4, 2, 6), 39, _SPLIT + _GATED),
    "gemma3": Architecture("Gemma3TextConfig", _options(4, 2, head_dim=6), (4, 2, 6), 39, _SPLIT + _GATED),
    "phi": Architecture(
        "PhiConfig",
        _options(3, 3, qk_layernorm=True),
        (3, 3, 8),
        39,
        (*_SPLIT[:3], "self_attn.dense", "mlp.fc1", None, "mlp.fc2"),
    ),
    "phi3": Architecture(
        "Phi3Config",
        _options(6, 3),
        (6, 3, 4),
        39,
        (*("self_attn.qkv_proj",) * 3, "self_attn.o_proj", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {
            **{"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 39, "n_positions": 32},
            **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "use_cache": False},
        },
        (4, 4, 6),
        39,
        (*("attn.c_attn",) * 3, "attn.c_proj", "mlp.c_fc", None, "mlp.c_proj"),
        "transformer.h.0",
    ),
    "opt": Architecture(
        "OPTConfig",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 39},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0},
            **{"tie_word_embeddings": False, "use_cache": False},
        },
        (4, 4, 6),
        39,
        (*_SPLIT[:3], "self_attn.out_proj", "fc1", None, "fc2"),
        "model.decoder.layers.0",
    ),
}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def from_config(config: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A causal language model with every parameter random, biases and norms too, so that each one shows."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """A model of one of ARCHITECTURES."""
    architecture = ARCHITECTURES[name]
    return from_config(architecture.config, dtype, seed, **{**architecture.options, **options})


def tokens(seed: int = 7, batch: int = 2, length: int = 9) -> Tensor:
    """Token ids `[batch, length]`; none is padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def matrix(model: nn.Module, path: str) -> Tensor:
    """The weight `[N, K]` of a layer, however it is kept."""
    layer = model.get_submodule(path)
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()


def logits(model: Any, **inputs: Any) -> Tensor:
    """The model's output for `tokens()` or other inputs, without gradients."""
    with torch.no_grad():
        return model(**(inputs or {"input_ids": tokens()})).logits


def flags(model: nn.Module) -> tuple[list[bool], list[tuple[bool, Tensor | None]], int]:
    """What a measurement must leave as it was: training flags, `requires_grad` with gradients, and hooks."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    hooks += sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        hooks,
    )


def roles(name: str) -> dict[str, str]:
    """Paths of the first block's layers by role."""
    architecture = ARCHITECTURES[name]
    names = zip(("q", "k", "v", "o", "up", "gate", "down"), architecture.layers, strict=True)
    return {role: f"{architecture.prefix}.{path}" for role, path in names if path is not None}
