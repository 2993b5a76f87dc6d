"""`finetune --method s2ft`: alone, beside a plain PaCA, LoRA and full fine-tuning, interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_kernels as pk
from peft_kernels import channels, slices
from peft_kernels.channels import Slice
from peft_kernels.training.data import BlockStream, read_corpus
from peft_kernels.training.models import byte_tokenizer
from peft_kernels.training.settings import started

from .conftest import TINY, Invoke
from .runs import assert_same_run, losses_of, state_of, stop_after
from .test_finetune import base_model, metrics

S2FT = [*TINY, "--method", "s2ft", "--sample-tokens", "0"]
COUPLED = ["--ratios", "q=0.3,k=0.5,v=0.5,o=0.3,up=0.1,gate=0.1,down=0.1", "--co-permute"]


def calibration(count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches that a `TINY` run trains on."""
    tokenizer = byte_tokenizer()
    stream = BlockStream(read_corpus(None, tokenizer), tokenizer, 32, 0)
    for index in range(count):
        batch = stream.batch(index, 2)
        yield {"input_ids": batch, "labels": batch}


def written_channels(output: Path) -> dict[str, Slice]:
    """The channels in a run's adapter."""
    adapter = slices.read(output / "adapter", base_model())
    return {path: update.slice for path, update in adapter.items()}


def same(first: dict[str, Slice], second: dict[str, Slice]) -> bool:
    """Whether two choices are one."""
    return first.keys() == second.keys() and all(
        torch.equal(first[path].indices, second[path].indices) and first[path].dim == second[path].dim for path in first
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--ratios", "o=0.3,down=0.1", "--lr", "1e-2", "--weight-decay", "0.1", "--gradient-accumulation", "2"],
        COUPLED,
        ["--ratio", "0.2", "--target-modules", "q_proj,up_proj", "--dim", "output", "--gradient-checkpointing"],
    ],
    ids=["by role", "coupled", "any layer"],
)
def test_ours_follows_the_loss_curve_of_a_plain_paca(options: list[str], invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *S2FT, *options, "--compare", "paca", "--steps", 4, "--output", output)
    assert result.exit_code == 0, result.output
    losses = losses_of(output)
    assert losses["peft-kernels"] == pytest.approx(losses["plain PaCA"], rel=1e-5)
    assert metrics(output)["largest_relative_loss_difference"] < 1e-5
    (ours,) = output.glob("checkpoints/*/peft-kernels.adapter.safetensors")
    (plain,) = output.glob("checkpoints/*/plain PaCA.adapter.safetensors")
    expected = {name.replace("partial", "trainable"): value for name, value in load_file(plain).items()}
    torch.testing.assert_close(load_file(ours), expected, rtol=1e-4, atol=1e-6)
    adapter = slices.read(output / "adapter", base_model())
    assert all(float(update.change.abs().max()) > 1e-3 for update in adapter.values())


def test_a_gpt2_follows_a_plain_paca_too(invoke: Invoke, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=512, **sizes)).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    options = ["--ratios", "q=0.3,o=0.3,up=0.1,down=0.1", "--co-permute", "--lr", "1e-2", "--compare", "paca"]
    output = tmp_path / "run"
    result = invoke(
        "finetune", *S2FT, *options, "--model", tmp_path / "gpt2", "--steps", 4, "--seed", 3, "--output", output
    )
    assert result.exit_code == 0, result.output
    losses = losses_of(output)
    assert losses["peft-kernels"] == pytest.approx(losses["plain PaCA"], rel=1e-5)
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    adapter = slices.read(output / "adapter", base)
    assert {path.rpartition(".")[2] for path in adapter} == {"c_attn", "c_fc", "c_proj"}
    assert all(float(update.change.abs().max()) > 1e-3 for update in adapter.values())


@pytest.mark.parametrize(("compare", "other"), [("peft", "PEFT LoRA"), ("full", "full fine-tuning")])
def test_another_method_starts_from_the_same_function(compare: str, other: str, invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*COUPLED, "--compare", compare, "--steps", 3]
    options += ["--r", 2, "--lora-alpha", 8] if compare == "peft" else []
    result = invoke("finetune", *S2FT, *options, "--output", output)
    assert result.exit_code == 0, result.output
    losses = losses_of(output)
    assert losses["peft-kernels"][0] == pytest.approx(losses[other][0], rel=1e-5)
    assert losses["peft-kernels"][2] != losses[other][2]
    record = metrics(output)
    assert record["largest_relative_loss_difference"] is None
    trained = {name: arm["summary"]["trained_parameters"] for name, arm in record["arms"].items()}
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]
    lora = 2 * sum(2 * (rows + columns) for rows, columns in shapes)
    assert trained[other] == (lora if compare == "peft" else sum(p.numel() for p in base_model().parameters()))
    assert record["arms"]["peft-kernels"]["summary"]["optimizer_bytes"] == sum(
        2 * 4 * load.numel() + 4
        for load in load_file(next(output.glob("checkpoints/*/peft-kernels.adapter.safetensors"))).values()
    )
    page = (output / "report.html").read_text()
    assert "They train different things" in page
    assert "slices.to_lora(slices.read(" in page and "PeftModel" not in page


def test_the_written_adapter_loads_here_and_as_lora_in_peft(invoke: Invoke, tmp_path: Path) -> None:
    from peft import PeftModel

    output = tmp_path / "run"
    assert invoke("finetune", *S2FT, *COUPLED, "--steps", 3, "--output", output).exit_code == 0
    ours, tokens = base_model(), torch.arange(12)[None]
    plain = ours(input_ids=tokens).logits
    pk.load_adapter(ours, output / "adapter")
    logits = ours(input_ids=tokens).logits
    assert not torch.allclose(logits, plain, atol=1e-4)
    slices.to_lora(slices.read(output / "adapter", base_model()), tmp_path / "lora")
    theirs = PeftModel.from_pretrained(base_model(), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["activation", "weight_activation", "gradient"])
