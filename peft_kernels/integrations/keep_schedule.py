"""`KeepScheduleCallback`: the share of kept tokens grows with the steps of transformers' `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..elimination import KeepSchedule
from ..elimination.keep_schedule import check_timing
from .stepped import SteppedCallback


class KeepScheduleCallback(SteppedCallback[KeepSchedule]):
    """`elimination.KeepSchedule` in transformers' `Trainer`; see there for what is not said here.

        pk.inject(model, pk.TokenEliminationConfig(keep_ratio=0.25))
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[KeepScheduleCallback()])
        trainer.train()

    Beside the Trainer's files each checkpoint gets `keep_schedule_state.json`, written whole, from which a run
    continues exactly. When training ends the layers keep the ratios that they came to; a second `train` with `start`
    None goes on from these.

    Args:
        start, end, shape, interval: as in `KeepSchedule`.
        steps: of the optimizer, after which `end` is reached; None takes all of the run's.
        resume_from_checkpoint: the directory that is given to `Trainer.train(resume_from_checkpoint=...)`, where it is
            another one than `output_dir/checkpoint-<step>`.

    Attributes:
        schedule: the run's `KeepSchedule`, from its beginning on; None before.

    Raises:
        ValueError, TypeError: steps, shape or interval are off; from `Trainer.train`, what `KeepSchedule` raises.
        FileNotFoundError: from `Trainer.train`, when a run continues from a checkpoint without the file.
    """

    state_name = "keep_schedule_state.json"

    def __init__(
        self,
        start: float | Mapping[int, float] | None = None,
        end: float | Mapping[int, float] = 1.0,
        steps: int | None = None,
        shape: str = "linear",
        interval: int = 1,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        check_timing(1 if steps is None else steps, shape, interval)
        super().__init__(resume_from_checkpoint)
        self._start, self._end, self._steps = start, end, steps
        self._shape, self._interval = shape, interval

    def _build(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> KeepSchedule:
        steps = state.max_steps if self._steps is None else self._steps
        return KeepSchedule(
            kwargs["model"], self._start, self._end, steps=steps, shape=self._shape, interval=self._interval
        )
