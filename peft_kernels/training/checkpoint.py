"""Checkpoints from which a run continues exactly: safetensors and JSON, nothing that is unpickled.

    checkpoints/step-00000040/
        state.json                    settings, finished steps, data digest, histories, optimizer groups, schedules,
                                      counts of kept tokens, how they are chosen and how many
        <arm>.adapter.safetensors     the trained parameters by name, and the positions of sparse deltas
        <arm>.optimizer.safetensors   the optimizer's tensors, "<parameter number>.<name>"
        <arm>.reselection.safetensors where entries move, the Reselector's tensors
        <arm>.channels.safetensors    where slices train, their channels, "<path>.<dim>"

A checkpoint is written beside its predecessor and renamed into place when complete; then the predecessor is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..channels import Slice
from . import token_arms
from .arms import OURS, Arm, StepRecord
from .errors import UserError
from .settings import Settings

_FORMAT = 5
_DIRECTORY = "checkpoints"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beyond the arms' tensors.

    Attributes:
        settings: the run's settings as plain values.
        step: finished steps.
        data_digest: SHA-256 of the data those steps read.
        before: what was measured before training.
        histories: per arm name, the step records as plain values.
    """

    settings: dict[str, Any]
    step: int
    data_digest: str
    before: dict[str, Any]
    histories: dict[str, list[dict[str, Any]]]


def write_checkpoint(
    output: Path, arms: list[Arm], settings: Settings, data_digest: str, before: dict[str, Any]
) -> Path:
    """Writes the state after the last finished step and removes older checkpoints; returns its directory."""
    step = len(arms[0].history)
    directory = output / _DIRECTORY / f"step-{step:08d}"
    if directory.exists():  # stopped right after a save: the same state
        return directory
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    groups, reselection, schedules, keep_schedules = {}, {}, {}, {}
    for arm in arms:
        save_file({name: value.contiguous() for name, value in arm.tensors().items()}, _adapter(partial, arm))
        state = arm.optimizer.state_dict()
        groups[arm.name] = state["param_groups"]
        save_file(_flat(state["state"]), _optimizer(partial, arm))
        if arm.reselector is not None:
            moving = arm.reselector.state_dict()
            save_file(moving.pop("tensors"), _reselection(partial, arm))
            reselection[arm.name] = moving
        if arm.schedule is not None:
            schedules[arm.name] = arm.schedule.state_dict()
        if arm.keep_schedule is not None:
            keep_schedules[arm.name] = arm.keep_schedule.state_dict()
        if channels := arm.channels():
            save_file(
                {f"{path}.{part.dim}": part.indices for path, part in channels.items()}, _channels(partial, arm.name)
            )
    record = {
        "format": _FORMAT,
        "settings": settings.as_dict(),
        "step": step,
        "data_digest": data_digest,
        "before": before,
        "histories": {arm.name: arm.history_as_dicts() for arm in arms},
        "optimizer_groups": groups,
        "reselection": reselection,
        "schedules": schedules,
        "keep_schedules": keep_schedules,
        "token_elimination": {arm.name: token_arms.counts(arm) for arm in arms},
        "token_configurations": {arm.name: token_arms.configuration_of(arm) for arm in arms},
    }
    (partial / "state.json").write_text(json.dumps(record))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    partial.rename(directory)
    _flush(directory.parent)
    for other in directory.parent.iterdir():
        if other != directory:
            shutil.rmtree(other)
    return directory


def read_state(output: Path) -> State:
    """The newest complete checkpoint's state.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    record = _record(_newest(output))
    return State(*(record[name] for name in ("settings", "step", "data_digest", "before", "histories")))


def read_channels(output: Path) -> dict[str, Slice] | None:
    """Which channels our arm trains, by path, as the newest checkpoint says; None where it trains no slices.

    Raises:
        UserError: there is no checkpoint, or it cannot be read.
    """
    path = _channels(_newest(output), OURS)
    if not path.exists():
        return None
    found = {}
    try:
        for key, indices in load_file(path).items():
            layer, _, dim = key.rpartition(".")
            found[layer] = Slice(indices, dim)  # type: ignore[arg-type]
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return found


def restore_arms(output: Path, arms: list[Arm]) -> None:
    """Puts parameters, optimizer state and histories of the newest checkpoint into freshly built arms.

    Raises:
        UserError: the checkpoint does not fit these arms; nothing has been changed then.
    """
    directory = _newest(output)
    record = _record(directory)
    loaded = []
    for arm in arms:
        if arm.name not in record["histories"]:
            raise UserError(f"{directory} holds no {arm.name} adapter")
        if record["token_configurations"][arm.name] != token_arms.configuration_of(arm):
            raise UserError(
                f"--token-elimination {record['settings']['token_elimination']}: what it says is not what the run was "
                "started with, so it cannot be resumed exactly"
            )
        try:
            parameters, tensors = load_file(_adapter(directory, arm)), load_file(_optimizer(directory, arm))
            moving = load_file(_reselection(directory, arm)) if arm.reselector is not None else {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{directory} cannot be read: {error}") from error
        expected = {name: (value.shape, value.dtype) for name, value in arm.tensors().items()}
        if {name: (value.shape, value.dtype) for name, value in parameters.items()} != expected:
            raise UserError(f"{directory}: the {arm.name} adapter in it does not fit the model that was built")
        loaded.append((arm, parameters, tensors, moving))
    for arm, parameters, tensors, moving in loaded:
        arm.load(parameters)
        groups = record["optimizer_groups"][arm.name]
        arm.optimizer.load_state_dict({"state": _nested(tensors), "param_groups": groups})
        if arm.reselector is not None:
            arm.reselector.load_state_dict({**record["reselection"][arm.name], "tensors": moving})
        if arm.schedule is not None:
            try:
                arm.schedule.load_state_dict(record["schedules"][arm.name])
            except ValueError as error:
                raise UserError(f"{directory}: the schedule in it does not fit this run: {error}") from error
        if arm.keep_schedule is not None:
            arm.keep_schedule.load_state_dict(record["keep_schedules"][arm.name])
        token_arms.restore_counts(arm, record["token_elimination"][arm.name])
        arm.history[:] = [StepRecord(**step) for step in record["histories"][arm.name]]


def _newest(output: Path) -> Path:
    complete = sorted((output / _DIRECTORY).glob("step-*[0-9]/state.json"))
    if not complete:
        raise UserError(f"--resume: {output} holds no checkpoint of an earlier run")
    return complete[-1].parent


def _record(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{directory}/state.json cannot be read: {error}") from error
    if record.get("format") != _FORMAT:
        raise UserError(f"{directory}: checkpoint format {record.get('format')}, this version reads {_FORMAT}")
    return dict(record)


def _adapter(directory: Path, arm: Arm) -> Path:
    return directory / f"{arm.name}.adapter.safetensors"


def _optimizer(directory: Path, arm: Arm) -> Path:
    return directory / f"{arm.name}.optimizer.safetensors"


def _reselection(directory: Path, arm: Arm) -> Path:
    return directory / f"{arm.name}.reselection.safetensors"


def _channels(directory: Path, name: str) -> Path:
    return directory / f"{name}.channels.safetensors"


def _flat(state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{index}.{name}": value.contiguous() for index, slot in state.items() for name, value in slot.items()}


def _nested(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
