"""`ScheduleCallback` and one callback per policy: LISA, HFT and GreenTrainer with transformers' `Trainer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from ..schedules import HFT, LISA, GreenTrainer, Schedule, greentrainer, hft, lisa
from .stepped import SteppedCallback


class ScheduleCallback(SteppedCallback[Schedule]):
    """Drives a schedule from transformers' `Trainer`, and lets a run continue exactly from its checkpoints.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[LISACallback(active_layers=2)])
        trainer.train()

    For a schedule of your own, or one with parameters that a callback below lacks, give what builds it:

        ScheduleCallback(lambda model, optimizer: pk.schedules.LISA(model, optimizer, seed=7))

    Everything that is to train at some time requires a gradient when the Trainer makes its optimizer. Beside the
    Trainer's files each checkpoint gets `schedule_state.json`, written whole, which a run that continues reads from
    `output_dir/checkpoint-<step>`. When training ends, all parameters require a gradient again. With several
    processes, `TrainingArguments` needs `ddp_find_unused_parameters=True`.

    Args:
        build: makes the schedule of the run's model and optimizer.
        resume_from_checkpoint: the directory that is given to `Trainer.train(resume_from_checkpoint=...)`, where it is
            another one than `output_dir/checkpoint-<step>`.

    Attributes:
        schedule: the run's, from its beginning on; None before.

    Raises:
        ValueError: from `Trainer.train`, what the schedule raises.
        FileNotFoundError: from `Trainer.train`, when a run continues from a checkpoint without the file.
    """

    state_name = "schedule_state.json"

    def __init__(
        self,
        build: Callable[[nn.Module, torch.optim.Optimizer], Schedule],
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(resume_from_checkpoint)
        self._make = build

    def _build(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> Schedule:
        return self._make(kwargs["model"], kwargs["optimizer"])


class LISACallback(ScheduleCallback):
    """`schedules.LISA` in transformers' `Trainer`; see there for the arguments, and `ScheduleCallback`."""

    def __init__(
        self,
        active_layers: int = 2,
        interval: int = 20,
        layers: str | Sequence[str] | None = None,
        seed: int = 0,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        lisa.check_arguments(active_layers, interval, seed)
        super().__init__(
            lambda model, optimizer: LISA(model, optimizer, active_layers, interval, layers, seed),
            resume_from_checkpoint,
        )


class HFTCallback(ScheduleCallback):
    """`schedules.HFT` in transformers' `Trainer`; see there for the arguments, and `ScheduleCallback`."""

    def __init__(
        self,
        interval: int | None = None,
        norms: Literal["half", "train", "freeze"] = "half",
        embeddings: Literal["train", "freeze"] = "train",
        layers: str | Sequence[str] | None = None,
        seed: int = 0,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        hft.check_arguments(interval, norms, embeddings, seed)
        super().__init__(
            lambda model, optimizer: HFT(model, optimizer, interval, norms, embeddings, layers, seed),
            resume_from_checkpoint,
        )


class GreenTrainerCallback(ScheduleCallback):
    """`schedules.GreenTrainer` in transformers' `Trainer`; see there for the arguments, and `ScheduleCallback`.

    Args:
        sample_batch: as in `schedules.GreenTrainer`; None takes the first rows of the training data, as many as
            `per_device_train_batch_size`, through the Trainer's collator. That needs a dataset with indices.
    """

    def __init__(
        self,
        rho: float = 0.5,
        interval: int = 100,
        sample_batch: Any = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        greentrainer.check_arguments(rho, interval)
        self._sample = sample_batch

        def build(model: nn.Module, optimizer: torch.optim.Optimizer) -> Schedule:
            return GreenTrainer(model, optimizer, self._sample, rho, interval)

        super().__init__(build, resume_from_checkpoint)

    def _build(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> Schedule:
        if self._sample is None:
            self._sample = first_batch(kwargs["train_dataloader"], args.per_device_train_batch_size, args.device)
        return super()._build(args, state, **kwargs)


def first_batch(loader: Any, size: int, device: torch.device) -> Any:
    """The first rows of a loader's dataset, collated; neither the loader nor torch's generators are moved on.

    Raises:
        ValueError: the dataset has no indices.
    """
    dataset: Any = getattr(loader, "dataset", None)
    collate: Any = getattr(loader, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(
            "sample_batch must be given to GreenTrainerCallback where the training data cannot be indexed, got a "
            f"{type(dataset).__name__}"
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        batch = collate([dataset[number] for number in range(min(size, len(dataset)))])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
