"""Deltas in files: one safetensors file, read and written an entry at a time.

Tensor `<name>.indices` and `<name>.values` for every tensor of the delta, without indices where every position has a
value. The metadata's text `delta` is JSON:

    {"base_model": ..., "history": [...], "tensors": {<name>: {"shape": [...], "dtype": "bfloat16"}}}

next to `format` and `version`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter_files import install
from .container import DTYPES, TensorFile, TensorFileWriter, TensorInfo
from .delta import VALUE_DTYPES, Delta, Entry, Spec, dtype_name

FORMAT = "peft_kernels.delta"
VERSION = "1"
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values() if dtype.is_floating_point}


class DeltaFile(Delta):
    """A delta in a file that `save_delta` wrote.

    Opening checks the whole header; an entry is read, and at its first reading checked, when it is asked for: indices
    sorted, unique and in range, values finite.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no delta, of another version, or inconsistent. Reading an entry may raise it too.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = TensorFile(path)
        self.path = self._file.path
        try:
            description = self._description()
            specs = self._specs(description["tensors"])
        except BaseException:
            self._file.close()
            raise
        self._checked: set[str] = set()
        super().__init__(specs, description["base_model"], description["history"])

    def close(self) -> None:
        """Closes the file; entries that were read stay valid."""
        self._file.close()

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entry(self, name: str) -> Entry:
        """The entry, read from the file."""
        indices = self._file.read(f"{name}.indices") if f"{name}.indices" in self._file.tensors else None
        entry = Entry(indices, self._file.read(f"{name}.values"), self.specs[name])
        if name not in self._checked:
            try:
                entry.check(name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path}: {error}") from None
            self._checked.add(name)
        return entry

    def nnz(self, name: str) -> int:
        """How many values the entry of tensor `name` has, without reading it."""
        return self._file.tensors[f"{name}.values"].numel

    def _description(self) -> dict[str, Any]:
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a delta: its format must be {FORMAT}, got {metadata.get('format')!r}")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{self.path}: deltas of version {VERSION} are understood, got {metadata.get('version')!r}"
            )
        try:
            description = json.loads(metadata.get("delta", ""))
        except ValueError as error:
            raise ValueError(f"{self.path}: the description is not JSON: {error}") from error
        kinds = {"base_model": str | None, "history": list, "tensors": dict}
        if not isinstance(description, dict) or any(
            key not in description or not isinstance(description[key], kind) for key, kind in kinds.items()
        ):
            raise ValueError(f"{self.path}: the description must have base_model, history and tensors")
        if not all(isinstance(step, str) for step in description["history"]):
            raise ValueError(f"{self.path}: history must be texts")
        return description

    def _specs(self, tensors: dict[str, Any]) -> dict[str, Spec]:
        specs, unknown = {}, dict(self._file.tensors)
        for name, description in tensors.items():
            shape, dtype = self._shape_and_dtype(name, description)
            values, indices = unknown.pop(f"{name}.values", None), unknown.pop(f"{name}.indices", None)
            if values is None:
                raise ValueError(f"{self.path}: {name} has no values")
            if values.dtype not in VALUE_DTYPES or len(values.shape) != 1:
                raise ValueError(f"{self.path}: values of {name} must be 1-D and floating, got {_described(values)}")
            self._check_counts(name, shape, values, indices)
            specs[name] = Spec(shape, dtype, values.dtype)
        if unknown:
            raise ValueError(f"{self.path}: tensor {sorted(unknown)[0]} belongs to no tensor of the description")
        return specs

    def _shape_and_dtype(self, name: str, description: Any) -> tuple[tuple[int, ...], Any]:
        shape = description.get("shape") if isinstance(description, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{self.path}: the shape of {name} must be a list of sizes, got {shape!r}")
        dtype = description.get("dtype")
        if dtype not in _DTYPES:
            raise ValueError(f"{self.path}: the dtype of {name} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        return tuple(shape), _DTYPES[dtype]

    def _check_counts(self, name: str, shape: tuple[int, ...], values: TensorInfo, indices: TensorInfo | None) -> None:
        numel = math.prod(shape)
        if indices is None:
            if values.numel != numel:
                raise ValueError(
                    f"{self.path}: {name} has no indices, so it must have {numel} values, got {values.numel}"
                )
            return
        wanted = ("I64",) if numel > 2**31 - 1 else ("I32", "I64")
        if indices.dtype_name not in wanted or indices.shape != values.shape:
            raise ValueError(
                f"{self.path}: indices of {name} must be {' or '.join(wanted)} {list(values.shape)}, "
                f"got {_described(indices)}"
            )
        if indices.numel > numel:
            raise ValueError(f"{self.path}: {name} has {numel} elements, got {indices.numel} indices")


def _smaller_form(entry: Entry) -> tuple[Tensor | None, Tensor]:
    """Indices and values as they take the fewest bytes."""
    if entry.indices is None or entry.indices.nbytes + entry.values.nbytes < entry.spec.numel * entry.values.itemsize:
        return entry.indices, entry.values
    return None, entry.dense().view(-1)


def _described(info: TensorInfo) -> str:
    return f"{info.dtype_name} {list(info.shape)}"


def save_delta(delta: Delta, path: str | os.PathLike[str], *, progress: Callable[[str], object] | None = None) -> Path:
    """Writes a delta, an entry at a time; a computed one is computed on the way.

    The file is written aside, flushed and renamed, so that an interrupted run leaves what was there. Every entry is
    checked before it is written. Where indices would take more bytes than the zeros they leave out, an entry is written
    with a value at every position.

    Args:
        delta: what to write.
        path: the file; directories above it are created.
        progress: told each tensor's name when it is done.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an entry is not in order.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path must be a file to write, got the directory {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.{part}" for name in delta for part in ("indices", "values")]
    tensors = {name: {"shape": list(s.shape), "dtype": dtype_name(s.dtype)} for name, s in delta.specs.items()}
    description = {"base_model": delta.base_model, "history": list(delta.history), "tensors": tensors}
    metadata = {"format": FORMAT, "version": VERSION, "delta": json.dumps(description, separators=(",", ":"))}
    with TensorFileWriter(target, names, len(json.dumps(metadata))) as writer:
        for name in delta:
            entry = delta[name]
            entry.check(name)
            indices, values = _smaller_form(entry)
            if indices is not None:
                writer.add(f"{name}.indices", indices)
            writer.add(f"{name}.values", values)
            if progress is not None:
                progress(name)
        install([writer.finish(metadata)])
    return target
