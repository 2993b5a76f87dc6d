"""The tables of the documentation, each a function of one section of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import delta_arms, lora, model, model_arms, peers, s2ft, s2ft_arms, sparse_delta
from .results import Section

NOT_MEASURED = "not measured"
PEAKS = ("resident_bytes", "tensor_bytes")
Row = list[str]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def ratio_of(summary: dict[str, Any], base: str) -> str:
    """Median of the per-round ratios and its quartiles."""
    ratio = summary.get("relative_to", {}).get(base)
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio['median_of_ratios']:.3f} ({ratio['q1']:.3f}-{ratio['q3']:.3f})"


def _speed_up(summary: dict[str, Any]) -> str:
    """How many times faster than PEFT."""
    ratio = summary.get("relative_to", {}).get(peers.PEFT)
    return NOT_MEASURED if ratio is None else f"{1.0 / ratio['median_of_ratios']:.2f}"


def arm_names(section: Section, leave_out: str | None = None) -> list[str]:
    """Every arm of the section, in the order of `peers`."""
    names = {name for record in section["train_info"]["cases"] for name in record.get("arms", {})}
    return sorted(names - {leave_out}, key=peers.position)


def cell(record: dict[str, Any], name: str, value: Callable[[dict[str, Any]], str]) -> str:
    """`value` of an arm, or in a word why there is none."""
    arm = record.get("arms", {}).get(name)
    if arm is None:
        return NOT_MEASURED if record.get("status") == "failed" else ""
    return value(arm) if arm.get("status", "measured") == "measured" else str(arm["status"])


def megabytes(value: float | None) -> str:
    """MB with a decimal, or why there are none."""
    return NOT_MEASURED if value is None else f"{value / 1e6:.1f}"


def _layer_label(case: dict[str, Any]) -> Row:
    return [f"{case['K']} to {case['N']}, M={case['M']}, r={case['r']}", case["dtype"], str(case["dropout_p"])]


def unreached(section: Section, label: Callable[[dict[str, Any]], Row], columns: int) -> list[Row]:
    """Lines of the cases for which no time was left."""
    return [[*label(case), *[NOT_MEASURED] * columns] for case in section["train_info"]["not_reached"]]


def _layer_times(section: Section, mode: str) -> str:
    names = arm_names(section, leave_out=peers.FROZEN)
    header = [
        *("layer", "dtype", "dropout", f"{peers.FROZEN}, ms", *names),
        *("limit: ideal", "limit: split", "ours: times faster than PEFT"),
    ]
    rows = []
    for record in section["train_info"]["cases"]:
        limits = record.get("limits", {}).get(mode)
        rows.append(
            [
                *_layer_label(record["case"]),
                cell(record, peers.FROZEN, lambda arm: f"{arm[mode]['median_s'] * 1e3:.3f}"),
                *[cell(record, name, lambda arm: ratio_of(arm[mode], peers.FROZEN)) for name in names],
                *([f"{limits[key]:.3f}" for key in ("ideal_ratio", "split_ratio")] if limits else [NOT_MEASURED] * 2),
                cell(record, peers.OURS, lambda arm: _speed_up(arm[mode])),
            ]
        )
    return markdown(header, [*rows, *unreached(section, _layer_label, len(header) - 3)])


def layer_forward(section: Section) -> str:
    """Forward of one layer, relative to the frozen linear."""
    return _layer_times(section, lora.FORWARD)


def layer_forward_backward(section: Section) -> str:
    """Forward + backward of one layer, relative to the frozen linear's forward + dx."""
    return _layer_times(section, lora.FORWARD_BACKWARD)


def layer_memory(section: Section) -> str:
    """MB saved for backward (x included where it is kept) / MB at the peak of one forward + backward."""
    names = [name for name in arm_names(section) if "[" not in name]
    header = ["layer", "dtype", "dropout", "limit: x + hidden", *names]
    rows = []
    for record in section["train_info"]["cases"]:

        def bytes_of(arm: dict[str, Any]) -> str:
            return f"{megabytes(arm['saved_bytes'])} / {megabytes(arm['peak_bytes'])}"

        limit = megabytes(record.get("limits", {}).get("saved_bytes"))
        rows.append([*_layer_label(record["case"]), limit, *[cell(record, name, bytes_of) for name in names]])
    return markdown(header, [*rows, *unreached(section, _layer_label, len(header) - 3)])


def model_label(case: dict[str, Any]) -> Row:
    """The first columns of a model's case."""
    size = f"{case['batch_size']} x {case['sequence_length']}"
    return [f"{case['model']}, {size}", model.adapter_of(case), case["dtype"]]


