"""`inject` with a `TokenTuneConfig`: adapters before and after, the loss over selected tokens, checkpointing, files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import peft_kernels
from peft_kernels import LoraConfig, TokenEliminationConfig, TokenTuneConfig, causal_lm_loss, elimination
from peft_kernels.nn import TokenTune

from ..token_elimination.models import assert_same_gradients, build, eliminated, gradients, layers_of, tokens
from ..token_elimination.test_inject_elimination import ADAPTERS, batch_of, every_adapter
from ..token_elimination.test_scores import checkpointed, gradients_of
from .models import plainly, selected, tuned

every_order = pytest.mark.parametrize("first", ["adapter", "tuning"])


def adapted(adapter, first="adapter", **options):
    model = build()
    if first == "tuning":
        tuned(model, **options)
    peft_kernels.inject(model, ADAPTERS[adapter], seed=3)
    if first == "adapter":
        tuned(model, **options)
    return model


@every_adapter
@every_order
def test_adapters_get_the_gradients_of_plain_pytorch(adapter, first):
    model, batch = adapted(adapter, first), batch_of()
    loss = model(**batch).loss
    expected = plainly(model, selected(model), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@every_adapter
@every_order
def test_eject_gives_the_model_back_to_the_bit(adapter, first):
    model, batch = build(), batch_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {path: type(module) for path, module in model.named_modules()}
    expected = model(**batch).loss
    if first == "tuning":
        tuned(model)
    peft_kernels.inject(model, ADAPTERS[adapter], seed=3)
    if first == "adapter":
        tuned(model)
    peft_kernels.eject(model, merge=False)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(**batch).loss, expected)
    assert elimination.model.STATE not in model.__dict__


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    peft_kernels.accelerate(model.train())
    tuned(model)
    batch = batch_of()
    loss = model(**batch).loss
    base = model.get_base_model()
    expected = plainly(base, selected(model), batch)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
    counted = causal_lm_loss(base, batch["input_ids"], batch["labels"], token_mask="selected")
    assert counted != loss and elimination.selected_labels(base).sum() == 2 * 7 - (selected(base) == 21).sum()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_over_selected_tokens(batch):
    model, ids = build(), tokens(batch)
    tuned(model)
    labels = ids.clone()
    labels[:, 4:9] = -100
    loss = causal_lm_loss(model, ids, labels, token_mask="selected", chunk_size=5)
    positions = selected(model)
    counted = torch.zeros(batch, 23, dtype=torch.bool).scatter_(1, positions + 1, True)[:, :22]
    assert torch.equal(elimination.selected_labels(model), counted) and not counted[:, 0].any()
    expected = plainly(model, positions, {"input_ids": ids, "labels": labels.masked_fill(~counted, -100)})
    torch.testing.assert_close(loss, expected.double(), rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
    kept = F.pad(counted[:, 1:], (0, 1))
    assert all(kept[row, position] for row, each in enumerate(positions.tolist()) for position in each if position < 21)


def test_all_labels_count_where_nothing_is_selected():
    model, batch = build(), batch_of()
    tuned(model)
    arguments = (model, batch["input_ids"], batch["labels"])
    assert elimination.selected_labels(model) is None
    causal_lm_loss(*arguments, token_mask="selected")
    assert elimination.selected_labels(model) is not None
    model.eval()
    assert torch.equal(causal_lm_loss(*arguments, token_mask="selected"), causal_lm_loss(*arguments))
    assert elimination.selected_labels(model) is None
    with pytest.raises(ValueError, match=r"token_mask must be bool .* or None, got 'all'"):
        causal_lm_loss(*arguments, token_mask="all")
    elimination.remove(model)
    for call in (lambda: causal_lm_loss(*arguments, token_mask="selected"), lambda: elimination.selected_labels(model)):
        with pytest.raises(ValueError, match="model must have layers that differentiate by selected tokens, see Token"):
            call()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("score", ["random", "norm", "gradient"])
def test_checkpointing_computes_the_same(use_reentrant, score):
    """With dropout, whose draws come behind those of the selection, and the mask of labels, which forward needs."""
    batch = batch_of()

    def run(checkpointing):
        model = build()
        lora = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
        peft_kernels.inject(model, lora, seed=1)
        tuned(model, score=score, seed=None)
        if checkpointing:
            checkpointed(model, use_reentrant)
        if score == "gradient":
            elimination.score_by_gradient(model, **batch)
        torch.manual_seed(4)
        losses = [causal_lm_loss(model, batch["input_ids"], batch["labels"], token_mask="selected")]
        if score != "gradient":
            losses.append(model(**batch).loss)  # a second call before the first one's backward
        found = gradients_of(model, sum(losses))
        assert [row.calls for row in elimination.report(model).selecting] == [len(losses)] * 4
        return losses, found

    expected, gradients_expected = run(False)
    losses, found = run(True)
    assert all(map(torch.equal, losses, expected)) and found.keys() == gradients_expected.keys()
    assert all(torch.equal(grad, gradients_expected[name]) for name, grad in found.items())


def test_reports_and_which_layers():
    model, batch = build(), batch_of()
    report = tuned(model, layers=[0, -1])
    assert isinstance(report, peft_kernels.TokenTuneReport)
    assert [row.selects for row in report.layers] == [True, False, False, True]
    model(**batch)
    lines = str(elimination.report(model)).splitlines()
    assert lines[0] == "TokenTuneReport: 2 of 4 decoder layers have gradients for selected tokens alone"
    assert lines[1] == "  model.layers.0: keep=0.3 by random, 1 calls, 14 of 44 tokens kept"
    assert lines[2] == "  model.layers.1: dense, it was not asked to"
    assert all(p.requires_grad for p in model.parameters()), "nothing is frozen"
    with pytest.raises(ValueError, match=r"model differentiates by selected tokens already \(at model.layers.0\)"):
        eliminated(model)
    assert not elimination.eliminating_layers(model)
    elimination.remove(model)
    assert not elimination.selective_layers(model)
    eliminated(model)
    with pytest.raises(ValueError, match=r"model eliminates tokens already \(at model.layers.1\)"):
        tuned(model)


def test_errors_leave_the_model_alone():
    model = build()
    for options, message in (
        ({"layers": [1, 9]}, "layers must name layers of the model, which has 4, got 9"),
        ({"layers": [3, -1]}, "layers must name each layer once, got 3 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(model, **options)
    with pytest.raises(ValueError, match="seed must be None with a TokenTuneConfig, got 3"):
        peft_kernels.inject(model, TokenTuneConfig(), seed=3)
    with pytest.raises(ValueError, match=r"model is wrapped by torch\.compile"):
        tuned(torch.compile(model))
    layers_of(model)[2].self_attn.attention_dropout = 0.1
    with pytest.raises(
        ValueError, match=r"cannot differentiate by selected tokens: model.layers.2: its attention_drop"
    ):
        tuned(model, layers=[1, 2])
    assert not elimination.selective_layers(model)
    assert not tuned(model).layers[2].selects, "of all layers, those that can"
    with pytest.raises(ValueError, match="its attention implementation is 'eager'"):
        tuned(build(attention="eager"))


def test_the_configuration_lies_beside_the_adapter(tmp_path):
    model = adapted("lora", ratio=0.4, layers=[1, 2], score="norm")
    peft_kernels.save_adapter(model, tmp_path / "with")
    elimination.remove(model)
    peft_kernels.save_adapter(model, tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert {path.name for path in (tmp_path / "with").iterdir()} == names | {"token_tune.json"}
    config = TokenTuneConfig.load(tmp_path / "with")
    assert config == TokenTuneConfig(ratio=0.4, layers=[1, 2], score="norm", seed=3)
    with pytest.raises(ValueError, match="kind must be 'TOKEN_ELIMINATION' for a TokenEliminationConfig"):
        TokenEliminationConfig.from_dict(json.loads((tmp_path / "with" / "token_tune.json").read_text()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.1}, r"ratio must be in \[0, 1\], got 1.1"),
        ({"ratio": 0}, r"ratio must be in \(0, 1\], got 0: no token would have a gradient"),
        ({"layers": []}, r"layers must be a list of indices, at least one, got \[\]"),
        ({"score": "predictor"}, "score must be one of random, norm, attention, gradient, got 'predictor'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TokenTuneConfig(**options)


def test_layers_are_instances_of_both_classes():
    model = build()
    kind = type(layers_of(model)[0])
    tuned(model, layers=[0])
    assert isinstance(layers_of(model)[0], kind) and isinstance(layers_of(model)[0], TokenTune)
    assert type(layers_of(model)[0].restored()) is kind
