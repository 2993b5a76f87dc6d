"""The tables of token elimination, each a function of one section of a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import token_arms, token_elimination
from .results import Section
from .tables import NOT_MEASURED, PEAKS, Row, arm_names, cell, markdown, megabytes, model_label, ratio_of, unreached


def _label(case: dict[str, Any]) -> Row:
    kept = f"keep {case['keep']:g}" if case["keep"] < 1 else ""
    return [case["operation"], token_elimination.shape_of(case), kept, case["dtype"]]


def operations(section: Section) -> str:
    """One operation of token elimination, beside plain PyTorch; times in microseconds, peaks of memory in MB."""
    header = [
        *("operation", "sizes", "tokens", "dtype", "ours, us", "compared with", "us"),
        *("ours relative to it", "ours: times faster", "limit: times faster", "peak MB: ours / other"),
    ]

    def faster(base: str) -> Callable[[dict[str, Any]], str]:
        def text(arm: dict[str, Any]) -> str:
            ratio = arm.get("relative_to", {}).get(base)
            return NOT_MEASURED if ratio is None else f"{1.0 / ratio['median_of_ratios']:.2f}"

        return text

    rows = []
    for record in section["train_info"]["cases"]:
        times = record.get("limits", {}).get("times_faster", {})
        for base in token_elimination.BASES[record["case"]["operation"]]:
            ours = token_elimination.FORMS.get(base, token_elimination.OURS)
            peaks = [record.get("arms", {}).get(name, {}).get("peak_bytes") for name in (ours, base)]
            operation, *sizes = _label(record["case"])
            rows.append(
                [
                    f"{operation}{ours.removeprefix(token_elimination.OURS)}",
                    *sizes,
                    cell(record, ours, _microseconds),
                    base,
                    cell(record, base, _microseconds),
                    cell(record, ours, lambda arm, base=base: ratio_of(arm, base)),  # type: ignore[misc]
                    cell(record, ours, faster(base)),
                    f"{times[base]:.2f}" if base in times else "",
                    "" if None in peaks else " / ".join(megabytes(peak) for peak in peaks),
                ]
            )
    return markdown(header, [*rows, *unreached(section, _label, len(header) - 4)])


def _microseconds(arm: dict[str, Any]) -> str:
    return f"{arm['median_s'] * 1e6:.0f}"


def model_time(section: Section) -> str:
    """Time per training step, relative to dense LoRA's; what plain PyTorch takes relative to ours, too."""
    base, ours = token_arms.DENSE, token_arms.BY_NORM
    names = arm_names(section, leave_out=base)
    plain = [name for name in names if name in token_arms.PLAIN_ARMS]
    header = [
        *("model", "adapter", "dtype", f"{base}, s per step", *names),
        *(f"{name}, relative to ours" for name in plain),
        "limit: ideal",
    ]
    rows = []
    for record in section["train_info"]["cases"]:
        limits = record.get("limits")
        rows.append(
            [
                *model_label(record["case"]),
                cell(record, base, lambda arm: f"{arm['median_s']:.3f}"),
                *[cell(record, name, lambda arm: ratio_of(arm, base)) for name in names],
                *[cell(record, name, lambda arm: ratio_of(arm, ours)) for name in plain],
                f"{limits['ideal_ratio']:.3f}" if limits else NOT_MEASURED,
            ]
        )
    return markdown(header, [*rows, *unreached(section, model_label, len(header) - 3)])


def _model_bytes(section: Section, unit: str, block: str, keys: Sequence[str]) -> str:
    """`keys` of `block` of each arm, and what share of dense LoRA's they are."""
    base = token_arms.DENSE
    names = arm_names(section, leave_out=base)
    header = ["model", "adapter", "dtype", f"{base}, {unit}", *names]

    def listed(dense: dict[str, Any]) -> Callable[[dict[str, Any]], str]:
        def text(arm: dict[str, Any]) -> str:
            taken = arm.get(block, {})
            found = [key for key in keys if key in taken]
            if not found:
                return str(taken.get("status", NOT_MEASURED))
            shares = [taken[key] / dense[key] for key in found if arm.get(block) is not dense and key in dense]
            values = " / ".join(megabytes(taken[key]) for key in found)
            return values + (f" ({' / '.join(f'{share:.3f}' for share in shares)})" if shares else "")

        return text

    rows = [
        [
            *model_label(record["case"]),
            *[
                cell(record, name, listed(record.get("arms", {}).get(base, {}).get(block, {})))
                for name in (base, *names)
            ],
        ]
        for record in section["train_info"]["cases"]
    ]
    return markdown(header, [*rows, *unreached(section, model_label, len(header) - 3)])


def model_memory(section: Section) -> str:
    """MB at the peak of a training step: resident memory (CPU) / tensors, and as a share of dense LoRA's."""
    return _model_bytes(section, "peak MB", "memory", PEAKS)


def model_saved(section: Section) -> str:
    """MB that forward keeps for backward: to the loss / to the last hidden state; as a share of dense LoRA's."""
    return _model_bytes(section, "MB", "saved", ("bytes", "decoder_bytes"))
