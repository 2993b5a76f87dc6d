"""The planner's bytes against what autograd keeps of a real model."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import peft_kernels as pk
from benchmarks.memory import saved_bytes
from peft_kernels.memory_plan import ModelShape, StepSettings, layer_bytes, plan_memory

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


METHODS = {
    "lora": lambda: pk.LoraConfig(r=4, lora_alpha=8),
    "s2ft": lambda: pk.S2FTConfig(ratios={"o": 0.25, "down": 0.1}, budget="per_layer"),
    "sparse_delta": lambda: pk.SparseDeltaConfig(density=0.01, target_modules="all-linear"),
    "full": None,
}
every_method = pytest.mark.parametrize("method", METHODS)


def adapted(method, dtype, **sizes):
    model = llama(dtype, **sizes)
    config = METHODS[method]
    if config is not None:
        pk.inject(model, config(), seed=0)
    model.enable_input_require_grads()
    return model.train()


def of_one_layer(measure):
    """Of a model with two layers more, less those of the one without, halved."""
    return (measure(4) - measure(2)) // 2


def step_of(dtype, **settings):
    name = str(dtype).removeprefix("torch.")
    return StepSettings(batch_size=2, seq_len=TOKENS, dtype=name, r=4, s2ft_o=0.25, s2ft_down=0.1, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key_value_heads", [4, 2])
@every_method
def test_a_layer_of_transformers_keeps_what_is_planned(method, key_value_heads, dtype):
    batch = torch.arange(2 * TOKENS).remainder(97).view(2, TOKENS)
    models = {n: adapted(method, dtype, layers=n, key_value_heads=key_value_heads) for n in (2, 4)}
    measured = of_one_layer(lambda layers: kept_by_layers(models[layers], batch))
    shape = ModelShape.from_config(models[2].config.to_dict())
    assert measured == layer_bytes(shape, step_of(dtype, method=method), eliminates=False).total


@pytest.mark.parametrize("keep", [0.0, 0.28, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_method
def test_a_layer_that_eliminates_tokens_keeps_what_is_planned(method, dtype, keep):
    batch = torch.arange(2 * TOKENS).remainder(97).view(2, TOKENS)

    def measure(layers):
        model = adapted(method, dtype, layers=layers)
        schedule = dict.fromkeys(range(layers), keep)
        pk.inject(model, pk.TokenEliminationConfig(schedule=schedule, block_size=16, score="norm"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing is dropped where all is kept
            return kept_by_layers(model, batch)

    step = step_of(dtype, method=method, keep_attention=keep, keep_mlp=keep, block_size=16)
    shape = ModelShape.from_config(llama(dtype).config.to_dict())
    assert of_one_layer(measure) == layer_bytes(shape, step, eliminates=True).total


@every_method
def test_a_model_of_both_kinds_of_layers_keeps_what_is_planned(method):
    """With the configuration's own choice of layers: the first two and the last one stay as they are."""
    batch = torch.arange(2 * TOKENS).remainder(97).view(2, TOKENS)
    model = adapted(method, torch.bfloat16, layers=6)
    before = kept_by_layers(model, batch)
    pk.inject(model, pk.TokenEliminationConfig(keep_ratio=0.5, block_size=16, score="norm"))
    saved = before - kept_by_layers(model, batch)
    shape = ModelShape.from_config(model.config.to_dict())
    step = step_of(torch.bfloat16, method=method, keep_attention=0.5, keep_mlp=0.5, block_size=16)
    whole = replace(step, keep_attention=1.0, keep_mlp=1.0)
    planned = [
        sum(part.bytes for part in plan_memory(shape, of).components if part.name.startswith("activations"))
        for of in (whole, step)
    ]
    assert saved == planned[0] - planned[1] > 0
