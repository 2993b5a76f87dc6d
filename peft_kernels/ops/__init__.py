"""Operators as functions; see each family's module for formulas and contracts."""

from . import sparse_delta
from .lora import lora_linear, lora_merged_weight

__all__ = ["lora_linear", "lora_merged_weight", "sparse_delta"]
