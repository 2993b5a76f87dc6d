"""Text to blocks: formats, order, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peft_kernels.training.data import BlockStream, default_corpus, read_corpus
from peft_kernels.training.errors import UserError
from peft_kernels.training.models import byte_tokenizer

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    """One token per byte."""
    return byte_tokenizer()


def texts(data: Path, tokenizer: object) -> list[str]:
    """The documents' text."""
    return [document() for document in read_corpus(str(data), tokenizer)]


def stream_of(characters: int, seq_len: int = 8, seed: int = 0) -> BlockStream:
    """Blocks of a text that counts up, so that every block is another one."""
    numbers = " ".join(map(str, range(characters)))[:characters]
    return BlockStream([lambda: numbers], byte_tokenizer(), seq_len, seed)


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    assert texts(tmp_path / "a.txt", tokenizer) == ["first line\nsecond line\n"]


def test_every_jsonl_line_is_a_document(tmp_path: Path, tokenizer) -> None:  # type: ignore[no-untyped-def]
    tokenizer.chat_template = CHAT_TEMPLATE
    lines = [
        {"text": "plain"},
        {"prompt": "Q: ", "completion": "A"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert texts(tmp_path / "a.jsonl", tokenizer) == ["plain", "Q: A", "user: hi\nassistant: ho\n"]


def test_a_directory_is_read_in_order_of_path(tmp_path: Path, tokenizer: object) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n')
    (tmp_path / "d.bin").write_bytes(b"\x00")
    assert texts(tmp_path, tokenizer) == ["first", "second", "third"]


def test_default_corpus_is_the_standard_library(tokenizer: object) -> None:
    sources = default_corpus()
    assert len(sources) > 200
    assert any("class OrderedDict" in document() for document in sources)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1]', 'line 2: expected an object with "text"'),
        ("a.jsonl", '{"text": 1}', 'line 1: expected an object with "text"'),
        ("a.jsonl", '{"messages": []}', "needs? a model whose tokenizer has a chat template|chat template"),
        ("b.bin", "", "no .txt, .md, .rst, .py or .jsonl file in this directory"),
    ],
)
def test_what_is_not_understood_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    data = tmp_path if name.endswith(".bin") else tmp_path / name
    with pytest.raises(UserError, match=message):
        read_corpus(str(data), byte_tokenizer())


def test_missing_data_are_named(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        read_corpus(str(tmp_path / "nothing.txt"), tokenizer)


def test_a_corpus_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(UserError, match="less than one block of --seq-len 64 tokens"):
        stream_of(10, seq_len=64)


def test_blocks_do_not_depend_on_how_many_are_read() -> None:
    one, other = stream_of(9000), stream_of(9000)
    late = other.block(3000)  # beyond the corpus, so other order and repetition are in play
    assert [one.block(i).tolist() for i in range(3001)][-1] == late.tolist()
    assert one.digest(3000) == other.digest(3000)


def test_an_epoch_holds_every_block_once_and_no_held_out_one() -> None:
    stream = stream_of(9000)
    blocks = 9001 // 8 - len(stream.held_out)
    first = [tuple(stream.block(i).tolist()) for i in range(blocks)]
    second = [tuple(stream.block(blocks + i).tolist()) for i in range(blocks)]
    assert len(set(first)) == blocks
    assert set(first) == set(second) and first != second
    assert len(stream.held_out) == 8
    assert set(first).isdisjoint(map(tuple, stream.held_out.tolist()))


def test_a_small_corpus_spares_no_block() -> None:
    stream = stream_of(40)
    assert stream.held_out.shape == (0, 8)
    assert stream.batch(0, 3).shape == (3, 8)


def test_order_depends_on_the_seed() -> None:
    assert stream_of(2000, seed=0).digest(50) != stream_of(2000, seed=1).digest(50)


def test_digest_depends_on_every_block() -> None:
    digests = {stream_of(2000).digest(count) for count in range(5)}
    assert len(digests) == 5
    stream = stream_of(2000)
    assert stream.digest(4) == stream.digest(4) != stream.digest(2)


def test_documents_are_separated_by_the_end_of_text_token() -> None:
    tokenizer = byte_tokenizer()
    stream = BlockStream([lambda: "aaa", lambda: "bbb"], tokenizer, 8, seed=0)
    assert stream.block(0).tolist().count(tokenizer.eos_token_id) == 2


def test_batches_walk_through_the_blocks() -> None:
    stream = stream_of(2000)
    expected = torch.stack([stream.block(index) for index in (4, 5)])
    assert torch.equal(stream.batch(2, 2), expected.long())
