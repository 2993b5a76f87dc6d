"""What differs from the table is reported, what is worse fails, and an update makes it the table."""

from __future__ import annotations

from collections import Counter

import pytest

from . import __main__ as command
from . import comparison, families, report, table
from .kernel import Kernel, Measurement

HMMA, LDSM = "HMMA.16816.F32.BF16", "LDSM.16.M88.4"


def example(architecture="sm_90a", compiler="nvcc 13.0", name="k", loads=2, **figures):
    """A measurement of one kernel."""
    loop = Counter({HMMA: 16, LDSM: loads})
    kernel = Kernel(
        **{"registers": 120, "static_shared": 1024, "threads": 256, "loop": loop}
        | {"opcodes": loop + Counter({"LDG.E.128": 1, "IADD3": 150})}
        | figures
    )
    return Measurement(compiler, {name: {architecture: kernel}})


BUDGETS = table.part_of(example())


def found(measurement, budgets=BUDGETS, part="cuda"):
    """Figure to (budget, measured) of what fails."""
    lines = comparison.differences(part, measurement, budgets)
    return {line.figure: (line.budget, line.measured) for line in lines if line.fault}


def test_what_is_as_budgeted_makes_no_difference():
    assert comparison.differences("cuda", example(), BUDGETS) == []
    assert comparison.differences("cuda", example(registers=113), BUDGETS) == []  # within the step


PLANTED = [
    ({"registers": 121}, {"registers": ("120", "128")}),
    ({"registers": 129}, {"registers": ("120", "136"), "blocks": ("2", "1")}),
    ({"stack": 8}, {"stack": ("0", "8")}),
    ({"static_shared": 1025}, {"static_shared": ("1024", "1025")}),
    ({"dynamic_shared": 16}, {"dynamic_shared": ("0", "16")}),
    ({"threads": 128}, {"threads": ("256", "128")}),
    ({"threads": None}, {"threads": ("256", "none"), "blocks": ("2", "none")}),
    ({"loads": 3}, {"intensity": ("32.0", "21.33")}),
    ({"loop": Counter()}, {"intensity": ("32.0", "none")}),
    (
        {"opcodes": Counter({HMMA: 16, LDSM: 2, "IADD3": 300})},
        {"instructions": ("200", "400"), "opcodes": ("HMMA LDSM LDG.128", "HMMA LDSM")},
    ),
    ({"opcodes": Counter({HMMA: 16, LDSM: 2, "LDG.E.128": 1, "STL.64": 3})}, {"spills": ("0", "3")}),
]


@pytest.mark.parametrize(("change", "expected"), PLANTED)
def test_what_is_worse_is_named(change, expected):
    assert found(example(**change)) == expected


def test_what_is_better_is_news_but_no_fault():
    (line,) = comparison.differences("cuda", example(registers=100), BUDGETS)
    assert (line.figure, line.budget, line.measured, line.fault) == ("registers", "120", "104", False)


def test_kernels_without_row_and_rows_without_kernel_are_named():
    lines = comparison.differences("cuda", example(name="new"), BUDGETS)
    assert [(line.kernel, line.figure, line.budget, line.measured) for line in lines] == [
        ("k", "kernel", "a row", "none"),
        ("new", "kernel", "none", "new"),
    ]


def test_an_architecture_that_was_not_built_is_left_out_and_said():
    rows = {"k": {"sm_80": {}, **BUDGETS["kernels"]["k"]}}
    budgets = {**BUDGETS, "kernels": rows}
    assert comparison.differences("cuda", example(), budgets) == []
    assert comparison.reservations("cuda", example(), budgets) == ["not in this build, not compared: sm_80"]


def test_of_another_release_only_what_follows_from_the_source_is_compared():
    other = example(compiler="nvcc 13.1", registers=129, static_shared=2048)
    assert found(other) == {"static_shared": ("1024", "2048"), "blocks": ("2", "1")}
    assert comparison.reservations("cuda", other, BUDGETS) == [
        "the budgets are of nvcc 13.0, this is nvcc 13.1; not compared: registers, instructions, opcodes"
    ]
    assert found(other, part="triton") == {}


