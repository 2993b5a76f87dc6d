"""What every adapter's configuration says: which layers, which biases, which modules in full."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

UNUSED_PEFT_FIELDS = frozenset({"peft_type", "auto_mapping", "peft_version", "runtime_config"})
"""Fields of PEFT's file that say nothing about the function an adapter computes, unless another field does."""

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


@dataclass(kw_only=True)
class AdapterConfig:
    """The fields that all configurations share.

    Attributes:
        target_modules: which layers. A list of names matches a layer whose path is one of them or ends in `.` and one
            of them; a string is a regular expression that the whole path must match; "all-linear" is every `nn.Linear`
            but the output embedding. None means "all-linear" too (PEFT takes a choice per architecture, often only
            query and value; name them to get the same).
        exclude_modules: layers to leave out, in the same two forms.
        bias: "none" freezes every bias, "all" trains every one; for LoRA "lora_only" trains those of adapted layers.
        modules_to_save: names of modules to train in full and save with the adapter. For `task_type` "SEQ_CLS",
            "TOKEN_CLS" and "QUESTION_ANS" the head is added, as PEFT does.
        layers_to_transform: indices of the transformer layers to adapt; only with a list of `target_modules`.
        layers_pattern: name of the `nn.ModuleList` that those indices count in.
        task_type, base_model_name_or_path, revision, inference_mode: recorded in the adapter's file; `inference_mode`
            also freezes the adapter.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    peft_types: ClassVar[tuple[str, ...]] = ()
    """The values of `peft_type` in files that this class reads."""
    not_supported: ClassVar[dict[str, str]] = {}
    """PEFT options by name, and why they cannot be on; all are off by default."""
    biases: ClassVar[tuple[str, ...]] = ("none", "all")
    unused_fields: ClassVar[frozenset[str]] = UNUSED_PEFT_FIELDS

    def __post_init__(self) -> None:
        for name, reason in self.not_supported.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported: {reason}")
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        self._check_modules_to_save()
        if self.bias not in self.biases:
            *first, last = (repr(choice) for choice in self.biases)
            raise ValueError(f"bias must be {', '.join(first)} or {last}, got {self.bias!r}")
        self._check_layer_choice()

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

    def to_dict(self) -> dict[str, Any]:
        """The contents of `adapter_config.json`, without the fields that only refused options use."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in self.not_supported}
        return {**values, "peft_type": self.peft_types[0]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads the contents of an `adapter_config.json`, ours or PEFT's.

        Options we do not know are ignored when they are off (None, False, empty) and warned about when they are on.

        Raises:
            ValueError, TypeError: another kind of adapter, or an option that changes what it computes is not supported.
        """
        peft_type = values.get("peft_type")
        peft_type = getattr(peft_type, "value", peft_type)
        if peft_type is not None and peft_type not in cls.peft_types:
            expected = " or ".join(repr(name) for name in cls.peft_types)
            raise ValueError(f"peft_type must be {expected} for a {cls.__name__}, got {peft_type!r}")
        known = {item.name for item in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        ignored = {name: value for name, value in values.items() if name not in known | cls.unused_fields and value}
        if ignored:
            warnings.warn(f"{cls.__name__} ignores options it does not know: {ignored}", stacklevel=2)
        return cls(**kept)
