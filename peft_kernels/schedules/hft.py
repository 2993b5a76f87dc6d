"""`HFT`: half of the parameter matrices train, the other half keeps what the model knew."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from .base import Schedule, check_at_least, check_seed, trainable_parameters
from .layers import transformer_layers

CATEGORIES = ("attention", "mlp", "norms")
NORMS = ("half", "train", "freeze")
EMBEDDINGS = ("train", "freeze")


class HFT(Schedule):
    """Half Fine-Tuning: in each round, half of the matrices of every transformer layer train.

    The half is drawn for each category by itself: half of a layer's attention matrices, half of its other matrices
    (the MLP's), half of its norms. Of an odd number n, `(n - 1) / 2` and `(n + 1) / 2` take turns from layer to layer,
    so that half is reached over all layers, up to one; which comes first is drawn. Biases go with their matrix.
    See `Schedule` for the loop.

    A matrix belongs to attention when its path inside the layer, or a module on that path, has "attn" or "attention"
    in its name; a parameter of two or more dimensions is a matrix, so are the stacked experts of a mixture.

    Args:
        model: a transformer; its layers lie in an `nn.ModuleList`.
        optimizer: any torch optimizer that holds all parameters to be trained.
        interval: length of a round in steps of the optimizer; None draws once for the whole training. The paper draws
            once for each stage of fine-tuning.
        norms: "half", or "train" or "freeze" for all of them.
        embeddings: "train" leaves what lies outside the layers (embeddings, head, last norm) to train as before;
            "freeze" keeps it frozen.
        layers: path or paths of the ModuleLists, like "model.layers"; None looks for them.
        seed: of the drawing.

    Raises:
        ValueError, TypeError: the message says what is missing or out of range; nothing has been changed.

    Source: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025: two of the four attention matrices
    in each layer, two of the three MLP matrices in half of the layers and one in the others. Which half of the layers
    is random there; here the layers take turns. That half of the norms train, and that embeddings and head train in
    full, is this library's reading, hence the options.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        interval: int | None = None,
        norms: Literal["half", "train", "freeze"] = "half",
        embeddings: Literal["train", "freeze"] = "train",
        layers: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(interval, norms, embeddings, seed)
        trainable = trainable_parameters(model)
        names = {id(parameter): name for name, parameter in trainable.items()}
        self.norms = norms
        self.embeddings = embeddings
        self.units: dict[str, list[list[tuple[str, ...]]]] = {category: [] for category in CATEGORIES}
        for layer in transformer_layers(model, layers).values():
            units = _units(layer, names)
            for category in CATEGORIES:
                self.units[category].append(units[category])
        inside = {name for groups in self.units.values() for layer in groups for unit in layer for name in unit}
        if not inside:
            raise ValueError("model must have transformer layers with parameters that train, and nothing in them does")
        chosen = inside if embeddings == "train" else set(trainable)
        parameters = {name: parameter for name, parameter in trainable.items() if name in chosen}
        super().__init__(model, optimizer, parameters, interval, seed)
        self._start(self._names(0))

    def _names(self, number: int) -> set[str]:
        """What trains in round `number`."""
        names: set[str] = set()
        for category, layers in self.units.items():
            if category == "norms" and self.norms != "half":
                if self.norms == "train":
                    names.update(name for layer in layers for unit in layer for name in unit)
                continue
            generator = random.Random(f"HFT/{self.seed}/{number}/{category}")
            round_up = generator.random() < 0.5
            for layer in layers:
                count = len(layer) // 2
                if len(layer) % 2:
                    count += round_up
                    round_up = not round_up
                names.update(name for index in generator.sample(range(len(layer)), count) for name in layer[index])
        return names

    def _begin_period(self, number: int) -> None:
        self._trainable.switch(self._names(number))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "norms": self.norms, "embeddings": self.embeddings}

    def _notes(self) -> tuple[str, ...]:
        active = self._trainable.active
        parts = []
        for category, layers in self.units.items():
            units = [unit for layer in layers for unit in layer]
            parts.append(f"{sum(active.issuperset(unit) for unit in units)} of {len(units)} {category}")
        outside = "trains as before" if self.embeddings == "train" else "is frozen"
        return (f"training {', '.join(parts)}; what lies outside the layers {outside}",)


def check_arguments(interval: int | None, norms: str, embeddings: str, seed: int) -> None:
    """Raises ValueError for arguments of `HFT` that no model could use."""
    if interval is not None:
        check_at_least("interval", interval, 1)
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {', '.join(NORMS)}, got {norms!r}")
    if embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings must be one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    check_seed(seed)


def _units(layer: nn.Module, names: dict[int, str]) -> dict[str, list[tuple[str, ...]]]:
    """A layer's parameters by category, in groups that train together; a shared parameter counts where it is first.

    `names` holds what is to be placed, by id; what is placed is taken out of it.
    """
    units: dict[str, list[tuple[str, ...]]] = {category: [] for category in CATEGORIES}
    for path, module in layer.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if id(p) in names}
        matrices = {name: [names[id(p)]] for name, p in own.items() if p.ndim >= 2}
        for name, parameter in own.items():
            if matrices and name not in matrices:
                partner = name.replace("bias", "weight")
                matrices[partner if partner in matrices else next(iter(matrices))].append(names[id(parameter)])
        if matrices:
            category = "attention" if _is_attention(layer, path) else "mlp"
            units[category].extend(tuple(unit) for unit in matrices.values())
        elif own:
            units["norms"].append(tuple(names[id(parameter)] for parameter in own.values()))
        for parameter in own.values():
            del names[id(parameter)]
    return units


def _is_attention(layer: nn.Module, path: str) -> bool:
    parts = path.split(".")
    within = [layer.get_submodule(".".join(parts[: count + 1])) for count in range(len(parts))] if path else []
    words = [*parts, *(type(module).__name__ for module in within)]
    return any("attn" in word.lower() or "attention" in word.lower() for word in words)
