"""What ours is compared with at layer level, side by side and on the same weights, named for what it is.

    frozen linear                 y = x W^T, backward dx only: what the layer costs without an adapter
    PEFT                          PEFT's LoRA linear as `get_peft_model` makes it: float32 factors
    PEFT, adapters in base dtype  the same with `autocast_adapter_dtype=False`
    addmm sequence                an autograd Function over library GEMMs that accumulates with `addmm_`, the way
                                  Unsloth and axolotl do; written from the formulas, each product formed once
    ours                          `pk.nn.LoRALinear`, float32 factors, the default backend of the device
    ours, adapters in base dtype  the same with factors in the activations' dtype
    ours [<backend>]              inside `use_backend`

Weights are shared, factors are copies of the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peft_kernels as pk

FROZEN = "frozen linear"
PEFT = "PEFT"
PEFT_BASE_DTYPE = "PEFT, adapters in base dtype"
ADDMM = "addmm sequence"
OURS = "ours"
OURS_BASE_DTYPE = "ours, adapters in base dtype"
_ORDER = (FROZEN, PEFT, PEFT_BASE_DTYPE, ADDMM, OURS, OURS_BASE_DTYPE)


def position(name: str) -> tuple[int, str]:
    """Sort key for the columns of a table: the order above, then what has a name of its own."""
    return (_ORDER.index(name), "") if name in _ORDER else (len(_ORDER), name)


@dataclass(frozen=True)
class LayerSpec:
    """One layer to build: sizes, dtype of activations and weight, dropout, device.

    Attributes:
        M, K, N, r: tokens, in_features, out_features, rank.
        dropout_p: probability of `lora_dropout`.
    """

    M: int
    K: int
    N: int
    r: int
    dtype: torch.dtype
    dropout_p: float
    device: torch.device

    @property
    def scaling(self) -> float:
        """`lora_alpha / r` with the usual `lora_alpha = 2 r`."""
        return 2.0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M={self.M} {self.K}->{self.N} r={self.r} {dtype} p={self.dropout_p}"


@dataclass(frozen=True)
class Weights:
    """The tensors every arm of one case starts from: weight `[N, K]`, lora_a `[r, K]`, lora_b `[N, r]`, no zeros."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def random(cls, spec: LayerSpec) -> Weights:
        """Weights of the size a trained layer has; factors float32."""
        generator = torch.Generator(spec.device).manual_seed(0)

        def normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, device=spec.device) * columns**-0.5
            return values.to(dtype)

        lora_a, lora_b = normal(spec.r, spec.K, torch.float32), normal(spec.N, spec.r, torch.float32)
        return cls(normal(spec.N, spec.K, spec.dtype), lora_a, lora_b)

    def linear(self) -> nn.Linear:
        """A frozen `nn.Linear` around `weight`, which all arms share."""
        N, K = self.weight.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        return linear

    @torch.no_grad()
    def copy_to(self, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the factors into a layer's own parameters, in their dtype, and returns those."""
        return lora_a.copy_(self.lora_a), lora_b.copy_(self.lora_b)


@dataclass(frozen=True)
class Layer:
    """One arm: a callable layer with its parameters.

    Attributes:
        forward: `[M, K]` to `[M, N]`, in training mode.
        factors: (lora_a, lora_b), or () for the frozen linear.
        weight: the shared frozen weight.
        backend: what `use_backend` is to force, or None for the default.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    factors: tuple[Tensor, ...]
    weight: Tensor
    backend: str | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.backend is None:
            return self.forward(x)
        with pk.use_backend(self.backend):
            return self.forward(x)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Everything that is alive in any case and does not count as saved for backward."""
        return (*self.factors, self.weight)


class AddmmLoRAFunction(torch.autograd.Function):
    """LoRA over library GEMMs: x `[M, K]`, weight `[N, K]`, lora_a `[r, K]`, lora_b `[N, r]`, dropout stored.

    Saved for backward: x (with dropout: the dropped x and its mask), `hidden [M, r]` and the factors in x's dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scaling, dropout_p):  # type: ignore[no-untyped-def, override]
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        inputs, mask = (x, None) if dropout_p == 0.0 else torch.native_dropout(x, dropout_p, True)
        hidden = inputs @ a.t()
        y = (x @ weight.t()).addmm_(hidden, b.t(), alpha=scaling)
        ctx.save_for_backward(inputs, mask, weight, a, b, hidden)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        ctx.factor_dtypes = lora_a.dtype, lora_b.dtype
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        inputs, mask, weight, a, b, hidden = ctx.saved_tensors
        grad_hidden = (dy @ b).mul_(ctx.scaling)
        grad_b = (dy.t() @ hidden).mul_(ctx.scaling)
        grad_a = grad_hidden.t() @ inputs
        dx = dy @ weight
        if mask is None:
            dx.addmm_(grad_hidden, a)
        else:
            dx += torch.ops.aten.native_dropout_backward(grad_hidden @ a, mask, 1.0 / (1.0 - ctx.dropout_p))
        dtype_a, dtype_b = ctx.factor_dtypes
        return dx, None, grad_a.to(dtype_a), grad_b.to(dtype_b), None, None


def frozen_linear(spec: LayerSpec, weights: Weights) -> Layer:
    """The linear without an adapter; its backward forms dx only."""
    return Layer(FROZEN, weights.linear(), (), weights.weight)


class _Host(nn.Module):
    """The least model PEFT can attach an adapter to."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def peft_layer(spec: LayerSpec, weights: Weights, base_dtype: bool = False) -> Layer:
    """PEFT's own LoRA linear with our factors in it; `base_dtype` keeps the factors in the weight's dtype."""
    import peft

    config = peft.LoraConfig(
        r=spec.r, lora_alpha=round(spec.scaling * spec.r), lora_dropout=spec.dropout_p, target_modules=["linear"]
    )
    host: Any = _Host(weights.linear())
    peft.get_peft_model(host, config, autocast_adapter_dtype=not base_dtype)  # replaces host.linear
    layer = host.linear.train()
    factors = weights.copy_to(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return Layer(PEFT_BASE_DTYPE if base_dtype else PEFT, layer, factors, weights.weight)


def addmm_sequence(spec: LayerSpec, weights: Weights) -> Layer:
    """`AddmmLoRAFunction` with float32 factors."""
    lora_a, lora_b = (nn.Parameter(factor.clone()) for factor in (weights.lora_a, weights.lora_b))

    def forward(x: Tensor) -> Tensor:
        return AddmmLoRAFunction.apply(x, weights.weight, lora_a, lora_b, spec.scaling, spec.dropout_p)

    return Layer(ADDMM, forward, (lora_a, lora_b), weights.weight)


def ours(spec: LayerSpec, weights: Weights, base_dtype: bool = False, backend: str | None = None) -> Layer:
    """Our drop-in; `base_dtype` puts the factors in the weight's dtype, `backend` forces one."""
    layer = pk.nn.LoRALinear.from_linear(
        weights.linear(),
        r=spec.r,
        lora_alpha=spec.scaling * spec.r,
        lora_dropout=spec.dropout_p,
        adapter_dtype=spec.dtype if base_dtype else torch.float32,
    ).train()
    factors = weights.copy_to(layer.lora_a, layer.lora_b)
    name = OURS_BASE_DTYPE if base_dtype else OURS
    return Layer(name if backend is None else f"{name} [{backend}]", layer, factors, weights.weight, backend)


def layers(spec: LayerSpec, weights: Weights, backends: Sequence[str] = ()) -> list[Layer]:
    """All arms of one case. `backends` adds one arm of ours for each; with float32 weights the arms whose factors
    are in the base dtype would be duplicates and are left out."""
    arms = [frozen_linear(spec, weights), peft_layer(spec, weights), addmm_sequence(spec, weights), ours(spec, weights)]
    if spec.dtype != torch.float32:
        arms.insert(2, peft_layer(spec, weights, base_dtype=True))
        arms.append(ours(spec, weights, base_dtype=True))
    return arms + [ours(spec, weights, backend=backend) for backend in backends]