def _model_times(section: Section, base: str, limit: bool) -> str:
    names = arm_names(section, leave_out=base)
    header = ["model", "adapter", "dtype", f"{base}, s per step", *names, *(["limit: ideal"] if limit else [])]
    rows = []
    for record in section["train_info"]["cases"]:
        limits = record.get("limits")
        row = [
            *model_label(record["case"]),
            cell(record, base, lambda arm: f"{arm['median_s']:.3f}"),
            *[cell(record, name, lambda arm: ratio_of(arm, base)) for name in names],
        ]
        rows.append([*row, f"{limits['ideal_ratio']:.3f}" if limits else NOT_MEASURED] if limit else row)
    return markdown(header, [*rows, *unreached(section, model_label, len(header) - 3)])


def model_time(section: Section) -> str:
    """Time per training step, relative to the frozen model."""
    return _model_times(section, model_arms.FROZEN, limit=True)


def model_time_to_lora(section: Section) -> str:
    """Time per training step, relative to PEFT LoRA's."""
    return _model_times(section, s2ft_arms.LORA, limit=False)


def model_memory(section: Section) -> str:
    """MB that an adapter adds to the frozen model's peak: resident memory (CPU) / tensors, and as a share of PEFT's."""
    names = arm_names(section, leave_out=model_arms.FROZEN)
    header = ["model", "adapter", "dtype", f"{model_arms.FROZEN}, peak MB", *names]

    def peak(arm: dict[str, Any]) -> str:
        taken = arm.get("memory", {})
        if "tensor_bytes" not in taken:
            return str(taken.get("status", NOT_MEASURED))
        return " / ".join(megabytes(taken[key]) for key in PEAKS if key in taken)

    def added(arm: dict[str, Any]) -> str:
        taken = arm.get("memory", {})
        more = taken.get("added")
        if more is None:
            return str(taken.get("status", NOT_MEASURED))
        text = " / ".join(f"{more[key] / 1e6:+.1f}" for key in PEAKS if key in more)
        shares = more.get("relative_to_peft")
        if shares is None:
            return text
        listed = " / ".join("-" if value is None else f"{value:.2f}" for value in shares.values())
        return f"{text} ({listed} of PEFT's)"

    rows = [
        [
            *model_label(record["case"]),
            cell(record, model_arms.FROZEN, peak),
            *[cell(record, name, added) for name in names],
        ]
        for record in section["train_info"]["cases"]
    ]
    return markdown(header, [*rows, *unreached(section, model_label, len(header) - 3)])


def model_saved(section: Section) -> str:
    """MB that forward keeps for backward: to the loss / to the last hidden state; relative to the frozen model."""
    names = arm_names(section, leave_out=model_arms.FROZEN)
    header = ["model", "adapter", "dtype", f"{model_arms.FROZEN}, MB", *names]
    keys = ("bytes", "decoder_bytes")

    def kept(arm: dict[str, Any]) -> str:
        saved = arm.get("saved")
        if saved is None:
            return NOT_MEASURED
        text = " / ".join(megabytes(saved[key]) for key in keys)
        shares = saved.get("relative_to_frozen")
        return text if shares is None else f"{text} ({' / '.join(f'{shares[key]:.3f}' for key in keys)})"

    rows = [
        [*model_label(record["case"]), *[cell(record, name, kept) for name in (model_arms.FROZEN, *names)]]
        for record in section["train_info"]["cases"]
    ]
    return markdown(header, [*rows, *unreached(section, model_label, len(header) - 3)])


def _s2ft_label(case: dict[str, Any]) -> Row:
    return [case["operation"], s2ft.shape_of(case), f"{case['ratio']:.0%} of {case['dim']}", case["dtype"]]


def s2ft_operations(section: Section) -> str:
    """One operation on slices of channels, beside the way without it; times in microseconds."""
    header = [
        *("operation", "layer", "channels", "dtype", "ours, us", "compared with", "us"),
        *("ours relative to it", "ours: times faster", "limit: times faster"),
    ]
    rows = []
    for record in section["train_info"]["cases"]:
        ours = cell(record, s2ft.OURS, lambda arm: f"{arm['median_s'] * 1e6:.0f}")
        limits = record.get("limits", {}).get("times_faster", {})
        arms = record.get("arms", {})
        case = record["case"]
        compared = s2ft.bases(case["operation"], case["dim"], case.get("r"))
        bases = [base for base in compared if base in arms or len(arms) < 2]
        for base in bases:

            def faster(arm: dict[str, Any], base: str = base) -> str:
                ratio = arm.get("relative_to", {}).get(base)
                return NOT_MEASURED if ratio is None else f"{1.0 / ratio['median_of_ratios']:.2f}"

            time = cell(record, base, lambda arm: f"{arm['median_s'] * 1e6:.0f}")
            ratio = cell(record, s2ft.OURS, lambda arm, base=base: ratio_of(arm, base))  # type: ignore[misc]
            limit = f"{limits[base]:.2f}" if base in limits else ""
            factor = cell(record, s2ft.OURS, faster)
            rows.append([*_s2ft_label(record["case"]), ours, base, time, ratio, factor, limit])
    return markdown(header, [*rows, *unreached(section, _s2ft_label, len(header) - 4)])


