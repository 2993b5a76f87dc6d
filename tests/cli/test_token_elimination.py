"""`finetune --token-elimination`: every adapter, beside a dense run and PEFT, interrupted and resumed, refused."""

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

BLOCKS = ["--token-block-size", "8", "--token-layers", "0,1"]
HALF = [*TINY, "--sample-tokens", "0", "--token-elimination", "0.5", *BLOCKS]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "lora", "--lora-dropout", "0.1"],
        ["--method", "s2ft", "--ratios", "o=0.3,down=0.1", "--token-score", "norm"],
        ["--method", "sparse_delta", "--r", "2", "--token-score", "random", "--token-select-every", "2"],
        ["--method", "lora", "--gradient-checkpointing", "--token-score", "random"],
    ],
    ids=["lora", "s2ft", "sparse_delta", "checkpointing"],
)
def test_a_dense_run_of_the_same_adapter_goes_beside(options: list[str], invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *HALF, *options, "--compare", "dense", "--steps", 3, "--output", output)
    assert result.exit_code == 0, result.output
    record = metrics(output)
    ours, dense = losses_of(output)["peft-kernels"], losses_of(output)["peft-kernels dense"]
    assert all(a != b for a, b in zip(ours, dense, strict=True))
    assert record["largest_relative_loss_difference"] is None
    summaries = {name: arm["summary"] for name, arm in record["arms"].items()}
    assert len({summary["trained_parameters"] for summary in summaries.values()}) == 1
    assert summaries["peft-kernels"]["peak_bytes"] < summaries["peft-kernels dense"]["peak_bytes"]
    eliminated = record["token_elimination"]
    assert eliminated["kept_share"] == 0.5
    for layer in eliminated["layers"]:
        assert (layer["keep"], layer["calls"], layer["tokens"], layer["kept_tokens"]) == (0.5, 3, 192, 96)
        assert layer["dense_calls"] == {}
    assert record["chunked_loss"] == {"peft-kernels": True, "peft-kernels dense": False}
    flat = " ".join(result.output.split())
    assert "2 of 2 decoder layers computed for 50.0% of the tokens in training" in flat
    assert "the other without eliminating tokens" in flat
    page = (output / "report.html").read_text()
    assert "model.layers.1: keep=0.5 by" in page and "96 of 192 tokens kept" in page
    assert "50.0% of the tokens" in page


def test_keeping_everything_trains_as_dense_and_the_held_out_loss_is_of_all_tokens(
    invoke: Invoke, tmp_path: Path
) -> None:
    whole = [*TINY, "--sample-tokens", "0", *BLOCKS, "--compare", "dense", "--steps", 4]
    result = invoke("finetune", *whole, "--token-elimination", 1.0, "--output", tmp_path / "all")
    assert result.exit_code == 0, result.output
    losses = losses_of(tmp_path / "all")
    assert losses["peft-kernels"] == pytest.approx(losses["peft-kernels dense"], rel=1e-5)
    record = metrics(tmp_path / "all")
    assert record["token_elimination"]["kept_share"] == 1.0
    result = invoke("finetune", *whole, "--token-elimination", 0.5, "--output", tmp_path / "half")
    assert result.exit_code == 0, result.output
    # Before training the model is the same, and so is its loss where nothing is left out.
    assert metrics(tmp_path / "half")["before"]["held_out_loss"] == record["before"]["held_out_loss"]
    assert losses_of(tmp_path / "half")["peft-kernels dense"] == losses["peft-kernels dense"]


def test_the_loss_is_of_computed_tokens_unless_all_are_asked_for(invoke: Invoke, tmp_path: Path) -> None:
    losses = {}
    for name, options in {
        "computed": [],
        "computed, all logits": ["--no-chunked-loss"],
        "all": ["--token-loss", "all"],
    }.items():
        result = invoke("finetune", *HALF, *options, "--steps", 2, "--output", tmp_path / name)
        assert result.exit_code == 0, result.output
        losses[name] = losses_of(tmp_path / name)["peft-kernels"]
        assert ("those that most of them passed by left out" in " ".join(result.output.split())) == (name != "all")
    assert losses["computed, all logits"] == pytest.approx(losses["computed"], rel=1e-5)
    assert losses["all"][0] != pytest.approx(losses["computed"][0], rel=1e-4)


