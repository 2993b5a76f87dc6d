"""Tables from result files, and the documents that hold them.

`python -m benchmarks report` prints every table; `--update FILE` rewrites the text between

    <!-- benchmarks:begin NAME -->
    <!-- benchmarks:end NAME -->

in FILE; `--check FILE` fails when that would change it. NAME is a key of `TABLES`. So a figure in a document is always
one of a committed result file, and what was not measured reads "not measured".
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import results, tables, token_tables
from .results import Section

_BLOCK = re.compile(
    r"(?P<begin><!-- benchmarks:begin (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- benchmarks:end (?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- benchmarks:(?:begin|end)\b")


@dataclass(frozen=True)
class Table:
    """A named table: which section of which suite it reads, and how it is rendered."""

    suite: str
    section: str
    render: Callable[[Section], str]


_KINDS: dict[str, tuple[str, Callable[[Section], str]]] = {
    "lora-forward": ("lora_layer", tables.layer_forward),
    "lora-forward-backward": ("lora_layer", tables.layer_forward_backward),
    "lora-memory": ("lora_layer", tables.layer_memory),
    "model-time": ("lora_model", tables.model_time),
    "model-memory": ("lora_model", tables.model_memory),
    "sparse-operations": ("sparse_delta", tables.sparse_operations),
    "sparse-model-time": ("sparse_delta_model", tables.model_time),
    "sparse-model-memory": ("sparse_delta_model", tables.model_memory),
    "model-saved": ("lora_model", tables.model_saved),
    "sparse-model-saved": ("sparse_delta_model", tables.model_saved),
    "s2ft-operations": ("s2ft", tables.s2ft_operations),
    "s2ft-model-time": ("s2ft_model", tables.model_time),
    "s2ft-model-time-to-lora": ("s2ft_model", tables.model_time_to_lora),
    "s2ft-model-saved": ("s2ft_model", tables.model_saved),
    "s2ft-model-memory": ("s2ft_model", tables.model_memory),
    "token-operations": ("token_elimination", token_tables.operations),
    "token-model-time": ("token_elimination_model", token_tables.model_time),
    "token-model-memory": ("token_elimination_model", token_tables.model_memory),
    "token-model-saved": ("token_elimination_model", token_tables.model_saved),
    "call-overhead": ("call_overhead", tables.call_overhead),
    "delta-algebra": ("delta_algebra", tables.delta_algebra),
}
TABLES = {
    f"{kind}-{suite}": Table(suite, section, render)
    for suite in ("cpu", "gpu")
    for kind, (section, render) in _KINDS.items()
}


class ReportError(ValueError):
    """A document's markers are off; the message says which and how."""


def origin(device_slug: str, section: Section) -> str:
    """One line above a table: device, versions, threads, commit, date."""
    system, packages = section["meta_info"]["system_info"], section["meta_info"]["package_info"]
    run = section["run_info"]
    device = system["gpu"]["name"] if "gpu" in system else f"{system['cpu']}, {system['threads']} threads"
    commit = (run["commit"] or "unknown")[:12] + (" with uncommitted changes" if run["dirty"] else "")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "peft") if packages.get(name))
    return f"{device}; {versions}; commit {commit}; {run['created_at'][:10]} (`{device_slug}`)"


def _block(device_slug: str, section: Section, render: Callable[[Section], str]) -> str:
    lines = [origin(device_slug, section), "", render(section)]
    notes = tables.remarks(section)
    if notes:
        lines += ["", *[f"- {note}" for note in notes]]
    return "\n".join(lines)


def table(name: str, directory: Path = results.RESULTS) -> str:
    """Table `name` for every device with results; "not measured" when there is none."""
    entry = TABLES[name]
    found = results.load(directory, entry.suite, entry.section)
    if not found:
        return tables.NOT_MEASURED
    return "\n\n".join(_block(slug, section, entry.render) for slug, section in found)


def render(text: str, directory: Path = results.RESULTS) -> str:
    """`text` with every marked block filled in.

    Raises:
        ReportError: an unknown table name, or a marker without its other half.
    """
    blocks = list(_BLOCK.finditer(text))
    for block in blocks:
        if block["name"] not in TABLES:
            raise ReportError(f"unknown table {block['name']!r}; known: {', '.join(TABLES)}")
        if _MARKER.search(block["body"]):
            raise ReportError(f"block {block['name']!r} holds another marker")
    if 2 * len(blocks) != len(_MARKER.findall(text)):
        raise ReportError("a marker lacks its other half: each begin NAME needs an end NAME after it")
    return _BLOCK.sub(lambda block: f"{block['begin']}{table(block['name'], directory)}\n{block['end']}", text)


def summary(content: dict[str, Any]) -> str:
    """All tables of one result file, for the terminal."""
    parts = []
    for section, render_section in _KINDS.values():
        if section in content["sections"]:
            title = (render_section.__doc__ or "").strip()
            parts.append(f"{title}\n\n{render_section(content['sections'][section])}")
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m benchmarks report`."""
    parser = argparse.ArgumentParser("python -m benchmarks report", description="tables from result files")
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="directory of <device>/<suite>.json")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--update", type=Path, metavar="FILE", help="fill in the marked blocks of FILE")
    action.add_argument("--check", type=Path, metavar="FILE", help="fail when FILE's blocks are not up to date")
    arguments = parser.parse_args(argv)
    path = arguments.update or arguments.check
    if path is None:
        for name in TABLES:
            print(f"## {name}\n\n{table(name, arguments.results)}\n")
        return 0
    old = path.read_text()
    try:
        new = render(old, arguments.results)
    except ReportError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    if arguments.update:
        if new != old:
            results.write_atomically(path, new)
        return 0
    sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(path), "results"))
    return int(new != old)
