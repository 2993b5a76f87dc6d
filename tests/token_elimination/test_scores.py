"""By what tokens are chosen, who shares the choice, and that backward finds the choice of its forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import elimination
from peft_kernels.nn.selections import Selections
from peft_kernels.reference.token_selection import block_scores

from .models import BLOCK, build, eliminated, every_architecture, fixed_scores, layers_of, tokens


def watched(model):
    """Positions that each layer's attention is called with at every call, as they come."""
    seen = []
    for layer in elimination.eliminating_layers(model).values():
        own = layer.elimination
        select = own.select

        def noted(module, x, inputs, own=own, select=select):
            kept = select(module, x, inputs)
            seen.append((own.index, kept.positions))
            return kept

        own.select = noted
    return seen


@every_architecture
def test_attention_scores_are_of_the_layer_s_own_queries_and_keys(name):
    model = build(name)
    eliminated(model, layers=[0], score="attention", keep_ratio=0.4)
    seen, queries = watched(model), []
    ids = tokens(length=20)
    attend = torch.nn.functional.scaled_dot_product_attention

    def asked(query, key, value, **options):
        queries.append((query, key))
        return attend(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:  # the first layer's, for all tokens
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", asked)
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids)
    starts = None
    if name == "mistral-window":
        starts = (torch.arange(20) - 6).clamp(min=0).expand(2, -1).int()
    scores = block_scores(*queries[0], BLOCK, starts)
    expected = scores.argsort(dim=1, descending=True)[:, :2].sort(1).values
    assert torch.equal(seen[0][1][:, ::BLOCK] // BLOCK, expected)


def test_norm_scores():
    model, ids = build(), tokens(length=20)
    eliminated(model, layers=[0], score="norm", keep_ratio=0.2)
    seen = watched(model)
    model(input_ids=ids)
    norms = model.model.embed_tokens(ids).norm(dim=-1).view(2, 5, BLOCK).amax(2)
    assert torch.equal(seen[0][1][:, 0] // BLOCK, norms.argmax(1))


@pytest.mark.parametrize("seed", [None, 3])
def test_random_scores_differ_by_call_and_layer_and_come_again_with_a_seed(seed):
    ids, runs = tokens(length=40), []
    for _ in range(2):
        torch.manual_seed(11 if seed is None else torch.seed())
        model = build()
        torch.manual_seed(11 if seed is None else torch.seed())
        eliminated(model, score="random", seed=seed)
        seen = watched(model)
        for _ in range(2):
            model(input_ids=ids)
        runs.append([positions for _, positions in seen])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert len({tuple(positions.flatten().tolist()) for positions in runs[0]}) == 4


def test_gradient_scores():
    model, ids = build(), tokens(length=20)
    batch = {"input_ids": ids, "labels": ids}
    expected = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: expected.append(args[0]))
    loss = model(**batch).loss
    (gradient,) = torch.autograd.grad(loss, expected[0])
    handle.remove()
    eliminated(model, score="gradient", keep_ratio=0.2)
    flags = [module.training for module in model.modules()]
    scores = elimination.score_by_gradient(model, **batch)
    assert [module.training for module in model.modules()] == flags and not scores.requires_grad
    assert torch.is_grad_enabled() and not model.lm_head._forward_pre_hooks
    torch.testing.assert_close(scores, gradient.norm(dim=-1).float(), rtol=1e-5, atol=0)
    seen = watched(model)
    model(**batch).loss.backward()
    blocks = scores.view(2, 5, BLOCK).amax(2).argmax(1)
    assert [index for index, _ in seen] == [1, 2]
    assert all(torch.equal(positions[:, 0] // BLOCK, blocks) for _, positions in seen)
    with pytest.raises(RuntimeError, match=r'score="gradient" needs elimination.score_by_gradient\(model, \*\*batch\)'):
        model(**batch)
    elimination.score_by_gradient(model, **batch)
    with pytest.raises(ValueError, match=r"called with the batch that follows, \[2, 16\] tokens, and was called with"):
        model(input_ids=ids[:, :16])


def test_gradient_scores_need_labels_and_layers_that_use_them():
    model, ids = build(), tokens()
    with pytest.raises(ValueError, match='must have layers that select tokens with score="gradient", and has none'):
        elimination.score_by_gradient(model, input_ids=ids, labels=ids)
    eliminated(model, score="gradient")
    with pytest.raises(ValueError, match="batch must hold labels"):
        elimination.score_by_gradient(model, input_ids=ids)
    assert not layers_of(model)[1].elimination.selections.suspended
    with pytest.raises(RuntimeError, match="was not called before this one"):
        model(input_ids=ids)


def test_predictors():
    model, ids = build(), tokens(length=20)
    eliminated(model, score="predictor", keep_ratio=0.2, layers=[1])
    hidden = []

    def predictor(states):
        hidden.append(states)
        return torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.float16)

    elimination.set_predictors(model, {1: predictor})
    seen = watched(model)
    model(input_ids=ids)
    assert seen[0][1].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]
    assert hidden[0].shape == (2, 20, 16) and not hidden[0].requires_grad
    for wrong, message in (
        (lambda states: states, r"must return \[2, 5\], one for each whole block of 4 tokens, got \[2, 20, 16\]"),
        (lambda states: [1.0], "must return a floating tensor, got list"),
    ):
        elimination.set_predictors(model, {1: wrong})
        with pytest.raises((ValueError, TypeError), match=message):
            model(input_ids=ids)
    with pytest.raises(ValueError, match=r'must be for layers with score="predictor", \[1\], got 2'):
        elimination.set_predictors(model, {2: predictor})
    with pytest.raises(TypeError, match=r"predictors\[1\] must be callable, got int"):
        elimination.set_predictors(model, {1: 3})
    layers_of(model)[1].elimination.predictor = None
    with pytest.raises(RuntimeError, match="needs a predictor for layer 1, got none"):
        model(input_ids=ids)


def test_a_selection_is_shared_by_layers_in_a_row():
    model, ids = build(num_hidden_layers=6), tokens(length=40)
    eliminated(model, layers=[0, 1, 3, 4, 5], score="random", select_every=2)
    seen = watched(model)
    tables = []
    for index in (0, 1, 3):
        layers_of(model)[index].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: tables.append(kwargs["position_embeddings"][0]), with_kwargs=True
        )
    model(input_ids=ids)
    assert [index for index, _ in seen] == [0, 1, 3, 4, 5]
    first, second, third, fourth, fifth = (positions for _, positions in seen)
    assert first is second and third is fourth
    assert not torch.equal(second, third) and not torch.equal(fourth, fifth)
    assert tables[0] is tables[1] and tables[1] is not tables[2]


