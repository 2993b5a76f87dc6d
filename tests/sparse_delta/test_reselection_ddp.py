"""Two data-parallel processes select what one process selects from both their batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peft_kernels import Reselector

from ..support.accuracy import assert_same_bits
from ..support.sparse_training import batches, layers_of, make_optimizer, small_net, train_step

pytestmark = pytest.mark.slow
SETTINGS = {"reselection_steps": 4, "selection_accumulation_steps": 2, "initial_reselection_rate": 0.5}
TOTAL = 10
CASES = [("rigl", "SparseAdamW"), ("sm3", "SparseSM3"), ("random", "AdamW")]
MAX_NORM = 0.05


def train(model, call, selection, optimizer_name, data, seed):
    """All steps on `data`, a list of the microbatches of each; the state of the layers afterwards."""
    optimizer = make_optimizer(optimizer_name, model)
    reselector = Reselector(call, optimizer, selection, total_steps=TOTAL, seed=seed, **SETTINGS)
    moved = [train_step(call, optimizer, reselector, parts, MAX_NORM) for parts in data]
    reselector.close()
    return {"moved": moved, "layers": [layer.state_dict() for layer in layers_of(model)]}


def process(rank, folder):
    """One of the two processes; writes what it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        data = batches(2 * TOTAL)[rank::2]
        results = {}
        for selection, optimizer in CASES:
            model = small_net()
            call = torch.nn.parallel.DistributedDataParallel(model)
            # Another seed in each process: the choice of the first one counts.
            results[selection] = train(model, call, selection, optimizer, [[part] for part in data], seed=7 + rank)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("selection", [selection for selection, _ in CASES])
def test_all_processes_end_in_the_same_bits(results, selection):
    first, second = (result[selection] for result in results)
    assert first["moved"] == second["moved"]
    assert sum(first["moved"]) > 0
    for layer, other in zip(first["layers"], second["layers"], strict=True):
        for name, tensor in layer.items():
            assert_same_bits(tensor, other[name], name)


@pytest.mark.parametrize(("selection", "optimizer"), CASES)
def test_they_select_what_one_process_does(results, selection, optimizer):
    # One process with the batches of both as microbatches: the first one chooses the candidates there as well.
    data = batches(2 * TOTAL)
    model = small_net()
    pairs = [data[2 * step : 2 * step + 2] for step in range(TOTAL)]
    single = train(model, model, selection, optimizer, pairs, seed=7)
    both = results[0][selection]
    assert single["moved"] == both["moved"]
    for layer, other in zip(single["layers"], both["layers"], strict=True):
        assert_same_bits(layer["indices"], other["indices"])
        torch.testing.assert_close(layer["values"], other["values"])
