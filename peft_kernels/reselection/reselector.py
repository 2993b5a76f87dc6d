"""`Reselector`: sparse fine-tuning's drop and growth of entries, in any training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.sparse_delta import SparseDeltaLinear
from ..optim import SparseSM3, torch_optimizer
from ..planning import unwrapped
from . import growth, moments
from .growth import Growth
from .state import check_state, state_of, window_tensors
from .timetable import Timetable
from .window import Window, gradient_scale

SELECTIONS = ("rigl", "sm3", "random", "magnitude", "fixed")


class Reselector:
    """Moves the entries of sparse deltas while they train: the smallest changes are given up, as many entries grow.

    Call `step` after each step of the optimizer:

        reselector = Reselector(model, optimizer, total_steps=1000)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            reselector.step()

    With R = `reselection_steps` and A = `selection_accumulation_steps`, entries move behind the steps A, A + R,
    A + 2R and so on up to `total_steps`. Of each layer's nnz entries `floor(p nnz)` are dropped, those with the
    smallest `|delta|`, and as many grow where none was active; their deltas start at zero. At step t the rate p is
    `initial_reselection_rate (1 - t / total_steps)`, or with "cosine" `initial_reselection_rate
    (1 + cos(pi t / total_steps)) / 2`; the first time, for "rigl" and "sm3", it is 1, because only then something is
    known to choose by. Of equal entries the smaller position comes first.

    What grows depends on `selection`:

    - "rigl": candidates are, in the first backward pass of the A steps before a move, as many inactive positions as
      entries are active, those of the largest `|dW|`, found without forming dW. Their gradients g are sampled in these
      steps, and the largest `|sum g|` grow. Adam's moments start with `mean(g) (1 - beta1^age)` and
      `mean(g^2) (1 - beta2^age)`, where age is the optimizer's step count: see `moments`.
    - "sm3": the largest `row_max[n] column_max[k]` of `optim.SparseSM3`.
    - "random": inactive positions, drawn evenly. "magnitude": the largest inactive entries of the weight.
    - "fixed": nothing ever moves.

    Every backward pass through a layer between two steps of the optimizer belongs to one gradient g, as it does for
    the optimizer: with gradient accumulation they add up, and g counts once per step. Clipping and loss scaling between
    backward and the step are found out and applied to g. A step that a gradient scaler leaves out does not count.

    An optimizer keeps its state in place: what it holds per entry follows the entries that stay, in index order, and is
    zero for grown ones unless said otherwise above. `values` stay the same Parameters; those of a layer that has moved
    have no gradient until the next backward pass.

    A window holds, per entry, a position and three numbers in the accumulation dtype, and looks at one more sampled
    gradient in each backward pass; dW is never formed. While one is open, layers of a compiled model run uncompiled.

    With several data-parallel processes, "rigl" takes its candidates from process 0 and averages g, so all processes
    select the same; every process has to run the same layers. Sharded parameters (FSDP) are not supported.

    Args:
        model: the model, also wrapped in DistributedDataParallel or compiled, or the layers.
        optimizer: a torch optimizer that trains all their `values`: `torch.optim.AdamW`, `optim.SparseAdamW`,
            `optim.SparseSM3`, SGD, or another one whose state per entry is floating point.
        selection: as above.
        reselection_steps: R, in optimizer steps.
        selection_accumulation_steps: A, at most R.
        initial_reselection_rate: in [0, 1].
        schedule: "linear" or "cosine".
        total_steps: how many steps the training takes; may be left out for "fixed" only.
        seed: of the random selection; None draws one from torch's default CPU generator.

    Attributes:
        completed_steps: steps so far.

    Raises:
        ValueError, TypeError: the message says what is missing or out of range; nothing has been changed.

    Source: Ansell et al., "Scaling Sparse Fine-Tuning to Large Language Models", 2024, section 3 and appendix.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[SparseDeltaLinear],
        optimizer: torch.optim.Optimizer,
        selection: Literal["rigl", "sm3", "random", "magnitude", "fixed"] = "rigl",
        reselection_steps: int = 20,
        selection_accumulation_steps: int = 5,
        initial_reselection_rate: float = 0.2,
        schedule: Literal["linear", "cosine"] = "linear",
        total_steps: int | None = None,
        seed: int | None = None,
    ) -> None:
        check_selection(selection)
        if total_steps is None:
            if selection != "fixed":
                raise ValueError("total_steps must be given: the share of entries that move falls to 0 until then")
            total_steps = 1
        self.selection = selection
        self.timetable = Timetable(
            reselection_steps, selection_accumulation_steps, initial_reselection_rate, schedule, total_steps
        )
        self.layers = _layers_of(model)
        self._optimizer = torch_optimizer(optimizer)
        self._groups()
        if selection == "sm3" and not isinstance(self._optimizer, SparseSM3):
            raise ValueError(f'selection "sm3" needs optim.SparseSM3, got {type(self._optimizer).__name__}')
        if selection == "rigl":
            for path, layer in self.layers.items():
                if layer.gradient_observer is not None:
                    raise ValueError(f"layer {path!r} must have no gradient_observer: is it another Reselector's?")
        if seed is None:
            seed = int(torch.randint(2**62, ())) if selection == "random" else 0
        self.generator = torch.Generator().manual_seed(seed)
        self.completed_steps = 0
        # A layer keeps its window, so that a compiled one sees the same observer in each.
        self._windows = {
            path: Window(layer)
            for path, layer in self.layers.items()
            if selection == "rigl" and 0 < layer.num_deltas < layer.weight.numel()
        }
        self._watching = False
        self._optimizer_stepped = False
        self._hook = self._optimizer.register_step_post_hook(self._count)
        self._open_if_due()

    @torch.no_grad()
    def step(self) -> int:
        """Counts a step that the optimizer has made, and moves entries when it is time; returns how many.

        Does nothing when the optimizer has left the step out, as a gradient scaler makes it do after an overflow.

        Raises:
            ValueError: a layer is merged; nothing has moved.
        """
        if not self._optimizer_stepped:
            for window in self._windows.values():
                window.discard()
            return 0
        self._optimizer_stepped = False
        self.completed_steps += 1
        moved = 0
        if self.selection != "fixed" and self.timetable.ends(self.completed_steps):
            if self.completed_steps <= self.timetable.total_steps:
                moved = self._reselect()
            self._close()
        self._open_if_due()
        return moved

    def close(self) -> None:
        """Ends the reselection: layers and optimizer are left alone from now on."""
        self._close()
        self._hook.remove()

    def _open_if_due(self) -> None:
        if self.selection == "rigl" and self.timetable.opens(self.completed_steps):
            self._open()

    def _open(self) -> None:
        self._watching = True
        for window in self._windows.values():
            window.open()

    def _close(self) -> None:
        self._watching = False
        for window in self._windows.values():
            window.close()

    def _count(self, *_: Any) -> None:
        """The optimizer has made a step, and its gradients are still there."""
        self._optimizer_stepped = True
        if self._watching:
            windows = list(self._windows.values())
            scale = gradient_scale(windows)
            for window in windows:
                window.commit(scale)

    def _reselect(self) -> int:
        merged = [path for path, layer in self.layers.items() if layer.merged]
        if merged:
            raise ValueError(f"layer {merged[0]!r} is merged; unmerge it before its entries are reselected")
        first = self.timetable.is_first(self.completed_steps) and self.selection in ("rigl", "sm3")
        rate = 1.0 if first else self.timetable.rate(self.completed_steps)
        groups = self._groups()
        states = {  # looked at before anything moves: it may raise
            path: moments.state_per_entry(self._optimizer.state.get(layer.values, {}), layer.values)
            for path, layer in self.layers.items()
        }
        return sum(self._move(path, rate, groups[path], states[path]) for path in self.layers)

    def _move(self, path: str, rate: float, group: dict[str, Any], per_entry: dict[str, Tensor]) -> int:
        layer = self.layers[path]
        count = min(int(rate * layer.num_deltas), layer.weight.numel() - layer.num_deltas)
        grown = self._growth(path, layer, count) if count else None
        if grown is None:
            return 0
        kept = growth.kept(layer.values.detach(), grown.positions.numel())
        indices, source = ops.sorted_merge(layer.indices[kept], grown.positions)
        values = layer.values.detach()
        started = torch.cat((values[kept], values.new_zeros(grown.positions.numel())))[source]
        state = self._optimizer.state.get(layer.values, {})
        seeds = moments.seeds(state, group, grown)
        layer.set_delta(indices, started)
        moments.move(per_entry, kept, source, seeds)
        layer.values.grad = None
        return grown.positions.numel()

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's parameter group of each layer's values; loading its state replaces them."""
        groups = {id(parameter): group for group in self._optimizer.param_groups for parameter in group["params"]}
        for path, layer in self.layers.items():
            if id(layer.values) not in groups:
                raise ValueError(f"optimizer must train the values of layer {path!r}, and does not hold them")
        return {path: groups[id(layer.values)] for path, layer in self.layers.items()}

    def _growth(self, path: str, layer: SparseDeltaLinear, count: int) -> Growth | None:
        """What grows in a layer; None where nothing is known to choose by, because it took no part in training."""
        if self.selection == "rigl":
            window = self._windows.get(path)
            return None if window is None or window.steps == 0 else growth.by_gradient(window, count)
        if self.selection == "sm3":
            state = self._optimizer.state.get(layer.values)
            return growth.by_moments(layer, state, count) if state else None
        if self.selection == "magnitude":
            return growth.by_magnitude(layer, count)
        return growth.at_random(layer, count, self.generator)

    def state_dict(self) -> dict[str, Any]:
        """Everything that an exact continuation needs besides the model's and the optimizer's own state_dict.

        Plain values that JSON can hold, and under "tensors" tensors by name. As for gradients, backward passes that no
        step of the optimizer has used yet are not in it.
        """
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a `state_dict`, to the bit; load the model's and the optimizer's first.

        Rate, schedule and total_steps are this Reselector's own.

        Raises:
            ValueError: it is another selection's, or of other layers, positions or steps; nothing has changed.
        """
        check_state(self, state)
        tensors = state["tensors"]
        self._close()
        self.completed_steps = state["completed_steps"]
        self._optimizer_stepped = False
        self.generator.set_state(tensors["generator"].cpu())
        if state["window_steps"] is None:
            self._open_if_due()
            return
        self._open()
        for path, window in self._windows.items():
            window.restore(window_tensors(tensors, path), state["window_steps"].get(path, 0))


