"""Thresholds of scores by layer: setting them on a model, and keeping them in a file.

Blocks whose score is smaller than their layer's threshold are dropped, so that a sequence keeps as many as are
informative. `threshold_refinement` finds them.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..adapter_files import install
from ..nn.token_elimination import TokenElimination
from ..planning import unwrapped
from .model import eliminating_layers
from .predictor import check_count
from .predictor_files import read_json, write_json

FILE_NAME = "token_thresholds.json"
KIND = "TOKEN_ELIMINATION_THRESHOLDS"


class Thresholds(Mapping[int, float]):
    """Thresholds by index of the decoder layer, and the scores that they are of.

    Args:
        values: at least one; -inf keeps everything.
        score: name of the score.
        block_size: tokens per block.
        base_model: name of the model that they were found on, None where it has none.

    Raises:
        TypeError, ValueError: they are not that.
    """

    def __init__(self, values: Mapping[int, float], score: str, block_size: int, base_model: str | None = None) -> None:
        self._values = _checked(values)
        check_count("block_size", block_size)
        self.score, self.block_size, self.base_model = score, block_size, base_model

    def __getitem__(self, index: int) -> float:
        return self._values[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `token_thresholds.json` into a directory, created when missing; written aside, then renamed."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        finished = folder / f".{FILE_NAME}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        values = {
            "kind": KIND,
            "base_model_name_or_path": self.base_model,
            "score": self.score,
            "block_size": self.block_size,
            # JSON has no infinity.
            "thresholds": {str(i): None if value == -math.inf else value for i, value in self.items()},
        }
        try:
            write_json(finished, values)
            install([(finished, folder / FILE_NAME)])
        finally:
            with suppress(FileNotFoundError):
                finished.unlink()

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Thresholds:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError, TypeError: it is damaged.
        """
        path = Path(directory) / FILE_NAME
        values = read_json(path, KIND)
        found, score, base = values.get("thresholds"), values.get("score"), values.get("base_model_name_or_path")
        if not isinstance(found, dict) or not all(key.isdecimal() for key in found):
            raise ValueError(f"{path} must hold thresholds by index of the layer, got {found!r}")
        if not isinstance(score, str) or not (base is None or isinstance(base, str)):
            raise ValueError(f"{path} must name the score, got {score!r}, and the base model or null, got {base!r}")
        numbers = {int(key): -math.inf if value is None else value for key, value in found.items()}
        return cls(numbers, score, values.get("block_size"), base)  # type: ignore[arg-type]


def _checked(values: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"thresholds must map indices of layers to numbers, at least one, got {values!r}")
    for index, value in values.items():
        check_count("an index of thresholds", index, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"thresholds[{index}] must be a number, got {value!r}")
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"thresholds[{index}] must be finite, or -inf to keep everything, got {value}")
    return {index: float(value) for index, value in sorted(values.items())}


def layers_by_leader(model: nn.Module) -> dict[int, list[TokenElimination]]:
    """The layers of a model that eliminate tokens, by the index of the one that selects for them."""
    groups: dict[int, list[TokenElimination]] = {}
    for layer in eliminating_layers(model).values():
        groups.setdefault(layer.elimination.leader, []).append(layer)
    if not groups:
        raise ValueError("model must have layers that eliminate tokens, and has none")
    return groups


def set_thresholds(model: nn.Module, thresholds: Mapping[int, float]) -> None:
    """Sets the threshold of each layer; layers that share a selection have that of the first of them.

    The layer's keep ratio stays the most that is kept, so it is to be 1 for a threshold alone to decide.

    Args:
        model: one that eliminates tokens.
        thresholds: by index of the decoder layer. Layers that it does not name keep what they have.

    Raises:
        ValueError, TypeError: a layer is named that selects no tokens, a number is none, or `Thresholds` are of another
            score or block size. Nothing has changed.
    """
    groups = layers_by_leader(unwrapped(model))
    values = _checked(thresholds)
    for index in values:
        if index not in groups:
            raise ValueError(f"thresholds must be for layers that select tokens, {sorted(groups)}, got {index}")
        options = groups[index][0].elimination.options
        here = options.score_name, options.block_size
        if isinstance(thresholds, Thresholds) and here != (thresholds.score, thresholds.block_size):
            raise ValueError(
                f"thresholds are of score={thresholds.score!r} in blocks of {thresholds.block_size}, layer {index} has "
                f"score={here[0]!r} in blocks of {here[1]}"
            )
    for index, value in values.items():
        set_threshold(groups[index], value)


def set_threshold(layers: Sequence[TokenElimination], threshold: float) -> None:
    """Sets the threshold of layers that share a selection, and so their options."""
    leader = layers[0].elimination
    leader.options = replace(leader.options, threshold=threshold)
