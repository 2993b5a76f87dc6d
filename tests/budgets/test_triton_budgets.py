"""What Triton makes of its kernels stays within budget on every architecture, checked without a GPU."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

pytest.importorskip("triton")

from peft_kernels import triton_kernels

from . import comparison, report, table, triton_calls, triton_offline
from .occupancy import MULTIPROCESSORS

pytestmark = [
    pytest.mark.slow,  # some eighty compilations, unless Triton has them in its cache
    pytest.mark.skipif(triton_kernels.common.INTERPRETING, reason="interpreted kernels cannot be compiled"),
]


@pytest.fixture(scope="module")
def measurement():
    return triton_offline.measure()


def all_kernels():
    """The names of all functions of the package that are launched."""
    modules = [
        importlib.import_module(f"{triton_kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


@pytest.mark.parametrize("architecture", triton_offline.ARCHITECTURES)
def test_every_kernel_is_measured(architecture):
    launches = triton_offline.recorded(triton_calls.BUDGETED, architecture)
    assert {launch.kernel.__name__ for launch in launches} == all_kernels()


def test_figures_are_within_budget(measurement):
    budgets = table.load()["triton"]
    beyond = report.differences(
        line for line in comparison.all_differences("triton", measurement, budgets) if line.fault
    )
    assert not beyond, f"beyond budget; `python -m tests.budgets update triton` if on purpose:\n{beyond}"
    if measurement.compiler != budgets["compiler"]:
        pytest.skip("\n".join(comparison.reservations("triton", measurement, budgets)))


def test_the_largest_tiles_fit_into_cards_with_little_shared_memory():
    for launch in triton_offline.recorded(triton_calls.LARGEST, "sm_89"):
        assert launch.compile("sm_89").metadata.shared <= MULTIPROCESSORS["sm_89"].block_shared, launch.name


@pytest.mark.parametrize("call", triton_calls.COMPILED)
def test_sizes_without_wide_loads_compile(call):
    for launch in triton_offline.recorded({call: triton_calls.COMPILED[call]}, "sm_90"):
        assert launch.compile("sm_90").asm["cubin"], launch.name
