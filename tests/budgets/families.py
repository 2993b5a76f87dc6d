"""What each family of kernels promises, by name: the rules that `update` does not rewrite.

A kernel keeps the promises of every line whose pattern is its whole name; a CUDA kernel without a line is a fault.
Names are regular expressions, opcodes are shell patterns. Write the line before the kernel is tuned: it says what the
design is worth, budgets.json what the compiler makes of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .main_loop import tile_intensity

Figure = int | float | Callable[[re.Match[str]], float]
"""A figure, or how it follows from the name: `lambda name: tile_intensity(int(name["rows"]), 64)`."""


@dataclass(frozen=True)
class Family:
    """One line of the table.

    Attributes:
        name: a regular expression for the whole kernel name, template arguments included.
        architecture: a shell pattern.
        opcodes: instructions that the kernel must contain.
        promised: the least multiply-adds per byte loaded from shared memory in the main loop. `tile_intensity(WM, WN)`
            is that of a warp tile of WM x WN elements; loads beside those of fragments lower it.
        blocks: the least blocks at once on a multiprocessor.
        dynamic_shared: the most dynamic shared memory in bytes that a launch of this CUDA kernel asks for. The machine
            code does not say; kernels with `extern __shared__` memory need it here. (Triton tells.)
    """

    part: str
    name: str
    architecture: str = "*"
    opcodes: tuple[str, ...] = ()
    promised: Figure = 0
    blocks: int = 0
    dynamic_shared: Figure = 0


WIDE = ("LDG.*128*", "STG.*128*")
"""Global memory, 16 bytes a thread."""

TENSOR_CORES = ("HMMA.*", "LDSM.*.4", "LDGSTS.*128*")
"""Matrix instructions on fragments of four matrices a load, on tiles that reach shared memory without registers."""

_PRODUCTS = r"(shrink|matmul|factor_grad|grad_b|accumulate|slice_grad)_kernel of .*bf16.*"


def _int(name: re.Match[str], group: str) -> int:
    return int(name[group])


def _is_float(name: re.Match[str]) -> bool:
    return name["element"] == "float"


_BLOCK_SHAPE = r"BlockShape<(?P<element>\w+), (?P<m>\d+), (?P<n>\d+), (?P<warps_m>\d), (?P<warps_n>\d), (?P<stages>\d)>"


def _warp_tile_intensity(name: re.Match[str]) -> float:
    return tile_intensity(_int(name, "m") // _int(name, "warps_m"), _int(name, "n") // _int(name, "warps_n"))


FAMILIES = (
    Family("cuda", r"accumulate_kernel<.*>", opcodes=(*WIDE, "LDS.*128*", "STS.*128*", "FFMA*"), blocks=2),
    Family("cuda", r"dropout_mask_kernel", opcodes=("STG.*128*", "IMAD.*"), blocks=4),
    Family("cuda", r"partial_sums_kernel", blocks=4),
    # The dynamic shared memory is all stages of both tiles. A warp of the large product owns WM x WN of the result, one
    # of the skinny products 16 or 32 rows and the whole rank. Float makes three products of every fragment.
    Family(
        "cuda",
        rf"matmul_kernel<{_BLOCK_SHAPE}, .*>",
        opcodes=TENSOR_CORES,
        promised=_warp_tile_intensity,
        dynamic_shared=lambda name: _int(name, "stages") * (_int(name, "m") + _int(name, "n")) * 64 * 2,
    ),
    Family(
        "cuda",
        r"shrink_kernel<(?P<element>\w+), (?P<rank>\d+)>",
        opcodes=TENSOR_CORES,
        promised=lambda name: tile_intensity(16, _int(name, "rank")) * (1.5 if _is_float(name) else 1),
        dynamic_shared=lambda name: 4 * (64 + _int(name, "rank")) * 128,
    ),
    # Its loop is unrolled as a whole and holds the 16-byte read with which dropout touches up a tile that has arrived.
    Family(
        "cuda",
        r"factor_grad_kernel<(?P<element>\w+), (?P<rank>\d+)>",
        opcodes=TENSOR_CORES,
        promised=lambda name: (
            tile_intensity(16, _int(name, "rank")) * 1.5
            if _is_float(name)
            else 32 * _int(name, "rank") * 32 / ((32 + _int(name, "rank")) * 32 * 2 + 32 * 16)
        ),
        dynamic_shared=lambda name: 4 * 32 * (256 + _int(name, "rank") * (4 if _is_float(name) else 2)),
    ),
    # Sparse deltas: streams are read, and written where they are, 16 bytes at a time, by blocks enough to keep memory
    # busy.
    Family("cuda", r"scatter_kernel|sampled_dots_kernel<\w+>", opcodes=WIDE[:1], blocks=4),
    Family("cuda", r"sparse_adamw_kernel|sm3_step_kernel|transpose_slab_kernel<[\w ]+>", opcodes=WIDE, blocks=4),
    Family("cuda", r"(tile_starts|sm3_maxima|sorted_merge|sorted_contains|order_entries)_kernel", blocks=4),
    # Slices of channels: rows, and channels that are neighbors, 16 bytes at a time.
    Family("cuda", r"gather_columns_kernel<[\w ]+>|slice_(write|exchange|adamw)_kernel", opcodes=WIDE, blocks=4),
    Family("cuda", r"swiglu(_backward)?_kernel<\w+>", opcodes=WIDE, blocks=4),
    # Rows of kept tokens: every matrix 16 bytes at a time; a norm's row stays in registers, with room for 16 warps of
    # float in backward and 32 else. Losses have a block of 32 warps to themselves, so that rows are read again from L2.
    Family("cuda", r"(gather_rows|scatter_add_rows|add_rows|rms_norm_rows)_kernel<[\w ]+>", opcodes=WIDE, blocks=4),
    Family("cuda", r"rope_rows_kernel<\w+>", opcodes=WIDE, blocks=3),
    Family("cuda", r"gather_rms_norm(_backward)?_kernel<\w+, 4>", opcodes=WIDE, blocks=4),
    Family("cuda", r"gather_rms_norm_kernel<\w+, 16>", opcodes=WIDE, blocks=2),
    Family("cuda", r"gather_rms_norm_backward_kernel<\w+, 16>", opcodes=WIDE, blocks=1),
    Family("cuda", r"norm_weight_grad_kernel<\w+>", opcodes=WIDE[:1], blocks=8),
    Family("cuda", r"cross_entropy_rows_kernel<\w+>", opcodes=WIDE, blocks=1),
    Family("cuda", r"choose_blocks_kernel", opcodes=("ATOMS.*",), blocks=1),
    Family("cuda", r"(row_map|write_tokens)_kernel", blocks=4),
    Family(
        "cuda",
        r"block_scores_kernel<(?P<element>\w+)>",
        opcodes=TENSOR_CORES,
        promised=lambda name: tile_intensity(32, 32) * (1.5 if _is_float(name) else 1),
        dynamic_shared=3 * 2 * 64 * 128,
    ),
    # The count-th largest product: histograms by atomics, threads enough to keep the arithmetic busy.
    Family("cuda", r"product_histogram_kernel", opcodes=("ATOMS.*", "FMUL*"), blocks=4),
    Family("cuda", r"(check_factors|excluded_histogram|choose_digit)_kernel|select_products_kernel<.*>", blocks=4),
    # Fragments of float along outer are no ldmatrix, which transposes 16 bits only.
    Family("cuda", r"(sampled_tiles|product_above)_kernel<BlockShape<(BFloat16|Half), .*> ?>", opcodes=TENSOR_CORES),
    Family(
        "cuda",
        rf"(sampled_tiles|product_above)_kernel<{_BLOCK_SHAPE} ?>",
        opcodes=("HMMA.*", "LDGSTS.*128*"),
        promised=lambda name: _warp_tile_intensity(name) * (1.5 if _is_float(name) else 1),
        dynamic_shared=lambda name: _int(name, "stages") * (_int(name, "m") + _int(name, "n")) * 128,
    ),
    # 16-bit products run on the best tensor-core instruction that the architecture has.
    Family("triton", _PRODUCTS, "sm_80", opcodes=("HMMA.*",)),
    Family("triton", _PRODUCTS, "sm_90", opcodes=("HGMMA.*",)),
    Family("triton", _PRODUCTS, "sm_100", opcodes=("UTCHMMA*",)),
    # Rows of x are contiguous: 16 bytes at a time, straight into shared memory. Lost alignment hints show here first.
    Family("triton", r"(shrink|matmul|factor_grad|grad_b)_kernel of .*", opcodes=("LDGSTS*128*",)),
    # On Ampere the operand that is transposed goes through registers; the other one has rows of a few channels.
    Family("triton", r"slice_grad_kernel of .*", "sm_[!8]*", opcodes=("LDGSTS*128*",)),
)


def families_of(part: str, name: str, architecture: str) -> Iterator[tuple[Family, re.Match[str]]]:
    """The lines that hold for a kernel, with the groups of its name."""
    for family in FAMILIES:
        found = re.fullmatch(family.name, name)
        if found and family.part == part and fnmatchcase(architecture, family.architecture):
            yield family, found


def figure_of(value: Figure, name: re.Match[str]) -> float:
    """The figure itself."""
    return value(name) if callable(value) else value


def dynamic_shared(part: str, name: str, architecture: str) -> int:
    """What a launch asks for at most, of all lines."""
    lines = families_of(part, name, architecture)
    return int(max((figure_of(family.dynamic_shared, found) for family, found in lines), default=0))


def promised(part: str, name: str, architecture: str) -> float:
    """The highest intensity that any line promises, cut to the two digits that are measured."""
    lines = families_of(part, name, architecture)
    return math.floor(max((figure_of(family.promised, found) for family, found in lines), default=0) * 100) / 100
