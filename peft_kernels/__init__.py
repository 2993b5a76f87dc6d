"""Fused kernels for adapter training: what LoRA adds to a frozen linear layer, at next to no cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import channels, deltas, elimination, nn, ops, optim, schedules, slices, wta_crs
from .adapter_io import load_adapter, save_adapter
from .backends import BackendUnavailable, backend_report, use_backend
from .config import LoraConfig, S2FTConfig, SparseDeltaConfig, TokenEliminationConfig, TokenTuneConfig, WTACRSConfig
from .heap import keep_freed_memory
from .inject import eject, inject, merge, unmerge
from .lottery_ticket import lottery_ticket_positions, rewind
from .ops import select_excess_tokens
from .reports import AccelerationReport, EliminationReport, InjectionReport, SamplingReport, TokenTuneReport
from .reselection import Reselector

if TYPE_CHECKING:
    from .integrations.causal_lm import causal_lm_loss, causal_lm_token_losses
    from .integrations.keep_schedule import KeepScheduleCallback
    from .integrations.peft import accelerate, restore
    from .integrations.schedules import GreenTrainerCallback, HFTCallback, LISACallback, ScheduleCallback
    from .integrations.selective_loss import rho_loss
    from .integrations.transformers import SparseDeltaCallback

__version__ = "0.1.0"
__all__ = [
    "AccelerationReport",
    "BackendUnavailable",
    "EliminationReport",
    "GreenTrainerCallback",
    "HFTCallback",
    "InjectionReport",
    "KeepScheduleCallback",
    "LISACallback",
    "LoraConfig",
    "Reselector",
    "S2FTConfig",
    "SamplingReport",
    "ScheduleCallback",
    "SparseDeltaCallback",
    "SparseDeltaConfig",
    "TokenEliminationConfig",
    "TokenTuneConfig",
    "TokenTuneReport",
    "WTACRSConfig",
    "accelerate",
    "backend_report",
    "causal_lm_loss",
    "causal_lm_token_losses",
    "channels",
    "deltas",
    "eject",
    "elimination",
    "inject",
    "keep_freed_memory",
    "load_adapter",
    "lottery_ticket_positions",
    "merge",
    "nn",
    "ops",
    "optim",
    "restore",
    "rewind",
    "rho_loss",
    "save_adapter",
    "schedules",
    "select_excess_tokens",
    "slices",
    "unmerge",
    "use_backend",
    "wta_crs",
]

_CAUSAL_LM_LOSSES = ("causal_lm_loss", "causal_lm_token_losses")
_FROM_PEFT = ("accelerate", "restore")
_SCHEDULE_CALLBACKS = ("GreenTrainerCallback", "HFTCallback", "LISACallback", "ScheduleCallback")


def __getattr__(name: str) -> Any:
    # These need PEFT, which imports transformers: only whoever asks for them pays for that.
    if name in _FROM_PEFT:
        from .integrations import peft

        return getattr(peft, name)
    if name == "SparseDeltaCallback":
        from .integrations.transformers import SparseDeltaCallback

        return SparseDeltaCallback
    if name == "KeepScheduleCallback":
        from .integrations.keep_schedule import KeepScheduleCallback

        return KeepScheduleCallback
    if name in _SCHEDULE_CALLBACKS:
        from .integrations import schedules as schedule_callbacks

        return getattr(schedule_callbacks, name)
    if name in _CAUSAL_LM_LOSSES:
        from .integrations import causal_lm

        return getattr(causal_lm, name)
    if name == "rho_loss":
        from .integrations.selective_loss import rho_loss

        return rho_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
