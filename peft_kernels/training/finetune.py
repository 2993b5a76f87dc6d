"""One fine-tuning run from start to report; `peft-kernels finetune` calls `run` and prints what it raises."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import peft_kernels as pk

from .. import info
from . import checkpoint
from .arms import PEFT, Arm, held_out_loss
from .data import BlockStream, read_corpus
from .errors import TrainingFailed, UserError
from .loop import StopRequest, stop_on_interrupt, train
from .lora_arms import load_in_peft
from .memory import MEASURE, peak_step_bytes
from .methods import build_arms
from .metrics import curve_difference, summarize
from .models import LoadedModel, load_model
from .plots import draw_plots
from .progress import TrainingDisplay, status
from .report import RunResult, print_results, write_html, write_metrics
from .sample import continuation, default_prompt
from .selective_loss import load_reference
from .settings import Settings, resumed, started
from .whole_model import write_model

INTERRUPTED = 130
_EARLIER_RUN = ("checkpoints", "adapter", "model", "metrics.json", "report.html", "loss.png", "step_time.png")


@dataclass
class _Run:
    """What the steps of one run share."""

    settings: Settings
    output: Path
    console: Console
    device: torch.device
    base: LoadedModel
    stream: BlockStream
    arms: list[Arm]
    adapter_report: str
    prompt: str
    before: dict[str, Any]

    @property
    def finished(self) -> int:
        """Steps that all arms have taken."""
        return len(self.arms[0].history)

    @property
    def result(self) -> Path:
        """Directory of what has been trained."""
        return self.output / ("model" if self.settings.trains_whole_model else "adapter")

    def checkpoint(self) -> None:
        """Writes the checkpoint of all arms, and the adapter. A whole model is in its checkpoint already."""
        if not self.settings.trains_whole_model:
            pk.save_adapter(self.arms[0].model, self.result)
        digest = self.stream.digest(blocks_read(self.settings, self.finished))
        checkpoint.write_checkpoint(self.output, self.arms, self.settings, digest, self.before)

    def save(self) -> None:
        """Writes the checkpoint and the result."""
        if self.settings.trains_whole_model:
            write_model(self.base, self.result)
        self.checkpoint()


def run(given: dict[str, Any], output: Path, resume: bool, overwrite: bool, console: Console) -> int:
    """Trains, or goes on training, and reports; returns the exit code.

    Args:
        given: the settings that the user named, by name.
        output: directory for everything the run writes.
        resume: continue the run in `output`.
        overwrite: replace the run in `output`.

    Raises:
        UserError: see its message.
    """
    state = checkpoint.read_state(output) if resume else None
    settings = started(given) if state is None else resumed(state.settings, given)
    earlier = _claim(output, overwrite) if state is None else []
    with warnings.catch_warnings():
        # transformers and PEFT warn of each other's deprecations, which is nothing the user of this command can change.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            prepared = _prepare(settings, output, console, state)
            _clear(earlier)
            return _run(prepared)
        except torch.OutOfMemoryError as error:
            raise TrainingFailed(
                "out of memory on the GPU; try a smaller --batch-size with --gradient-accumulation, a shorter "
                "--seq-len, or --gradient-checkpointing"
            ) from error


def _run(this: _Run) -> int:
    with stop_on_interrupt() as stop:
        if this.finished < this.settings.steps:
            _train(this, stop)
        this.save()
    if this.finished < this.settings.steps:
        what = "model" if this.settings.trains_whole_model else "adapter"
        this.console.print(
            f"Stopped after step {this.finished} of {this.settings.steps}. The {what} is in {this.result}; continue "
            f"with: peft-kernels finetune --resume --output {this.output}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    _finish(this)
    return 0


def blocks_read(settings: Settings, steps: int) -> int:
    """Number of blocks that the first `steps` optimizer steps read."""
    return steps * settings.gradient_accumulation * settings.batch_size


def _claim(output: Path, overwrite: bool) -> list[Path]:
    """Makes `output` ours: refuses one that holds a run, unless that is to go; returns what of it is there."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: exists and is no directory")
    earlier = [output / name for name in _EARLIER_RUN if (output / name).exists()]
    if earlier and not overwrite:
        raise UserError(
            f"--output {output} holds an earlier run ({earlier[0].name}); continue it with --resume, replace it with "
            "--overwrite, or choose another directory"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    return earlier


def _clear(earlier: list[Path]) -> None:
    """Removes an earlier run, once the new one has all that it needs."""
    for path in earlier:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def choose_device(name: str) -> torch.device:
    """The device behind `--device`; `auto` is the first GPU, or else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be auto, cpu or cuda (cuda:1, ...), got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda (cuda:1, ...), got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no GPU")
    return device


def _prepare(settings: Settings, output: Path, console: Console, state: checkpoint.State | None) -> _Run:
    device = choose_device(settings.device)
    if device.type == "cpu":
        pk.keep_freed_memory()
    torch.manual_seed(settings.seed)
    with status(console, f"Loading {settings.model}"):
        base = load_model(settings.model, getattr(torch, settings.dtype), device)
    console.print(f"Model: {base.description}", highlight=False)
    stream = BlockStream(read_corpus(settings.data, base.tokenizer), base.tokenizer, settings.seq_len, settings.seed)
    console.print(f"Data: {corpus_description(settings)}", highlight=False, markup=False)
    channels = None if state is None else checkpoint.read_channels(output)

    def batches(count: int) -> Iterator[Tensor]:
        return (stream.batch(index, settings.batch_size).to(device) for index in range(count))

    reference = load_reference(settings, base, device)
    arms, adapter_report = build_arms(base.model, settings, batches, channels, reference)
    console.print(adapter_report.splitlines()[0], highlight=False, markup=False)
    prompt = settings.prompt or default_prompt(settings.data, stream, base.tokenizer)
    this = _Run(settings, output, console, device, base, stream, arms, adapter_report, prompt, {})
    if state is None:
        this.before = _measure(this, "before")
    else:
        _check_data(this, state)
        checkpoint.restore_arms(output, arms)
        this.before = state.before
        this.prompt = state.before["prompt"]
        console.print(f"Resuming after step {state.step} of {settings.steps}", highlight=False)
    return this


def corpus_description(settings: Settings) -> str:
    """The corpus, in words."""
    return settings.data or "the standard library's Python sources"


def _check_data(this: _Run, state: checkpoint.State) -> None:
    if this.stream.digest(blocks_read(this.settings, state.step)) != state.data_digest:
        raise UserError(
            f"--data: the text in {corpus_description(this.settings)} is not what the first {state.step} steps of this "
            "run were trained on, so it cannot be resumed exactly"
        )


def _measure(this: _Run, when: str) -> dict[str, Any]:
    """Text sample and held-out loss of our arm."""
    with status(this.console, f"Text sample and held-out loss {when} training"):
        arm, settings = this.arms[0], this.settings
        sample = continuation(arm.model, this.base.tokenizer, this.prompt, settings.sample_tokens, this.device)
        loss = held_out_loss(arm, this.stream.held_out, settings.batch_size, this.device)
    return {"prompt": this.prompt, "sample": sample, "held_out_loss": loss}


def _train(this: _Run, stop: StopRequest) -> None:
    display = TrainingDisplay(this.console, this.arms, this.settings)

    def after_step(finished: int) -> None:
        display.update(finished)
        if finished % this.settings.save_every == 0:
            this.checkpoint()

    with display.running():
        train(this.arms, this.stream, this.settings, this.device, stop, after_step)


def _finish(this: _Run) -> None:
    settings = this.settings
    adapter_report, token_report = _report_of_ours(this), None
    if settings.selects_tokens:
        token_report = pk.elimination.report(this.arms[0].model)
    for arm in this.arms:
        if arm.reselector is not None:
            arm.reselector.close()  # the steps that are measured below train nothing
        if arm.schedule is not None and settings.method == "greentrainer":
            arm.schedule.close()  # computes every gradient, as its most expensive steps do
    after = _measure(this, "after")
    with status(this.console, "Measuring memory, drawing plots"):
        batch = [this.stream.batch(0, settings.batch_size).to(this.device)] * settings.gradient_accumulation
        summaries = []
        for arm in this.arms:
            loss = (
                after["held_out_loss"]
                if arm is this.arms[0]
                else held_out_loss(arm, this.stream.held_out, settings.batch_size, this.device)
            )
            peak = peak_step_bytes(arm, batch, settings)
            summaries.append(summarize(arm, settings.tokens_per_step(), loss, peak))
        result = RunResult(
            settings=settings,
            model=this.base.description,
            corpus=corpus_description(settings),
            environment={"device": info.device_description(this.device), **info.versions()},
            adapter_report=adapter_report,
            token_report=token_report,
            arms=this.arms,
            summaries=summaries,
            memory_measure=MEASURE[this.device.type],
            prompt=this.prompt,
            before=this.before,
            after=after,
            curve_difference=curve_difference(this.arms) if settings.compares_one_function else None,
            peft_check=_peft_check(this),
        )
        images = draw_plots(this.arms, this.output)
        write_metrics(result, this.output / "metrics.json")
        write_html(result, images, this.output / "report.html")
    print_results(result, this.console, this.output)


def _report_of_ours(this: _Run) -> str:
    """What trains in our arm; under a schedule, in the end."""
    schedule = this.arms[0].schedule
    return this.adapter_report if schedule is None else str(schedule.report())


def _peft_check(this: _Run) -> float | None:
    """Held-out loss of the adapter directory in plain PEFT, where the run has a PEFT model at hand."""
    arm = next((arm for arm in this.arms if arm.name == PEFT), None)
    if arm is None:
        return None
    load_in_peft(arm.model, this.output / "adapter")
    return held_out_loss(arm, this.stream.held_out, this.settings.batch_size, this.device)
