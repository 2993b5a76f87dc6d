"""`Reselector` step by step against sparse fine-tuning the plain way, on whole matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels import Reselector
from peft_kernels.nn import SparseDeltaLinear

from ..support.accuracy import assert_same_bits
from ..support.dense_sft import DenseSft, Layer
from ..support.sparse_training import batches, layers_of, make_optimizer, small_net, train_step

SETTINGS = {"reselection_steps": 4, "selection_accumulation_steps": 2, "initial_reselection_rate": 0.5}
TOTAL = 18
PLAIN = {"AdamW": "adamw", "fused AdamW": "adamw", "SparseAdamW": "adamw", "SparseSM3": "sm3", "SGD": "sgd"}
PAIRS = [
    *itertools.product(["rigl", "magnitude"], PLAIN),
    ("sm3", "SparseSM3"),
]


def plain_twin(model, selection, optimizer, schedule="linear", **changes):
    """The same training on whole matrices."""
    layers = []
    for layer in layers_of(model):
        mask = torch.zeros_like(layer.weight, dtype=torch.bool)
        mask.view(-1)[layer.indices.long()] = True
        layers.append(Layer(layer.weight.detach().clone(), mask))
    return DenseSft(
        layers, selection, PLAIN[optimizer], *SETTINGS.values(), schedule=schedule, total_steps=TOTAL, **changes
    )


def assert_same(model, optimizer, plain):
    """Positions exactly; deltas, moments and weights but for rounding."""
    for ours, theirs, weight in zip(layers_of(model), plain.layers, plain.weights(), strict=True):
        where = theirs.mask.flatten().nonzero().flatten()
        assert ours.indices.tolist() == where.tolist()
        torch.testing.assert_close(ours.values.detach(), theirs.delta.flatten()[where])
        ours.write()
        torch.testing.assert_close(ours.weight.detach(), weight)
        state = optimizer.state[ours.values]
        expected = {
            "exp_avg": theirs.m.flatten()[where],
            "momentum_buffer": theirs.m.flatten()[where],
            "exp_avg_sq": theirs.v.flatten()[where],
            "row_max": theirs.row,
            "column_max": theirs.column,
        }
        compared = [name for name in expected if name in state]
        assert compared
        for name in compared:
            torch.testing.assert_close(state[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def run_both(selection, optimizer_name, parts=1, schedule="linear", max_norm=None):
    """All steps side by side; how many entries moved in each."""
    model = small_net()
    optimizer = make_optimizer(optimizer_name, model)
    changes = {} if max_norm is None else {"max_norm": max_norm}
    plain = plain_twin(model, selection, optimizer_name, schedule, **changes)
    reselector = Reselector(model, optimizer, selection, schedule=schedule, total_steps=TOTAL, **SETTINGS)
    data = batches(TOTAL * parts)
    moved = []
    for step in range(TOTAL):
        microbatches = data[step * parts : (step + 1) * parts]
        moved.append(train_step(model, optimizer, reselector, microbatches, max_norm))
        plain.step(microbatches)
        assert moved[-1] == plain.moved
        assert_same(model, optimizer, plain)
    return moved


@pytest.mark.parametrize(("selection", "optimizer"), PAIRS)
def test_every_step_is_that_of_the_plain_method(selection, optimizer):
    moved = run_both(selection, optimizer)
    all_entries = 14
    # Behind the steps 2, 6, 10, 14 and 18; the last has rate 0.
    assert [step + 1 for step, number in enumerate(moved) if number] == [2, 6, 10] + [14] * (moved[13] > 0)
    first = all_entries if selection in ("rigl", "sm3") else 4 + 2  # floor(0.5 (1 - 2 / 18) nnz) of each layer
    assert moved[1] == first
    assert 0 < moved[5] < all_entries


@pytest.mark.parametrize("selection", ["rigl", "sm3"])
def test_cosine_schedule(selection):
    run_both(selection, "SparseSM3", schedule="cosine")


@pytest.mark.parametrize("optimizer", ["AdamW", "SparseAdamW"])
def test_microbatches_between_two_steps_are_one_gradient(optimizer):
    run_both("rigl", optimizer, parts=3)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_clipping_reaches_the_gradients_of_candidates(optimizer):
    run_both("rigl", optimizer, parts=2, max_norm=0.05)


def test_loss_scaling_reaches_the_gradients_of_candidates():
    # A power of two, so that nothing rounds differently: the same bits as without the scale.
    runs = []
    for scale in (1.0, 1024.0):
        model = small_net(torch.float32)
        optimizer = make_optimizer("AdamW", model)
        reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
        for x, y in batches(10, torch.float32):
            (((model(x) - y) ** 2).mean() * scale).backward()
            for layer in layers_of(model):
                layer.values.grad /= scale
            optimizer.step()
            optimizer.zero_grad()
            reselector.step()
        runs.append([*(layer.values for layer in layers_of(model)), *(layer.indices for layer in layers_of(model))])
    for plain, scaled in zip(*runs, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_a_step_that_the_optimizer_leaves_out_does_not_count():
    # What a gradient scaler does behind an overflow: the pass is there, the step is not.
    data = batches(10)
    results = []
    for overflows in (False, True):
        model = small_net()
        optimizer = make_optimizer("SparseAdamW", model)
        reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
        for number, part in enumerate(data):
            if overflows and number in (0, 1, 5):
                x, y = part
                (((model(x) - y) ** 2).mean() * float("inf")).backward()
                optimizer.zero_grad()
                assert reselector.step() == 0
            train_step(model, optimizer, reselector, [part])
        assert reselector.completed_steps == 10
        results.append([layer.values.detach().clone() for layer in layers_of(model)])
    for plain, other in zip(*results, strict=True):
        assert_same_bits(other, plain)


def test_random_positions_are_inactive_and_even():
    counts = torch.zeros(11 * 13)
    for seed in range(300):
        model = small_net()
        layer = layers_of(model)[0]
        before = set(layer.indices.tolist())
        optimizer = make_optimizer("SGD", model)
        settings = {**SETTINGS, "initial_reselection_rate": 1.0}
        reselector = Reselector(model, optimizer, "random", total_steps=TOTAL, seed=seed, **settings)
        for part in batches(2):
            train_step(model, optimizer, reselector, [part])
        new = set(layer.indices.tolist()) - before
        assert len(new) == 8  # floor((1 - 2 / 18) 9)
        counts[list(new)] += 1
    inactive = torch.ones(11 * 13, dtype=torch.bool)
    inactive[sorted(before)] = False
    # 300 draws of 8 of 134: 17.9 each, with a standard deviation of 4.1.
    assert counts[inactive].min() > 17.9 - 4.5 * 4.1
    assert counts[inactive].max() < 17.9 + 4.5 * 4.1


def test_random_positions_follow_the_seed_and_leave_torchs_generator_alone():
    found = []
    for seed in (3, 3, 4):
        model = small_net()
        optimizer = make_optimizer("SGD", model)
        reselector = Reselector(model, optimizer, "random", total_steps=TOTAL, seed=seed, **SETTINGS)
        state = torch.get_rng_state()
        for part in batches(7):
            train_step(model, optimizer, reselector, [part])
        assert torch.equal(torch.get_rng_state(), state)
        found.append([layer.indices.tolist() for layer in layers_of(model)])
    assert found[0] == found[1] != found[2]


def test_fixed_moves_nothing_and_needs_no_total():
    model = small_net()
    before = [layer.indices.clone() for layer in layers_of(model)]
    optimizer = make_optimizer("SparseAdamW", model)
    reselector = Reselector(model, optimizer, "fixed", reselection_steps=2, selection_accumulation_steps=1)
    assert [train_step(model, optimizer, reselector, [part]) for part in batches(6)] == [0] * 6
    for layer, indices in zip(layers_of(model), before, strict=True):
        assert_same_bits(layer.indices, indices)
        assert layer.gradient_observer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("selection", "optimizer"), [("rigl", "SparseAdamW"), ("rigl", "AdamW"), ("sm3", "SparseSM3")])
def test_the_weight_is_restored_to_the_bit_after_training(dtype, selection, optimizer):
    model = small_net(dtype)
    before = [layer.weight.detach().clone() for layer in layers_of(model)]
    steps = make_optimizer(optimizer, model)
    values = [layer.values for layer in layers_of(model)]
    reselector = Reselector(model, steps, selection, total_steps=TOTAL, **SETTINGS)
    moved = [train_step(model, steps, reselector, [part]) for part in batches(TOTAL, dtype)]
    assert sum(moved) > 14
    for layer, weight, parameter in zip(layers_of(model), before, values, strict=True):
        assert layer.values is parameter
        assert not torch.equal(layer.weight, weight)
        layer.restore_weight()
        assert_same_bits(layer.weight.detach(), weight)


def test_optimizer_state_stays_in_its_tensors():
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
    data = batches(TOTAL)
    train_step(model, optimizer, reselector, [data[0]])
    values = layers_of(model)[0].values
    before = {name: tensor.data_ptr() for name, tensor in optimizer.state[values].items()}
    assert train_step(model, optimizer, reselector, [data[1]]) > 0
    assert {name: tensor.data_ptr() for name, tensor in optimizer.state[values].items()} == before


def test_the_gradient_of_the_old_positions_is_dropped_with_them():
    model = small_net()
    optimizer = make_optimizer("AdamW", model)
    reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
    for number, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        reselector.step()
        # The second step moves entries.
        assert [layer.values.grad is None for layer in layers_of(model)] == [number == 1] * 2


def test_windows_observe_only_while_they_are_open():
    model = small_net()
    optimizer = make_optimizer("SparseAdamW", model)
    reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
    watched = []
    for part in batches(TOTAL):
        watched.append([layer.gradient_observer is not None for layer in layers_of(model)])
        train_step(model, optimizer, reselector, [part])
    assert watched == [[step % 4 < 2] * 2 for step in range(TOTAL)]


def test_windows_may_follow_each_other_without_a_gap():
    model = small_net()
    optimizer = make_optimizer("SparseAdamW", model)
    reselector = Reselector(
        model, optimizer, reselection_steps=3, selection_accumulation_steps=3, initial_reselection_rate=1, total_steps=9
    )
    moved = [train_step(model, optimizer, reselector, [part]) for part in batches(9)]
    assert [number > 0 for number in moved] == [False, False, True, False, False, True, False, False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_show_each_pass_once(reentrant):
    results = []
    for checkpointed in (False, True):
        model = small_net()
        optimizer = make_optimizer("SparseAdamW", model)
        reselector = Reselector(model, optimizer, total_steps=TOTAL, **SETTINGS)
        seen = 0
        for step, (x, y) in enumerate(batches(8)):
            for layer in layers_of(model):
                if layer.gradient_observer is not None and step == 0:
                    observe = layer.gradient_observer

                    def counted(dy, rows, observe=observe):
                        nonlocal seen
                        seen += 1
                        observe(dy, rows)

                    layer.gradient_observer = counted
            x.requires_grad_()
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            ((out - y) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            reselector.step()
        assert seen == 2 * 2  # two layers, the two steps of the first window
        results.append([layer.values.detach().clone() for layer in layers_of(model)])
    for plain, other in zip(*results, strict=True):
        assert_same_bits(other, plain)


def test_a_layer_that_takes_no_part_stays_as_it_is():
    model = small_net()
    idle = layers_of(small_net(seed=5))[0]
    before = idle.indices.clone()
    values = [layer.values for layer in (*layers_of(model), idle)]
    optimizer = torch.optim.AdamW(values, lr=0.01)
    reselector = Reselector([*layers_of(model), idle], optimizer, total_steps=TOTAL, **SETTINGS)
    assert sum(train_step(model, optimizer, reselector, [part]) for part in batches(8)) > 0
    assert_same_bits(idle.indices, before)


@pytest.mark.parametrize("empty", ["no rows", "zero gradient", "zero input"])
def test_a_pass_without_a_gradient_chooses_no_candidates(empty):
    # As when no token goes to an expert: the next pass chooses.
    found = []
    for with_empty in (False, True):
        layer = layers_of(small_net())[0]
        optimizer = torch.optim.SGD([layer.values], lr=0.01)
        reselector = Reselector([layer], optimizer, total_steps=TOTAL, **SETTINGS)
        x = batches(1)[0][0]
        if with_empty:
            rows = x[:0] if empty == "no rows" else x * (0 if empty == "zero input" else 1)
            (layer(rows).square().sum() * (0 if empty == "zero gradient" else 1)).backward()
        layer(x).square().sum().backward()
        optimizer.step()
        window = layer.gradient_observer.__self__
        found.append((window.candidates.tolist(), window.total.tolist()))
        reselector.close()
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1])


def test_a_layer_used_twice_gives_one_gradient():
    # Against the same sum over rows in one call.
    results = []
    for twice in (False, True):
        layer = layers_of(small_net())[0]
        optimizer = torch.optim.SGD([layer.values], lr=0.01)
        reselector = Reselector([layer], optimizer, total_steps=TOTAL, **SETTINGS)
        window = layer.gradient_observer.__self__
        for x, _ in batches(1):
            # The last call's pass runs first; it alone chooses the candidates.
            loss = layer(x[:1]).square().sum() + layer(x[1:]).square().sum() if twice else layer(x).square().sum()
            loss.backward()
            optimizer.step()
        results.append((window.steps, dict(zip(window.candidates.tolist(), window.total.tolist(), strict=True))))
        reselector.close()
    (steps, once), (steps_twice, both) = results
    assert steps == steps_twice == 1
    common = once.keys() & both.keys()
    assert common
    assert [both[position] for position in sorted(common)] == pytest.approx([once[p] for p in sorted(common)])


def test_ties_go_to_the_smaller_position():
    layer = layers_of(small_net())[0]
    layer.set_delta(torch.arange(100, 109))
    optimizer = torch.optim.SGD([layer.values], lr=0.0)
    settings = {"reselection_steps": 2, "selection_accumulation_steps": 1, "initial_reselection_rate": 0.5}
    reselector = Reselector([layer], optimizer, total_steps=100, **settings)
    for expected in ([*range(9)], [*range(4, 13)]):
        # All of dW is the same number, and so are all deltas: they stay zero.
        layer(torch.ones(3, 13, dtype=torch.float64)).sum().backward()
        optimizer.step()
        reselector.step()
        if expected[0] == 0:
            assert layer.indices.tolist() == expected
            layer(torch.ones(3, 13, dtype=torch.float64)).sum().backward()
            optimizer.step()
            reselector.step()
    assert layer.indices.tolist() == expected


def test_full_and_empty_deltas_are_left_alone():
    linears = [torch.nn.Linear(3, 2) for _ in range(2)]
    full = SparseDeltaLinear.from_linear(linears[0], density=1.0)
    empty = SparseDeltaLinear.from_linear(linears[1], num_deltas=0)
    for selection in ("rigl", "random", "magnitude"):
        optimizer = torch.optim.AdamW([full.values, empty.values], lr=0.1)
        reselector = Reselector(
            [full, empty], optimizer, selection, reselection_steps=1, selection_accumulation_steps=1, total_steps=5
        )
        for _ in range(4):
            (full(torch.ones(2, 3)) + empty(torch.ones(2, 3))).sum().backward()
            optimizer.step()
            assert reselector.step() == 0
        reselector.close()


def test_a_compiled_model_is_watched_too():
    torch._dynamo.reset()
    results, frames = [], []
    for compiled in (False, True):
        model = small_net(torch.float32)
        optimizer = make_optimizer("SparseAdamW", model)
        reselector = Reselector(model, optimizer, total_steps=30, **SETTINGS)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for number, part in enumerate(batches(30, torch.float32)):
            train_step(call, optimizer, reselector, [part])
            if compiled and number in (11, 29):
                frames.append(torch._dynamo.utils.counters["frames"]["total"])
        results.append([layer.indices.tolist() for layer in layers_of(model)])
    assert results[0] == results[1]
    # Once with an observer and once without; later windows find what the first ones have compiled.
    assert frames[0] == frames[1] > 0


def test_gradients_find_where_a_sparse_teacher_differs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator)
    changed = torch.randperm(weight.numel(), generator=generator)[:8].sort().values
    teacher = weight.clone()
    teacher.view(-1)[changed] += torch.tensor([1.0, -1.0]).repeat(4)
    linear = torch.nn.Linear(24, 16, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = SparseDeltaLinear.from_linear(linear, num_deltas=8, generator=generator)
    optimizer = torch.optim.AdamW([layer.values], lr=0.05, weight_decay=0.0)
    reselector = Reselector([layer], optimizer, reselection_steps=10, selection_accumulation_steps=3, total_steps=200)
    for _ in range(200):
        x = torch.randn(32, 24, generator=generator)
        (layer(x) - x @ teacher.t()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
    assert layer.indices.tolist() == changed.tolist()
    torch.testing.assert_close(layer.values.detach(), torch.tensor([1.0, -1.0]).repeat(4), rtol=0.0, atol=0.05)
