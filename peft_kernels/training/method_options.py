"""The methods of `peft-kernels finetune`: whose option is whose, its default there, and which ones go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .. import channels
from ..config.s2ft import DEFAULT_RATIOS
from . import token_options
from .errors import UserError

if TYPE_CHECKING:
    from .settings import Settings

ADAPTERS = ("lora", "sparse_delta", "s2ft")
SCHEDULES = ("lisa", "hft", "greentrainer")
"""Methods that train the model's own parameters, and leave a model instead of an adapter."""
METHODS = (*ADAPTERS, *SCHEDULES)

SELECTIONS: dict[str, tuple[str, ...]] = {
    "sparse_delta": ("rigl", "sm3", "random", "magnitude", "fixed"),
    "s2ft": channels.SELECTIONS,
}
_BY_CALIBRATION = ("activation", "weight_activation", "gradient")

METHODS_OF: dict[str, tuple[str, ...]] = {
    "r": ("lora", "sparse_delta"),
    "lora_alpha": ("lora",),
    "lora_dropout": ("lora",),
    "use_rslora": ("lora",),
    "density": ("sparse_delta",),
    "reselection_steps": ("sparse_delta",),
    "selection_accumulation_steps": ("sparse_delta",),
    "reselection_rate": ("sparse_delta",),
    "reselection_schedule": ("sparse_delta",),
    "selection": ("sparse_delta", "s2ft"),
    "ratios": ("s2ft",),
    "ratio": ("s2ft",),
    "dim": ("s2ft",),
    "largest": ("s2ft",),
    "budget": ("s2ft",),
    "co_permute": ("s2ft",),
    "calibration_batches": ("s2ft",),
    "interval": SCHEDULES,
    "active_layers": ("lisa",),
    "norms": ("hft",),
    "embeddings": ("hft",),
    "rho": ("greentrainer",),
    "adapter_dtype": ADAPTERS,
    "target_modules": ADAPTERS,
    "token_elimination": ADAPTERS,
    "token_tune": ADAPTERS,
    "token_score": ADAPTERS,
    "token_block_size": ADAPTERS,
    "token_select_every": ADAPTERS,
    "token_layers": ADAPTERS,
    "token_loss": ADAPTERS,
    "token_keep_steps": ADAPTERS,
    "chunked_loss": ADAPTERS,
    "loss_ratio": ADAPTERS,
    "reference_model": ADAPTERS,
    "sampled_gradient": ("lora",),
}
"""Options that mean nothing to other methods, and must keep their defaults there."""

_METHODS_OF_COMPARISON = {
    "peft": ("lora", "s2ft"),
    "shira": ("sparse_delta",),
    "paca": ("s2ft",),
    "dense": ADAPTERS,
}

# Most steps of AdamW are too small for a bfloat16 weight, which has no float32 slice or factor beside it; and a rate
# that suits an adapter is too large for a whole model.
_WHOLE_MODEL = {"dtype": "float32", "lr": 2e-5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sparse_delta": {"selection": "rigl"},
    "s2ft": {"selection": "random", "ratios": ",".join(f"{role}={share}" for role, share in DEFAULT_RATIOS.items())},
    "lisa": {"interval": 20, **_WHOLE_MODEL},
    "hft": _WHOLE_MODEL,
    "greentrainer": {"interval": 100, **_WHOLE_MODEL},
}
"""By method, the defaults that are not those of `Settings`."""


