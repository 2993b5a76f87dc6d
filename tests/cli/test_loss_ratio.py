"""`finetune --loss-ratio`: beside a run on all tokens, against the parts it is made of, resumed, refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import peft_kernels as pk
from peft_kernels.training import arms, methods, selective_loss
from peft_kernels.training.errors import UserError
from peft_kernels.training.models import LoadedModel, load_model
from peft_kernels.training.settings import started

from .conftest import TINY, Invoke
from .runs import assert_same_run, losses_of, stop_after
from .test_finetune import metrics

RUN = [*TINY, "--sample-tokens", "0"]
REFERENCE = ["--reference-model", "random:llama-tiny"]
CPU = torch.device("cpu")


def test_a_run_on_all_tokens_goes_beside(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*REFERENCE, "--loss-ratio", "0.25", "--compare", "dense", "--steps", 3, "--output", output]
    result = invoke("finetune", *RUN, *options)
    assert result.exit_code == 0, result.output
    record, losses = metrics(output), losses_of(output)
    assert record["largest_relative_loss_difference"] is None
    assert record["chunked_loss"] == {"peft-kernels": True, "peft-kernels dense": False}
    # Those that gained least: their loss stays behind the mean of all.
    assert losses["peft-kernels"][-1] > losses["peft-kernels dense"][-1]
    flat = " ".join(result.output.split())
    assert "trains on the 25% of each batch's tokens whose loss exceeds that of random:llama-tiny most" in flat
    assert "the other without selecting tokens for the loss" in flat
    assert "loss on 0.25 of the tokens" in (output / "report.html").read_text()


def test_the_whole_ratio_trains_as_dense(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*REFERENCE, "--loss-ratio", "1", "--compare", "dense", "--steps", 3, "--output", output]
    assert invoke("finetune", *RUN, *options).exit_code == 0
    losses = losses_of(output)
    assert losses["peft-kernels"] == pytest.approx(losses["peft-kernels dense"], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "s2ft", "sparse_delta"])
def test_the_reference_stays_as_it_is_whatever_trains(method: str) -> None:
    settings = started({"method": method, "seq_len": 32, "loss_ratio": 0.3, "reference_model": "the same"})
    model = load_model("random:llama-tiny", torch.float32, CPU).model
    batch = torch.randint(0, 256, (2, 32))
    reference = copy.deepcopy(model)
    base = pk.causal_lm_token_losses(reference.eval(), batch, batch)
    (arm,), _ = methods.build_arms(model, settings, lambda count: (), reference=reference)
    for _ in range(2):
        arms.loss_of(arm, batch).backward()
        for group in arm.optimizer.param_groups:
            group["lr"] = 0.1
        arm.optimizer.step()
        arm.optimizer.zero_grad()
    trained = pk.causal_lm_token_losses(arm.model, batch, batch)
    assert (trained - base).abs().max() > 0.01
    assert arm.selective_loss is not None
    torch.testing.assert_close(pk.causal_lm_token_losses(arm.selective_loss.reference, batch, batch), base)
    mask = pk.select_excess_tokens(trained, base, 0.3, batch, shift=True)
    torch.testing.assert_close(arms.loss_of(arm, batch).detach(), trained[mask].mean())
    held_out = arms.held_out_loss(arm, batch.int(), 2, CPU)
    assert held_out == pytest.approx(trained[:, 1:].mean().item(), rel=1e-5)


def test_a_stopped_run_continues_to_the_same_bits(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*RUN, "--loss-ratio", "0.5", "--lora-dropout", "0.1", "--steps", "4", "--save-every", "2"]
    options += ["--token-elimination", "0.5", "--token-block-size", "8", "--token-layers", "1"]
    options += REFERENCE
    assert invoke("finetune", *options, "--output", whole).exit_code == 0
    stop_after(2, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert_same_run(halved, whole)
    assert "the pass through random:llama-tiny" in " ".join(result.output.split())
    result = invoke("finetune", "--resume", "--loss-ratio", 0.4, "--output", halved)
    assert "--loss-ratio 0.4: the run was started with --loss-ratio 0.5" in result.output


def test_a_reference_with_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_model("random:llama-tiny", torch.float32, CPU)
    other = load_model("random:llama-tiny", torch.float32, CPU)
    other.tokenizer.add_tokens(["another"])
    monkeypatch.setattr(selective_loss, "load_model", lambda *_: LoadedModel(other.model, other.tokenizer, "", False))
    settings = started({"loss_ratio": 0.5, "reference_model": "other"})
    with pytest.raises(UserError, match="--reference-model other: its tokenizer has other tokens than that of --model"):
        selective_loss.load_reference(settings, base, CPU)


def test_a_reference_whose_loss_is_another_is_refused() -> None:
    settings = started({"loss_ratio": 0.5, "reference_model": "another"})
    model = load_model("random:llama-tiny", torch.float32, CPU).model
    reference = load_model("random:llama-tiny", torch.float32, CPU).model
    reference.config.logits_scaling = 8.0
    with pytest.raises(UserError, match="--loss-ratio does not fit the reference model: it changes its logits"):
        methods.build_arms(model, settings, lambda count: (), reference=reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss-ratio", "0"], "--loss-ratio must be in (0, 1], got 0.0"),
        (["--loss-ratio", "nan"], "--loss-ratio must be in (0, 1], got nan"),
        (["--loss-ratio", "0.5"], "--loss-ratio needs --reference-model, one that has learned what is to be learned"),
        (["--reference-model", "smollm2"], "--reference-model needs --loss-ratio"),
        ([*REFERENCE, "--loss-ratio", "0.5", "--no-chunked-loss"], "leave --no-chunked-loss out"),
        (["--loss-ratio", "0.5", "--method", "lisa"], "--loss-ratio belongs to --method lora, sparse_delta or s2ft"),
        (
            [*REFERENCE, "--loss-ratio", "0.5", "--target-modules", "lm_head"],
            "--loss-ratio does not fit this model: its output layer",
        ),
        (
            ["--loss-ratio", "0.5", "--reference-model", "./no/model"],
            "--reference-model cannot be loaded as a model (--model ./no/model: no such directory)",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: list[str], message: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", *TINY, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
