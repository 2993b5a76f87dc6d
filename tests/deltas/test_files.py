"""Deltas in files: what is written is read, what is wrong is refused, an interrupted write leaves the old file."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_kernels import deltas
from peft_kernels.deltas.container import TensorFile, TensorFileWriter
from peft_kernels.deltas.files import FORMAT

from ..support.accuracy import assert_same_bits
from ..support.places import dtype_name
from .dense import DTYPES, everywhere, packed, random_dense


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
def test_what_was_written_is_read(tmp_path, dtype, density):
    delta = packed(random_dense(density=density, dtype=dtype), base_model="base", history=("one", "two"))
    deltas.save_delta(delta, tmp_path / "below" / "delta.safetensors")
    with deltas.DeltaFile(tmp_path / "below" / "delta.safetensors") as file:
        assert (file.base_model, file.history, file.specs) == ("base", ("one", "two"), delta.specs)
        for name, entry in delta.items():
            assert file.nnz(name) == file[name].nnz
            assert_same_bits(file[name].dense(), entry.dense())
            if file[name].indices is not None:
                assert_same_bits(file[name].indices, entry.indices)
        assert_same_bits(deltas.SparseDelta(file)["b"].values, delta["b"].values)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_indices_are_left_out_where_that_is_smaller(tmp_path, dtype):
    for count in range(0, 121, 10):
        tensor = torch.zeros(120, dtype=dtype)
        tensor[:count] = 1
        path = deltas.save_delta(packed({"w": tensor}), tmp_path / "delta.safetensors")
        file = TensorFile(path)
        size = min(count * (4 + dtype.itemsize), 120 * dtype.itemsize)
        assert sum(info.end - info.begin for info in file.tensors.values()) == size
        assert_same_bits(deltas.DeltaFile(path)["w"].dense(), tensor)


def test_an_entry_at_every_position_needs_no_indices(tmp_path):
    tensors = random_dense()
    for delta in (packed(tensors), everywhere(tensors)):
        path = deltas.save_delta(delta, tmp_path / "delta.safetensors")
        assert all(name.endswith(".values") for name in load_file(path))
        assert all(entry.indices is None for entry in deltas.DeltaFile(path).values())


def test_other_programs_read_and_write_these_files(tmp_path):
    delta = packed(random_dense(density=0.3))
    path = deltas.save_delta(delta, tmp_path / "delta.safetensors")
    tensors = load_file(path)
    assert_same_bits(tensors["b.indices"], delta["b"].indices)
    metadata = TensorFile(path).metadata
    save_file(tensors, tmp_path / "copy.safetensors", metadata=metadata)
    for name, entry in deltas.DeltaFile(tmp_path / "copy.safetensors").items():
        assert_same_bits(entry.dense(), delta[name].dense())


def test_numbers_at_odd_addresses_are_read(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(5, dtype=torch.int32), "c": torch.ones(0)}
    names = list(tensors)
    with TensorFileWriter(tmp_path / "file.safetensors", names, 100) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        finished, _ = writer.finish({})
        file = TensorFile(finished)
        for name, tensor in tensors.items():
            assert_same_bits(file.read(name), tensor)


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path):
    path = deltas.save_delta(packed({"w": torch.ones(5000)}), tmp_path / "delta.safetensors")
    file = deltas.DeltaFile(path)
    file["w"].values.zero_()
    assert bool((file["w"].values == 1).all())


def test_an_open_file_survives_its_replacement(tmp_path):
    path = deltas.save_delta(packed({"w": torch.ones(100)}), tmp_path / "delta.safetensors")
    with deltas.DeltaFile(path) as file:
        deltas.save_delta(deltas.scaled(file, 3.0), path)
        assert bool((file["w"].values == 1).all())
        assert bool((deltas.DeltaFile(path)["w"].values == 3).all())


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path):
    path = deltas.save_delta(packed({"w": torch.ones(100)}), tmp_path / "delta.safetensors")
    before = path.read_bytes()

    def broken(name):
        if name == "v":
            raise KeyboardInterrupt
        return packed({"u": torch.ones(7)})["u"]

    specs = {name: packed({"u": torch.ones(7)}).specs["u"] for name in ("u", "v")}
    with pytest.raises(KeyboardInterrupt):
        deltas.save_delta(deltas.ComputedDelta(specs, broken, None, ()), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["delta.safetensors"]


def test_wrong_entries_are_not_written(tmp_path):
    spec = deltas.Spec((4,), torch.float32, torch.float32)
    entry = deltas.Entry(torch.tensor([2, 1], dtype=torch.int32), torch.ones(2), spec)
    with pytest.raises(ValueError, match="w: indices must be sorted, got 1 at position 1 after 2"):
        deltas.save_delta(deltas.ComputedDelta({"w": spec}, lambda _: entry, None, ()), tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []


def parts_of(path):
    """The header, read, and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path, header, data):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def good(tmp_path):
    delta = packed({"w": torch.tensor([[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, 3.0, 0.0]]), "v": torch.ones(2)})
    return deltas.save_delta(delta, tmp_path / "delta.safetensors")


