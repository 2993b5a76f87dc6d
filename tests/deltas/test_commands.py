"""`peft-kernels delta`: from checkpoints to deltas, merged, and into checkpoints; messages and exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from peft_kernels import deltas
from peft_kernels.cli import app

from ..support.accuracy import assert_same_bits
from .test_checkpoints import adapter, tuned_from, weights, write_sharded, write_single


def call(*arguments):
    return CliRunner().invoke(app, ["delta", *map(str, arguments)], catch_exceptions=False)


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def models(tmp_path):
    """A base and two fine-tuned models; the second is sharded."""
    base = weights()
    write_single(tmp_path / "base", base)
    write_single(tmp_path / "one", tuned_from(base))
    write_sharded(tmp_path / "two", tuned_from(base, share=0.6))
    return tmp_path


def test_from_end_to_end(models):
    base, one = models / "base", models / "one"
    assert "3 tensors" in done("extract", base, one, "--output", models / "one.delta")
    done("apply", base, models / "one.delta", "--output", models / "again")
    for name, tensor in load_file(one / "model.safetensors").items():
        assert_same_bits(load_file(models / "again" / "model.safetensors")[name], tensor)
    done("extract", base, models / "two", "-o", models / "two.delta", "--density", 0.3, "--scope", "global")
    files = (models / "one.delta", models / "two.delta", "-o", models / "merged.delta")
    options = ("--method", "ties", "--density", 0.5, "--drop", 0.25, "--seed", 3, "-w", 1, "-w", 0.5)
    output = done("merge", *files, *options)
    assert "ties(weights=[1.0, 0.5])" in output and "2: dare(p=0.25, seed=4)" in output
    with deltas.DeltaFile(models / "one.delta") as left, deltas.DeltaFile(models / "two.delta") as right:
        parts = [deltas.dare(left, 0.25, seed=3), deltas.dare(right, 0.25, seed=4)]
        expected = deltas.ties(parts, density=0.5, weights=[1.0, 0.5])
        for name, entry in deltas.DeltaFile(models / "merged.delta").items():
            assert_same_bits(entry.dense(), expected[name].dense())
    done("apply", base, models / "merged.delta", "-o", models / "result", "--weight", 0.7)
    done("apply", models / "two", models / "merged.delta", "-o", models / "minus", "--subtract")
    assert len(list((models / "minus").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "linear", "--density", 0.2, "--outliers", 0.01),
        ("--method", "pcb", "--density", 0.2, "--scope", "global"),
        ("--beta", 0.8, "--gamma", 0.02),
        ("--dtype", "bfloat16"),
    ],
)
def test_methods(models, options):
    for name in ("one", "two"):
        done("extract", models / "base", models / name, "-o", models / f"{name}.delta")
    done("merge", models / "one.delta", models / "two.delta", "-o", models / "merged.delta", *options)
    with deltas.DeltaFile(models / "merged.delta") as merged:
        assert sum(entry.nnz for entry in merged.values()) > 0


def test_a_lora_adapter(tmp_path):
    adapter(tmp_path)
    done(
        "extract", tmp_path / "base.safetensors", tmp_path / "adapter", "-o", tmp_path / "lora.delta", "--density", 0.1
    )
    with deltas.DeltaFile(tmp_path / "lora.delta") as delta:
        assert [delta.nnz(name) for name in delta] == [96, 96]


def test_info(models):
    done("extract", models / "base", models / "one", "-o", models / "one.delta", "--base-model", "someone/tiny")
    text = done("info", models / "one.delta", "--check")
    assert "someone/tiny" in text and "model.norm.weight" in text and "bfloat16" in text
    content = json.loads(done("info", models / "one.delta", "--json"))
    assert content["base_model"] == "someone/tiny"
    assert content["tensors"]["model.layer.weight"]["shape"] == [24, 24]


def test_different_base_models_are_a_warning(models):
    for name in ("one", "two"):
        done("extract", models / "base", models / name, "-o", models / f"{name}.delta", "--base-model", name)
    output = done("merge", models / "one.delta", models / "two.delta", "-o", models / "merged.delta")
    assert "Warning: deltas of different base models: one, two" in output


def test_an_existing_output_is_kept_unless_told_otherwise(models):
    extract = ("extract", models / "base", models / "one", "-o", models / "one.delta")
    done(*extract)
    before = (models / "one.delta").read_bytes()
    result = call(*extract, "--density", 0.1)
    assert result.exit_code == 2
    assert "exists already; add --overwrite" in result.output
    assert (models / "one.delta").read_bytes() == before
    done(*extract, "--density", 0.1, "--overwrite")
    assert (models / "one.delta").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nothing.delta"), "nothing.delta is not a file"),
        (("info", "base/model.safetensors"), "is not a delta: its format must be peft_kernels.delta, got 'pt'"),
        (("extract", "nowhere", "one", "-o", "x"), "nowhere does not exist"),
        (("extract", "base", "one", "-o", "x", "--density", "2"), "density must be in [0, 1], got 2.0"),
        (("merge", "one.delta", "-o", "x", "--method", "pcb"), "--method pcb needs --density"),
        (("merge", "one.delta", "-o", "x", "--outliers", "0.1"), "--outliers needs --density"),
        (("merge", "one.delta", "-o", "x", "-w", "1", "-w", "2"), "weights must be as many as deltas, 1, got 2"),
        (("merge", "one.delta", "-o", "x", "--drop", "1"), "p must be in [0, 1), got 1.0"),
        (("apply", "other", "one.delta", "-o", "x"), "the delta changes model.embed.weight, which"),
        (("merge", "broken.delta", "-o", "x"), "is not whole"),
    ],
)
def test_messages(models, monkeypatch, arguments, message):
    monkeypatch.chdir(models)
    done("extract", "base", "one", "-o", "one.delta")
    (models / "broken.delta").write_bytes((models / "one.delta").read_bytes()[:-5])
    (models / "other").mkdir()
    save_file({"w": torch.ones(3)}, models / "other" / "model.safetensors")
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: ") and message in result.output
    assert not (models / "x").exists()
