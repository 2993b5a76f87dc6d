"""`nn.TokenTune`: the function of the layer it takes over, and gradients for selected tokens alone."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import peft_kernels
from peft_kernels import elimination
from peft_kernels.nn import TokenTune

from ..token_elimination.models import assert_same_gradients, build, every_architecture, gradients, layers_of, tokens
from ..token_elimination.test_masks import padded
from .models import plainly, selected, tuned


def batch_of(**options):
    ids = tokens(**options)
    return {"input_ids": ids, "labels": ids}


def assert_computes(model, batch, tolerance=1e-5, layers=None):
    """The model's function is that of its layers, and gradients are those of plain PyTorch."""
    with torch.no_grad():
        dense = model(**batch)
    output = model(**batch)
    torch.testing.assert_close(output.loss, dense.loss, rtol=tolerance, atol=0)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    torch.testing.assert_close(output.logits[real], dense.logits[real], rtol=1e2 * tolerance, atol=1e2 * tolerance)
    expected = plainly(model, selected(model), batch, layers)
    torch.testing.assert_close(output.loss, expected, rtol=tolerance, atol=0)
    found = gradients(model, output.loss)
    assert_same_gradients(found, gradients(model, expected), 10 * tolerance)
    return found


@every_architecture
def test_gradients_are_those_of_plain_pytorch_with_constants(name):
    model, batch = build(name), batch_of()
    dense = gradients(model, model(**batch).loss)
    tuned(model)
    found = assert_computes(model, batch)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (found[name] - dense[name]).abs().max() > 1e-2 * dense[name].abs().max(), "constants would not show"


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.95])
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (3, 21), (2, 2)])
def test_any_number_of_selected_tokens(ratio, length, batch):
    model, inputs = build(num_hidden_layers=2), batch_of(batch=batch, length=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.95 of few tokens is all of them
        tuned(model, ratio=ratio)
        loss = model(**inputs).loss
    layer = elimination.report(model).selecting[0]
    positions = selected(model) if layer.calls else torch.arange(length).expand(batch, -1)
    assert positions.shape == (batch, -(-ratio * length // 1))
    expected = plainly(model, positions, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@every_architecture
def test_all_tokens_selected_are_the_layers_own_gradients(name):
    model, batch = build(name), batch_of()
    loss = model(**batch).loss
    expected = gradients(model, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned(model, ratio=1.0)
        same = model(**batch).loss
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, same), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    model = build(dtype=torch.float32)
    tuned(model, ratio=0.7)
    assert_computes(model, padded(side), 1e-4)
    real = padded(side)["attention_mask"][1].nonzero().flatten()
    assert set(real.tolist()) < set(selected(model)[1].tolist()), "padding is selected last"


def test_packed_documents_of_one_sequence():
    ids = tokens(1)
    position_ids = torch.cat((torch.arange(9), torch.arange(4), torch.arange(9)))[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": position_ids}
    model = build()
    tuned(model)
    assert_computes(model, batch)
    alone = model(input_ids=ids, labels=ids).loss
    assert (model(**batch).loss - alone).abs() > 1e-4, "documents would not be told apart"


@pytest.mark.parametrize("score", ["random", "norm", "attention", "gradient"])
def test_every_score(score):
    model, batch = build(), batch_of()
    tuned(model, score=score, layers=[1, 2])
    if score == "gradient":
        elimination.score_by_gradient(model, **batch)
    loss = model(**batch).loss
    expected = plainly(model, selected(model), batch, [1, 2])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected))
    if score == "norm":
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch)  # with the hooks that transformers leaves
        largest = hidden.norm(dim=-1).topk(7, dim=1).indices.sort(1).values
        assert torch.equal(selected(model), largest)


def test_nothing_reaches_unselected_tokens():
    model, ids = build(dtype=torch.bfloat16), tokens()
    tuned(model)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(inputs_embeds=x, labels=ids).loss, x)
    has_gradient = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, selected(model), True)
    assert has_gradient.sum() == 2 * 7 and not grad[~has_gradient].any()
    assert grad[has_gradient].any(1)[:-1].all()


def test_every_call_selects_anew_and_all_layers_alike():
    model, batch = build(), batch_of()
    tuned(model, seed=None)
    found = []
    for layer in layers_of(model):
        select = layer.elimination.select
        layer.elimination.select = lambda *args, select=select: found.append(select(*args)) or found[-1]
    model(**batch)
    model(**batch)
    assert len({id(kept) for kept in found[:4]}) == 1 and len({id(kept) for kept in found[4:]}) == 1
    assert not torch.equal(found[0].positions, found[4].positions)


@every_architecture
def test_evaluation_and_calls_without_gradients_are_the_layers_own(name):
    model, batch = build(name), batch_of()
    expected = model(**batch).logits
    tuned(model, seed=None)
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.eval()(**batch).logits, expected)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert not any(row.calls or row.dense_calls for row in elimination.report(model).selecting)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda m: m.config.__setattr__("_attn_implementation", "eager"), "implementation is 'eager'; load the model"),
        (lambda m: layers_of(m)[1].self_attn.register_forward_hook(lambda *_: None), "self_attn has hooks or was"),
        (lambda m: layers_of(m)[1].self_attn.__setattr__("attention_dropout", 0.5), "attention_dropout of 0.5 cannot"),
        (lambda m: layers_of(m)[1].self_attn.__setattr__("is_causal", False), "it is not causal"),
    ],
)
def test_a_call_that_is_dense_says_so_once(break_it, reason):
    model, batch = build(), batch_of()
    tuned(model, layers=[1])
    break_it(model)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**batch)
        model(**batch)
    said = [str(item.message) for item in caught if "does nothing" in str(item.message)]
    (row,) = elimination.report(model).selecting
    assert len(said) == 1 and said[0].startswith("TokenTune of layer 1 does nothing: ") and reason in said[0]
    assert row.calls == 0 and sum(row.dense_calls.values()) == 2
    assert reason in str(elimination.report(model))


