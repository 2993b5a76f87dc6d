"""Backward FLOPs: against numbers worked out by hand, and against what autograd really multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from peft_kernels.schedules import BackwardFlops, TensorCost, profile_backward_flops

from .nets import SAMPLE, WIDTH, net

transformers = pytest.importorskip("transformers")

VOCABULARY, HIDDEN, MLP, LAYERS, HEADS, BATCH, LENGTH = 40, 16, 24, 2, 4, 3, 5
ROWS = BATCH * LENGTH
KEYS = HIDDEN // 2
"""Width of keys and values: two of their heads serve four of the queries'."""


def llama(attention="sdpa", **changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "attn_implementation": attention,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes))


def tokens():
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def linear(inputs, outputs):
    return 2 * ROWS * inputs * outputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_costs_what_one_finds_by_hand(attention):
    flops = profile_backward_flops(llama(attention), {"input_ids": tokens()})
    norm = 6 * ROWS * HIDDEN
    # Gradients of query, key, probabilities and value for each pair of positions of each head.
    scores = 4 * 2 * BATCH * HEADS * LENGTH * LENGTH * (HIDDEN // HEADS)
    attention_levels = [scores] if attention == "sdpa" else [scores // 2, scores // 2]
    layer = [
        norm,
        linear(HIDDEN, HIDDEN) + 2 * linear(HIDDEN, KEYS),
        *attention_levels,
        linear(HIDDEN, HIDDEN),
        norm,
        2 * linear(HIDDEN, MLP),
        linear(MLP, HIDDEN),
    ]
    assert list(flops.activation_gradients) == [0, *layer, *layer, norm, linear(HIDDEN, VOCABULARY)]
    assert flops.uncounted == ()

    shift = len(attention_levels)
    expected = {"model.embed_tokens.weight": TensorCost(0, ROWS * HIDDEN)}
    for number in range(LAYERS):
        first, path = 1 + number * len(layer), f"model.layers.{number}"
        expected |= {
            f"{path}.input_layernorm.weight": TensorCost(first, 2 * ROWS * HIDDEN),
            f"{path}.self_attn.q_proj.weight": TensorCost(first + 1, linear(HIDDEN, HIDDEN)),
            f"{path}.self_attn.k_proj.weight": TensorCost(first + 1, linear(HIDDEN, KEYS)),
            f"{path}.self_attn.v_proj.weight": TensorCost(first + 1, linear(HIDDEN, KEYS)),
            f"{path}.self_attn.o_proj.weight": TensorCost(first + shift + 2, linear(HIDDEN, HIDDEN)),
            f"{path}.post_attention_layernorm.weight": TensorCost(first + shift + 3, 2 * ROWS * HIDDEN),
            f"{path}.mlp.gate_proj.weight": TensorCost(first + shift + 4, linear(HIDDEN, MLP)),
            f"{path}.mlp.up_proj.weight": TensorCost(first + shift + 4, linear(HIDDEN, MLP)),
            f"{path}.mlp.down_proj.weight": TensorCost(first + shift + 5, linear(MLP, HIDDEN)),
        }
    last = len(flops.activation_gradients) - 1
    expected |= {
        "model.norm.weight": TensorCost(last - 1, 2 * ROWS * HIDDEN),
        "lm_head.weight": TensorCost(last, linear(HIDDEN, VOCABULARY)),
    }
    assert dict(flops.tensors) == expected

    whole = sum(cost.weight_gradient for cost in expected.values()) + sum(flops.activation_gradients)
    assert flops.full == whole
    assert flops.of(["lm_head.weight"]) == linear(HIDDEN, VOCABULARY)
    assert flops.of(["model.norm.weight"]) == 2 * ROWS * HIDDEN + linear(HIDDEN, VOCABULARY)
    gate_and_down = ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    assert flops.of(gate_and_down) == 3 * linear(HIDDEN, MLP) + norm + linear(HIDDEN, VOCABULARY)
    assert flops.of([]) == 0


def products_of_backward(model, names):
    """FLOPs that autograd spends on matrix products when only `names` require a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def products_of(flops, names):
    """The same by our count: without norms and embeddings, which the counter does not see."""
    matrices = [name for name in names if "norm" not in name and "embed" not in name]
    lowest = min(flops.tensors[name].level for name in names)
    norms = {cost.level for name, cost in flops.tensors.items() if "norm" in name}
    passed = sum(work for level, work in enumerate(flops.activation_gradients) if level > lowest and level not in norms)
    return passed + sum(flops.tensors[name].weight_gradient for name in matrices)


@pytest.mark.parametrize(
    "names",
    [
        ["lm_head.weight"],
        ["model.norm.weight"],
        ["model.layers.1.mlp.down_proj.weight"],
        ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"],
        ["model.layers.1.self_attn.o_proj.weight"],
        [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"],
        ["model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.k_proj.weight"],
        ["model.layers.0.input_layernorm.weight"],
        ["model.embed_tokens.weight"],
        None,
    ],
    ids=str,
)
def test_the_count_is_what_autograd_multiplies(names):
    model = llama("eager")
    flops = profile_backward_flops(model, {"input_ids": tokens()})
    chosen = list(flops.tensors) if names is None else names
    assert products_of(flops, chosen) == products_of_backward(model, chosen)


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_where_autograd_saves_more_the_count_is_a_bound(name):
    # One of the two products before the projection, and not the others, is all that its gradient needs.
    model = llama("eager")
    flops = profile_backward_flops(model, {"input_ids": tokens()})
    chosen = [f"model.layers.0.self_attn.{name}.weight"]
    assert products_of(flops, chosen) > products_of_backward(model, chosen)


def test_tied_embeddings_cost_both_uses_and_reach_down_to_the_first():
    tied = profile_backward_flops(llama(tie_word_embeddings=True), {"input_ids": tokens()})
    cost = tied.tensors["model.embed_tokens.weight"]
    assert cost == TensorCost(0, ROWS * HIDDEN + linear(HIDDEN, VOCABULARY))
    assert "lm_head.weight" not in tied.tensors
    assert tied.of(["model.embed_tokens.weight"]) == cost.weight_gradient + sum(tied.activation_gradients)


def test_biases_and_transformers_conv1d():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=HIDDEN, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config)
    flops = profile_backward_flops(model, {"input_ids": tokens()})
    path = "transformer.h.0"
    costs = {
        name.removeprefix(f"{path}."): cost.weight_gradient for name, cost in flops.tensors.items() if path in name
    }
    assert costs == {
        "ln_1.weight": 2 * ROWS * HIDDEN,
        "ln_1.bias": ROWS * HIDDEN,
        "attn.c_attn.weight": linear(HIDDEN, 3 * HIDDEN),
        "attn.c_attn.bias": ROWS * 3 * HIDDEN,
        "attn.c_proj.weight": linear(HIDDEN, HIDDEN),
        "attn.c_proj.bias": ROWS * HIDDEN,
        "ln_2.weight": 2 * ROWS * HIDDEN,
        "ln_2.bias": ROWS * HIDDEN,
        "mlp.c_fc.weight": linear(HIDDEN, 4 * HIDDEN),
        "mlp.c_fc.bias": ROWS * 4 * HIDDEN,
        "mlp.c_proj.weight": linear(4 * HIDDEN, HIDDEN),
        "mlp.c_proj.bias": ROWS * HIDDEN,
    }
    positions = flops.tensors["transformer.wpe.weight"]
    assert positions == TensorCost(1, LENGTH * HIDDEN)
    levels = flops.activation_gradients
    assert levels[2] == 8 * ROWS * HIDDEN, "a LayerNorm"
    assert levels[3] == linear(HIDDEN, 3 * HIDDEN)


def test_a_batch_may_be_given_by_position():
    by_tensor, by_sequence = (profile_backward_flops(net(), batch) for batch in (SAMPLE, (SAMPLE,)))
    assert by_tensor == by_sequence
    rows = SAMPLE.numel()
    assert by_tensor.tensors["head.weight"].weight_gradient == 2 * rows * WIDTH * 23


def test_the_model_is_left_as_it_was():
    model = net()
    model.layers[1].eval()
    model.train(True)
    model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with torch.no_grad():
        profile_backward_flops(model, SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_go_when_the_model_fails():
    model = net()
    with pytest.raises(IndexError):
        profile_backward_flops(model, torch.full((1, 3), 1000))
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training


def test_modules_of_unknown_cost_are_refused_unless_frozen():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 5))
    batch = torch.randn(2, 3, 5)
    with pytest.raises(
        ValueError, match=r"freeze with requires_grad_\(False\) what is in other modules: 0\.bias, 0\.w"
    ):
        profile_backward_flops(model, batch)
    model[0].requires_grad_(False)
    flops = profile_backward_flops(model, batch)
    assert flops.uncounted == ("0",)
    assert set(flops.tensors) == {"2.weight", "2.bias"}


def test_parameters_that_the_batch_does_not_reach_are_refused():
    model = net()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"sample_batch must reach every .*: unused\.weight, unused\.bias"):
        profile_backward_flops(model, SAMPLE)
    assert "unused.weight" not in profile_backward_flops(model, SAMPLE, net().state_dict().keys()).tensors


def test_modules_that_read_one_tensor_share_a_level_but_not_after_a_change_in_place():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            x = x.clone()
            y = self.first(x) + self.second(x)
            return self.third(x.add_(1)) + y

    flops = profile_backward_flops(Branches(), torch.randn(2, 4))
    assert [flops.tensors[f"{name}.weight"].level for name in ("first", "second", "third")] == [0, 0, 1]


def test_a_norm_without_parameters_passes_gradients_on_all_the_same():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2))
    flops = profile_backward_flops(model, torch.randn(5, 4))
    assert flops.activation_gradients == (2 * 5 * 4 * 6, 8 * 5 * 6, 2 * 5 * 6 * 2)
    assert flops.tensors["2.weight"].level == 2


def test_flops_survive_plain_values():
    flops = profile_backward_flops(net(), SAMPLE)
    assert BackwardFlops.from_dict(flops.to_dict()) == flops
