"""`KeepScheduleCallback` in transformers' Trainer: ratios by step, and exactly the same after a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

import peft_kernels as pk

from ..support.accuracy import assert_same_bits
from .models import build, eliminated, tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS, STOP = 4, 2


class Watch(transformers.TrainerCallback):
    """Notes the ratio of each step."""

    def __init__(self):
        self.ratios = []

    def on_step_begin(self, args, state, control, **kwargs):
        layer = next(iter(pk.elimination.eliminating_layers(kwargs["model"]).values()))
        self.ratios.append(layer.elimination.options.keep)


def trainer_in(folder, *callbacks):
    model = build(dtype=torch.float32)
    eliminated(model, score="random", block_size=1, keep_ratio=0.2)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STOP,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 20)]
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks])


def test_a_run_continues_exactly_from_a_checkpoint(tmp_path):
    first, whole_watch = pk.KeepScheduleCallback(), Watch()
    whole = trainer_in(tmp_path, first, whole_watch)
    whole.train()
    assert first.schedule.steps == STEPS and first.schedule.completed_steps == STEPS
    assert whole_watch.ratios == pytest.approx([0.2, 0.4, 0.6, 0.8])
    checkpoint = tmp_path / f"checkpoint-{STOP}"
    saved = json.loads((checkpoint / "keep_schedule_state.json").read_text())
    assert saved["completed_steps"] == STOP and not list(checkpoint.glob(".*"))

    second, watch = pk.KeepScheduleCallback(start=0.9, steps=77), Watch()
    continued = trainer_in(tmp_path, second, watch)
    continued.train(resume_from_checkpoint=str(checkpoint))
    assert watch.ratios == whole_watch.ratios[STOP:]
    expected = whole.model.state_dict()
    for name, weight in continued.model.state_dict().items():
        assert_same_bits(weight, expected[name], name)

    (checkpoint / "keep_schedule_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no keep_schedule_state\.json"):
        trainer_in(tmp_path, pk.KeepScheduleCallback()).train(resume_from_checkpoint=str(checkpoint))


def test_it_goes_beside_a_schedule_of_what_trains(tmp_path):
    watch = Watch()
    callbacks = (pk.KeepScheduleCallback(0.5, steps=2, interval=2), pk.LISACallback(2, 3), watch)
    trainer_in(tmp_path, *callbacks).train()
    assert watch.ratios == [0.5, 0.5, 1.0, 1.0]
    names = {path.name for path in (tmp_path / f"checkpoint-{STOP}").iterdir()}
    assert {"keep_schedule_state.json", "schedule_state.json"} <= names


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "steps must be at least 1"), ({"interval": 0}, "interval must be"), ({"shape": "x"}, "shape must")],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        pk.KeepScheduleCallback(**options)
