"""The options of `peft-kernels finetune`, checked in one place, stored with every run and compared on resume."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import channels
from ..schedules.hft import EMBEDDINGS, NORMS
from . import method_options, token_options
from .errors import UserError
from .method_options import METHODS, SCHEDULES, option

CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "dtype": ("float32", "bfloat16"),
    "adapter_dtype": ("float32", "model"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "compare": ("none", "peft", "shira", "paca", "full", "dense"),
    "token_score": token_options.SCORES,
    "token_loss": ("computed", "all"),
    "reselection_schedule": ("linear", "cosine"),
    "dim": ("input", "output"),
    "budget": channels.BUDGETS,
    "norms": NORMS,
    "embeddings": EMBEDDINGS,
}
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
    "calibration_batches": 1,
    "interval": 1,
    "active_layers": 1,
    "token_block_size": 1,
    "token_select_every": 1,
    "token_keep_steps": 1,
}
# May differ between the two halves of a resumed run: they do not enter the arithmetic. The data are compared by
# content, not by path.
_FREE_ON_RESUME = ("data", "save_every", "sample_tokens", "prompt")


@dataclass(frozen=True)
class Settings:
    """One fine-tuning run. Names are those of the options; `peft-kernels finetune --help` describes them.

    Defaults are those of LoRA. `started` fills in what another method has as its own.
    """

    model: str = "smollm2"
    data: str | None = None
    method: str = "lora"
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    density: float | None = None
    selection: str | None = None
    reselection_steps: int = 20
    selection_accumulation_steps: int = 5
    reselection_rate: float = 0.2
    reselection_schedule: str = "linear"
    ratios: str | None = None
    ratio: float | None = None
    dim: str = "input"
    largest: bool = True
    budget: str = "global"
    co_permute: bool = False
    calibration_batches: int = 8
    interval: int | None = None
    active_layers: int = 2
    norms: str = "half"
    embeddings: str = "train"
    rho: float = 0.5
    target_modules: str = "all-linear"
    token_elimination: float | str | None = None
    token_tune: float | None = None
    token_score: str = "attention"
    token_block_size: int = 64
    token_select_every: int = 1
    token_layers: str | None = None
    token_loss: str = "computed"
    token_keep_steps: int | None = None
    chunked_loss: bool | None = None
    loss_ratio: float | None = None
    reference_model: str | None = None
    sampled_gradient: float | None = None
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
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{option(name)} must be at least {least}, got {value}")
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
        method_options.check(self)

    @property
    def selects_tokens(self) -> bool:
        """Whether decoder layers treat some tokens otherwise than the rest."""
        return self.token_elimination is not None or self.token_tune is not None

    @property
    def trains_whole_model(self) -> bool:
        """Whether the model's own parameters train, and a model is what a run leaves."""
        return self.method in SCHEDULES

    @property
    def compares_one_function(self) -> bool:
        """Whether both arms compute and train the same, so that their loss curves agree up to rounding."""
        if self.selects_tokens or self.loss_ratio is not None or self.sampled_gradient is not None:
            return False
        return self.compare in ("shira", "paca") or (self.method, self.compare) == ("lora", "peft")

    def token_layer_indices(self) -> list[int] | None:
        """The layers of `--token-layers` as the configurations take them, None for its default.

        Raises:
            UserError: it is not written so.
        """
        if self.token_layers is None:
            return None
        try:
            return [int(part) for part in self.token_layers.split(",")]
        except ValueError:
            raise UserError(
                f"--token-layers must be indices of layers separated by commas, got {self.token_layers!r}"
            ) from None

    def modules(self) -> str | list[str]:
        """`target_modules` as the configurations take it: `"all-linear"`, or a list of names."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.gradient_accumulation * self.seq_len

    def summary(self) -> str:
        """The method and what says most about it, in a few words."""
        sparse = f"density {self.density:g}" if self.density is not None else f"r = {self.r}"
        text = {
            "lora": f"r = {self.r}",
            "sparse_delta": sparse,
            "s2ft": self.ratios or f"{self.dim} channels, ratio {self.ratio}",
            "lisa": f"{self.active_layers} layers, every {self.interval} steps others",
            "hft": "one half of the matrices" if self.interval is None else f"every {self.interval} steps another half",
            "greentrainer": f"rho = {self.rho:g}, every {self.interval} steps",
        }
        learned = "" if self.loss_ratio is None else f", loss on {self.loss_ratio:g} of the tokens"
        share = self.sampled_gradient
        sampled = "" if share is None else f", gradients of A from {share:g} of the tokens"
        return f"{self.method}, {text[self.method]}{self._kept()}{learned}{sampled}"

    def _kept(self) -> str:
        asked = self.token_elimination
        if self.token_tune is not None:
            return f", gradients for {self.token_tune:g} of the tokens"
        if asked is None:
            return ""
        if isinstance(asked, str):
            return f", tokens kept as {asked} says"
        grows = "" if self.token_keep_steps is None else f" at first, all after {self.token_keep_steps} steps"
        return f", {asked:g} of the tokens kept{grows}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def started(given: Mapping[str, Any]) -> Settings:
    """The settings of a new run: those that were named on the command line, and the method's defaults."""
    return Settings(**method_options.filled_in(given, given.get("method", Settings.method)))


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
