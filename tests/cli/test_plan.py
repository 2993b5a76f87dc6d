"""`peft-kernels plan`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from peft_kernels.cli import app
from peft_kernels.plan_command import parse_size, size_text

CONFIG = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_parts_and_lengths_are_printed(directory):
    done = plan("--model", str(directory), "--seq-len", "8192", "--keep", "0.5", "--gpu-memory", "24GiB")
    assert done.exit_code == 0, done.output
    for text in ("1,236M parameters", "activations: MLP", "in all", "fits into 22.80 GiB of 24GiB", "checkpointing"):
        assert text in done.output
    assert "4096 of 8192 tokens in 13 layers" in " ".join(done.output.split())


def test_json_says_the_same(directory):
    arguments = ("--model", str(directory / "config.json"), "--json", "--keep-attention", "0.5")
    record = json.loads(plan(*arguments).output)
    assert record["total_bytes"] == sum(component["bytes"] for component in record["components"])
    assert record["usable_bytes"] == int(80 * 2**30 * 0.95)
    assert (record["step"]["keep_attention"], record["step"]["keep_mlp"]) == (0.5, 1.0)
    kept = [row["seq_len"] for row in record["longest_sequence"] if not row["checkpointing"]]
    assert kept[1] > kept[0] > 0


def test_what_does_not_fit_is_said(directory):
    done = plan("--model", str(directory), "--gpu-memory", "1GiB")
    assert done.exit_code == 0
    assert "does not fit into" in done.output and "does not fit" in done.output.splitlines()[-3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nowhere"), "--model ./nowhere: no such file or directory"),
        (("--model", "random:llama-none"), "random models are"),
        (("--model", "random:llama-tiny", "--gpu-memory", "much"), "--gpu-memory must be a size such as 80GiB"),
        (("--model", "random:llama-tiny", "--keep", "2"), "keep_attention must be in [0, 1], got 2.0"),
        (("--model", "random:llama-tiny", "--reserve", "1"), "--reserve must be in [0, 1)"),
    ],
)
def test_wrong_input_is_one_message(arguments, message):
    done = plan(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    assert "holds no configuration" in plan("--model", str(tmp_path)).output
    (tmp_path / "config.json").write_text("{}")
    assert "hidden_size is missing" in plan("--model", str(tmp_path)).output
    (tmp_path / "config.json").write_text("{")
    done = plan("--model", str(tmp_path))
    assert done.exit_code == 2 and "Error:" in done.output


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5MiB", 3 * 2**19), ("77", 77), ("3b", 3)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


def test_sizes_are_written():
    assert [size_text(n) for n in (5, 2048, 3 << 19, 5 << 29)] == ["5 B", "2.00 KiB", "1.50 MiB", "2.50 GiB"]
