"""`finetune --method lisa|hft|greentrainer`: parts of the model itself train, beside full fine-tuning, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_kernels import schedules
from peft_kernels.deltas import DeltaFile
from peft_kernels.training.arms import learning_rate
from peft_kernels.training.data import BlockStream, read_corpus
from peft_kernels.training.models import byte_tokenizer, load_model
from peft_kernels.training.settings import Settings, started

from .conftest import TINY, Invoke
from .runs import assert_same_run, losses_of, state_of, stop_after, tensors_of
from .test_finetune import base_model, metrics

PLAIN = [*TINY, "--sample-tokens", "0"]
METHODS = {
    "lisa": ["--method", "lisa", "--active-layers", "1", "--interval", "2"],
    "hft": ["--method", "hft", "--interval", "2", "--norms", "train", "--embeddings", "freeze"],
    "greentrainer": ["--method", "greentrainer", "--rho", "0.6", "--interval", "3"],
}
methods = pytest.mark.parametrize("method", METHODS)


def plain_loop(method: str | None, steps: int) -> tuple[list[float], torch.nn.Module]:
    """Losses and model of a run with `METHODS[method]`, or of full fine-tuning, written out."""
    settings = Settings(lr=3e-3, steps=steps)
    model, tokenizer = base_model().train(), byte_tokenizer()
    stream = BlockStream(read_corpus(None, tokenizer), tokenizer, 32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    schedule: Any = None
    if method == "lisa":
        schedule = schedules.LISA(model, optimizer, active_layers=1, interval=2)
    elif method == "hft":
        schedule = schedules.HFT(model, optimizer, interval=2, norms="train", embeddings="freeze")
    elif method == "greentrainer":
        schedule = schedules.GreenTrainer(model, optimizer, {"input_ids": stream.batch(0, 2)}, rho=0.6, interval=3)
    losses = []
    for step in range(steps):
        batch = stream.batch(step, 2)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses, model


@methods
def test_a_run_is_the_plain_loop_with_a_schedule_beside_one_without(
    method: str, invoke: Invoke, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = [*PLAIN, *METHODS[method], "--compare", "full", "--steps", 5]
    result = invoke("finetune", *options, "--output", output)
    assert result.exit_code == 0, result.output
    found, (losses, model) = losses_of(output), plain_loop(method, 5)
    assert found["peft-kernels"] == losses
    written = load_file(output / "model" / "model.safetensors")
    expected = dict(model.named_parameters())
    assert written.keys() == expected.keys()
    assert [name for name in written if not torch.equal(written[name], expected[name])] == []
    assert found["full fine-tuning"] == plain_loop(None, 5)[0]
    assert found["full fine-tuning"] != losses
    record = metrics(output)
    assert record["largest_relative_loss_difference"] is None
    ours, full = (record["arms"][name]["summary"] for name in ("peft-kernels", "full fine-tuning"))
    assert ours["optimizer_bytes"] < full["optimizer_bytes"]
    if method == "greentrainer":  # its evaluations compute every gradient
        assert ours["peak_bytes"] == full["peak_bytes"]
    else:
        assert ours["peak_bytes"] < full["peak_bytes"]
    assert (
        f"after 5 steps: {len(state_of(output)['schedules']['peft-kernels']['training'])} of"
        in (output / "report.html").read_text()
    )
    assert full["trained_parameters"] == ours["trained_parameters"] == sum(p.numel() for p in model.parameters())


@methods
def test_a_stopped_run_leaves_a_model_and_continues_to_the_same_bits(
    method: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*PLAIN, *METHODS[method], "--compare", "full", "--steps", "7", "--save-every", "2"]
    assert invoke("finetune", *options, "--output", whole).exit_code == 0

    stop_after(3, monkeypatch)  # within a period of lisa and hft, at the start of one of greentrainer
    result = invoke("finetune", *options, "--output", halved)
    monkeypatch.undo()
    assert result.exit_code == 130, result.output
    assert f"The model is in {halved / 'model'}" in result.output
    stopped = AutoModelForCausalLM.from_pretrained(halved / "model")
    (path,) = halved.glob("checkpoints/*/peft-kernels.adapter.safetensors")
    checkpoint = load_file(path)
    assert all(torch.equal(value, checkpoint[name]) for name, value in stopped.named_parameters())

    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert "Resuming after step 3 of 7" in result.output
    assert_same_run(halved, whole)
    assert sorted(path.name for path in halved.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_greentrainer_stopped_between_evaluations_continues_to_the_same_bits(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*PLAIN, *METHODS["greentrainer"], "--steps", "7", "--gradient-accumulation", "2", "--dtype", "bfloat16"]
    options += ["--gradient-checkpointing"]
    assert invoke("finetune", *options, "--output", whole).exit_code == 0
    stop_after(5, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    assert state_of(halved)["schedules"]["peft-kernels"]["evaluating"] is False
    assert invoke("finetune", "--resume", "--output", halved).exit_code == 0
    assert_same_run(halved, whole)


def test_full_fine_tuning_goes_beside_an_adapter_too(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *PLAIN, "--compare", "full", "--steps", 3, "--output", output)
    assert result.exit_code == 0, result.output
    assert losses_of(output)["full fine-tuning"] == plain_loop(None, 3)[0]
    assert (output / "adapter").is_dir() and not (output / "model").exists()


def test_the_written_model_can_be_trained_on_and_its_changes_extracted(invoke: Invoke, tmp_path: Path) -> None:
    base, output, again = tmp_path / "base", tmp_path / "run", tmp_path / "again"
    torch.manual_seed(0)
    loaded = load_model("random:llama-tiny", torch.float32, torch.device("cpu"))
    loaded.model.save_pretrained(base)
    loaded.tokenizer.save_pretrained(base)
    options = [*PLAIN, "--method", "hft", "--embeddings", "freeze", "--steps", 2]
    result = invoke("finetune", *options, "--model", base, "--output", output)
    assert result.exit_code == 0, result.output
    command = f"peft-kernels delta extract {base} {output / 'model'} -o changes.delta"
    assert command in " ".join(result.output.split())
    page = (output / "report.html").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("model")' in page.replace("&#34;", '"')
    assert json.loads((output / "model" / "config.json").read_text())["use_cache"] is True

    delta = tmp_path / "changes.delta"
    result = invoke("delta", "extract", base, output / "model", "-o", delta)
    assert result.exit_code == 0, result.output
    training = state_of(output)["schedules"]["peft-kernels"]["training"]
    with DeltaFile(delta) as changes:
        assert sorted(name for name in changes if changes[name].values.numel()) == sorted(training)

    result = invoke("finetune", *PLAIN, *METHODS["lisa"], "--model", output / "model", "--steps", 1, "--output", again)
    assert result.exit_code == 0, result.output


def test_an_interrupted_save_leaves_the_previous_model(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    output = tmp_path / "run"
    assert invoke("finetune", *PLAIN, *METHODS["lisa"], "--steps", 1, "--output", output).exit_code == 0
    before = tensors_of(output)

    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupted)
    assert invoke("finetune", "--resume", "--steps", 2, "--output", output).exit_code == 130
    after = tensors_of(output)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    monkeypatch.undo()
    assert invoke("finetune", "--resume", "--steps", 2, "--output", output).exit_code == 0
    assert sorted(path.name for path in output.glob("model*")) == ["model"]


def test_overwriting_removes_a_whole_model(invoke: Invoke, tmp_path: Path) -> None:
    options = ["--steps", 1, "--output", tmp_path / "run"]
    assert invoke("finetune", *PLAIN, *METHODS["hft"], *options).exit_code == 0
    assert invoke("finetune", *PLAIN, *options).exit_code == 2
    assert invoke("finetune", *PLAIN, *options, "--overwrite").exit_code == 0
    assert not (tmp_path / "run" / "model").exists()


def test_a_checkpoint_of_another_schedule_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *PLAIN, *METHODS["lisa"], "--steps", 1, "--output", output).exit_code == 0
    result = invoke("finetune", "--resume", "--interval", 3, "--output", output)
    assert result.exit_code == 2
    assert "--interval 3: the run was started with --interval 2" in result.output
    state = state_of(output)
    state["schedules"]["peft-kernels"]["settings"]["active_layers"] = 2
    next(output.glob("checkpoints/*/state.json")).write_text(json.dumps(state))
    result = invoke("finetune", "--resume", "--steps", 2, "--output", output)
    assert result.exit_code == 2
    assert "the schedule in it does not fit this run: state must have settings" in " ".join(result.output.split())


def test_defaults_are_the_methods_own() -> None:
    assert started({}).interval is None and started({}).dtype == "bfloat16"
    assert started({"method": "lisa"}).interval == 20 and started({"method": "lisa"}).active_layers == 2
    assert started({"method": "hft"}).interval is None and started({"method": "hft"}).norms == "half"
    assert started({"method": "greentrainer"}).interval == 100 and started({"method": "greentrainer"}).rho == 0.5
    for method in METHODS:
        assert (started({"method": method}).dtype, started({"method": method}).lr) == ("float32", 2e-5)
        assert started({"method": method, "lr": 1e-3, "dtype": "bfloat16"}).lr == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lisa", "--rho", "0.1"], "--rho belongs to --method greentrainer; this run has --method lisa"),
        (["--method", "hft", "--active-layers", "3"], "--active-layers belongs to --method lisa"),
        (["--method", "greentrainer", "--norms", "train"], "--norms belongs to --method hft"),
        (["--interval", "5"], "--interval belongs to --method lisa, hft or greentrainer; this run has --method lora"),
        (["--method", "lisa", "--r", "8"], "--r belongs to --method lora or sparse_delta; this run has --method lisa"),
        (["--method", "lisa", "--adapter-dtype", "model"], "--adapter-dtype belongs to --method lora, sparse_delta or"),
        (
            ["--method", "hft", "--target-modules", "q_proj"],
            "--target-modules belongs to --method lora, sparse_delta or",
        ),
        (["--method", "hft", "--compare", "peft"], "--compare peft goes with --method lora or s2ft; this run has hft"),
        (["--method", "lisa", "--interval", "0"], "--interval must be at least 1, got 0"),
        (["--method", "lisa", "--active-layers", "0"], "--active-layers must be at least 1, got 0"),
        (["--method", "greentrainer", "--rho", "0"], "--rho must be in (0, 1], got 0.0"),
        (["--method", "greentrainer", "--rho", "nan"], "--rho must be in (0, 1], got nan"),
        (["--method", "hft", "--norms", "some"], "--norms must be one of half, train, freeze, got 'some'"),
        (["--method", "hft", "--embeddings", "half"], "--embeddings must be one of train, freeze, got 'half'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *PLAIN, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lisa", "--active-layers", "3"], "active_layers must be at most the number of layers that train"),
        (["--method", "greentrainer", "--rho", "1e-6"], "rho must be at least"),
    ],
)
def test_what_the_model_is_too_small_for_is_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *PLAIN, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert f"--method {options[1]} does not fit this model: {message}" in result.output
