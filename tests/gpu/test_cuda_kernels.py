"""Every kernel of the CUDA library on a small ragged call: what compute-sanitizer watches.

Shapes are no multiples of a tile; each runs on tensors that can be read 16 bytes at a time, to their rows' end or only
near it, and on others.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.gpu_check.workloads import launches
from peft_kernels.reference import philox

from . import cuda, s2ft, sparse_delta, token_elimination

cuda.require()

pytestmark = pytest.mark.gpu


@pytest.mark.sanitizer
@pytest.mark.parametrize("instance", cuda.INSTANCES, ids=str)
@pytest.mark.parametrize("rows", cuda.ROWS)
def test_every_kernel_is_accurate(instance, rows):
    cuda.check(instance.call(rows))


@pytest.mark.sanitizer
@pytest.mark.parametrize("instance", [*sparse_delta.INSTANCES, *s2ft.INSTANCES, *token_elimination.INSTANCES], ids=str)
@pytest.mark.parametrize("rows", cuda.ROWS)
def test_every_kernel_of_the_other_families_is_accurate(instance, rows):
    instance.check(rows)


@pytest.mark.sanitizer
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 16), (5, 17), (300, 33), (3, 4096)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.05, 1.0])
def test_masks_are_the_same_bits_as_the_reference(shape, dropout_p):
    state = torch.tensor([-(2**62) + 3, 2**61 + 11])
    keep = cuda.kernel("dropout_mask")(*shape, dropout_p, state.to(cuda.DEVICE))
    assert torch.equal(keep.cpu(), philox.dropout_mask(*shape, dropout_p, state))


@pytest.mark.sanitizer
@pytest.mark.parametrize("operator", ["lora_linear_forward", "lora_linear_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_of_a_whole_pass_are_accurate(operator, dtype):
    sizes = {"rows": 300, "columns": 139, "out_columns": 600, "rank": 17}
    cuda.check(cuda.gpu_call(operator, **sizes, dtype=dtype, dropout_p=0.3))


def test_calls_run_the_kernels_that_they_name():
    def run():
        for instance in cuda.INSTANCES:
            call = instance.call("aligned")
            cuda.kernel(call.operator)(*call.arguments.values())
        for instance in (*sparse_delta.INSTANCES, *s2ft.INSTANCES, *token_elimination.INSTANCES):
            instance.check("aligned")
        cuda.kernel("dropout_mask")(3, 5, 0.5, torch.tensor([1, 2], device=cuda.DEVICE))

    ran = {name for name, _ in launches(run)}
    instances = [*cuda.INSTANCES, *sparse_delta.INSTANCES, *s2ft.INSTANCES, *token_elimination.INSTANCES]
    patterns = [*(instance.kernel for instance in instances), cuda.MASK_KERNEL]
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in ran)] == []
