"""Tiny models with decoder layers that eliminate tokens, and the same in plain PyTorch beside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_kernels

VOCABULARY = 48
BLOCK = 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name: str = "llama", dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: Any) -> Any:
    """A causal language model with every parameter random, in training."""
    transformers = pytest.importorskip("transformers")
    config, more = ARCHITECTURES.get(name, (name, {}))
    options = {**SIZES, **more, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**options), attn_implementation=attention
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).train()


def tokens(batch: int = 2, length: int = 22, seed: int = 5) -> Tensor:
    """Token ids `[batch, length]`; none is padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def fixed_scores(hidden: Tensor) -> Tensor:
    """Scores of blocks that depend on their shape alone, the same in every layer."""
    blocks = hidden.shape[1] // BLOCK
    generator = torch.Generator().manual_seed(blocks)
    return torch.rand(hidden.shape[0], blocks, generator=generator)


def chosen(scores: Tensor, keep: float, length: int) -> Tensor:
    """Positions `[B, S]` of the blocks with the largest scores, and of what is behind the last whole block."""
    count = math.ceil(round(keep * scores.shape[1], 6))
    blocks = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
    inside = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
    behind = torch.arange(scores.shape[1] * BLOCK, length).expand(scores.shape[0], -1)
    return torch.cat((inside, behind), 1)


class PlainElimination(nn.Module):
    """A decoder layer's halves on some tokens by index_select and index_add, one sequence after the other.

    Args:
        layer: a decoder layer, whose parts it calls.
        positions: `[B, S]`.
        apply_to: which halves.
        rotate_at: positions that kept tokens are rotated at; None for their own.
    """

    def __init__(self, layer: nn.Module, positions: Tensor, apply_to: str = "both", rotate_at: Tensor | None = None):
        super().__init__()
        self.layer, self.positions, self.apply_to, self.rotate_at = layer, positions, apply_to, rotate_at

    def forward(self, x, attention_mask=None, position_embeddings=None, position_ids=None, **_):
        return torch.cat([self.sequence(b, x, attention_mask, position_embeddings) for b in range(x.shape[0])])

    def sequence(self, b, x, mask, tables):
        every = torch.arange(x.shape[1])
        kept = self.positions[b]
        y = x[b]
        rows = every if self.apply_to == "mlp" else kept
        turned = rows if self.rotate_at is None else self.rotate_at[b]
        if len(rows):
            h = self.layer.input_layernorm(y.index_select(0, rows))[None]
            here = [table[b if len(table) > 1 else 0].index_select(0, turned)[None] for table in tables]
            if mask is not None:
                mask = mask[b : b + 1] if len(mask) > 1 else mask
                mask = mask.index_select(2, rows).index_select(3, rows)
            attended = self.layer.self_attn(hidden_states=h, position_embeddings=tuple(here), attention_mask=mask)[0]
            y = y.index_add(0, rows, attended[0].to(y.dtype))
        rows = every if self.apply_to == "attention" else kept
        if len(rows):
            h = self.layer.post_attention_layernorm(y.index_select(0, rows))
            y = y.index_add(0, rows, self.layer.mlp(h[None])[0].to(y.dtype))
        return y[None]


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.model.layers  # type: ignore[return-value, union-attr]


def plainly(model: Any, keep: float, batch: dict[str, Any], layers: list[int], **options: Any) -> Tensor:
    """The loss of a model whose layers compute in plain PyTorch for the tokens that `fixed_scores` chooses."""
    own = layers_of(model)
    before = list(own)
    like = batch["input_ids"][..., None]
    scores = fixed_scores(like)
    if "attention_mask" in batch:  # blocks of padding alone are kept last
        real = batch["attention_mask"][:, : scores.shape[1] * BLOCK].unflatten(1, (-1, BLOCK)).amax(2)
        scores = scores.masked_fill(real == 0, -torch.inf)
    positions = chosen(scores, keep, like.shape[1])
    try:
        for index in layers:
            layer = before[index]
            restored = layer.restored() if isinstance(layer, peft_kernels.nn.TokenElimination) else layer
            own[index] = PlainElimination(restored, positions, **options)
        return model(**batch).loss
    finally:
        for index in layers:
            own[index] = before[index]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by name, of what trains and was used."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Names and values agree, relative to the largest number of each; norms of transformers compute in float32."""
    assert actual.keys() == expected.keys() and actual
    for name, grad in actual.items():
        scale = expected[name].abs().max()
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=float(tolerance * scale) + 1e-12, msg=name)


def eliminated(model: Any, **options: Any) -> Any:
    """Injects, with `fixed_scores` for scores unless others are asked for."""
    options = {"keep_ratio": 0.5, "layers": [1, 2], "block_size": BLOCK, "score": "predictor", **options}
    report = peft_kernels.inject(model, peft_kernels.TokenEliminationConfig(**options))
    if options["score"] == "predictor":
        indices = [layer.elimination.index for layer in peft_kernels.elimination.eliminating_layers(model).values()]
        peft_kernels.elimination.set_predictors(model, dict.fromkeys(indices, fixed_scores))
    return report
