"""`nn.TokenElimination`: what it computes, in a model and alone, against the layer it takes over and plain PyTorch."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import peft_kernels
from peft_kernels import LoraConfig, elimination
from peft_kernels.nn import TokenElimination

from . import models
from .models import BLOCK, assert_same_gradients, build, eliminated, every_architecture, gradients, layers_of, tokens

HALVES = pytest.mark.parametrize("apply_to", ["both", "attention", "mlp"])


def batch_of(**options):
    ids = tokens(**options)
    return {"input_ids": ids, "labels": ids}


@every_architecture
@HALVES
def test_keeping_all_computes_what_the_layers_compute(name, apply_to):
    model, batch = build(name), batch_of()
    loss = model(**batch).loss
    expected = gradients(model, loss)
    eliminated(model, keep_ratio=1.0, apply_to=apply_to)
    same = model(**batch).loss
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, same), expected)


@every_architecture
@HALVES
def test_kept_tokens_are_computed_as_by_index_select_and_index_add(name, apply_to):
    model, batch = build(name), batch_of()
    eliminated(model, apply_to=apply_to)
    loss = model(**batch).loss
    expected = models.plainly(model, 0.5, batch, [1, 2], apply_to=apply_to)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
    dense = models.plainly(model, 1.0, batch, [1, 2])
    assert (loss - dense).abs() > 1e-4, "the comparison would not tell elimination from computing for all"


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.21, 0.9])
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (3, 21), (2, 24)])
def test_any_number_of_kept_tokens(keep, length, batch):
    model, inputs = build(num_hidden_layers=2), batch_of(batch=batch, length=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 8 tokens in 2 blocks 0.9 are all
        eliminated(model, layers=[0, 1], keep_ratio=keep)
        loss = model(**inputs).loss
    if keep == 0:
        own = layers_of(model)
        before, kept = list(own), torch.empty(batch, 0, dtype=torch.int64)
        own[0], own[1] = (models.PlainElimination(layer, kept) for layer in before)
        expected = model(**inputs).loss
        own[0], own[1] = before
    else:
        expected = models.plainly(model, keep, inputs, [0, 1])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


def called(layer, model, x, **inputs):
    """A decoder layer called as its model calls it."""
    position_ids = torch.arange(x.shape[1])[None]
    return layer(x, position_embeddings=model.model.rotary_emb(x, position_ids), position_ids=position_ids, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@HALVES
def test_dropped_tokens_pass_by_to_the_bit(dtype, apply_to):
    model = build(dtype=dtype)
    layer = TokenElimination(layers_of(model)[1], 0.5, BLOCK, models.fixed_scores, apply_to)
    x = torch.randn(2, 22, 16).to(dtype).requires_grad_()
    y = called(layer, model, x)
    kept = models.chosen(models.fixed_scores(x), 0.5, 22)
    dropped = torch.ones(2, 22, dtype=torch.bool).scatter_(1, kept, False)
    assert dropped.sum() == 16
    if apply_to == "both":
        assert torch.equal(y[dropped], x[dropped]) and not torch.equal(y[~dropped], x[~dropped])
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    if apply_to == "both":
        assert torch.equal(grad[dropped], upstream[dropped])


@HALVES
def test_hidden_states_may_have_any_strides(apply_to):
    model = build()
    layer = TokenElimination(layers_of(model)[1], 0.5, BLOCK, "norm", apply_to)
    x = torch.randn(22, 2, 16, dtype=torch.float64).transpose(0, 1).requires_grad_()
    y = called(layer, model, x)
    expected = called(layer, model, x.detach().contiguous().requires_grad_())
    assert torch.equal(y, expected)
    y.sum().backward()


def test_the_input_is_left_alone_and_so_is_the_module():
    model = build()
    module = layers_of(model)[1]
    before = dict(module.__dict__)
    layer = TokenElimination(module, 0.5, BLOCK, "norm")
    x = torch.randn(2, 22, 16, dtype=torch.float64)
    saved = x.clone()
    called(layer, model, x)
    assert torch.equal(x, saved)
    assert type(module).__name__ == "LlamaDecoderLayer" and module.__dict__ == before
    assert isinstance(layer, type(module)) and isinstance(layer, TokenElimination)
    assert all(one is other for one, other in zip(layer.parameters(), module.parameters(), strict=True))
    restored = layer.restored()
    assert type(restored) is type(module) and restored.__dict__.keys() == module.__dict__.keys()


def test_rotations_are_those_of_original_positions():
    model, batch = build(), batch_of()
    eliminated(model)
    loss = model(**batch).loss
    ranks = torch.arange(models.chosen(torch.zeros(2, 5), 0.5, 22).shape[1]).expand(2, -1)
    compacted = models.plainly(model, 0.5, batch, [1, 2], rotate_at=ranks)
    assert (loss - compacted).abs() > 1e-4


@every_architecture
def test_evaluation_is_dense_to_the_bit(name):
    model, batch = build(name).eval(), batch_of()
    expected = model(**batch).logits
    eliminated(model)
    assert torch.equal(model(**batch).logits, expected)
    model.train()
    assert not torch.equal(model(**batch).logits, expected)


def test_evaluation_eliminates_when_asked_to():
    model, batch = build(), batch_of()
    eliminated(model, train_only=False)
    expected = model(**batch).logits
    assert torch.equal(model.eval()(**batch).logits, expected)


@pytest.mark.parametrize("training", [False, True])
def test_generation_with_a_cache_is_as_before(training):
    model, ids = build(use_cache=True), tokens(1, 13)
    model.train(training)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    eliminated(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    said = [str(item.message) for item in caught if "token elimination" in str(item.message)]
    assert bool(said) == training
    rows = elimination.report(model).eliminating
    assert all((sum(row.dense_calls.values()) > 0) == training for row in rows)


def test_a_cache_that_training_makes_stays_empty_of_kept_tokens():
    model, batch = build(use_cache=True), batch_of()
    eliminated(model)
    model.config.use_cache = False
    expected = model(**batch).loss
    model.config.use_cache = True
    output = model(**batch)
    assert torch.equal(output.loss, expected)
    lengths = [output.past_key_values.get_seq_length(index) for index in range(4)]
    assert lengths == [22, 0, 0, 22]


@pytest.mark.parametrize(
    ("options", "length", "reason"),
    [
        ({"keep_ratio": None, "threshold": -1.0, "score": "norm"}, 24, "no block of this call scores below its"),
        ({}, 7, "sequences are shorter than two blocks of 4 tokens"),
        ({"keep_ratio": 0.9}, 24, "keep=0.9, rounded up to whole blocks, is all of them"),
    ],
)
def test_a_call_that_drops_nothing_says_so_once(options, length, reason):
    model, batch = build(), batch_of(length=length)
    expected = model(**batch).loss
    eliminated(model, **options)
    with pytest.warns(UserWarning, match=reason) as caught:
        loss = model(**batch).loss
    assert len([item for item in caught if reason in str(item.message)]) == 2, "once for each of two layers"
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
    rows = elimination.report(model).eliminating
    assert [(row.calls, sum(row.dense_calls.values())) for row in rows] == [(0, 2), (0, 2)]
    assert reason in str(elimination.report(model))


def test_calls_and_tokens_are_counted():
    model, batch = build(), batch_of()
    eliminated(model, schedule={1: 0.5, 2: 1.0, -1: 0.2}, keep_ratio=None, layers=None)
    for _ in range(3):
        model(**batch).loss.backward()
    rows = elimination.report(model).layers
    assert [(row.keep, row.calls, row.tokens, row.kept_tokens) for row in rows] == [
        (None, 0, 0, 0),
        (0.5, 3, 132, 84),
        (1.0, 3, 132, 132),
        (0.2, 3, 132, 36),
    ]


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_eliminate_and_share_among_themselves(kind):
    model, batch = build(), batch_of()
    eliminated(model, select_every=2)
    expected = model(**batch).loss
    twin = copy.deepcopy(model) if kind == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(**batch).loss, expected)
    layers = list(elimination.eliminating_layers(twin).values())
    assert len(layers) == 2 and type(layers[0]) is type(layers_of(model)[1])
    assert layers[0].elimination.selections is layers[1].elimination.selections
    assert layers[0].elimination.selections is not layers_of(model)[1].elimination.selections
    assert layers[0].elimination.sharing is layers[1].elimination.sharing
    assert layers[0].elimination.sharing is not layers_of(model)[1].elimination.sharing
    assert elimination.eliminate.__name__ and twin.state_dict().keys() == model.state_dict().keys()
    elimination.remove(twin)
    assert elimination.eliminating_layers(model) and not elimination.eliminating_layers(twin)


def test_names_of_parameters_are_the_model_s():
    model = build()
    names, tensors = list(dict(model.named_parameters())), model.state_dict()
    eliminated(model)
    assert list(dict(model.named_parameters())) == names
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert not any(parameter.any() for parameter in model.parameters())


def test_hooks_of_the_layer_and_of_its_parts_run():
    model, batch = build(), batch_of()
    seen = []
    layer = layers_of(model)[1]
    for module in (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.mlp.down_proj):
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    expected = models.plainly(model, 0.5, batch, [1])
    eliminated(model, layers=[1])
    seen.clear()
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)
    assert seen == ["LlamaRMSNorm", "LlamaAttention", "Linear", "LlamaMLP", "TokenEliminationLlamaDecoderLayer"]
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == 5 and not torch.equal(output.hidden_states[1], output.hidden_states[2])


@pytest.mark.parametrize(
    ("config", "own_parts"),
    [
        ("StableLmConfig", {"input_layernorm", "post_attention_layernorm"}),
        ("Starcoder2Config", {"input_layernorm", "post_attention_layernorm", "mlp"}),
    ],
)
def test_other_norms_and_mlps_run_as_they_are(config, own_parts):
    model, batch = build(config, hidden_size=32, head_dim=8), batch_of()  # of 8 channels StableLM rotates 2
    report = eliminated(model)
    assert all(set(row.own_parts) == own_parts for row in report.eliminating), str(report)
    loss = model(**batch).loss
    expected = models.plainly(model, 0.5, batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("part", ["self_attn", "mlp", "input_layernorm"])
def test_a_part_that_was_replaced_or_is_watched_runs_as_it_is(part):
    model, batch = build(), batch_of()
    eliminated(model, layers=[1])
    module = layers_of(model)[1].get_submodule(part)
    forward, calls = module.forward, []
    module.forward = lambda *args, **kwargs: calls.append(part) or forward(*args, **kwargs)
    replaced = model(**batch).loss
    del module.forward
    module.register_forward_hook(lambda *_: calls.append("hook"))
    torch.testing.assert_close(model(**batch).loss, replaced, rtol=1e-6, atol=0)
    assert calls == [part, "hook"]


@pytest.mark.parametrize("kind", CheckpointImpl)
@pytest.mark.parametrize("wrapped", ["self_attn", "mlp", "mlp.gate_proj"])
def test_parts_may_be_checkpointed(wrapped, kind):
    model, batch = build(), batch_of()
    peft_kernels.inject(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    eliminated(model)
    loss = model(**batch).loss
    expected = gradients(model, loss)
    owner, _, part = f"model.layers.1.{wrapped}".rpartition(".")
    owner = model.get_submodule(owner)
    inside = getattr(owner, part)
    setattr(owner, part, checkpoint_wrapper(inside, kind))
    again = model(**batch).loss
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    again.backward()
    setattr(owner, part, inside)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected, 1e-12)


def test_bad_options_are_refused():
    layer = layers_of(build())[0]
    for options, message in (
        ({"keep": 1.5}, r"keep must be in \[0, 1\], got 1.5"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"score": "magic"}, "score must be one of attention, norm, gradient, random, predictor or a callable"),
        ({"apply_to": "norms"}, "apply_to must be one of both, attention, mlp, got 'norms'"),
        ({"threshold": math.nan}, "threshold must be a finite number, or -inf to keep everything, got nan"),
        ({"threshold": math.inf}, "threshold must be a finite number, or -inf to keep everything, got inf"),
        ({"threshold": True}, "threshold must be a finite number, .* got True"),
        ({"threshold": "0.5"}, "threshold must be a finite number, .* got '0.5'"),
        ({"threshold": torch.tensor(1)}, r"threshold must be a number or a floating scalar .* torch.int64 \[\]"),
        ({"threshold": torch.ones(1)}, r"threshold must be a number or a floating scalar .* torch.float32 \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenElimination(layer, **options)
    for threshold in (None, 0, -0.5, -math.inf, torch.tensor(0.5)):
        assert TokenElimination(layer, threshold=threshold).elimination.options.threshold is threshold
    with pytest.raises(TypeError, match="train_only must be True or False, got 1"):
        TokenElimination(layer, train_only=1)
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got int"):
        TokenElimination(3)
    with pytest.raises(TypeError, match="module eliminates tokens already"):
        TokenElimination(TokenElimination(layer))
    with pytest.raises(TypeError, match="it has no input_layernorm and no self_attn"):
        TokenElimination(torch.nn.Linear(3, 3))


def test_autocast():
    model, batch = build(dtype=torch.float32), batch_of()
    eliminated(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        expected = models.plainly(model, 0.5, batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=3e-2, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 0.1)


def test_reports_say_which_parts_run_as_they_are():
    model = build("GemmaConfig", hidden_act="gelu_pytorch_tanh")
    report = eliminated(model)
    assert [set(row.own_parts) for row in report.eliminating] == [{"mlp"}, {"mlp"}]
    assert "does not compute down(silu(gate(x)) * up(x))" in str(report)
    assert not any(row.own_parts for row in eliminated(build("llama")).eliminating)
    assert peft_kernels.EliminationReport is type(report)
