"""GPT-2, which keeps its linear layers transposed: trained in place, saved, switched, served, converted, put back."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import peft_kernels as pk
from peft_kernels import S2FTConfig, slices
from peft_kernels.channels import Slice
from peft_kernels.nn import S2FTConv1D
from peft_kernels.optim import SparseAdamW

from ..support.accuracy import assert_same_bits
from ..support.slices import WEIGHTS, adapter_of, assert_same_state, dense, state, trained
from .architectures import build, logits, matrix, tokens

RATIOS = {"q": 0.25, "v": 0.5, "o": 0.5, "up": 0.3, "down": 0.3}
PATHS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
EACH_WAY = pytest.mark.parametrize("co_permute", [False, True], ids=["in place", "co-permuted"])


def gpt2(dtype=torch.float64, **options):
    return build("gpt2", dtype, **options)


def injected(dtype=torch.float64, model=None, **options):
    model = gpt2(dtype) if model is None else model
    pk.inject(model, S2FTConfig(**{"ratios": RATIOS, "budget": "per_layer", **options}), seed=2)
    return model


def layers_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTConv1D)}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def gradients(model, loss):
    wanted = [layer.trainable for layer in layers_of(model).values()]
    return torch.autograd.grad(loss, wanted)


def test_weights_stay_the_same_tensors_stored_as_they_were():
    model = gpt2()
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    shapes = {name: (value.shape, value.stride()) for name, value in model.state_dict().items()}
    expected = logits(model)
    injected(model=model)
    layers = layers_of(model)
    assert torch.equal(logits(model), expected)
    assert list(layers) == [f"transformer.h.{block}.{path}" for block in range(2) for path in PATHS]
    loss_of(model, tokens()).backward()
    SparseAdamW([layer.trainable for layer in layers.values()]).step()
    for name, (parameter, place) in before.items():
        assert model.get_parameter(name) is parameter and parameter.data_ptr() == place
    after = {name: (value.shape, value.stride()) for name, value in model.state_dict().items()}
    assert {name: after[name] for name in shapes} == shapes
    assert {name.rpartition(".")[2] for name in after.keys() - shapes} == {"trainable", "indices", "original"}


def test_heads_of_a_fused_layer_are_its_output_channels():
    model = gpt2()
    pk.inject(model, S2FTConfig(ratios={"q": 0.25, "v": 0.5}, budget="per_layer"), seed=3)
    assert [path.rpartition(".")[2] for path in layers_of(model)] == ["c_attn", "c_attn"]
    for layer in layers_of(model).values():
        heads = layer.indices.view(-1, 6)  # 4 heads of 6 channels: queries below 24, values from 48
        assert torch.equal(heads, heads[:, :1] // 6 * 6 + torch.arange(6)), "whole heads"
        first = heads[:, 0]
        assert layer.dim == "output" and ((first < 24).sum(), (first >= 48).sum(), len(first)) == (1, 2, 3)
        assert layer.trainable.shape == (24, 18) and layer.weight.shape == (24, 72)


def test_gradients_are_slices_of_the_dense_model_s():
    plain, model = gpt2(), injected()
    loss_of(plain, tokens()).backward()
    for (path, layer), gradient in zip(
        layers_of(model).items(), gradients(model, loss_of(model, tokens())), strict=True
    ):
        expected = plain.get_submodule(path).weight.grad.index_select(layer.axis, layer.indices)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert layer.axis == (0 if layer.dim == "input" else 1)


@pytest.mark.parametrize("optimizer", [SparseAdamW, torch.optim.AdamW])
def test_training_is_that_of_a_masked_dense_model(optimizer):
    # eps far above what rounding makes of a gradient that is zero, such as that of the key's bias
    options = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1}
    model, plain = injected(), gpt2()
    layers, before = layers_of(model), state(plain)
    masks = {}
    plain.requires_grad_(False)
    for path, layer in layers.items():
        weight = plain.get_submodule(path).weight.requires_grad_()
        masks[path] = torch.zeros_like(weight, dtype=torch.bool).index_fill(layer.axis, layer.indices, True)
        weight.register_hook(lambda gradient, mask=masks[path]: gradient * mask)
    ours = optimizer([layer.trainable for layer in layers.values()], **options)
    theirs = torch.optim.AdamW([plain.get_submodule(path).weight for path in layers], **options)
    found, expected = [], []
    for step in range(10):
        for who, steps, losses in ((model, ours, found), (plain, theirs, expected)):
            loss = loss_of(who, tokens(seed=step))
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        with torch.no_grad():  # weight decay acts on all of a dense weight
            for path, mask in masks.items():
                weight = plain.get_submodule(path).weight
                weight.copy_(torch.where(mask, weight, before[f"{path}.weight"]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=0)
    pk.eject(model, merge=True)
    for path, mask in masks.items():
        weight = model.get_submodule(path).weight.detach()
        torch.testing.assert_close(weight, plain.get_submodule(path).weight.detach(), rtol=1e-7, atol=1e-9)
        assert_same_bits(weight[~mask], before[f"{path}.weight"][~mask])
        assert not torch.equal(weight, before[f"{path}.weight"])


def test_of_the_input_only_the_columns_that_train_are_kept():
    layer = layers_of(injected())["transformer.h.0.mlp.c_proj"]
    saved, x = [], torch.randn(3, 5, 39, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in (layer.weight, layer.trainable, layer.indices)}
    others = [tensor.untyped_storage() for tensor in saved if tensor.untyped_storage().data_ptr() not in known]
    assert [storage.nbytes() for storage in others] == [15 * layer.num_channels * 8]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_gradients(use_reentrant):
    def of(checkpointing):
        model = injected()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss_of(model, tokens()).backward()
        return [layer.trainable.grad for layer in layers_of(model).values()]

    for found, expected in zip(of(True), of(False), strict=True):
        assert_same_bits(found, expected)


def test_a_compiled_block_computes_and_trains_as_it_does_without():
    model = injected(torch.float32)
    mlp, x = model.transformer.h[0].mlp.train(False), torch.randn(2, 7, 24)
    wanted = [mlp.c_fc.trainable, mlp.c_proj.trainable]
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = []
        for call in (mlp, compiled):
            y = call(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
        with torch.no_grad():  # a compiled layer sees it without being told
            for parameter in wanted:
                parameter.add_(0.1)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EACH_WAY
def test_merging_keeps_the_function_and_unmerging_gives_the_bits_back(dtype, co_permute):
    model = injected(dtype, co_permute=co_permute)
    before = state(model)
    trained_parameters = [layer.trainable for layer in layers_of(model).values()]
    with torch.no_grad():
        for parameter in trained_parameters:
            parameter.add_(0.2)
    expected = logits(model)
    pk.merge(model)
    assert torch.equal(logits(model), expected)
    pk.unmerge(model)
    for name, value in model.state_dict().items():
        assert name.endswith("trainable") or torch.equal(value, before[name]), name
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merge", [False, True])
def test_ejecting_gives_layers_of_their_own_class_with_hooks_and_attributes(merge):
    model = gpt2()
    before, kinds = state(model), [type(module) for module in model.modules()]
    layer = model.transformer.h[0].mlp.c_proj
    seen, layer.note = [], "kept"
    layer.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    keys, kind = set(layer.__dict__), type(layer)
    trained(model, ratios=RATIOS)
    expected = logits(model)
    pk.eject(model, merge=merge)
    assert [type(module) for module in model.modules()] == kinds and all(p.requires_grad for p in model.parameters())
    layer = model.transformer.h[0].mlp.c_proj
    assert set(layer.__dict__) == keys and layer.note == "kept" and repr(layer) == "Conv1D(nf=24, nx=39)"
    if merge:
        torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-12)
    else:
        assert_same_state(model, before)
        logits(model)
    assert seen == [S2FTConv1D, kind]


@EACH_WAY
def test_a_file_holds_slices_as_they_lie_in_w(co_permute, tmp_path):
    model = trained(gpt2(), ratios=RATIOS, co_permute=co_permute)
    pk.save_adapter(model, tmp_path)
    tensors, plain = load_file(tmp_path / WEIGHTS), gpt2()
    changes = slices.take(model)
    assert len(tensors) == 2 * len(changes) == 16
    for path, part in changes.items():
        indices = tensors[f"base_model.model.{path}.s2ft_{part.slice.dim}_indices"]
        saved = tensors[f"base_model.model.{path}.s2ft_trainable"]
        original = matrix(plain, path)
        assert torch.equal(indices, part.slice.indices) and part.shape == tuple(original.shape)
        torch.testing.assert_close(saved, original.index_select(part.axis, indices) + part.change)
    found = slices.read(tmp_path, plain)
    for path, part in changes.items():
        assert_same_bits(found[path].change, part.change)
    loaded = gpt2()
    pk.load_adapter(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-10, atol=1e-10)


@EACH_WAY
def test_lora_computes_the_same_in_peft_and_comes_back(co_permute, tmp_path):
    peft = pytest.importorskip("peft")
    model = trained(gpt2(torch.float32), ratios=RATIOS, co_permute=co_permute)
    adapter = slices.take(model)
    slices.to_lora(adapter, tmp_path / "ours")
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        theirs = peft.PeftModel.from_pretrained(gpt2(torch.float32), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        back = slices.from_lora(tmp_path / folder)
        assert back.keys() == adapter.keys()
        for path, part in adapter.items():
            assert torch.equal(back[path].slice.indices, part.slice.indices)
            assert_same_bits(back[path].change, part.change)
    bare = gpt2(torch.float32)
    before = state(bare)
    with pytest.raises(ValueError, match=r"transformer\.h\.0.*Conv1D, not an nn\.Linear"):
        pk.load_adapter(bare, tmp_path / "ours")
    assert_same_state(bare, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switch_writes_each_adapter_and_gives_the_bits_back(dtype):
    adapters = [adapter_of(lambda: gpt2(dtype), seed, ratios=RATIOS) for seed in (1, 2)]
    adapters.append(slices.fuse(adapters))
    model = gpt2(dtype)
    before, switch = state(model), slices.Switch(model)
    for number in (0, 1, 2, 0):
        switch.to(adapters[number])
        for path, part in adapters[number].items():
            original = before[f"{path}.weight"].t()
            expected = (original.float() + dense(part).float()).to(dtype)
            assert_same_bits(matrix(model, path), expected)
    switch.to(None)
    assert_same_state(model, before)


def test_each_row_of_a_batch_is_served_with_its_adapter():
    adapters = {name: adapter_of(gpt2, seed, ratios=RATIOS) for name, seed in (("a", 1), ("b", 2))}
    model, batch, names = gpt2(), tokens(batch=3), ["b", None, "a"]
    kinds, before, expected = [type(module) for module in model.modules()], state(model), []
    base = logits(model, input_ids=batch)
    switch = slices.Switch(model)
    for row, name in zip(batch, names, strict=True):
        switch.to(None if name is None else adapters[name])
        expected.append(logits(model, input_ids=row[None])[0])
    switch.to(None)
    served = slices.serve(model, adapters)
    assert sum(isinstance(module, slices.ServedConv1D) for module in model.modules()) == 8
    assert torch.equal(logits(model, input_ids=batch), base)
    with served.rows(names):
        torch.testing.assert_close(logits(model, input_ids=batch), torch.stack(expected))
    with (
        served.rows(["a"]),
        pytest.raises(ValueError, match=r"x must be \[1, \.\.\., 24\], as rows says, got \[3, 9, 24"),
    ):
        model(batch)
    served.stop()
    assert [type(module) for module in model.modules()] == kinds
    assert_same_state(model, before)


@pytest.mark.parametrize("dim", ["input", "output"])
@pytest.mark.parametrize("largest", [True, False])
def test_target_modules_take_the_channels_of_w_by_their_norm(dim, largest):
    model = gpt2()
    config = S2FTConfig(ratio=0.25, target_modules=["c_attn", "c_fc"], dim=dim, selection="weight", largest=largest)
    report = pk.inject(model, config)
    assert len(layers_of(model)) == len(report.fused) == 4
    plain = gpt2()
    for path, layer in layers_of(model).items():
        norms = matrix(plain, path).norm(dim=0 if dim == "input" else 1)
        expected = norms.sort(descending=largest).indices[: round(norms.numel() / 4)].sort().values
        assert layer.dim == dim and torch.equal(layer.indices, expected)


@pytest.mark.parametrize("selection", ["activation", "gradient"])
def test_calibration_chooses_channels_of_w(selection):
    model, batches = gpt2(), [{"input_ids": tokens(), "labels": tokens()}]
    collect = getattr(pk.channels, f"collect_{selection}s")
    statistics = {f"{selection}s": collect(model, batches)}
    expected = pk.channels.select(model, {"o": 0.5, "down": 0.3}, selection=selection, **statistics).slices
    pk.inject(model, S2FTConfig(ratios={"o": 0.5, "down": 0.3}, selection=selection), calibration=batches)
    assert {path: layer.indices.tolist() for path, layer in layers_of(model).items()} == {
        path: part.indices.tolist() for path, part in expected.items()
    }


def test_all_linear_takes_these_layers_and_leaves_the_output():
    model = gpt2()
    report = pk.inject(model, S2FTConfig(ratio=0.1))
    assert len(layers_of(model)) == 8
    assert [(row.path, row.reason) for row in report.left_alone] == [
        ("lm_head", "the output layer, which all-linear leaves out")
    ]


def test_biases_and_whole_layers_train_beside_the_slices(tmp_path):
    def make():
        model = gpt2()
        pk.inject(model, S2FTConfig(ratios={"down": 0.3}, bias="all", modules_to_save=["lm_head"]), seed=1)
        return model

    model = make()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "lm_head.weight" in names and "transformer.h.0.mlp.c_proj.bias" in names
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    pk.save_adapter(model, tmp_path)
    loaded = gpt2()
    pk.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("config", [pk.LoraConfig, lambda **names: pk.SparseDeltaConfig(density=0.1, **names)])
def test_other_families_refuse_them_with_the_reason(config):
    model = gpt2()
    before, kinds = state(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"transformer\.h\.0.*: it is a transformers.*Conv1D, not an nn\.Linear"):
        pk.inject(model, config(target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="no linear layer can be adapted: lm_head: the output layer"):
        pk.inject(model, config(target_modules="all-linear"))
    assert_same_state(model, before)
    assert [type(module) for module in model.modules()] == kinds


def test_bad_slices_and_lone_layers_are_refused():
    model, path = gpt2(), "transformer.h.0.mlp.c_proj"
    config = S2FTConfig(ratio=0.5, target_modules=["c_proj"])
    for part, message in (
        (Slice(torch.tensor([39]), "input"), rf"{path}: indices must be in \[0, 39\), got 39"),
        (Slice(torch.tensor([24]), "output"), rf"{path}: indices must be in \[0, 24\), got 24"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.inject(model, config, positions={path: part})
    with pytest.raises(ValueError, match=r"it is the whole model; use nn\.S2FTConv1D\.from_linear"):
        pk.inject(model.get_submodule(path), S2FTConfig(ratio=0.5))
    shared = gpt2()
    shared.transformer.h[1].mlp.c_fc.weight = shared.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(ValueError, match="c_fc: its weight is another module's too, which a slice in it would change"):
        pk.inject(shared, S2FTConfig(ratios={"up": 0.5}))
    assert not layers_of(model) and not layers_of(shared)


def test_a_copied_model_trains_apart():
    model = trained(gpt2(), ratios=RATIOS, co_permute=True)
    expected, twin = logits(model), copy.deepcopy(model)
    optimizer = SparseAdamW([layer.trainable for layer in layers_of(twin).values()], lr=0.1)
    loss_of(twin, tokens()).backward()
    optimizer.step()
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    pk.eject(twin, merge=False)
    assert_same_state(twin, state(gpt2()))
