"""Operators as functions; see each family's module for formulas and contracts."""

from . import deltas, recompute
from .cross_entropy import linear_cross_entropy
from .lora import lora_linear, lora_merged_weight
from .s2ft import check_channels, s2ft_linear
from .s2ft_swiglu import swiglu, swiglu_s2ft
from .sampled_linear import sampled_linear, sampled_lora_linear
from .selective_loss import select_excess_tokens, selective_cross_entropy
from .sparse_delta import check_indices, quantized_sparse_delta_linear, sparse_delta_linear
from .sparse_delta_parts import attach_delta, reordered
from .sparse_selection import (
    gradient_topk,
    outer_product_topk,
    sorted_contains,
    sorted_difference,
    sorted_intersection,
    sorted_merge,
    sorted_union,
)
from .token_elimination import gather_rows, rope_rows, scatter_add_rows, split_rms_norm
from .token_linear import gather_linear_scatter
from .token_selection import block_scores, flat_rows, kept_tokens, select_tokens
from .token_tune import merge_rows, selected_attention
from .wta_crs import RowSample, draw_rows, kept_rows, sampled_rows

__all__ = [
    "RowSample",
    "attach_delta",
    "block_scores",
    "check_channels",
    "check_indices",
    "deltas",
    "draw_rows",
    "flat_rows",
    "gather_linear_scatter",
    "gather_rows",
    "gradient_topk",
    "kept_rows",
    "kept_tokens",
    "linear_cross_entropy",
    "lora_linear",
    "lora_merged_weight",
    "merge_rows",
    "outer_product_topk",
    "quantized_sparse_delta_linear",
    "recompute",
    "reordered",
    "rope_rows",
    "s2ft_linear",
    "sampled_linear",
    "sampled_lora_linear",
    "sampled_rows",
    "scatter_add_rows",
    "select_excess_tokens",
    "select_tokens",
    "selected_attention",
    "selective_cross_entropy",
    "sorted_contains",
    "sorted_difference",
    "sorted_intersection",
    "sorted_merge",
    "sorted_union",
    "sparse_delta_linear",
    "split_rms_norm",
    "swiglu",
    "swiglu_s2ft",
]
