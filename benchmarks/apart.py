"""Measurements in a process of their own: one must not profit from what another left in the heap."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def _child(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        connection.send((function(*arguments), None))
    except Exception:
        connection.send((None, traceback.format_exc()))


def run_apart(function: Callable[..., Result], *arguments: Any, preload: Sequence[str]) -> Result:
    """`function(*arguments)` in a fresh process with as many threads as this one.

    Args:
        function: of a module's top level; its arguments and result are pickled.
        preload: modules imported once, by the server that forks the fresh processes.

    Raises:
        RuntimeError: it raised, with its traceback, or the process ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments, torch.get_num_threads()))
    process.start()
    sender.close()
    name = f"{function.__module__}.{function.__qualname__}{arguments}"
    try:
        result, failure = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {name} ended with exit code {process.exitcode}") from None
    process.join()
    if failure is not None:
        raise RuntimeError(f"{name} failed:\n{failure}")
    return result  # type: ignore[no-any-return]
