"""The LoRA operators on CUDA: dtypes, sizes around those of the tiles, strides, dropout, split sums, repeated runs.

What every backend must do is in tests/lora, which runs on the GPU as well; here is what follows from how the CUDA
kernels are cut: tiles of 16 to 256, steps of 32 and 64, sums over blocks.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels.reference import philox

from ..support.accuracy import assert_same_bits
from ..support.layouts import LAYOUTS, laid_out
from ..support.operators import DROPPING, OPERATORS, random_call
from ..support.places import dtype_name
from . import cuda
from .cuda import DTYPES, EACH_DTYPE, check, check_exact, gpu_call

cuda.require()

pytestmark = pytest.mark.gpu

EACH_OPERATOR = pytest.mark.parametrize("operator", OPERATORS)
BASE = {"rows": 37, "columns": 72, "out_columns": 40, "rank": 5}
EDGES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)
VARIANTS = {
    **{operator: (operator, {}) for operator in OPERATORS},
    "lora_factor_grad transposed": ("lora_factor_grad", {"transposed": True}),
    "lora_matmul without bias": ("lora_matmul", {"bias": False}),
    **{
        f"lora_linear_backward of {name} only": ("lora_linear_backward", {"needs": tuple(i == j for j in range(3))})
        for i, name in enumerate(("x", "lora_a", "lora_b"))
    },
}
# Few results and long sums, which blocks beside each other share; the composites split in two of their products.
SPLITTING = {
    "lora_shrink": {"rows": 5, "columns": 1100, "rank": 3},
    "lora_factor_grad": {"rows": 1100, "columns": 9, "rank": 3},
    "lora_grad_b": {"rows": 1100, "out_columns": 1030, "rank": 3},
    "lora_linear_forward": {"rows": 33, "columns": 1100, "out_columns": 20, "rank": 3},
    "lora_linear_backward": {"rows": 1100, "columns": 20, "out_columns": 1030, "rank": 3},
}
# At least 96 blocks of 128 x 128 results, and not whole ones.
LARGE = {"rows": 1153, "columns": 140, "out_columns": 1225, "rank": 33}
LARGE_BACKWARD = {**LARGE, "columns": 1225, "out_columns": 140}
PRODUCTS = {
    "lora_matmul": LARGE,
    "lora_linear_forward": LARGE,
    "lora_linear_backward": LARGE_BACKWARD,
}
TENSORS = [
    pytest.param(operator, name, id=f"{operator}-{name}")
    for operator in OPERATORS
    for name, value in random_call(operator).arguments.items()
    if isinstance(value, torch.Tensor)
]


@EACH_OPERATOR
@EACH_DTYPE
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_pair_of_dtypes(operator, dtype, factor_dtype, dropout_p):
    sizes = {"rows": 67, "columns": 520, "out_columns": 139, "rank": 17}
    check(gpu_call(operator, **sizes, dtype=dtype, factor_dtype=factor_dtype, dropout_p=dropout_p))


@EACH_DTYPE
@pytest.mark.parametrize("size", BASE)
@pytest.mark.parametrize(("operator", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_edges_of_tiles_are_exact(operator, options, dtype, size):
    for edge in EDGES:
        if edge == 0 and size == "rank":
            continue
        sizes = {**BASE, size: edge}
        check_exact(gpu_call(operator, **sizes, **options, dtype=dtype, integers=True), f"{size} = {edge}")


@EACH_DTYPE
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 255, 256, 257, 264, 1031])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31, 32, 33, 130])
def test_corners_of_what_accumulate_writes_are_exact(dtype, rows, columns):
    check_exact(gpu_call("lora_accumulate_", rows=rows, columns=columns, rank=3, dtype=dtype, integers=True))


@EACH_DTYPE
@pytest.mark.parametrize("rank", [130, 200])
@EACH_OPERATOR
def test_ranks_of_several_tiles_are_exact(operator, dtype, rank):
    check_exact(gpu_call(operator, **{**BASE, "rank": rank}, dtype=dtype, integers=True))


@EACH_DTYPE
@pytest.mark.parametrize(("operator", "argument"), TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_exact(dtype, operator, argument, layout):
    for columns in (70, 264):
        sizes = {"rows": 37, "columns": columns, "out_columns": 136, "rank": 5}
        call = gpu_call(operator, **sizes, dtype=dtype, integers=True)
        check_exact(call.map(lambda tensor: tensor, **{argument: laid_out(call.arguments[argument], layout)}))


@EACH_DTYPE
@pytest.mark.parametrize("operator", DROPPING)
@pytest.mark.parametrize("dropout_p", [0.5, 1.0])
def test_what_is_dropped_is_exact(operator, dtype, dropout_p):
    for columns, out_columns in ((264, 136), (70, 45)):
        sizes = {"rows": 70, "columns": columns, "out_columns": out_columns, "rank": 4}
        check_exact(gpu_call(operator, **sizes, dtype=dtype, dropout_p=dropout_p, integers=True), columns)


def test_accumulate_drops_what_the_mask_says():
    dropped = gpu_call("lora_accumulate_", rows=70, columns=300, rank=4, dropout_p=0.5)
    (actual,) = dropped.run(cuda.kernel("lora_accumulate_"))
    keep = philox.dropout_mask(70, 300, 0.5, dropped.arguments["rng_state"].cpu())
    assert torch.equal((actual != dropped.arguments["out"]).cpu(), keep)


@EACH_DTYPE
def test_memory_around_out_is_left_alone(dtype):
    arguments = gpu_call("lora_accumulate_", rows=34, columns=259, rank=5, dtype=dtype).arguments
    frame = torch.full((38, 263), 7.0, dtype=dtype, device=cuda.DEVICE)
    inside = frame[2:36, 2:261]
    cuda.kernel("lora_accumulate_")(inside, arguments["hidden"], arguments["factor"], 1.0, 0.0, None)
    assert (inside != 7.0).any()
    inside.fill_(7.0)
    assert (frame == 7.0).all()


@EACH_DTYPE
@pytest.mark.parametrize("operator", SPLITTING)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_sums_split_over_blocks_are_accurate(operator, dtype, dropout_p):
    check(gpu_call(operator, **SPLITTING[operator], dtype=dtype, dropout_p=dropout_p))


@EACH_DTYPE
@pytest.mark.parametrize("operator", ["lora_shrink", "lora_factor_grad", "lora_grad_b"])
@pytest.mark.parametrize("extra", [0, 1, 31, 33, 450])
def test_sums_split_over_blocks_are_exact(operator, dtype, extra):
    sizes = {name: size + extra if size > 1000 else size for name, size in SPLITTING[operator].items()}
    check_exact(gpu_call(operator, **sizes, dtype=dtype, integers=True))


@EACH_DTYPE
@pytest.mark.parametrize("operator", PRODUCTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_large_blocks_are_accurate(operator, dtype, dropout_p):
    check(gpu_call(operator, **PRODUCTS[operator], dtype=dtype, dropout_p=dropout_p))


@EACH_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [0, 1, 63, 64, 65, 129, 200])
def test_large_blocks_are_exact(dtype, layout, columns):
    call = gpu_call("lora_matmul", **{**LARGE, "columns": columns}, dtype=dtype, dropout_p=0.5, integers=True)
    check_exact(call.map(lambda tensor: tensor, matrix=laid_out(call.arguments["matrix"], layout)))


@EACH_DTYPE
@pytest.mark.parametrize("rows", [1279, 1280, 1281])
def test_edges_of_large_blocks_are_exact(dtype, rows):
    for out_columns in (1279, 1280, 1281):
        sizes = {"rows": rows, "columns": 72, "out_columns": out_columns, "rank": 3}
        check_exact(gpu_call("lora_matmul", **sizes, dtype=dtype, integers=True), out_columns)


@EACH_DTYPE
@EACH_OPERATOR
@pytest.mark.parametrize("which", ["split", "large"])
def test_repeated_runs_give_the_same_bits(operator, dtype, which):
    default = {**BASE, "rows": 130, "columns": 1000, "rank": 33}
    sizes = {"split": SPLITTING, "large": PRODUCTS}[which].get(operator, default)
    again = gpu_call(operator, **sizes, dtype=dtype, dropout_p=0.2 if operator in DROPPING else 0.0)
    first = again.run(cuda.kernel(operator))
    for _ in range(5):
        for actual, expected in zip(again.run(cuda.kernel(operator)), first, strict=True):
            assert_same_bits(actual, expected)
