"""The configuration of token elimination: which layers compute for some tokens alone, and how these are chosen."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ..nn.elimination_options import HALVES
from ..nn.token_scores import NAMED as SCORES
from .token_layers import TokenConfig, check_finite, check_integer, check_ratio, checked_layers, in_order


@dataclass
class TokenEliminationConfig(TokenConfig):
    """Decoder layers that compute for the most informative tokens alone while they train; the others pass them by.

    Attributes:
        keep_ratio: share of the blocks of each sequence that a layer computes for, in [0, 1]; of `B` blocks
            `ceil(keep_ratio B)` are kept, and the tokens behind the last whole block always. With `threshold` it is
            the most that is kept, 1 where it is None.
        threshold: blocks whose score is smaller are not kept either; a number, or by index of the layer one for each
            that selects, the first of every `select_every`, where -inf keeps everything. One of the two, or `schedule`,
            has to be given.
        layers: indices of the decoder layers that do, negative ones from the end; None takes all but the first
            `dense_first` and the last `dense_last`.
        dense_first, dense_last: see there; not used where `layers` or `schedule` is given.
        block_size: neighbors that are kept or not together.
        score: "attention" is the attention that a block gets, "norm" the largest norm of its tokens' hidden states,
            "random" a random number, "gradient" what `elimination.score_by_gradient` found for the batch, "predictor"
            what the layer's predictor says.
        apply_to: which half of a layer computes for kept tokens alone, "attention", "mlp" or "both".
        train_only: computes for all tokens in evaluation.
        select_every: so many layers in a row share a selection, which the first of them makes. They have one keep
            ratio, in a schedule too, and one threshold.
        schedule: keep ratios by index of the layer, layers that it does not name are dense; or a list of them, one
            for each layer. With it goes neither `layers` nor `keep_ratio`.
        seed: of score="random"; None draws from torch's generator of the device.

    Raises:
        ValueError, TypeError: a field's value is out of range or of a wrong type.

    Source: Wang et al., "LeMo: Enabling Less Token Involvement for More Context Fine-tuning", 2025 (JENGA, USENIX ATC
    2025).
    """

    keep_ratio: float | None = None
    threshold: float | dict[int, float] | None = None
    layers: list[int] | None = None
    block_size: int = 64
    score: Literal["attention", "norm", "gradient", "random", "predictor"] = "attention"
    apply_to: Literal["both", "attention", "mlp"] = "both"
    train_only: bool = True
    select_every: int = 1
    schedule: dict[int, float] | list[float] | None = None
    seed: int | None = None
    dense_first: int = 2
    dense_last: int = 1

    file_name: ClassVar[str] = "token_elimination.json"
    kind: ClassVar[str] = "TOKEN_ELIMINATION"

    def __post_init__(self) -> None:
        if self.keep_ratio is not None:
            check_ratio("keep_ratio", self.keep_ratio)
        if isinstance(self.threshold, Mapping):
            self.threshold = _checked_thresholds(self.threshold)
        elif self.threshold is not None:
            check_finite("threshold", self.threshold)
        if self.schedule is not None:
            checked = _checked_schedule(self.schedule)
            self.schedule = list(checked.values()) if isinstance(self.schedule, list | tuple) else checked
            for name in ("layers", "keep_ratio"):
                if getattr(self, name) is not None:
                    raise ValueError(f"schedule says which layers keep how much, so {name} must be None")
        elif self.keep_ratio is None and self.threshold is None:
            raise ValueError("keep_ratio, threshold or schedule must be given, got none of them")
        if self.layers is not None:
            self.layers = checked_layers(self.layers)
        for name, least in (("block_size", 1), ("select_every", 1), ("dense_first", 0), ("dense_last", 0)):
            check_integer(name, getattr(self, name), least)
        if self.seed is not None:
            check_integer("seed", self.seed, 0)
        for name, choices in (("score", SCORES), ("apply_to", HALVES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not isinstance(self.train_only, bool):
            raise TypeError(f"train_only must be True or False, got {self.train_only!r}")

    def ratios(self, count: int) -> dict[int, float]:
        """The keep ratio of each layer that eliminates tokens, by its index, for a model of `count` layers.

        Raises:
            ValueError: a layer is named that such a model does not have, or none is left; or layers that share a
                selection have several ratios.
        """
        if self.schedule is not None:
            if isinstance(self.schedule, list) and len(self.schedule) != count:
                raise ValueError(f"schedule must have one ratio for each of {count} layers, got {len(self.schedule)}")
            given = _checked_schedule(self.schedule)
            name = "schedule"
        else:
            indices = self.layers
            if indices is None:
                indices = list(range(self.dense_first, count - self.dense_last))
                if not indices:
                    raise ValueError(
                        f"layers must be given for a model of {count} layers: none is left between the first "
                        f"{self.dense_first} and the last {self.dense_last}"
                    )
            given = dict.fromkeys(indices, 1.0 if self.keep_ratio is None else float(self.keep_ratio))
            name = "layers"
        ratios = in_order(name, given, count)
        _check_shared(list(ratios.items()), self.select_every)
        return ratios

    def thresholds(self, selecting: Collection[int]) -> dict[int, float | None]:
        """The threshold of each layer that selects tokens, None for none.

        Args:
            selecting: indices of these layers, none of them negative.

        Raises:
            ValueError: `threshold` names other layers.
        """
        if not isinstance(self.threshold, Mapping):
            return dict.fromkeys(selecting, self.threshold)
        if self.threshold.keys() != set(selecting):
            raise ValueError(
                f"threshold must be for the layers that select tokens, {sorted(selecting)}, got {list(self.threshold)}"
            )
        return dict(self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `token_elimination.json`."""
        values = super().to_dict()
        if isinstance(self.threshold, Mapping):  # JSON has no other keys, and no infinity
            thresholds = self.threshold.items()
            values["threshold"] = {str(index): None if value == -math.inf else value for index, value in thresholds}
        if self.schedule is not None:  # JSON has no other keys
            checked = _checked_schedule(self.schedule)
            listed = isinstance(self.schedule, list | tuple)
            values["schedule"] = [*checked.values()] if listed else {str(index): r for index, r in checked.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` gives; options that it does not know are warned about.

        Raises:
            ValueError, TypeError: another kind of configuration, or as for the class.
        """
        schedule = values.get("schedule")
        if isinstance(schedule, Mapping):
            values = {**values, "schedule": {_index("schedule", key): ratio for key, ratio in schedule.items()}}
        threshold = values.get("threshold")
        if isinstance(threshold, Mapping):
            numbers = {_index("threshold", key): value for key, value in threshold.items()}
            values = {**values, "threshold": {i: -math.inf if value is None else value for i, value in numbers.items()}}
        return super().from_dict(values)


def _checked_schedule(schedule: Any) -> dict[int, float]:
    if isinstance(schedule, list | tuple):
        schedule = dict(enumerate(schedule))
    if not isinstance(schedule, Mapping) or not schedule:
        raise ValueError(f"schedule must map indices of layers to keep ratios, got {schedule!r}")
    for index, ratio in schedule.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(f"schedule must have indices of layers as keys, got {index!r}")
        check_ratio(f"schedule[{index}]", ratio)
    return dict(schedule)


def _checked_thresholds(thresholds: Mapping[Any, Any]) -> dict[int, float]:
    if not thresholds:
        raise ValueError("threshold must be a number, or map indices of layers to numbers, got an empty mapping")
    for index, value in thresholds.items():
        check_integer("an index of threshold", index, 0)
        if value != -math.inf:
            check_finite(f"threshold[{index}]", value)
    return {index: float(value) for index, value in sorted(thresholds.items())}


def _check_shared(ratios: list[tuple[int, float]], select_every: int) -> None:
    for number, (index, ratio) in enumerate(ratios):
        leader, shared = ratios[number - number % select_every]
        if ratio != shared:
            raise ValueError(
                f"schedule must have one keep ratio for layers that share a selection (select_every={select_every}), "
                f"got {shared} for layer {leader} and {ratio} for layer {index}"
            )


def _index(name: str, key: Any) -> int:
    try:
        return int(key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must have indices of layers as keys, got {key!r}") from error
