"""The GPU check without a GPU: how it shares out the time, in which order it works, what it writes down."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import BENCHMARKS, _wanted
from benchmarks.gpu_check import plan, record, sanitizer, workloads
from benchmarks.gpu_check.__main__ import main as gpu_check_main
from benchmarks.gpu_check.steps import Command, Ended, Runner, Step
from benchmarks.gpu_check.summary import Summary
from benchmarks.gpu_suite import gpu

from .test_gpu_check_tools import COUNTERS, MATMUL, PYTEST_LINE

ENVIRONMENT = {"gpu": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "date": "2026-01-02", "commit": "c" * 40}


def python(name: str, code: str, **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def runner(tmp_path: Path, seconds: float, **shares: float) -> Runner:
    return Runner(tmp_path / "log.txt", seconds, shares)


def test_a_step_may_use_its_share_and_what_is_left_over(tmp_path: Path) -> None:
    some = runner(tmp_path, 100.0, first=1, second=2, third=1)
    assert some.limit("first") == pytest.approx(25, abs=1)
    assert some.limit("second") == pytest.approx(75, abs=1)  # no time has passed
    assert some.limit("third") == pytest.approx(100, abs=1)


def test_ends_of_commands_and_their_output(tmp_path: Path) -> None:
    some = runner(tmp_path, 100.0, first=1, second=1)
    commands = [
        python("good", "import os; print('says', os.environ['WORD'])", environment={"WORD": "this"}),
        python("bad", "import sys; print('that', file=sys.stderr); sys.exit(3)", backend="cuda"),
    ]
    good, bad = some.run("first", commands)
    assert (good.step().status, good.step().note, good.log) == ("passed", "", "says this\n")
    assert bad.step() == Step("bad", "failed", bad.step().seconds, "exit status 3", "cuda")
    log = (tmp_path / "log.txt").read_text()
    assert log.index("##### good") < log.index("says this") < log.index("##### bad") < log.index("that")


def test_what_hangs_is_killed_with_its_children_and_the_others_have_their_turn(tmp_path: Path) -> None:
    some = runner(tmp_path, 13.0, first=6, second=7)
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(alive)!r}).touch()"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    hanging, beside = some.run("first", [python("hanging", parent), python("beside", "print('done')")])
    assert 5.5 < time.monotonic() - started < 7.5
    assert (hanging.code, hanging.step().status, hanging.step().note) == (None, "timed out", "limit 6 s")
    assert hanging.log == "begun\n"
    assert beside.step().status == "passed"
    (later,) = some.run("second", [python("later", "")])
    assert later.step().status == "passed"
    time.sleep(2.5)
    assert not alive.exists()


def test_a_step_without_time_does_not_begin(tmp_path: Path) -> None:
    some = runner(tmp_path, 8.0, first=1, second=1)
    (late,) = some.run("first", [python("late", "raise SystemExit(1)")])
    assert late.step() == Step("late", "not run", 0.0, "no time left")
    assert late.step("failed", "in vain").status == "not run"
    assert not (tmp_path / "log.txt").exists()


class Fake:
    """Stands in for the runner: answers each command with what a test gives for its name, in the order of the calls."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.ran, self.shares = answers, [], plan.SHARES

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def limit(self, name: str) -> float:
        return 100.0

    def run(self, name: str, commands: list[Command]) -> list[Ended]:
        assert name in self.shares
        self.ran += [command.name for command in commands]
        for command in commands:
            if "benchmarks.gpu_check.workloads" in command.arguments and command.name != "counters":
                Path(command.arguments[-1]).write_text(json.dumps(self.answers.get(command.name, {})))
        return [
            Ended(command, 0, 1.0, 100.0, self.answers.get(command.name, "") if "sanitizer-" in command.name else "")
            if command.name != "counters"
            else Ended(command, 0, 1.0, 100.0, self.answers["counters"].pop(0))
            for command in commands
        ]


VERIFIED = [{"operator": "lora_shrink", "backend": "cuda"}, {"operator": "lora_shrink", "backend": "triton"}]
ANSWERS = {
    "verify": {
        "verified": VERIFIED,
        "failures": [],
        "kernels": workloads.merged({("cuda", "lora_shrink"): workloads.totals([("shrink_kernel<Half, 16>", 2.0)])}),
    },
    "coverage": {"kernels": ["shrink_kernel<Half, 16>", MATMUL]},
    "layer": {"slowest": workloads.totals([(MATMUL, 900.0), ("shrink_kernel<BFloat16, 16>", 30.0)])},
    **{f"sanitizer-{tool}": f"{PYTEST_LINE}========= ERROR SUMMARY: 0 errors\n" for tool in sanitizer.TOOLS},
    "sanitizer-racecheck": f"{PYTEST_LINE}========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n",
}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Fake, Path]:
    """A whole check in which racecheck finds something, and ncu has to be asked twice."""
    unknown = "==ERROR== Failed to find metric sm__pipe_tensor_cycles_active\n"
    fake = Fake({**ANSWERS, "counters": [unknown, COUNTERS]})
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan, "_environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(plan, "Runner", lambda *_: fake)
    monkeypatch.setattr(plan.sanitizer, "program", lambda: "compute-sanitizer")
    monkeypatch.setattr(plan.counters, "program", lambda: "ncu")
    monkeypatch.setattr(plan.names, "of_library", lambda: {"shrink_kernel<Half, 16>", MATMUL, "never_kernel"})
    monkeypatch.setattr(plan.names, "LIBRARY", tmp_path)
    return plan.check(tmp_path / "out"), fake, tmp_path / "out"