def test_a_schedule_may_give_each_group_of_layers_a_share():
    model, ids = build(), tokens(length=40)
    schedule = {0: 0.5, 1: 0.5, 2: 0.2, -1: 0.2}
    eliminated(model, schedule=schedule, keep_ratio=None, layers=None, score="norm", select_every=2)
    seen = watched(model)
    model(input_ids=ids)
    assert [positions.shape[1] for _, positions in seen] == [20, 20, 8, 8]
    assert seen[0][1] is seen[1][1] and seen[2][1] is seen[3][1]


def test_layers_that_share_a_selection_have_one_share():
    model = build()
    message = (
        r"schedule must have one keep ratio for layers that share a selection \(select_every=2\), got 0.5 for layer 1 "
        r"and 0.2 for layer 3"
    )
    schedule = {-1: 0.2, 1: 0.5}
    with pytest.raises(ValueError, match=message):
        eliminated(model, schedule=schedule, keep_ratio=None, layers=None, score="norm", select_every=2)
    assert not elimination.eliminating_layers(model)
    eliminated(model, schedule=schedule, keep_ratio=None, layers=None, score="norm")


@pytest.mark.parametrize("follower", [False, True])
@pytest.mark.parametrize(
    ("change", "kept"),
    [({"keep": 0.2}, [8, 8, 20]), ({"block_size": 20}, [20, 20, 20]), ({"threshold": 1e9}, [0, 0, 20])],
)
def test_options_of_a_layer_are_those_of_all_that_share_its_selection(follower, change, kept):
    model = build()
    eliminated(model, layers=[0, 1, 2], score="norm", select_every=2)
    own = layers_of(model)[1 if follower else 0].elimination
    own.options = replace(own.options, **change)
    seen = watched(model)
    model(input_ids=tokens(1, length=40))
    assert [positions.shape[1] for _, positions in seen] == kept
    assert seen[0][1] is seen[1][1] and seen[1][1] is not seen[2][1]


def test_a_table_that_comes_again_brings_no_old_selection_along():
    """Models may keep their cosines; a call is told from the one before all the same."""
    model = build()
    eliminated(model, layers=[1, 2], score="norm", select_every=2)
    position_ids = torch.arange(40)[None]
    tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), position_ids)
    model.model.rotary_emb.forward = lambda *args, **kwargs: tables
    seen = watched(model)
    for seed in (1, 2):
        model(input_ids=tokens(length=40, seed=seed))
    assert seen[0][1] is seen[1][1] and seen[2][1] is seen[3][1]
    assert not torch.equal(seen[0][1], seen[2][1])


