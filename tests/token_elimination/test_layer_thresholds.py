"""Thresholds by layer in a `TokenEliminationConfig`, in its file, and what they cost."""

from __future__ import annotations

import json
import math

import pytest
import torch

import peft_kernels
from peft_kernels import TokenEliminationConfig, elimination

from .models import BLOCK, build, eliminated, layers_of, tokens


def thresholds_of(model):
    return {
        layer.elimination.index: layer.elimination.options.threshold
        for layer in elimination.eliminating_layers(model).values()
    }


def test_each_layer_gets_its_own():
    model, other, ids = build(dtype=torch.float32), build(dtype=torch.float32), tokens(length=26)
    values = {1: 2.5, 2: -math.inf}
    eliminated(model, score="norm", keep_ratio=None, threshold=values)
    assert thresholds_of(model) == values
    eliminated(other, score="norm", keep_ratio=None, threshold=0.0)
    elimination.set_thresholds(other, values)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert str(elimination.report(model)) == str(elimination.report(other))


def test_layers_that_share_a_selection_share_the_threshold_of_the_first():
    model = build()
    eliminated(model, layers=[0, 1, 3], score="norm", keep_ratio=0.5, threshold={0: 1, 3: 2.0}, select_every=2)
    assert thresholds_of(model) == {0: 1.0, 1: 1.0, 3: 2.0}


def test_found_thresholds_go_into_a_configuration():
    found = elimination.Thresholds({1: 0.5, 2: 0.25}, "norm", BLOCK)
    assert TokenEliminationConfig(threshold=found, layers=[1, 2]).threshold == {1: 0.5, 2: 0.25}


@pytest.mark.parametrize("given", [{1: 2.5}, {0: 1.0, 1: 2.5, 2: 1.0}, {0: 1.0, 1: 1.0}], ids=str)
def test_thresholds_of_other_layers_are_refused_and_the_model_stays(given):
    model = build()
    with pytest.raises(ValueError, match=r"threshold must be for the layers that select tokens, \[1, 2\], got"):
        eliminated(model, score="norm", keep_ratio=None, threshold=given)
    assert not elimination.eliminating_layers(model)
    eliminated(model)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ({}, "threshold must be a number, or map indices of layers to numbers"),
        ({-1: 0.5}, "an index of threshold must be an integer of at least 0, got -1"),
        ({"1": 0.5}, "an index of threshold must be an integer of at least 0, got '1'"),
        ({1: math.nan}, r"threshold\[1\] must be a finite number, got nan"),
        ({1: math.inf}, r"threshold\[1\] must be a finite number, got inf"),
        ({1: None}, r"threshold\[1\] must be a finite number, got None"),
        (-math.inf, "threshold must be a finite number, got -inf"),
    ],
)
def test_bad_thresholds_are_refused(threshold, message):
    with pytest.raises(ValueError, match=message):
        TokenEliminationConfig(threshold=threshold)


@pytest.mark.parametrize("threshold", [0.25, {3: 0.1 + 0.2, 1: -math.inf, 12: 5}, None])
def test_a_file_holds_one_threshold_or_many(threshold, tmp_path):
    config = TokenEliminationConfig(keep_ratio=0.5, threshold=threshold)
    config.save(tmp_path)
    text = (tmp_path / "token_elimination.json").read_text()
    assert TokenEliminationConfig.load(tmp_path) == config and "Infinity" not in text
    if isinstance(threshold, dict):
        assert json.loads(text)["threshold"] == {"1": None, "3": 0.1 + 0.2, "12": 5.0}


def test_a_file_with_a_threshold_for_no_layer_is_refused(tmp_path):
    (tmp_path / "token_elimination.json").write_text('{"threshold": {"one": 0.5}}')
    with pytest.raises(ValueError, match="threshold must have indices of layers as keys, got 'one'"):
        TokenEliminationConfig.load(tmp_path)


def test_what_thresholds_cost():
    model, ids = build(dtype=torch.float32), tokens(2, 42)
    eliminated(model, score="norm", keep_ratio=None, threshold=0.0)
    before, options = str(elimination.report(model)), thresholds_of(model)
    norms = []
    for index in (1, 2):
        elimination.observation.observe(
            model, {index: layers_of(model)[index]}, ids, lambda _, hidden, __: norms.append(hidden.norm(dim=-1))
        )
    values = {1: float(norms[0][:, :40].unflatten(1, (10, BLOCK)).amax(2).median()), 2: -math.inf}
    costs = elimination.threshold_costs(model, values, [ids])
    assert str(elimination.report(model)) == before and thresholds_of(model) == options and model.training
    with torch.no_grad():
        dense = float(build(dtype=torch.float32).eval()(input_ids=ids, labels=ids).loss)
        other = build(dtype=torch.float32)
        eliminated(other, score="norm", keep_ratio=None, threshold=values, train_only=False)
        loss = float(other.eval()(input_ids=ids, labels=ids).loss)
    assert costs.loss_dense == dense and costs.loss == pytest.approx(loss, rel=1e-6)
    first, second = costs.layers
    # Half of the blocks, the middle one of all among them, and the two tokens behind them.
    assert (first.index, first.threshold, first.kept) == (1, values[1], (11 * BLOCK + 4) / 84)
    assert (second.index, second.kept) == (2, 1.0)
    assert first.loss_change == pytest.approx(loss - dense, rel=1e-4) and abs(second.loss_change) < 1e-4
    assert costs.mean_kept == (first.kept + 1) / 2


@pytest.mark.parametrize(
    ("thresholds", "batches", "message"),
    [
        ({1: 0.0}, [tokens()], r"thresholds must be for layers \[1, 2\], which select tokens, got \[1\]"),
        ({1: 0.0, 2: 0.0}, [], "batches must hold at least one batch, got none"),
    ],
)
def test_costs_of_what_does_not_fit_are_refused(thresholds, batches, message):
    model = build()
    eliminated(model, score="norm", keep_ratio=None, threshold=0.0)
    with pytest.raises(ValueError, match=message):
        elimination.threshold_costs(model, thresholds, batches)


def test_progress_is_told_of_each_evaluation():
    model, seen = build(dtype=torch.float32), []
    peft_kernels.inject(model, TokenEliminationConfig(threshold=0.0, layers=[1, 2], block_size=BLOCK, score="norm"))
    _, report = elimination.refine_thresholds(
        model, [tokens(2, 42)], max_evaluations=5, progress=lambda done, loss: seen.append((done, loss))
    )
    assert [done for done, _ in seen] == list(range(1, report.evaluations + 1))
    assert seen[0][1] == report.loss_dense and report.loss in [loss for _, loss in seen]
