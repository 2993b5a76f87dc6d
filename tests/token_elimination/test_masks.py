"""What attention gets for kept tokens: padding, packed documents, masks of every form, positions without gaps."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels
from peft_kernels.nn.kept_tokens import (
    Kept,
    compacted_lengths,
    compacted_positions,
    documents,
    gathered_mask,
    mask_obstacle,
    padding_of,
    visible_from,
)
from peft_kernels.nn.token_scores import norm_scores

from . import models
from .models import BLOCK, assert_same_gradients, build, eliminated, gradients, layers_of, tokens

LENGTH = 22


def padded(side):
    """Two sequences of which the second has 9 tokens of padding, on one side."""
    ids, mask = tokens(), torch.ones(2, LENGTH, dtype=torch.int64)
    where = slice(0, 9) if side == "left" else slice(LENGTH - 9, LENGTH)
    ids[1, where], mask[1, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(side, attention):
    # Eager attention casts to float32, where the smallest float64 hides a whole row.
    model, batch = build(attention=attention, dtype=torch.float32), padded(side)
    eliminated(model)
    loss = model(**batch).loss
    expected = models.plainly(model, 0.5, batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_of_one_sequence(attention):
    ids = tokens(1)
    position_ids = torch.cat((torch.arange(9), torch.arange(4), torch.arange(9)))[None]
    model, batch = build(attention=attention), {"input_ids": ids, "labels": ids, "position_ids": position_ids}
    eliminated(model)
    loss = model(**batch).loss
    expected = models.plainly(model, 0.5, batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
    alone = model(input_ids=ids, labels=ids).loss
    assert (loss - alone).abs() > 1e-4, "documents would not be told apart"


@pytest.mark.parametrize("score", ["attention", "norm", "random"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_kept_last(score, side):
    model, batch = build(), padded(side)
    eliminated(model, score=score, keep_ratio=0.4, block_size=3)
    kept = []
    layers_of(model)[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**batch)
    # Blocks of 3: 7 whole ones, of which 3 are kept, and of the second sequence 3 or 2 hold nothing but padding.
    padding = ~kept[0].diagonal(dim1=2, dim2=3)[:, 0]
    tail = {"left": 0, "right": 1}[side]
    assert padding.sum(1).tolist() == [0, tail]


def test_attention_scores_do_not_see_padding():
    model = build()
    eliminated(model, score="attention", layers=[0], keep_ratio=0.5)
    rows = []
    layers_of(model)[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["position_ids"]), with_kwargs=True
    )
    layer, chosen = layers_of(model)[0], []
    make = layer.elimination._make
    layer.elimination._make = lambda *args: chosen.append(make(*args)) or chosen[-1]
    batch = padded("left")
    model(**batch)
    batch["input_ids"][1, :9] = 7  # other tokens where nobody looks
    model(**batch)
    assert torch.equal(chosen[0].positions, chosen[1].positions)


def kept_of(positions, length, counts=None):
    return Kept(torch.tensor(positions, dtype=torch.int32), length, counts)


def test_masks_of_what_only_fills_up_hide_it():
    kept = kept_of([[0, 2, 3, -1], [1, 4, -1, -1]], 5, torch.tensor([3, 2]))
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    found = gathered_mask(kept, causal)
    assert found.shape == (2, 1, 4, 4)
    seen = [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
    ]
    assert found[:, 0].int().tolist() == seen
    hidden = torch.finfo(torch.float32).min
    added = torch.zeros(1, 1, 5, 5).masked_fill(~causal, hidden)
    assert torch.equal(gathered_mask(kept, added) == 0, found)
    assert gathered_mask(kept, torch.ones(2, 5)).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]


def test_positions_count_kept_tokens_of_each_document():
    position_ids = torch.cat((torch.arange(5), torch.arange(3), torch.arange(4)))[None]
    assert documents(position_ids).tolist() == [[0] * 5 + [1] * 3 + [2] * 4]
    kept = kept_of([[1, 3, 4, 8, 10, 11]], 12)
    assert compacted_positions(kept, position_ids).tolist() == [[0, 1, 2, 0, 1, 2]]
    two = kept_of([[1, 6, 7, 9], [0, 1, 2, 11]], 12)
    assert compacted_positions(two, position_ids).tolist() == [[0, 0, 1, 0], [0, 1, 2, 0]]
    filled = kept_of([[1, 8, 9, -1, -1]], 12, torch.tensor([3]))
    assert compacted_positions(filled, position_ids).tolist() == [[0, 0, 1, 2, 3]]


def test_lengths_of_documents_are_those_of_kept_tokens():
    ends = torch.tensor([0, 5, 8, 12], dtype=torch.int32)
    lengths = compacted_lengths(kept_of([[1, 3, 4, 8, 10, 11]], 12), ends)
    assert lengths.dtype == torch.int32 and lengths.tolist() == [0, 3, 3, 6]
    filled = kept_of([[1, 8, 9, -1, -1]], 12, torch.tensor([3]))
    assert compacted_lengths(filled, ends).tolist() == [0, 1, 1, 5]
    both = kept_of([[0, 1, -1], [0, 5, 6]], 8, torch.tensor([2, 3]))
    flat = torch.tensor([0, 8, 13, 16])
    assert compacted_lengths(both, flat).tolist() == [0, 3, 4, 6]


def test_where_tokens_see_from():
    position_ids = torch.cat((torch.arange(3), torch.arange(4)))[None]
    assert visible_from({}, 1, 7) == (None, None)
    starts, padding = visible_from({"position_ids": position_ids}, 1, 7)
    assert starts.dtype == torch.int32 and starts.tolist() == [[0, 0, 0, 3, 3, 3, 3]] and padding is None
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert visible_from({"cu_seq_lens_k": ends}, 1, 7)[0].tolist() == [[0, 0, 0, 3, 3, 3, 3]]
    left = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    starts, padding = visible_from({"attention_mask": left}, 2, 5)
    assert starts.tolist() == [[5, 5, 2, 2, 2], [0, 0, 0, 0, 5]] and torch.equal(padding, left == 0)
    full = torch.ones(5, 5, dtype=torch.bool).tril() & left[:, None, None, :].bool()
    starts, padding = visible_from({"attention_mask": full}, 2, 5)
    assert starts.tolist() == [[5, 5, 2, 2, 2], [0, 0, 0, 0, 5]] and torch.equal(padding, left == 0)
    window = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril().triu(-1)
    added = torch.zeros(1, 1, 5, 5).masked_fill(~window, torch.finfo(torch.float32).min)
    assert visible_from({"attention_mask": added}, 2, 5)[0].tolist() == [[0, 0, 1, 2, 3]] * 2


def test_padding_is_read_off_the_diagonal():
    """Scores that only have to know what is padding read one number per token of a mask, not one per pair."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not func.is_view:
                self.size = max(self.size, result.numel())
            return result

    left = torch.arange(LENGTH) >= torch.tensor([[0], [9]])
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & left[:, None, None, :]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    x = torch.randn(2, LENGTH, 1)
    for mask in (seen, added, left.long()):
        inputs = {"attention_mask": mask}
        assert torch.equal(padding_of(inputs, 2), ~left)
        assert torch.equal(padding_of(inputs, 2), visible_from(inputs, 2, LENGTH)[1])
        with Largest() as largest:
            scores = norm_scores(x, inputs, BLOCK)
        assert scores[1].isneginf().tolist() == [True, True, False, False, False]
        assert largest.size == 2 * LENGTH
    assert padding_of({}, 2) is None and padding_of({"position_ids": torch.arange(5)[None]}, 1) is None


