"""Who imports whom: the contracts of `.importlinter`, and that importing the package stays cheap."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]


def run(*command, cwd=ROOT):
    # Without the user's path, so that the packages are those below `cwd`.
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def test_imports_point_down_only():
    done = run(*LINT, "--config", str(ROOT / ".importlinter"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("contract", "module", "line"),
    [
        ("layers", "peft_kernels/reference/lora.py", "from .. import ops"),
        ("layers", "peft_kernels/backends.py", "from .nn import lora"),
        ("layers", "peft_kernels/unplaced.py", "import torch"),
        ("triton", "triton_kernels/common.py", "from peft_kernels import backends"),
        ("families", "peft_kernels/ops/s2ft.py", "from .sparse_delta import check_indices"),
        ("core", "peft_kernels/ops/lora.py", "def f():\n    import transformers"),
        ("outside", "peft_kernels/info.py", "import benchmarks.harness"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, contract, module, line):
    # On a copy, so that a contract that would let everything pass shows.
    for path in [*ROOT.glob("peft_kernels/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    with (tmp_path / module).open("a") as file:
        file.write(f"\n{line}\n")
    config = ROOT / ".importlinter"
    done = run(*LINT, "--config", str(config), "--contract", contract, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 broken" in done.stdout


def test_contracts_are_complete():
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    names = {section.removeprefix("importlinter:contract:") for section in config.sections() if ":contract:" in section}
    assert names == {"layers", "triton", "families", "core", "outside"}


def test_every_package_is_installed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("peft_kernels/**/__init__.py")}
    assert listed == found | {"peft_kernels.triton_kernels"}


def test_importing_the_package_imports_none_of_the_heavy_libraries():
    heavy = "{'peft', 'transformers', 'accelerate', 'matplotlib', 'typer', 'rich'}"
    done = run(sys.executable, "-c", f"import sys, peft_kernels; print(sorted({heavy} & sys.modules.keys()))")
    assert done.stdout.strip() == "[]", done.stderr