def checkpointed(model, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("score", ["attention", "norm", "random", "gradient", "predictor", "noisy predictor"])
@pytest.mark.parametrize("select_every", [1, 2])
def test_checkpointing_computes_the_same(use_reentrant, score, select_every):
    ids = tokens(length=24)
    batch = {"input_ids": ids, "labels": ids}

    def noisy(hidden):
        return fixed_scores(hidden) + torch.rand(2, 6)

    def run(checkpointing):
        model = build(attention_dropout=0.3)
        adapter = peft_kernels.LoraConfig(
            r=2, lora_dropout=0.3, init_lora_weights=False, target_modules="all-linear", bias="all"
        )
        peft_kernels.inject(model, adapter, seed=1)
        eliminated(model, score=score.removeprefix("noisy "), select_every=select_every)
        if score == "noisy predictor":
            elimination.set_predictors(model, {1: noisy, 2: noisy})
        if checkpointing:
            checkpointed(model, use_reentrant)
        if score == "gradient":
            elimination.score_by_gradient(model, **batch)
        torch.manual_seed(4)
        loss = model(**batch).loss
        found = gradients_of(model, loss)
        rows = elimination.report(model).eliminating
        assert [row.calls for row in rows] == [1, 1], "a forward that is computed anew is no other call"
        return loss, found

    expected, gradients_expected = run(False)
    loss, found = run(True)
    assert torch.equal(loss, expected) and found.keys() == gradients_expected.keys()
    assert all(torch.equal(grad, gradients_expected[name]) for name, grad in found.items())


def test_dropout_is_not_in_attention_scores():
    ids, kept = tokens(length=40), []
    for dropout in (0.0, 0.9):
        model = build()
        adapter = peft_kernels.LoraConfig(lora_dropout=dropout, init_lora_weights=False, target_modules="all-linear")
        peft_kernels.inject(model, adapter, seed=1)
        eliminated(model, score="attention", layers=[0])
        seen = watched(model)
        model(input_ids=ids)
        kept.append(seen[0][1])
        attention = layers_of(model)[0].self_attn
        assert all(module.training for module in attention.modules()), "flags are as they were"
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("score", "seed"), [("attention", None), ("random", None), ("random", 5), ("gradient", None)], ids=str
)
@pytest.mark.parametrize("select_every", [1, 2])
def test_checkpointing_the_whole_model_computes_the_same_or_is_refused(score, seed, select_every):
    """There backward makes other tables of cosines, by which no selection of forward is found."""
    ids = tokens(length=24)

    def run(whole):
        model = build(num_hidden_layers=2)
        eliminated(model, score=score, seed=seed, layers=[0, 1], select_every=select_every)
        if score == "gradient":
            elimination.score_by_gradient(model, input_ids=ids, labels=ids)
        torch.manual_seed(4)
        loss = checkpoint(whole, model, ids, use_reentrant=False) if whole else model(input_ids=ids, labels=ids).loss
        return gradients_of(model, loss)

    def whole(model, ids):
        return model(input_ids=ids, labels=ids).loss

    if score == "gradient" or seed is not None:
        with pytest.raises(RuntimeError, match="layer 0 cannot select the same tokens again in backward by score="):
            run(whole)
        return
    expected, found = run(None), run(whole)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_layers_find_no_selection_of_a_call_before_where_theirs_makes_none():
    """The tables of cosines are the same tensors in both calls. In the second, the leader has a sliding window."""
    model = build(num_hidden_layers=2)
    eliminated(model, layers=[0, 1], score="norm", select_every=2)
    leader, follower = layers_of(model)
    first, second = torch.randn(2, 2, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tables = model.model.rotary_emb(first, torch.arange(24)[None])
    follower(leader(first, position_embeddings=tables), position_embeddings=tables)
    leader.self_attn.sliding_window = 7  # it is not stretched: the leader keeps all tokens
    with pytest.warns(UserWarning, match="its sliding window of 7 tokens would count kept tokens"):
        x = leader(second, position_embeddings=tables)
    found = follower(x, position_embeddings=tables)
    alone = peft_kernels.nn.TokenElimination(follower.restored(), 0.5, BLOCK, "norm")
    assert torch.equal(found, alone(x, position_embeddings=tables))


def test_where_calls_are_not_known_followers_find_what_their_leader_made_in_this_one():
    selections, made = Selections(select_every=2), []

    def selected(index):
        return selections.find_or_make(None, (0, 0.5), index, lambda: made.append(object()) or made[-1], made.clear)

    for _ in range(2):
        selections.begin(None, 0)
        assert selected(0) is selected(1) is made[-1]
    selections.begin(None, 0)  # and selects nothing
    assert selected(1) is made[-1] and len(made) == 3


def gradients_of(model, loss):
    """By backward: reentrant checkpointing allows nothing else."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_backward_finds_the_selection_of_its_own_forward():
    """Two forwards, then two backwards: nothing of one may be taken for the other's, whatever scores say by then."""
    ids = [tokens(length=24, seed=seed) for seed in (1, 2)]

    def run(checkpointing):
        model = build()
        eliminated(model, score="random", seed=5, select_every=2)
        if checkpointing:
            checkpointed(model, False)
        losses = [model(input_ids=each, labels=each).loss for each in ids]
        return gradients_of(model, losses[0] * 2 + losses[1])

    expected, found = run(False), run(True)
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_selections_go_when_a_call_is_over():
    model, ids = build(), tokens(length=24)
    eliminated(model, score="norm", select_every=2)
    selections: Selections = layers_of(model)[1].elimination.selections
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    del loss
    assert len(selections._by_call) == 0
