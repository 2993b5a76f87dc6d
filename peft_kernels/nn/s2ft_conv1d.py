"""`S2FTConv1D`, the drop-in for transformers' `Conv1D` that trains whole channels of its weight."""

from __future__ import annotations

from typing import ClassVar, Self

from torch import nn

from .linear import take_over
from .s2ft_layer import S2FTLayer


class S2FTConv1D(S2FTLayer):
    """`y = x weight + bias` with `weight [K, N]`, as GPT-2 keeps its linear layers: `S2FTLinear` over a transposed W.

    The weight stays as it is stored, and no copy of it is made. Its input channels are rows and its output channels
    columns: with `dim="input"` the slice `weight[indices, :]` trains, and of x only the columns at indices are kept for
    backward; with `dim="output"` the slice `weight[:, indices]`.

    Shapes: x `[..., K]`, weight `[K, N]`, bias `[N]`, indices `[s]`, y `[..., N]`, trainable and original `[s, N]` for
    input channels and `[K, s]` for output channels, K being `nx` and N `nf`. Everything else is as in `S2FTLinear`.
    Made by `from_linear` over a layer that exists, of whose class `to_linear` makes one again.

    Attributes:
        in_features, out_features: K and N, by the names of `nn.Linear`.
        replaced_type: the class of the layer that was replaced.
        merged, order: as in `S2FTLinear`.
    """

    nx: int
    nf: int
    replaced_type: type[nn.Module]

    transposed: ClassVar[bool] = True
    adapter_state: ClassVar[tuple[str, ...]] = (
        *S2FTLayer.adapter_state,
        "in_features",
        "out_features",
        "replaced_type",
    )

    def __init__(self) -> None:
        raise TypeError("S2FTConv1D is made over a Conv1D that exists; use S2FTConv1D.from_linear")

    @classmethod
    def _taken_from(cls, linear: nn.Module) -> Self:
        layer = take_over(linear, cls)
        layer.in_features, layer.out_features, layer.replaced_type = linear.nx, linear.nf, type(linear)
        return layer

    @property
    def plain_type(self) -> type[nn.Module]:
        return self.replaced_type

    def extra_repr(self) -> str:
        """What a printed model shows of it."""
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"
