"""`LoRALinear`, the drop-in for `nn.Linear` that adds a fused low-rank update."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .linear import FLOATING, take_over, takeover_obstacle
from .row_sampling import RowSampling

_ADAPTER_STATE = ("lora_a", "lora_b", "merged_weight", "options", "scaling", "lora_dropout", "row_sampling")


@dataclass(frozen=True)
class LoRAOptions:
    """What one layer's update looks like; checked when made, so that no layer can hold nonsense.

    Attributes:
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an element of x on its way into lora_a, in training.
        use_rslora: divide lora_alpha by `sqrt(r)` instead of r.
        init_lora_weights: True, False or "gaussian"; see `LoRALinear`.
        adapter_dtype: dtype of the factors; None for float32, or float64 over a float64 weight.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r must be an integer >= 1, got {self.r!r}")
        if not _is_number(self.lora_alpha) or not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha must be a finite number, got {self.lora_alpha!r}")
        if not _is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout must be a probability in [0, 1], got {self.lora_dropout!r}")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}; "
                "initializations that change the base weights or need data are not supported"
            )

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` for rank-stabilized LoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def dtype_over(self, weight: Tensor) -> torch.dtype:
        """The factors' dtype over `weight`; raises ValueError for one that the operators do not mix with it."""
        double = weight.dtype == torch.float64
        if self.adapter_dtype is None:
            return torch.float64 if double else torch.float32
        if self.adapter_dtype not in FLOATING or (self.adapter_dtype == torch.float64) != double:
            raise ValueError(
                "adapter_dtype must be float32, bfloat16 or float16 (float64 if and only if the weight is), "
                f"got {self.adapter_dtype} over a {weight.dtype} weight"
            )
        return self.adapter_dtype

    @torch.no_grad()
    def draw(self, lora_a: Tensor, lora_b: Tensor, generator: torch.Generator | None) -> None:
        """Fills factors with their initial values, drawn on the CPU in float32; on the meta device it does nothing."""
        if lora_a.is_meta:
            return
        drawn_a = torch.empty(lora_a.shape, dtype=torch.float32, device="cpu")
        drawn_b = torch.zeros(lora_b.shape, dtype=torch.float32, device="cpu")
        if self.init_lora_weights == "gaussian":
            drawn_a.normal_(0.0, 1.0 / self.r, generator=generator)
        else:  # nn.Linear's own: Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
            bound = 1.0 / math.sqrt(max(lora_a.shape[1], 1))
            drawn_a.uniform_(-bound, bound, generator=generator)
        if self.init_lora_weights is False:
            bound = 1.0 / math.sqrt(self.r)
            drawn_b.uniform_(-bound, bound, generator=generator)
        lora_a.copy_(drawn_a)
        lora_b.copy_(drawn_b)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class LoRALinear(nn.Linear):
    """`y = x weight^T + bias + scaling (dropout(x) lora_a^T) lora_b^T`, fused, with `weight` and `bias` frozen.

    Shapes: x `[..., K]`, weight `[N, K]`, bias `[N]`, lora_a `[r, K]`, lora_b `[N, r]`, y `[..., N]`, K being
    `in_features` and N `out_features`. `state_dict` holds `weight` and `bias` as `nn.Linear` does, plus `lora_a` and
    `lora_b`. Train only one factor by clearing the other's `requires_grad`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling, `lora_alpha / r`.
        lora_dropout: probability of dropping an element of x on its way into lora_a, in training.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        init_lora_weights: True draws lora_a uniformly as `nn.Linear` draws its weight and zeroes lora_b, so that the
            layer starts as the linear layer; "gaussian" draws lora_a from N(0, 1/r^2); False draws both factors.
        adapter_dtype: dtype of the factors. None means float32 over a float32, bfloat16 or float16 weight (PEFT's
            default) and float64 over float64. Activations are never cast to it.

    Merging: `merge()` makes the layer compute with one matrix, `weight + scaling lora_b lora_a` rounded once, held
    beside the untouched `weight`; `unmerge()` drops it. A weight shared with another module is therefore safe, and
    unmerging restores every bit. The merged matrix costs the memory of one more weight (`to_linear(merge=True)` gives
    a layer without the original). `state_dict` always describes the unmerged layer; loading one into a merged layer
    merges anew; copying and pickling keep the layer merged.

    A sampled gradient: with a `RowSampling` as `row_sampling` the layer keeps, in training, a sample of x's rows in the
    place of x. The gradient of lora_a is then an unbiased estimate, all else exact; see `ops.sampled_lora_linear`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Hu et al., "LoRA", ICLR 2022; Kalajdzievski, "A rank stabilization scaling factor for fine-tuning with
    LoRA", 2023.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    merged_weight: Tensor | None
    options: LoRAOptions
    scaling: float
    lora_dropout: float
    row_sampling: RowSampling | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        options = LoRAOptions(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_adapter(options, None)
        self._freeze_base()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> LoRALinear:
        """A `LoRALinear` over an existing layer: the same weight and bias Parameters, now frozen, nothing copied.

        Device, training flag, extra attributes and forward and backward hooks come along (a hook then sees this
        layer's whole output, update included; its handle keeps working).

        Args:
            linear: an `nn.Linear` proper. Subclasses are refused, since their own forward would be lost.
            generator: CPU generator for the initial factors; None means torch's default CPU generator.

        Raises:
            TypeError: `linear` cannot be replaced; the message says why.
            ValueError: a hyperparameter is out of range.
        """
        options = LoRAOptions(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype)
        layer = cls.over(linear, options, generator)
        layer._freeze_base()
        return layer

    @classmethod
    def over(cls, linear: nn.Linear, options: LoRAOptions, generator: torch.Generator | None = None) -> LoRALinear:
        """`from_linear` without the freezing: `linear` and its parameters are left exactly as they are."""
        reason = takeover_obstacle(linear)
        if reason is not None:
            raise TypeError(f"LoRALinear cannot replace this layer: {reason}")
        layer = take_over(linear, cls)
        layer._add_adapter(options, generator)
        return layer

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def _add_adapter(self, options: LoRAOptions, generator: torch.Generator | None) -> None:
        placement: dict[str, Any] = {"device": self.weight.device, "dtype": options.dtype_over(self.weight)}
        self.options = options
        self.scaling = options.scaling
        self.lora_dropout = float(options.lora_dropout)
        self.lora_a = nn.Parameter(torch.empty((options.r, self.in_features), **placement))
        self.lora_b = nn.Parameter(torch.empty((self.out_features, options.r), **placement))
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_lora_parameters(generator)

    @property
    def r(self) -> int:
        """The rank."""
        return self.options.r

    @property
    def lora_alpha(self) -> float:
        """Numerator of the scaling."""
        return self.options.lora_alpha

    def reset_parameters(self) -> None:
        """Draws weight and bias as `nn.Linear` does, and the factors as `init_lora_weights` says."""
        super().reset_parameters()
        if "lora_a" in self._parameters:
            self.reset_lora_parameters()

    def reset_lora_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the factors anew, on the CPU in float32, so that one seed gives one adapter on every device.

        Args:
            generator: CPU generator; None means torch's default CPU generator.
        """
        self.options.draw(self.lora_a, self.lora_b, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`; see `ops.lora_linear` for dtypes, errors and what is saved for backward."""
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.bias)
        if self.row_sampling is not None and self.training:
            return self._sampled(x, self.row_sampling)
        return ops.lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling, self.lora_dropout, self.training
        )

    def _sampled(self, x: Tensor, row_sampling: RowSampling) -> Tensor:
        sample = row_sampling.sample(x, self.lora_a.requires_grad or self.weight.requires_grad)
        return ops.sampled_lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling, sample, self.lora_dropout, True
        )

    @property
    def merged(self) -> bool:
        """Whether the layer computes with the merged matrix, so that its factors get no gradient."""
        return self.merged_weight is not None

    @torch.no_grad()
    def _merge(self) -> Tensor:
        return ops.lora_merged_weight(self.weight, self.lora_a, self.lora_b, self.scaling)

    def merge(self) -> None:
        """Computes with `weight + scaling lora_b lora_a` from now on; a second call warns and does nothing."""
        if self.merged:
            warnings.warn("LoRALinear is merged already; nothing to do", stacklevel=2)
            return
        self.merged_weight = self._merge()

    def unmerge(self) -> None:
        """Undoes `merge`, to the bit; warns and does nothing when the layer is not merged."""
        if not self.merged:
            warnings.warn("LoRALinear is not merged; nothing to do", stacklevel=2)
            return
        self.merged_weight = None

    def to_linear(self, merge: bool) -> nn.Linear:
        """A plain `nn.Linear` in this layer's place, with its bias, hooks, training flag and attributes.

        Args:
            merge: True gives it a new weight with the update in it; False gives it the original weight Parameter.
        """
        linear = take_over(self, nn.Linear, without=_ADAPTER_STATE)
        if merge:
            weight = self.merged_weight if self.merged_weight is not None else self._merge()
            linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return linear

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged:
            self.merged_weight = self._merge()

    def extra_repr(self) -> str:
        scheme = ", use_rslora=True" if self.options.use_rslora else ""
        merged = ", merged=True" if self.merged else ""
        if self.row_sampling is not None:
            merged += f", keep_ratio={self.row_sampling.keep_ratio:g}"
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"
            f"{scheme}{merged}"
        )
