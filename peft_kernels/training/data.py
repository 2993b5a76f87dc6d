"""Text to token blocks: read documents, tokenise, pack into `[seq_len]`, in an order that is a function of the seed.

Documents are shuffled, joined with the end-of-text token and cut into blocks; blocks are shuffled within windows. Block
`i` depends only on the corpus, the seed and `i`, never on how many blocks are asked for, so a run can be resumed, or
continued for more steps, from the number of its step alone. When the corpus is used up, its blocks come again in
another order.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_WINDOW = 512  # blocks that are shuffled among each other
_HELD_OUT = 8  # blocks, at most a tenth of the first window
_PIECE = 1 << 18  # characters
_NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}

Document = Callable[[], str]
"""Reads one document; documents are read when their turn comes."""


def default_corpus() -> list[Document]:
    """The standard library's Python sources, which every machine has; tests and installed packages are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_LIBRARY_CODE]
        paths += [Path(directory, name) for name in files if name.endswith(".py")]
    return [_file_reader(path) for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix())]


def read_corpus(data: str | None, tokenizer: Any) -> list[Document]:
    """The documents behind `--data`: one per text file, one per line of JSONL.

    Args:
        data: a `.jsonl` file, any other file (one document of text), a directory of such files, or None for
            `default_corpus`.
        tokenizer: its chat template formats JSONL lines that hold `messages`.

    Raises:
        UserError: no such file, no text in it, or a line that is not understood.
    """
    if data is None:
        return default_corpus()
    path = Path(data).expanduser()
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (*TEXT_SUFFIXES, ".jsonl"))
        if not paths:
            raise UserError(f"--data {data}: no {', '.join(TEXT_SUFFIXES)} or .jsonl file in this directory")
        return [document for p in paths for document in _read_file(p, tokenizer)]
    if not path.is_file():
        raise UserError(f"--data {data}: no such file or directory")
    return _read_file(path, tokenizer)


def _read_file(path: Path, tokenizer: Any) -> list[Document]:
    return _read_jsonl(path, tokenizer) if path.suffix == ".jsonl" else [_file_reader(path)]


def _file_reader(path: Path) -> Document:
    return lambda: path.read_text(encoding="utf-8", errors="replace")


def _read_jsonl(path: Path, tokenizer: Any) -> list[Document]:
    documents: list[Document] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = _jsonl_text(line, f"--data {path}, line {number}", tokenizer)
                documents.append(lambda text=text: text)  # type: ignore[misc]
    return documents


def _jsonl_text(line: str, where: str, tokenizer: Any) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            return str(record["prompt"]) + str(record["completion"])
        if isinstance(record.get("messages"), list):
            return _chat_text(record["messages"], where, tokenizer)
    raise UserError(f'{where}: expected an object with "text", with "prompt" and "completion", or with "messages"')


def _chat_text(messages: list[Any], where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f'{where}: "messages" need a model whose tokenizer has a chat template; this one has none')
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise whatever their author chose
        raise UserError(f"{where}: the chat template refuses these messages ({error})") from error


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces that end at a line's end, so that a large file need not be tokenised before the first step."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


@dataclass
class BlockStream:
    """The endless sequence of token blocks of one run; tokenises as far as it is read.

    Attributes:
        held_out: blocks, int32 `[n, seq_len]`, that are never trained on; empty when the
            corpus is too small to spare any.
    """

    documents: list[Document]
    tokenizer: Any
    seq_len: int
    seed: int
    held_out: Tensor = field(init=False)
    _blocks: list[Tensor] = field(init=False, default_factory=list)
    _corpus: list[Tensor] = field(init=False, default_factory=list)
    _fresh: Iterator[Tensor] = field(init=False)
    _exhausted: bool = field(init=False, default=False)
    _hash: tuple[int, hashlib._Hash] = field(init=False)  # number of blocks it has taken in, and the hash
    _windows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        order = list(range(len(self.documents)))
        random.Random(self.seed).shuffle(order)
        self._fresh = self._pack(order)
        first = self._next_window()
        if not first:
            raise UserError(
                f"--data holds less than one block of --seq-len {self.seq_len} tokens; give more text or a shorter "
                "--seq-len"
            )
        spare = min(_HELD_OUT, len(first) // 10)
        self.held_out = torch.stack(first[:spare]) if spare else torch.empty((0, self.seq_len), dtype=torch.int32)
        self._blocks.extend(self._shuffled(first[spare:]))
        self._hash = 0, hashlib.sha256(self.held_out.numpy().tobytes())

    def _pack(self, order: list[int]) -> Iterator[Tensor]:
        """Blocks of the corpus once through, documents in `order`; the last, incomplete block is dropped."""
        pending: list[int] = []
        for index in order:
            for ids in self._tokens(self.documents[index]()):
                pending += ids
                whole = len(pending) // self.seq_len
                for start in range(0, whole * self.seq_len, self.seq_len):
                    yield torch.tensor(pending[start : start + self.seq_len], dtype=torch.int32)
                del pending[: whole * self.seq_len]

    def _tokens(self, text: str) -> Iterator[list[int]]:
        for piece in _pieces(text):
            yield self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        yield [self.tokenizer.eos_token_id]

    def _next_window(self) -> list[Tensor]:
        window = list(itertools.islice(self._fresh, _WINDOW))
        self._exhausted = len(window) < _WINDOW
        return window

    def _shuffled(self, blocks: list[Tensor]) -> list[Tensor]:
        generator = random.Random(f"{self.seed}/{self._windows}")
        self._windows += 1
        return generator.sample(blocks, len(blocks))

    def _extend(self) -> None:
        """Adds the next window, or once the corpus is used up all its blocks in another order."""
        window = [] if self._exhausted else self._next_window()
        if not window:
            self._corpus = self._corpus or list(self._blocks)
            window = self._corpus
        self._blocks.extend(self._shuffled(window))

    def block(self, index: int) -> Tensor:
        """Block number `index`, int32 `[seq_len]`."""
        while index >= len(self._blocks):
            self._extend()
        return self._blocks[index]

    def batch(self, index: int, batch_size: int) -> Tensor:
        """Batch number `index`, int64 `[batch_size, seq_len]`."""
        return torch.stack([self.block(index * batch_size + row) for row in range(batch_size)]).long()

    def digest(self, count: int) -> str:
        """SHA-256 of the held-out and the first `count` blocks: whether two runs read the same data."""
        hashed, total = self._hash if self._hash[0] <= count else (0, hashlib.sha256(self.held_out.numpy().tobytes()))
        for index in range(hashed, count):
            total.update(self.block(index).numpy().tobytes())
        self._hash = count, total
        return total.hexdigest()
