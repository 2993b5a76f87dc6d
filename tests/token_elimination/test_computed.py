"""Which tokens layers computed in the latest call, and the loss of these alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peft_kernels
from peft_kernels import elimination

from .models import BLOCK, build, eliminated, gradients, layers_of, tokens


def shares_by_hand(model: torch.nn.Module, batch: int, length: int) -> Tensor:
    """Counted one layer, one sequence and one row at a time."""
    counts = torch.zeros(batch, length)
    layers = elimination.eliminating_layers(model).values()
    for layer in layers:
        kept = layer.elimination.latest[1]
        for row in range(batch * length) if kept is None else kept.tolist():
            if row >= 0:
                counts[row // length, row % length] += 1
    return counts / len(layers)


@pytest.mark.parametrize("select_every", [1, 2])
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 23)])
def test_shares_are_counts_over_layers(batch, length, select_every):
    model = build()
    eliminated(model, score="random", layers=[0, 1, 2, 3], select_every=select_every, seed=1)
    model(input_ids=tokens(batch, length))
    share = elimination.computed_share(model)
    assert share.shape == (batch, length)
    assert torch.equal(share, shares_by_hand(model, batch, length))
    assert share[:, : length // BLOCK * BLOCK].mean() == pytest.approx(0.5, abs=0.25)
    assert len(share.unique()) > 1


def test_rows_that_only_fill_up_count_for_no_token():
    model = build()
    eliminated(model, keep_ratio=None, threshold=1.4, score="norm", layers=[0, 1, 2, 3])
    model(input_ids=tokens(3, 24))
    rows = [layer.elimination.latest[1] for layer in elimination.eliminating_layers(model).values()]
    assert any((row < 0).any() for row in rows), "no selection is filled up"
    assert torch.equal(elimination.computed_share(model), shares_by_hand(model, 3, 24))


def test_a_layer_that_keeps_all_computed_every_token():
    model = build()
    eliminated(model, keep_ratio=None, layers=None, schedule={1: 1.0, 2: 0.5}, score="norm")
    model(input_ids=tokens())
    share = elimination.computed_share(model)
    assert set(share.unique().tolist()) == {0.5, 1.0}
    with pytest.warns(UserWarning, match="shorter than two blocks"):
        model(input_ids=tokens(2, BLOCK))
    assert torch.equal(elimination.computed_share(model), torch.ones(2, BLOCK))


def test_labels_of_tokens_that_were_passed_by_do_not_count():
    model, ids = build(), tokens(2, 22)
    eliminated(model, score="random", layers=[0, 1, 2, 3], seed=3)
    loss = peft_kernels.causal_lm_loss(model, ids, ids, token_mask="computed")
    share = elimination.computed_share(model)
    labels = ids.masked_fill(~elimination.computed_labels(model), -100)
    for sequence in range(2):
        for position in range(1, 22):
            counts = share[sequence, position - 1] >= 0.5 * share[sequence].max()
            assert labels[sequence, position] == (ids[sequence, position] if counts else -100)
    assert 0 < (labels == -100).sum() < labels.numel()
    found = gradients(model, loss)
    model.zero_grad()
    for layer in layers_of(model):  # the same selections again
        layer.elimination.selections._generators.clear()
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("keep", [0.0, 0.2])
def test_some_token_always_counts(keep):
    model, ids = build(), tokens(3, 24)
    eliminated(model, keep_ratio=keep, score="random", layers=[0, 1, 2, 3], seed=0)
    model(input_ids=ids)
    counted = elimination.computed_labels(model, 1.0)
    assert counted[:, 1:].any(1).all()


def test_recomputation_in_backward_changes_nothing():
    model, ids = build(), tokens(2, 22)
    eliminated(model, score="random", layers=[0, 1, 2, 3])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = peft_kernels.causal_lm_loss(model, ids, ids, token_mask="computed")
    before = elimination.computed_share(model)
    loss.backward()
    assert torch.equal(elimination.computed_share(model), before)


def test_evaluation_computes_all():
    model = build()
    eliminated(model, score="norm")
    model(input_ids=tokens(2, 22))
    assert elimination.computed_labels(model) is not None
    ids = tokens(1, 16)
    loss = peft_kernels.causal_lm_loss(model.eval(), ids, ids, token_mask="computed")
    assert elimination.computed_labels(model) is None
    torch.testing.assert_close(loss.float(), model(input_ids=ids, labels=ids).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "part", [lambda m: m, lambda m: m.model, lambda m: layers_of(m)[1]], ids=["model", "decoder", "layer"]
)
def test_compiled_layers_do_not_remember(part):
    model, ids = build(), tokens(2, 22)
    eliminated(model, score="norm")
    model(input_ids=ids)
    assert elimination.computed_labels(model) is not None
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="model is compiled"):
        elimination.computed_labels(wrapped)
    part(model).compile(backend="eager")
    with pytest.raises(RuntimeError, match="model is compiled"):
        elimination.computed_labels(model)


def test_what_cannot_be_said_is_refused():
    model, ids = build(), tokens(2, 22)
    with pytest.raises(ValueError, match="no layers that eliminate tokens"):
        elimination.computed_share(model)
    with pytest.raises(ValueError, match="no layers that eliminate tokens"):
        peft_kernels.causal_lm_loss(model, ids, ids, token_mask="computed")
    with pytest.raises(ValueError, match="token_mask must be bool"):
        peft_kernels.causal_lm_loss(model, ids, ids, token_mask="all")
    eliminated(model, score="norm")
    with pytest.raises(RuntimeError, match="must have been called"):
        elimination.computed_share(model)
    model(input_ids=ids)
    for least in (-0.1, 1.1, True, "half"):
        with pytest.raises(ValueError, match=r"least must be in \[0, 1\]"):
            elimination.computed_labels(model, least)
    layers = list(elimination.eliminating_layers(model).values())
    layers[0].elimination.latest = ((1, 22), None)
    with pytest.raises(RuntimeError, match="with one batch for all its layers"):
        elimination.computed_share(model)
