"""Layers that eliminate tokens under `fully_shard` and DistributedDataParallel, on one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import peft_kernels
from peft_kernels import LoraConfig, elimination

from .models import build, eliminated, layers_of, tokens

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def adapted():
    model = build(dtype=torch.float32)
    peft_kernels.inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), seed=1)
    eliminated(model, score="attention", select_every=2)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_layers_compute_the_same(one_process, checkpointing):
    ids, model, sharded = tokens(), adapted(), adapted()
    if checkpointing:
        sharded.gradient_checkpointing_enable({"use_reentrant": False})
        sharded.enable_input_require_grads()
    for layer in layers_of(sharded):
        fully_shard(layer, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    losses = [each(input_ids=ids, labels=ids).loss for each in (model, sharded)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in sharded.named_parameters():
        assert (name in expected) == parameter.requires_grad
        assert name not in expected or torch.equal(parameter.grad.full_tensor(), expected[name]), name
    assert [row.calls for row in elimination.report(sharded).eliminating] == [1, 1]
    with pytest.raises(ValueError, match=r"made of a layer that eliminates tokens \(by fully_shard\?\)"):
        elimination.remove(sharded)
    assert len(elimination.eliminating_layers(sharded)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": 0.0, "apply_to": "mlp"},
        {"keep_ratio": None, "threshold": 1e9, "score": "norm"},
        {"keep_ratio": None, "threshold": 1e9, "score": "norm", "apply_to": "attention"},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_keep_nothing_take_part_in_the_exchange_of_gradients(one_process, options, attention):
    ids = tokens(2, 20)
    model = build(dtype=torch.float32, attention=attention)
    eliminated(model, **options)
    layer = layers_of(model)[1]
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    passed = []
    layer.register_forward_hook(lambda module, args, output: passed.append(torch.equal(output, args[0])))
    for _ in range(2):  # the second call complains of what the first left out
        parallel(input_ids=ids, labels=ids).loss.backward()
    assert all(passed) == (options.get("apply_to", "both") == "both")
    left_out = {"attention": "self_attn", "mlp": "mlp"}.get(options.get("apply_to"), "mlp")
    grads = [parameter.grad for parameter in layer.get_submodule(left_out).parameters()]
    assert grads and not any(grad.any() for grad in grads)
    row = elimination.report(model).eliminating[0]
    assert (row.calls, row.tokens, row.kept_tokens) == (2, 80, 0)
