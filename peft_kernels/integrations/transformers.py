"""`SparseDeltaCallback`: sparse fine-tuning with transformers' `Trainer`."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter_files import install
from ..reselection import Reselector
from ..reselection.reselector import check_selection
from ..reselection.timetable import Timetable

STATE_NAME = "reselection_state.json"
TENSORS_NAME = "reselection_state.safetensors"


class SparseDeltaCallback(TrainerCallback):
    """Drives a `Reselector` from transformers' `Trainer`, and lets a run continue exactly from its checkpoints.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SparseDeltaCallback()])
        trainer.train()

    The model's layers are `SparseDeltaLinear` before the Trainer gets it. `total_steps` is the run's own. Beside the
    Trainer's files each checkpoint gets `reselection_state.json` and `reselection_state.safetensors`, each written
    whole. A run that continues reads them from `output_dir/checkpoint-<step>`.

    Args:
        selection, reselection_steps, selection_accumulation_steps, initial_reselection_rate, schedule, seed: as in
            `Reselector`.
        resume_from_checkpoint: the directory that is given to `Trainer.train(resume_from_checkpoint=...)`, where it is
            another one than `output_dir/checkpoint-<step>`.

    Attributes:
        reselector: the run's, from its beginning on; None before.

    Raises:
        ValueError: an argument is out of range; from `Trainer.train`, what `Reselector` raises.
        FileNotFoundError: from `Trainer.train`, when a run continues from a checkpoint without the two files.
    """

    def __init__(
        self,
        selection: Literal["rigl", "sm3", "random", "magnitude", "fixed"] = "rigl",
        reselection_steps: int = 20,
        selection_accumulation_steps: int = 5,
        initial_reselection_rate: float = 0.2,
        schedule: Literal["linear", "cosine"] = "linear",
        seed: int | None = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        check_selection(selection)
        # Only looked at: the number of steps is known when training begins.
        Timetable(reselection_steps, selection_accumulation_steps, initial_reselection_rate, schedule, total_steps=1)
        self._arguments: dict[str, Any] = {
            "selection": selection,
            "reselection_steps": reselection_steps,
            "selection_accumulation_steps": selection_accumulation_steps,
            "initial_reselection_rate": initial_reselection_rate,
            "schedule": schedule,
            "seed": seed,
        }
        self._checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.reselector: Reselector | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds the Reselector over the run's model and optimizer."""
        if self.reselector is not None:
            self.reselector.close()
        self.reselector = Reselector(
            kwargs["model"], kwargs["optimizer"], total_steps=state.max_steps, **self._arguments
        )
        if state.global_step > 0:
            try:
                saved = read_state(self._checkpoint or _directory(args, state))
                self.reselector.load_state_dict(saved)
            except BaseException:
                self.reselector.close()
                self.reselector = None
                raise

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step of the optimizer is done."""
        if self.reselector is not None:
            self.reselector.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the Reselector's state to the checkpoint."""
        if self.reselector is not None and args.should_save:
            write_state(_directory(args, state), self.reselector.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves model and optimizer alone; `reselector` can still be looked at."""
        if self.reselector is not None:
            self.reselector.close()


def _directory(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Writes a Reselector's state_dict; a reader finds each file either as it was or as it will be."""
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    tensors, plain = directory / f".{TENSORS_NAME}{suffix}", directory / f".{STATE_NAME}{suffix}"
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state["tensors"].items()}, tensors)
        record = {name: value for name, value in state.items() if name != "tensors"}
        plain.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        install([(tensors, directory / TENSORS_NAME), (plain, directory / STATE_NAME)])
    finally:
        for leftover in (tensors, plain):
            with suppress(FileNotFoundError):
                leftover.unlink()


def read_state(directory: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: one is damaged.
    """
    for name in (STATE_NAME, TENSORS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {name}, without which the selection cannot continue; if the checkpoint is "
                "elsewhere, give SparseDeltaCallback its directory as resume_from_checkpoint"
            )
    try:
        record = json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
        tensors: dict[str, torch.Tensor] = load_file(directory / TENSORS_NAME)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"the reselection state in {directory} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{directory / STATE_NAME} must hold a JSON object, got {type(record).__name__}")
    return {**record, "tensors": tensors}
