"""`SparseDeltaConfig`: every field's errors, how entries are shared among layers, and what files it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels import SparseDeltaConfig

NAN = float("nan")
BAD = [
    (
        {"density": 0.1, "num_deltas": 5},
        "give one of density, num_deltas and lora_equivalent_rank, got density and num",
    ),
    ({"num_deltas": 5, "lora_equivalent_rank": 5}, "got num_deltas and lora_equivalent_rank"),
    *(({"density": value}, r"density must be in \(0, 1\], got") for value in (0, 0.0, -1, 1.5, NAN, "0.1", True)),
    *(
        ({name: value}, f"{name} must be an integer >= 1, got {value!r}")
        for name in ("num_deltas", "lora_equivalent_rank", "reselection_steps", "selection_accumulation_steps")
        for value in (0, -1, 2.0, "3", True)
    ),
    (
        {"selection_accumulation_steps": 21},
        "selection_accumulation_steps must be at most reselection_steps, 20, got 21",
    ),
    ({"reselection_steps": 4}, "selection_accumulation_steps must be at most reselection_steps, 4, got 5"),
    *(
        ({"initial_reselection_rate": value}, r"initial_reselection_rate must be in \[0, 1\], got")
        for value in (-0.1, 1.1, NAN, "0.2", None, True)
    ),
    ({"selection": "largest"}, "selection must be one of rigl, sm3, random, magnitude, fixed, got 'largest'"),
    ({"selection": None}, "selection must be one of"),
    ({"schedule": "step"}, "schedule must be one of linear, cosine, got 'step'"),
    ({"bias": "lora_only"}, "bias must be 'none' or 'all', got 'lora_only'"),
    ({"bias": "some"}, "bias must be 'none' or 'all', got 'some'"),
    ({"layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list of names"),
    ({"target_modules": ["a"], "layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SparseDeltaConfig(**options)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_are_lists_of_strings(name):
    with pytest.raises(TypeError, match=f"{name} must be a list of names"):
        SparseDeltaConfig(**{name: [1]})


def test_defaults():
    config = SparseDeltaConfig()
    assert (config.density, config.num_deltas, config.lora_equivalent_rank) == (0.01, None, None)
    assert (config.selection, config.schedule, config.initial_reselection_rate) == ("rigl", "linear", 0.2)
    assert (config.reselection_steps, config.selection_accumulation_steps) == (20, 5)
    assert SparseDeltaConfig(num_deltas=5).density is None
    assert replace(config) == config


SHAPES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4
)


@given(shapes=SHAPES, density=st.floats(0, 1, exclude_min=True))
def test_density_is_every_layer_s(shapes, density):
    for path, count in SparseDeltaConfig(density=density).counts(shapes).items():
        size = shapes[path][0] * shapes[path][1]
        assert count == max(1, int(size * density)) and 1 <= count <= size


def check_shares(counts, shapes, wanted):
    sizes = {path: rows * columns for path, (rows, columns) in shapes.items()}
    total = sum(sizes.values())
    for path, count in counts.items():  # in whole numbers: floats lose an entry here and there
        assert count == min(sizes[path], max(1, sizes[path] * wanted // total))
    if all(size * wanted >= total for size in sizes.values()):
        assert sum(counts.values()) <= wanted


@given(shapes=SHAPES, wanted=st.integers(1, 10**6))
def test_a_number_is_shared_by_size(shapes, wanted):
    check_shares(SparseDeltaConfig(num_deltas=wanted).counts(shapes), shapes, wanted)


@given(shapes=SHAPES, rank=st.integers(1, 300))
def test_a_rank_is_worth_as_many_as_lora_has(shapes, rank):
    wanted = rank * sum(rows + columns for rows, columns in shapes.values())
    check_shares(SparseDeltaConfig(lora_equivalent_rank=rank).counts(shapes), shapes, wanted)


@given(size=st.integers(1, 10**5), share=st.floats(0, 1))
@example(size=22, share=15.5 / 22)  # 15 / 22 * 22 is less than 15 in floating point
@example(size=26, share=15.5 / 26)
def test_one_layer_gets_the_whole_number(size, share):
    wanted = max(1, int(share * size))
    assert SparseDeltaConfig(num_deltas=wanted).counts({"": (1, size)}) == {"": wanted}


def test_a_layer_without_elements_gets_none():
    assert SparseDeltaConfig().counts({"a": (0, 5), "b": (10, 20)}) == {"a": 0, "b": 2}
    assert SparseDeltaConfig(num_deltas=3).counts({"a": (0, 5)}) == {"a": 0}


def test_a_dictionary_and_back():
    config = SparseDeltaConfig(num_deltas=5, selection="sm3", schedule="cosine", target_modules=["a"], bias="all")
    values = config.to_dict()
    assert values["peft_type"] == "SPARSE_DELTA"
    assert SparseDeltaConfig.from_dict(values) == config


def test_super_tuning_files():
    config = SparseDeltaConfig.from_dict({"peft_type": "SUPERTUNING", "sparsity": 0.75, "target_modules": ["a"]})
    assert (config.density, config.selection, config.target_modules) == (0.25, "magnitude", ["a"])
    assert SparseDeltaConfig.from_dict({"peft_type": "SUPERTUNING"}).density == pytest.approx(0.01)
    for sparsity in (1.0, -0.1, NAN, "0.9", None):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
            SparseDeltaConfig.from_dict({"peft_type": "SUPERTUNING", "sparsity": sparsity})
    with pytest.raises(ValueError, match="r=8 is not supported"):
        SparseDeltaConfig.from_dict({"peft_type": "SUPERTUNING", "sparsity": 0.9, "r": 8})


def test_another_kind_is_refused_and_unknown_options_are_warned_about():
    with pytest.raises(ValueError, match="peft_type must be 'SPARSE_DELTA' or 'SUPERTUNING' for a SparseDeltaConfig"):
        SparseDeltaConfig.from_dict({"peft_type": "LORA"})
    with pytest.warns(UserWarning, match=r"ignores options it does not know: \{'novelty': 3\}"):
        SparseDeltaConfig.from_dict({"novelty": 3, "old": None})
    with pytest.raises(ValueError, match="LoRA chooses no entries, so positions must be None"):
        pk.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), pk.LoraConfig(), positions={})
