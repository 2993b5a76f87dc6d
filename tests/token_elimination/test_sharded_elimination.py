"""Layers that eliminate tokens under `fully_shard`, on one process."""

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