def described(header, change):
    """The header with its description changed."""
    description = json.loads(header["__metadata__"]["delta"])
    change(description)
    return {**header, "__metadata__": {**header["__metadata__"], "delta": json.dumps(description)}}


def with_metadata(name, value):
    return lambda header, data: ({**header, "__metadata__": {**header["__metadata__"], name: value}}, data)


def with_description(change):
    return lambda header, data: (described(header, change), data)


def with_entry(name, **changes):
    return lambda header, data: ({**header, name: {**header[name], **changes}}, data)


def without(name):
    """Without a tensor, its data and its place."""

    def change(header, data):
        begin, end = header[name]["data_offsets"]
        rest = {}
        for key, entry in header.items():
            if key != name and key != "__metadata__" and entry["data_offsets"][0] >= end:
                moved = [place - (end - begin) for place in entry["data_offsets"]]
                entry = {**entry, "data_offsets": moved}
            if key != name:
                rest[key] = entry
        return rest, data[:begin] + data[end:]

    return change


def with_numbers(name, layout, *numbers):
    """Other numbers in the place of a tensor's."""

    def change(header, data):
        begin, end = header[name]["data_offsets"]
        fresh = struct.pack(layout, *numbers)
        assert len(fresh) == end - begin
        return header, data[:begin] + fresh + data[end:]

    return change


AT_OPENING = {
    "is not a delta: its format must be": with_metadata("format", "pt"),
    "deltas of version 1 are understood, got '2'": with_metadata("version", "2"),
    "the description is not JSON": with_metadata("delta", "{"),
    "the description must have base_model, history and tensors": with_metadata("delta", "[]"),
    "history must be texts": with_description(lambda d: d.update(history=[1])),
    r"the shape of w must be a list of sizes, got \[2, -3\]": with_description(
        lambda d: d["tensors"]["w"].update(shape=[2, -3])
    ),
    "the dtype of w must be one of .*, got 'int32'": with_description(
        lambda d: d["tensors"]["w"].update(dtype="int32")
    ),
    "w has 2 elements, got 3 indices": with_description(lambda d: d["tensors"]["w"].update(shape=[2])),
    "v has no indices, so it must have 3 values, got 2": with_description(
        lambda d: d["tensors"]["v"].update(shape=[3])
    ),
    "belongs to no tensor of the description": with_description(lambda d: d["tensors"].pop("v")),
    "u has no values": with_description(lambda d: d["tensors"].update(u={"shape": [1], "dtype": "float32"})),
    r"indices of w must be I64 \[3\], got I32 \[3\]": with_description(
        lambda d: d["tensors"]["w"].update(shape=[2**16, 2**16])
    ),
    "indices of w must be I32 or I64": with_entry("w.indices", dtype="F32"),
    "values of w must be 1-D and floating": with_entry("w.values", dtype="I32"),
    r"values of w must be 1-D and floating, got F32 \[3, 1\]": with_entry("w.values", shape=[3, 1]),
    "w.values, F32 .4., does not have 12 bytes": with_entry("w.values", shape=[4]),
    "has the dtype 'F12', which is not known": with_entry("w.values", dtype="F12"),
    "must be counts": with_entry("w.values", shape=[True, 3]),
    "must have dtype, shape and two data_offsets": lambda header, data: ({**header, "w.values": []}, data),
    "w has no values": without("w.values"),
    "is not whole: its header speaks of": lambda header, data: (header, data[:-1]),
    "is not whole: its header speaks": lambda header, data: (header, data + b"0"),
    "its header is not JSON": lambda header, data: ("{" * 50, data),
    "a name appears twice": lambda header, data: ('{"a": 1, "a": 2}      ', data),
    "the header must be a JSON object": lambda header, data: ("[1, 2, 3]   ", data),
    "__metadata__ must map names to text": lambda header, data: ({**header, "__metadata__": {"a": 1}}, data),
}

