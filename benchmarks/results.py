"""Result files: one JSON per device and suite, one section per benchmark, each with its own provenance.

    results/<device>/<suite>.json
    {"schema": 1, "suite": ..., "sections": {<benchmark>: {"run_info", "train_info", "meta_info"}}}

The three blocks are those of PEFT's method comparison: `run_info` says when, from which commit and with which
settings, `train_info` holds the measurements, `meta_info` the machine and versions. A section is replaced as a whole,
so measuring one benchmark again leaves the others and what they say about their origin alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULTS = Path(__file__).with_name("results")

Section = dict[str, Any]


def path_of(directory: Path, device_slug: str, suite: str) -> Path:
    """Where the results of `suite` on a device lie under `directory`."""
    return directory / device_slug / f"{suite}.json"


def read(path: Path) -> dict[str, Any]:
    """The result file at `path`.

    Raises:
        ValueError: it is of another schema.
    """
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: result files of schema {SCHEMA} are understood, got {content.get('schema')!r}")
    return content


def write_section(path: Path, suite: str, name: str, section: Section) -> None:
    """Puts one section into the file at `path`, creating it or keeping its other sections; atomic."""
    sections = read(path)["sections"] if path.exists() else {}
    sections[name] = section
    content = {"schema": SCHEMA, "suite": suite, "sections": dict(sorted(sections.items()))}
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to a temporary file beside `path`, flushes it to disk and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(directory: Path, suite: str, name: str) -> list[tuple[str, Section]]:
    """Every device's section `name` of `suite` under `directory`: (device slug, section), sorted by device."""
    found = []
    for path in sorted(directory.glob(f"*/{suite}.json")):
        section = read(path)["sections"].get(name)
        if section is not None:
            found.append((path.parent.name, section))
    return found
