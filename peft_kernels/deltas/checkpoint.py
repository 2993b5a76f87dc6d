"""Model checkpoints in safetensors, one file or shards with an index, read and written a tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_files import install
from .container import TensorFile, TensorFileWriter

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})


class Checkpoint:
    """The tensors of a checkpoint, by name.

    Args:
        path: a safetensors file, or a directory with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        FileNotFoundError: there is no such file; pickles are never read.
        ValueError: a file is damaged, or the index does not fit the shards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files: dict[str, TensorFile] = {}
        self._index: Path | None = None
        self._home: dict[str, str] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self.path.is_file():
            self._add(self.path)
        elif (self.path / SINGLE_NAME).is_file():
            self._add(self.path / SINGLE_NAME)
        elif (self.path / INDEX_NAME).is_file():
            self._index = self.path / INDEX_NAME
            self._open_shards(self._index)
        elif not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist")
        else:
            raise FileNotFoundError(
                f"{self.path} holds no {SINGLE_NAME} and no {INDEX_NAME}; pickles can run code and are never read"
            )

    def _add(self, path: Path) -> None:
        file = TensorFile(path)
        self.files[path.name] = file
        for name in file.tensors:
            if name in self._home:
                raise ValueError(f"{self.path}: {name} is in {self._home[name]} and in {path.name}")
            self._home[name] = path.name

    def _open_shards(self, index: Path) -> None:
        try:
            homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map: {error!r}") from error
        if not isinstance(homes, dict) or not all(isinstance(file, str) for file in homes.values()):
            raise ValueError(f"{index}: weight_map must map tensor names to file names")
        for file in sorted(set(homes.values())):
            if Path(file).name != file or file in ("", ".", ".."):
                raise ValueError(f"{index}: shards must lie beside the index, got {file!r}")
            if not (index.parent / file).is_file():
                raise FileNotFoundError(f"{index} names the shard {file}, which does not exist")
            self._add(index.parent / file)
        if homes != self._home:
            wrong = sorted(name for name in homes.keys() | self._home.keys() if homes.get(name) != self._home.get(name))
            raise ValueError(f"{index} and its shards differ on where {wrong[0]} is")

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._home))

    def __contains__(self, name: object) -> bool:
        return name in self._home

    @property
    def name(self) -> str:
        """What the model's configuration calls it, else the name of the directory or file."""
        try:
            name = json.loads((self.path / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
        except (OSError, ValueError, AttributeError):
            name = None
        return name if isinstance(name, str) and name else self.path.resolve().name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor; None for one that is only ever copied."""
        return self._file(name).tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return self._file(name).read(name)

    def same_bytes(self, other: Checkpoint, name: str) -> bool:
        """Whether a tensor is the same, bit for bit, in another checkpoint; shape and dtype must be."""
        mine, theirs = self._file(name).pieces(name), other._file(name).pieces(name)
        return all(left == right for left, right in zip(mine, theirs, strict=True))

    def is_floating(self, name: str) -> bool:
        """Whether a delta can change the tensor."""
        dtype = self.dtype(name)
        return dtype is not None and dtype.is_floating_point

    def _file(self, name: str) -> TensorFile:
        if name not in self._home:
            raise KeyError(f"{self.path} has no tensor {name}")
        return self.files[self._home[name]]

    def rewrite(
        self,
        output: str | os.PathLike[str],
        changed: Callable[[str], Tensor | None],
        progress: Callable[[str], object] | None = None,
    ) -> Path:
        """Writes the checkpoint with some tensors changed; all files are put in place at the end, one after another.

        Args:
            output: a file for a file, a directory for a directory, which also gets the other files of this one
                (configuration, tokenizer) but no other weights.
            changed: the new tensor of the same shape and dtype, or None for one that is to be copied.
            progress: told each tensor's name when it is done.

        Returns:
            The output's path.
        """
        target = Path(output)
        if self.path.is_file():
            if target.is_dir():
                raise IsADirectoryError(f"output must be a file, as {self.path} is, got the directory {target}")
            folder, names = target.parent, {self.path.name: target.name}
        else:
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(f"output must be a directory, as {self.path} is, got the file {target}")
            folder, names = target, {name: name for name in self.files}
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            finished = []
            for name, file in self.files.items():
                writer = TensorFileWriter(folder / names[name], list(file.tensors), len(json.dumps(file.metadata)))
                stack.enter_context(writer)
                _rewrite_file(file, writer, changed, progress)
                finished.append(writer.finish(file.metadata))
            if target != self.path and self.path.is_dir():
                _copy_others(self.path, target)
            install(finished)
        return target


def _rewrite_file(
    file: TensorFile,
    writer: TensorFileWriter,
    changed: Callable[[str], Tensor | None],
    progress: Callable[[str], object] | None,
) -> None:
    for name, info in sorted(file.tensors.items(), key=lambda item: item[1].begin):
        tensor = changed(name)
        if tensor is None:
            writer.add_pieces(name, info.dtype_name, info.shape, file.pieces(name))
        else:
            writer.add(name, tensor)
        if progress is not None:
            progress(name)


def _copy_others(source: Path, target: Path) -> None:
    """Copies what lies beside the weights. Of the weights, only the index."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_SUFFIXES or (path.name.endswith(".index.json") and path.name != INDEX_NAME)
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
