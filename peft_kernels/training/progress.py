"""What the user sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .arms import Arm
from .settings import Settings

_RECENT = 5  # steps over which the displayed speed is taken


class TrainingDisplay:
    """Shows finished steps with loss and tokens per second, one line per arm."""

    def __init__(self, console: Console, arms: list[Arm], settings: Settings) -> None:
        self._console = console
        self._arms = arms
        self._settings = settings
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._line_every = max(1, settings.steps // 10)

    @contextmanager
    def running(self) -> Iterator[TrainingDisplay]:
        """Keeps the bars on screen for the enclosed code."""
        if not self._console.is_terminal:
            yield self
            return
        name, state = TextColumn("{task.fields[arm]}"), TextColumn("{task.description}")
        columns = (name, BarColumn(bar_width=16), MofNCompleteColumn(), state, TimeRemainingColumn())
        with Progress(*columns, console=self._console) as progress:
            for arm in self._arms:
                total, done = self._settings.steps, len(arm.history)
                self._tasks[arm.name] = progress.add_task("", arm=arm.name, total=total, completed=done)
            self._progress = progress
            yield self

    def update(self, finished: int) -> None:
        """Shows that `finished` steps are done."""
        if self._progress is not None:
            for arm in self._arms:
                self._progress.update(self._tasks[arm.name], completed=finished, description=self._state(arm))
        elif finished % self._line_every == 0 or finished in (1, self._settings.steps):
            states = "  |  ".join(f"{arm.name}: {self._state(arm)}" for arm in self._arms)
            self._console.print(f"step {finished}/{self._settings.steps}  {states}", highlight=False, soft_wrap=True)

    def _state(self, arm: Arm) -> str:
        recent = statistics.median(record.seconds for record in arm.history[-_RECENT:])
        return f"loss {arm.history[-1].loss:.4f}, {self._settings.tokens_per_step() / recent:,.0f} tokens/s"


def status(console: Console, text: str) -> AbstractContextManager[object]:
    """A spinner with `text` on a terminal, a plain line elsewhere."""
    if console.is_terminal:
        return console.status(text)
    console.print(text, highlight=False)
    return nullcontext()
