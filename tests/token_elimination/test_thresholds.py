"""Thresholds by layer: set, kept in a file, and found within a tolerance of the loss."""

from __future__ import annotations

import json
import math

import pytest
import torch

import peft_kernels
from peft_kernels import elimination

from .models import BLOCK, build, fixed_scores, layers_of, tokens


def confident(**options):
    """A model that is sure of what it predicts, so that it matters what its layers compute."""
    model = build(dtype=torch.float32, **options)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def thresholded(score="norm", model=None, **options):
    """A model of which the two layers in the middle eliminate tokens below a threshold that is still to be found."""
    model = model or confident()
    options = {"threshold": 0.0, "layers": [1, 2], "block_size": BLOCK, "score": score, **options}
    peft_kernels.inject(model, peft_kernels.TokenEliminationConfig(**options))
    return model


def labelled(ids):
    """A batch whose labels are what `confident()` predicts when it computes for all tokens."""
    with torch.no_grad():
        predicted = confident().eval()(input_ids=ids).logits.argmax(-1)
    return {"input_ids": ids, "labels": torch.nn.functional.pad(predicted[:, :-1], (1, 0), value=-100)}


@pytest.fixture(scope="module")
def batches():
    return [labelled(tokens(2, 42, seed)) for seed in range(2)]


def options_of(model):
    return {
        layer.elimination.index: layer.elimination.options for layer in elimination.eliminating_layers(model).values()
    }


def loss_of(model, batches, thresholds=None):
    """The mean loss in evaluation: dense, or with tokens eliminated by a model that always does."""
    if thresholds is not None:
        elimination.set_thresholds(model, thresholds)
    with torch.no_grad():
        losses = [model.eval()(**batch).loss for batch in batches]
    return float(sum(losses)) / len(batches)


@pytest.mark.parametrize("score", ["norm", "attention"])
@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_the_loss_stays_within_the_tolerance(score, tolerance, batches):
    dense = loss_of(confident(), batches)
    thresholds, report = elimination.refine_thresholds(
        thresholded(score), batches, keep=0.6, tolerance=tolerance, step=0.2, max_evaluations=25
    )
    assert (thresholds.score, thresholds.block_size, list(thresholds)) == (score, BLOCK, [1, 2])
    assert report.loss_dense == dense and report.loss <= (1 + tolerance) * dense
    loss = loss_of(thresholded(score, train_only=False), batches, thresholds)
    assert loss == pytest.approx(report.loss, rel=1e-5)
    assert report.evaluations <= 25


def test_a_larger_tolerance_drops_more(batches):
    kept = []
    for tolerance in (0.0, 0.3, 1e3):
        _, report = elimination.refine_thresholds(thresholded(), batches, tolerance=tolerance, step=0.25)
        assert report.stopped == "no layer can drop more"
        kept.append(report.mean_kept)
    assert kept[0] > kept[1] > kept[2]
    # One calibration block, and what is behind the last whole block of each of four sequences.
    assert report.kept[1] == (BLOCK + 4 * 2) / (4 * 42)


def test_it_begins_at_quantiles_of_the_scores(batches):
    found = {}
    for keep in (0.9, 0.5, 0.2, 1.0):
        model = thresholded("predictor")
        elimination.set_predictors(model, dict.fromkeys((1, 2), fixed_scores))
        found[keep] = elimination.refine_thresholds(model, batches, keep=keep, tolerance=100.0, max_evaluations=2)
        assert found[keep][1].stopped == "max_evaluations was reached"
    scores = torch.cat([fixed_scores(batch["input_ids"][..., None]) for batch in batches]).flatten()
    for keep, (thresholds, report) in found.items():
        for index in (1, 2):
            share = float((scores >= thresholds[index]).float().mean())
            assert share == pytest.approx(keep, abs=0.05)
            assert report.kept[index] == pytest.approx((share * 40 + 2) / 42)
    ordered = [found[keep][0][1] for keep in (1.0, 0.9, 0.5, 0.2)]
    assert ordered == sorted(ordered) and ordered[0] == -math.inf
    assert found[1.0][1].loss == found[1.0][1].loss_dense


def test_layers_whose_tokens_cost_least_drop_most(batches):
    model = confident()
    with torch.no_grad():  # layer 2 adds next to nothing
        for projection in (layers_of(model)[2].self_attn.o_proj, layers_of(model)[2].mlp.down_proj):
            projection.weight.mul_(1e-5)
    _, report = elimination.refine_thresholds(thresholded(model=model), batches, keep=0.9, tolerance=1e-3, step=0.2)
    assert report.kept[2] < 0.2 < report.kept[1]
    assert "layer 2: " in str(report) and f"{report.evaluations} evaluations" in str(report)


@pytest.mark.parametrize("most", [2, 3, 7])
def test_evaluations_are_bounded(most, batches):
    model, calls = thresholded(), []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    _, report = elimination.refine_thresholds(model, batches, max_evaluations=most)
    assert report.evaluations <= most and len(calls) == report.evaluations * len(batches)


