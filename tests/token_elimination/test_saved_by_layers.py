"""What a layer that eliminates tokens keeps for backward, counted in bytes and compared with the formula."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import LoraConfig, TokenEliminationConfig

from .models import build, layers_of

TOKENS, HIDDEN, INTERMEDIATE, HEADS, GROUPS, DEPTH, RANK = 256, 64, 160, 4, 2, 16, 3
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DEPTH,
    "num_hidden_layers": 1,
}


def saved_bytes(model, dtype):
    """Bytes of the storages that one call of the layer keeps, but parameters and tables that all layers share."""
    x = torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_()
    position_ids = torch.arange(TOKENS)[None]
    tables = model.model.rotary_emb(x, position_ids)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        y = layers_of(model)[0](x, position_embeddings=tables, position_ids=position_ids)
    assert y.requires_grad
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in found}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in shared)


def adapted(dtype, **options):
    model = build("llama", dtype, **SIZES)
    peft_kernels.inject(model, LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))
    if options:
        peft_kernels.inject(model, TokenEliminationConfig(layers=[0], score="norm", block_size=16, **options))
    return model


def attention_bytes(tokens, size):
    """Norm input and its rstd, q, k, v, output, sums of rows; of LoRA the products with A, float32."""
    channels = HIDDEN + (2 * HEADS + 2 * GROUPS) * DEPTH
    return tokens * (size * channels + 4 * (1 + HEADS + 4 * RANK))


def mlp_bytes(tokens, size):
    """Norm input and its rstd, gate and up; of LoRA the products with A, float32."""
    return tokens * (size * (HIDDEN + 2 * INTERMEDIATE) + 4 * (1 + 3 * RANK))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_a_layer_keeps_what_the_formula_says(dtype, keep):
    kept, size = int(keep * TOKENS), dtype.itemsize
    rows = 4 * kept if keep < 1 else 0
    expected = attention_bytes(kept, size) + mlp_bytes(kept, size) + rows
    assert saved_bytes(adapted(dtype, keep_ratio=keep), dtype) == expected


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_under_autocast_a_layer_keeps_residuals_as_they_are_and_the_rest_in_the_autocast_dtype(keep):
    model, kept = adapted(torch.float32, keep_ratio=keep), int(keep * TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        found = saved_bytes(model, torch.float32)
    inputs_of_norms = 2 * kept * HIDDEN * (4 - 2)  # what float32 takes beyond bfloat16
    cast_weights = 2 * HIDDEN * ((2 * HEADS + 2 * GROUPS) * DEPTH + 3 * INTERMEDIATE)  # for dx, as torch keeps them
    rows = 4 * kept if keep < 1 else 0
    assert found == attention_bytes(kept, 2) + mlp_bytes(kept, 2) + inputs_of_norms + cast_weights + rows


@pytest.mark.parametrize("apply_to", ["attention", "mlp"])
def test_a_half_that_is_dense_keeps_all_tokens(apply_to):
    kept = TOKENS // 2
    halves = (kept, TOKENS) if apply_to == "attention" else (TOKENS, kept)
    expected = attention_bytes(halves[0], 4) + mlp_bytes(halves[1], 4) + 4 * kept
    assert saved_bytes(adapted(torch.float32, keep_ratio=0.5, apply_to=apply_to), torch.float32) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_two_fifths_keeps_less_than_half_of_what_the_dense_layer_does(dtype):
    eliminated, dense = (saved_bytes(adapted(dtype, **options), dtype) for options in ({"keep_ratio": 0.4}, {}))
    assert dense >= 2.2 * eliminated
