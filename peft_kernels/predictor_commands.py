"""`peft-kernels predictor train | report`: options and messages; the work is in `peft_kernels/elimination/`."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_inputs import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Seed,
    SeqLen,
    Source,
    check_output,
    messages,
    progress_of,
    read_source,
    status,
)

if TYPE_CHECKING:
    from .elimination import Predictors, RecallReport

app = typer.Typer(
    name="predictor",
    help="Predictors of which tokens matter to a layer, for token elimination: train them, measure their recall.",
    no_args_is_help=True,
)

_CALIBRATION = 2  # training batches that pruning is decided on

Keep = Annotated[float, typer.Option(help="Ratio of blocks kept, at which recall is measured.")]


def _check_keep(keep: float) -> None:
    if not 0.0 < keep < 1.0:
        raise ValueError(f"--keep must be in (0, 1), got {keep}")


@app.command()
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the predictors.")],
    model: Model = "smollm2",
    data: Data = None,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps of AdamW.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 4e-3,
    repeats: Annotated[int, typer.Option(min=1, help="Steps per batch of text that the model reads.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Neurons of a predictor's first layer.")] = 64,
    size: Annotated[int, typer.Option(min=1, help="Channels of its queries and keys.")] = 32,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens that are kept or dropped together.")] = 64,
    prune: Annotated[bool, typer.Option("--prune/--no-prune", help="Remove neurons that are never active.")] = True,
    keep: Keep = 0.5,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the predictors in --output.")] = False,
) -> None:
    """Train a predictor for every decoder layer of a model, and print how many of the right blocks they find."""
    with messages():
        from . import elimination
        from .elimination.predictor_files import CONFIG_NAME, WEIGHTS_NAME

        _check_keep(keep)
        check_output(output, (CONFIG_NAME, WEIGHTS_NAME), "predictors", overwrite)
        if seq_len < 2 * block_size:
            raise ValueError(f"--seq-len must be at least two blocks of {block_size} tokens, got {seq_len}")
        source = read_source(model, data, seq_len, batch_size, dtype, device, seed)
        batches = source.training(math.ceil(steps / repeats))
        with progress_of(steps, "step") as progress:
            trained = elimination.train_predictors(
                source.base.model,
                batches,
                steps,
                lr,
                rank=rank,
                size=size,
                block_size=block_size,
                repeats=repeats,
                seed=seed,
                progress=progress,
            )
        if prune:
            trained, pruned = elimination.prune_predictors(trained, source.base.model, source.training(_CALIBRATION))
            typer.echo(f"removed {pruned.removed} of {sum(pruned.before.values())} neurons, which were never active")
        trained.base_model = model
        trained.save(output)
        typer.echo(f"wrote {output}")
        _print_recall(_recall(trained, source, keep))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What `predictor train` wrote.")],
    model: Model = "smollm2",
    data: Data = None,
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    keep: Keep = 0.5,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    seed: Seed = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the recall of predictors on held-out text: with the data, length and seed of their training, unseen."""
    with messages():
        from .elimination import Predictors

        _check_keep(keep)
        predictors = Predictors.load(directory)
        if predictors.base_model not in (None, model):
            warnings.warn(f"the predictors were trained on {predictors.base_model!r}, this is {model!r}", stacklevel=1)
        found = _recall(predictors, read_source(model, data, seq_len, batch_size, dtype, device, seed), keep)
        if json_output:
            typer.echo(json.dumps(_description(found), indent=1))
        else:
            _print_recall(found)


def _recall(predictors: Predictors, source: Source, keep: float) -> RecallReport:
    from .elimination import recall_report

    with status("measuring recall on held-out text"):
        return recall_report(predictors, source.base.model, source.held_out(), keep)


def _description(found: RecallReport) -> dict[str, Any]:
    names = ("predicted", "norm", "first", "random")
    return {**asdict(found), "mean": {name: found.mean(name) for name in names}}


def _print_recall(found: RecallReport) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "predictor", "norm", "first blocks", "random", box=None)
    for layer in found.layers:
        shares = (layer.predicted, layer.norm, layer.first, layer.random)
        table.add_row(str(layer.index), *(f"{share:.1%}" for share in shares))
    means = (found.mean(name) for name in ("predicted", "norm", "first", "random"))
    table.add_row("mean", *(f"{share:.1%}" for share in means))
    Console().print(table)
    typer.echo(
        f"recall of the blocks that score=attention keeps: keep {found.keep:g}, blocks of {found.block_size} tokens, "
        f"{found.sequences} held-out sequences"
    )
