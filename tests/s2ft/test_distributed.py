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
from peft_kernels.nn import S2FTConv1D, SwiGLUMLP
from peft_kernels.nn.s2ft_layer import S2FTLayer
from peft_kernels.optim import SparseAdamW

from ..support.s2ft_module import as_conv1d

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS = 4
OPTIMIZERS = {"SparseAdamW": SparseAdamW, "AdamW": torch.optim.AdamW}
CASES = {
    f"{kind} {optimizer} {how}": (kind, optimizer, how)
    for kind, optimizer, how in (
        *product(("ddp", "fsdp"), OPTIMIZERS, ("float32",)),
        *product(
            ("ddp", "fsdp"), ("SparseAdamW",), ("autocast", "checkpointed", "accumulated", "co-permuted", "Conv1D")
        ),
        ("fsdp", "SparseAdamW", "mixed precision"),
        ("fsdp", "SparseAdamW", "whole blocks"),
        ("fsdp", "AdamW", "whole blocks"),
    )
}
SAVED = [case for case, (_, _, how) in CASES.items() if how in ("float32", "co-permuted", "whole blocks", "Conv1D")]
RESUMED = "fsdp SparseAdamW float32"


class Mlp(nn.Module):
    """An MLP as transformers' Llama has it, of odd sizes."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(17, 23), nn.Linear(17, 23), nn.Linear(23, 17)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(24, 17), Mlp(), nn.Linear(17, 7, bias=False)

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(x + self.mlp(x))


def adapted_model(how="float32"):
    torch.manual_seed(0)
    model = Net()
    if how == "Conv1D":
        model.first, model.last = as_conv1d(model.first), as_conv1d(model.last)
    if how == "co-permuted":
        config = pk.S2FTConfig(ratios={"gate": 0.6, "up": 0.5, "down": 0.8}, co_permute=True)
        pk.inject(model, config, seed=1)
        orders = [layer.order for layer in layers_of(model)]
        assert any(not torch.equal(order, torch.arange(order.numel())) for order in orders), "nothing was moved"
    else:
        dims = {"first": "output", "mlp.gate_proj": "output", "mlp.down_proj": "input", "last": "input"}
        generator = torch.Generator().manual_seed(2)
        slices = {
            path: pk.channels.Slice(torch.randperm(17, generator=generator)[:5].sort().values, dim)
            for path, dim in dims.items()
        }
        pk.inject(model, pk.S2FTConfig(ratio=0.3, target_modules=list(dims)), positions=slices)
    assert isinstance(model.mlp, SwiGLUMLP)
    assert isinstance(model.first, S2FTConv1D) == (how == "Conv1D")
    return model


def trained(model, optimizer, how, rank=0, world=1):
    """The loss of every step, over the part of each batch that is this rank's."""
    optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    whole = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(STEPS):
        parts = whole.chunk(2) if how == "accumulated" else [whole]
        total = 0.0
        for part in parts:
            x = part.chunk(world)[rank]
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                y = checkpoint(model, x, use_reentrant=False) if how == "checkpointed" else model(x)
            loss = (y.float() - 1).square().mean() / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.tensor(losses)


def sharded(model, how):
    dtype = torch.bfloat16 if how == "mixed precision" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    parts = (
        [model.mlp] if how == "whole blocks" else [m for m in model.modules() if isinstance(m, nn.Linear | S2FTConv1D)]
    )
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
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
        model = adapted_model(how)
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
            calls = (model.first.restore_weight, model.last.restore_weight, lambda m=model: pk.merge(m))
            results["refusals"] = [refusal(call) for call in calls]
        if case in SAVED:
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
    return [layer for layer in model.modules() if isinstance(layer, S2FTLayer)]


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
    expected = trained(adapted_model(how), optimizer, "float32" if how == "mixed precision" else how)
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
    assert len(results["refusals"]) == 3
    assert all(text.startswith("the weight is sharded (a DTensor)") for text in results["refusals"])


@pytest.mark.parametrize("case", SAVED)
def test_the_saved_adapter_is_that_of_one_process(distributed, case):
    _, folder = distributed
    _, optimizer, how = CASES[case]
    expected = adapted_model(how)
    trained(expected, optimizer, "float32")
    loaded = adapted_model(how)
    pk.load_adapter(loaded, folder / case)
    for layer, other in zip(layers_of(loaded), layers_of(expected), strict=True):
        assert torch.equal(layer.indices, other.indices)
        torch.testing.assert_close(layer.trainable, other.trainable, rtol=1e-4, atol=1e-5)
        assert layer.change().any()
