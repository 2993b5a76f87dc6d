"""`RoSALinear`, the drop-in for `nn.Linear` that trains a low-rank update and a few entries of the weight together."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .lora import LoRAOptions
from .merged import write_delta
from .sparse_delta import SparseDeltaLinear


class RoSALinear(SparseDeltaLinear):
    """`y = x (W0 + scatter(indices, values))^T + bias + scaling (dropout(x) lora_a^T) lora_b^T`, W0 and bias frozen.

    A `SparseDeltaLinear` with the factors of a `LoRALinear`: `weight` holds `W0 + delta`, written when values have
    changed, and the fused LoRA operator computes with it. So the two adapters cost what LoRA costs and a sampled
    gradient. Any optimizer may train all three; `optim.SparseAdamW` writes the values back in the same pass.

    Shapes: x `[..., K]`, weight `[N, K]`, bias `[N]`, lora_a `[r, K]`, lora_b `[N, r]`, values, indices and original
    `[nnz]`, y `[..., N]`. Dropout is on the way into lora_a only, as in `LoRALinear`. `state_dict` holds all of them.

    Args:
        in_features, out_features, bias, density, num_deltas, selection, device, dtype: as in `SparseDeltaLinear`. The
            authors choose positions by their gradient; `from_linear` takes any.
        adapter_dtype: dtype of values and factors. None means float32 over a float32, bfloat16 or float16 weight and
            float64 over float64.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in `LoRALinear`.

    Merging: `merge()` makes the layer compute with one matrix, `W0 + delta` and then the low-rank update, each rounded
    once, held beside weight at the memory of one more; `unmerge()` drops it, and takes the delta out to the bit.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Nikdan et al., "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", ICML 2024.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    merged_weight: Tensor | None
    options: LoRAOptions
    scaling: float
    lora_dropout: float

    adapter_state: ClassVar[tuple[str, ...]] = (
        *SparseDeltaLinear.adapter_state,
        *("lora_a", "lora_b", "merged_weight", "options", "scaling", "lora_dropout"),
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        density: float | None = None,
        num_deltas: int | None = None,
        selection: Literal["random", "magnitude"] = "random",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        options = LoRAOptions(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        super().__init__(in_features, out_features, bias, density, num_deltas, selection, device, dtype, adapter_dtype)
        self._add_factors(options, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        selection: Literal["random", "magnitude"] = "random",
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> RoSALinear:
        """A `RoSALinear` over an existing layer: the same weight and bias Parameters, now frozen.

        Args:
            linear, density, num_deltas, indices, selection: as in `SparseDeltaLinear.from_linear`.
            adapter_dtype: as in the constructor.
            generator: CPU generator, first for a random selection, then for the factors; None means torch's default.
            r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as in `LoRALinear`.

        Raises:
            TypeError: `linear` cannot be replaced, or indices have another dtype; the message says why.
            ValueError: a hyperparameter is out of range, or indices are not sorted, unique and in range.
        """
        options = LoRAOptions(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        layer = cls.over(linear, density, num_deltas, indices, selection, adapter_dtype, generator, options)
        layer._freeze_base()
        return layer

    @classmethod
    def over(
        cls,
        linear: nn.Linear,
        density: float | None = None,
        num_deltas: int | None = None,
        indices: Tensor | None = None,
        selection: Literal["random", "magnitude"] = "random",
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        options: LoRAOptions | None = None,
    ) -> RoSALinear:
        """`from_linear` without the freezing: `linear` and its parameters are left exactly as they are."""
        layer = super().over(linear, density, num_deltas, indices, selection, adapter_dtype, generator)
        assert isinstance(layer, RoSALinear)
        layer._add_factors(options or LoRAOptions(adapter_dtype=adapter_dtype), generator)
        return layer

    def _add_factors(self, options: LoRAOptions, generator: torch.Generator | None) -> None:
        placement: dict[str, Any] = {"device": self.weight.device, "dtype": self.values.dtype}
        self.options = options
        self.scaling = options.scaling
        self.lora_dropout = float(options.lora_dropout)
        self.lora_a = nn.Parameter(torch.empty((options.r, self.in_features), **placement))
        self.lora_b = nn.Parameter(torch.empty((self.out_features, options.r), **placement))
        self.register_buffer("merged_weight", None, persistent=False)
        options.draw(self.lora_a, self.lora_b, generator)

    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does, positions and factors as the options say; values become zero."""
        super().reset_parameters()
        if "lora_a" in self._parameters:
            self.options.draw(self.lora_a, self.lora_b, None)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.lora_linear` and `ops.attach_delta` for dtypes, errors, memory."""
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        weight, regathered = self.weight, self._write_before_use()
        y = ops.lora_linear(
            x, weight, self.bias, self.lora_a, self.lora_b, self.scaling, self.lora_dropout, self.training
        )
        if regathered and y.requires_grad:  # before y's own backward runs
            original = self._original_over(weight)
            y.register_hook(lambda grad: write_delta(weight, self.indices, original, self.values, counted=False))
        self._doubt_after_backward(y)
        return ops.attach_delta(y, x, self.values, self.indices, observer=self.gradient_observer)

    @torch.no_grad()
    def _merge(self) -> Tensor:
        self.write()
        return ops.lora_merged_weight(self.weight, self.lora_a, self.lora_b, self.scaling)

    def merge(self) -> None:
        """Computes with one matrix, both adapters in it, from now on; a second call warns and does nothing."""
        already = self.merged
        super().merge()
        if not already:
            self.merged_weight = self._merge()

    def unmerge(self) -> None:
        """Undoes `merge` and takes the delta out of weight, to the bit; the next forward writes it again.

        Warns and does nothing when the layer is not merged.
        """
        super().unmerge()
        self.merged_weight = None

    def to_linear(self, merge: bool) -> nn.Linear:
        """A plain `nn.Linear` in this layer's place, with its bias, hooks, training flag and attributes.

        Args:
            merge: True gives it a new weight with both adapters in it; False gives it the original weight Parameter,
                with the delta taken out to the bit.
        """
        merged = None
        if merge:
            merged = self.merged_weight if self.merged_weight is not None else self._merge()
        linear = super().to_linear(merge)
        if merged is not None:
            linear.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        return linear

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged:
            self.merged_weight = self._merge()

    def extra_repr(self) -> str:
        scheme = ", use_rslora=True" if self.options.use_rslora else ""
        return (
            f"{super().extra_repr()}, r={self.options.r}, lora_alpha={self.options.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}{scheme}"
        )
