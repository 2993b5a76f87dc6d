"""`Schedule`: what all policies share, namely counting steps, switching, saving and reporting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn

from ..planning import shortened, unwrapped
from .trainable import TrainableSet, stateful_optimizer

FORMAT = 1

# Weak on both sides: a schedule holds its optimizer, and a dead pair must not be kept alive from here.
_schedules: WeakKeyDictionary[torch.optim.Optimizer, ReferenceType[Schedule]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ScheduleReport:
    """What trains at the moment.

    Attributes:
        schedule: the policy's name and settings.
        completed_steps: steps of the optimizer so far.
        training: names of the parameters that the schedule lets train.
        frozen: names of those that it keeps frozen for now.
        training_elements: numbers in the former.
        elements: numbers in both.
        notes: what is particular to the policy.
    """

    schedule: str
    completed_steps: int
    training: tuple[str, ...]
    frozen: tuple[str, ...]
    training_elements: int
    elements: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.training_elements / self.elements
        count = len(self.training) + len(self.frozen)
        lines = [
            f"{self.schedule} after {self.completed_steps} steps: {len(self.training)} of {count} parameters train, "
            f"{self.training_elements:,} of {self.elements:,} numbers ({share:.1f}%)",
            *self.notes,
            f"training: {shortened(list(self.training), ', ') or 'none'}",
        ]
        return "\n  ".join(lines)


class Schedule(ABC):
    """A policy that decides, period by period, which parameters train.

    Call `step` after each step of the optimizer:

        schedule = LISA(model, optimizer)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    The first period begins when the schedule is made, and each further one behind `interval` steps of the optimizer.
    Every policy has a set of parameters to choose from, out of those that require a gradient at that time; no other
    parameter is touched. One that stops training has `requires_grad=False`, its gradient and its state in the optimizer
    are dropped, which frees their memory. One that starts begins with the state of a new optimizer. The optimizer's
    parameter groups stay as they are. A step that a gradient scaler leaves out does not count. Random choices depend
    on `seed` and the period's number alone; no generator of torch's or Python's is touched.

    In distributed training every process has to use the same seed, and DistributedDataParallel needs
    `find_unused_parameters=True`, because it is told about frozen parameters only when it is made. Sharded parameters
    (FSDP) are not supported. Activation checkpointing has to be the non-reentrant kind, unless what comes first in
    the model always trains.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        interval: int | None,
        seed: int | None,
    ) -> None:
        """For policies: checks everything and changes nothing yet; `_start` begins the first period.

        Args:
            parameters: those to choose from, by name.
            interval: length of a period in steps; None for a single one.
            seed: of random choices; None for a policy that makes none.
        """
        self._optimizer = stateful_optimizer(optimizer)
        if (other := schedule_of(self._optimizer)) is not None:
            raise ValueError(f"optimizer has a schedule already, {other!r}; close() that one first")
        self._trainable = TrainableSet(parameters, self._optimizer)
        self.interval = interval
        self.seed = seed
        self.completed_steps = 0
        self._optimizer_stepped = False

    def _start(self, names: Collection[str]) -> None:
        """Begins the first period, in which `names` train."""
        self._trainable.adopt(names)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        _schedules[self._optimizer] = ref(self)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._trainable.tidy()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # A gradient scaler leaves it to fused optimizers to make no step after an overflow.
        overflow = getattr(optimizer, "found_inf", None)
        self._optimizer_stepped = overflow is None or not bool(overflow)

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the parameters that the schedule lets train, in the model's order."""
        return tuple(name for name in self._trainable.parameters if name in self._trainable.active)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of those that it keeps frozen for now."""
        return tuple(name for name in self._trainable.parameters if name not in self._trainable.active)

    def step(self) -> bool:
        """Counts a step that the optimizer has made; returns whether a new period begins with the next one.

        Does nothing when the optimizer has left the step out, as a gradient scaler makes it do after an overflow.
        """
        if not self._optimizer_stepped:
            return False
        self._optimizer_stepped = False
        self.completed_steps += 1
        if self.interval is None or self.completed_steps % self.interval:
            return False
        self._begin_period(self.completed_steps // self.interval)
        return True

    @abstractmethod
    def _begin_period(self, number: int) -> None:
        """Begins period `number`, of at least 1."""

    def close(self) -> None:
        """Ends the schedule: every parameter that it may choose trains again, and nothing changes any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if schedule_of(self._optimizer) is self:
            del _schedules[self._optimizer]
            self._trainable.release()

    def settings(self) -> dict[str, Any]:
        """What has to be the same for a state to be continued; plain values."""
        return {"interval": self.interval}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs besides the model's and the optimizer's own state_dict.

        Plain values that JSON can hold. Gradients that no step of the optimizer has used yet are not in it.
        """
        return {
            "format": FORMAT,
            "schedule": type(self).__name__,
            "settings": self.settings(),
            "seed": self.seed,
            "completed_steps": self.completed_steps,
            "training": list(self.training),
            "frozen": list(self.frozen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`, to the bit; the optimizer's may be loaded before or after it.

        Continues with the saved seed.

        Raises:
            ValueError: it is another policy's, or of other settings or parameters; nothing has changed.
        """
        self._check_state(state)
        self.seed = state["seed"]
        self.completed_steps = state["completed_steps"]
        self._optimizer_stepped = False
        self._trainable.adopt(state["training"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError unless `state` fits."""
        ours = self.state_dict()
        missing = ours.keys() - state.keys()
        if missing:
            raise ValueError(f"state must be a schedule's state_dict, but has no {sorted(missing)[0]}")
        for name in ("format", "schedule", "settings"):
            if state[name] != ours[name]:
                raise ValueError(f"state must have {name} {ours[name]!r}, got {state[name]!r}")
        check_at_least("completed_steps of the state", state["completed_steps"], 0)
        if self.seed is not None:
            check_seed(state["seed"])
        known, saved = set(self._trainable.parameters), [*state["training"], *state["frozen"]]
        if len(saved) != len(set(saved)):
            raise ValueError("state must name each parameter once, and names some twice")
        if known != set(saved):
            name = sorted(known.symmetric_difference(saved))[0]
            whose = "this schedule's" if name in known else "the state's"
            raise ValueError(f"state must be of the same parameters, but {name!r} is only one of {whose}")

    def report(self) -> ScheduleReport:
        """What trains at the moment."""
        sizes = {name: parameter.numel() for name, parameter in self._trainable.parameters.items()}
        return ScheduleReport(
            repr(self),
            self.completed_steps,
            self.training,
            self.frozen,
            sum(sizes[name] for name in self.training),
            sum(sizes.values()),
            self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        return ()

    def __repr__(self) -> str:
        settings = self.settings() | ({} if self.seed is None else {"seed": self.seed})
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def schedule_of(optimizer: torch.optim.Optimizer) -> Schedule | None:
    """The schedule that is open over this optimizer."""
    held = _schedules.get(optimizer)
    return None if held is None else held()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that require a gradient, by name, each once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    return {name: parameter for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad}


def check_at_least(name: str, value: Any, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_seed(seed: Any) -> None:
    """Raises ValueError unless it is an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
