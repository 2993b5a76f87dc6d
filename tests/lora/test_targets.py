"""Which layers a configuration names: the same ones as PEFT, whose own rules are the reference."""

from __future__ import annotations

import pytest

import peft_kernels as pk
from peft_kernels import targets

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.3.down_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.xq_proj",
    "encoder.h.1.q_proj",
    "q_proj",
    "classifier",
    "model.classifier.dense.q_proj",
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "down_proj"]},
        {"target_modules": r".*layers\.\d+\.self_attn\.(x)?q_proj"},
        {"target_modules": r"q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0\..*"},
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 3]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]},
        {"target_modules": ["q_proj", "classifier"], "layers_to_transform": []},
    ],
)
def test_matching_is_peft_s(options):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    theirs, ours = peft.LoraConfig(**options), pk.LoraConfig(**options)
    for path in PATHS:
        expected = bool(tuners.check_target_module_exists(theirs, path))
        assert (targets.exclusion(ours, path) is None and targets.is_target(ours, path)) == expected, path


@pytest.mark.parametrize("pattern", ["q_proj", "layers.1.self_attn.q_proj", "^q_proj", r"layers\.\d\.mlp.*", "nothing"])
def test_patterns_match_as_peft_s(pattern):
    other = pytest.importorskip("peft.utils.other")
    for path in PATHS:
        expected = other.get_pattern_key([pattern], path) == pattern
        assert (targets.pattern_value({pattern: 5}, path, 1) == 5) == expected, path


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["a.q", "b.q"], ["q"]),
        (["a.q", "b.k"], ["a.q", "b.k"]),
        (["q2"], ["q2"]),
        (["k"], "k"),
    ],
)
def test_resolved_names_mean_exactly_the_chosen_layers(wanted, expected):
    assert targets.names_for(wanted, ["a", "a.q", "a.k", "b", "b.q", "b.k", "k", "q2"]) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an integer >= 1, got 0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be a probability in \[0, 1\], got -0.1"),
        ({"bias": "some"}, ValueError, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
        (
            {"target_modules": 3},
            TypeError,
            "target_modules must be a list of names, a regular expression or None, got 3",
        ),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of names or None, got 'head'"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]: r must be an integer >= 1, got 0"),
        ({"alpha_pattern": {"q": None}}, ValueError, r"alpha_pattern\['q'\]: lora_alpha must be a finite number"),
        ({"layers_to_transform": [1]}, ValueError, "layers_to_transform needs target_modules as a list of names"),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            ValueError,
            "layers_pattern='h' needs layers_to_transform, got None",
        ),
        ({"use_dora": True}, ValueError, "use_dora=True is not supported: DoRA"),
        ({"fan_in_fan_out": True}, ValueError, "fan_in_fan_out=True is not supported: weights stored"),
        ({"trainable_token_indices": [1]}, ValueError, "trainable_token_indices=.1. is not supported"),
        (
            {"init_lora_weights": "olora"},
            ValueError,
            "init_lora_weights must be True, False or 'gaussian', got 'olora'",
        ),
    ],
)
def test_bad_configurations_are_named(options, error, message):
    with pytest.raises(error, match=message):
        pk.LoraConfig(**options)


def test_defaults_are_peft_s():
    peft = pytest.importorskip("peft")
    theirs, ours = peft.LoraConfig().to_dict(), pk.LoraConfig()
    assert {name: theirs[name] for name in vars(ours)} == vars(ours)


def test_dict_round_trip():
    config = pk.LoraConfig(r=3, target_modules={"b", "a"}, rank_pattern={"a": 5}, bias="all", task_type="SEQ_CLS")
    assert config.modules_to_save == ["classifier", "score"], "PEFT trains the head of these tasks"
    assert pk.LoraConfig.from_dict(config.to_dict()) == config


def test_peft_s_dict_is_read():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=3, target_modules=["b", "a"], use_rslora=True, task_type="CAUSAL_LM")
    ours = pk.LoraConfig.from_dict(theirs.to_dict())
    assert (ours.r, ours.target_modules, ours.use_rslora, ours.task_type) == (3, ["a", "b"], True, "CAUSAL_LM")


def test_an_unknown_option_that_is_on_warns_and_one_that_is_off_does_not(recwarn):
    pk.LoraConfig.from_dict({"peft_type": "LORA", "new_option": False, "other": None, "more": {}})
    assert not recwarn
    with pytest.warns(UserWarning, match="ignores options it does not know: {'new_option': 3}"):
        pk.LoraConfig.from_dict({"peft_type": "LORA", "new_option": 3})


def test_another_method_s_configuration_is_refused():
    with pytest.raises(ValueError, match="peft_type must be 'LORA' for a LoraConfig, got 'IA3'"):
        pk.LoraConfig.from_dict({"peft_type": "IA3"})
