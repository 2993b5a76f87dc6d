"""Safetensors files a piece at a time: what is read or written never has to fit in memory whole.

A file is the length of its header (8 bytes, little endian), the header (JSON: every tensor's dtype, shape and place in
the data, and `__metadata__`), and the data, without gaps. Only raw numbers are ever read, never a pickle. The header of
a file being written is filled in at the end: room is left for it, and what is not needed of that stays blank, which the
format allows.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..adapter_files import install

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of the dtypes that are read as numbers here."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    **{"U64": 8, "U32": 4, "U16": 2, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
"""Bytes per element; of those without a dtype above the bytes are copied as they are."""

_MOST_HEADER = 100_000_000  # what the format's own library accepts
_COPY_BYTES = 1 << 24
_ROOM_PER_TENSOR = 200  # dtype, offsets and punctuation of one header entry


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        dtype_name: as the format calls it.
        shape: sizes.
        begin, end: bytes from the start of the data.
    """

    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, None for one that is only ever copied."""
        return DTYPES.get(self.dtype_name)

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file, opened and its header checked; tensors are read when they are asked for.

    The file stays open, so that one that is replaced meanwhile is still read as it was. Not for several threads.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is not a file")
        self._file = self.path.open("rb", buffering=0)
        try:
            self._data, header = self._read_header()
            self.metadata: dict[str, str] = _metadata_of(header, self.path)
            self.tensors: dict[str, TensorInfo] = _tensors_of(header, self.path)
            self._check_layout()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Closes the file; what was read stays valid."""
        self._file.close()

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        self._size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if self._size < 8 or not 2 <= length <= min(_MOST_HEADER, self._size - 8):
            raise ValueError(f"{self.path} is not a whole safetensors file: it has {self._size} bytes and no header")
        text = bytearray(length)
        _fill(self._file.fileno(), memoryview(text), 8, self.path)
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except ValueError as error:
            raise ValueError(f"{self.path} is not a safetensors file: its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise ValueError(f"{self.path}: the header must be a JSON object, got {type(header).__name__}")
        return 8 + length, header

    def _check_layout(self) -> None:
        end = 0
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != end:
                raise ValueError(f"{self.path}: tensor {name} must begin at byte {end} of the data, got {info.begin}")
            end = info.end
        if end != self._size - self._data:
            raise ValueError(
                f"{self.path} is not whole: its header speaks of {end} bytes of data, got {self._size - self._data}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor `name`: pages of the file, in memory from their first use until the tensor goes.

        They are private copies as soon as they are written to. Where the format's packing leaves the numbers at an
        address that is no multiple of their size, they are copied.
        """
        info = self.tensors[name]
        if info.dtype is None:
            raise ValueError(f"{self.path}: tensor {name} is {info.dtype_name}, which is not read as numbers here")
        begin = self._data + info.begin
        if info.begin == info.end or begin % info.dtype.itemsize:
            tensor = torch.empty(info.shape, dtype=info.dtype)
            _fill(self._file.fileno(), _bytes_of(tensor), begin, self.path)
            return tensor
        first_page = begin - begin % mmap.ALLOCATIONGRANULARITY
        length = begin - first_page + info.end - info.begin
        pages = mmap.mmap(self._file.fileno(), length, offset=first_page, access=mmap.ACCESS_COPY)
        numbers = torch.frombuffer(pages, dtype=info.dtype, count=info.numel, offset=begin - first_page)
        return numbers.view(info.shape)

    def pieces(self, name: str) -> Iterable[memoryview]:
        """The bytes of tensor `name`, a piece at a time; a piece is valid until the next."""
        info = self.tensors[name]
        buffer = bytearray(min(_COPY_BYTES, info.end - info.begin))
        for begin in range(info.begin, info.end, _COPY_BYTES):
            piece = memoryview(buffer)[: min(_COPY_BYTES, info.end - begin)]
            _fill(self._file.fileno(), piece, self._data + begin, self.path)
            yield piece


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; the tensor has to outlive it."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _fill(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{path} has become shorter while it was read")
        done += count


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _metadata_of(header: Mapping[str, Any], path: Path) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to text")
    return metadata


def _tensors_of(header: Mapping[str, Any], path: Path) -> dict[str, TensorInfo]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}: tensor {name} must have dtype, shape and two data_offsets") from None
        if dtype_name not in _SIZES:
            raise ValueError(f"{path}: tensor {name} has the dtype {dtype_name!r}, which is not known here")
        if not isinstance(shape, list) or not all(_is_count(number) for number in (*shape, begin, end)):
            raise ValueError(f"{path}: shape and data_offsets of tensor {name} must be counts, got {entry}")
        if end - begin != math.prod(shape) * _SIZES[dtype_name]:
            raise ValueError(f"{path}: tensor {name}, {dtype_name} {shape}, does not have {end - begin} bytes")
        tensors[name] = TensorInfo(dtype_name, tuple(shape), begin, end)
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class TensorFileWriter:
    """Writes a safetensors file tensor by tensor, beside the target, and puts it in place at the end.

    Use it as a context manager: when the block raises, the target is as it was.

    Args:
        path: the target; directories above it must exist.
        names: every tensor that may be added.
        metadata_bytes: upper bound for the metadata's JSON text.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str], metadata_bytes: int) -> None:
        self.path = Path(path)
        self._aside = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        room = metadata_bytes + sum(len(json.dumps(name)) + _ROOM_PER_TENSOR for name in names) + _ROOM_PER_TENSOR
        self._room = -(-room // 8) * 8
        self._names = set(names)
        self._header: dict[str, Any] = {}
        self._end = 0

    def __enter__(self) -> TensorFileWriter:
        self._file = self._aside.open("wb")
        self._file.write(b" " * (8 + self._room))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor."""
        tensor = tensor.detach().to("cpu").contiguous()
        self.add_pieces(name, _NAMES[tensor.dtype], tensor.shape, [_bytes_of(tensor)] if tensor.numel() else [])

    def add_pieces(self, name: str, dtype_name: str, shape: Sequence[int], pieces: Iterable[memoryview]) -> None:
        """Appends a tensor whose bytes come in pieces."""
        if name not in self._names or name in self._header:
            raise ValueError(f"{self.path}: tensor {name} was not announced, or is there already")
        begin = self._end
        for piece in pieces:
            self._file.write(piece)
            self._end += len(piece)
        if self._end - begin != math.prod(shape) * _SIZES[dtype_name]:
            raise ValueError(f"{self.path}: tensor {name}, {dtype_name} {list(shape)}, got {self._end - begin} bytes")
        self._header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [begin, self._end]}

    def finish(self, metadata: Mapping[str, str]) -> tuple[Path, Path]:
        """Completes the file beside the target; (it, the target) are for `adapter_files.install`."""
        header = {"__metadata__": dict(metadata), **self._header} if metadata else self._header
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        if len(text) > min(self._room, _MOST_HEADER):
            raise ValueError(
                f"{self.path}: the header has {len(text)} bytes, more than there is room for, {self._room}"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text)
        self._file.close()
        return self._aside, self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes away what is left beside the target, which after `install` is nothing."""
        self._file.close()
        with suppress(FileNotFoundError):
            self._aside.unlink()


__all__ = ["DTYPES", "TensorFile", "TensorFileWriter", "TensorInfo", "install"]
