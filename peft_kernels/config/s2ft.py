"""The configuration of structured-sparse fine-tuning: which heads and channels train, and how they are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..channels import BUDGETS, ROLES, SELECTIONS
from .base import AdapterConfig

DEFAULT_RATIOS = {"o": 0.05, "down": 0.03}


@dataclass
class S2FTConfig(AdapterConfig):
    """Slices of the linear layers of a model, whole heads of attention and channels of MLPs: of `nn.Linear`, and of
    transformers' `Conv1D`, whose channels are counted as if its weight were W `[N, K]` too.

    Two ways to say what trains. `ratios` goes by the parts that layers play in a transformer, found by structure:
    heads are chosen as a whole, and with `co_permute` together with their key-value head. `target_modules` with `ratio`
    takes single channels of any linear layers; with random input channels that is PaCA. With neither, `ratios` is
    {"o": 0.05, "down": 0.03}.

    Attributes:
        ratios: share of the heads or channels by role, in (0, 1]: "q", "k", "v", "o", "up", "gate", "down". Input
            channels of o and down train, output channels of the others. `target_modules` may narrow the layers.
        ratio: share of the channels of every layer in `target_modules`, in (0, 1].
        dim: with `ratio`, whether "input" or "output" channels train.
        selection: "random"; or by the norm of the "weight"; or, with `ratios`, of the "activation", of their product
            "weight_activation", or of the "gradient", over the batches that `inject` is given as `calibration`.
        largest: takes the largest norms; False the smallest, which did best for activations in the paper.
        seed: of a random selection; None takes that of `inject`.
        budget: "global" counts `ratios` over all layers together, so that a layer may get none; "per_layer" in each.
        co_permute: moves what trains together, in all coupled weights, so that slices are contiguous; the model
            computes the same function. Only with `ratios`. `eject` moves everything back; files hold the original
            channels.
        fuse_swiglu: where input channels of an MLP's last layer train and it computes `down(silu(gate(x)) * up(x))`,
            its activation writes these channels on the way (`nn.SwiGLUMLP`).
        target_modules, exclude_modules, bias, modules_to_save, layers_to_transform, layers_pattern, task_type,
            base_model_name_or_path, revision, inference_mode: as in `AdapterConfig`.

    Raises:
        ValueError, TypeError: a field's value is out of range, of a wrong type, or not supported.

    Source: Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS
    2024.
    """

    ratios: dict[str, float] | None = None
    ratio: float | None = None
    dim: Literal["input", "output"] = "input"
    selection: Literal["random", "weight", "activation", "weight_activation", "gradient"] = "random"
    largest: bool = True
    seed: int | None = None
    budget: Literal["global", "per_layer"] = "global"
    co_permute: bool = False
    fuse_swiglu: bool = True

    peft_types: ClassVar[tuple[str, ...]] = ("S2FT",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios is not None and self.ratio is not None:
            raise ValueError("give ratios or ratio, got both")
        if self.ratios is None and self.ratio is None:
            if self.target_modules is not None:
                raise ValueError("target_modules needs ratio, or ratios by role, got neither")
            self.ratios = dict(DEFAULT_RATIOS)
        if self.ratios is not None:
            if not isinstance(self.ratios, Mapping) or not self.ratios:
                raise ValueError(f"ratios must map roles to shares, got {self.ratios!r}")
            self.ratios = dict(self.ratios)
            for role, share in self.ratios.items():
                if role not in ROLES:
                    raise ValueError(f"ratios must have keys of {', '.join(ROLES)}, got {role!r}")
                _check_share(f"ratios[{role!r}]", share)
        else:
            _check_share("ratio", self.ratio)
        for name, choices in (("selection", SELECTIONS), ("budget", BUDGETS), ("dim", ("input", "output"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("largest", "co_permute", "fuse_swiglu"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0):
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if self.ratio is not None:
            if self.selection not in ("random", "weight"):
                raise ValueError(f'selection={self.selection!r} needs ratios; with ratio it is "random" or "weight"')
            if self.co_permute:
                raise ValueError("co_permute needs ratios, which say how layers are coupled")


def _check_share(name: str, share: Any) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share!r}")
