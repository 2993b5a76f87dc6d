"""The GPU check's reading of other programs' output: kernel names, compute-sanitizer's reports, ncu's tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import counters, names, sanitizer, workloads
from benchmarks.gpu_check.steps import Command, Ended

MATMUL = "matmul_kernel<BlockShape<BFloat16, 128, 128, 2, 4, 3>, (Along)0>"


def ended(log: str = "", code: int | None = 0) -> Ended:
    return Ended(Command("a", ()), code, seconds=1.0, limit=30.0, log=log)


# Names, as the demangler of gcc (torch.profiler), ncu and Triton have them.
NAMES = {
    "void peft_kernels::(anonymous namespace)::shrink_kernel<c10::BFloat16, 16>"
    "(peft_kernels::(anonymous namespace)::ShrinkArguments)": "shrink_kernel<BFloat16, 16>",
    "void peft_kernels::<unnamed>::shrink_kernel<c10::BFloat16, (int)16>(T1::ShrinkArguments)": (
        "shrink_kernel<BFloat16, 16>"
    ),
    "void peft_kernels::<unnamed>::matmul_kernel<peft_kernels::BlockShape<c10::BFloat16, (int)128, (int)128, (int)2, "
    "(int)4, (int)3>, (peft_kernels::Along)0>(peft_kernels::<unnamed>::MatmulArguments)": MATMUL,
    "_ZN12peft_kernels48_GLOBAL__N__a9eee539_15_dropout_mask_cu_a68e0f3d19dropout_mask_kernelENS0_13MaskArgumentsE": (
        "dropout_mask_kernel"
    ),
    "peft_kernels::(anonymous namespace)::partial_sums_kernel(peft_kernels::(anonymous namespace)::"
    "PartialSumsArguments)": "partial_sums_kernel",
    "sum_partials_kernel": "sum_partials_kernel",
}


@pytest.mark.parametrize(("printed", "expected"), NAMES.items(), ids=range(len(NAMES)))
def test_names_are_the_same_from_every_tool(printed: str, expected: str) -> None:
    assert names.bare(printed) == expected


def test_functions_are_names_without_arguments() -> None:
    assert names.function(MATMUL) == "matmul_kernel"
    assert names.function("partial_sums_kernel") == "partial_sums_kernel"


@pytest.mark.skipif(not names.LIBRARY.exists(), reason="_C_cuda is not built")
def test_the_library_tells_its_kernels() -> None:
    found = names.of_library()
    assert {"dropout_mask_kernel", "accumulate_kernel<float, BFloat16>"} <= found
    assert all(name == names.bare(name) and names.function(name).endswith("_kernel") for name in found)


def test_the_kernels_of_other_files_are_not_the_librarys(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    file = b"_ZN12peft_kernels47_GLOBAL__N__b535d33b_14_lora_shrink_cu_cf99e338"
    kernel = file + b"13shrink_kernelIfLi16EEEvNS0_15ShrinkArgumentsE"
    launcher = b"_ZN12peft_kernels12start_shrinkEPKcRKN5torch6stable6TensorES6_S6_dRKNS_7DropoutE"
    library.write_bytes(b"\0".join([b"\x7fELF", kernel, launcher, b"_ZN5other10my_kernelEv", kernel + b"_device_stub"]))
    assert names.of_library(library) == {"shrink_kernel<float, 16>"}


def test_kernels_are_summed_over_launches_and_operators() -> None:
    rows = workloads.totals([("a", 1.0), ("b", 5.0), ("a", 2.5)])
    assert rows == [
        {"kernel": "b", "launches": 1, "microseconds": 5.0},
        {"kernel": "a", "launches": 2, "microseconds": 3.5},
    ]
    merged = workloads.merged({("cuda", "shrink"): rows, ("cuda", "forward"): rows[1:], ("triton", "shrink"): rows[:1]})
    assert [(line["backend"], line["kernel"], line["operators"], line["launches"]) for line in merged] == [
        ("cuda", "a", ["shrink", "forward"], 4),
        ("cuda", "b", ["shrink"], 1),
        ("triton", "b", ["shrink"], 1),
    ]
    assert merged[0]["microseconds"] == 7.0
    assert all(line["ran"] is True for line in merged)


PYTEST_LINE = "4 passed, 300 deselected in 12.34s\n"
REPORTS = {
    "memcheck": (f"========= COMPUTE-SANITIZER\n{PYTEST_LINE}========= ERROR SUMMARY: 0 errors\n", (0, 4, "")),
    "memcheck finds": (
        "========= Invalid __global__ write of size 4 bytes\n=========     at shrink_kernel+0x140\n"
        f"{PYTEST_LINE}========= ERROR SUMMARY: 1 error\n",
        (1, 4, ""),
    ),
    "memcheck finds many": (
        "========= ERROR SUMMARY: 4321 errors\n"
        "========= ERROR SUMMARY: 4221 errors were not printed. Use --print-limit option to adjust the number of "
        "printed errors\n",
        (4321, 0, ""),
    ),
    "racecheck": ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", (0, 0, "")),
    "racecheck warns": ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", (1, 0, "")),
    "killed": (f"========= COMPUTE-SANITIZER\n{PYTEST_LINE}", (None, 4, "")),
    "no device": (
        "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n",
        (None, 0, "Device not supported. Please refer to the documentation"),
    ),
}


@pytest.mark.parametrize(("log", "expected"), REPORTS.values(), ids=REPORTS.keys())
def test_sanitizer_summaries_are_read(log: str, expected: tuple[int | None, int, str]) -> None:
    assert sanitizer.parse(log) == sanitizer.Report(*expected)


@pytest.mark.parametrize(
    ("report", "code", "status"),
    [
        (sanitizer.Report(0, 4), 0, "passed"),
        (sanitizer.Report(3, 4), 9, "failed"),
        (sanitizer.Report(3, 4), 0, "failed"),
        (sanitizer.Report(0, 4), -11, "failed"),  # no error seen before the program crashed
        (sanitizer.Report(0, 0), 0, "failed"),  # nothing ran
        (sanitizer.Report(None, 4), 0, "failed"),
        (sanitizer.Report(None, 0, "Device not supported"), 1, "not run"),
        (sanitizer.Report(None, 0), None, "timed out"),
    ],
)
def test_a_tool_passes_only_when_all_went_well(report: sanitizer.Report, code: int | None, status: str) -> None:
    assert sanitizer.step(ended(code=code), report).status == status


def test_sanitizer_commands() -> None:
    for tool in sanitizer.TOOLS:
        command = sanitizer.command("/opt/compute-sanitizer", tool)
        words = list(command.arguments)
        assert words[0] == "/opt/compute-sanitizer"
        assert words[words.index("--tool") + 1] == tool
        assert words[words.index(sys.executable) :] == [sys.executable, "-m", "pytest", *sanitizer.TESTS]
        assert command.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", sanitizer.TOOL_VARIABLE: tool}
        # What others' kernels write has to count as written.
        assert ("--kernel-name" in words) == (tool != "initcheck")
        assert ("--report-api-errors" in words) == (tool == "memcheck")


HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
LAUNCH = (
    '"{}","77","python3.12","127.0.0.1","void peft_kernels::<unnamed>::shrink_kernel<c10::BFloat16, (int)16>'
    '(ShrinkArguments)","1","7","(128, 1, 1)","(128, 4, 1)","0","9.0","Command line profiler metrics",{}'
)
COUNTERS = "\n".join(
    [
        "==PROF== Connected to process 77 (/usr/bin/python3.12)",
        '==PROF== Profiling "shrink_kernel" - 0: 0%....50%....100% - 3 passes',
        "==PROF== Disconnected from process 77",
        HEADER,
        LAUNCH.format(0, '"gpu__time_duration.sum","ns","31,456"'),
        LAUNCH.format(0, '"dram__bytes_read.sum","byte","67,239,936"'),
        LAUNCH.format(0, '"gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed","%","71.25"'),
        LAUNCH.format(0, '"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","%","n/a"'),
        LAUNCH.format(0, '"launch__registers_per_thread","register/thread","96"'),
        LAUNCH.format(1, '"gpu__time_duration.sum","us","30.5"'),
        LAUNCH.format(1, '"some__other.metric","","1"'),
    ]
)


def test_counters_are_read_per_launch_in_base_units() -> None:
    first, second = counters.parse(COUNTERS)
    assert first == {
        "kernel": "shrink_kernel<BFloat16, 16>",
        "seconds": pytest.approx(31.456e-6),
        "dram_bytes_read": 67239936.0,
        "dram_percent": 71.25,
        "tensor_percent": None,
        "registers": 96.0,
    }
    assert second == {"kernel": "shrink_kernel<BFloat16, 16>", "seconds": pytest.approx(30.5e-6)}


DENIED = (
    "==PROF== Connected to process 42 (/usr/bin/python3.12)\n==ERROR== ERR_NVGPUCTRPERM - The user does not have "
    "permission to access NVIDIA GPU Performance Counters on the target device 0.\n==PROF== Disconnected\n"
)


@pytest.mark.parametrize(
    ("log", "code", "status"),
    [
        (COUNTERS, 0, "passed"),
        (COUNTERS, 1, "failed"),
        (DENIED, 1, "not permitted"),
        ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n", 1, "not run"),
        ("==WARNING== No kernels were profiled.\n", 0, "failed"),
        ("", None, "timed out"),
    ],
)
def test_counters_that_may_not_be_read_are_no_failure(log: str, code: int | None, status: str) -> None:
    assert counters.step(ended(log, code), counters.parse(log)).status == status


def test_a_metric_that_is_not_there_is_left_out_of_the_next_attempt() -> None:
    metrics = list(counters.METRICS.values())
    log = r"==ERROR== Failed to find metric regex:^sm__pipe_tensor_cycles_active\.(avg|max)" + "\n"
    missing = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
    assert counters.without_unknown(log, metrics) == [metric for metric in metrics if metric != missing]
    assert counters.without_unknown(f"==ERROR== Failed to find metric {missing}", metrics) is not None
    assert counters.without_unknown("==ERROR== Failed to find metric foo.sum", metrics) is None
    assert counters.without_unknown(COUNTERS, metrics) is None


def test_counters_command_names_functions_and_leaves_clocks_alone() -> None:
    words = list(counters.command("/opt/ncu", [MATMUL, MATMUL, "shrink_kernel<float, 16>"]).arguments)
    assert words[words.index("--kernel-name") + 1] == "regex:^(matmul_kernel|shrink_kernel)$"
    assert words[words.index("--clock-control") + 1] == "none"
    assert words[words.index("--metrics") + 1].split(",") == list(counters.METRICS.values())
    assert words[-3:] == ["-m", "benchmarks.gpu_check.workloads", "step"]
