"""The planner's arithmetic: totals, the longest sequence, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peft_kernels.memory_plan import ModelShape, StepSettings, layer_bytes, longest_sequence, plan_memory

LLAMA = ModelShape(4096, 32, 32, 8, 128, 14336, 128256, False)
GIB = 2**30


def test_sizes_of_llama_3_8b():
    assert LLAMA.parameters == 8_030_261_248
    assert StepSettings(1, 1, r=16).trained(LLAMA) == 41_943_040


def test_a_layer_keeps_the_bytes_of_the_published_count():
    """28,672 per token in attention and 65,536 in the MLP, and what the norms and attention need beside."""
    step = StepSettings(1, 16384, dense_layers=0)
    kept = layer_bytes(LLAMA, step, eliminates=True)
    assert kept.attention == 16384 * (28_672 + 4 + 4 * 32)
    assert kept.mlp == 16384 * (65_536 + 4)
    assert kept.adapter == 16384 * 7 * 4 * 16
    assert kept.positions == 0


@pytest.mark.parametrize(("keep", "blocks"), [(0.0, 0), (0.25, 3), (0.5, 5), (0.51, 6), (1.0, 10)])
def test_kept_tokens_are_whole_blocks_and_what_is_left_behind(keep, blocks):
    whole, odd = StepSettings(1, 640), StepSettings(1, 647)
    assert whole.kept(keep) == 64 * blocks
    assert odd.kept(keep) == (64 * blocks + 7 if keep else 0)


def test_elimination_scales_what_layers_keep():
    step = StepSettings(1, 16384, dense_layers=0)
    dense = layer_bytes(LLAMA, step, eliminates=True)
    less = layer_bytes(LLAMA, replace(step, keep_attention=0.25, keep_mlp=0.25), eliminates=True)
    assert (less.attention, less.mlp, less.adapter) == (dense.attention // 4, dense.mlp // 4, dense.adapter // 4)
    only_attention = layer_bytes(LLAMA, replace(step, keep_attention=0.25), eliminates=True)
    assert (only_attention.attention, only_attention.mlp) == (less.attention, dense.mlp)


def test_layers_that_eliminate_nothing_are_counted_whole():
    step = StepSettings(1, 4096, keep_attention=0.5, keep_mlp=0.5, dense_layers=4)
    parts = {component.name: component.bytes for component in plan_memory(LLAMA, step).components}
    dense, less = layer_bytes(LLAMA, step, False), layer_bytes(LLAMA, step, True)
    assert parts["activations: MLP"] == 4 * dense.mlp + 28 * less.mlp
    everywhere = plan_memory(LLAMA, replace(step, dense_layers=32)).total
    assert everywhere == plan_memory(LLAMA, replace(step, keep_attention=1.0, keep_mlp=1.0)).total


def test_where_everything_is_kept_no_layer_is_taken_over():
    step = StepSettings(1, 4096, dense_layers=4)
    parts = {component.name: component.bytes for component in plan_memory(LLAMA, step).components}
    assert parts["activations: MLP"] == 32 * layer_bytes(LLAMA, step, False).mlp


def test_checkpointing_keeps_inputs_and_one_layer():
    step = StepSettings(2, 4096, checkpointing=True)
    parts = {component.name: component.bytes for component in plan_memory(LLAMA, step).components}
    assert parts["checkpoints"] == 32 * 2 * 4096 * 4096 * 2
    assert parts["activations of a layer"] == layer_bytes(LLAMA, step, False).total


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"keep_attention": 0.4, "keep_mlp": 0.4}])
def test_the_longest_sequence_fits_and_the_next_does_not(settings):
    step, budget = StepSettings(1, 1, **settings), 40 * GIB
    tokens = longest_sequence(LLAMA, step, budget)
    assert tokens % 64 == 0 < tokens
    assert plan_memory(LLAMA, replace(step, seq_len=tokens)).total <= budget
    assert plan_memory(LLAMA, replace(step, seq_len=tokens + 64)).total > budget


def test_nothing_fits_into_less_than_the_weights():
    assert longest_sequence(LLAMA, StepSettings(1, 1), 8 * GIB) == 0


@pytest.mark.parametrize("method", ["lora", "s2ft", "sparse_delta", "full"])
def test_what_trains_costs_its_gradient_and_two_moments(method):
    step = StepSettings(1, 256, method=method)
    parts = {component.name: component.bytes for component in plan_memory(LLAMA, step).components}
    size = 2 if method == "full" else 4
    assert parts["gradients"] == size * step.trained(LLAMA) > 0
    assert parts["optimizer"] == 2 * parts["gradients"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"keep_mlp": 1.5}, r"keep_mlp must be in \[0, 1\], got 1.5"),
        ({"method": "dora"}, "method must be one of lora, s2ft, sparse_delta, full, got 'dora'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StepSettings(**{"batch_size": 1, "seq_len": 128, **settings})


def test_a_configuration_without_a_size_or_with_experts_is_refused():
    whole = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "vocab_size": 97,
    }
    assert ModelShape.from_config(whole) == ModelShape(64, 2, 4, 4, 16, 160, 97, False)
    assert ModelShape.from_config({"text_config": whole, "vision_config": {}}).hidden == 64
    with pytest.raises(ValueError, match="num_hidden_layers is missing"):
        ModelShape.from_config({**whole, "num_hidden_layers": None})
    with pytest.raises(ValueError, match=r"experts \(num_local_experts=8\)"):
        ModelShape.from_config({**whole, "num_local_experts": 8})