def test_steps_run_in_the_order_of_what_matters(checked: tuple[int, Fake, Path]) -> None:
    status, fake, _ = checked
    tests, after = fake.ran[:3], fake.ran[3:]
    assert tests == ["cuda-tests", "layer-tests", "triton-tests"]
    assert after[:4] == ["verify", "benchmark-tests", "benchmark-lora_layer", "benchmark-s2ft_model"]
    sections = (
        *("s2ft", "sparse_delta_model", "sparse_delta", "token_elimination_model", "token_elimination"),
        "call_overhead",
    )
    assert after[4:11] == [f"benchmark-{name}" for name in sections] + ["coverage"]
    assert after[11:15] == [f"sanitizer-{tool}" for tool in sanitizer.TOOLS]
    assert after[15:] == ["layer", "counters", "counters"]
    assert [name for name in plan.SHARES if name in fake.ran] == list(plan.SHARES)[1:]
    assert sum(plan.SHARES.values()) == plan.TOTAL_SECONDS
    assert status == 1  # racecheck


@pytest.mark.parametrize("shares", [plan.SHARES, plan.BENCHMARK_SHARES], ids=["check", "benchmarks"])
def test_every_section_of_the_suite_is_a_step_with_a_limit_of_its_own(shares: dict[str, float]) -> None:
    sections = [name.removeprefix(plan._PREFIX) for name in shares if name.startswith(plan._PREFIX)]
    sections = [name for name in sections if name != "tests"]
    wanted = _wanted(gpu(), list(BENCHMARKS))
    assert set(sections) == set(wanted) - (set() if shares is plan.BENCHMARK_SHARES else {"delta_algebra"})
    assert set(plan._LAST_CASE_SECONDS) == set(wanted)
    assert all(plan.BENCHMARK_SHARES[f"benchmark-{name}"] > 1.5 * plan._LAST_CASE_SECONDS[name] for name in wanted)


class FailingSection(Fake):
    """A runner under which one section ends with an error and one at its time limit."""

    def run(self, name: str, commands: list[Command]) -> list[Ended]:
        self.ran += [" ".join(commands[0].arguments)]
        code = {"benchmark-s2ft_model": -11, "benchmark-s2ft": None}.get(name, 0)
        return [Ended(commands[0], code, 1.0, 100.0)]


def test_a_section_that_fails_or_hangs_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FailingSection({})
    fake.shares = plan.BENCHMARK_SHARES
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan, "_environment", lambda: dict(ENVIRONMENT))
    monkeypatch.setattr(plan, "Runner", lambda *_: fake)
    assert plan.benchmarks(tmp_path) == 1
    steps = {step["name"]: step["status"] for step in json.loads((tmp_path / "summary.json").read_text())["steps"]}
    assert list(steps) == list(plan.BENCHMARK_SHARES)
    assert (steps.pop("benchmark-s2ft_model"), steps.pop("benchmark-s2ft")) == ("failed", "timed out")
    assert set(steps.values()) == {"passed"}
    assert sum(plan.BENCHMARK_SHARES.values()) == plan.TOTAL_SECONDS
    assert "--only s2ft_model --time-limit 65" in fake.ran[0]  # 35 of its 100 seconds are the last case's
    assert f"--output {tmp_path / 'results'}" in fake.ran[0]


def test_the_command_line_chooses_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Path]] = []
    for name in ("check", "benchmarks"):
        monkeypatch.setattr(plan, name, lambda output, seconds, name=name: called.append((name, output)) or 0)
    monkeypatch.delenv("OUT", raising=False)
    assert gpu_check_main([]) == gpu_check_main(["--benchmarks"]) == 0
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check_main(["--benchmarks"]) == 0
    assert called == [("check", Path("gpu-check")), ("benchmarks", Path("gpu-bench")), ("benchmarks", tmp_path)]


