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
        if isinstance(down, S2FTLinear) and down.dim == "input" and not down.merged and torch.is_grad_enabled():
            h, x_slice = ops.swiglu_s2ft(gate(x), up(x), down.indices)
            return down(h, x_slice=x_slice)  # type: ignore[no-any-return]
        return down(F.silu(gate(x)) * up(x))  # type: ignore[no-any-return]


@torch.no_grad()
def swiglu_obstacle(module: nn.Module, gate: str, up: str, down: str) -> str | None:
    """Why a `SwiGLUMLP` cannot take the place of `module`; None when it can.

    Asks the module itself, with two rows of random numbers: what it computes must be what a `SwiGLUMLP` computes.
    """
    reason = replaced_call(module)
    if reason is not None:
        return reason
    layers = [module._modules.get(name) for name in (gate, up, down)]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "its layers are not all nn.Linear"
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers if layer is not None):
        return "its layers have forward hooks, which may change what they compute"
    weight: Any = layers[0].weight  # type: ignore[union-attr]
    if weight.is_meta:
        return "it is on the meta device, where it cannot be asked what it computes"
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = x.to(device=weight.device, dtype=weight.dtype)
    training = {inner: inner.training for inner in module.modules()}
    try:
        module.eval()
        expected = type(module).forward(module, x)
    except Exception as error:
        return f"it does not compute with one input: {error}"
    finally:
        for inner, flag in training.items():
            inner.training = flag
    found = SwiGLUMLP.over(module, gate, up, down)(x)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(weight.dtype, 3e-2)
    if not isinstance(expected, Tensor) or not torch.allclose(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        return f"a {type_name(module)} does not compute down(silu(gate(x)) * up(x))"
    return None
