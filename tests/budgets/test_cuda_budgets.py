"""What nvcc made of the CUDA kernels stays within budget on every architecture, checked without a GPU."""

from __future__ import annotations

import pytest

from . import comparison, cuda_library, report, table
from .kernel import CannotMeasure

pytestmark = pytest.mark.slow  # the whole library is disassembled, once for each architecture

BUDGETS = table.load()["cuda"]
ARCHITECTURES = table.in_order({architecture for rows in BUDGETS["kernels"].values() for architecture in rows})


@pytest.fixture(scope="module")
def measurement():
    try:
        return cuda_library.measure()
    except CannotMeasure as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_figures_are_within_budget(measurement, architecture):
    if architecture not in measurement.architectures:
        pytest.skip(f"this build has no {architecture}")
    found = comparison.all_differences("cuda", measurement, BUDGETS)
    beyond = report.differences(line for line in found if line.fault and line.architecture == architecture)
    notes = comparison.reservations("cuda", measurement, BUDGETS)
    text = "\n".join([*notes, beyond])
    assert not beyond, f"beyond budget; `python -m tests.budgets update cuda` if on purpose:\n{text}"
    if measurement.compiler != BUDGETS["compiler"]:
        pytest.skip(text)


def test_every_kernel_has_a_row_and_every_row_a_kernel(measurement):
    assert sorted(measurement.kernels) == sorted(BUDGETS["kernels"])
    if unknown := set(measurement.architectures) - set(ARCHITECTURES):
        pytest.skip(f"there are no budgets for {', '.join(table.in_order(unknown))}")


def test_no_row_allows_local_memory():
    for part in table.load().values():
        for rows in part["kernels"].values():
            assert all(row["stack"] == row["spills"] == 0 for row in rows.values())


def test_the_table_is_written_as_update_writes_it(tmp_path):
    table.save(table.load(), tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == table.PATH.read_text()
