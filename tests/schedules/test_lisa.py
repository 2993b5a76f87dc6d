"""LISA: which layers train, and for how long."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from peft_kernels.schedules import LISA
from peft_kernels.schedules.layers import transformer_layers

from .nets import net, run


def build(**options):
    model = net(layers=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, LISA(model, optimizer, **options)


def layers_of(names):
    return {name.split(".")[1] for name in names}


def test_as_many_layers_as_asked_for_train_for_an_interval():
    model, optimizer, schedule = build(active_layers=2, interval=4, seed=3)
    trained = run(model, optimizer, schedule, 0, 40)
    for step, names in enumerate(trained):
        drawn = schedule.drawn(step // 4)
        assert layers_of(names) == {path.split(".")[1] for path in drawn}
        expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{p}." for p in drawn))}
        assert names == expected
        assert len(drawn) == 2 and list(drawn) == sorted(drawn)


def test_every_layer_gets_its_turn_evenly():
    _, _, schedule = build(active_layers=2, interval=1)
    counts = dict.fromkeys(schedule.layers, 0)
    for number in range(500):
        for path in schedule.drawn(number):
            counts[path] += 1
    # 500 draws of 2 of 5: 200 each, with a standard deviation of 11.
    assert all(150 < count < 250 for count in counts.values()), counts


def test_the_seed_decides():
    draws = {}
    for seed in (0, 0, 1):
        _, _, schedule = build(seed=seed)
        draws.setdefault(seed, []).append([schedule.drawn(number) for number in range(20)])
    assert draws[0][0] == draws[0][1] != draws[1][0]
    assert any(set(now) & set(then) for now, then in pairwise(draws[0][0]))


def test_all_layers_may_train():
    model, optimizer, schedule = build(active_layers=5, interval=1)
    run(model, optimizer, schedule, 0, 3)
    assert schedule.frozen == ()
    assert all(parameter in optimizer.state for parameter in model.parameters())


def test_layers_without_anything_to_train_are_left_out():
    model = net(layers=4)
    model.layers[0].requires_grad_(False)
    model.layers[2].requires_grad_(False)
    schedule = LISA(model, torch.optim.AdamW(model.parameters()), active_layers=1, interval=1)
    assert list(schedule.layers) == ["layers.1", "layers.3"]
    schedule.close()
    with pytest.raises(ValueError, match="active_layers must be at most the number of layers that train, 2, got 3"):
        LISA(model, torch.optim.AdamW(model.parameters()), active_layers=3)


class TwoLists(nn.Module):
    """An encoder and a decoder, a list inside a layer, and a small list beside them."""

    def __init__(self):
        super().__init__()

        def layers(count):
            return nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])) for _ in range(count))

        self.encoder, self.decoder = layers(2), layers(3)
        self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])


def test_layers_are_found():
    assert list(transformer_layers(net(layers=3))) == ["layers.0", "layers.1", "layers.2"]
    model = TwoLists()
    both = [f"encoder.{number}" for number in range(2)] + [f"decoder.{number}" for number in range(3)]
    assert list(transformer_layers(model)) == both
    assert list(transformer_layers(model, "decoder")) == both[2:]
    assert list(transformer_layers(model, ["decoder", "heads"])) == [*both[2:], "heads.0", "heads.1"]


def test_a_parameter_that_two_layers_share_trains_with_either():
    model = net(layers=3)
    model.layers[2].mlp = model.layers[0].mlp
    schedule = LISA(model, torch.optim.AdamW(model.parameters()), active_layers=1, interval=1)
    shared = "layers.0.mlp.up_proj.weight"
    for number in range(12):
        drawn = schedule.drawn(number)[0]
        assert (shared in schedule._names(number)) == (drawn != "layers.1")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"active_layers": 0}, ValueError, "active_layers must be an integer of at least 1, got 0"),
        ({"active_layers": 6}, ValueError, "active_layers must be at most the number of layers that train, 5, got 6"),
        ({"active_layers": 1.5}, ValueError, "active_layers must be an integer of at least 1, got 1.5"),
        ({"interval": 0}, ValueError, "interval must be an integer of at least 1, got 0"),
        ({"interval": True}, ValueError, "interval must be an integer of at least 1, got True"),
        ({"seed": "a"}, ValueError, "seed must be an integer, got 'a'"),
        ({"layers": "blocks"}, ValueError, "layers names 'blocks', which the model does not have"),
        ({"layers": "norm"}, TypeError, "layers must name an nn.ModuleList, but 'norm' is a LayerNorm"),
        ({"layers": []}, ValueError, r"layers must name at least one nn.ModuleList with modules in it, got \[\]"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(options, error, message):
    model = net(layers=5)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=message):
        LISA(model, optimizer, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
