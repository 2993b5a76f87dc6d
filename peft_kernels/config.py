"""What to adapt and how: configuration classes with the field names and defaults of Hugging Face PEFT."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .nn.lora import LoRAOptions

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

_UNUSED_PEFT_FIELDS = frozenset(
    {"peft_type", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"}
)
"""Fields of PEFT's file that say nothing about the function an adapter computes, unless another field does."""

_DATA_DRIVEN_INITS = ("eva", "orthogonal")
"""Initializations that leave the base weights alone: of no consequence once an adapter is trained."""

_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _names(argument: str, value: Any) -> list[str] | str | None:
    """`value` as a sorted or given list of names, a regular expression, or None; raises TypeError on anything else."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return list(value)
    raise TypeError(f"{argument} must be a list of names, a regular expression or None, got {value!r}")


@dataclass
class LoraConfig:
    """LoRA over the linear layers of a model; field names, defaults and meanings are PEFT's.

    Attributes:
        r: rank.
        lora_alpha: numerator of the scaling `lora_alpha / r`.
        lora_dropout: dropout probability on the update's input, in training.
        target_modules: which layers. A list of names matches a layer whose path is one of them or ends in `.` and one
            of them; a string is a regular expression that the whole path must match; "all-linear" is every `nn.Linear`
            but the output embedding. None means "all-linear" too (PEFT takes a choice per architecture, often only
            query and value; name them to get the same).
        exclude_modules: layers to leave out, in the same two forms.
        bias: "none" freezes every bias, "lora_only" trains those of adapted layers, "all" trains every one.
        use_rslora: scale by `lora_alpha / sqrt(r)`.
        modules_to_save: names of modules to train in full and save with the adapter. For `task_type` "SEQ_CLS",
            "TOKEN_CLS" and "QUESTION_ANS" the head is added, as PEFT does.
        init_lora_weights: True, False or "gaussian"; see `nn.LoRALinear`.
        layers_to_transform: indices of the transformer layers to adapt; only with a list of `target_modules`.
        layers_pattern: name of the `nn.ModuleList` that those indices count in.
        rank_pattern, alpha_pattern: rank and alpha for layers whose path ends in a match of the regular expression.
        task_type, base_model_name_or_path, revision, inference_mode: recorded in the adapter's file; `inference_mode`
            also freezes the adapter.
        use_dora, use_qalora, lora_bias, fan_in_fan_out, layer_replication, trainable_token_indices,
            target_parameters, alora_invocation_tokens, ensure_weight_tying: known by name and refused with the reason.

    Raises:
        ValueError, TypeError: a field's value is out of range, of a wrong type, or not supported.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
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
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name, reason in _NOT_SUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}")
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        self._check_modules_to_save()
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        self._check_layer_choice()
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        self.options()
        for name, hyperparameter in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for pattern, value in getattr(self, name).items():
                try:
                    self.options(**{hyperparameter: value})
                except ValueError as error:
                    raise ValueError(f"{name}[{pattern!r}]: {error}") from None

    def _check_modules_to_save(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names or None, got {self.modules_to_save!r}")
        names = _names("modules_to_save", self.modules_to_save) or ()
        if self.task_type is not None:
            self.task_type = str(getattr(self.task_type, "value", self.task_type))
        self.modules_to_save = list(dict.fromkeys((*names, *self.task_heads()))) or None

    def task_heads(self) -> tuple[str, ...]:
        """The names under which models for this `task_type` keep the head that PEFT always trains."""
        return _TASK_HEADS.get(self.task_type or "", ())

    def _check_layer_choice(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and not isinstance(self.target_modules, list):
                raise ValueError(
                    f"{name} needs target_modules as a list of names, got target_modules={self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got None")

    def options(self, **overrides: Any) -> LoRAOptions:
        """One layer's hyperparameters, with `overrides` for what its path changes."""
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
        }
        return LoRAOptions(**{**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The contents of PEFT's `adapter_config.json`, without the fields that only refused options use."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NOT_SUPPORTED}
        return {**values, "peft_type": "LORA", "fan_in_fan_out": False, "use_dora": False}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """Reads the contents of an `adapter_config.json`, ours or PEFT's.

        Options we do not know are ignored when they are off (None, False, empty) and warned about when they are on.

        Raises:
            ValueError, TypeError: not a LoRA adapter, or an option that changes what it computes is not supported.
        """
        peft_type = values.get("peft_type")
        peft_type = getattr(peft_type, "value", peft_type)
        if peft_type not in (None, "LORA"):
            raise ValueError(f"peft_type must be 'LORA' for a LoraConfig, got {peft_type!r}")
        known = {item.name for item in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        ignored = {name: value for name, value in values.items() if name not in known | _UNUSED_PEFT_FIELDS and value}
        if kept.get("init_lora_weights") in _DATA_DRIVEN_INITS:
            kept["init_lora_weights"] = True
            ignored.pop("eva_config", None)
        if ignored:
            warnings.warn(f"LoraConfig ignores options it does not know: {ignored}", stacklevel=2)
        return cls(**kept)
