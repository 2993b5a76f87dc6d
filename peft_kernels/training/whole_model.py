"""What a run leaves that trains the model's own parameters: a directory that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .models import LoadedModel, quiet_transformers


def write_model(base: LoadedModel, directory: Path) -> None:
    """Writes model and tokenizer as `save_pretrained` does, in safetensors.

    Everything is written beside `directory` and renamed, so an interrupted save leaves the previous model, there or in
    `<directory>.previous`.
    """
    partial, previous = directory.with_suffix(".partial"), directory.with_suffix(".previous")
    shutil.rmtree(partial, ignore_errors=True)
    model: Any = base.model
    training = model.config.use_cache
    model.config.use_cache = base.use_cache
    try:
        with quiet_transformers():
            model.save_pretrained(partial, safe_serialization=True)
            base.tokenizer.save_pretrained(partial)
    finally:
        model.config.use_cache = training
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    partial.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)
