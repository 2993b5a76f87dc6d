"""The training loop: every step once per arm, in turn, on the same batches and from the same random state.

Each step seeds torch's generator from (seed, step), so the randomness of a step needs nothing from the steps before it:
a resumed run draws the dropout masks that the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor

from .arms import Arm, StepRecord, learning_rate, loss_of
from .data import BlockStream
from .errors import TrainingFailed
from .settings import Settings

T = TypeVar("T")

_WARM_UP_STEPS = 2


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM): the loop ends after the current step."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; the second one interrupts at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handler(_number: int, _frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handler) for number in signals]
    try:
        yield request
    finally:
        for number, old in zip(signals, previous, strict=True):
            signal.signal(number, old)


def train(
    arms: list[Arm],
    stream: BlockStream,
    settings: Settings,
    device: torch.device,
    stop: StopRequest,
    after_step: Callable[[int], None],
) -> None:
    """Trains all arms from the end of their histories up to `settings.steps`, or until `stop` is requested.

    Args:
        after_step: called with the number of finished steps, when all arms have taken the step.

    Raises:
        TrainingFailed: a loss is NaN or infinite; the optimizer has not used that step's gradients.
    """
    first = len(arms[0].history)
    for step in range(first, settings.steps):
        if stop.requested:
            return
        start = step * settings.gradient_accumulation
        batches = [
            stream.batch(start + part, settings.batch_size).to(device) for part in range(settings.gradient_accumulation)
        ]
        for arm in arms:
            arm.history.append(
                _recorded_step(arm, batches, settings, step, device, timed=step - first >= _WARM_UP_STEPS)
            )
        after_step(step + 1)


def _recorded_step(
    arm: Arm, batches: list[Tensor], settings: Settings, step: int, device: torch.device, timed: bool
) -> StepRecord:
    loss, seconds = _timed(lambda: _step(arm, batches, settings, step), device)
    # Between the two, because a schedule drops the state of what stops training.
    held = arm.optimizer_bytes()
    _, more = _timed(lambda: _advance(arm), device)
    return StepRecord(step, loss, seconds + more, timed, held)


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - start


def _step(arm: Arm, batches: list[Tensor], settings: Settings, step: int) -> float:
    loss = forward_backward(arm, batches, settings, step)
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"{arm.name}: the loss of step {step + 1} is {loss}; try a smaller --lr than {settings.lr}"
        )
    if settings.max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(arm.parameters.values(), settings.max_grad_norm)
    for group in arm.optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    arm.optimizer.step()
    arm.optimizer.zero_grad(set_to_none=True)
    return loss


def _advance(arm: Arm) -> None:
    """What follows a step: entries that move, parameters that start or stop training, more tokens that are kept."""
    if arm.reselector is not None:
        arm.reselector.step()
    if arm.schedule is not None:
        arm.schedule.step()
    if arm.keep_schedule is not None:
        arm.keep_schedule.step()


def forward_backward(arm: Arm, batches: list[Tensor], settings: Settings, step: int) -> float:
    """Gradients of one step, accumulated over its batches; returns the mean loss."""
    torch.manual_seed(step_seed(settings.seed, step))
    total = torch.zeros((), dtype=torch.float32, device=batches[0].device)
    for batch in batches:
        loss = loss_of(arm, batch) / len(batches)
        loss.backward()
        total += loss.detach()
    return total.item()


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator for one step; the same for every arm."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def synchronize(device: torch.device) -> None:
    """Waits for the device, where work is queued rather than done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