def option(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def filled_in(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What the user named, and the method's own defaults for the rest."""
    defaults = dict(DEFAULTS.get(method, {}))
    if given.get("ratio") is not None:
        defaults.pop("ratios", None)  # one says what the other says
    if given.get("token_tune") is not None:
        defaults["token_score"] = "random"
    return {**defaults, **given}


def parse_ratios(text: str) -> dict[str, float]:
    """`"o=0.05,down=0.03"` as shares by role.

    Raises:
        UserError: it is not written so, a role is unknown or named twice, or a share is not in (0, 1].
    """
    shares: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        role, _, number = (piece.strip() for piece in part.partition("="))
        try:
            share = float(number)
        except ValueError:
            raise UserError(f"--ratios must be like o=0.05,down=0.03, got {part!r} in it") from None
        if role not in channels.ROLES:
            raise UserError(f"--ratios must name roles of {', '.join(channels.ROLES)}, got {role!r}")
        if role in shares:
            raise UserError(f"--ratios must name each role once, got {role} twice")
        if not 0.0 < share <= 1.0:
            raise UserError(f"--ratios must give shares in (0, 1], got {part}")
        shares[role] = share
    if not shares:
        raise UserError(f"--ratios must be like o=0.05,down=0.03, got {text!r}")
    return shares


def check(settings: Settings) -> None:
    """Raises UserError for options of another method, or options of this one that do not go together."""
    method = settings.method
    uses = {method, "lora"} if (method, settings.compare) == ("s2ft", "peft") else {method}
    for name, methods in METHODS_OF.items():
        if uses.isdisjoint(methods) and getattr(settings, name) != getattr(type(settings), name):
            raise UserError(
                f"{option(name)} belongs to --method {_either(methods)}; this run has --method {settings.method}"
            )
    methods = _METHODS_OF_COMPARISON.get(settings.compare, METHODS)
    if method not in methods:
        raise UserError(f"--compare {settings.compare} goes with --method {_either(methods)}; this run has {method}")
    token_options.check(settings)
    _check_loss_ratio(settings)
    sampled = settings.sampled_gradient
    if sampled is not None and not 0.0 < sampled <= 1.0:
        raise UserError(f"--sampled-gradient must be in (0, 1], got {sampled}")
    if settings.compare == "dense" and not settings.selects_tokens and settings.loss_ratio is None and sampled is None:
        raise UserError(
            "--compare dense needs --token-elimination, --token-tune, --loss-ratio or --sampled-gradient; without them "
            "the run is dense itself"
        )
    selections = SELECTIONS.get(method)
    if selections is not None and settings.selection not in selections:
        raise UserError(
            f"--selection must be one of {', '.join(selections)} with --method {method}, got {settings.selection!r}"
        )
    if method == "sparse_delta":
        _check_sparse_delta(settings)
    elif method == "s2ft":
        _check_s2ft(settings)
    elif method == "greentrainer" and not 0.0 < settings.rho <= 1.0:
        raise UserError(f"--rho must be in (0, 1], got {settings.rho}")


def _either(methods: Collection[str]) -> str:
    *others, last = methods
    return f"{', '.join(others)} or {last}" if others else last


def _check_loss_ratio(settings: Settings) -> None:
    ratio = settings.loss_ratio
    if ratio is None:
        if settings.reference_model is not None:
            raise UserError("--reference-model needs --loss-ratio, which says of how many tokens the loss is taken")
        return
    if not 0.0 < ratio <= 1.0:
        raise UserError(f"--loss-ratio must be in (0, 1], got {ratio}")
    if settings.reference_model is None:
        raise UserError(
            "--loss-ratio needs --reference-model, one that has learned what is to be learned; beside the base model "
            "itself the tokens that gained least in training would be selected"
        )
    if settings.chunked_loss is False:
        raise UserError("--loss-ratio forms the loss without all logits; leave --no-chunked-loss out")


def _check_sparse_delta(settings: Settings) -> None:
    if settings.density is not None and not 0.0 < settings.density <= 1.0:
        raise UserError(f"--density must be in (0, 1], got {settings.density}")
    if settings.density is not None and settings.compare == "shira":
        raise UserError("--compare shira: PEFT's SHiRA counts by rank, so give --r and leave --density out")
    if not 0.0 <= settings.reselection_rate <= 1.0:
        raise UserError(f"--reselection-rate must be in [0, 1], got {settings.reselection_rate}")
    if settings.selection_accumulation_steps > settings.reselection_steps:
        raise UserError(
            f"--selection-accumulation-steps must be at most --reselection-steps, {settings.reselection_steps}, "
            f"got {settings.selection_accumulation_steps}"
        )


def _check_s2ft(settings: Settings) -> None:
    by_role = settings.ratio is None
    if by_role == (settings.ratios is None):
        raise UserError("--ratios gives shares by role and --ratio one share of every layer; give one of them")
    if settings.ratios is not None:
        parse_ratios(settings.ratios)
        if settings.dim != type(settings).dim:
            raise UserError(f"--dim {settings.dim} needs --ratio; with --ratios the role says which channels train")
    else:
        assert settings.ratio is not None
        if not 0.0 < settings.ratio <= 1.0:
            raise UserError(f"--ratio must be in (0, 1], got {settings.ratio}")
        if settings.selection in _BY_CALIBRATION:
            raise UserError(f"--selection {settings.selection} needs --ratios; with --ratio it is random or weight")
        for name in ("co_permute", "budget"):
            if getattr(settings, name) != getattr(type(settings), name):
                raise UserError(f"{option(name)} needs --ratios, which say what each layer is")
    if settings.selection == "random" and not settings.largest:
        raise UserError("--smallest needs a --selection by a norm, got random")
    if settings.calibration_batches != type(settings).calibration_batches and settings.selection not in _BY_CALIBRATION:
        raise UserError(f"--calibration-batches needs --selection {_either(_BY_CALIBRATION)}, got {settings.selection}")