def check_selection(selection: str) -> None:
    """Raises ValueError unless it is one of `SELECTIONS`."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")


def _layers_of(model: nn.Module | Iterable[SparseDeltaLinear]) -> dict[str, SparseDeltaLinear]:
    """The layers by path, each once; checked."""
    if isinstance(model, nn.Module):
        layers = {path: m for path, m in unwrapped(model).named_modules() if isinstance(m, SparseDeltaLinear)}
        if not layers:
            raise ValueError("model has no SparseDeltaLinear layers")
    else:
        given = list(model)
        for number, layer in enumerate(given):
            if not isinstance(layer, SparseDeltaLinear):
                raise TypeError(f"layers must be SparseDeltaLinear, got {type(layer).__name__} as number {number}")
        layers = {str(number): layer for number, layer in enumerate(dict.fromkeys(given))}
        if not layers:
            raise ValueError("layers must be at least one SparseDeltaLinear, got none")
    for path, layer in layers.items():
        if layer.merged:
            raise ValueError(f"layer {path!r} is merged, so its values get no gradient; unmerge it first")
        if type(layer.values) is not nn.Parameter:
            raise TypeError(
                f"layer {path!r} must hold its values in whole, got a {type(layer.values).__name__}; sharded "
                "parameters are not supported"
            )
    return layers
