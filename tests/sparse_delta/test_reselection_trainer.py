"""`SparseDeltaCallback` in transformers' Trainer: the same as a plain loop, and exact after a checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.nn import SparseDeltaLinear

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import layers_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SETTINGS = {"reselection_steps": 4, "selection_accumulation_steps": 3, "initial_reselection_rate": 0.5}
STEPS = 9
STOP = 5
"""In the middle of the window of the steps 5, 6 and 7."""


def tiny_llama():
    """Two layers, random weights, some linear layers with deltas."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(("q_proj", "down_proj")):
            layer = SparseDeltaLinear.from_linear(module, num_deltas=20, generator=generator)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return model


def dataset():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(40, (60, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_optimizer(name, model):
    values = [layer.values for layer in layers_of(model)]
    return {
        "AdamW": lambda: torch.optim.AdamW(values, lr=0.01),
        "SparseAdamW": lambda: pk.optim.SparseAdamW(values, lr=0.01),
        "SparseSM3": lambda: pk.optim.SparseSM3(values, lr=0.01),
        "Trainer's own": lambda: None,
    }[name]()


def trainer_in(folder, callback, optimizer="SparseAdamW", **changes):
    model = tiny_llama()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STOP,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        max_grad_norm=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **changes,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=dataset(),
        callbacks=[callback],
        optimizers=(make_optimizer(optimizer, model), None),
    )


def assert_same_layers(model, other):
    for layer, expected in zip(layers_of(model), layers_of(other), strict=True):
        for name, tensor in layer.state_dict().items():
            assert_same_bits(tensor, expected.state_dict()[name], name)


@pytest.mark.parametrize(
    ("selection", "optimizer"),
    [("rigl", "Trainer's own"), ("rigl", "SparseAdamW"), ("sm3", "SparseSM3"), ("random", "AdamW")],
)
def test_a_run_continues_exactly_from_a_checkpoint_inside_a_window(tmp_path, selection, optimizer):
    first = pk.SparseDeltaCallback(selection, seed=1, **SETTINGS)
    whole = trainer_in(tmp_path / "run", first, optimizer)
    initial = [layer.indices.clone() for layer in layers_of(whole.model)]
    whole.train()
    assert first.reselector.completed_steps == STEPS
    assert first.reselector.timetable.total_steps == STEPS
    assert all(layer.gradient_observer is None for layer in layers_of(whole.model))
    assert any(
        not torch.equal(layer.indices, indices) for layer, indices in zip(layers_of(whole.model), initial, strict=True)
    )
    checkpoint = tmp_path / "run" / f"checkpoint-{STOP}"
    names = {path.name for path in checkpoint.iterdir() if "reselection" in path.name}
    assert names == {"reselection_state.json", "reselection_state.safetensors"}

    second = pk.SparseDeltaCallback(selection, seed=2, **SETTINGS)
    continued = trainer_in(tmp_path / "run", second, optimizer)
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert second.reselector.completed_steps == STEPS
    assert_same_layers(continued.model, whole.model)


def test_the_trainer_does_what_a_plain_loop_does(tmp_path):
    callback = pk.SparseDeltaCallback(**SETTINGS)
    trainer = trainer_in(tmp_path, callback, "SparseAdamW", lr_scheduler_type="constant", save_strategy="no")
    trainer.train()

    model = tiny_llama()
    values = [layer.values for layer in layers_of(model)]
    optimizer = pk.optim.SparseAdamW(values, lr=0.01)
    reselector = pk.Reselector(model, optimizer, total_steps=STEPS, **SETTINGS)
    loader = trainer_in(tmp_path / "other", pk.SparseDeltaCallback()).get_train_dataloader()
    transformers.set_seed(3)
    batches = iter(loader)
    for _ in range(STEPS):
        parts = [next(batches) for _ in range(2)]
        for part in parts:
            (model(**part).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(values, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
    for layer, expected in zip(layers_of(trainer.model), layers_of(model), strict=True):
        assert_same_bits(layer.indices, expected.indices)
        torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_that_was_moved_is_named(tmp_path):
    trainer_in(tmp_path / "run", pk.SparseDeltaCallback(**SETTINGS)).train()
    moved = tmp_path / "kept"
    shutil.move(tmp_path / "run" / f"checkpoint-{STOP}", moved)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="give SparseDeltaCallback its directory as resume_from_checkpoint"):
        trainer_in(tmp_path / "run", pk.SparseDeltaCallback(**SETTINGS)).train(resume_from_checkpoint=str(moved))
    callback = pk.SparseDeltaCallback(**SETTINGS, resume_from_checkpoint=moved)
    trainer_in(tmp_path / "run", callback).train(resume_from_checkpoint=str(moved))
    assert callback.reselector.completed_steps == STEPS


@pytest.mark.parametrize("name", ["reselection_state.json", "reselection_state.safetensors"])
def test_damaged_files_are_refused(tmp_path, name):
    trainer_in(tmp_path, pk.SparseDeltaCallback(**SETTINGS)).train()
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    trainer = trainer_in(tmp_path, pk.SparseDeltaCallback(**SETTINGS))
    with pytest.raises(ValueError, match="is damaged"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(layer.gradient_observer is None for layer in layers_of(trainer.model))


def test_training_twice_starts_anew(tmp_path):
    callback = pk.SparseDeltaCallback(**SETTINGS)
    trainer = trainer_in(tmp_path, callback, save_strategy="no")
    trainer.train()
    first = callback.reselector
    trainer.train()
    assert callback.reselector is not first
    assert callback.reselector.completed_steps == STEPS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": "best"}, "selection must be one of"),
        ({"reselection_steps": 0}, "reselection_steps must be an integer of at least 1"),
        ({"schedule": "step"}, "schedule must be one of"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        pk.SparseDeltaCallback(**arguments)
