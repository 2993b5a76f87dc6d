"""`peft-kernels plan`: options and tables; the formulas are in `peft_kernels/memory_plan/`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 1 << (10 * power) for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """Bytes of `80GiB`, `24GB`, `512 MiB` or a plain number of bytes; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"--gpu-memory must be a size such as 80GiB or 24GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def size_text(count: int) -> str:
    """Bytes in the unit that suits them."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count} B"


def read_config(model: str) -> dict[str, Any]:
    """The contents of a model's configuration; see the option's help for what `model` may be.

    Raises:
        ValueError, OSError: nothing of that name, or what is there is no configuration.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"--model {model}: {path} holds no configuration")
        return found
    from .training.models import random_llama_config

    if model.startswith("random:"):
        return random_llama_config(model)
    if model.startswith((".", "/", "~")) or model.endswith(".json"):
        raise ValueError(f"--model {model}: no such file or directory")
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).to_dict()  # type: ignore[no-any-return]


def plan(
    model: Annotated[
        str, typer.Option(help="A config.json, a directory with one, a hub id, or random:llama-8b (tiny, small, 1b).")
    ],
    gpu_memory: Annotated[str, typer.Option(help="Memory of the GPU, such as 80GiB.")] = "80GiB",
    reserve: Annotated[
        float, typer.Option(help="Share of it that context, libraries and fragmentation may take.")
    ] = 0.05,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 1,
    method: Annotated[str, typer.Option(help="What trains: lora, s2ft, sparse_delta, full.")] = "lora",
    r: Annotated[int, typer.Option("--r", help="Rank of LoRA, in all linear layers of the decoder.")] = 16,
    density: Annotated[float, typer.Option(help="Share of each weight that a sparse delta trains.")] = 0.01,
    keep: Annotated[
        float, typer.Option(help="Share of the tokens that layers are computed for, as --token-elimination has it.")
    ] = 1.0,
    keep_attention: Annotated[float | None, typer.Option(help="The same of attention alone.")] = None,
    keep_mlp: Annotated[float | None, typer.Option(help="The same of MLPs alone.")] = None,
    dense_layers: Annotated[int, typer.Option(help="Layers that eliminate nothing.")] = 3,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Form activations again in backward.")] = False,
    logits: Annotated[str, typer.Option(help="chunked holds a few tokens' logits at a time, full all of them.")] = (
        "chunked"
    ),
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="Of what trains beside the weights.")] = "float32",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Calculate what a training step holds in memory, and the longest sequence that fits; nothing is run."""
    from .memory_plan import ModelShape, StepSettings, plan_memory

    try:
        budget = parse_size(gpu_memory)
        if not 0.0 <= reserve < 1.0:
            raise ValueError(f"--reserve must be in [0, 1), got {reserve}")
        shape = ModelShape.from_config(read_config(model))
        step = StepSettings(
            batch_size=batch_size,
            seq_len=seq_len,
            method=method,
            r=r,
            density=density,
            keep_attention=keep if keep_attention is None else keep_attention,
            keep_mlp=keep if keep_mlp is None else keep_mlp,
            dense_layers=dense_layers,
            checkpointing=checkpointing,
            logits=logits,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
        )
    except Exception as error:
        if not isinstance(error, ValueError | OSError | ModuleNotFoundError) and not hasattr(error, "exit_code"):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    usable = int(budget * (1 - reserve))
    planned, longest = plan_memory(shape, step), _longest(shape, step, usable)
    if json_output:
        record = {
            "shape": asdict(shape),
            "step": asdict(step),
            "usable_bytes": usable,
            "components": [asdict(component) for component in planned.components],
            "total_bytes": planned.total,
            "longest_sequence": longest,
        }
        typer.echo(json.dumps(record, indent=1))
    else:
        _print(planned, longest, usable, gpu_memory)


def _longest(shape: Any, step: Any, usable: int) -> list[dict[str, Any]]:
    """The longest sequence with and without checkpointing and elimination."""
    from .memory_plan import longest_sequence

    keeps = [(1.0, 1.0)]
    if min(step.keep_attention, step.keep_mlp) < 1.0:
        keeps.append((step.keep_attention, step.keep_mlp))
    found = []
    for attention, mlp in keeps:
        for checkpointing in (False, True):
            variant = replace(step, keep_attention=attention, keep_mlp=mlp, checkpointing=checkpointing)
            tokens = longest_sequence(shape, variant, usable)
            found.append(
                {"keep_attention": attention, "keep_mlp": mlp, "checkpointing": checkpointing, "seq_len": tokens}
            )
    return found


def _print(planned: Any, longest: list[dict[str, Any]], usable: int, gpu_memory: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    step = planned.step
    table = Table(title=f"One step of {step.batch_size} x {step.seq_len} tokens, {step.method}, calculated")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("how it comes about")
    for component in planned.components:
        table.add_row(component.name, size_text(component.bytes), component.note)
    fits = "fits into" if planned.total <= usable else "does not fit into"
    table.add_section()
    table.add_row("in all", size_text(planned.total), f"{fits} {size_text(usable)} of {gpu_memory}")
    console.print(table)
    lengths = Table(title=f"Longest sequence for {size_text(usable)}, batch size {step.batch_size}")
    for name in ("attention keeps", "MLP keeps", "checkpointing", "tokens"):
        lengths.add_column(name, justify="right")
    for row in longest:
        checkpointing = "yes" if row["checkpointing"] else "no"
        tokens = f"{row['seq_len']:,}" if row["seq_len"] else "does not fit"
        lengths.add_row(f"{row['keep_attention']:g}", f"{row['keep_mlp']:g}", checkpointing, tokens)
    console.print(lengths)
