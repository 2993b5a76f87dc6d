"""`QuantizedSparseDeltaLinear`, a sparse delta over a linear layer whose weight is stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .positions import index_dtype, number_of, random_positions
from .quantized import dequantized, quantized_kind


class QuantizedSparseDeltaLinear(nn.Module):
    """`y = x (W + scatter(indices, values))^T + bias`, with W stored quantised in `base_layer`.

    A quantised weight cannot hold the delta, so the weight is made dense for one product, in forward and again in
    backward, and the delta is added there. Nothing of size `[N, K]` stays between the two.

    Shapes: x `[..., K]`, values float32 and indices `[nnz]`, y `[..., N]`. `base_layer` is a bitsandbytes Linear4bit or
    Linear8bitLt, kept as it is; of 8-bit layers the product is that of the dense weight with x as it is, not the one
    that quantises x as well.

    Args:
        base_layer: the layer; its parameters are frozen.
        density: share of the entries to train, in (0, 1].
        num_deltas: or their number.
        indices: or the positions `n K + k` themselves, sorted and unique. One of the three.
        generator: CPU generator for the positions that are drawn; None means torch's default CPU generator.

    Raises:
        TypeError: `base_layer` has no weight that is quantised in a known way.
        ValueError: a hyperparameter is out of range, or the weight has not been quantised yet.
    """

    values: nn.Parameter
    indices: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._add_delta(base_layer, density, num_deltas, indices, generator)
        base_layer.requires_grad_(False)

    @classmethod
    def over(
        cls,
        base_layer: nn.Module,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> QuantizedSparseDeltaLinear:
        """As the constructor, without the freezing: `base_layer` and its parameters are left exactly as they are."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._add_delta(base_layer, density, num_deltas, indices, generator)
        return layer

    def _add_delta(
        self,
        base_layer: nn.Module,
        density: float | None,
        num_deltas: int | None,
        indices: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        if quantized_kind(base_layer) is None:
            raise TypeError(f"base_layer must be a bitsandbytes Linear4bit or Linear8bitLt, got {type(base_layer)}")
        layer: Any = base_layer
        numel = layer.in_features * layer.out_features
        if indices is None:
            indices = random_positions(numel, number_of(numel, density, num_deltas), generator)
        elif density is not None or num_deltas is not None:
            raise ValueError("give density, num_deltas or indices, got more than one of them")
        else:
            ops.check_indices(indices, numel)
        dequantized(layer, torch.float32)  # raises while there is nothing to make dense
        self.base_layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device = layer.weight.device
        self.values = nn.Parameter(torch.zeros(indices.numel(), dtype=torch.float32, device=device))
        self.register_buffer("indices", indices.to(device, index_dtype(numel)))

    @property
    def num_deltas(self) -> int:
        """How many entries of the weight train."""
        return self.indices.numel()

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight, packed as its library packs it."""
        return self.base_layer.weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[no-any-return]

    @property
    def merged(self) -> bool:
        """Never: a quantised weight cannot hold the delta."""
        return False

    merge_obstacle = "a quantised weight cannot hold a sparse delta; apply it to the dense checkpoint instead"
    """Why `merge` raises."""

    def merge(self) -> None:
        """Raises ValueError: a quantised weight cannot hold the delta."""
        raise ValueError(self.merge_obstacle)

    def unmerge(self) -> None:
        """There is nothing to undo."""

    def to_linear(self, merge: bool) -> Any:
        """The base layer, without the delta.

        Raises:
            ValueError: with `merge=True`, see `merge`.
        """
        if merge:
            self.merge()
        return self.base_layer

    @torch.no_grad()
    def set_delta(self, indices: Tensor, values: Tensor | None = None) -> None:
        """Moves the delta to other positions, as many as before; values None means zeros.

        Raises:
            TypeError, ValueError: indices or values do not fit; nothing has changed.
        """
        ops.check_indices(indices, self.in_features * self.out_features)
        for name, tensor in (("indices", indices), ("values", values)):
            if tensor is not None and tensor.shape != self.indices.shape:
                raise ValueError(f"{name} must be {list(self.indices.shape)}, as before, got {list(tensor.shape)}")
        self.indices.copy_(indices)
        self.values.zero_() if values is None else self.values.copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.quantized_sparse_delta_linear`."""
        base = self.base_layer
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.quantized_sparse_delta_linear(
            x, lambda dtype: dequantized(base, dtype), bias, self.values, self.indices
        )

    def extra_repr(self) -> str:
        return f"num_deltas={self.num_deltas} ({self.num_deltas / (self.in_features * self.out_features):.3%})"
