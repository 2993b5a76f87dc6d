"""The configuration of sparse fine-tuning: how many entries of each weight train, and how they are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ..nn.positions import number_of
from .base import UNUSED_PEFT_FIELDS, AdapterConfig

SELECTIONS = ("rigl", "sm3", "random", "magnitude", "fixed")
SCHEDULES = ("linear", "cosine")
_SUPER_TUNING = "SUPERTUNING"


@dataclass
class SparseDeltaConfig(AdapterConfig):
    """Sparse deltas over the linear layers of a model; who trains them moves them to better places with a `Reselector`.

    How many entries train is one of three; every layer gets its share by its number of elements, rounded down, at
    least 1. With none of the three given, `density` is 0.01.

    Attributes:
        density: share of the entries of every adapted weight, in (0, 1].
        num_deltas: at most so many in all, as long as there is one for every layer.
        lora_equivalent_rank: at most as many as LoRA of this rank has parameters, `r (in_features + out_features)`
            summed over the adapted layers.
        selection: how positions are chosen. "rigl" starts at random and moves to where accumulated gradients are
            largest; "sm3" moves to where the accumulators of the SM3 optimizer are; "random" moves at random;
            "magnitude" takes the largest entries of the weight and does not move; "fixed" does not move either, and
            starts at random unless `inject` is given positions.
        reselection_steps: optimizer steps from one reselection to the next.
        selection_accumulation_steps: steps before it over which gradients are accumulated, for "rigl".
        initial_reselection_rate: share of the entries that move the second time, decaying after that.
        schedule: how that decays to zero over the training, "linear" or "cosine".
        target_modules, exclude_modules, bias, modules_to_save, layers_to_transform, layers_pattern, task_type,
            base_model_name_or_path, revision, inference_mode: as in `AdapterConfig`.

    Raises:
        ValueError, TypeError: a field's value is out of range, of a wrong type, or not supported.

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024.
    """

    density: float | None = None
    num_deltas: int | None = None
    lora_equivalent_rank: int | None = None
    selection: Literal["rigl", "sm3", "random", "magnitude", "fixed"] = "rigl"
    reselection_steps: int = 20
    selection_accumulation_steps: int = 5
    initial_reselection_rate: float = 0.2
    schedule: Literal["linear", "cosine"] = "linear"

    peft_types: ClassVar[tuple[str, ...]] = ("SPARSE_DELTA", _SUPER_TUNING)
    unused_fields: ClassVar[frozenset[str]] = UNUSED_PEFT_FIELDS | {
        "init_weights",
        "save_precomputed_indices",
        "select_top",
        "sparsity",
        "lora_dropout",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("density", "num_deltas", "lora_equivalent_rank") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of density, num_deltas and lora_equivalent_rank, got {' and '.join(given)}")
        if not given:
            self.density = 0.01
        if self.density is not None:
            number_of(0, self.density, None)
        for name, least in (
            ("num_deltas", 1),
            ("lora_equivalent_rank", 1),
            ("reselection_steps", 1),
            ("selection_accumulation_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.selection_accumulation_steps > self.reselection_steps:
            raise ValueError(
                f"selection_accumulation_steps must be at most reselection_steps, {self.reselection_steps}, "
                f"got {self.selection_accumulation_steps}"
            )
        rate = self.initial_reselection_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0.0 <= rate <= 1.0:
            raise ValueError(f"initial_reselection_rate must be in [0, 1], got {rate!r}")
        for name, choices in (("selection", SELECTIONS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    def counts(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """How many entries of each weight train.

        Args:
            shapes: `(out_features, in_features)` by path.
        """
        sizes = {path: rows * columns for path, (rows, columns) in shapes.items()}
        if self.density is not None:  # rounded down as Super-Tuning rounds, so that PEFT can load what we save
            counts = {path: math.floor(size * self.density) for path, size in sizes.items()}
        else:
            wanted = self.num_deltas
            if wanted is None:
                assert self.lora_equivalent_rank is not None
                wanted = self.lora_equivalent_rank * sum(rows + columns for rows, columns in shapes.values())
            total = max(1, sum(sizes.values()))
            counts = {path: size * wanted // total for path, size in sizes.items()}
        return {path: min(size, max(1, counts[path])) for path, size in sizes.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `AdapterConfig.from_dict`; reads PEFT's Super-Tuning adapters too, but not its hybrid with LoRA.

        Raises:
            ValueError, TypeError: as there.
        """
        peft_type = getattr(values.get("peft_type"), "value", values.get("peft_type"))
        if peft_type == _SUPER_TUNING:
            if values.get("r") is not None:
                raise ValueError(f"r={values['r']!r} is not supported: Super-Tuning with low-rank factors is PEFT's")
            if "density" not in values:
                values = {**values, "density": 1.0 - _sparsity(values), "selection": "magnitude"}
        return super().from_dict(values)


def _sparsity(values: Mapping[str, Any]) -> float:
    sparsity = values.get("sparsity", 0.99)  # PEFT's default
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity!r}")
    return float(sparsity)
