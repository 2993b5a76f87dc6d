"""`LISA`: a few transformer layers at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import Schedule, check_at_least, check_seed, trainable_parameters
from .layers import transformer_layers


class LISA(Schedule):
    """Every `interval` steps, `active_layers` of the transformer layers are drawn at random and train.

    Embeddings, head and whatever else lies outside the layers train all the time, as they would without a schedule.
    A layer that is drawn again without a break keeps its state in the optimizer; the state of one that leaves is
    dropped. See `Schedule` for the loop.

    Args:
        model: a transformer; its layers lie in an `nn.ModuleList`.
        optimizer: any torch optimizer that holds all parameters to be trained.
        active_layers: how many layers train at a time, gamma in the paper.
        interval: length of a period in steps of the optimizer, K in the paper.
        layers: path or paths of the ModuleLists, like "model.layers"; None looks for them. Layers of which nothing
            requires a gradient are left out.
        seed: of the drawing.

    Raises:
        ValueError, TypeError: the message says what is missing or out of range; nothing has been changed.

    Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    NeurIPS 2024, algorithm 1. Layers are drawn evenly, as in the authors' code.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        active_layers: int = 2,
        interval: int = 20,
        layers: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(active_layers, interval, seed)
        names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
        found = {
            path: tuple(names[id(p)] for p in layer.parameters() if id(p) in names)
            for path, layer in transformer_layers(model, layers).items()
        }
        self.layers = {path: inside for path, inside in found.items() if inside}
        if active_layers > len(self.layers):
            raise ValueError(
                f"active_layers must be at most the number of layers that train, {len(self.layers)}, "
                f"got {active_layers}"
            )
        self.active_layers = active_layers
        inside = {name for names_inside in self.layers.values() for name in names_inside}
        parameters = {name: p for name, p in trainable_parameters(model).items() if name in inside}
        super().__init__(model, optimizer, parameters, interval, seed)
        self._start(self._names(0))

    def drawn(self, number: int) -> tuple[str, ...]:
        """Paths of the layers that train in period `number`, in the model's order."""
        chosen = random.Random(f"LISA/{self.seed}/{number}").sample(range(len(self.layers)), self.active_layers)
        paths = list(self.layers)
        return tuple(paths[index] for index in sorted(chosen))

    def _names(self, number: int) -> set[str]:
        return {name for path in self.drawn(number) for name in self.layers[path]}

    def _begin_period(self, number: int) -> None:
        self._trainable.switch(self._names(number))

    def settings(self) -> dict[str, Any]:
        return {"active_layers": self.active_layers, **super().settings()}

    def _notes(self) -> tuple[str, ...]:
        active = self._trainable.active
        layers = [path for path, inside in self.layers.items() if active.issuperset(inside)]
        return (f"layers: {', '.join(layers)}; what lies outside the layers trains as before",)


def check_arguments(active_layers: int, interval: int, seed: int) -> None:
    """Raises ValueError for arguments of `LISA` that no model could use."""
    check_at_least("active_layers", active_layers, 1)
    check_at_least("interval", interval, 1)
    check_seed(seed)
