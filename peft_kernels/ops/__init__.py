"""Operators as functions; see each family's module for formulas and contracts."""

from .lora import lora_linear, lora_merged_weight
from .sparse_delta import check_indices, quantized_sparse_delta_linear, sparse_delta_linear

__all__ = ["check_indices", "lora_linear", "lora_merged_weight", "quantized_sparse_delta_linear", "sparse_delta_linear"]
