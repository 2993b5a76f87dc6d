"""Predictors of block scores: what they compute, that they learn, that pruning changes nothing, and their files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_kernels
from peft_kernels import elimination
from peft_kernels.elimination.predictor_training import ranking_loss
from peft_kernels.elimination.recall import _chosen

from .models import BLOCK, SIZES, build, eliminated, layers_of, tokens

WIDTH = SIZES["hidden_size"]
SMALL = {"rank": 12, "size": 5, "block_size": BLOCK}


def predictor(seed=0, **options):
    sizes = {"hidden_size": WIDTH, **SMALL, **options}
    return elimination.BlockPredictor(**sizes, generator=torch.Generator().manual_seed(seed))


def uneven(seed=0, **options):
    """One whose scores do not go by position alone."""
    found = predictor(seed, **options)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return found


def plainly(model, x):
    """The formula, block by block."""
    x = x.double()
    u = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    first, queries, keys = (
        (model.get_submodule(name).weight.double(), model.get_submodule(name).bias.double())
        for name in ("first", "queries", "keys")
    )
    size = model.block_size
    scores = torch.zeros(x.shape[0], x.shape[1] // size, dtype=torch.float64)
    for b in range(x.shape[0]):
        features = [
            (u[b, start : start + size] @ first[0].T + first[1]).relu().amax(0) for start in range(0, x.shape[1], size)
        ]
        for key in range(scores.shape[1]):
            for query in range(key, len(features)):
                q, k = features[query] @ queries[0].T + queries[1], features[key] @ keys[0].T + keys[1]
                scores[b, key] += (q @ k).clamp(min=0)
    return scores


@pytest.mark.parametrize("length", [4, 5, 16, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_those_of_the_formula(length, dtype):
    model = uneven().requires_grad_(False)
    x = torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1)).mul(5).to(dtype)
    before = x.clone()
    scores = model(x)
    assert scores.dtype == torch.float32 and torch.equal(x, before)
    torch.testing.assert_close(scores.double(), plainly(model, x), rtol=1e-4, atol=1e-3)


def test_sequences_shorter_than_a_block_and_empty_batches_have_no_scores():
    assert predictor()(torch.zeros(3, BLOCK - 1, WIDTH)).shape == (3, 0)
    assert predictor()(torch.zeros(0, 9, WIDTH)).shape == (0, 2)


def test_a_new_predictor_takes_the_blocks_that_most_queries_come_behind():
    scores = predictor(rank=64)(torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(0)))[0]
    assert scores[:5].sum() > 2 * scores[5:].sum() > 0


def test_autocast_does_not_change_scores():
    model, x = uneven(), torch.randn(1, 12, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(x)
    assert torch.equal(scores, model(x))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(2, 8, WIDTH + 1), r"hidden must be floating \[B, T, 16\], got torch.float32 \[2, 8, 17\]"),
        (torch.zeros(8, WIDTH), r"must be floating \[B, T, 16\], got torch.float32 \[8, 16\]"),
        (torch.zeros(2, 8, WIDTH, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(2, 8, WIDTH, device="meta"), "must be on the predictor's device, cpu, got meta"),
    ],
)
def test_bad_hidden_states_are_refused(hidden, message):
    with pytest.raises(ValueError, match=message):
        predictor()(hidden)


@pytest.mark.parametrize("name", ["hidden_size", "rank", "size", "block_size"])
def test_sizes_must_be_positive_integers(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        predictor(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.0"):
        predictor(**{name: 2.0})


def test_the_loss_is_zero_for_proportional_scores_and_leaves_padding_out():
    scores = torch.rand(2, 6) + 0.1
    assert ranking_loss(scores * 7, scores) < 1e-6 < ranking_loss(scores.flip(1), scores)
    padded = torch.cat((scores, torch.full((2, 1), -torch.inf)), 1)
    guess = torch.rand(2, 7, requires_grad=True)
    loss = ranking_loss(guess, padded)
    torch.testing.assert_close(loss, ranking_loss(guess[:, :6], scores))
    loss.backward()
    assert guess.grad.isfinite().all() and not guess.grad[:, 6].any() and guess.grad[:, :6].any()
    assert ranking_loss(torch.zeros(1, 3), torch.zeros(1, 3)) == 0


SPECIAL = range(3, 10)


def model_with_loud_tokens(dtype=torch.float32):
    """A model that attends to some tokens alone, wherever they are: by one channel that all have, and one that they
    have, through the pair of channels that hardly rotates."""
    model = build(dtype=dtype, num_hidden_layers=2)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0], embeddings[:, 1] = 3.0, 0.0
        embeddings[list(SPECIAL), 1] = 3.0
        for layer in layers_of(model):
            layer.input_layernorm.weight.fill_(1.0)
            for projection, channel in ((layer.self_attn.q_proj, 0), (layer.self_attn.k_proj, 1)):
                projection.weight.mul_(0.05)
                projection.weight[2::6, channel] = 1.0
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model


@pytest.fixture(scope="module")
def learned():
    """A model, predictors trained on it, and text they have not seen."""
    model = model_with_loud_tokens()
    batches = [tokens(4, 64, seed) for seed in range(20)]
    found = elimination.train_predictors(model, batches, steps=60, lr=1e-2, repeats=3, **SMALL)
    return model, found, [tokens(4, 64, seed) for seed in range(100, 104)]


def test_predictors_find_most_of_the_right_blocks_on_text_they_have_not_seen(learned):
    model, found, held_out = learned
    report = elimination.recall_report(found, model, held_out, 0.5)
    assert (report.sequences, report.keep, report.block_size) == (16, 0.5, BLOCK)
    for layer in report.layers:
        assert layer.random == 0.5
        assert layer.predicted > 0.88 > layer.first + 0.15 and layer.predicted > layer.norm
    assert "layer 1: predicted" in str(report) and f"mean predicted {report.mean():.1%}" in str(report)


def test_predicted_scores_are_as_large_as_true_ones(learned):
    model, found, held_out = learned
    observer = elimination.observation.LayerObserver(model)

    def visit(index, hidden, inputs):
        true = observer.true_scores(index, hidden, inputs, BLOCK).mean()
        assert 0.7 < found[index](hidden).mean() / true < 1.4

    observer.observe(held_out[0], visit)


def test_recall_of_perfect_scores_is_one_and_of_reversed_scores_none():
    scores = torch.rand(3, 8)
    assert _chosen(scores, 0.5).sum() == 12
    assert not (_chosen(scores, 0.5) & _chosen(-scores, 0.5)).any()
    assert torch.equal(_chosen(scores, 0.3).sum(1), torch.tensor([3, 3, 3]))


def test_training_is_a_function_of_the_seed_and_leaves_everything_else_alone():
    model = build(dtype=torch.float32)
    flags, state = [m.training for m in model.modules()], torch.get_rng_state()
    losses = []

    def run(seed):
        return elimination.train_predictors(
            model, (tokens(2, 22, s) for s in range(3)), steps=5, repeats=2, held=2, seed=seed, **SMALL
        )

    runs = [run(0), run(0), run(1)]
    for index in range(4):
        first, same, other = (found[index].state_dict() for found in runs)
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert not torch.equal(first["first.weight"], other["first.weight"])
    assert [m.training for m in model.modules()] == flags and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))
    elimination.train_predictors(
        model, [tokens()], steps=3, layers=[1], progress=lambda *seen: losses.append(seen), **SMALL
    )
    assert [step for step, _ in losses] == [1, 2, 3]


def test_predictors_that_say_nothing_are_warned_about(monkeypatch):
    made = elimination.predictor_training._learner

    def dead(*arguments):
        learner = made(*arguments)
        with torch.no_grad():
            learner.predictor.keys.bias.neg_()
            learner.predictor.keys.weight.zero_()
            learner.predictor.queries.weight.zero_()
        return learner

    monkeypatch.setattr(elimination.predictor_training, "_learner", dead)
    with pytest.warns(
        UserWarning, match=r"predictors of the layers \[1, 3\] say 0 of every block; train with a smaller"
    ):
        elimination.train_predictors(build(dtype=torch.float32), [tokens()], steps=1, lr=1e-6, layers=[3, 1], **SMALL)


def test_a_model_that_eliminates_tokens_is_seen_with_all_of_them():
    model, batches = build(dtype=torch.float32), [tokens(2, 22, s) for s in range(2)]
    expected = elimination.train_predictors(model, batches, steps=3, repeats=2, **SMALL)
    eliminated(model, train_only=False)
    found = elimination.train_predictors(model, batches, steps=3, repeats=2, **SMALL)
    for index in range(4):
        ours, theirs = found[index].state_dict(), expected[index].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(layer.calls == 0 for layer in elimination.report(model).eliminating)


def test_padding_is_not_learned_from():
    model, ids = build(dtype=torch.float32), tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = elimination.train_predictors(model, [batch], steps=2, **SMALL)
    assert all(p.isfinite().all() for index in found for p in found[index].parameters())
    assert elimination.recall_report(found, model, [batch]).sequences == 2


REFUSED = [
    ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
    ({"batches": [tokens(2, 7)]}, ValueError, "at least two blocks of 4 tokens, got 7"),
    ({"batches": [torch.zeros(2, 9)]}, TypeError, r"token ids \[B, T\] or a mapping, got torch.float32 \[2, 9\]"),
    ({"batches": ["text"]}, TypeError, r"token ids \[B, T\] or a mapping, got str"),
    ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"held": 0}, ValueError, "held must be at least 1, got 0"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"lr": 0.0}, ValueError, "lr must be a positive number, got 0.0"),
    ({"lr": float("nan")}, ValueError, "lr must be a positive number, got nan"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be a non-negative number, got -1"),
    ({"layers": []}, ValueError, "layers must name at least one decoder layer"),
    ({"layers": [4]}, ValueError, "layers must be indices of the model's 4 decoder layers, got 4"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_training_refuses(options, error, message):
    model = build(dtype=torch.float32)
    with pytest.raises(error, match=message):
        elimination.train_predictors(model, options.pop("batches", [tokens()]), **{"steps": 2, **SMALL, **options})
    assert model.training and not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_a_model_without_queries_and_keys_of_its_own_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=48)
    with pytest.raises(ValueError, match="decoder layer 0 has no input_layernorm"):
        elimination.train_predictors(transformers.GPT2LMHeadModel(config), [tokens()])


def some(**options):
    return elimination.Predictors({i: uneven(i, **options) for i in (0, 1, 2)}, "somebody/model")


def test_pruning_leaves_scores_as_they_are():
    model, found, batches = build(dtype=torch.float32), some(), [tokens(2, 22, 1), tokens(1, 40, 2)]
    with torch.no_grad():
        found[0].first.bias[[0, 3, 11]] = -100.0
        found[2].first.bias.fill_(-100.0)
    smaller, report = elimination.prune_predictors(found, model, batches, keep=0.5)
    assert report.before == {0: 12, 1: 12, 2: 12}
    assert report.after[0] <= 9 and report.after[2] == 1 and report.removed == 36 - sum(report.after.values())
    assert {index: p.rank for index, p in smaller.items()} == report.after and smaller.base_model == "somebody/model"
    assert report.recall_before == report.recall_after
    assert f"{report.removed} of 36 neurons removed; mean recall" in str(report) and "layer 2: 12 to 1" in str(report)
    observer = elimination.observation.LayerObserver(model, found)

    def visit(index, hidden, _):
        torch.testing.assert_close(smaller[index](hidden), found[index](hidden), rtol=1e-5, atol=1e-5)

    for batch in batches:
        observer.observe(batch, visit)


def test_a_neuron_that_is_active_once_stays():
    model, found = build(dtype=torch.float32), some()
    inputs, ids = [], tokens(1, 22)
    elimination.observation.LayerObserver(model, [0]).observe(ids, lambda _, hidden, __: inputs.append(hidden))
    activation = found[0].neurons(inputs[0]).detach()[0, :, 5] - found[0].first.bias.detach()[5]
    below = activation[activation < activation.max() - 1e-3].max()  # a token may be there twice
    with torch.no_grad():
        found[0].first.bias.fill_(-100.0)
        found[0].first.bias[5] = -(activation.max() + below) / 2
    smaller, report = elimination.prune_predictors(found, model, [ids])
    assert report.after[0] == 1 and report.recall_before is None
    assert torch.equal(smaller[0].first.weight[0], found[0].first.weight[5]) and smaller[0].first.bias[0] > -100
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        elimination.prune_predictors(found, model, [])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    found = elimination.Predictors({4: uneven(0), 0: uneven(1, rank=3, size=2)}, "somebody/model")
    found.save(tmp_path / "new")
    found.save(tmp_path / "new")
    loaded = elimination.Predictors.load(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "predictor_config.json",
        "predictor_model.safetensors",
    ]
    assert list(loaded) == [0, 4] and len(loaded) == 2 and loaded.base_model == "somebody/model"
    assert (loaded.block_size, loaded.hidden_size, loaded[0].rank, loaded[0].size) == (BLOCK, WIDTH, 3, 2)
    for index, own in found.items():
        assert all(torch.equal(value, loaded[index].state_dict()[name]) for name, value in own.state_dict().items())


def test_damaged_files_are_refused(tmp_path):
    some().save(tmp_path)
    config, weights = tmp_path / "predictor_config.json", tmp_path / "predictor_model.safetensors"
    text, tensors = config.read_text(), load_file(weights)

    def refused(message, error=ValueError):
        with pytest.raises(error, match=message):
            elimination.Predictors.load(tmp_path)
        config.write_text(text)
        save_file(tensors, weights)

    save_file({**tensors, "layers.0.first.bias": torch.full((12,), float("nan"))}, weights)
    refused("layers.0.first.bias holds NaN or infinity")
    save_file({**tensors, "layers.0.first.bias": torch.zeros(11)}, weights)
    refused(r"layers.0.first.bias must be float32 \[12\], got torch.float32 \[11\]")
    save_file({**tensors, "layers.0.first.bias": torch.zeros(12).bfloat16()}, weights)
    refused(r"must be float32 \[12\], got torch.bfloat16")
    save_file({**tensors, "layers.9.first.bias": torch.zeros(12)}, weights)
    refused("layers.9.first.bias is missing or not expected")
    weights.write_bytes(weights.read_bytes()[:-5])
    refused("is not a whole safetensors file")
    weights.unlink()
    refused("has no predictor_model.safetensors", FileNotFoundError)
    config.write_text("{")
    refused("is not valid JSON")
    for change, message in (
        ({"kind": "LORA"}, "kind 'TOKEN_ELIMINATION_PREDICTORS'"),
        ({"layers": {}}, "must name its layers"),
        ({"layers": {"one": {}}}, "by index, each with rank and size, got 'one'"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"base_model_name_or_path": 3}, "must name its layers"),
    ):
        config.write_text(json.dumps({**json.loads(text), **change}))
        refused(message)
    config.write_text(json.dumps({**json.loads(text), "hidden_size": 10**15}))
    refused("must be float32")  # before anything so large is made
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no predictor_config\.json"):
        elimination.Predictors.load(tmp_path)


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="must be a directory, got the file"):
        some().save(tmp_path / "file")


def test_predictors_must_be_alike():
    with pytest.raises(ValueError, match="predictors must hold at least one"):
        elimination.Predictors({})
    with pytest.raises(ValueError, match=r"of one block_size, got \[4, 8\]"):
        elimination.Predictors({0: predictor(), 1: predictor(block_size=8)})
    with pytest.raises(ValueError, match=r"of one hidden_size, got \[8, 16\]"):
        elimination.Predictors({0: predictor(), 1: predictor(hidden_size=8)})
    with pytest.raises(TypeError, match=r"predictors\[1\] must be a BlockPredictor, got Linear"):
        elimination.Predictors({1: torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="an index of predictors must be at least 0, got -1"):
        elimination.Predictors({-1: predictor()})


def test_attached_predictors_choose_what_a_layer_computes_for():
    model, found, ids = build(), some(), tokens(length=22)
    config = peft_kernels.TokenEliminationConfig(keep_ratio=0.4, layers=[1, 2], block_size=BLOCK, score="predictor")
    peft_kernels.inject(model, config)
    with pytest.raises(RuntimeError, match='score="predictor" needs a predictor'):
        model(input_ids=ids)
    names = list(model.state_dict())
    found.attach(model)
    assert list(model.state_dict()) == names
    seen, inputs = [], []
    layer = layers_of(model)[1]
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    make = layer.elimination._make
    layer.elimination._make = lambda *args: seen.append(make(*args)) or seen[-1]
    model(input_ids=ids, labels=ids).loss.backward()
    scores = found[1](inputs[0].detach())
    expected = scores.argsort(dim=1, descending=True)[:, :2].sort(1).values
    assert torch.equal(seen[0].positions[:, :8:BLOCK] // BLOCK, expected)
    assert all(parameter.grad is None for parameter in found[1].parameters())


def test_attaching_refuses_what_does_not_fit_and_changes_nothing():
    def refused(found, message, **options):
        model = build()
        peft_kernels.inject(
            model,
            peft_kernels.TokenEliminationConfig(
                **{"keep_ratio": 0.5, "layers": [1, 2], "block_size": BLOCK, "score": "predictor", **options}
            ),
        )
        with pytest.raises(ValueError, match=message):
            found.attach(model)
        assert all(layer.elimination.predictor is None for layer in elimination.eliminating_layers(model).values())

    refused(some(), 'with score="predictor", and has none', score="norm")
    refused(some(), r"for the layers \[1, 3\], got none for \[3\]", layers=[1, 3])
    refused(some(), "for blocks of 4 tokens, layer 1 has 8", block_size=8)
    refused(some(hidden_size=8), "hidden states of 8 channels, the model has 16")
    with pytest.raises(ValueError, match="hidden states of 8 channels, the model has 16"):
        elimination.recall_report(some(hidden_size=8), build(), [tokens()])


@pytest.mark.parametrize("keep", [0, 1.0, float("nan"), True])
def test_recall_is_of_a_ratio(keep):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\)"):
        elimination.recall_report(some(), build(), [tokens()], keep)


def test_recall_needs_batches():
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        elimination.recall_report(some(), build(), [])
