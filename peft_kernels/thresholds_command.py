"""`peft-kernels thresholds`: options and a table; the work is in `peft_kernels/elimination/`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
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
    check_output,
    messages,
    progress_of,
    read_source,
    status,
)

if TYPE_CHECKING:
    from .elimination import ThresholdCosts, ThresholdReport

_SCORES = ("attention", "norm")


def thresholds(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for the thresholds, as `finetune --token-elimination`.")
    ],
    model: Model = "smollm2",
    data: Data = None,
    tolerance: Annotated[
        float, typer.Option(help="How much larger than the dense model's the loss may get, relative to it.")
    ] = 0.01,
    batches: Annotated[int, typer.Option(min=1, help="Batches of text that the loss is taken of.")] = 4,
    keep: Annotated[float, typer.Option(help="Share of the blocks that every layer keeps to begin with.")] = 0.5,
    step: Annotated[float, typer.Option(help="Share of a layer's blocks by which its threshold moves.")] = 0.1,
    max_evaluations: Annotated[
        int, typer.Option(min=2, help="How often the batches go through the model at most.")
    ] = 200,
    score: Annotated[str, typer.Option(help=f"What the thresholds are of: {', '.join(_SCORES)}.")] = "attention",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens that are kept or dropped together.")] = 64,
    select_every: Annotated[int, typer.Option(min=1, help="Layers in a row that share a choice of tokens.")] = 1,
    layers: Annotated[
        str | None,
        typer.Option(help="Indices of the layers, separated by commas (default: all but the first two and last)."),
    ] = None,
    apply_to: Annotated[str, typer.Option(help="Which half of a layer: both, attention, mlp.")] = "both",
    seq_len: SeqLen = 2048,
    batch_size: BatchSize = 1,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    seed: Seed = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the thresholds in --output.")] = False,
) -> None:
    """Find how much each layer can drop: thresholds of scores, raised while the loss stays within a tolerance.

    Writes token_elimination.json, which `finetune --token-elimination DIRECTORY` and `pk.inject` take, and
    token_thresholds.json for `pk.elimination.set_thresholds`.
    """
    with messages():
        from . import elimination
        from .config.token_elimination import TokenEliminationConfig
        from .elimination.thresholds import FILE_NAME as THRESHOLDS_NAME
        from .inject import inject

        check_output(output, (TokenEliminationConfig.file_name, THRESHOLDS_NAME), "thresholds", overwrite)
        if score not in _SCORES:
            raise ValueError(f"--score must be one of {', '.join(_SCORES)}, got {score!r}")
        if seq_len < 2 * block_size:
            raise ValueError(f"--seq-len must be at least two blocks of {block_size} tokens, got {seq_len}")
        config = TokenEliminationConfig(
            threshold=0.0,
            layers=_indices(layers),
            block_size=block_size,
            score=score,  # type: ignore[arg-type]
            apply_to=apply_to,  # type: ignore[arg-type]
            select_every=select_every,
        )
        source = read_source(model, data, seq_len, batch_size, dtype, device, seed)
        base = source.base.model
        inject(base, config)
        with progress_of(max_evaluations, "evaluation") as progress:
            found, report = elimination.refine_thresholds(
                base, source.training(batches), keep, tolerance, step, max_evaluations, progress
            )
        indices = sorted(layer.elimination.index for layer in elimination.eliminating_layers(base).values())
        replace(config, layers=indices, threshold=dict(found)).save(output)
        found.save(output)
        with status("measuring the loss on held-out text"):
            costs = elimination.threshold_costs(base, found, source.held_out()[:batches])
        if json_output:
            typer.echo(json.dumps(_record(report, costs), indent=1))
        else:
            _print(report, costs)
            typer.echo(f"wrote {output}")


def _indices(layers: str | None) -> list[int] | None:
    if layers is None:
        return None
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers must be indices of layers separated by commas, got {layers!r}") from None


def _record(report: ThresholdReport, costs: ThresholdCosts) -> dict[str, Any]:
    rows = [
        {**asdict(layer), "threshold": None if layer.threshold == -math.inf else layer.threshold}
        for layer in costs.layers
    ]
    return {"calibration": asdict(report), "held_out": {**asdict(costs), "layers": rows}}


def _print(report: ThresholdReport, costs: ThresholdCosts) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", box=None)
    for name in ("threshold", "kept", "loss change alone"):
        table.add_column(name, justify="right")
    for layer in costs.layers:
        threshold = "keeps all" if layer.threshold == -math.inf else f"{layer.threshold:.5g}"
        table.add_row(str(layer.index), threshold, f"{layer.kept:.1%}", f"{layer.loss_change:+.4f}")
    table.add_row("all", "", f"{costs.mean_kept:.1%}", f"{costs.loss - costs.loss_dense:+.4f}")
    Console().print(table)
    typer.echo(
        f"on held-out text: loss {costs.loss:.4f}, dense {costs.loss_dense:.4f}\n"
        f"on the text they were found on: loss {report.loss:.4f}, dense {report.loss_dense:.4f}, at most "
        f"{(1 + report.tolerance) * report.loss_dense:.4f}; {report.mean_kept:.1%} kept; {report.evaluations} "
        f"evaluations, {report.stopped}"
    )
