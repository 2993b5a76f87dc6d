"""Caches in training: kept tokens are computed as without one, and nothing goes on from one that lacks tokens."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from peft_kernels.nn import selective_layer

from .models import VOCABULARY, build, eliminated, tokens


def test_a_cache_takes_nothing_from_kept_tokens(monkeypatch):
    """transformers makes a cache by default, in training too; attention of kept tokens is lean all the same."""
    ids, calls, lean = tokens(), [], selective_layer.lean_attention
    monkeypatch.setattr(selective_layer, "lean_attention", lambda *args: calls.append(args) or lean(*args))
    model = build(use_cache=True)
    eliminated(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_nothing_goes_on_from_a_cache_that_lacks_tokens():
    model, ids = build(use_cache=True, num_hidden_layers=2), tokens(1, 20)
    eliminated(model, layers=[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of training loops that never look at it
        cache = model(input_ids=ids).past_key_values
    for training in (False, True):
        with pytest.raises(RuntimeError, match="past_key_values must hold every token, but comes from a call in which"):
            model.train(training)(input_ids=ids[:, :1], past_key_values=cache)
    cache = model.eval()(input_ids=ids).past_key_values
    model(input_ids=ids[:, :1], past_key_values=cache)
    assert pickle.loads(pickle.dumps(model))(input_ids=ids).logits.shape == (1, 20, VOCABULARY)


def test_an_empty_cache_is_none_to_go_on_from_either():
    model, ids = build(use_cache=True, num_hidden_layers=2), tokens(1, 20)
    eliminated(model, layers=[0, 1])
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(RuntimeError, match=r"fill a cache under torch\.no_grad\(\)"):
        model.eval()(input_ids=ids[:, :1], past_key_values=cache)
    with torch.no_grad(), pytest.warns(UserWarning, match="which has to hold every token"):
        cache = model.train()(input_ids=ids).past_key_values
    model.eval()(input_ids=ids[:, :1], past_key_values=cache)
