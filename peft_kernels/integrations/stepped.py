"""`SteppedCallback`: what moves with the steps of transformers' `Trainer`, and goes on exactly from its checkpoints."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter_files import install


class Stepped(Protocol):
    """What a callback drives."""

    def step(self) -> bool:
        """A step of the optimizer is done."""
        ...

    def close(self) -> None:
        """Training has ended."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continues from a `state_dict`."""
        ...


S = TypeVar("S", bound=Stepped)


class SteppedCallback(TrainerCallback, Generic[S]):
    """Builds a schedule when training begins, steps it, and keeps its state in a file of each checkpoint.

    Args:
        resume_from_checkpoint: the directory that is given to `Trainer.train(resume_from_checkpoint=...)`, where it is
            another one than `output_dir/checkpoint-<step>`.

    Attributes:
        schedule: the run's, from its beginning on; None before.
    """

    state_name: ClassVar[str]
    """The name of the file."""

    def __init__(self, resume_from_checkpoint: str | os.PathLike[str] | None = None) -> None:
        self._checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.schedule: S | None = None

    def _build(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> S:
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Builds the schedule over the run's model and optimizer."""
        if self.schedule is not None:
            self.schedule.close()
            self.schedule = None
        schedule = self._build(args, state, **kwargs)
        if state.global_step > 0:
            try:
                schedule.load_state_dict(read_state(self._checkpoint or _directory(args, state), self.state_name))
            except BaseException:
                schedule.close()
                raise
        self.schedule = schedule

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step of the optimizer is done."""
        if self.schedule is not None:
            self.schedule.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the schedule's state to the checkpoint."""
        if self.schedule is not None and args.should_save:
            write_state(_directory(args, state), self.state_name, self.schedule.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves model and optimizer alone; `schedule` can still be looked at."""
        if self.schedule is not None:
            self.schedule.close()


def _directory(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def write_state(directory: Path, name: str, state: dict[str, Any]) -> None:
    """Writes a schedule's state_dict; a reader finds the file either as it was or as it will be."""
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        unfinished.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        install([(unfinished, directory / name)])
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def read_state(directory: Path, name: str) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged.
    """
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {name}, without which the schedule cannot continue; if the checkpoint is "
            "elsewhere, give the callback its directory as resume_from_checkpoint"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the schedule's state in {directory} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(record).__name__}")
    return record