def _sparse_label(case: dict[str, Any]) -> Row:
    size = f"{case['K']} to {case['N']}, M={case['M']}"
    return [case["operation"], size, f"{case['density']:.1%}", case["dtype"]]


def sparse_operations(section: Section) -> str:
    """One operation on a sparse delta, beside the way without it; times in microseconds."""
    header = ["operation", "layer", "density", "dtype", "ours, us", "compared with", "us", "ours relative to it"]
    rows = []
    for record in section["train_info"]["cases"]:
        ours = cell(record, sparse_delta.OURS, lambda arm: f"{arm['median_s'] * 1e6:.0f}")
        for base in sparse_delta.BASES[record["case"]["operation"]]:
            time = cell(record, base, lambda arm: f"{arm['median_s'] * 1e6:.0f}")
            ratio = cell(record, sparse_delta.OURS, lambda arm, base=base: ratio_of(arm, base))  # type: ignore[misc]
            rows.append([*_sparse_label(record["case"]), ours, base, time, ratio])
    return markdown(header, [*rows, *unreached(section, _sparse_label, len(header) - 4)])


def _call_label(case: dict[str, Any]) -> Row:
    return [f"{case['K']} to {case['N']}, M={case['M']}, r={case['r']}", str(case["dropout_p"])]


def call_overhead(section: Section) -> str:
    """Microseconds per forward + backward of one tiny layer."""
    names = arm_names(section)
    header = ["layer", "dropout", *[f"{name}, us" for name in names], "ours relative to PEFT"]
    rows = []
    for record in section["train_info"]["cases"]:
        times = [cell(record, name, lambda arm: f"{arm['median_s'] * 1e6:.1f}") for name in names]
        ours = cell(record, peers.OURS, lambda arm: ratio_of(arm, peers.PEFT))
        rows.append([*_call_label(record["case"]), *times, ours])
    return markdown(header, [*rows, *unreached(section, _call_label, len(header) - 2)])


def _delta_label(case: dict[str, Any]) -> Row:
    return [f"{case['method']}, two deltas of {case['model']}", case["dtype"], f"{case['density']:.0%}"]


def delta_algebra(section: Section) -> str:
    """Two deltas merged, from files to a file: seconds and MB at the peak, relative to the dense way with sorts."""
    ours, dense = delta_arms.OURS, delta_arms.DENSE
    header = [
        *("method", "dtype", "density", f"{dense}, s", f"{ours}, s", "times faster"),
        *(f"{dense}, peak MB", f"{ours}, peak MB", "share of the peak"),
    ]

    def peak(arm: dict[str, Any]) -> str:
        return megabytes(arm.get("memory", {}).get("resident_bytes"))

    def share(arm: dict[str, Any]) -> str:
        part = arm.get("memory", {}).get("share_of_dense")
        return NOT_MEASURED if part is None else f"{part:.3f}"

    def faster(arm: dict[str, Any]) -> str:
        ratio = arm.get("relative_to", {}).get(dense)
        return NOT_MEASURED if ratio is None else f"{1.0 / ratio['median_of_ratios']:.1f}"

    rows = [
        [
            *_delta_label(record["case"]),
            *[cell(record, name, lambda arm: f"{arm['median_s']:.2f}") for name in (dense, ours)],
            cell(record, ours, faster),
            *[cell(record, name, peak) for name in (dense, ours)],
            cell(record, ours, share),
        ]
        for record in section["train_info"]["cases"]
    ]
    return markdown(header, [*rows, *unreached(section, _delta_label, len(header) - 3)])


def remarks(section: Section) -> list[str]:
    """One line per distinct reason for which an arm or a case has no figure."""
    found: dict[str, None] = {}
    for record in section["train_info"]["cases"]:
        if record.get("status") == "failed":
            found[f"{record['case']}: {record['reason']}"] = None
        for name, arm in record.get("arms", {}).items():
            for part in (arm, arm.get("memory", {})):
                if part.get("status", "measured") != "measured":
                    found[f"{name}: {part['status']}: {part['reason']}"] = None
    return list(found)
