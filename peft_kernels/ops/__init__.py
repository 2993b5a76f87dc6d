"""Operators as functions; see each family's module for formulas and contracts."""

from .lora import lora_linear, lora_merged_weight

__all__ = ["lora_linear", "lora_merged_weight"]
