"""The configuration of LoRA, with the field names, defaults and meanings of Hugging Face PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ..nn.lora import LoRAOptions
from .base import UNUSED_PEFT_FIELDS, AdapterConfig

_NO_KERNEL = "no fused kernel computes it yet; use PEFT's own layers for it"
_NOT_SUPPORTED = {
    "use_dora": f"DoRA: {_NO_KERNEL}",
    "use_qalora": f"QA-LoRA: {_NO_KERNEL}",
    "lora_bias": f"a bias inside the update: {_NO_KERNEL}",
    "fan_in_fan_out": "weights stored as [in_features, out_features] (transformers' Conv1D) are not supported",
    "layer_replication": "repeating layers of the base model is not supported",
    "trainable_token_indices": "training single embedding rows is not supported; modules_to_save trains all of them",
    "target_parameters": "adapting bare parameters (fused experts) is not supported",
    "alora_invocation_tokens": f"activated LoRA: {_NO_KERNEL}",
    "ensure_weight_tying": "adapters on tied layers are not tied to each other",
}
"""PEFT options by name, and why they cannot be on; all are off by default."""

_DATA_DRIVEN_INITS = ("eva", "orthogonal")
"""Initializations that leave the base weights alone: of no consequence once an adapter is trained."""


@dataclass
class LoraConfig(AdapterConfig):
    """LoRA over the linear layers of a model; field names, defaults and meanings are PEFT's.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scaling `lora_alpha / r`.
        lora_dropout: dropout probability on the update's input, in training.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        init_lora_weights: True, False or "gaussian"; see `nn.LoRALinear`.
        rank_pattern, alpha_pattern: rank and alpha for layers whose path ends in a match of the regular expression.
        use_dora, use_qalora, lora_bias, fan_in_fan_out, layer_replication, trainable_token_indices,
            target_parameters, alora_invocation_tokens, ensure_weight_tying: known by name and refused with the reason.
        target_modules, exclude_modules, bias, modules_to_save, layers_to_transform, layers_pattern, task_type,
            base_model_name_or_path, revision, inference_mode: as in `AdapterConfig`.

    Raises:
        ValueError, TypeError: a field's value is out of range, of a wrong type, or not supported.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    use_qalora: bool = False
    lora_bias: bool = False
    layer_replication: list[list[int]] | None = None
    trainable_token_indices: Any = None
    target_parameters: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    ensure_weight_tying: bool = False

    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)
    not_supported: ClassVar[dict[str, str]] = _NOT_SUPPORTED
    biases: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")
    unused_fields: ClassVar[frozenset[str]] = UNUSED_PEFT_FIELDS | {"megatron_core", "qalora_group_size"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        self.options()
        for name, hyperparameter in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for pattern, value in getattr(self, name).items():
                try:
                    self.options(**{hyperparameter: value})
                except ValueError as error:
                    raise ValueError(f"{name}[{pattern!r}]: {error}") from None

    def options(self, **overrides: Any) -> LoRAOptions:
        """One layer's hyperparameters, with `overrides` for what its path changes."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
        }
        return LoRAOptions(**{**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The contents of PEFT's `adapter_config.json`, without the fields that only refused options use."""
        return {**super().to_dict(), "fan_in_fan_out": False, "use_dora": False}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As `AdapterConfig.from_dict`."""
        if values.get("init_lora_weights") in _DATA_DRIVEN_INITS:
            values = {**values, "init_lora_weights": True, "eva_config": None}
        return super().from_dict(values)
