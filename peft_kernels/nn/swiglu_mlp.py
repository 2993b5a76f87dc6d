"""`SwiGLUMLP`, a gated MLP whose activation also writes the channels that its last layer trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .linear import replaced_call, take_over, type_name
from .s2ft import S2FTLinear

_OWN = ("replaced_type", "roles")


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, in the place of a module that computes that with layers of its own.

    Where `down` is an `S2FTLinear` that trains input channels, one pass over `gate(x)` and `up(x)` writes their
    product and the channels that train. Kept for backward are `gate(x)`, `up(x)` and these channels; the product and
    `silu(gate(x))`, which torch would keep, are not.

    Shapes: x `[..., hidden]` to `[..., hidden]`. Parameters, hooks, attributes and names are those of the module that
    was replaced.

    Attributes:
        replaced_type: the class of that module.
        roles: the names of its gate, up and down layers.
    """

    replaced_type: type[nn.Module]
    roles: tuple[str, str, str]

    @classmethod
    def over(cls, module: nn.Module, gate: str, up: str, down: str) -> SwiGLUMLP:
        """A `SwiGLUMLP` with the state of `module`, which is not changed.

        Args:
            module: an MLP; see `swiglu_obstacle`.
            gate, up, down: names of its layers.
        """
        fused = take_over(module, cls)
        fused.replaced_type, fused.roles = type(module), (gate, up, down)
        return fused

    def restored(self) -> nn.Module:
        """A module of the class that was replaced, with the state that this one has now."""
        return take_over(self, self.replaced_type, without=_OWN)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., hidden]` to `[..., hidden]`; see `ops.swiglu_s2ft` and the three layers."""
        gate, up, down = (self._modules[name] for name in self.roles)
        assert gate is not None and up is not None and down is not None
        if not isinstance(down, S2FTLinear) or down.dim != "input":
            return down(F.silu(gate(x)) * up(x))  # type: ignore[no-any-return]
        # Without gradients and when merged too, for the same bits: reentrant checkpointing computes without them first.
        h, x_slice = ops.swiglu_s2ft(gate(x), up(x), down.indices)
        if down._forward_pre_hooks:  # which may give it something else than h
            return down(h)  # type: ignore[no-any-return]
        return down(h, x_slice=x_slice)  # type: ignore[no-any-return]


@torch.no_grad()
def swiglu_obstacle(module: nn.Module, gate: str, up: str, down: str) -> str | None:
    """Why a `SwiGLUMLP` cannot take the place of `module`; None when it can.

    Asks the module itself, with a few rows of random numbers, in evaluation and in training: what it computes must be
    what a `SwiGLUMLP` computes. The module and torch's generators are left as they were.
    """
    reason = replaced_call(module)
    if reason is not None:
        return reason
    layers = [module._modules.get(name) for name in (gate, up, down)]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "its layers are not all nn.Linear"
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers if layer is not None):
        return "its layers have forward hooks, which may change what they compute"
    if any(True for _ in module.buffers()):
        return "it has buffers, which a call may change"
    weight: Any = layers[0].weight  # type: ignore[union-attr]
    if weight.is_meta:
        return "it is on the meta device, where it cannot be asked what it computes"
    x = _question(layers[0], weight)
    expected = SwiGLUMLP.over(module, gate, up, down)(x)
    if not expected.any():
        return "its weights are zero, so that it cannot be asked what it computes"
    try:
        answers = _answers(module, x)
    except Exception as error:
        return f"it does not compute with one input: {error}"
    for answer, mode in zip(answers, ("", " in training"), strict=True):
        if not _agree(answer, expected):
            return f"a {type_name(module)} does not compute down(silu(gate(x)) * up(x)){mode}"
    return None


def _question(gate: Any, weight: Tensor) -> Tensor:
    """Rows that gate turns into numbers of the size of 2, where activations differ most."""
    rows = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = rows.to(device=weight.device, dtype=weight.dtype)
    spread = float(gate(x).double().std(0).mean())
    return x * (2 / spread) if spread > 0 else x


def _answers(module: nn.Module, x: Tensor) -> list[Any]:
    """What the module itself makes of x in evaluation and in training, the latter by a seed of its own."""
    training = {inner: inner.training for inner in module.modules()}
    answers = []
    kind = x.device.type
    with torch.random.fork_rng([] if kind == "cpu" else [x.device], device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(0)
        try:
            for flag in (False, True):
                for inner in training:
                    inner.training = flag
                answers.append(type(module).forward(module, x))
        finally:
            for inner, flag in training.items():
                inner.training = flag
    return answers


def _agree(answer: Any, expected: Tensor) -> bool:
    """Whether they are equal but for rounding, which a silu in other words may do once more."""
    if not isinstance(answer, Tensor) or answer.shape != expected.shape or answer.dtype != expected.dtype:
        return False
    difference, scale = (answer.double() - expected.double()).abs().max(), expected.double().abs().max()
    return bool(difference <= 2 * max(torch.finfo(expected.dtype).eps, 1e-6) * scale)