def test_a_cache_that_holds_tokens_is_used():
    model, ids = build(use_cache=True), tokens(1, 13)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    tuned(model)
    with pytest.warns(UserWarning, match="TokenTune of layer 0 does nothing: it is called without gradients and with"):
        x = model.get_input_embeddings()(ids)
        with torch.no_grad():
            model(inputs_embeds=x, use_cache=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    assert [cache.get_seq_length(index) for index in range(4)] == [0] * 4


def called(layer, model, x, **inputs):
    """A decoder layer called as its model calls it."""
    position_ids = torch.arange(x.shape[1])[None]
    return layer(x, position_embeddings=model.model.rotary_emb(x, position_ids), position_ids=position_ids, **inputs)


def test_a_sliding_window_has_to_be_in_the_mask():
    model = build("mistral-window")
    layer, x = TokenTune(layers_of(model)[0]), torch.randn(1, 22, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match="its sliding window of 7 tokens is not in its attention mask"):
        called(layer, model, x)
    called(layer, model, x, attention_mask=torch.ones(1, 1, 22, 22).tril().triu(-6).bool())
    assert layer.elimination.calls == 1


def test_layers_made_by_hand_share_a_selection():
    model, batch = build(num_hidden_layers=2), batch_of()
    own = layers_of(model)
    own[0] = TokenTune(own[0], 0.4, "norm")
    own[1] = TokenTune(own[1], 0.4, share_with=own[0])
    assert_computes(model, batch)
    assert repr(own[1]).startswith("TokenTuneLlamaDecoderLayer(\n  ratio=0.4, score=norm\n")
    with pytest.raises(ValueError, match=r"share_with must have the same ratio, 0.3, and has 0.4"):
        TokenTune(build().model.layers[0], share_with=own[0])
    with pytest.raises(TypeError, match="share_with must be a TokenTune layer or None, got Linear"):
        TokenTune(build().model.layers[0], share_with=torch.nn.Linear(1, 1))


def test_a_callable_scores_tokens():
    model, x = build(num_hidden_layers=1), torch.randn(2, 9, 16, dtype=torch.float64)
    layer = TokenTune(layers_of(model)[0], 0.3, lambda hidden: -torch.arange(9.0).expand(2, -1))
    called(layer, model, x.requires_grad_())
    assert layer.elimination.selections.latest.positions.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_copies_tune_and_share_among_themselves(kind):
    model, batch = build(), batch_of()
    tuned(model)
    twin = copy.deepcopy(model) if kind == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_same_gradients(gradients(twin, twin(**batch).loss), gradients(model, model(**batch).loss), 0)
    layers = list(elimination.selective_layers(twin).values())
    assert len({id(layer.elimination.selections) for layer in layers}) == 1
    assert layers[0].elimination.selections is not layers_of(model)[0].elimination.selections


def test_bad_options_are_refused():
    layer = layers_of(build())[0]
    for options, message in (
        ({"ratio": 0}, r"ratio must be in \(0, 1\], got 0"),
        ({"ratio": True}, r"ratio must be in \(0, 1\], got True"),
        ({"score": "predictor"}, 'score must be "random", "norm", "attention", "gradient" or a callable'),
        ({"score": "magic"}, "score must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenTune(layer, **options)
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got int"):
        TokenTune(3)
    with pytest.raises(TypeError, match="module differentiates by selected tokens already"):
        peft_kernels.nn.TokenElimination(TokenTune(layer))
    with pytest.raises(TypeError, match="module eliminates tokens already"):
        TokenTune(peft_kernels.nn.TokenElimination(layer))
    with pytest.raises(TypeError, match="TokenTune cannot take this layer over: it has no input_layernorm"):
        TokenTune(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"TokenTune needs its queries, keys and values, but a .*Phi3Attention has"):
        TokenTune(layers_of(build("Phi3Config", torch.float32))[0])
    with pytest.raises(ValueError, match="its attention implementation is 'eager'; load the model with"):
        TokenTune(layers_of(build(attention="eager"))[0])
    with pytest.raises(ValueError, match=r"its attention_dropout of 0\.1 cannot be drawn again"):
        TokenTune(layers_of(build(attention_dropout=0.1))[0])


def test_autocast():
    model, batch = build(dtype=torch.float32), batch_of()
    tuned(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        expected = plainly(model, selected(model), batch)
    torch.testing.assert_close(loss, expected, rtol=3e-2, atol=0)
    assert_same_gradients(gradients(model, loss), gradients(model, expected), 0.1)


def test_a_layer_is_one_graph():
    model = build(dtype=torch.float32, num_hidden_layers=1)
    layer, x = TokenTune(layers_of(model)[0], score="norm"), torch.randn(2, 22, 16, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    trained = [x, *layer.parameters()]
    results = []
    for call in (layer, compiled):
        y = called(call, model, x)
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    positions = layer.elimination.selections.latest.positions
    assert torch.equal(positions.long(), x.norm(dim=-1).topk(7, dim=1).indices.sort(1).values)
