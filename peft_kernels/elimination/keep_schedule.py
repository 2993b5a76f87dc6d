"""`KeepSchedule`: the share of the tokens that layers keep grows with the steps, from where training begins to all.

    ratio(t) = start + (end - start) shape(min(1, t / steps))        linear: shape(p) = p
                                                                     cosine: shape(p) = (1 - cos(pi p)) / 2

With score="random" and block_size=1 this is random layerwise token dropping (Yao et al., "Random-LTD", 2022, section 3:
each layer drops tokens of its own, and the number of kept ones grows linearly to all of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..config.token_elimination import check_ratio
from ..nn.token_elimination import TokenElimination
from ..planning import unwrapped
from .model import eliminating_layers
from .predictor import check_count

FORMAT = 1
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1.0 - math.cos(math.pi * share)) / 2.0,
}


def set_keep_ratio(model: nn.Module, ratio: float | Mapping[int, float]) -> None:
    """Sets the share of the blocks that layers keep; where there are thresholds, the most that they keep.

    From the next call on, also in compiled layers, which are compiled again for it. The configuration that
    `save_adapter` writes stays the one that was given to `inject`.

    Args:
        model: one that eliminates tokens.
        ratio: in [0, 1], of every layer; or by index of the decoder layer, then others keep what they have.

    Raises:
        ValueError: the model eliminates no tokens, a layer is named that does not, or a number is off. Nothing has
            changed.
    """
    layers = layers_by_index(model)
    _set(layers, _by_layer("ratio", ratio, layers))


class KeepSchedule:
    """Moves the keep ratios of a model's layers, step by step, each from its own start to its own end.

        schedule = KeepSchedule(model, start=0.25, steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    It works with every score; where there are thresholds, they go on deciding below the ratio. Layers with ratios of
    their own (`TokenEliminationConfig.schedule`) are not scaled by a common factor, which could not end at 1 for all:
    each moves along its own line. Layers that share a selection (`select_every`) share it while their ratios
    are the same. A ratio that keeps every token of a sequence before it is 1, because blocks are rounded up, is
    counted as a call that kept all, without a warning, provided that the smallest ratio of the schedule drops some.

    Every change of a ratio has `torch.compile` compile the layers again. It gives up after as many times as
    `torch._dynamo.config.recompile_limit` says, so choose an `interval` with fewer changes, or raise that.

    Random scores come again after a checkpoint where torch's generator does; one with a `seed` of its own in the
    configuration begins anew.

    Args:
        model: one that eliminates tokens.
        start: ratio in [0, 1] of every layer, or by index of the decoder layer. A layer that it does not name, and with
            None every layer, begins with the ratio that it has.
        end: likewise; a layer that it does not name stays where it begins.
        steps: of the optimizer, at least 1, after which the end is reached.
        shape: "linear" or "cosine".
        interval: steps from one change to the next, at least 1; the last one comes after `steps` in any case.

    Attributes:
        completed_steps: how often `step` was called.
        start, end: by index of the layer.

    Raises:
        ValueError, TypeError: an argument is off, or the model eliminates no tokens. Nothing has changed.

    Source: Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for Large-scale
    Transformers", 2022.
    """

    def __init__(
        self,
        model: nn.Module,
        start: float | Mapping[int, float] | None = None,
        end: float | Mapping[int, float] = 1.0,
        *,
        steps: int,
        shape: str = "linear",
        interval: int = 1,
    ) -> None:
        check_timing(steps, shape, interval)
        self._layers = layers_by_index(model)
        present = {index: float(layers[0].elimination.options.keep) for index, layers in self._layers.items()}
        given = {} if start is None else _by_layer("start", start, self._layers)
        self.start = {**present, **given}
        self.end = {**self.start, **_by_layer("end", end, self._layers)}
        self.steps, self.shape, self.interval = steps, shape, interval
        self.completed_steps = 0
        self._closed = False
        self._apply()

    def at(self, step: int) -> dict[int, float]:
        """The ratio of each layer when so many steps are done, by index."""
        if step >= self.steps:
            return dict(self.end)
        share = SHAPES[self.shape](step // self.interval * self.interval / self.steps)
        found = {}
        for index, start in self.start.items():
            least, most = sorted((start, self.end[index]))
            found[index] = min(max(start + (self.end[index] - start) * share, least), most)
        return found

    def step(self) -> bool:
        """Counts a step of the optimizer; returns whether a ratio is another one from now on."""
        if self._closed:
            return False
        before = self.at(self.completed_steps)
        self.completed_steps += 1
        if self.at(self.completed_steps) == before:
            return False
        self._apply()
        return True

    def close(self) -> None:
        """Ends the schedule: layers keep the ratios that they have, and `step` changes nothing any more."""
        self._closed = True
        for layer in (layer for layers in self._layers.values() for layer in layers):
            layer.elimination.least_keep = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs; plain values that JSON can hold."""
        return {
            "format": FORMAT,
            "schedule": type(self).__name__,
            "completed_steps": self.completed_steps,
            "start": {str(index): ratio for index, ratio in self.start.items()},
            "end": {str(index): ratio for index, ratio in self.end.items()},
            "steps": self.steps,
            "shape": self.shape,
            "interval": self.interval,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`, with its ratios, steps, shape and interval.

        Raises:
            ValueError, TypeError: it is another schedule's, damaged, or of other layers; nothing has changed.
        """
        ours = self.state_dict()
        missing = sorted(ours.keys() - state.keys())
        if missing:
            raise ValueError(f"state must be a KeepSchedule's state_dict, but has no {missing[0]}")
        for name in ("format", "schedule"):
            if state[name] != ours[name]:
                raise ValueError(f"state must have {name} {ours[name]!r}, got {state[name]!r}")
        check_timing(state["steps"], state["shape"], state["interval"])
        check_count("completed_steps of the state", state["completed_steps"], 0)
        ratios = {}
        for name in ("start", "end"):
            saved = state[name]
            if not isinstance(saved, Mapping) or saved.keys() != ours[name].keys():
                whose = sorted(saved) if isinstance(saved, Mapping) else saved
                raise ValueError(f"state must have {name} for layers {sorted(ours[name])}, got {whose!r}")
            for key, ratio in saved.items():
                check_ratio(f"{name}[{key}] of the state", ratio)
            ratios[name] = {int(key): float(ratio) for key, ratio in saved.items()}
        self.start, self.end = ratios["start"], ratios["end"]
        self.steps, self.shape, self.interval = state["steps"], state["shape"], state["interval"]
        self.completed_steps = state["completed_steps"]
        self._apply()

    def _apply(self) -> None:
        _set(self._layers, self.at(self.completed_steps))
        for index, layers in self._layers.items():
            for layer in layers:
                layer.elimination.least_keep = min(self.start[index], self.end[index])

    def __repr__(self) -> str:
        ends = [f"{name}={_shortest(ratios)}" for name, ratios in (("start", self.start), ("end", self.end))]
        return (
            f"{type(self).__name__}({', '.join(ends)}, steps={self.steps}, shape={self.shape!r}, "
            f"interval={self.interval})"
        )


def check_timing(steps: Any, shape: Any, interval: Any) -> None:
    """Raises ValueError or TypeError unless these are what `KeepSchedule` takes."""
    check_count("steps", steps)
    check_count("interval", interval)
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")


def layers_by_index(model: nn.Module) -> dict[int, list[TokenElimination]]:
    """The layers of a model that eliminate tokens, by their number; several only where they were made one by one.

    Raises:
        ValueError: there are none.
    """
    found: dict[int, list[TokenElimination]] = {}
    for layer in eliminating_layers(unwrapped(model)).values():
        found.setdefault(layer.elimination.index, []).append(layer)
    if not found:
        raise ValueError("model must have layers that eliminate tokens, and has none")
    return dict(sorted(found.items()))


def _by_layer(name: str, ratio: Any, layers: Mapping[int, Any]) -> dict[int, float]:
    """The checked ratios of the layers that `ratio` is for."""
    if not isinstance(ratio, Mapping):
        check_ratio(name, ratio)
        return dict.fromkeys(layers, float(ratio))
    for index, value in ratio.items():
        if isinstance(index, bool) or index not in layers:
            raise ValueError(f"{name} must be for layers that eliminate tokens, {list(layers)}, got {index!r}")
        check_ratio(f"{name}[{index}]", value)
    return {index: float(value) for index, value in ratio.items()}


def _set(layers: Mapping[int, list[TokenElimination]], ratios: Mapping[int, float]) -> None:
    for index, ratio in ratios.items():
        for layer in layers[index]:
            layer.elimination.options = replace(layer.elimination.options, keep=ratio)


def _shortest(ratios: Mapping[int, float]) -> str:
    different = set(ratios.values())
    return f"{different.pop():g}" if len(different) == 1 else repr(dict(ratios))
