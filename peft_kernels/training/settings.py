"""The options of `peft-kernels finetune`, checked in one place, stored with every run and compared on resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lora", "sparse_delta"),
    "dtype": ("float32", "bfloat16"),
    "adapter_dtype": ("float32", "model"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "compare": ("none", "peft", "shira"),
    "selection": ("rigl", "sm3", "random", "magnitude", "fixed"),
    "reselection_schedule": ("linear", "cosine"),
}
_METHOD_OF_COMPARISON = {"peft": "lora", "shira": "sparse_delta"}
_OF_ONE_METHOD = {
    "lora": ("lora_alpha", "lora_dropout", "use_rslora"),
    "sparse_delta": (
        "density",
        "selection",
        "reselection_steps",
        "selection_accumulation_steps",
        "reselection_rate",
        "reselection_schedule",
    ),
}
"""Settings that mean nothing to the other method, and must keep their defaults there."""
_AT_LEAST = {
    "r": 1,
    "seq_len": 2,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "steps": 1,
    "warmup_steps": 0,
    "save_every": 1,
    "sample_tokens": 0,
    "seed": 0,
    "reselection_steps": 1,
    "selection_accumulation_steps": 1,
}
# May differ between the two halves of a resumed run: they do not enter the arithmetic. The data are compared by
# content, not by path.
_FREE_ON_RESUME = ("data", "save_every", "sample_tokens", "prompt")


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run. Names are those of the options; `peft-kernels finetune --help` describes them."""

    model: str = "smollm2"
    data: str | None = None
    method: str = "lora"
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    density: float | None = None
    selection: str = "rigl"
    reselection_steps: int = 20
    selection_accumulation_steps: int = 5
    reselection_rate: float = 0.2
    reselection_schedule: str = "linear"
    target_modules: str = "all-linear"
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    seq_len: int = 256
    batch_size: int = 2
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    steps: int = 100
    lr: float = 2e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    compare: str = "none"
    seed: int = 0
    device: str = "auto"
    save_every: int = 50
    sample_tokens: int = 64
    prompt: str | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{option(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{option(name)} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "lora_alpha"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{option(name)} must be a positive number, got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{option(name)} must be at least 0, got {getattr(self, name)}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"--lora-dropout must be in [0, 1), got {self.lora_dropout}")
        if self.modules() == []:
            raise UserError("--target-modules must be all-linear or module names separated by commas, got nothing")
        self._check_method()

    def _check_method(self) -> None:
        """Raises UserError for settings that only another method has, or that a sparse delta cannot be made with."""
        for method, names in _OF_ONE_METHOD.items():
            for name in names:
                if method != self.method and getattr(self, name) != getattr(type(self), name):
                    raise UserError(f"{option(name)} belongs to --method {method}; this run has --method {self.method}")
        method = _METHOD_OF_COMPARISON.get(self.compare, self.method)
        if method != self.method:
            raise UserError(f"--compare {self.compare} goes with --method {method}; this run has {self.method}")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise UserError(f"--density must be in (0, 1], got {self.density}")
        if self.density is not None and self.compare == "shira":
            raise UserError("--compare shira: PEFT's SHiRA counts by rank, so give --r and leave --density out")
        if not 0.0 <= self.reselection_rate <= 1.0:
            raise UserError(f"--reselection-rate must be in [0, 1], got {self.reselection_rate}")
        if self.selection_accumulation_steps > self.reselection_steps:
            raise UserError(
                f"--selection-accumulation-steps must be at most --reselection-steps, {self.reselection_steps}, "
                f"got {self.selection_accumulation_steps}"
            )

    def modules(self) -> str | list[str]:
        """`target_modules` as the configurations take it: `"all-linear"`, or a list of names."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.gradient_accumulation * self.seq_len

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def option(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def _depends_on_steps(saved: Mapping[str, Any]) -> str | None:
    """What of a run would have gone otherwise with another number of steps; None when nothing."""
    if saved["lr_schedule"] != "constant":
        return f"--lr-schedule {saved['lr_schedule']}, whose learning rates"
    if saved["method"] == "sparse_delta" and saved["selection"] != "fixed":
        return f"--selection {saved['selection']}, whose reselection rates"
    return None


def resumed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """The settings of a resumed run: those of its first part, with what may change taken from `given`.

    Args:
        saved: the settings stored in the checkpoint.
        given: the settings that were named on the command line, by name.

    Raises:
        UserError: a given setting differs and would change the loss curve; the message names the option.
    """
    known = {field.name for field in dataclasses.fields(Settings)}
    if set(saved) != known:
        differing = ", ".join(option(name) for name in sorted(set(saved) ^ known))
        raise UserError(f"the checkpoint was written by another version of peft-kernels, which differs in {differing}")
    merged = dict(saved)
    for name, value in given.items():
        if value == saved[name]:
            continue
        if name == "steps":
            reason = _depends_on_steps(saved)
            if reason is not None:
                raise UserError(
                    f"--steps {value}: the run was started with --steps {saved['steps']} and {reason} depend on it; "
                    "--resume needs the same number"
                )
        elif name not in _FREE_ON_RESUME:
            raise UserError(
                f"{option(name)} {value}: the run was started with {option(name)} {saved[name]}; --resume continues "
                "it unchanged, so leave the option out or choose another --output"
            )
        merged[name] = value
    return Settings(**merged)
