"""The configuration of sampled weight gradients (WTA-CRS): which layers keep how much of their input."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.wta_crs import check_keep_ratio
from .base import AdapterConfig, _names


@dataclass
class WTACRSConfig:
    """Layers that keep a sample of their input's rows for backward, while they train.

    Attributes:
        keep_ratio: share of the rows that are kept, in (0, 1]; their number is rounded up.
        target_modules: which layers, in the forms of `LoraConfig`. None, or "all-linear", is every `LoRALinear`, and
            every `nn.Linear` whose weight trains but the output embedding.
        exclude_modules: layers to leave out, in the same forms.

    Raises:
        ValueError, TypeError: a field's value is out of range or of a wrong type.

    Source: Liu et al., "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model", NeurIPS
    2023.
    """

    keep_ratio: float = 0.3
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        check_keep_ratio(type(self).__name__, self.keep_ratio)
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)

    def targets(self) -> AdapterConfig:
        """What of it says which layers, as `peft_kernels.targets` reads it."""
        return AdapterConfig(target_modules=self.target_modules, exclude_modules=self.exclude_modules)
