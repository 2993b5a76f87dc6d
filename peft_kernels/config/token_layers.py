"""What configurations share of decoder layers that select tokens: which layers, and a file of their own."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self


class TokenConfig:
    """A dataclass of options for decoder layers, written as JSON beside an adapter.

    Attributes:
        file_name: of its file.
        kind: by which the file says what it is of.
    """

    file_name: ClassVar[str]
    kind: ClassVar[str]

    def ratios(self, count: int) -> dict[int, float]:
        """The share of tokens that each layer selects, by its index, for a model of `count` layers."""
        raise NotImplementedError

    def thresholds(self, selecting: Collection[int]) -> dict[int, float | None]:
        """The least score of what each of the layers that select keeps, by their indices; None for no such bound."""
        return dict.fromkeys(selecting)

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {**values, "kind": self.kind}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` gives; options that it does not know are warned about.

        Raises:
            ValueError, TypeError: another kind of configuration, or as for the class.
        """
        if values.get("kind", cls.kind) != cls.kind:
            raise ValueError(f"kind must be {cls.kind!r} for a {cls.__name__}, got {values['kind']!r}")
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        ignored = {name: value for name, value in values.items() if name not in known | {"kind"}}
        if ignored:
            warnings.warn(f"{cls.__name__} ignores options it does not know: {ignored}", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in known})

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the file into a directory, created when missing; written aside, then renamed."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        finished = folder / f".{self.file_name}.{os.getpid()}.tmp"
        try:
            with finished.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(finished, folder / self.file_name)
        finally:
            finished.unlink(missing_ok=True)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError, TypeError: it is damaged, or as for the class.
        """
        path = Path(directory) / cls.file_name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def in_order(name: str, given: Mapping[int, float], count: int) -> dict[int, float]:
    """Numbers by index of the layer, none negative, sorted, for a model of `count` layers.

    Raises:
        ValueError: a layer is named twice, or the model does not have it; `name` is the option's.
    """
    found: dict[int, float] = {}
    for index, value in given.items():
        if not -count <= index < count:
            raise ValueError(f"{name} must name layers of the model, which has {count}, got {index}")
        if index % count in found:
            raise ValueError(f"{name} must name each layer once, got {index % count} twice")
        found[index % count] = value
    return dict(sorted(found.items()))


def check_ratio(name: str, value: Any) -> None:
    """Raises ValueError unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def check_finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def checked_layers(layers: Any) -> list[int]:
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of indices or None, got {layers!r}")
    indices = list(layers)
    if not indices or any(isinstance(index, bool) or not isinstance(index, int) for index in indices):
        raise ValueError(f"layers must be a list of indices, at least one, got {indices!r}")
    return indices