def test_channels_are_chosen_by_the_first_batches(selection: str, invoke: Invoke, tmp_path: Path) -> None:
    options = ["--selection", selection, "--smallest", "--budget", "per_layer", "--calibration-batches", 3]
    options += ["--ratios", "o=0.5, down=0.1"]
    result = invoke("finetune", *S2FT, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    model, found = base_model(), written_channels(tmp_path / "run")
    statistics: dict[str, Any] = {}
    if selection == "gradient":
        statistics["gradients"] = channels.collect_gradients(model, calibration(3))
    else:
        statistics["activations"] = channels.collect_activations(model, calibration(3))
    ratios = {"o": 0.5, "down": 0.1}
    chosen = {
        largest: channels.select(
            model, ratios, selection=selection, largest=largest, budget="per_layer", **statistics
        ).slices
        for largest in (False, True)
    }
    assert same(found, chosen[False])
    assert not same(found, chosen[True])


@pytest.mark.parametrize(
    "options",
    [
        ["--compare", "paca"],
        ["--selection", "gradient", "--calibration-batches", "2", *COUPLED, "--gradient-accumulation", "2"],
        ["--dtype", "bfloat16", "--ratio", "0.1", "--adapter-dtype", "model", "--compare", "full"],
    ],
    ids=["random", "calibrated and co-permuted", "bfloat16"],
)
def test_a_stopped_run_leaves_an_adapter_and_continues_to_the_same_bits(
    options: list[str], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*S2FT, *options, "--steps", "5", "--save-every", "2"]
    result = invoke("finetune", *options, "--output", whole)
    assert result.exit_code == 0, result.output

    stop_after(3, monkeypatch)
    result = invoke("finetune", *options, "--output", halved)
    assert result.exit_code == 130, result.output
    assert f"The adapter is in {halved / 'adapter'}" in result.output
    monkeypatch.undo()
    assert pk.load_adapter(base_model().to(torch.bfloat16), halved / "adapter") is not None
    assert state_of(halved)["step"] == 3

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a run that continues has its channels")

    monkeypatch.setattr(channels, "collect_gradients", refuse)
    monkeypatch.setattr(channels, "select", refuse)
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert "Resuming after step 3 of 5" in result.output
    assert_same_run(halved, whole)


def test_ratios_default_to_the_configurations() -> None:
    assert started({"method": "s2ft"}).ratios == "o=0.05,down=0.03"
    assert started({"method": "s2ft", "ratio": 0.1}).ratios is None
    assert started({"method": "s2ft"}).selection == "random"
    assert started({"method": "sparse_delta"}).selection == "rigl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "o:0.1"], "--ratios must be like o=0.05,down=0.03, got 'o:0.1' in it"),
        (["--ratios", " , "], "--ratios must be like o=0.05,down=0.03, got ' , '"),
        (["--ratios", "w=0.1"], "--ratios must name roles of q, k, v, o, up, gate, down, got 'w'"),
        (["--ratios", "o=0.1,o=0.2"], "--ratios must name each role once, got o twice"),
        (["--ratios", "o=1.5"], "--ratios must give shares in (0, 1], got o=1.5"),
        (["--ratios", "o=nan"], "--ratios must give shares in (0, 1], got o=nan"),
        (["--ratio", "0"], "--ratio must be in (0, 1], got 0.0"),
        (["--ratio", "0.1", "--ratios", "o=0.1"], "give one of them"),
        (["--ratio", "0.1", "--selection", "gradient"], "--selection gradient needs --ratios"),
        (["--ratio", "0.1", "--co-permute"], "--co-permute needs --ratios"),
        (["--ratio", "0.1", "--budget", "per_layer"], "--budget needs --ratios"),
        (["--dim", "output"], "--dim output needs --ratio"),
        (["--smallest"], "--smallest needs a --selection by a norm, got random"),
        (["--calibration-batches", "2", "--selection", "weight"], "--calibration-batches needs --selection activation"),
        (["--calibration-batches", "0"], "--calibration-batches must be at least 1, got 0"),
        (["--selection", "rigl"], "--selection must be one of random, weight, activation"),
        (["--budget", "layer"], "--budget must be one of global, per_layer"),
        (["--density", "0.1"], "--density belongs to --method sparse_delta; this run has --method s2ft"),
        (["--r", "8"], "--r belongs to --method lora or sparse_delta; this run has --method s2ft"),
        (["--rho", "0.1"], "--rho belongs to --method greentrainer; this run has --method s2ft"),
        (["--compare", "shira"], "--compare shira goes with --method sparse_delta; this run has s2ft"),
        (["--method", "lora", "--ratios", "o=0.1"], "--ratios belongs to --method s2ft; this run has --method lora"),
        (["--method", "lora", "--selection", "random"], "--selection belongs to --method sparse_delta or s2ft"),
        (["--method", "lora", "--compare", "paca"], "--compare paca goes with --method s2ft; this run has lora"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *S2FT, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_a_share_of_layers_that_are_not_there_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("finetune", *S2FT, "--target-modules", "down_proj", "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "the adapter cannot be added to this model: ratios asks for o, but layers have none" in result.output


def test_a_checkpoint_with_damaged_channels_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *S2FT, "--steps", 1, "--output", output).exit_code == 0
    (path,) = output.glob("checkpoints/*/peft-kernels.channels.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    result = invoke("finetune", "--resume", "--steps", 2, "--output", output)
    assert result.exit_code == 2
    assert f"{path} cannot be read" in " ".join(result.output.split())
    assert json.loads((output / "metrics.json").read_text())["settings"]["steps"] == 1
