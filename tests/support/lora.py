"""LoRA layers to test with, and what they should compute: the formulas once more, in einsum and in PyTorch's own words.

Letters as everywhere: x `[..., K]`, weight `[N, K]`, lora_a `[r, K]`, lora_b `[N, r]`, scaling s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

import peft_kernels
from peft_kernels.ops.lora import draw_rng_state
from peft_kernels.reference.philox import dropout_mask

from .layouts import laid_out

TENSORS = ("x", "weight", "bias", "lora_a", "lora_b")


@dataclass(frozen=True)
class Layer:
    """The arguments of one `lora_linear` call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.7

    def tensors(self) -> dict[str, Tensor]:
        """Argument name to tensor, without an absent bias."""
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Layer:
        """The layer with `function` applied to every tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def training(self, *names: str) -> Layer:
        """Fresh leaves in the same strides; those named require gradients."""
        return replace(
            self,
            **{name: tensor.detach().requires_grad_(name in names) for name, tensor in self.tensors().items()},
        )

    def with_layout(self, layout: str) -> Layer:
        """The layer with all tensors in other strides."""
        return self.map(lambda tensor: laid_out(tensor, layout))

    def __call__(self, dropout_p: float = 0.0, training: bool = True) -> Tensor:
        """`peft_kernels.ops.lora_linear` of these arguments."""
        return peft_kernels.ops.lora_linear(
            self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling, dropout_p, training
        )


def random_layer(
    leading: Iterable[int] = (7,),
    in_features: int = 24,
    out_features: int = 20,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Layer:
    """A layer of normal numbers, scaled so that both paths contribute alike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan_in: int = 1, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) / max(fan_in, 1) ** 0.5
        return values.to(to).to(device)

    factors = factor_dtype or dtype
    return Layer(
        x=normal(*leading, in_features),
        weight=normal(out_features, in_features, fan_in=in_features),
        bias=normal(out_features) if bias else None,
        lora_a=normal(rank, in_features, fan_in=in_features, to=factors),
        lora_b=normal(out_features, rank, fan_in=rank, to=factors),
    )


def formula(layer: Layer, keep: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """`y = x W^T + bias + s (D * x) A^T B^T` in einsum, in the dtype of the arguments."""
    x = layer.x if keep is None else layer.x * keep.reshape(layer.x.shape) * _keep_scale(dropout_p)
    hidden = torch.einsum("...k,rk->...r", x, layer.lora_a)
    y = torch.einsum("...k,nk->...n", layer.x, layer.weight)
    y = y + layer.scaling * torch.einsum("...r,nr->...n", hidden, layer.lora_b)
    return y if layer.bias is None else y + layer.bias


def plain_pytorch(layer: Layer, keep: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The layer as a PyTorch user writes it, all in x's dtype: PyTorch's own error is the error of this."""
    dtype = layer.x.dtype
    x = layer.x if keep is None else layer.x * keep.reshape(layer.x.shape) * _keep_scale(dropout_p)
    low_rank = linear(linear(x, layer.lora_a.to(dtype)), layer.lora_b.to(dtype))
    return linear(layer.x, layer.weight, layer.bias) + low_rank * layer.scaling


def _keep_scale(dropout_p: float) -> float:
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def gradients(y: Tensor, grad_out: Tensor, layer: Layer) -> dict[str, Tensor]:
    """The gradients of all tensors of `layer` that require one."""
    wanted = {name: tensor for name, tensor in layer.tensors().items() if tensor.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), grad_out)
    return dict(zip(wanted, found, strict=True))


def seeded_call(layer: Layer, dropout_p: float, seed: int = 3) -> Tensor:
    """The layer in training mode after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return layer(dropout_p)


def random_state(device: str) -> Tensor:
    """The state of torch's generator of a device."""
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def mask_of_seeded_call(layer: Layer, dropout_p: float, seed: int = 3) -> Tensor:
    """The keep mask `[M, K]` that `seeded_call` with this seed applies."""
    torch.manual_seed(seed)
    rows = layer.x.numel() // layer.x.shape[-1]
    return dropout_mask(rows, layer.x.shape[-1], dropout_p, draw_rng_state(layer.x.device))
