"""Fused kernels for adapter training: what LoRA adds to a frozen linear layer, at next to no cost."""

from . import nn, ops
from .backends import BackendUnavailable, backend_report, use_backend

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "backend_report", "nn", "ops", "use_backend"]
