"""The planner's bytes against what autograd keeps of a real model."""

from __future__ import annotations

import warnings

import pytest
import torch

import peft_kernels as pk
from benchmarks.memory import saved_bytes
from peft_kernels.memory_plan import ModelShape, StepSettings, layer_bytes

transformers = pytest.importorskip("transformers")

TOKENS = 192


def llama(dtype, layers=3, key_value_heads=2):
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        intermediate_size=160,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def kept_by_layers(model, batch):
    """Bytes per decoder layer: of a model with two layers more, less those of this one."""
    own = [*model.parameters(), *model.buffers(), batch]
    return saved_bytes(lambda: model.get_decoder()(input_ids=batch).last_hidden_state, own)[0]


def step_of(dtype, **settings):
    name = str(dtype).removeprefix("torch.")
    return StepSettings(batch_size=2, seq_len=TOKENS, dtype=name, r=4, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_a_layer_of_transformers_with_lora_keeps_what_is_planned(dtype, key_value_heads):
    batch = torch.arange(2 * TOKENS).remainder(97).view(2, TOKENS)
    measured = []
    for layers in (2, 4):
        model = llama(dtype, layers, key_value_heads)
        pk.inject(model, pk.LoraConfig(r=4, lora_alpha=8), seed=0)
        model.enable_input_require_grads()
        measured.append(kept_by_layers(model.train(), batch))
    shape = ModelShape.from_config(model.config.to_dict())
    planned = layer_bytes(shape, step_of(dtype, lean=False), eliminates=False).total
    assert (measured[1] - measured[0]) // 2 == planned


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_that_eliminates_tokens_keeps_what_is_planned(dtype, keep):
    batch = torch.arange(2 * TOKENS).remainder(97).view(2, TOKENS)
    measured = []
    for layers in (2, 4):
        model = llama(dtype, layers)
        pk.inject(model, pk.LoraConfig(r=4, lora_alpha=8), seed=0)
        schedule = dict.fromkeys(range(layers), keep)
        pk.inject(model, pk.TokenEliminationConfig(schedule=schedule, block_size=16, score="norm"))
        model.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is dropped where all is kept
            measured.append(kept_by_layers(model.train(), batch))
    shape = ModelShape.from_config(model.config.to_dict())
    step = step_of(dtype, keep_attention=keep, keep_mlp=keep, block_size=16)
    assert (measured[1] - measured[0]) // 2 == layer_bytes(shape, step, eliminates=True).total