def test_masks_that_tokens_cannot_be_gathered_of():
    assert mask_obstacle(torch.ones(2, 5), 5) is None and mask_obstacle(None, 5) is None
    assert "is not [B, T] or [B, heads, T, T] for the T tokens" in mask_obstacle(torch.ones(2, 1, 5, 9), 5)
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 128, 128, device="cpu")
    with pytest.raises(TypeError, match="must be a tensor or None for token elimination, got a BlockMask; load the"):
        mask_obstacle(mask, 128)


def test_a_sliding_window_is_not_stretched():
    model = build("mistral-window")
    layer = peft_kernels.nn.TokenElimination(layers_of(model)[0], 0.5, BLOCK, models.fixed_scores)
    x = torch.randn(1, LENGTH, 16, dtype=torch.float64)
    tables = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
    with pytest.warns(UserWarning, match="its sliding window of 7 tokens would count kept tokens"):
        layer(x, position_embeddings=tables)
    assert layer.elimination.calls == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, position_embeddings=tables, attention_mask=torch.ones(1, 1, LENGTH, LENGTH).tril().bool())
    assert layer.elimination.calls == 1


@pytest.mark.parametrize("threshold", [0.3, 0.7, 2.0])
@pytest.mark.parametrize("capacity", ["host", "device"])
def test_thresholds_keep_what_lies_above(threshold, capacity, monkeypatch):
    model, ids = build(), tokens(length=20)
    batch = {"input_ids": ids, "labels": ids}
    eliminated(model, layers=[1], keep_ratio=None, threshold=threshold)
    if capacity == "device":  # where the host may not look at counts, rows stay as many as there could be
        own = layers_of(model)[1].elimination
        select = peft_kernels.ops.select_tokens

        def filled(layer, x, inputs, call):
            scores = own.scores(layer, x, inputs, call)
            return Kept(*(lambda p, c: (p, 20, c))(*select(scores, 1.0, BLOCK, threshold, tokens=20)))

        monkeypatch.setattr(own, "_make", filled)
    loss = model(**batch).loss
    scores = models.fixed_scores(ids[..., None])
    layer = layers_of(model)[1]
    keep = [torch.nonzero(row.repeat_interleave(BLOCK) >= threshold).flatten() for row in scores]
    layers_of(model)[1] = models.PlainElimination(layer.restored(), keep)
    expected = model(**batch).loss
    actual, wanted = gradients(model, loss), gradients(model, expected)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients({name: actual[name] for name in wanted}, wanted)
    # Where no token is kept, a layer has no gradient, or zeros where only the device knows.
    assert all(not grad.any() for name, grad in actual.items() if name not in wanted)
    layers_of(model)[1] = layer
    row = peft_kernels.elimination.report(model).eliminating[0]
    assert row.kept_tokens == sum(len(rows) for rows in keep) and row.tokens == 40
