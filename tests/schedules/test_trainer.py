"""The callbacks in transformers' Trainer: the same as a plain loop, and exact after a checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import peft_kernels as pk
from peft_kernels.schedules import HFT, LISA, GreenTrainer

from ..support.accuracy import assert_same_bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, STOP, INTERVAL = 8, 5, 3
"""The checkpoint is in the middle of the second period."""

CALLBACKS = {
    "LISA": lambda seed=0, **options: pk.LISACallback(2, INTERVAL, seed=seed, **options),
    "HFT": lambda seed=0, **options: pk.HFTCallback(INTERVAL, seed=seed, **options),
    "GreenTrainer": lambda seed=0, **options: pk.GreenTrainerCallback(0.4, INTERVAL, **options),
}
EACH_CALLBACK = pytest.mark.parametrize("policy", CALLBACKS)


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def dataset():
    tokens = torch.randint(40, (40, 8), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_in(folder, callback, data=None, **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": STOP,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_grad_norm": 0.5,
        "warmup_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(**options | changes)
    return transformers.Trainer(tiny_llama(), arguments, train_dataset=data or dataset(), callbacks=[callback])


def assert_same_weights(model, other):
    expected = other.state_dict()
    for name, weight in model.state_dict().items():
        assert_same_bits(weight, expected[name], name)


class Watch(transformers.TrainerCallback):
    """Notes what trains in each step."""

    def __init__(self, callback):
        self.callback, self.trained = callback, []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trained.append(set(self.callback.schedule.training))


@EACH_CALLBACK
def test_a_run_continues_exactly_from_a_checkpoint_inside_a_period(tmp_path, policy):
    first = CALLBACKS[policy]()
    whole = trainer_in(tmp_path / "run", first)
    whole.add_callback(watch := Watch(first))
    initial = {name: weight.clone() for name, weight in whole.model.state_dict().items()}
    whole.train()
    assert first.schedule.completed_steps == STEPS
    assert len({frozenset(names) for names in watch.trained}) > 1
    assert any(not torch.equal(weight, initial[name]) for name, weight in whole.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in whole.model.parameters())

    checkpoint = tmp_path / "run" / f"checkpoint-{STOP}"
    state = json.loads((checkpoint / "schedule_state.json").read_text())
    assert set(state["training"]) == watch.trained[STOP - 1]
    assert not list(checkpoint.glob(".*"))

    second = CALLBACKS[policy](seed=7)
    continued = trainer_in(tmp_path / "run", second)
    continued.add_callback(again := Watch(second))
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert second.schedule.completed_steps == STEPS
    assert again.trained == watch.trained[STOP:]
    assert_same_weights(continued.model, whole.model)


@EACH_CALLBACK
def test_the_trainer_does_what_a_plain_loop_does(tmp_path, policy):
    callback = CALLBACKS[policy]()
    changes = {"save_strategy": "no", "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    trainer = trainer_in(tmp_path, callback, **changes)
    trainer.add_callback(watch := Watch(callback))
    trainer.train()

    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    sample = {"input_ids": torch.stack([row["input_ids"] for row in dataset()[:2]])}
    schedule = {
        "LISA": lambda: LISA(model, optimizer, active_layers=2, interval=INTERVAL),
        "HFT": lambda: HFT(model, optimizer, interval=INTERVAL),
        "GreenTrainer": lambda: GreenTrainer(model, optimizer, sample, rho=0.4, interval=INTERVAL),
    }[policy]()
    loader = trainer_in(tmp_path / "other", CALLBACKS[policy]()).get_train_dataloader()
    transformers.set_seed(3)
    batches = iter(loader)
    model.train()
    for step in range(STEPS):
        for _ in range(2):
            (model(**next(batches)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert set(schedule.training) == watch.trained[step]
        optimizer.zero_grad()
        schedule.step()
    expected = model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_optimizers_checkpoint_has_no_state_of_what_is_frozen(tmp_path):
    callback = CALLBACKS["LISA"]()
    trainer_in(tmp_path, callback).train()
    state = torch.load(tmp_path / f"checkpoint-{STOP}" / "optimizer.pt", weights_only=True)
    frozen = json.loads((tmp_path / f"checkpoint-{STOP}" / "schedule_state.json").read_text())["frozen"]
    held = sum(len(group["params"]) for group in state["param_groups"])
    assert frozen and len(state["state"]) == held - len(frozen)


def test_a_schedule_of_ones_own(tmp_path):
    callback = pk.ScheduleCallback(lambda model, optimizer: LISA(model, optimizer, 3, interval=2, seed=5))
    trainer_in(tmp_path, callback, save_strategy="no").train()
    assert repr(callback.schedule) == "LISA(active_layers=3, interval=2, seed=5)"
    assert callback.schedule.completed_steps == STEPS


def test_a_checkpoint_that_was_moved_is_named(tmp_path):
    trainer_in(tmp_path / "run", CALLBACKS["HFT"]()).train()
    moved = tmp_path / "kept"
    shutil.move(tmp_path / "run" / f"checkpoint-{STOP}", moved)
    shutil.rmtree(tmp_path / "run")
    trainer = trainer_in(tmp_path / "run", CALLBACKS["HFT"]())
    with pytest.raises(FileNotFoundError, match="give the callback its directory as resume_from_checkpoint"):
        trainer.train(resume_from_checkpoint=str(moved))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    callback = CALLBACKS["HFT"](resume_from_checkpoint=moved)
    trainer_in(tmp_path / "run", callback).train(resume_from_checkpoint=str(moved))
    assert callback.schedule.completed_steps == STEPS


@pytest.mark.parametrize(("content", "message"), [('{"format": ', "is damaged"), ("[]", "must hold a JSON object")])
def test_a_damaged_state_is_refused(tmp_path, content, message):
    trainer_in(tmp_path, CALLBACKS["LISA"]()).train()
    (tmp_path / f"checkpoint-{STOP}" / "schedule_state.json").write_text(content)
    trainer = trainer_in(tmp_path, CALLBACKS["LISA"]())
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_training_twice_starts_anew(tmp_path):
    callback = CALLBACKS["LISA"]()
    trainer = trainer_in(tmp_path, callback, save_strategy="no")
    trainer.train()
    first = callback.schedule
    trainer.train()
    assert callback.schedule is not first
    assert callback.schedule.completed_steps == STEPS


def test_data_without_indices_needs_a_sample_batch(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(dataset())

    with pytest.raises(ValueError, match="sample_batch must be given to GreenTrainerCallback"):
        trainer_in(tmp_path, CALLBACKS["GreenTrainer"](), Stream()).train()
    sample = {"input_ids": dataset()[0]["input_ids"][None]}
    callback = CALLBACKS["GreenTrainer"](sample_batch=sample)
    trainer_in(tmp_path, callback, Stream(), save_strategy="no").train()
    assert callback.schedule.flops.tensors["model.embed_tokens.weight"].weight_gradient == 8 * 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pk.LISACallback(active_layers=0), "active_layers must be an integer of at least 1"),
        (lambda: pk.LISACallback(interval=-1), "interval must be an integer of at least 1"),
        (lambda: pk.HFTCallback(norms="all"), "norms must be one of"),
        (lambda: pk.GreenTrainerCallback(rho=2), "rho must be in"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()
