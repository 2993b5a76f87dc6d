"""What layers know of their parts: asked as they are in evaluation and in training, causal or not."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import elimination

from .models import build, eliminated, layers_of, tokens


def batch_of():
    ids = tokens()
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["gemma", "llama"])
def test_attention_that_is_not_causal_stays_so(name):
    batch = batch_of()

    def bidirectional(model):
        for layer in layers_of(model):
            layer.self_attn.is_causal = False
        return model

    model = build(name, use_bidirectional_attention=True) if name == "gemma" else bidirectional(build(name))
    expected = model(**batch).loss
    assert (build(name)(**batch).loss - expected).abs() > 1e-4, "the comparison would not tell"
    report = eliminated(model, keep_ratio=1.0, layers=[0, 1, 2, 3])
    assert all("is not causal" in row.own_parts["self_attn"] for row in report.eliminating)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)
    elimination.remove(model)
    with pytest.raises(ValueError, match=r'score="attention" needs its queries and keys, but a .* is not causal'):
        eliminated(model, score="attention")
    # A flag that is set behind the injection counts too.
    changed = build(name)
    eliminated(changed, keep_ratio=1.0, layers=[0, 1, 2, 3])
    torch.testing.assert_close(bidirectional(changed)(**batch).loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", ["mlp", "self_attn", "input_layernorm"])
def test_what_a_part_does_only_in_training_is_done(part):
    model, batch = build(), batch_of()
    for layer in layers_of(model):
        module = layer.get_submodule(part)
        module.__class__ = dropping_out(type(module))
    torch.manual_seed(0)
    expected = model(**batch).loss
    report = eliminated(model, keep_ratio=1.0, layers=[0, 1, 2, 3])
    assert all("in training" in row.own_parts[part] for row in report.eliminating)
    torch.manual_seed(0)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)


def dropping_out(kind):
    """A class that drops out of what `kind` returns, in training."""

    class DroppingOut(kind):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            first = result[0] if isinstance(result, tuple) else result
            dropped = torch.nn.functional.dropout(first, 0.5, self.training)
            return (dropped, *result[1:]) if isinstance(result, tuple) else dropped

    return DroppingOut


def test_dropout_of_attention_and_of_adapters_leaves_the_parts_known():
    model = build(attention_dropout=0.4)
    adapter = peft_kernels.LoraConfig(lora_dropout=0.4, init_lora_weights=False, target_modules="all-linear")
    peft_kernels.inject(model, adapter, seed=1)
    assert not any(row.own_parts for row in eliminated(model).eliminating)
    assert {layer.self_attn.attention_dropout for layer in layers_of(model)} == {0.4}
