"""What commands share that run a model on text: their options, model and text, messages, a bar for the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .training.data import BlockStream
    from .training.models import LoadedModel

DTYPES = ("float32", "bfloat16")

Model = Annotated[str, typer.Option(help="As for `finetune`: smollm2, a transformers directory, a hub id, random:...")]
Data = Annotated[
    str | None,
    typer.Option(help="Text file, .jsonl file, or a directory of them (default: the standard library's sources)."),
]
SeqLen = Annotated[int, typer.Option(min=2, help="Tokens per sequence, as many as fine-tuning will have.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
Dtype = Annotated[str, typer.Option(help=f"Of the model: {', '.join(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the data, and of what training draws.")]


@contextmanager
def messages() -> Iterator[None]:
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
class Source:
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


def read_source(
    model: str, data: str | None, seq_len: int, batch_size: int, dtype: str, device: str, seed: int
) -> Source:
    """Loads the model, and the text as far as it is held out; arguments are the options of their names.

    Raises:
        UserError: see its message.
    """
    import torch

    from .training.data import BlockStream, read_corpus
    from .training.errors import UserError
    from .training.finetune import choose_device
    from .training.models import load_model

    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    torch.manual_seed(seed)  # a random model's weights
    base = load_model(model, getattr(torch, dtype), place)
    stream = BlockStream(read_corpus(data, base.tokenizer), base.tokenizer, seq_len, seed)
    if len(stream.held_out) == 0:
        raise UserError(
            f"--data holds too little text to hold some of it out: fewer than ten blocks of --seq-len {seq_len} tokens"
        )
    return Source(base, stream, place, batch_size)


def check_output(output: Path, names: Collection[str], what: str, overwrite: bool) -> None:
    """Raises ValueError where the directory is a file, or holds files of these names that are to stay."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: exists and is no directory")
    if any((output / name).exists() for name in names) and not overwrite:
        raise ValueError(f"--output {output} holds {what} already; add --overwrite to replace them")


@contextmanager
def progress_of(steps: int, what: str) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, ten lines elsewhere; yields what is to be told each step that is done, and its loss.

    Args:
        steps: how many there will be.
        what: a word for one.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        every = max(1, steps // 10)

        def line(done: int, loss: float) -> None:
            if done % every == 0 or done in (1, steps):
                typer.echo(f"{what} {done}/{steps}  loss {loss:.4f}", err=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda done, loss: bar.update(task, completed=done, description=f"loss {loss:.4f}")


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner with `text` on a terminal, a plain line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        typer.echo(text, err=True)
        yield
