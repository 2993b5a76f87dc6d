"""The layers of PEFT's SHiRA and Super-Tuning, which train few entries of a weight, computed by our kernels.

PEFT adds the values to a copy of the base weight in every forward pass, and makes the gradient of the whole copy. An
accelerated instance writes them into the base weight itself, when they have changed, rounding `original + values`
once, and computes the gradient of the values alone. PEFT's modules, parameters and names stay as they are, and so does
the weight for everyone but our forward: whoever asks an accelerated layer for its `base_layer`, as all of PEFT's own
methods do, gets it with its original bits; so do state_dict, copies, pickles and `restore`. The next call of the layer
writes the values again.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.shira.layer import Linear as ShiraLinear
from torch import Tensor, nn

from .. import ops
from ..nn.linear import has_hooks, replaced_call
from ..nn.switched import SwitchedWeight
from .peft_layers import PeftIncompatible, input_obstacle
from .peft_sparse_delta import (
    STATE,
    Delta,
    State,
    active_here,
    base_of,
    changes_of,
    owns_weight,
    positions_of,
    present_delta,
    state_of,
)

try:
    from peft.tuners.supertuning.layer import Linear as SupertuningLinear
except ImportError:  # an older PEFT
    SupertuningLinear = None


class SparseLayer:
    """What both methods share: a mixin in front of PEFT's class, whose forward runs wherever ours does not."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x `[..., K]` to `[..., N]`, as PEFT's forward; arguments beyond x go to PEFT."""
        if args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        delta = present_delta(self)
        if isinstance(delta, str):
            return _without_delta(self, x, super().forward)  # type: ignore[misc]
        factors = () if delta.low_rank is None else (delta.low_rank.lora_a.weight, delta.low_rank.lora_b.weight)
        if input_obstacle(x, base_of(self).weight, delta.values, *factors) is not None:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _with_delta(self, x, delta)

    def __getattr__(self, name: str) -> Any:
        if name == "base_layer":  # our own code asks base_of
            restore_weight(self)
        return super().__getattr__(name)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, of the original weight. Its tensors are the layer's own: copy what is to outlive the next call."""
        restore_weight(self)
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # runs before the base layer's
        restore_weight(self)
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        restore_weight(self)
        owned = owns_weight(self)
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        if owned:
            adopt_weight(self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        restore_weight(self)
        return {name: value for name, value in self.__dict__.items() if name != STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        adopt_weight(self)


class AcceleratedShira(SparseLayer, ShiraLinear):  # type: ignore[misc]
    """PEFT's `shira.Linear`, fused while it can be; instances are made by `accelerate`, never by a constructor."""


ACCELERATED: dict[Any, Any] = {ShiraLinear: AcceleratedShira}
"""PEFT's classes to ours."""

if SupertuningLinear is not None:

    class AcceleratedSupertuning(SparseLayer, SupertuningLinear):  # type: ignore[misc]
        """PEFT's `supertuning.Linear`, with Supra's factors or without, fused while it can be."""

    ACCELERATED[SupertuningLinear] = AcceleratedSupertuning


def peft_class(layer: object) -> Any:
    """The class of PEFT's that a layer has or, accelerated, had; None where it is none of these."""
    return next((theirs for theirs, ours in ACCELERATED.items() if type(layer) in (theirs, ours)), None)


def start(layer: Any) -> None:
    """Gives the layer our class; one that has it already takes a new base weight for its own."""
    layer.__class__ = ACCELERATED[peft_class(layer)]
    if not owns_weight(layer):
        restore_weight(layer)
        adopt_weight(layer)


def stop(layer: Any) -> None:
    """Gives the layer PEFT's class back, and its weight the original bits."""
    restore_weight(layer)
    layer.__class__ = peft_class(layer)
    layer.__dict__.pop(STATE, None)


def adopt_weight(layer: Any) -> None:
    """Makes the present base weight the one that deltas are written into; positions are worked out anew."""
    layer.__dict__.pop(STATE, None)
    weight = base_of(layer)._parameters.get("weight")
    if weight is None:
        return
    layer.__dict__[STATE] = State(weight)
    for name in active_here(layer):  # here, since a compiled call cannot
        positions_of(layer, name)


def restore_weight(layer: Any) -> None:
    """Takes whatever delta is in the base weight out, to the bit."""
    state = state_of(layer)
    if state is not None:
        state.weight.restore()


def _with_delta(layer: Any, x: Tensor, delta: Delta) -> Tensor:
    """Base layer, delta and factors in our operators, on a weight that holds the delta."""
    values, positions, scaling, low_rank = delta
    base, state = base_of(layer), state_of(layer)
    assert state is not None
    state.weight.hold(positions, values, scaling)
    # An alias that autograd does not watch: the weight may be switched before backward, which switches it back.
    weight = base.weight if torch.compiler.is_compiling() else base.weight.data
    change = positions.arranged(values)
    if scaling != 1.0:
        change = change * scaling
    if low_rank is None:
        y = ops.sparse_delta_linear(x, weight, base.bias, change, positions.indices)
        _before_backward(y, layer, state.weight, delta)
        return y
    lora_a, lora_b, dropout = low_rank.lora_a.weight, low_rank.lora_b.weight, low_rank.dropout
    p = dropout.p if isinstance(dropout, nn.Dropout) else 0.0
    y = ops.lora_linear(x, weight, base.bias, lora_a, lora_b, low_rank.scaling, p, dropout.training)
    _before_backward(y, layer, state.weight, delta)
    return ops.attach_delta(y, x, change, positions.indices)


def _without_delta(layer: Any, x: Tensor, forward: Callable[..., Tensor]) -> Tensor:
    """PEFT's forward, which finds the original weight because it asks for the base layer."""
    base, state = base_of(layer), state_of(layer)
    if state is None or not owns_weight(layer):
        if state is not None and state.weight.holds_delta and getattr(layer, "_is_replica", False):
            raise RuntimeError("call restore(model) before DataParallel: it has copied a weight with a delta in it")
        return forward(x)
    if torch.compiler.is_compiling() or not layer.disable_adapters or layer.merged or base.weight.requires_grad:
        return forward(x)
    if has_hooks(base) or replaced_call(base) is not None or input_obstacle(x, base.weight) is not None:
        return forward(x)
    # Adapters are off, and may be on again before backward: an alias, and the weight switched back, as above.
    state.weight.restore()
    y = F.linear(x, base.weight.data, base.bias)
    _before_backward(y, layer, state.weight, None)
    return y


def _before_backward(y: Tensor, layer: Any, switched: SwitchedWeight, delta: Delta | None) -> None:
    """Has the weight hold `delta` again, or nothing, when y's gradient is known and before y's own backward runs."""
    if torch.compiler.is_compiling() or not y.requires_grad:
        return
    found = weakref.ref(layer)
    changes = None if delta is None else changes_of(delta.values)

    def switch(grad: Tensor) -> None:
        if delta is None:
            if switched.holds_delta:
                _check_still_there(found(), switched)
                switched.restore()
            return
        if changes_of(delta.values) != changes:
            raise RuntimeError("the adapter's values were modified in place between forward and backward")
        if not switched.holds(delta.positions, delta.values, delta.scaling, doubted=True):
            _check_still_there(found(), switched)
            switched.hold(delta.positions, delta.values, delta.scaling)
        if delta.values.requires_grad:
            switched.doubt()

    y.register_hook(switch)


def _check_still_there(layer: Any, switched: SwitchedWeight) -> None:
    """Raises where nobody would take the delta out of the weight again, or the weight is not what it was."""
    state = state_of(layer) if isinstance(layer, SparseLayer) else None
    if state is None or state.weight is not switched:
        raise RuntimeError(
            "backward needs the base weight as it was in forward, but the layer was restored, moved or replaced since"
        )
    if layer.merged:
        raise RuntimeError("backward needs the base weight as it was in forward, but an adapter was merged since")


@cache
def check_peft() -> None:
    """Raises PeftIncompatible unless PEFT's layers compute, from what we read of them, what we take over."""
    x = torch.linspace(-1.0, 1.0, 15, dtype=torch.float32, device="cpu").view(3, 5)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for kind, config in _configurations().items():
            model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4, dtype=torch.float32)), config)
            _check_layer(model.get_submodule("base_model.model.0"), kind, x)


def _configurations() -> dict[Any, Any]:
    """A configuration of a small adapter for each class."""
    options: dict[str, Any] = {"target_modules": ["0"], "init_weights": False}
    configurations = {ShiraLinear: peft.ShiraConfig(r=1, **options)}
    if SupertuningLinear is not None:
        configurations[SupertuningLinear] = peft.SupertuningConfig(sparsity=0.5, r=2, **options)
    return configurations


def _check_layer(layer: Any, kind: Any, x: Tensor) -> None:
    name = f"PEFT {peft.__version__}: {kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}"
    kinds = [parameter.kind for parameter in list(inspect.signature(kind.forward).parameters.values())[2:]]
    if type(layer) is not kind or kinds != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        raise PeftIncompatible(
            f"{name}.forward is expected to take (self, x, *args, **kwargs), it takes {inspect.signature(kind.forward)}"
        )
    expected = layer(x)
    try:
        start(layer)
        same = not isinstance(present_delta(layer), str) and torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    except (AttributeError, KeyError, TypeError) as error:
        raise PeftIncompatible(f"{name} is not built as it has been: {error}") from error
    if not same:
        raise PeftIncompatible(f"{name} does not compute what it has computed so far")
