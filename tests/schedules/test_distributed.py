"""Two data-parallel processes choose the same, and what one process chooses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.schedules import HFT, LISA, GreenTrainer

from ..support.accuracy import assert_same_bits
from .nets import SAMPLE, batches, loss_of, net

pytestmark = pytest.mark.slow
STEPS = 7
POLICIES = {
    "LISA": lambda model, optimizer: LISA(model, optimizer, interval=3),
    "HFT": lambda model, optimizer: HFT(model, optimizer, interval=3),
    "GreenTrainer": lambda model, optimizer: GreenTrainer(model, optimizer, SAMPLE, rho=0.4, interval=3),
}


def train(model, call, policy, data):
    """All steps on `data`, a list of the microbatches of each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = POLICIES[policy](call, optimizer)
    trained = []
    call.eval()  # without dropout
    for parts in data:
        for tokens in parts:
            (loss_of(call, tokens) / len(parts)).backward()
        optimizer.step()
        trained.append(list(schedule.training))
        optimizer.zero_grad()
        schedule.step()
    schedule.close()
    return {"trained": trained, "weights": model.state_dict()}


def process(rank, folder):
    """One of the two processes; writes what it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        results = {}
        for policy in POLICIES:
            model = net()
            call = DistributedDataParallel(model, find_unused_parameters=True)
            results[policy] = train(model, call, policy, [[tokens] for tokens in batches(2 * STEPS)[rank::2]])
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("policy", POLICIES)
def test_all_processes_end_in_the_same_bits_and_choose_what_one_does(results, policy):
    first, second = (result[policy] for result in results)
    assert first["trained"] == second["trained"]
    for name, weight in first["weights"].items():
        assert_same_bits(weight, second["weights"][name], name)

    model, data = net(), batches(2 * STEPS)
    alone = train(model, model, policy, [data[2 * step : 2 * step + 2] for step in range(STEPS)])
    assert first["trained"] == alone["trained"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-4)
