"""`peft-kernels delta extract | apply | merge | info`: options and messages; the work is in `peft_kernels/deltas/`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from .deltas import Delta, DeltaFile

app = typer.Typer(
    name="delta",
    help="What fine-tuning changed, packed: extract it, merge several, put it into a checkpoint.",
    no_args_is_help=True,
)


class Scope(StrEnum):
    """What a density is of."""

    TENSOR = "tensor"
    GLOBAL = "global"


class Method(StrEnum):
    """How deltas are merged."""

    LINEAR = "linear"
    TIES = "ties"
    PCB = "pcb"


class ValuesDtype(StrEnum):
    """The dtype of a delta's values."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")]
Density = Annotated[
    float | None, typer.Option(help="Fraction of elements to keep, the largest changes (default: all).")
]
ScopeOption = Annotated[Scope, typer.Option(help="What --density is of: each tensor, or all together (global).")]
Dtype = Annotated[ValuesDtype | None, typer.Option(help="Dtype of the values (default: that of the differences).")]
Deltas = Annotated[list[Path], typer.Argument(help="Delta files.")]
Weights = Annotated[
    list[float] | None, typer.Option("--weight", "-w", help="A factor for each delta, in order; repeat it.")
]


@contextmanager
def _messages() -> Iterator[None]:
    """What can be the user's doing becomes a message and exit code 2; warnings become messages too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: typer.echo(f"Warning: {message}", err=True)
            yield
    except KeyboardInterrupt:
        typer.echo("Error: interrupted; nothing at --output was changed", err=True)
        raise typer.Exit(130) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(2) from None


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output} exists already; add --overwrite to replace it")


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[str], object]]:
    """A bar on a terminal, nothing elsewhere; yields what is to be told each tensor that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda _: progress.advance(task)


def _dtype(dtype: ValuesDtype | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)  # type: ignore[no-any-return]


def _save(delta: Delta, output: Path) -> None:
    from .deltas import DeltaFile, save_delta

    with _progress("writing", len(delta)) as progress:
        save_delta(delta, output, progress=progress)
    with DeltaFile(output) as file:
        _summary(file)


def _open_all(paths: Sequence[Path], stack: ExitStack) -> list[Delta]:
    from .deltas import DeltaFile

    return [stack.enter_context(DeltaFile(path)) for path in paths]


