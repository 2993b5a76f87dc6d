"""DistributedDataParallel and `fully_shard` on one and two processes: the losses of a single process."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.optim import SparseAdamW

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS = 4
OPTIMIZERS = {"SparseAdamW": SparseAdamW, "AdamW": torch.optim.AdamW}
CASES = {
    f"{kind} {optimizer} {how}": (kind, optimizer, how)
    for kind, optimizer, how in (
        *product(("ddp", "fsdp"), OPTIMIZERS, ("float32", "autocast")),
        ("fsdp", "SparseAdamW", "checkpointed"),
        ("fsdp", "SparseAdamW", "mixed precision"),
        ("ddp", "SparseAdamW", "checkpointed"),
    )
}


RESUMED = "fsdp SparseAdamW float32"


def adapted_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 33), nn.Tanh(), nn.Linear(33, 20), nn.Tanh(), nn.Linear(20, 7, bias=False))
    pk.inject(model, pk.SparseDeltaConfig(density=0.2, target_modules=["0", "4"]), seed=1)
    return model


def trained(model, optimizer, how, rank=0, world=1):
    """The loss of every step, over the part of each batch that is this rank's."""
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad], lr=0.03)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(8, 24, generator=generator).chunk(world)[rank]
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            y = checkpoint(model, x, use_reentrant=False) if how == "checkpointed" else model(x)
        loss = (y.float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def sharded(model, how):
    dtype = torch.bfloat16 if how == "mixed precision" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        run_cases(rank, world, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_cases(rank, world, folder):
    results = {}
    for case, (kind, optimizer, how) in CASES.items():
        model = adapted_model()
        if kind == "ddp":
            if rank:  # what the first rank has must come from there
                with torch.no_grad():
                    for tensor in (*model.parameters(), *(layer.original for layer in layers_of(model))):
                        tensor.zero_()
            run = nn.parallel.DistributedDataParallel(model)
        else:
            run = sharded(model, how)
        losses = trained(run, optimizer, how, rank, world)
        dist.all_reduce(losses)
        results[case] = losses / world
        if case == RESUMED:
            results["resumed"] = resumed_losses(model, how, rank, world)
            results["refusals"] = [refusal(call) for call in (model[0].restore_weight, lambda m=model: pk.merge(m))]
        if how == "float32":
            pk.save_adapter(model, f"{folder}/{case}", is_main_process=rank == 0)
    if rank == 0:
        torch.save(results, f"{folder}/results")


def resumed_losses(model, how, rank, world):
    """Of a model that goes on from another one's state: its shards, and the whole gathered."""
    whole = StateDictOptions(full_state_dict=True)
    found = []
    for gathered in (False, True):
        other = sharded(adapted_model(), how)
        if gathered:
            set_model_state_dict(other, get_model_state_dict(model, options=whole), options=whole)
        else:
            other.load_state_dict(model.state_dict())
        losses = trained(other, "SparseAdamW", how, rank, world)
        dist.all_reduce(losses)
        found.append(losses / world)
    return found


def refusal(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "none"


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, SparseDeltaLinear)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def distributed(request, tmp_path_factory):
    """Losses by case, and the folder with the adapters that were saved."""
    folder = tmp_path_factory.mktemp("distributed")
    if request.param == 1:
        threads = torch.get_num_threads()
        worker(0, 1, folder)
        torch.set_num_threads(threads)
    else:
        mp.spawn(worker, (request.param, folder), request.param)
    return torch.load(folder / "results"), folder


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(distributed, case):
    results, _ = distributed
    _, optimizer, how = CASES[case]
    expected = trained(adapted_model(), optimizer, "float32" if how == "mixed precision" else how)
    assert expected[-1] < 0.9 * expected[0], "nothing was learned, so nothing is compared"
    # Under autocast half the batch may round a gradient of x another way.
    tolerance = {"mixed precision": 0.02, "autocast": 1e-3}.get(how, 1e-5)
    torch.testing.assert_close(results[case], expected, rtol=tolerance, atol=0)


def test_a_sharded_model_goes_on_from_a_state_dict(distributed):
    results, _ = distributed
    expected = adapted_model()
    trained(expected, "SparseAdamW", "float32")
    expected = trained(expected, "SparseAdamW", "float32")  # a new optimizer over the trained model
    for losses in results["resumed"]:
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_what_sharded_weights_cannot_do_is_refused_with_the_reason(distributed):
    results, _ = distributed
    assert len(results["refusals"]) == 2
    assert all(text.startswith("the weight is sharded (a DTensor)") for text in results["refusals"])


@pytest.mark.parametrize("case", [case for case, (_, _, how) in CASES.items() if how == "float32"])
def test_the_saved_adapter_is_that_of_one_process(distributed, case):
    _, folder = distributed
    expected = adapted_model()
    trained(expected, CASES[case][1], "float32")
    loaded = adapted_model()
    pk.load_adapter(loaded, folder / case)
    for layer, other in zip(layers_of(loaded), layers_of(expected), strict=True):
        assert torch.equal(layer.indices, other.indices)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-5)
