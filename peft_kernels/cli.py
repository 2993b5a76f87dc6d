"""The command line: `peft-kernels finetune | plan | delta | predictor | thresholds | info | verify | bench`.

Options only; the work is in the modules it calls. Those are imported when their command runs, so that `--help` does
not wait for them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:  # an installation without dependencies
    print("Error: the command line needs two more packages: pip install typer rich", file=sys.stderr)
    sys.exit(2)

from . import delta_commands, plan_command, predictor_commands, thresholds_command
from .training.method_options import ADAPTERS, DEFAULTS, METHODS_OF, SCHEDULES, SELECTIONS
from .training.settings import CHOICES, Settings
from .training.token_options import ratio_or_directory

app = typer.Typer(
    name="peft-kernels",
    help="Fused kernels for adapter training: fine-tune a model, check the kernels, describe this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(delta_commands.app)
app.add_typer(predictor_commands.app)
app.command()(plan_command.plan)
app.command()(thresholds_command.thresholds)


def main() -> None:
    """Entry point of `peft-kernels`."""
    app()


def _fail(message: str, code: int = 2) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(code)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _option(name: str, text: str, flag: str | None = None) -> Any:
    """The option behind a setting. It has no default of its own: what is not named comes from `Settings`, or on
    --resume from the earlier run, so the value is None unless the user gave one."""
    choices = f"{', '.join(CHOICES[name])}. " if name in CHOICES else ""
    return typer.Option(
        *([flag] if flag else []),
        help=f"{text}{': ' if choices else '. '}{choices}{_default(name, flag)}".strip(),
        rich_help_panel=_panel(METHODS_OF.get(name)),
    )


def _panel(methods: tuple[str, ...] | None) -> str | None:
    """The box of `--help` for an option of these methods."""
    if methods is None:
        return None
    if len(methods) > 1 or methods[0] in SCHEDULES:
        methods = SCHEDULES if methods[0] in SCHEDULES else ADAPTERS
    return f"For --method {', '.join(methods)}"


def _default(name: str, flag: str | None) -> str:
    """What a setting is when it is not named, by method where they differ."""
    default = getattr(Settings, name)
    if default is True and flag is not None:
        default = flag.partition("/")[0].removeprefix("--")
    shown = [] if default is None else [f"{default}"]
    methods: dict[Any, list[str]] = {}
    for method, defaults in DEFAULTS.items():
        if name in defaults:
            methods.setdefault(defaults[name], []).append(method)
    shown += [f"{', '.join(names)}: {value}" for value, names in methods.items()]
    return f"(default: {'; '.join(shown)})" if shown else ""


def _selections() -> str:
    return "; ".join(f"{method}: {', '.join(choices)}" for method, choices in SELECTIONS.items())


@app.command()
def finetune(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option(help="Directory for everything the run writes.")] = Path("runs/finetune"),
    model: Annotated[
        str | None,
        _option("model", "smollm2, a transformers directory, a hub id, or random:llama-tiny (small, 135m, 1b, 8b)"),
    ] = None,
    data: Annotated[
        str | None,
        _option("data", "Text file, .jsonl file, or a directory of them (default: the standard library's sources)"),
    ] = None,
    method: Annotated[str | None, _option("method", "What trains")] = None,
    r: Annotated[
        int | None, _option("r", "Rank; a sparse delta without --density has as many entries as LoRA of it", "--r")
    ] = None,
    lora_alpha: Annotated[float | None, _option("lora_alpha", "The update is scaled by alpha / r")] = None,
    lora_dropout: Annotated[float | None, _option("lora_dropout", "Dropout on the adapter's input")] = None,
    use_rslora: Annotated[bool | None, _option("use_rslora", "Scale by alpha / sqrt(r)")] = None,
    density: Annotated[
        float | None, _option("density", "Share of each weight's entries that train, instead of --r")
    ] = None,
    selection: Annotated[
        str | None, _option("selection", f"How positions or channels are chosen. {_selections()}")
    ] = None,
    reselection_steps: Annotated[
        int | None, _option("reselection_steps", "Steps from one reselection to the next")
    ] = None,
    selection_accumulation_steps: Annotated[
        int | None, _option("selection_accumulation_steps", "Steps whose gradients a reselection goes by")
    ] = None,
    reselection_rate: Annotated[
        float | None, _option("reselection_rate", "Share of entries that move, at first")
    ] = None,
    reselection_schedule: Annotated[
        str | None, _option("reselection_schedule", "How that share falls to 0 over the run")
    ] = None,
    ratios: Annotated[
        str | None, _option("ratios", "Shares of heads and channels by role: q, k, v, o, up, gate, down")
    ] = None,
    ratio: Annotated[
        float | None, _option("ratio", "Share of the channels of every layer in --target-modules, instead of --ratios")
    ] = None,
    dim: Annotated[str | None, _option("dim", "Which channels --ratio means")] = None,
    largest: Annotated[
        bool | None, _option("largest", "Which end of a ranking by norms trains", "--largest/--smallest")
    ] = None,
    budget: Annotated[str | None, _option("budget", "Count --ratios over all layers, or in each")] = None,
    co_permute: Annotated[bool | None, _option("co_permute", "Bring channels together that train")] = None,
    calibration_batches: Annotated[
        int | None, _option("calibration_batches", "Batches that --selection measures activations or gradients on")
    ] = None,
    interval: Annotated[
        int | None, _option("interval", "Steps from one choice of parameters to the next; hft: one choice unless given")
    ] = None,
    active_layers: Annotated[int | None, _option("active_layers", "Layers that lisa trains at a time")] = None,
    norms: Annotated[str | None, _option("norms", "What hft does with norms")] = None,
    embeddings: Annotated[
        str | None, _option("embeddings", "What hft does with embeddings, head and last norm")
    ] = None,
    rho: Annotated[
        float | None, _option("rho", "Share of the full backward pass's FLOPs that greentrainer may use")
    ] = None,
    target_modules: Annotated[
        str | None, _option("target_modules", "Layer names separated by commas, or all-linear")
    ] = None,
    token_elimination: Annotated[
        str | None,
        _option(
            "token_elimination",
            "Share of the tokens that decoder layers compute for in training, in blocks; or a directory that "
            "`thresholds` or another run wrote",
        ),
    ] = None,
    token_tune: Annotated[
        float | None,
        _option("token_tune", "Share of the tokens that have gradients in training (TokenTune); all are computed"),
    ] = None,
    token_score: Annotated[
        str | None, _option("token_score", "What says which blocks are kept, or tokens selected (--token-tune: random)")
    ] = None,
    token_block_size: Annotated[
        int | None, _option("token_block_size", "Neighboring tokens that are kept or not together")
    ] = None,
    token_select_every: Annotated[
        int | None, _option("token_select_every", "Layers in a row that share a choice of tokens")
    ] = None,
    token_layers: Annotated[
        str | None,
        _option(
            "token_layers",
            "Indices of the layers, separated by commas (default: all but the first two and last; --token-tune: all)",
        ),
    ] = None,
    token_loss: Annotated[
        str | None, _option("token_loss", "Which tokens' loss counts in training: those that layers computed, or all")
    ] = None,
    token_keep_steps: Annotated[
        int | None,
        _option(
            "token_keep_steps", "Steps in which the share grows from --token-elimination to all (default: it stays)"
        ),
    ] = None,
    chunked_loss: Annotated[
        bool | None,
        _option(
            "chunked_loss",
            "Form the loss without all logits (default: with --token-elimination, --token-tune, --loss-ratio)",
        ),
    ] = None,
    loss_ratio: Annotated[
        float | None,
        _option("loss_ratio", "Share of a batch's tokens to train on: those whose loss exceeds a reference's most"),
    ] = None,
    reference_model: Annotated[
        str | None,
        _option("reference_model", "What --loss-ratio compares with, named as --model is"),
    ] = None,
    sampled_gradient: Annotated[
        float | None,
        _option("sampled_gradient", "Share of the rows of each input that is kept for the gradient of A (WTA-CRS)"),
    ] = None,
    dtype: Annotated[str | None, _option("dtype", "Dtype of the base model")] = None,
    adapter_dtype: Annotated[str | None, _option("adapter_dtype", "Dtype of the adapter; model: as the base")] = None,
    seq_len: Annotated[int | None, _option("seq_len", "Tokens per sequence")] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Sequences per batch")] = None,
    gradient_accumulation: Annotated[int | None, _option("gradient_accumulation", "Batches per step")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("gradient_checkpointing", "Recompute activations in the backward pass")
    ] = None,
    steps: Annotated[int | None, _option("steps", "Optimizer steps in all")] = None,
    lr: Annotated[float | None, _option("lr", "Learning rate of AdamW")] = None,
    lr_schedule: Annotated[str | None, _option("lr_schedule", "Learning rate after warm-up")] = None,
    warmup_steps: Annotated[int | None, _option("warmup_steps", "Steps in which the learning rate rises")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay", "Weight decay of AdamW")] = None,
    max_grad_norm: Annotated[float | None, _option("max_grad_norm", "Gradient clipping, 0 for none")] = None,
    compare: Annotated[str | None, _option("compare", "Train another implementation side by side")] = None,
    seed: Annotated[int | None, _option("seed", "Seed of initial adapter, data order and dropout")] = None,
    device: Annotated[str | None, _option("device", "auto, cpu, cuda or cuda:<number>")] = None,
    save_every: Annotated[int | None, _option("save_every", "Steps between checkpoints")] = None,
    sample_tokens: Annotated[int | None, _option("sample_tokens", "Length of the text sample, 0 for none")] = None,
    prompt: Annotated[str | None, _option("prompt", "What the text sample continues")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
) -> None:
    """Fine-tune a causal language model: adapters, or parts of its own parameters; alone or beside another way.

    lora, sparse_delta and s2ft write an adapter; lisa, hft and greentrainer train the model itself and write a model.
    --compare: peft (lora, s2ft) and shira (sparse_delta) are PEFT's layers, paca (s2ft) plain PyTorch, full everything,
    dense the same adapter without --token-elimination, --token-tune, --loss-ratio and --sampled-gradient.
    """
    from .training.errors import UserError

    own = ("output", "resume", "overwrite")
    given = {name: value for name, value in ctx.params.items() if name not in own and value is not None}
    if token_elimination is not None:
        given["token_elimination"] = ratio_or_directory(token_elimination)
    if resume and overwrite:
        raise _fail("--resume continues the run in --output, --overwrite replaces it; give one of them")
    try:
        from .training import finetune as training

        code = training.run(given, output, resume, overwrite, _console())
    except UserError as error:
        raise _fail(str(error), error.exit_code) from None
    except KeyboardInterrupt:
        raise _fail("interrupted; what was saved last stays in --output", 130) from None
    raise typer.Exit(code)


@app.command()
def info(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, hardware, loaded libraries, and which backend serves each operator here and why."""
    from . import info as information

    if json_output:
        import json

        typer.echo(json.dumps(information.gather(), indent=1))
    else:
        information.print_info(_console())


@app.command()
def verify() -> None:
    """Check every operator, backend and dtype of this machine against the reference; exit code 1 if one is wrong."""
    from .verify import verify as outcomes_of
    from .verify.table import print_outcomes

    console = _console()
    outcomes = list(outcomes_of())
    print_outcomes(outcomes, console)
    raise typer.Exit(0 if all(outcome.passed for outcome in outcomes) else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(ctx: typer.Context) -> None:
    """Run the benchmarks of a source tree; arguments go to `python -m benchmarks`."""
    import os
    import subprocess

    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise _fail("the benchmarks are part of the source tree, not of the installed package; run this in a checkout")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks", *ctx.args]
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