AT_READING = {
    "w: indices must be sorted, got 1 at position 1 after 3": with_numbers("w.indices", "<iii", 3, 1, 5),
    "w: indices must be unique, got 3 at positions 1 and 2": with_numbers("w.indices", "<iii", 1, 3, 3),
    r"w: indices must be in \[0, 8\), got 8 at position 2": with_numbers("w.indices", "<iii", 1, 3, 8),
    r"w: indices must be in \[0, 8\), got -1 at position 0": with_numbers("w.indices", "<iii", -1, 3, 5),
    "w: values must be finite": with_numbers("w.values", "<fff", 1.0, float("nan"), 2.0),
    "w: values must be finite, got NaN or infinity": with_numbers("w.values", "<fff", 1.0, 2.0, float("-inf")),
}


@pytest.mark.parametrize("message", AT_OPENING)
def test_a_wrong_file_is_not_opened(good, message):
    write(good, *AT_OPENING[message](*parts_of(good)))
    with pytest.raises(ValueError, match=message) as caught:
        deltas.DeltaFile(good)
    assert str(good) in str(caught.value)


@pytest.mark.parametrize("message", AT_READING)
def test_a_wrong_entry_is_not_returned(good, message):
    write(good, *AT_READING[message](*parts_of(good)))
    with deltas.DeltaFile(good) as file:
        assert file["v"].nnz == 2
        with pytest.raises(ValueError, match=message) as caught:
            file["w"]
    assert str(good) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 20, 100])
def test_a_truncated_file_is_refused(good, size):
    good.write_bytes(good.read_bytes()[:size])
    with pytest.raises(ValueError, match="safetensors file"):
        deltas.DeltaFile(good)


def test_tensors_that_overlap_are_refused(good):
    header, data = parts_of(good)
    header["w.values"]["data_offsets"] = header["w.indices"]["data_offsets"]
    write(good, header, data)
    with pytest.raises(ValueError, match="must begin at byte"):
        deltas.DeltaFile(good)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        deltas.DeltaFile(tmp_path / "nothing")


def test_a_checkpoint_is_no_delta(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"its format must be {FORMAT}, got 'pt'"):
        deltas.DeltaFile(tmp_path / "model.safetensors")


class TestFromTensors:
    def make(self, indices, values, shape=(4,)):
        return deltas.from_tensors({"w": (torch.tensor(indices), torch.tensor(values))}, {"w": shape}, torch.float32)

    def test_indices_become_32_bits(self):
        assert self.make([0, 3], [1.0, 2.0])["w"].indices.dtype == torch.int32

    def test_past_31_bits_they_stay_64(self):
        entry = self.make([5, 2**33], [1.0, 2.0], (2**17, 2**17))["w"]
        assert entry.indices.dtype == torch.int64
        assert entry.indices.tolist() == [5, 2**33]

    @pytest.mark.parametrize("indices", [[3, 0], [1, 1], [0, 4], [-1, 2], [0, 2**32 + 1]])
    def test_wrong_positions(self, indices):
        with pytest.raises(ValueError, match="w: indices must be"):
            self.make(indices, [1.0, 2.0])

    def test_wrong_counts_and_dtypes(self):
        with pytest.raises(ValueError, match=r"w: values must be \[2\]"):
            self.make([0, 1], [1.0])
        with pytest.raises(TypeError, match="w: indices must be int32 or int64"):
            self.make([0.0, 1.0], [1.0, 2.0])
        with pytest.raises(TypeError, match="w: values must be"):
            self.make([0, 1], [1, 2])
