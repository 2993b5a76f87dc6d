"""`peft-kernels predictor`: what it writes and prints, and what it refuses, in one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_kernels.elimination import Predictors

from .conftest import Invoke

TINY = ["--model", "random:llama-tiny", "--dtype", "float32", "--seq-len", "48"]
SMALL = ["--block-size", "8", "--rank", "6", "--size", "4", "--steps", "3", "--repeats", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand bytes, which are its tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number} of {number * number % 97}\n" for number in range(160)))
    return path


@pytest.fixture(scope="module")
def trained(invoke: Invoke, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of predictors, with what was printed beside it."""
    output = tmp_path_factory.mktemp("trained") / "predictors"
    result = invoke("predictor", "train", *TINY, *SMALL, "--data", text, "--output", output)
    assert result.exit_code == 0, result.output
    (output.parent / "printed.txt").write_text(result.output)
    return output


def test_training_writes_predictors_and_prints_recall(trained: Path) -> None:
    found = Predictors.load(trained)
    assert list(found) == [0, 1] and found.block_size == 8 and found.base_model == "random:llama-tiny"
    assert found[0].rank <= 6 and found[0].size == 4
    printed = (trained.parent / "printed.txt").read_text()
    for line in ("step 1/3  loss", "step 3/3  loss", "of 12 neurons", f"wrote {trained}", "mean", "held-out sequences"):
        assert line in printed


def test_a_report_of_the_same_text_repeats_what_training_printed(invoke: Invoke, trained: Path, text: Path) -> None:
    result = invoke("predictor", "report", trained, *TINY, "--data", text)
    assert result.exit_code == 0, result.output
    table = result.stdout[result.stdout.index(" layer") :]
    assert table in (trained.parent / "printed.txt").read_text()
    result = invoke("predictor", "report", trained, *TINY, "--data", text, "--json", "--keep", "0.25")
    values = json.loads(result.stdout)
    assert values["keep"] == 0.25 and [layer["index"] for layer in values["layers"]] == [0, 1]
    assert values["mean"]["random"] == pytest.approx(2 / 6)
    assert all(0 <= layer[name] <= 1 for layer in values["layers"] for name in ("predicted", "norm", "first"))


def test_another_model_is_warned_about(invoke: Invoke, trained: Path, text: Path, tmp_path: Path) -> None:
    found = Predictors.load(trained)
    found.base_model = "somebody/model"
    found.save(tmp_path)
    result = invoke("predictor", "report", tmp_path, *TINY, "--data", text)
    assert result.exit_code == 0
    assert "Warning: the predictors were trained on 'somebody/model', this is 'random:llama-tiny'" in result.stderr


def test_training_again_needs_overwrite(invoke: Invoke, trained: Path, text: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    command = ["predictor", "train", *TINY, *SMALL, "--data", text, "--output", trained]
    result = invoke(*command)
    assert result.exit_code == 2 and "holds predictors already; add --overwrite to replace them" in result.stderr
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    result = invoke(*command, "--overwrite")
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before  # the same seed


REFUSED = [
    (["--model", "random:llama-huge"], "random models are random:llama-tiny"),
    (["--data", "no-such-file.txt"], "--data no-such-file.txt: no such file or directory"),
    (["--dtype", "int4"], "--dtype must be one of float32, bfloat16, got 'int4'"),
    (["--device", "tpu"], "--device must be auto, cpu or cuda"),
    (["--keep", "1"], "--keep must be in (0, 1), got 1"),
    (["--lr", "nan"], "lr must be a positive number, got nan"),
    (["--block-size", "25"], "--seq-len must be at least two blocks of 25 tokens, got 48"),
    (["--seq-len", "1000"], "fewer than ten blocks of --seq-len 1000 tokens"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_bad_options_are_refused_in_one_line(
    options: list[str], message: str, invoke: Invoke, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new"
    result = invoke("predictor", "train", *TINY, *SMALL, "--data", text, *options, "--output", output)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and message in result.stderr
    assert "Traceback" not in result.stderr and not output.exists()


def test_output_that_is_a_file_and_predictors_that_are_none_are_refused(
    invoke: Invoke, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    result = invoke("predictor", "train", *TINY, *SMALL, "--data", text, "--output", tmp_path / "file")
    assert result.exit_code == 2 and "exists and is no directory" in result.stderr
    result = invoke("predictor", "report", tmp_path, *TINY, "--data", text)
    assert result.exit_code == 2 and "has no predictor_config.json" in result.stderr