def test_the_model_is_left_as_it_was_and_the_same_is_found_again(batches):
    model = thresholded()
    model(**batches[0])
    layers_of(model)[1].elimination.dense_calls["a reason"] = 3
    flags, options, counts = [m.training for m in model.modules()], options_of(model), str(elimination.report(model))
    found = [elimination.refine_thresholds(model, batches, max_evaluations=12) for _ in range(2)]
    assert dict(found[0][0]) == dict(found[1][0]) and found[0][1] == found[1][1]
    assert [m.training for m in model.modules()] == flags and options_of(model) == options
    assert str(elimination.report(model)) == counts and layers_of(model)[1].elimination.dense_calls["a reason"] == 3
    assert torch.is_grad_enabled() and not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_batches_may_hold_labels_and_padding():
    ids = tokens(2, 42, 9)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :9], labels[1, :20] = 0, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    _, report = elimination.refine_thresholds(thresholded(), [batch], tolerance=0.2, step=0.3)
    with torch.no_grad():
        assert report.loss_dense == float(confident().eval()(**batch).loss)


def test_layers_that_share_a_selection_share_a_threshold(batches):
    model = thresholded("norm", layers=[0, 1, 2, 3], select_every=2)
    elimination.set_thresholds(model, {0: 1.5, 2: -math.inf})
    assert [options.threshold for options in options_of(model).values()] == [1.5, 1.5, -math.inf, -math.inf]
    with pytest.raises(ValueError, match=r"for layers that select tokens, \[0, 2\], got 1"):
        elimination.set_thresholds(model, {0: 0.0, 1: 0.0})
    assert options_of(model)[0].threshold == 1.5
    thresholds, report = elimination.refine_thresholds(model, batches[:1], tolerance=0.1, max_evaluations=6)
    assert list(thresholds) == list(report.kept) == [0, 2]


@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        ({}, ValueError, "must map indices of layers to numbers, at least one"),
        ({3: 0.0}, ValueError, r"for layers that select tokens, \[1, 2\], got 3"),
        ({1: 1.0, 2: "high"}, TypeError, r"thresholds\[2\] must be a number, got 'high'"),
        ({1: 1.0, 2: math.nan}, ValueError, r"thresholds\[2\] must be finite, or -inf"),
        ({1: 1.0, 2: math.inf}, ValueError, r"thresholds\[2\] must be finite, or -inf"),
        ({-1: 1.0}, ValueError, "an index of thresholds must be at least 0, got -1"),
        (elimination.Thresholds({1: 1.0}, "attention", BLOCK), ValueError, "of score='attention' in blocks of 4"),
        (
            elimination.Thresholds({1: 1.0}, "norm", 8),
            ValueError,
            "blocks of 8, layer 1 has score='norm' in blocks of 4",
        ),
    ],
)
def test_bad_thresholds_are_refused_and_none_is_set(thresholds, error, message):
    model = thresholded()
    with pytest.raises(error, match=message):
        elimination.set_thresholds(model, thresholds)
    assert all(options.threshold == 0.0 for options in options_of(model).values())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"batches": []}, "batches must hold at least one batch"),
        ({}, {"batches": [tokens(2, 3)]}, "whole blocks of 4 tokens, and layer 1 saw none"),
        ({}, {"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({}, {"step": 1.0}, r"step must be in \(0, 1\), got 1.0"),
        ({}, {"tolerance": -0.1}, "tolerance must be a number of at least 0, got -0.1"),
        ({}, {"tolerance": math.nan}, "tolerance must be a number of at least 0, got nan"),
        ({}, {"max_evaluations": 1}, "max_evaluations must be at least 2, got 1"),
        ({"keep_ratio": 0.5}, {}, "layer 1 must have keep ratio 1 for its threshold to decide alone, got 0.5"),
        ({"score": "random"}, {}, "cannot be of score='random': its scores are random"),
        ({"score": "gradient"}, {}, "cannot be of score='gradient'"),
    ],
)
def test_refinement_refuses(model, options, message, batches):
    model = thresholded(**model)
    before = options_of(model)
    with pytest.raises(ValueError, match=message):
        elimination.refine_thresholds(model, options.pop("batches", batches), **options)
    assert options_of(model) == before and model.training


def test_a_model_that_eliminates_nothing_is_refused():
    for call in (elimination.set_thresholds, elimination.refine_thresholds):
        with pytest.raises(ValueError, match="model must have layers that eliminate tokens, and has none"):
            call(build(), {1: 0.0})


def test_what_is_saved_is_what_is_loaded(tmp_path):
    found = elimination.Thresholds({7: 0.1 + 0.2, 0: -math.inf, 2: 3}, "norm", BLOCK, "somebody/model")
    found.save(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["token_thresholds.json"]
    loaded = elimination.Thresholds.load(tmp_path / "new")
    assert dict(loaded) == {0: -math.inf, 2: 3.0, 7: 0.1 + 0.2} and len(loaded) == 3
    assert (loaded.score, loaded.block_size, loaded.base_model) == ("norm", BLOCK, "somebody/model")


def test_damaged_files_are_refused(tmp_path):
    elimination.Thresholds({1: 0.5}, "norm", BLOCK).save(tmp_path)
    path = tmp_path / "token_thresholds.json"
    values = json.loads(path.read_text())
    for change, message in (
        ({"kind": "LORA"}, "must hold a JSON object of kind 'TOKEN_ELIMINATION_THRESHOLDS'"),
        ({"thresholds": [1]}, "must hold thresholds by index of the layer"),
        ({"thresholds": {"one": 1}}, "must hold thresholds by index of the layer"),
        ({"thresholds": {"1": "high"}}, r"thresholds\[1\] must be a number, got 'high'"),
        ({"score": None}, "must name the score, got None"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises((ValueError, TypeError), match=message):
            elimination.Thresholds.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no token_thresholds.json"):
        elimination.Thresholds.load(tmp_path)
