"""From checkpoints to deltas and back: one file or shards, LoRA adapters, Antidote; nothing is written on bad input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_kernels as pk
from peft_kernels import deltas

from ..support.accuracy import assert_same_bits
from ..support.places import dtype_name
from . import dense as plain
from .dense import packed

SHAPES = {"model.embed.weight": (40, 24), "model.layer.weight": (24, 24), "model.norm.weight": (24,)}


def weights(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**tensors, "ids": torch.arange(7)}


def tuned_from(base, share=0.3):
    generator = torch.Generator().manual_seed(5)
    result = {}
    for name, tensor in base.items():
        change = (
            0.1
            * torch.randn(tensor.shape, generator=generator)
            * (torch.rand(tensor.shape, generator=generator) < share)
        )
        result[name] = (tensor.float() + change).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
    return result


def write_sharded(folder, tensors):
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    homes = {}
    for i, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        homes.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_single(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_file(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "some.safetensors")
    return folder / "some.safetensors"


LAYOUTS = pytest.mark.parametrize("write", [write_single, write_sharded, write_file])


def read_all(path):
    with deltas.Checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).clone() for name in checkpoint}


def extracted(base, tuned, **options):
    with deltas.Checkpoint(base) as before, deltas.Checkpoint(tuned) as after:
        return deltas.SparseDelta(deltas.extract(before, after, **options))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=dtype_name)
def test_extract_and_apply(tmp_path, write, dtype):
    base = weights(dtype=dtype)
    tuned = tuned_from(base)
    first, second = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    delta = extracted(first, second)
    assert list(delta) == sorted(SHAPES)
    for name, entry in delta.items():
        work = plain.wide(dtype)
        assert_same_bits(entry.dense(), tuned[name].to(work) - base[name].to(work))
        assert entry.spec.dtype == dtype
    output = tmp_path / ("out.safetensors" if first.is_file() else "out")
    with deltas.Checkpoint(first) as checkpoint:
        deltas.apply_to_checkpoint(checkpoint, delta, output)
    result = read_all(output)
    assert_same_bits(result["ids"], base["ids"])
    for name in SHAPES:
        if dtype in (torch.bfloat16, torch.float16):
            assert_same_bits(result[name], tuned[name])
        else:
            torch.testing.assert_close(result[name], tuned[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@LAYOUTS
def test_untouched_tensors_and_other_files_are_copied(tmp_path, write):
    path = write(tmp_path / "base", weights())
    folder = path if path.is_dir() else path.parent
    (folder / "config.json").write_text('{"_name_or_path": "someone/tiny"}')
    (folder / "pytorch_model.bin").write_text("a pickle")
    with deltas.Checkpoint(path) as checkpoint:
        if path.is_dir():
            assert checkpoint.name == "someone/tiny"
        output = tmp_path / ("out.safetensors" if path.is_file() else "out")
        deltas.apply_to_checkpoint(checkpoint, packed({"model.norm.weight": torch.ones(24)}), output)
    result = read_all(output)
    assert_same_bits(result["model.norm.weight"], weights()["model.norm.weight"] + 1)
    for name in set(weights()) - {"model.norm.weight"}:
        assert_same_bits(result[name], weights()[name])
    if path.is_dir():
        files = {file.name for file in output.iterdir()}
        assert files == {file.name for file in path.iterdir()} - {"pytorch_model.bin"}


def test_the_output_loads_as_the_input_does(tmp_path):
    path = write_single(tmp_path / "base", weights())
    with deltas.Checkpoint(path) as checkpoint:
        deltas.apply_to_checkpoint(checkpoint, packed({"model.norm.weight": torch.ones(24)}), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights().keys()


def test_several_deltas_are_rounded_once(tmp_path):
    base = weights()
    parts = [plain.random_dense(seed, 0.5, shapes=SHAPES) for seed in range(3)]
    path = write_file(tmp_path, base)
    with deltas.Checkpoint(path) as checkpoint:
        deltas.apply_to_checkpoint(checkpoint, [packed(p) for p in parts], tmp_path / "out", weights=[1.0, -0.5, 2.0])
    for name, tensor in read_all(tmp_path / "out").items():
        if name in SHAPES:
            total = plain.add([part[name] for part in parts], [1.0, -0.5, 2.0])
            assert_same_bits(tensor, (base[name].float() + total).to(torch.bfloat16))


def test_subtract(tmp_path):
    base = {"w": torch.full((10,), 2.0)}
    path = write_file(tmp_path, base)
    with deltas.Checkpoint(path) as checkpoint:
        deltas.apply_to_checkpoint(
            checkpoint, packed({"w": torch.ones(10)}), tmp_path / "out", weights=[0.5], subtract=True
        )
    assert_same_bits(read_all(tmp_path / "out")["w"], torch.full((10,), 1.5))


def test_a_checkpoint_can_be_replaced_by_itself_changed(tmp_path):
    path = write_sharded(tmp_path / "base", weights())
    with deltas.Checkpoint(path) as checkpoint:
        deltas.apply_to_checkpoint(checkpoint, packed({"model.norm.weight": torch.ones(24)}), path)
    assert_same_bits(read_all(path)["model.norm.weight"], weights()["model.norm.weight"] + 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.ones(24)}, "the delta changes other, which"),
        ({"model.norm.weight": torch.ones(25)}, r"model.norm.weight must be \[25\] for this delta, got \[24\]"),
        ({"ids": torch.ones(7)}, "ids must be floating point"),
    ],
)
def test_a_delta_that_does_not_fit_writes_nothing(tmp_path, tensors, message):
    path = write_single(tmp_path / "base", weights())
    with deltas.Checkpoint(path) as checkpoint, pytest.raises(ValueError, match=message):
        deltas.apply_to_checkpoint(checkpoint, packed(tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_apply_leaves_the_old_output(tmp_path):
    path = write_sharded(tmp_path / "base", weights())
    before = {file.name: file.read_bytes() for file in write_sharded(tmp_path / "out", weights(1)).iterdir()}
    calls = []

    def stop(name):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with deltas.Checkpoint(path) as checkpoint, pytest.raises(KeyboardInterrupt):
        delta = packed({"model.norm.weight": torch.ones(24)})
        deltas.apply_to_checkpoint(checkpoint, delta, tmp_path / "out", progress=stop)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "both checkpoints must have the same tensors; model.norm.weight"),
        (lambda t: t.update(more=torch.ones(1)), "both checkpoints must have the same tensors; more"),
        (lambda t: t.update({"model.norm.weight": torch.ones(25)}), "model.norm.weight must have one shape"),
        (lambda t: t.update(ids=torch.arange(7) + 1), "ids differs and is not floating point"),
        (lambda t: t.update({"model.norm.weight": torch.full((24,), float("nan"))}), "must be finite"),
    ],
)
def test_checkpoints_that_cannot_be_compared(tmp_path, change, message):
    tuned = weights()
    change(tuned)
    with pytest.raises(ValueError, match=message):
        extracted(write_single(tmp_path / "base", weights()), write_single(tmp_path / "tuned", tuned))


def test_values_in_another_dtype(tmp_path):
    base = weights()
    paths = write_single(tmp_path / "base", base), write_single(tmp_path / "tuned", tuned_from(base))
    low = extracted(*paths, dtype=torch.bfloat16)
    exact = extracted(*paths)
    for name, entry in low.items():
        assert_same_bits(entry.dense(), exact[name].dense().to(torch.bfloat16))


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path, name):
    folder = write_sharded(tmp_path / "base", weights())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ids"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="shards must lie beside the index"):
        deltas.Checkpoint(folder)


def test_a_wrong_or_missing_shard_is_refused(tmp_path):
    folder = write_sharded(tmp_path / "base", weights())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    homes = content["weight_map"]
    homes["ids"], homes["model.norm.weight"] = homes["model.norm.weight"], homes["ids"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="differ on where ids is"):
        deltas.Checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names the shard model-00002"):
        deltas.Checkpoint(folder)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickles can run code"):
        deltas.Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        deltas.Checkpoint(tmp_path / "nothing")


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(24, 40, bias=False)
        self.second = torch.nn.Linear(40, 24, bias=False)


def adapter(tmp_path, **options):
    """A base checkpoint and a LoRA adapter with random factors; also the merged weights."""
    torch.manual_seed(0)
    model = Tiny()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    pk.inject(model, pk.LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], **options))
    for layer in (model.first, model.second):
        torch.nn.init.normal_(layer.lora_b)
    pk.save_adapter(model, tmp_path / "adapter")
    merged = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        update = layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
        merged[f"{name}.weight"] = update.detach()
    return merged


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 3}}]
)
def test_from_lora(tmp_path, options):
    updates = adapter(tmp_path, **options)
    with deltas.Checkpoint(tmp_path / "base.safetensors") as base:
        delta = deltas.from_lora(tmp_path / "adapter", base)
        assert list(delta) == sorted(updates)
        for name, update in updates.items():
            torch.testing.assert_close(delta[name].dense().double(), update, rtol=1e-5, atol=1e-6)
        trimmed = deltas.graft(delta, 0.05)
        total = sum(update.numel() for update in updates.values())
        assert sum(entry.nnz for entry in trimmed.values()) == int(0.05 * total)
        path = deltas.save_delta(trimmed, tmp_path / "delta.safetensors")
    assert deltas.DeltaFile(path).nnz("first.weight") == trimmed["first.weight"].nnz


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapter(tmp_path)
    save_file({"first.weight": torch.ones(40, 24)}, tmp_path / "small.safetensors")
    with (
        deltas.Checkpoint(tmp_path / "small.safetensors") as base,
        pytest.raises(ValueError, match=r"no second\.weight"),
    ):
        deltas.from_lora(tmp_path / "adapter", base)
    wrong = {"first.weight": torch.ones(40, 25), "second.weight": torch.ones(24, 40)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with (
        deltas.Checkpoint(tmp_path / "wrong.safetensors") as base,
        pytest.raises(ValueError, match=r"first.weight must be \[40, 24\]"),
    ):
        deltas.from_lora(tmp_path / "adapter", base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_name)
def test_antidote_zeroes_the_top_of_each_row(tmp_path, dtype):
    base = weights(dtype=dtype)
    path = write_file(tmp_path, base)
    generator = torch.Generator().manual_seed(1)
    norms = {name: torch.rand(shape[1], generator=generator) for name, shape in SHAPES.items() if len(shape) == 2}
    with deltas.Checkpoint(path) as checkpoint:
        delta = deltas.antidote(checkpoint, norms, 0.1)
        deltas.apply_to_checkpoint(checkpoint, delta, tmp_path / "out")
    result = read_all(tmp_path / "out")
    work = plain.wide(dtype)
    for name, norm in norms.items():
        scores = base[name].to(work).abs() * norm.to(work)
        expected = base[name].clone()
        for row, score in zip(expected, scores, strict=True):
            row[plain.order_of(score)[: int(0.1 * 24)]] = 0
        assert_same_bits(result[name] + 0.0, expected + 0.0)
    assert_same_bits(result["model.norm.weight"], base["model.norm.weight"])


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        ({"model.norm.weight": torch.ones(24)}, ValueError, "must be a floating weight"),
        ({"ids": torch.ones(7)}, ValueError, "must be a floating weight"),
        ({"model.layer.weight": torch.ones(23)}, ValueError, r"must be \[24\]"),
        ({"model.layer.weight": -torch.ones(24)}, ValueError, "at least 0"),
        ({"nothing": torch.ones(24)}, KeyError, "has no tensor nothing"),
    ],
)
def test_antidotes_bad_input(tmp_path, norms, error, message):
    with deltas.Checkpoint(write_file(tmp_path, weights())) as checkpoint, pytest.raises(error, match=message):
        deltas.antidote(checkpoint, norms, 0.1)
