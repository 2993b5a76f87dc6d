"""Errors that the command line prints as one message, without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the user can put right; the message says what was expected and what came."""

    exit_code = 2


class TrainingFailed(UserError):
    """The run itself went wrong (a loss that is not finite); earlier checkpoints stay as they are."""

    exit_code = 1


def require(module: str, package: str | None = None) -> ModuleType:
    """Imports an optional dependency, or raises `UserError` with the command that installs it.

    Args:
        module: the name to import, `"transformers"`.
        package: its name on the package index where that differs.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(
            f"this command needs the package {package or module}: pip install 'peft-kernels[finetune]'"
        ) from None
