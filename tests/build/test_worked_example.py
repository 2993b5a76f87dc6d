"""The recipe of CONTRIBUTING.md works: its code blocks, put where they say, build, pass their test, keep their budget.

A block names its file behind its language. Where the project has the file, the block is lines to add to it; where it
has not, the block is the file. All is done in a copy of the tree under build/, with a process of its own, so that
neither sources nor operators meet those of the project.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..budgets import comparison, cuda_library, families, machine_code, report, table
from ..budgets.kernel import CannotMeasure, Measurement
from ..simt import build

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build/worked_example"

KERNEL, TEST = "csrc/cuda/row_norm.cu", "tests/simt/test_row_norm.py"
NEW = ("peft_kernels/reference/row_norm.py", "peft_kernels/ops/row_norm.py", KERNEL, TEST)
SCHEMA, PROMISE, BUDGET = "csrc/library.cpp", "tests/budgets/families.py", "tests/budgets/budgets.json"

COPIED = ("csrc", "peft_kernels", "tests/simt", "tests/support", "tests/__init__.py", "tests/conftest.py")
LEFT_OUT = shutil.ignore_patterns("*.so", "*.cu", "test_*.py", "__pycache__")  # the rest is not the example's


def blocks() -> dict[str, str]:
    """File to code, of the blocks that name a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


BLOCKS = blocks()


def tool(name: str) -> str:
    """A program of this environment, or on the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def follow_recipe() -> None:
    """Makes the copy: what the executor and the example's test need, and the blocks in their places."""
    for name in {place.split("/")[0] for place in COPIED}:
        shutil.rmtree(COPY / name, ignore_errors=True)  # build/ stays, with what is compiled already
    for place in COPIED:
        target = COPY / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / place).is_dir():
            shutil.copytree(ROOT / place, target, ignore=LEFT_OUT)
        else:
            shutil.copy(ROOT / place, target)
    shutil.copy(ROOT / "pyproject.toml", COPY)
    for place in NEW:
        (COPY / place).write_text(BLOCKS[place])
    schemas = (COPY / SCHEMA).read_text()
    end = schemas.rindex("}")
    (COPY / SCHEMA).write_text(schemas[:end] + BLOCKS[SCHEMA] + schemas[end:])


def run_test() -> subprocess.CompletedProcess[str]:
    """Runs the example's own test in the copy."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST)
    environment = {**os.environ, "PYTHONPATH": str(COPY)}
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy() -> None:
    """The example in its copy, ready to be built."""
    if build.compiler() is None:
        pytest.skip("no g++, which the executor needs to compile kernels for the CPU")
    follow_recipe()


def test_every_block_has_its_place() -> None:
    assert sorted(BLOCKS) == sorted((*NEW, SCHEMA, PROMISE, BUDGET))
    for place in BLOCKS:
        assert (ROOT / place).exists() == (place not in NEW), place


@pytest.mark.slow
def test_example_passes_its_test(copy: None) -> None:
    done = run_test()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("first + i < a.columns", "first + i <= a.columns", "row_norm: out-of-bounds global read in row_norm_kernel"),
        ("distance > 0", "distance > 1", "norms: root mean square error is"),
        ("first + kChunk <= a.columns", "true", "row_norm: misaligned access|row_norm: out-of-bounds global read"),
    ],
)
def test_example_with_a_mistake_fails(copy: None, right: str, wrong: str, message: str) -> None:
    assert BLOCKS[KERNEL].count(right) == 1
    (COPY / KERNEL).write_text(BLOCKS[KERNEL].replace(right, wrong))
    done = run_test()
    assert done.returncode == 1 and re.search(message, done.stdout), done.stdout + done.stderr


def test_python_is_in_the_style_of_the_project() -> None:
    follow_recipe()  # what is imported has to be there
    places = [place for place in NEW if place.endswith(".py")]
    for words in (("check", "-q"), ("format", "--check", "-q")):
        done = subprocess.run((tool("ruff"), *words, *places), cwd=COPY, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_kernel_is_in_the_style_of_the_project() -> None:
    command = (tool("clang-format"), "--dry-run", "--Werror", f"--assume-filename={KERNEL}")
    done = subprocess.run(command, cwd=ROOT, input=BLOCKS[KERNEL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """What nvcc makes of the kernel on sm_80, with the example's line among the promises."""
    line = eval(f"({BLOCKS[PROMISE]})", vars(families))
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, *line))
    source, cubin = tmp_path / "row_norm.cu", tmp_path / "row_norm.cubin"
    source.write_text(BLOCKS[KERNEL])
    flags = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-cubin", "-arch=sm_80")  # as in setup.py
    places = (f"-isystem={build.TORCH}/include", f"-I{build.CSRC}/cuda")
    target = f"-DTORCH_TARGET_VERSION={build.STABLE_ABI_TARGET}"
    command = (tool("nvcc"), *flags, target, *places, "-o", str(cubin), str(source))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        text = machine_code.dump(cubin)
        kernels = machine_code.parse(text, "sm_80")
        names = cuda_library.demangled(list(kernels))
    except CannotMeasure as missing:
        pytest.skip(str(missing))
    result = Measurement(f"nvcc {machine_code.parse_release(text)}")
    for name, kernel in zip(names, kernels.values(), strict=True):
        result.add(name, "sm_80", kernel)
    return result


@pytest.mark.slow
def test_kernel_keeps_its_promise(measured: Measurement) -> None:
    assert sorted(measured.kernels) == [f"row_norm_kernel<{element}>" for element in ("BFloat16", "Half", "float")]
    broken = comparison.faults("cuda", measured)
    assert not broken, report.differences(broken)


@pytest.mark.slow
def test_row_of_budget_is_what_update_writes(measured: Measurement) -> None:
    rows = json.loads(f"{{{BLOCKS[BUDGET]}}}")
    assert rows and set(rows) <= set(measured.kernels)
    measured.kernels = {name: kernels for name, kernels in measured.kernels.items() if name in rows}
    budgets = {"compiler": table.load()["cuda"]["compiler"], "kernels": rows}
    found = comparison.differences("cuda", measured, budgets)
    if measured.compiler != budgets["compiler"]:  # a better figure is no mistake then
        found = [difference for difference in found if difference.fault]
    assert not found, report.differences(found)
