"""`peft-kernels thresholds`: what it writes and prints, that `finetune` and `inject` take it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_kernels as pk
from peft_kernels import elimination
from peft_kernels.training.models import load_model

from .conftest import TINY, Invoke
from .runs import stop_after
from .test_finetune import metrics

MODEL = ["--model", "random:llama-tiny", "--dtype", "float32"]
COMMAND = ["thresholds", *MODEL, "--seq-len", "48", "--block-size", "8", "--layers", "0,1", "--score", "norm"]
SMALL = ["--batches", "2", "--tolerance", "0.001", "--step", "0.2", "--max-evaluations", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand bytes, which are its tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number} of {number * number % 97}\n" for number in range(160)))
    return path


@pytest.fixture(scope="module")
def found(invoke: Invoke, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory of thresholds, and what was printed."""
    output = tmp_path_factory.mktemp("found") / "thresholds"
    result = invoke(*COMMAND, *SMALL, "--data", text, "--output", output)
    assert result.exit_code == 0, result.output
    return output, result


def test_it_writes_what_inject_takes_and_prints_a_row_for_each_layer(found: tuple[Path, Any]) -> None:
    output, result = found
    config, thresholds = pk.TokenEliminationConfig.load(output), elimination.Thresholds.load(output)
    assert config.threshold == dict(thresholds) and list(thresholds) == [0, 1] and config.layers == [0, 1]
    assert (config.score, config.block_size, config.keep_ratio) == ("norm", 8, None)
    model = load_model("random:llama-tiny", torch.float32, torch.device("cpu")).model
    pk.inject(model, config)
    for index, layer in enumerate(elimination.eliminating_layers(model).values()):
        assert layer.elimination.options.threshold == thresholds[index]
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["layer", "threshold", "kept", "loss", "change", "alone"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "all"]
    assert f"wrote {output}" in lines and "on held-out text: loss" in result.stdout
    assert "evaluation 1/8  loss" in result.stderr


def test_json_says_the_same(found: tuple[Path, Any], invoke: Invoke, text: Path, tmp_path: Path) -> None:
    result = invoke(*COMMAND, *SMALL, "--data", text, "--output", tmp_path, "--json")
    values = json.loads(result.stdout)
    rows = values["held_out"]["layers"]
    assert {str(row["index"]): row["threshold"] for row in rows} == json.loads(
        (found[0] / "token_elimination.json").read_text()
    )["threshold"], "the same seed finds the same"
    calibration = values["calibration"]
    assert calibration["loss"] <= 1.001 * calibration["loss_dense"] and calibration["evaluations"] <= 8
    assert all(0 < row["kept"] <= 1 for row in rows)


def test_finetune_takes_the_directory_and_continues_with_it(
    found: tuple[Path, Any], invoke: Invoke, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, output = tmp_path / "thresholds", tmp_path / "run"
    pk.TokenEliminationConfig.load(found[0]).save(copied)
    options = [*TINY, "--sample-tokens", 0, "--seq-len", 48, "--data", text, "--token-elimination", copied]
    options += ["--steps", 2, "--save-every", 1]
    stop_after(1, monkeypatch)
    assert invoke("finetune", *options, "--output", output).exit_code == 130
    monkeypatch.undo()
    other = pk.TokenEliminationConfig(threshold={0: -1.0, 1: 1.0}, layers=[0, 1], block_size=8)
    other.save(copied)
    result = invoke("finetune", "--resume", "--output", output)
    assert result.exit_code == 2 and "what it says is not what the run was started with" in result.stderr
    pk.TokenEliminationConfig.load(found[0]).save(copied)
    result = invoke("finetune", "--resume", "--output", output)
    assert result.exit_code == 0, result.output
    record = metrics(output)
    assert record["settings"]["token_elimination"] == str(copied)
    layers = record["token_elimination"]["layers"]
    assert all(layer["calls"] + sum(layer["dense_calls"].values()) == 2 for layer in layers)
    assert 0 < sum(layer["kept_tokens"] for layer in layers) < sum(layer["tokens"] for layer in layers)
    assert pk.TokenEliminationConfig.load(output / "adapter") == pk.TokenEliminationConfig.load(copied)


def test_output_that_is_taken_needs_overwrite(found: tuple[Path, Any], invoke: Invoke) -> None:
    result = invoke(*COMMAND, "--output", found[0])
    assert result.exit_code == 2 and "holds thresholds already; add --overwrite to replace them" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "-1"], "tolerance must be a number of at least 0, got -1"),
        (["--score", "random"], "--score must be one of attention, norm, got 'random'"),
        (["--layers", "one"], "--layers must be indices of layers separated by commas, got 'one'"),
        (["--layers", "5"], "layers must name layers of the model, which has 2, got 5"),
        (["--apply-to", "none"], "apply_to must be one of both, attention, mlp, got 'none'"),
        (["--block-size", "25"], "--seq-len must be at least two blocks of 25 tokens, got 48"),
        (["--keep", "0"], "keep must be in (0, 1], got 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, invoke: Invoke, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new"
    result = invoke(*COMMAND, *SMALL, "--data", text, *options, "--output", output)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and message in result.stderr and not output.exists()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, [], "must be a number, or a directory with a token_elimination.json, got"),
        ({"score": "gradient"}, [], "its score must be one of attention, norm, random here, got 'gradient'"),
        ({"train_only": False}, [], "it must have train_only, as evaluation is dense here"),
        ({"seed": 3}, [], "it must have no seed, as every step has its own here, got 3"),
        ({"block_size": 64}, [], "--seq-len must be at least two blocks of its 64 tokens"),
        ({"layers": [7]}, [], "layers must name layers of the model, which has 2, got 7"),
        ({"threshold": {1: 0.5}}, [], "threshold must be for the layers that select tokens, [0, 1], got [1]"),
        ({}, ["--token-score", "norm"], "--token-score is said by the directory of --token-elimination"),
        ({}, ["--token-keep-steps", "5"], "--token-keep-steps needs a ratio to begin with as --token-elimination"),
    ],
    ids=str,
)
def test_finetune_refuses_a_directory_that_does_not_fit(
    config: dict[str, Any] | None, options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    if config is not None:
        values = {"layers": [0, 1], "block_size": 8, "threshold": 0.1, **config}
        pk.TokenEliminationConfig(**values).save(tmp_path / "given")
    run = ["finetune", *TINY, "--steps", 1, "--output", tmp_path / "run"]
    result = invoke(*run, "--token-elimination", tmp_path / "given", *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