def test_the_summary_says_what_ran_and_how_it_went(checked: tuple[int, Fake, Path]) -> None:
    _, _, output = checked
    summary = json.loads((output / "summary.json").read_text())
    assert summary["environment"] == ENVIRONMENT
    statuses = {step["name"]: step["status"] for step in summary["steps"]}
    assert statuses.pop("sanitizer-racecheck") == "failed"
    assert set(statuses.values()) == {"passed"}
    assert summary["verified"] == VERIFIED
    kernels = {kernel["kernel"]: kernel for kernel in summary["kernels"]}
    assert kernels["shrink_kernel<Half, 16>"]["operators"] == ["lora_shrink"]
    assert {name: kernel["ran"] for name, kernel in kernels.items()} == {
        "shrink_kernel<Half, 16>": True,
        MATMUL: True,  # in the sanitizer's tests
        "never_kernel": False,
    }
    assert summary["sanitizer"]["kernels"] == ANSWERS["coverage"]["kernels"]
    assert summary["sanitizer"]["tools"]["racecheck"] == {"errors": 2, "tests": 4}
    assert summary["slowest"][0]["kernel"] == MATMUL
    assert summary["counters"][0]["dram_percent"] == 71.25
    text = (output / "summary.md").read_text()
    assert "# GPU check on NVIDIA H100 80GB HBM3 (sm_90), 2026-01-02" in text
    assert "| sanitizer-racecheck | failed | 1.0 | 2 errors, 4 tests passed, exit status 0 |" in text
    assert "| cuda | never_kernel | no | - | 0.0 |" in text
    assert "| cuda | shrink_kernel<Half, 16> | yes | lora_shrink | 2.0 |" in text


def test_without_the_tools_the_check_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.sanitizer, "program", lambda: None)
    monkeypatch.setattr(plan.counters, "program", lambda: None)
    summary, fake = Summary(dict(ENVIRONMENT)), Fake({})
    plan._sanitizer(fake, summary, tmp_path)  # type: ignore[arg-type]
    plan._counters(fake, summary, tmp_path)  # type: ignore[arg-type]
    assert [(step.name, step.status) for step in summary.steps] == [("sanitizer", "not run"), ("counters", "not run")]
    assert summary.good
    assert fake.ran == []


def test_a_workload_that_dies_leaves_the_rest_standing(tmp_path: Path) -> None:
    some, summary = Runner(tmp_path / "log.txt", 60.0, plan.SHARES), Summary(dict(ENVIRONMENT))
    some.run = lambda name, commands: [Ended(commands[0], -6, 1.0, 30.0)]  # type: ignore[method-assign]
    plan._verify(some, summary, tmp_path)
    plan._coverage(some, summary, tmp_path)
    assert [step.status for step in summary.steps] == ["failed", "failed"]
    assert (summary.verified, summary.sanitizer["kernels"]) == ([], [])
    assert not any(kernel["ran"] for kernel in summary.kernels)
    assert not summary.good
    summary.write(tmp_path)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
    assert plan.check(tmp_path / "out") == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def write_summary(directory: Path, steps: list[Step], **changes: str | None) -> None:
    Summary({**ENVIRONMENT, **changes}, steps=steps, verified=VERIFIED).write(directory)


def test_a_record_has_one_entry_per_operator_backend_and_gpu(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    other = {"gpu": "NVIDIA A100", "architecture": "sm_80", "date": "2025", "commit": "b"}
    content = {"description": "Runs.", "verified_on": {"lora_shrink": {"cuda": [other]}}}
    status.write_text(json.dumps(content))
    write_summary(tmp_path, [Step("cuda-tests", "passed", 1.0, backend="cuda")])
    run = {key: ENVIRONMENT[key] for key in ("gpu", "architecture", "date", "commit")}
    for _ in range(2):
        assert record.record(tmp_path, status) == 0
        assert json.loads(status.read_text()) == {
            "description": "Runs.",
            "verified_on": {"lora_shrink": {"cuda": [other, run], "triton": [run]}},
        }
    write_summary(tmp_path, [], date="2027", commit=None)
    assert record.record(tmp_path, status) == 0
    newest = json.loads(status.read_text())["verified_on"]["lora_shrink"]["triton"]
    assert newest == [{**run, "date": "2027", "commit": "unknown"}]


def test_a_backend_that_a_step_failed_on_is_not_recorded(tmp_path: Path, capsys: Any) -> None:
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"verified_on": {}}))
    steps = [
        Step("sanitizer-racecheck", "failed", 1.0, "2 errors", "cuda"),
        Step("triton-tests", "timed out", 1.0, "limit", "triton"),
        Step("benchmarks", "failed", 1.0),
    ]
    write_summary(tmp_path, steps)
    assert record.record(tmp_path, status) == 1
    assert list(json.loads(status.read_text())["verified_on"]["lora_shrink"]) == ["triton"]
    assert "left out: cuda, for which sanitizer-racecheck failed" in capsys.readouterr().out


def test_the_committed_record_can_be_written_to(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    status.write_text(record.STATUS_FILE.read_text())
    write_summary(tmp_path, [])
    assert record.record(tmp_path, status) == 0
    assert "description" in json.loads(status.read_text())
