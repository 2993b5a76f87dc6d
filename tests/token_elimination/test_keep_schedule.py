"""`KeepSchedule` and `set_keep_ratio`: the share of kept tokens moves with the steps, and comes again when resumed."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch

import peft_kernels
from peft_kernels import elimination, ops
from peft_kernels.elimination import KeepSchedule, set_keep_ratio

from .models import BLOCK, build, eliminated, gradients, layers_of, tokens


def ratios_of(model):
    return {
        layer.elimination.index: layer.elimination.options.keep
        for layer in elimination.eliminating_layers(model).values()
    }


def kept_in(model, ids):
    """How many tokens each layer keeps of a call."""
    before = [row.kept_tokens for row in elimination.report(model).eliminating]
    model(input_ids=ids)
    return [row.kept_tokens - first for row, first in zip(elimination.report(model).eliminating, before, strict=True)]


@pytest.mark.parametrize("score", ["attention", "norm", "random", "predictor", "gradient"])
def test_a_ratio_holds_from_the_next_call_on(score):
    model, ids = build(dtype=torch.float32), tokens(length=20)
    eliminated(model, score=score)
    for ratio in (0.5, 0.2, 1.0, {2: 0.4}, {1: 0.0}, 0.8):
        set_keep_ratio(model, ratio)
        if score == "gradient":
            elimination.score_by_gradient(model, input_ids=ids, labels=ids)
        expected = [2 * ops.kept_tokens(20, keep, BLOCK) for keep in ratios_of(model).values()]
        assert kept_in(model, ids) == expected
    assert list(ratios_of(model).values()) == [0.8, 0.8]


def test_a_ratio_is_the_most_that_a_threshold_keeps():
    model, ids = build(dtype=torch.float32), tokens(length=20)
    eliminated(model, score="norm", keep_ratio=None, threshold=-1e9)
    with pytest.warns(UserWarning, match="no block of this call scores below its threshold"):
        assert kept_in(model, ids) == [0, 0]  # of no call that drops anything
    set_keep_ratio(model, 0.4)
    assert kept_in(model, ids) == [16, 16]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (1.5, r"ratio must be in \[0, 1\], got 1.5"),
        (float("nan"), r"ratio must be in \[0, 1\], got nan"),
        (True, r"ratio must be in \[0, 1\], got True"),
        ({1: 0.1, 3: 0.1}, r"ratio must be for layers that eliminate tokens, \[1, 2\], got 3"),
        ({1: 0.1, 2: -1}, r"ratio\[2\] must be in \[0, 1\], got -1"),
        ({True: 0.5}, r"ratio must be for layers that eliminate tokens, \[1, 2\], got True"),
    ],
)
def test_a_bad_ratio_is_refused_and_none_is_set(ratio, message):
    model = build()
    eliminated(model)
    with pytest.raises(ValueError, match=message):
        set_keep_ratio(model, ratio)
    assert ratios_of(model) == {1: 0.5, 2: 0.5}


def test_a_model_that_eliminates_nothing_is_refused():
    for call in (lambda m: set_keep_ratio(m, 0.5), lambda m: KeepSchedule(m, steps=2)):
        with pytest.raises(ValueError, match="model must have layers that eliminate tokens, and has none"):
            call(build())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 4}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]),
        ({"steps": 4, "shape": "cosine"}, [0.2, 0.31716, 0.6, 0.88284, 1.0, 1.0]),
        ({"steps": 5, "interval": 2}, [0.2, 0.2, 0.52, 0.52, 0.84, 1.0]),
        ({"steps": 4, "interval": 9}, [0.2, 0.2, 0.2, 0.2, 1.0, 1.0]),
        ({"steps": 1}, [0.2, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"steps": 4, "end": 0.6}, [0.2, 0.3, 0.4, 0.5, 0.6, 0.6]),
        ({"steps": 2, "start": 1.0, "end": 0.0}, [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_ratios_move_with_the_steps(options, expected):
    model = build()
    eliminated(model, keep_ratio=0.2)
    schedule = KeepSchedule(model, **options)
    found, changed = [ratios_of(model)], []
    for _ in expected[1:]:
        changed.append(schedule.step())
        found.append(ratios_of(model))
    assert [ratios[1] for ratios in found] == pytest.approx(expected, abs=1e-5)
    assert all(ratios[1] == ratios[2] for ratios in found) and found[-1][1] == expected[-1]
    assert changed == [left != right for left, right in itertools.pairwise(found)]
    assert [schedule.at(step) for step in range(len(expected))] == found


def test_every_layer_moves_along_its_own_line():
    model = build()
    eliminated(model, schedule={0: 0.2, 1: 0.4, 3: 0.8}, keep_ratio=None, layers=None)
    schedule = KeepSchedule(model, start={0: 0.0}, end={0: 1.0, 3: 0.6}, steps=4)
    assert ratios_of(model) == {0: 0.0, 1: 0.4, 3: 0.8}
    schedule.step()
    assert ratios_of(model) == pytest.approx({0: 0.25, 1: 0.4, 3: 0.75})
    schedule.close()
    assert not schedule.step() and ratios_of(model)[0] == 0.25
    assert "start={0: 0.0, 1: 0.4, 3: 0.8}" in repr(schedule) and "steps=4, shape='linear'" in repr(schedule)


def trained(model, schedule, optimizer, steps):
    """The losses of steps, and what they kept."""
    losses = []
    for step in steps:
        loss = model(input_ids=(ids := tokens(length=24, seed=step)), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append((loss.item(), elimination.report(model).eliminating[0].kept_tokens))
    return losses


@pytest.mark.parametrize("select_every", [1, 2])
def test_a_run_continues_from_its_state_to_the_bit(select_every):
    def parts(start=0.25):
        model = build(dtype=torch.float32)
        eliminated(model, score="random", block_size=1, keep_ratio=start, select_every=select_every)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    model, optimizer = parts()
    schedule = KeepSchedule(model, steps=4, interval=2)
    trained(model, schedule, optimizer, range(3))
    saved = json.loads(json.dumps(schedule.state_dict()))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, counted = torch.get_rng_state(), elimination.report(model).eliminating[0].kept_tokens
    expected = trained(model, schedule, optimizer, range(3, 6))

    model, optimizer = parts(start=0.9)
    model.load_state_dict(weights)
    schedule = KeepSchedule(model, steps=100)
    schedule.load_state_dict(saved)
    torch.set_rng_state(generator)
    found = trained(model, schedule, optimizer, range(3, 6))
    assert found == [(loss, kept - counted) for loss, kept in expected]
    assert schedule.completed_steps == 6 and ratios_of(model) == {1: 1.0, 2: 1.0}


def test_keeping_all_before_the_ratio_is_one_is_no_failure():
    """Blocks are rounded up, so that the last ratios of a schedule keep everything."""
    model, ids = build(dtype=torch.float32), tokens(length=24)
    eliminated(model, score="norm", block_size=8, keep_ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = KeepSchedule(model, steps=4)
        kept = []
        for _ in range(5):
            kept.append(kept_in(model, ids)[0])
            schedule.step()
    assert kept == [32, 32, 48, 48, 48]
    row = elimination.report(model).eliminating[0]
    assert row.calls == 5 and not row.dense_calls
    schedule.close()
    set_keep_ratio(model, 0.9)
    with pytest.warns(UserWarning, match=r"keep=0.9, rounded up to whole blocks, is all of them"):
        model(input_ids=ids)


def test_a_schedule_that_never_drops_anything_says_so():
    model = build(dtype=torch.float32)
    eliminated(model, score="norm", block_size=8, keep_ratio=0.8)
    KeepSchedule(model, steps=4)
    with pytest.warns(UserWarning, match="rounded up to whole blocks, is all of them"):
        model(input_ids=tokens(length=24))


def test_all_kept_is_the_dense_model():
    model, ids = build(), tokens(length=24)
    expected = model(input_ids=ids, labels=ids).loss
    wanted = gradients(model, expected)
    eliminated(model, score="random", keep_ratio=0.25)
    schedule = KeepSchedule(model, steps=2)
    schedule.step(), schedule.step()
    loss = model(input_ids=ids, labels=ids).loss
    found = gradients(model, loss)
    torch.testing.assert_close(loss, expected)
    assert all(torch.allclose(found[name], grad, atol=1e-6, rtol=1e-4) for name, grad in wanted.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"shape": "square"}, ValueError, "shape must be one of linear, cosine, got 'square'"),
        ({"start": 2}, ValueError, r"start must be in \[0, 1\], got 2"),
        ({"end": {7: 1.0}}, ValueError, r"end must be for layers that eliminate tokens, \[1, 2\], got 7"),
        ({"start": 0.1, "end": "all"}, ValueError, r"end must be in \[0, 1\], got 'all'"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_changes(options, error, message):
    model = build()
    eliminated(model)
    with pytest.raises(error, match=message):
        KeepSchedule(model, **{"steps": 4, **options})
    assert ratios_of(model) == {1: 0.5, 2: 0.5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, ValueError, "state must have format 1, got 2"),
        ({"schedule": "LISA"}, ValueError, "state must have schedule 'KeepSchedule', got 'LISA'"),
        ({"completed_steps": -1}, ValueError, "completed_steps of the state must be at least 0, got -1"),
        ({"steps": "4"}, TypeError, "steps must be an integer, got '4'"),
        ({"shape": "other"}, ValueError, "shape must be one of"),
        ({"start": {"1": 0.5}}, ValueError, r"state must have start for layers \['1', '2'\], got \['1'\]"),
        ({"end": [1, 2]}, ValueError, r"state must have end for layers \['1', '2'\], got \[1, 2\]"),
        ({"end": {"1": 0.5, "2": 7}}, ValueError, r"end\[2\] of the state must be in \[0, 1\], got 7"),
        ({"interval": None}, TypeError, "interval must be an integer, got None"),
        (None, ValueError, "state must be a KeepSchedule's state_dict, but has no completed_steps"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, error, message):
    model = build()
    eliminated(model)
    schedule = KeepSchedule(model, steps=4)
    schedule.step()
    state, before = schedule.state_dict(), ratios_of(model)
    with pytest.raises(error, match=message):
        schedule.load_state_dict({} if change is None else {**state, **change})
    assert schedule.state_dict() == state and ratios_of(model) == before


def test_layers_that_were_made_one_by_one_move_too():
    model = build(dtype=torch.float32)
    own = layers_of(model)
    own[1] = peft_kernels.nn.TokenElimination(own[1], 0.25, BLOCK, "norm")
    schedule = KeepSchedule(torch.compile(model, backend="eager"), steps=2)
    schedule.step()
    assert own[1].elimination.options.keep == 0.625
