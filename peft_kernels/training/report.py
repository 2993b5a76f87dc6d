"""What a finished run leaves: `metrics.json`, `report.html` (one page, images embedded), the table on the terminal."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..reports import EliminationReport, TokenTuneReport
from . import token_arms
from .arms import DENSE, Arm
from .errors import require
from .metrics import ArmSummary, Row, results_rows, summary_as_dict
from .settings import Settings


@dataclass(frozen=True)
class RunResult:
    """Everything that is reported about one run.

    Attributes:
        environment: versions and device, see `info.versions`.
        adapter_report: what `inject` said about the layers it replaced.
        token_report: what layers that select tokens did in training; None where there are none.
        before, after: `sample` (continuation of `prompt`) and `held_out_loss` around training.
        curve_difference: largest relative difference of the arms' losses; None for a single arm, or where the arms
            train different things.
        peft_check: held-out loss of the written adapter in plain PEFT; None where that was not run.
    """

    settings: Settings
    model: str
    corpus: str
    environment: dict[str, str]
    adapter_report: str
    token_report: EliminationReport | TokenTuneReport | None
    arms: list[Arm]
    summaries: list[ArmSummary]
    memory_measure: str
    prompt: str
    before: dict[str, Any]
    after: dict[str, Any]
    curve_difference: float | None
    peft_check: float | None

    def rows(self) -> list[Row]:
        """The results table; our arm comes last, as the ratios read."""
        return results_rows(self.summaries[::-1])

    def columns(self) -> list[str]:
        """Heads of the results table."""
        names = [summary.name for summary in self.summaries[::-1]]
        return ["", *names, *(["ratio"] if len(names) > 1 else [])]


def write_metrics(result: RunResult, path: Path) -> None:
    """Writes all numbers of the run as JSON."""
    record = {
        "settings": result.settings.as_dict(),
        "model": result.model,
        "corpus": result.corpus,
        "environment": result.environment,
        "arms": {
            arm.name: {"summary": summary_as_dict(summary), "steps": [asdict(step) for step in arm.history]}
            for arm, summary in zip(result.arms, result.summaries, strict=True)
        },
        "memory_measure": result.memory_measure,
        **_token_records(result),
        "chunked_loss": {arm.name: arm.chunked_loss for arm in result.arms},
        "largest_relative_loss_difference": result.curve_difference,
        "held_out_loss_of_written_adapter_in_peft": result.peft_check,
        "prompt": result.prompt,
        "before": result.before,
        "after": result.after,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def write_html(result: RunResult, images: tuple[Path, ...], path: Path) -> None:
    """Writes the one-page report; nothing in it is loaded from elsewhere."""
    jinja2 = require("jinja2")
    template = resources.files(__package__).joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    encoded = [base64.b64encode(image.read_bytes()).decode() for image in images]
    page = environment.from_string(template).render(
        result=result,
        columns=result.columns(),
        rows=result.rows(),
        headline=headline(result),
        notes=notes(result),
        images=encoded,
        settings=result.settings.as_dict(),
        summary=result.settings.summary(),
        usage=usage(result),
    )
    path.write_text(page, encoding="utf-8")


def headline(result: RunResult) -> list[tuple[str, str]]:
    """The few numbers at the top of the page: value and what it is."""
    ours = result.summaries[0]
    items = [(f"{ours.tokens_per_second:,.0f}", "tokens per second")]
    if len(result.summaries) > 1:
        other = result.summaries[1]
        whose = f"{other.name}'s layers" if result.settings.compares_one_function else other.name
        items.append((f"{other.seconds_per_step / ours.seconds_per_step:.2f}x", f"speed of {whose}"))
        items.append((f"{ours.peak_bytes / other.peak_bytes:.0%}", f"of {other.name}'s peak memory of a step"))
    else:
        items.append((f"{ours.peak_bytes / 2**20:,.0f} MiB", "peak memory of a step"))
    if ours.held_out_loss is not None and result.before["held_out_loss"] is not None:
        items.append((f"{result.before['held_out_loss']:.3f} → {ours.held_out_loss:.3f}", "held-out loss"))
    else:
        items.append((f"{ours.final_loss:.3f}", "final training loss"))
    return items


def notes(result: RunResult) -> list[str]:
    """What was measured, and how the two arms agree, in sentences."""
    sentences = [
        "Step times include forward, backward and optimizer; the first steps after a start are left out.",
        f"Peak memory: {result.memory_measure}, for forward and backward of one extra step outside the timings. "
        "Weights, adapters and optimizer state are held before the step and not part of it.",
        "Optimizer state: the most that was held after a step.",
        "Final training loss: mean of the last 10 steps. Held-out loss: blocks of the corpus that are not trained on.",
    ]
    sentences += _of_selected_tokens(result)
    if result.settings.loss_ratio is not None:
        reference = result.settings.reference_model
        sentences.append(
            f"peft-kernels trains on the {result.settings.loss_ratio:.0%} of each batch's tokens whose loss exceeds "
            f"that of {reference} most; its training loss is theirs, and its step times include the pass through "
            f"{reference}. Held-out loss is of all tokens."
        )
    if result.settings.sampled_gradient is not None:
        sentences.append(
            f"Sampled gradient: adapter layers kept {result.settings.sampled_gradient:g} of the rows of their inputs "
            "for the gradient of A, an unbiased estimate (WTA-CRS)."
        )
    if len(result.arms) > 1:
        sentences.insert(0, _how_compared(result))
    if result.settings.dtype == "bfloat16" and (
        result.settings.trains_whole_model or result.settings.compare == "full"
    ):
        sentences.append(
            "Whole weights train in bfloat16, in which what a step adds is rounded to 8 bits of the weight."
        )
    if result.settings.method == "greentrainer":
        sentences.append(
            "The extra step computes every gradient, as the first step of each of GreenTrainer's periods does; the "
            "others take less."
        )
    if result.curve_difference is not None:
        sentences.append(f"Largest relative difference between the two loss curves: {result.curve_difference:.1e}.")
    if result.peft_check is not None:
        rounding = "; they round differently in bfloat16" if result.settings.dtype == "bfloat16" else ""
        sentences.append(
            f"The written adapter, loaded by plain PEFT: held-out loss {result.peft_check:.4f} "
            f"(peft-kernels: {result.summaries[0].held_out_loss:.4f}{rounding})."
        )
    return sentences


def _token_records(result: RunResult) -> dict[str, Any]:
    """What became of tokens, by the option that said so; None for an option that was not given."""
    report = result.token_report
    record = None if report is None else token_arms.as_record(report)
    tunes = isinstance(report, TokenTuneReport)
    return {"token_elimination": None if tunes else record, "token_tune": record if tunes else None}


def _of_selected_tokens(result: RunResult) -> list[str]:
    sentences = []
    report = result.token_report
    if report is not None:
        share = token_arms.kept_share(report)
        kept = "no tokens at all" if share is None else f"{share:.1%} of the tokens"
        layers = f"{len(report.selecting)} of {len(report.layers)} decoder layers"
        if isinstance(report, TokenTuneReport):
            what = f"TokenTune: {layers} had gradients for {kept} in training, and the loss of a step is over these."
        else:
            what = f"Token elimination: {layers} computed for {kept} in training."
        sentences.append(f"{what} Held-out loss and text samples are of all tokens.")
        if result.arms[0].token_mask == "computed":
            sentences.append(
                "Its training loss is of the tokens that layers computed, those that most of them passed by left out; "
                "it is not to be compared with the loss of an arm that computes all."
            )
        if result.settings.token_keep_steps is not None:
            sentences.append("Peak memory is of a step that keeps as many tokens as the run came to in the end.")
        dense = sum(sum(layer.dense_calls.values()) for layer in report.selecting)
        if dense:
            sentences.append(f"{dense} calls of these layers were for all tokens all the same; see their list.")
    chunked = [arm.name for arm in result.arms if arm.chunked_loss]
    if chunked:
        sentences.append(f"The loss of {' and '.join(chunked)} is formed without all logits.")
    if result.arms[0].whole_logits is not None:
        sentences.append(f"The loss takes all logits: {result.arms[0].whole_logits}.")
    return sentences


def _how_compared(result: RunResult) -> str:
    other = result.arms[1].name
    start = "Both arms ran in one process over the same base weights, "
    if other == DENSE:
        start += "from the same initial adapter, on the same batches, one step each in turn; the other without "
        start += f"{_without(result.settings)}. "
    elif result.settings.compares_one_function:
        start += "from the same initial adapter, on the same batches, one step each in turn. "
    else:
        start += "on the same batches, one step each in turn. They train different things, so their losses differ. "
    return f"{start}Ratio: peft-kernels over {other}."


def _without(settings: Settings) -> str:
    """What the dense arm does not do."""
    parts = []
    if settings.token_elimination is not None:
        parts.append("eliminating tokens")
    if settings.token_tune is not None:
        parts.append("selecting tokens for gradients")
    if settings.loss_ratio is not None:
        parts.append("selecting tokens for the loss")
    if settings.sampled_gradient is not None:
        parts.append("sampling gradients")
    return " or ".join(parts)


def usage(result: RunResult) -> tuple[str, str]:
    """What the run left, as a heading, and the lines that load it."""
    beside = "# the directory beside this page"
    if result.settings.trains_whole_model:
        return "The model", (
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained("model")  {beside}\n\n'
            f"# What training has changed, as a file:  {extract_command(result.settings, Path('model'))}"
        )
    if result.settings.method == "s2ft":
        return "The adapter", (
            "from peft_kernels import load_adapter, slices\n"
            f'slices.to_lora(slices.read("adapter", base_model), "lora")  # the same as LoRA, for PEFT\n'
            f'load_adapter(base_model, "adapter")  {beside}'
        )
    return "The adapter", (
        f'from peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, "adapter")  {beside}'
    )


def extract_command(settings: Settings, model: Path) -> str:
    """The command that writes the difference of the trained model and its base."""
    base = settings.model if Path(settings.model).is_dir() else "BASE_MODEL_DIRECTORY"
    return f"peft-kernels delta extract {base} {model} -o changes.delta"


def print_results(result: RunResult, console: Console, output: Path) -> None:
    """Prints the table, the text sample and where everything lies."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(result.columns()):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in result.rows():
        table.add_row(row.label, *row.cells, *([row.ratio or ""] if len(result.arms) > 1 else []))
    console.print(table)
    for note in notes(result):
        console.print(f"- {note}", highlight=False, markup=False, style="dim")
    if result.after["sample"]:
        for label, text in (("before", result.before["sample"]), ("after", result.after["sample"])):
            console.rule(f"text sample {label} training", align="left")
            console.print(result.prompt, end="", highlight=False, markup=False, style="dim")
            console.print(text, highlight=False, markup=False)
        console.rule()
    whole = result.settings.trains_whole_model
    left = ("Model", "model") if whole else ("Adapter", "adapter")
    for label, name in (("Report", "report.html"), ("Numbers", "metrics.json"), left):
        console.print(f"{label + ':':<9} {output / name}", highlight=False, markup=False, soft_wrap=True)
    if whole:
        command = extract_command(result.settings, output / "model")
        console.print(f"What training has changed, as a file: {command}", highlight=False, markup=False, soft_wrap=True)
