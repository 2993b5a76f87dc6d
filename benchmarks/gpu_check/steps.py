"""Steps as processes: each has a share of the time, a log, and an end that the others survive.

A step may use its own share of the time and whatever the steps before it have left over; the shares of the steps after
it are theirs. So an early step that hangs costs no later one its turn, and a quick one gives its time on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LEAST_SECONDS = 5.0
"""With less than this left a step does not begin."""

PASSED, FAILED, TIMED_OUT, NOT_RUN, NOT_PERMITTED = "passed", "failed", "timed out", "not run", "not permitted"


@dataclass(frozen=True)
class Step:
    """How one step ended.

    Attributes:
        status: passed, failed, timed out, not run or not permitted, with the reason in `note`.
        backend: the backend whose kernels a failure of this step speaks against; empty where none is.
    """

    name: str
    status: str
    seconds: float
    note: str = ""
    backend: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.status} in {self.seconds} s {self.note}".rstrip()


@dataclass(frozen=True)
class Command:
    """What a step runs."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    backend: str = ""


@dataclass(frozen=True)
class Ended:
    """A command that ran, or was to run.

    Attributes:
        code: the exit status; None when it was stopped at its limit, or never began.
        seconds: how long it ran; None when it never began.
        log: all that it printed.
    """

    command: Command
    code: int | None
    seconds: float | None
    limit: float
    log: str = ""

    def step(self, status: str | None = None, note: str | None = None) -> Step:
        """The outcome: as the exit status says, unless the caller knows better how a finished command went."""
        command, seconds = self.command, round(self.seconds or 0.0, 1)
        if self.seconds is None:
            status, note = NOT_RUN, "no time left"
        elif self.code is None:
            status, note = TIMED_OUT, f"limit {self.limit:.0f} s"
        elif status is None:
            status = PASSED if self.code == 0 else FAILED
            note = note if note is not None else "" if self.code == 0 else f"exit status {self.code}"
        return Step(command.name, status, seconds, note or "", command.backend)


class Runner:
    """Runs commands one step at a time, or several within one step, and keeps what they print in one log."""

    def __init__(self, log: Path, seconds: float, shares: Mapping[str, float]) -> None:
        """
        Args:
            log: the file that every command's output is added to.
            seconds: for all steps together.
            shares: every step's part of that, in the order in which they run; only their proportions count.
        """
        self._log = log
        self._deadline = time.monotonic() + seconds
        scale = seconds / sum(shares.values())
        self._shares = {name: share * scale for name, share in shares.items()}

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps that have a share, in order."""
        return tuple(self._shares)

    def limit(self, name: str) -> float:
        """The seconds that step `name` may take from now on."""
        names = list(self._shares)
        reserved = sum(self._shares[later] for later in names[names.index(name) + 1 :])
        return self._deadline - time.monotonic() - reserved

    def run(self, name: str, commands: Sequence[Command]) -> list[Ended]:
        """Runs the commands of step `name` beside each other until all have ended or the step's time is up."""
        limit = self.limit(name)
        if limit < LEAST_SECONDS:
            return [Ended(command, None, None, limit) for command in commands]
        with tempfile.TemporaryDirectory() as directory:
            logs = [Path(directory, str(i)) for i in range(len(commands))]
            started = time.monotonic()
            running = [_start(command, log, len(commands)) for command, log in zip(commands, logs, strict=True)]
            seconds, codes = _wait(running, started, limit)
            ended = [
                Ended(command, codes[i], seconds[i], limit, logs[i].read_text(errors="replace"))
                for i, command in enumerate(commands)
            ]
        with self._log.open("a") as file:
            for one in ended:
                file.write(f"\n##### {one.command.name}: {' '.join(one.command.arguments)}\n{one.log}\n")
        return ended


def _start(command: Command, log: Path, beside: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **command.environment}
    if beside > 1:  # the processors are shared, too
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))
    with log.open("wb") as file:
        # A session of its own, so that all it starts can be stopped with it.
        return subprocess.Popen(
            list(command.arguments), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _wait(
    running: Sequence[subprocess.Popen[bytes]], started: float, limit: float
) -> tuple[list[float], list[int | None]]:
    """Seconds and exit status of each; what still runs at the limit is killed."""
    seconds = [limit] * len(running)
    codes: list[int | None] = [None] * len(running)
    while time.monotonic() < started + limit and None in codes:
        for i, process in enumerate(running):
            if codes[i] is None and process.poll() is not None:
                codes[i], seconds[i] = process.returncode, time.monotonic() - started
        time.sleep(0.02)
    for process, code in zip(running, codes, strict=True):
        if code is None:
            _kill(process)
    return seconds, codes


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