def test_peft_beside_trains_another_function_and_loads_what_is_written(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = invoke("finetune", *HALF, "--compare", "peft", "--steps", 2, "--output", output)
    assert result.exit_code == 0, result.output
    record = metrics(output)
    assert record["largest_relative_loss_difference"] is None
    ours = record["arms"]["peft-kernels"]["summary"]["held_out_loss"]
    assert record["held_out_loss_of_written_adapter_in_peft"] == pytest.approx(ours, rel=1e-5)
    assert record["chunked_loss"] == {"peft-kernels": True, "PEFT": False}
    assert pk.TokenEliminationConfig.load(output / "adapter").keep_ratio == 0.5


@pytest.mark.parametrize(
    "options",
    [
        ["--token-score", "random", "--lora-dropout", "0.1"],
        ["--compare", "dense", "--token-score", "norm", "--gradient-accumulation", "2"],
        ["--method", "s2ft", "--ratios", "o=0.3,down=0.1", "--compare", "dense"],
    ],
    ids=["random", "dense beside", "s2ft"],
)
def test_a_stopped_run_continues_to_the_same_bits_and_counts(
    options: list[str], invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*HALF, *options, "--steps", "4", "--save-every", "2"]
    result = invoke("finetune", *options, "--output", whole)
    assert result.exit_code == 0, result.output
    stop_after(2, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert_same_run(halved, whole)
    assert state_of(halved)["token_elimination"] == state_of(whole)["token_elimination"]
    assert metrics(halved)["token_elimination"] == metrics(whole)["token_elimination"]


def test_the_share_that_is_kept_grows_and_goes_on_growing_when_resumed(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    options = [*TINY, "--sample-tokens", 0, "--token-elimination", 0.25, "--token-keep-steps", 3, "--token-layers", "0"]
    options += ["--token-block-size", 1, "--token-score", "random", "--steps", 4, "--save-every", 1]
    assert invoke("finetune", *options, "--output", whole).exit_code == 0
    stop_after(2, monkeypatch)
    assert invoke("finetune", *options, "--output", halved).exit_code == 130
    monkeypatch.undo()
    result = invoke("finetune", "--resume", "--output", halved)
    assert result.exit_code == 0, result.output
    assert_same_run(halved, whole)
    state = state_of(halved)
    assert state["keep_schedules"] == state_of(whole)["keep_schedules"]
    assert state["keep_schedules"]["peft-kernels"]["completed_steps"] == 4
    (layer, _) = metrics(halved)["token_elimination"]["layers"]
    # Two sequences of 32 tokens: ratios of 1/4, 1/2, 3/4 and 1.
    assert (layer["keep"], layer["tokens"], layer["kept_tokens"]) == (1.0, 4 * 64, 16 + 32 + 48 + 64)
    page = (halved / "report.html").read_text()
    assert "0.25 of the tokens kept at first, all after 3 steps" in page
    assert "as many tokens as the run came to in the end" in page
    result = invoke("finetune", "--resume", "--token-keep-steps", 9, "--output", halved)
    assert result.exit_code == 2 and "--token-keep-steps 9: the run was started with" in result.stderr


def test_a_resumed_run_keeps_its_settings(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert invoke("finetune", *HALF, "--steps", 1, "--output", output).exit_code == 0
    for option, value, saved in (
        ("--token-elimination", 0.25, 0.5),
        ("--token-score", "norm", "attention"),
        ("--token-layers", "1", "0,1"),
    ):
        result = invoke("finetune", "--resume", option, value, "--output", output)
        assert result.exit_code == 2
        assert f"{option} {value}: the run was started with {option} {saved}" in result.output


def test_the_chunked_loss_is_the_models_own(invoke: Invoke, tmp_path: Path) -> None:
    losses = []
    for flag in ("--chunked-loss", "--no-chunked-loss"):
        output = tmp_path / flag
        result = invoke("finetune", *TINY, "--sample-tokens", 0, "--steps", 2, flag, "--output", output)
        assert result.exit_code == 0, result.output
        assert metrics(output)["chunked_loss"] == {"peft-kernels": flag == "--chunked-loss"}
        losses.append(losses_of(output)["peft-kernels"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [False]),
        ({"chunked_loss": True}, [True]),
        ({"token_elimination": 0.5}, [True]),
        ({"token_elimination": 0.5, "chunked_loss": False}, [False]),
        ({"token_elimination": 0.5, "compare": "dense"}, [True, False]),
        ({"token_elimination": 0.5, "compare": "dense", "chunked_loss": True}, [True, True]),
        ({"compare": "peft", "chunked_loss": True}, [True, False]),
    ],
)
def test_which_arms_form_their_loss_in_chunks(given: dict[str, object], expected: list[bool]) -> None:
    tokens = {"token_block_size": 8, "token_layers": "0,1"} if "token_elimination" in given else {}
    settings = started({"seq_len": 32, **tokens, **given})
    model = load_model("random:llama-tiny", torch.float32, torch.device("cpu")).model
    built, _ = methods.build_arms(model, settings, lambda count: ())
    assert [arm.chunked_loss for arm in built] == expected


def test_a_head_with_an_adapter_keeps_its_own_loss_and_the_run_says_so(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*HALF, "--target-modules", "q_proj,lm_head", "--steps", 1, "--output", output]
    result = invoke("finetune", *options)
    assert result.exit_code == 0, result.output
    assert metrics(output)["chunked_loss"] == {"peft-kernels": False}
    assert "The loss takes all logits: its output layer must be a plain nn.Linear" in " ".join(result.output.split())
    result = invoke("finetune", *options, "--chunked-loss", "--overwrite")
    assert result.exit_code == 2
    assert "--chunked-loss does not fit this model: its output layer must be" in " ".join(result.output.split())


def test_a_step_takes_part_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = started({"seq_len": 32, "token_elimination": 0.25, "token_block_size": 8, "token_layers": "1"})
    model = load_model("random:llama-tiny", torch.float32, torch.device("cpu")).model
    (arm,), _ = methods.build_arms(model, settings, lambda count: ())
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    batch = torch.randint(0, 256, (2, 32))
    arms.loss_of(arm, batch).backward()
    arms.held_out_loss(arm, batch.int(), 2, torch.device("cpu"))
    assert seen == [8, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-elimination", "0"], "--token-elimination must be in (0, 1], got 0.0"),
        (["--token-elimination", "1.5"], "--token-elimination must be in (0, 1], got 1.5"),
        (["--token-elimination", "nan"], "--token-elimination must be in (0, 1], got nan"),
        (["--token-elimination", "0.5"], "--token-block-size 64, rounded up, is all of it"),
        (["--token-elimination", "0.9", "--token-block-size", "8"], "0.9 of --seq-len 32 in blocks of"),
        (["--token-score", "norm"], "--token-score needs --token-elimination"),
        (["--token-block-size", "8"], "--token-block-size needs --token-elimination"),
        (["--token-select-every", "2"], "--token-select-every needs --token-elimination"),
        (["--token-layers", "1"], "--token-layers needs --token-elimination"),
        (["--token-loss", "all"], "--token-loss needs --token-elimination"),
        (["--token-keep-steps", "4"], "--token-keep-steps needs --token-elimination"),
        ([*HALF[-6:], "--token-keep-steps", "0"], "--token-keep-steps must be at least 1, got 0"),
        (["--compare", "dense"], "--compare dense needs --token-elimination"),
        ([*HALF[-6:], "--token-score", "gradient"], "--token-score must be one of attention, norm, random"),
        ([*HALF[-6:], "--token-layers", "1;2"], "--token-layers must be indices of layers separated by commas, got"),
        ([*HALF[-6:], "--token-layers", "2"], "layers must name layers of the model, which has 2, got 2"),
        (["--token-elimination", "0.5", "--token-block-size", "8"], "layers must be given for a model of 2 layers"),
        ([*HALF[-6:], "--token-block-size", "0"], "--token-block-size must be at least 1, got 0"),
        ([*HALF[-6:], "--token-select-every", "0"], "--token-select-every must be at least 1, got 0"),
        (
            [*HALF[-6:], "--method", "lisa"],
            "--token-elimination belongs to --method lora, sparse_delta or s2ft; this run has --method lisa",
        ),
        (["--chunked-loss", "--method", "hft"], "--chunked-loss belongs to --method lora, sparse_delta or s2ft"),
        ([*HALF[-6:], "--compare", "dense", "--method", "lisa"], "this run has --method lisa"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], message: str, invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finetune", *TINY, *options, "--steps", 1, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