@pytest.fixture
def one_family(monkeypatch):
    def set_to(**promises):
        monkeypatch.setattr(families, "FAMILIES", (families.Family("cuda", r"k(?P<rows>\d*)", **promises),))

    set_to()
    return set_to


def broken(measurement):
    return {line.figure: (line.budget, line.measured) for line in comparison.faults("cuda", measurement)}


def test_promises_are_held(one_family):
    one_family(opcodes=("HMMA*", "LDGSTS*128*"), blocks=3, promised=lambda name: 0.5 * int(name["rows"]))
    assert broken(example(name="k64")) == {"opcodes": ("LDGSTS*128*", "none"), "blocks": ("3 promised", "2")}
    assert broken(example(name="k64", loads=3))["intensity"] == ("32.0 promised", "21.33")


def test_local_memory_is_always_a_fault(one_family):
    opcodes = Counter({"STL": 1, "LDL.64": 2})
    assert broken(example(stack=8, opcodes=opcodes)) == {"stack": ("0", "8"), "spills": ("0", "3")}


def test_what_cannot_be_launched_or_judged_is_a_fault(one_family):
    assert broken(example("sm_86", dynamic_shared=99 * 1024)) == {"shared": ("101376", "102400")}
    assert broken(example(threads=None)) == {"threads": ("__launch_bounds__", "none")}
    assert broken(example(static_shared=0)) == {"dynamic_shared": ("bytes in families.py", "0")}
    assert broken(example(name="other")) == {"family": ("a line in families.py", "none")}


def test_dynamic_shared_memory_follows_from_the_name(one_family):
    one_family(dynamic_shared=lambda name: 100 * int(name["rows"]))
    assert families.dynamic_shared("cuda", "k64", "sm_80") == 6400
    assert families.dynamic_shared("cuda", "other", "sm_80") == 0


def test_differences_print_as_a_table():
    lines = [comparison.Difference("kernel<float>", "sm_80", "registers", "96", "104")]
    lines += [comparison.Difference("k", arch, "intensity", "8.0", "10.67", fault=False) for arch in ("sm_80", "sm_86")]
    assert report.differences(lines).splitlines() == [
        "   kernel         architecture  figure     budget  measured",
        "-  -------------  ------------  ---------  ------  --------",
        "!  kernel<float>  sm_80         registers  96      104",
        "   k              sm_80 sm_86   intensity  8.0     10.67",
    ]
    assert report.differences([]) == ""


def test_measured_figures_print_as_a_table(one_family):
    one_family(promised=8)
    line = report.figures("cuda", example()).splitlines()[-1].split()
    assert line == ["k", "sm_90a", "120", "1024", "256", "2", "169", "32.0", "8.0", "16", "HMMA", "2", "LDSM"]


def test_an_update_comes_back_as_written(one_family, tmp_path, capsys):
    path, budgets = tmp_path / "budgets.json", {"triton": table.part_of(example(compiler="triton 3.9.0"))}
    assert command.update("cuda", example(registers=130), budgets, path)
    assert "kernel  none    new" in capsys.readouterr().out
    assert table.load(path) == budgets
    assert list(budgets) == ["triton", "cuda"]
    assert not command.check("cuda", example(registers=140), table.load(path))
    assert command.update("cuda", example(registers=140), budgets, path)
    assert "registers  136     144" in capsys.readouterr().out
    assert command.check("cuda", example(registers=140), table.load(path))


def test_an_update_refuses_broken_promises_and_half_a_build(one_family, tmp_path, capsys):
    path, budgets = tmp_path / "budgets.json", {}
    assert not command.update("cuda", example(stack=8), budgets, path)
    assert "no budget allows this" in capsys.readouterr().out
    budgets["cuda"] = BUDGETS
    assert not command.update("cuda", example("sm_80"), budgets, path)
    assert "this build lacks sm_90a" in capsys.readouterr().out
    assert not path.exists()