@app.command()
def extract(
    base: Annotated[Path, typer.Argument(help="The base model: a safetensors file, or a directory of one or shards.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned model, or a directory with a PEFT LoRA adapter.")],
    output: Output,
    density: Density = None,
    scope: ScopeOption = Scope.TENSOR,
    dtype: Dtype = None,
    base_model: Annotated[str | None, typer.Option(help="The base model's name, as recorded in the file.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write what fine-tuning changed: the difference of two checkpoints, or the update of a LoRA adapter."""
    with _messages(), ExitStack() as stack:
        from . import deltas
        from .adapter_files import CONFIG_NAME

        _check_output(output, overwrite)
        before = stack.enter_context(deltas.Checkpoint(base))
        delta: Delta
        if (tuned / CONFIG_NAME).is_file():
            delta = deltas.from_lora(tuned, before, dtype=_dtype(dtype), base_model=base_model)
        else:
            after = stack.enter_context(deltas.Checkpoint(tuned))
            delta = deltas.extract(before, after, dtype=_dtype(dtype), base_model=base_model)
        if density is not None:
            delta = deltas.trim(delta, density, scope=scope.value)
        _save(delta, output)


@app.command()
def apply(
    base: Annotated[Path, typer.Argument(help="The model: a safetensors file, or a directory of one or shards.")],
    deltas: Deltas,
    output: Output,
    weight: Weights = None,
    subtract: Annotated[bool, typer.Option("--subtract", help="Take the deltas away instead.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with deltas added, several of them at once if need be."""
    with _messages(), ExitStack() as stack:
        from .deltas import Checkpoint, apply_to_checkpoint

        _check_output(output, overwrite)
        checkpoint = stack.enter_context(Checkpoint(base))
        added = _open_all(deltas, stack)
        with _progress("writing", sum(1 for _ in checkpoint)) as progress:
            apply_to_checkpoint(checkpoint, added, output, weights=weight, subtract=subtract, progress=progress)
        typer.echo(f"wrote {output}")


@app.command()
def merge(
    deltas: Deltas,
    output: Output,
    method: Annotated[
        Method, typer.Option(help="How to merge: weighted sum, TIES-Merging, PCB-Merging.")
    ] = Method.LINEAR,
    weight: Weights = None,
    density: Density = None,
    scope: ScopeOption = Scope.TENSOR,
    outliers: Annotated[float, typer.Option(help="Fraction, the largest changes, to drop with --density.")] = 0.0,
    drop: Annotated[
        float | None, typer.Option(help="First drop changes with this probability and rescale (DARE).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of --drop for the first delta, counted on for the others.")] = 0,
    beta: Annotated[
        float | None, typer.Option(help="First drop this fraction of a row, the smallest (Breadcrumbs).")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="First drop this fraction of a row, the largest (Breadcrumbs).")
    ] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge deltas of one base model; with a single one, trim, drop or scale it.

    In this order: --drop, --beta and --gamma, --density with --outliers, then the method.
    """
    with _messages(), ExitStack() as stack:
        from . import deltas as algebra

        _check_output(output, overwrite)
        parts = _open_all(deltas, stack)
        if drop is not None:
            parts = [algebra.dare(part, drop, seed=seed + i) for i, part in enumerate(parts)]
        if beta is not None or gamma is not None:
            parts = [algebra.breadcrumbs(part, beta=beta or 0.0, gamma=gamma or 0.0) for part in parts]
        if method is Method.PCB:
            if density is None or outliers:
                raise ValueError(
                    "--method pcb needs --density, the fraction to keep by its own scores, and no --outliers"
                )
            options: dict[str, Any] = {"density": density, "scope": scope.value}
            merged = algebra.pcb(parts, weights=weight, dtype=_dtype(dtype), **options)
        else:
            if density is not None:
                parts = [algebra.trim(part, density, scope=scope.value, outliers=outliers) for part in parts]
            elif outliers:
                raise ValueError("--outliers needs --density")
            combine = algebra.ties if method is Method.TIES else algebra.linear
            merged = combine(parts, weights=weight, dtype=_dtype(dtype))
        _save(merged, output)


@app.command()
def info(
    delta: Annotated[Path, typer.Argument(help="A delta file.")],
    check: Annotated[bool, typer.Option("--check", help="Read and check every number, not only the header.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a delta changes, and how it was made."""
    with _messages():
        from .deltas import DeltaFile

        with DeltaFile(delta) as file:
            if check:
                with _progress("checking", len(file)) as progress:
                    for name in file:
                        file.entry(name)
                        progress(name)
            if json_output:
                typer.echo(json.dumps(_description(file), indent=1))
            else:
                _table(file)
                _summary(file)


def _description(file: DeltaFile) -> dict[str, Any]:
    tensors = {
        name: {
            "shape": list(spec.shape),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "values_dtype": str(spec.values_dtype).removeprefix("torch."),
            "values": file.nnz(name),
        }
        for name, spec in file.specs.items()
    }
    return {"base_model": file.base_model, "history": list(file.history), "tensors": tensors}


def _table(file: DeltaFile) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tensor", "shape", "base", "values", "changed", box=None)
    for name, row in _description(file)["tensors"].items():
        share = row["values"] / max(1, file.specs[name].numel)
        table.add_row(name, str(row["shape"]), row["dtype"], row["values_dtype"], f"{row['values']:,} ({share:.2%})")
    Console().print(table)


def _summary(file: DeltaFile) -> None:
    values = sum(file.nnz(name) for name in file)
    size = file.path.stat().st_size
    typer.echo(
        f"{file.path}: {values:,} values in {len(file)} tensors, {values / max(1, file.numel):.2%} of "
        f"{file.numel:,}; {size / 1e6:.1f} MB; base model {file.base_model or 'not recorded'}"
    )
    for step in file.history:
        typer.echo(f"  {step}")
