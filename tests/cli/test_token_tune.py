"""`finetune --token-tune`: adapters beside a dense run, interrupted and resumed, its loss, refused options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peft_kernels as pk
from peft_kernels.training import arms, methods
from peft_kernels.training.models import load_model
from peft_kernels.training.settings import started

from .conftest import TINY, Invoke
from .runs import assert_same_run, losses_of, state_of, stop_after
from .test_finetune import metrics

TUNE = [*TINY, "--sample-tokens", "0", "--token-tune", "0.25"]


@pytest.mark.parametrize(
    "options",
    [
        ["--gradient-checkpointing", "--lora-dropout", "0.1"],
        ["--method", "s2ft", "--ratios", "o=0.3,down=0.1", "--token-score", "norm"],
    ],
    ids=["lora", "s2ft"],
)
def test_a_dense_run_of_the_same_adapter_goes_beside(options: list[str], invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *TUNE, *options, "--compare", "dense", "--steps", 2, "--output", output)
    assert result.exit_code == 0, result.output
    record = metrics(output)
    ours, dense = losses_of(output)["peft-kernels"], losses_of(output)["peft-kernels dense"]
    assert all(a != b for a, b in zip(ours, dense, strict=True))
    assert record["token_elimination"] is None and record["token_tune"]["kept_share"] == 0.25
    for layer in record["token_tune"]["layers"]:
        assert (layer["keep"], layer["calls"], layer["tokens"], layer["kept_tokens"]) == (0.25, 2, 128, 32)
        assert layer["score"] == ("norm" if "norm" in options else "random") and layer["dense_calls"] == {}
    assert record["chunked_loss"] == {"peft-kernels": True, "peft-kernels dense": False}
    flat = " ".join(result.output.split())
    assert "TokenTune: 2 of 2 decoder layers had gradients for 25.0% of the tokens in training" in flat
    assert "the other without selecting tokens" in flat
    page = (output / "report.html").read_text()
    assert "gradients for 0.25 of the tokens" in page and "TokenTuneReport: 2 of 2 decoder layers have" in page


def test_a_stopped_run_continues_to_the_same_bits(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*TUNE, "--steps", "4", "--save-every", "2"]
    result = invoke("finetune", *options, "--output", whole)
    assert result.exit_code == 0, result.output
    stop_after(2, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert_same_run(halved, whole)
    assert state_of(halved)["token_elimination"] == state_of(whole)["token_elimination"]
    assert metrics(halved)["token_tune"] == metrics(whole)["token_tune"]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_step_counts_the_labels_of_selected_tokens(chunked: bool) -> None:
    settings = started({"seq_len": 32, "token_tune": 0.25, "chunked_loss": chunked})
    model = load_model("random:llama-tiny", torch.float32, torch.device("cpu")).model
    (arm,), _ = methods.build_arms(model, settings, lambda count: ())
    assert arm.chunked_loss == chunked
    batch = torch.randint(0, 256, (2, 32))
    loss = arms.loss_of(arm, batch)
    counted = pk.elimination.selected_labels(model)
    assert counted is not None and 14 <= int(counted.sum()) <= 16
    model.eval()
    expected = model(input_ids=batch, labels=batch.masked_fill(~counted, -100)).loss
    torch.testing.assert_close(loss, expected)
    held_out = arms.held_out_loss(arm, batch.int(), 2, torch.device("cpu"))
    assert held_out == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-tune", "0"], "--token-tune must be in (0, 1], got 0.0"),
        (["--token-tune", "0.99"], "--token-tune 0.99 of --seq-len 32, rounded up, is all of it"),
        (["--token-tune", "0.5", "--token-elimination", "0.5"], "both what becomes of a token; give one of them"),
        (["--token-tune", "0.5", "--token-block-size", "8"], "--token-block-size needs --token-elimination"),
        (["--token-tune", "0.5", "--token-select-every", "2"], "--token-select-every needs --token-elimination"),
        (["--token-tune", "0.5", "--token-layers", "7"], "layers must name layers of the model, which has 2, got 7"),
        (["--token-tune", "0.5", "--method", "lisa"], "--token-tune belongs to --method lora, sparse_delta or s2ft"),
        (["--token-score", "norm"], "--token-score needs --token-elimination or --token-tune, which says how much"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *TINY, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
