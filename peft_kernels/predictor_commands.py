"""`peft-kernels predictor train | report`: options and messages; the work is in `peft_kernels/elimination/`."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .elimination import Predictors, RecallReport
    from .training.data import BlockStream
    from .training.models import LoadedModel

app = typer.Typer(
    name="predictor",
    help="Predictors of which tokens matter to a layer, for token elimination: train them, measure their recall.",
    no_args_is_help=True,
)

_DTYPES = ("float32", "bfloat16")
_CALIBRATION = 2  # training batches that pruning is decided on

Model = Annotated[str, typer.Option(help="As for `finetune`: smollm2, a transformers directory, a hub id, random:...")]
Data = Annotated[
    str | None,
    typer.Option(help="Text file, .jsonl file, or a directory of them (default: the standard library's sources)."),
]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per sequence, as many as fine-tuning will have.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
Keep = Annotated[float, typer.Option(help="Ratio of blocks kept, at which recall is measured.")]
Dtype = Annotated[str, typer.Option(help=f"Of the model: {', '.join(_DTYPES)}.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the data, and of what training draws.")]


@contextmanager
def _messages() -> Iterator[None]:
    """What can be the user's doing becomes a message and exit code 2; warnings become messages too."""
    from .training.errors import UserError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
            warnings.showwarning = lambda message, *_: typer.echo(f"Warning: {message}", err=True)
            yield
    except KeyboardInterrupt:
        typer.echo("Error: interrupted; nothing at --output was changed", err=True)
        raise typer.Exit(130) from None
    except (UserError, OSError, ValueError, TypeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


@dataclass(frozen=True)
class _Source:
    """A model and the text it reads."""

    base: LoadedModel
    stream: BlockStream
    device: torch.device
    batch_size: int

    def training(self, count: int) -> Iterator[Tensor]:
        """The first `count` batches, int64 `[batch_size, seq_len]`."""
        return (self.stream.batch(index, self.batch_size).to(self.device) for index in range(count))

    def held_out(self) -> list[Tensor]:
        """The blocks that training never reads, in batches."""
        return list(self.stream.held_out.long().to(self.device).split(self.batch_size))


def _source(model: str, data: str | None, seq_len: int, batch_size: int, dtype: str, device: str, seed: int) -> _Source:
    import torch

    from .training.data import BlockStream, read_corpus
    from .training.errors import UserError
    from .training.finetune import choose_device
    from .training.models import load_model

    if dtype not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    torch.manual_seed(seed)  # a random model's weights
    base = load_model(model, getattr(torch, dtype), place)
    stream = BlockStream(read_corpus(data, base.tokenizer), base.tokenizer, seq_len, seed)
    if len(stream.held_out) == 0:
        raise UserError(
            f"--data holds too little text to measure recall on: fewer than ten blocks of --seq-len {seq_len} tokens"
        )
    return _Source(base, stream, place, batch_size)


def _check_keep(keep: float) -> None:
    if not 0.0 < keep < 1.0:
        raise ValueError(f"--keep must be in (0, 1), got {keep}")


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, ten lines elsewhere; yields what is to be told each step that is done, and its loss."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        every = max(1, steps // 10)

        def line(done: int, loss: float) -> None:
            if done % every == 0 or done in (1, steps):
                typer.echo(f"step {done}/{steps}  loss {loss:.4f}", err=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda done, loss: bar.update(task, completed=done, description=f"loss {loss:.4f}")


@contextmanager
def _status(text: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        typer.echo(text, err=True)
        yield


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
    with _messages():
        from . import elimination
        from .elimination.predictor_files import CONFIG_NAME, WEIGHTS_NAME

        _check_keep(keep)
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output}: exists and is no directory")
        if any((output / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME)) and not overwrite:
            raise ValueError(f"--output {output} holds predictors already; add --overwrite to replace them")
        if seq_len < 2 * block_size:
            raise ValueError(f"--seq-len must be at least two blocks of {block_size} tokens, got {seq_len}")
        source = _source(model, data, seq_len, batch_size, dtype, device, seed)
        batches = source.training(math.ceil(steps / repeats))
        with _progress(steps) as progress:
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
    with _messages():
        from .elimination import Predictors

        _check_keep(keep)
        predictors = Predictors.load(directory)
        if predictors.base_model not in (None, model):
            warnings.warn(f"the predictors were trained on {predictors.base_model!r}, this is {model!r}", stacklevel=1)
        found = _recall(predictors, _source(model, data, seq_len, batch_size, dtype, device, seed), keep)
        if json_output:
            typer.echo(json.dumps(_description(found), indent=1))
        else:
            _print_recall(found)


def _recall(predictors: Predictors, source: _Source, keep: float) -> RecallReport:
    from .elimination import recall_report

    with _status("measuring recall on held-out text"):
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
