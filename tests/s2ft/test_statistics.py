"""Activations and gradients of calibration batches, against the whole tensors; the model is left as it was."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.channels import collect_activations, collect_gradients, find_structure, select

from ..support.accuracy import assert_same_bits
from .architectures import build, every_architecture, flags, logits, state, tokens


def batches(count=3):
    """Of different lengths."""
    for number in range(count):
        ids = tokens(seed=number, length=5 + 2 * number)
        yield {"input_ids": ids, "labels": ids}


def inputs_of(model, paths, **inputs):
    """What each layer was given, `[M, K]`."""
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.__setitem__(path, args[0].flatten(0, -2))
        )
        for path in paths
    ]
    logits(model, **inputs)
    for handle in handles:
        handle.remove()
    return seen


@every_architecture
def test_activations_are_sums_of_squares_over_all_tokens(name):
    model = build(name)
    structure = find_structure(model)
    totals = collect_activations(model, batches(), structure)
    paths = [block.output for block in structure.blocks]
    assert list(totals) == paths
    seen = [inputs_of(model, paths, **batch) for batch in batches()]
    for path in paths:
        expected = torch.cat([of[path] for of in seen]).square().sum(0)
        assert totals[path].dtype == torch.float64
        torch.testing.assert_close(totals[path], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "opt"])
def test_padding_does_not_count(name):
    model = build(name)
    short, long = tokens(seed=1, batch=1, length=4), tokens(seed=2, batch=1, length=7)
    apart = collect_activations(model, [{"input_ids": short}, {"input_ids": long}])
    padded = torch.cat((short, torch.full((1, 3), 33)), 1)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    together = collect_activations(model, [{"input_ids": torch.cat((padded, long)), "attention_mask": mask}])
    without = collect_activations(model, [{"input_ids": torch.cat((padded, long))}])
    for path, total in apart.items():
        torch.testing.assert_close(together[path], total, rtol=1e-10, atol=0)
        assert not torch.allclose(without[path], total, rtol=1e-3)


def test_small_numbers_are_not_lost_in_bfloat16():
    model = build("llama", torch.bfloat16)
    structure = find_structure(model)
    totals = collect_activations(model, list(batches()) * 20, structure)
    once = collect_activations(model, batches(), structure)
    for path, total in totals.items():
        torch.testing.assert_close(total, 20 * once[path], rtol=1e-12, atol=0)


def exact_gradients(model, structure, roles):
    """Per batch the whole gradient of each weight, `[N, K]`, then the squared norms of its rows or columns."""
    totals: dict[str, list[torch.Tensor]] = {}
    for batch in batches():
        model.requires_grad_(True)
        model.zero_grad()
        model(**batch).loss.backward()
        for role in roles:
            for of in structure.units(role):
                layer = model.get_submodule(of.path)
                gradient = layer.weight.grad if isinstance(layer, torch.nn.Linear) else layer.weight.grad.t()
                totals.setdefault(of.path, []).append(gradient.square().sum(1 if of.dim == "output" else 0))
    model.zero_grad()
    # The roles of a fused layer each have counted it.
    return {path: torch.stack(parts).sum(0) * 3 / len(parts) for path, parts in totals.items()}


@every_architecture
def test_gradients_are_those_of_the_whole_weight(name):
    model = build(name)
    structure = find_structure(model)
    roles = [role for role in ("q", "v", "o", "up", "down") if structure.units(role)]
    expected = exact_gradients(model, structure, roles)
    totals = collect_gradients(model, batches(), structure, roles=roles)
    assert set(totals) == set(expected)
    for path, total in totals.items():
        torch.testing.assert_close(total, expected[path], rtol=1e-10, atol=1e-30)
    if name == "llama":
        assert len(collect_gradients(model, batches(1))) == 14


def test_a_loss_of_one_s_own():
    model = build("llama")
    expected = collect_gradients(model, batches(), roles=["down"])
    doubled = collect_gradients(model, batches(), roles=["down"], loss=lambda output, batch: 2 * output.loss)
    for path, total in doubled.items():
        torch.testing.assert_close(total, 4 * expected[path], rtol=1e-12, atol=0)


def test_every_statistic_serves_to_select():
    model = build("qwen2")
    activations = collect_activations(model, batches())
    gradients = collect_gradients(model, batches())
    ratios = {role: 0.5 for role in ("q", "k", "v", "o", "up", "gate", "down")}
    for selection in ("activation", "weight_activation", "gradient"):
        for coupled in (True, False):
            chosen = select(
                model, ratios, selection=selection, coupled=coupled, activations=activations, gradients=gradients
            )
            assert chosen.chosen["down"] == (39, 78)


@pytest.mark.parametrize("collect", [collect_activations, collect_gradients])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(collect, fails):
    model = build("llama-grouped")
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.grad = torch.ones(24, 39, dtype=torch.float64)
    before, expected = state(model), flags(model)

    def failing():
        yield from batches(1)
        raise KeyError("the data set has ended")

    if fails:
        with pytest.raises(KeyError, match="the data set has ended"):
            collect(model, failing())
    else:
        collect(model, batches())
    after = flags(model)
    assert (after[0], after[2]) == (expected[0], 0)
    for (required, gradient), (required_before, gradient_before) in zip(after[1], expected[1], strict=True):
        assert required == required_before and gradient is gradient_before
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)
    assert float(model.model.layers[0].mlp.down_proj.weight.grad.sum()) == 24 * 39


def test_gradients_can_be_collected_where_none_are_wanted():
    model = build("llama").requires_grad_(False)
    with torch.no_grad():
        totals = collect_gradients(model, batches(1), roles=["down"])
    assert all(float(total.sum()) > 0 for total in totals.values())


IDS = tokens()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches must hold at least one"),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)}],
            r"attention_mask must be .*got \[2, 1, 9, 9\]",
        ),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(2, 9)}], "batches must hold at least one token"),
    ],
)
def test_bad_batches_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        collect_activations(build("llama"), given)


def test_a_mask_that_does_not_fit_is_refused():
    structure = find_structure(build("opt"))

    class Reshaping(torch.nn.Module):
        """Gives the model half of its tokens."""

        def __init__(self):
            super().__init__()
            self.inner = build("opt")

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids[:1])

    model = Reshaping()
    assert len(find_structure(model).mlps) == len(structure.mlps)
    with pytest.raises(ValueError, match=r"attention_mask has 18 positions, but inner\.model.* gets 9"):
        collect_activations(model, [{"input_ids": IDS, "attention_mask": torch.ones(2, 9)}])


def test_an_encoder_s_mask_is_refused():
    model = build("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="attention_mask of an encoder-decoder model"):
        collect_activations(model, [{"input_ids": IDS, "attention_mask": torch.ones(2, 9)}])


def test_batches_that_are_no_mappings_are_refused():
    with pytest.raises(TypeError, match="batches must hold mappings of the model's arguments, got a Tensor"):
        collect_activations(build("llama"), [IDS])


@pytest.mark.parametrize(
    ("given", "loss", "message"),
    [
        ([], None, "batches must hold at least one batch, got none"),
        ([{"input_ids": IDS}], None, "the model returned no loss; batches must hold labels"),
        ([{"input_ids": IDS}], lambda output, _: output.logits, r"loss must be a finite scalar, got \[2, 9, 64\]"),
        ([{"input_ids": IDS}], lambda output, _: output.logits.sum() * torch.nan, "loss must be a finite scalar, got"),
        ([{"input_ids": IDS}], lambda output, _: 1.0, "loss must be a finite scalar, got 1.0"),
    ],
)
def test_bad_losses_are_refused(given, loss, message):
    with pytest.raises(ValueError, match=message):
        collect_gradients(build("llama"), given, loss=loss)


def test_a_layer_that_is_not_reached_is_named():
    class Half(torch.nn.Module):
        """Uses one of two models."""

        def __init__(self):
            super().__init__()
            self.used, self.idle = build("phi"), build("phi")

        def forward(self, **inputs):
            return self.used(**inputs)

    for collect in (collect_activations, collect_gradients):
        with pytest.raises(ValueError, match=r"no batch reaches idle\.model\.layers\.0"):
            collect(Half(), batches(1))
    with pytest.raises(ValueError, match="role must be one of"):
        collect_gradients(build("phi"), batches(1), roles=["head"])
