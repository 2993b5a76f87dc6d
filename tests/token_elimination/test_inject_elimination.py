"""`inject` with a `TokenEliminationConfig`: which layers, with which adapters, in which order, and back again."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

import peft_kernels
from peft_kernels import LoraConfig, S2FTConfig, SparseDeltaConfig, TokenEliminationConfig, elimination

from . import models
from .models import assert_same_gradients, build, eliminated, gradients, layers_of, tokens

ADAPTERS = {
    "lora": LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules="all-linear"),
    "s2ft": S2FTConfig(),
    "sparse": SparseDeltaConfig(density=0.1, target_modules="all-linear"),
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS)
every_order = pytest.mark.parametrize("first", ["adapter", "elimination"])


def batch_of(**options):
    ids = tokens(**options)
    return {"input_ids": ids, "labels": ids}


def adapted(adapter, first, **options):
    model = build()
    if first == "elimination":
        eliminated(model, **options)
    peft_kernels.inject(model, ADAPTERS[adapter], seed=3)
    if first == "adapter":
        eliminated(model, **options)
    return model


@every_adapter
@every_order
def test_adapters_get_the_gradients_of_plain_pytorch(adapter, first):
    model, batch = adapted(adapter, first), batch_of()
    loss = model(**batch).loss
    expected = models.plainly(model, 0.5, batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    found, wanted = gradients(model, loss), gradients(model, expected)
    assert any(".1." in name for name in found)
    assert_same_gradients(found, wanted)


@every_adapter
@every_order
def test_keeping_all_gives_adapters_the_gradients_of_the_layers(adapter, first):
    batch = batch_of()
    model = build()
    peft_kernels.inject(model, ADAPTERS[adapter], seed=3)
    loss = model(**batch).loss
    expected = gradients(model, loss)
    same_model = adapted(adapter, first, keep_ratio=1.0)
    same = same_model(**batch).loss
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(same_model, same), expected)


@every_adapter
@every_order
def test_eject_gives_the_model_back_to_the_bit(adapter, first):
    model, batch = build(), batch_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {path: type(module) for path, module in model.named_modules()}
    expected = model(**batch).loss
    if first == "elimination":
        eliminated(model)
    peft_kernels.inject(model, ADAPTERS[adapter], seed=3)
    if first == "adapter":
        eliminated(model)
    peft_kernels.eject(model, merge=False)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(**batch).loss, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert elimination.model.STATE not in model.__dict__


def test_a_model_without_adapters_is_ejected_too():
    model = build()
    eliminated(model)
    peft_kernels.eject(model)
    assert not elimination.eliminating_layers(model)
    with pytest.raises(ValueError, match="model has no layers that eliminate tokens"):
        elimination.remove(model)


def test_removing_leaves_adapters():
    model, batch = adapted("lora", "adapter"), batch_of()
    elimination.remove(model)
    same = build()
    peft_kernels.inject(same, ADAPTERS["lora"], seed=3)
    assert torch.equal(model(**batch).loss, same(**batch).loss)


def test_nothing_is_frozen_and_all_but_the_first_two_and_the_last_eliminate():
    model = build(num_hidden_layers=5)
    model.lm_head.requires_grad_(False)
    report = peft_kernels.inject(model, TokenEliminationConfig(keep_ratio=0.5, block_size=4))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert [row.eliminates for row in report.layers] == [False, False, True, True, False]
    assert [row.path for row in report.eliminating] == ["model.layers.2", "model.layers.3"]
    text = str(report)
    assert "EliminationReport: 2 of 5 decoder layers eliminate tokens" in text
    assert "model.layers.2: keep=0.5 by attention, both" in text
    assert "model.layers.4: dense, it was not asked to" in text
    assert str(elimination.report(model)) == text


@pytest.mark.parametrize("random", [False, True])
def test_a_model_that_trains_with_dropout_is_taken_and_the_generator_left_alone(random):
    model = build()
    adapter = LoraConfig(lora_dropout=0.4, init_lora_weights=not random, target_modules="all-linear")
    peft_kernels.inject(model, adapter, seed=1)
    before = torch.get_rng_state()
    report = peft_kernels.inject(model, TokenEliminationConfig(keep_ratio=0.5, layers=[1, 2], block_size=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(report.eliminating) == 2 and all(module.training for module in model.modules())


def test_a_second_injection_is_refused():
    model = build()
    eliminated(model)
    with pytest.raises(ValueError, match=r"model eliminates tokens already \(at model.layers.1\)"):
        eliminated(model)
    elimination.remove(model)
    eliminated(model)


REFUSED = {
    "gemma2": ("Gemma2Config", "Gemma2DecoderLayer does not compute x + self_attn(input_layernorm(x)), then x + "),
    "gemma3": ("Gemma3TextConfig", "Gemma3DecoderLayer does not compute"),
    "phi": ("PhiConfig", "model.layers.1: it has no post_attention_layernorm"),
    "granite": ("GraniteConfig", "GraniteDecoderLayer does not compute"),
    "olmo2": ("Olmo2Config", "model.layers.1: it has no input_layernorm"),
    "gpt2": ("GPT2Config", "it has no input_layernorm and no self_attn and no post_attention_layernorm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_compute_something_else_are_refused(name):
    config, reason = REFUSED[name]
    options = {"residual_multiplier": 0.5} if name == "granite" else {}
    model = build(config, torch.float32, attention="eager", **options)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags, generator = [module.training for module in model.modules()], torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        eliminated(model)
    assert reason in str(error.value) and "cannot eliminate tokens" in str(error.value)
    with pytest.raises(ValueError) as error:
        peft_kernels.inject(model, TokenEliminationConfig(keep_ratio=0.5))
    assert "cannot eliminate tokens" in str(error.value)
    assert not elimination.eliminating_layers(model) and torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_attention_scores_need_attention_like_llama_s():
    model = build("Phi3Config", torch.float32)
    with pytest.raises(ValueError, match=r'score="attention" needs its queries and keys, but a .*Phi3Attention has no'):
        eliminated(model, score="attention")
    report = eliminated(model, score="norm")
    assert set(report.eliminating[0].own_parts) == {"self_attn", "mlp"}
    batch = batch_of()
    model(**batch).loss.backward()
    assert elimination.report(model).eliminating[0].kept_tokens == 28


def test_experts_run_as_they_are():
    options = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    report = eliminated(build("MixtralConfig", torch.float32, **options))
    assert all("mlp" in row.own_parts for row in report.eliminating)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_peft(dtype, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = build("qwen2", dtype), batch_of()
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    peft_kernels.accelerate(model)
    report = eliminated(model, score="attention")
    assert [row.path for row in report.eliminating] == [f"base_model.model.model.layers.{index}" for index in (1, 2)]
    assert not any(row.own_parts for row in report.eliminating), "parts of PEFT's layers are asked like others"
    model(**batch).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".layers.1." in name and "lora_" in name)
    peft_kernels.save_adapter(model, tmp_path)
    assert TokenEliminationConfig.load(tmp_path).layers == [1, 2]
    peft_kernels.eject(model)
    assert not elimination.eliminating_layers(model)


def test_errors_leave_the_model_alone():
    model = build()
    for options, message in (
        ({"layers": [1, 9]}, "layers must name layers of the model, which has 4, got 9"),
        ({"layers": [3, -1]}, "layers must name each layer once, got 3 twice"),
        ({"layers": None, "dense_first": 3}, "none is left between the first 3 and the last 1"),
        ({"layers": None, "keep_ratio": None, "schedule": {4: 0.5}}, "schedule must name layers of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            eliminated(model, **options)
    config = TokenEliminationConfig(keep_ratio=0.5, layers=[1])
    for name in ("seed", "positions", "calibration"):
        with pytest.raises(ValueError, match=f"{name} must be None with a TokenEliminationConfig"):
            peft_kernels.inject(model, config, **{name: 3})
    config.block_size = 0
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1, got 0"):
        peft_kernels.inject(model, config)
    with pytest.raises(ValueError, match=r"model is wrapped by torch\.compile"):
        eliminated(torch.compile(model))
    with pytest.raises(ValueError, match="none has parameters"):
        eliminated(torch.nn.Linear(3, 3))
    assert not elimination.eliminating_layers(model)


def test_a_layer_at_two_places_is_one():
    model, batch = build(), batch_of()
    layers_of(model)[2] = layers_of(model)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eliminated(model, layers=[1])
    assert layers_of(model)[1] is layers_of(model)[2]
    model(**batch)
    assert elimination.report(model).eliminating[0].calls == 2


@every_adapter
def test_an_adapter_s_files_do_not_change_and_the_configuration_lies_beside(adapter, tmp_path):
    model = adapted(adapter, "adapter", score="norm")
    peft_kernels.save_adapter(model, tmp_path / "with")
    elimination.remove(model)
    peft_kernels.save_adapter(model, tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert {path.name for path in (tmp_path / "with").iterdir()} == names | {"token_elimination.json"}
    for name in names:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    config = TokenEliminationConfig.load(tmp_path / "with")
    assert (config.keep_ratio, config.layers, config.score) == (0.5, [1, 2], "norm")
    bare = build()
    peft_kernels.load_adapter(bare, tmp_path / "with")
    assert not elimination.eliminating_layers(bare)


def test_configurations_come_back_from_files(tmp_path):
    config = TokenEliminationConfig(schedule={1: 0.5, -1: 0}, score="random", seed=3, select_every=2, threshold=0.25)
    config.save(tmp_path / "new")
    assert TokenEliminationConfig.load(tmp_path / "new") == config
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["token_elimination.json"]
    with pytest.warns(UserWarning, match="ignores options it does not know"):
        TokenEliminationConfig.from_dict({**config.to_dict(), "more": 1})
    with pytest.raises(ValueError, match="kind must be 'TOKEN_ELIMINATION' for a TokenEliminationConfig, got 'LORA'"):
        TokenEliminationConfig.from_dict({"kind": "LORA"})
    (tmp_path / "token_elimination.json").write_text("[")
    with pytest.raises(ValueError, match="is not valid JSON"):
        TokenEliminationConfig.load(tmp_path)
    (tmp_path / "token_elimination.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        TokenEliminationConfig.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        TokenEliminationConfig.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "keep_ratio, threshold or schedule must be given, got none of them"),
        ({"keep_ratio": 1.1}, r"keep_ratio must be in \[0, 1\], got 1.1"),
        ({"keep_ratio": True}, r"keep_ratio must be in \[0, 1\], got True"),
        ({"threshold": float("nan")}, "threshold must be a finite number, got nan"),
        ({"keep_ratio": 0.5, "schedule": {1: 0.5}}, "schedule says which layers keep how much, so keep_ratio must be"),
        ({"layers": [1], "schedule": {1: 0.5}}, "so layers must be None"),
        ({"schedule": {}}, "schedule must map indices of layers to keep ratios, got {}"),
        ({"schedule": {"a": 0.5}}, "schedule must have indices of layers as keys, got 'a'"),
        ({"schedule": {1: 2}}, r"schedule\[1\] must be in \[0, 1\], got 2"),
        ({"keep_ratio": 0.5, "layers": []}, r"layers must be a list of indices, at least one, got \[\]"),
        ({"keep_ratio": 0.5, "layers": "all"}, "layers must be a list of indices or None, got 'all'"),
        ({"keep_ratio": 0.5, "select_every": 0}, "select_every must be an integer of at least 1, got 0"),
        ({"keep_ratio": 0.5, "seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"keep_ratio": 0.5, "score": "loss"}, "score must be one of attention, norm, gradient, random, predictor"),
        ({"keep_ratio": 0.5, "apply_to": "all"}, "apply_to must be one of both, attention, mlp, got 'all'"),
        ({"keep_ratio": 0.5, "train_only": 1}, "train_only must be True or False, got 1"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TokenEliminationConfig(**options)


def test_schedules_name_layers_from_both_ends():
    config = TokenEliminationConfig(schedule={-1: 0.25, 1: 0.5})
    assert config.ratios(6) == {1: 0.5, 5: 0.25}
    assert TokenEliminationConfig(schedule=[1.0, 0.5, 0.25]).ratios(3) == {0: 1.0, 1: 0.5, 2: 0.25}
    listed = TokenEliminationConfig.from_dict(
        json.loads(json.dumps(TokenEliminationConfig(schedule=[1, 0.5]).to_dict()))
    )
    assert listed.ratios(2) == {0: 1.0, 1: 0.5}
    with pytest.raises(ValueError, match="schedule must have one ratio for each of 3 layers, got 2"):
        listed.ratios(3)
    assert TokenEliminationConfig(keep_ratio=0.5, dense_first=1, dense_last=2).ratios(6) == {1: 0.5, 2: 0.5, 3: 0.5}
    assert TokenEliminationConfig(threshold=0.5).ratios(4) == {2: 1.0}


def test_an_argument_for_adapters_is_refused():
    with pytest.raises(ValueError, match="autocast_adapter_dtype must be True"):
        peft_kernels.inject(build(), TokenEliminationConfig(keep_ratio=0.5), autocast_adapter_dtype=False)


def test_a_report_says_the_threshold():
    model = build()
    report = eliminated(model, keep_ratio=None, threshold=2.5, score="norm")
    assert {layer.threshold for layer in report.layers if layer.eliminates} == {2.5}
    assert "keep=1 by norm of at least 2.5, both" in str(report)


def test_the_file_beside_an_adapter_says_what_layers_do_now(tmp_path):
    model = build()
    peft_kernels.inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    eliminated(model, keep_ratio=None, threshold=0.0, score="norm")
    elimination.set_thresholds(model, {1: 5.0, 2: 7.5})
    peft_kernels.save_adapter(model, tmp_path)
    saved = TokenEliminationConfig.load(tmp_path)
    assert saved.threshold == {1: 5.0, 2: 7.5}
    again = build()
    peft_kernels.inject(again, saved)
    assert [layer.threshold for layer in elimination.report(again).eliminating] == [5.0, 7.5]
    elimination.remove(model)
    peft_kernels.save_adapter(model, tmp_path)
    assert not (tmp_path / "token_elimination.json").exists()


def test_a_model_within_another_knows_what_it_eliminates(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(dtype=torch.float32), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    eliminated(model)
    for part in (model, model.get_base_model()):
        assert peft_kernels.elimination.model.config_of(part).keep_ratio == 0.5
    copied = copy.deepcopy(model.get_base_model())
    elimination.remove(copied)
    assert peft_kernels.elimination.model.config_of(copied) is None
