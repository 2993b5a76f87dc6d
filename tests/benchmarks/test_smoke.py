"""The suite runs end to end on tiny shapes, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    output = tmp_path_factory.mktemp("results")
    process = run("--suite", "smoke", "--threads", "1", "--output", str(output))
    assert process.returncode == 0, process.stderr
    (path,) = output.glob("*/smoke.json")
    return process, json.loads(path.read_text())["sections"]


def test_every_benchmark_writes_a_section_with_its_origin(smoke: Any) -> None:
    _, sections = smoke
    assert set(sections) == {
        "lora_layer", "call_overhead", "lora_model", "sparse_delta", "sparse_delta_model", "s2ft", "s2ft_model",
        "token_elimination", "token_elimination_model", "delta_algebra",
    }  # fmt: skip
    for section in sections.values():
        assert set(section) == {"run_info", "train_info", "meta_info"}
        assert {"created_at", "command", "commit", "dirty", "total_time_s"} <= set(section["run_info"])
        assert section["meta_info"]["package_info"]["torch"]
        assert section["meta_info"]["system_info"]["threads"] == 1
        assert section["train_info"]["cases"]
        assert section["train_info"]["not_reached"] == []


def test_every_model_arm_is_timed_and_weighed(smoke: Any) -> None:
    arms = smoke[1]["lora_model"]["train_info"]["cases"][0]["arms"]
    assert len(arms) == 5
    for name, arm in arms.items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["memory"]["tensor_bytes"] > arm["memory"]["tensor_before_bytes"] > 0
        assert arm["memory"]["resident_bytes"] >= arm["memory"]["resident_before_bytes"] > 0
        assert arm["saved"]["bytes"] > arm["saved"]["decoder_bytes"] > 0
    assert arms["PEFT"]["memory"]["added"]["relative_to_peft"] == {"resident_bytes": 1.0, "tensor_bytes": 1.0}
    assert arms["PEFT"]["trainable_parameters"] == arms["ours, inject"]["trainable_parameters"] > 0
    assert arms["frozen model"]["trainable_parameters"] == 0


def test_sparse_arms_train_the_same_entries_as_pefts(smoke: Any) -> None:
    cases = smoke[1]["sparse_delta_model"]["train_info"]["cases"]
    assert [record["case"]["density"] for record in cases] == [None, 0.05]
    for record, peft in zip(cases, ("PEFT SHiRA", "PEFT Super-Tuning"), strict=True):
        arms = record["arms"]
        assert len(arms) == 5 and peft in arms
        for name, arm in arms.items():
            assert arm["status"] == "measured", (name, arm)
            expected = 0 if name == "frozen model" else arms[peft]["trainable_parameters"]
            assert arm["trainable_parameters"] == expected
            assert arm["saved"]["bytes"] > 0


def test_every_operation_on_a_sparse_delta_is_timed(smoke: Any) -> None:
    cases = smoke[1]["sparse_delta"]["train_info"]["cases"]
    assert {record["case"]["operation"] for record in cases} == {"write", "adamw", "gradient", "layer"}
    for record in cases:
        here = {name: arm for name, arm in record["arms"].items() if name != "ours [triton]"}
        assert {arm["status"] for arm in here.values()} == {"measured"}, record
        assert len(here) >= 2 and record["limits"]


def test_every_operation_on_slices_is_timed(smoke: Any) -> None:
    cases = smoke[1]["s2ft"]["train_info"]["cases"]
    assert {record["case"]["operation"] for record in cases} == {"gradient", "adamw", "swiglu", "layer", "switch"}
    assert {record["case"]["dim"] for record in cases} == {"input", "output"}
    for record in cases:
        here = {name: arm for name, arm in record["arms"].items() if name != "ours [triton]"}
        assert {arm["status"] for arm in here.values()} == {"measured"}, record
        assert len(here) >= 2 and record["limits"]


def test_slices_begin_as_pacas_and_keep_less_than_the_frozen_model(smoke: Any) -> None:
    (record,) = smoke[1]["s2ft_model"]["train_info"]["cases"]
    arms = record["arms"]
    assert len(arms) == 8
    for name, arm in arms.items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["memory"]["tensor_bytes"] > arm["memory"]["tensor_before_bytes"] > 0
    losses = {name: arm["first_loss"] for name, arm in arms.items()}
    for ours in ("ours, inject", "ours, co-permuted"):
        assert losses[ours] == pytest.approx(losses["PaCA"], rel=1e-4)
    assert losses["full fine-tuning"] == pytest.approx(losses["frozen model"], rel=1e-4)
    assert arms["ours, inject"]["trainable_parameters"] == arms["PaCA"]["trainable_parameters"] > 0
    assert arms["ours, inject"]["saved"]["relative_to_frozen"]["bytes"] < 1.0
    assert arms["PEFT LoRA"]["saved"]["relative_to_frozen"]["bytes"] > 1.0


def test_every_operation_of_token_elimination_is_timed(smoke: Any) -> None:
    cases = smoke[1]["token_elimination"]["train_info"]["cases"]
    assert {record["case"]["operation"] for record in cases} == {"norm", "scatter", "linear", "scores", "loss"}
    for record in cases:
        here = {name: arm for name, arm in record["arms"].items() if name != "ours [triton]"}
        assert {arm["status"] for arm in here.values()} == {"measured"}, record
        assert len(here) >= 3 and record["limits"]
        assert all("peak_bytes" in arm for arm in here.values()) == (record["case"]["operation"] == "loss")


def test_kept_tokens_take_less_than_all_and_plain_pytorch_keeps_more(smoke: Any) -> None:
    (record,) = smoke[1]["token_elimination_model"]["train_info"]["cases"]
    arms = record["arms"]
    assert len(arms) == 8 and 0 < record["limits"]["ideal_ratio"] < 1
    for name, arm in arms.items():
        assert arm["status"] == "measured", (name, arm)
        assert arm["memory"]["tensor_bytes"] > arm["memory"]["tensor_before_bytes"] > 0
    losses = {name: arm["first_loss"] for name, arm in arms.items()}
    assert losses["plain PyTorch, kept by norm"] == pytest.approx(losses["ours, kept by norm"], rel=1e-5)
    assert losses["ours, dense, chunked loss"] == pytest.approx(losses["ours, dense"], rel=1e-5)
    saved = {name: arm["saved"]["decoder_bytes"] for name, arm in arms.items()}
    assert saved["ours, kept by norm"] < saved["plain PyTorch over ours, kept by norm"] < saved["ours, dense"]
    ours = arms["ours, kept by norm"]["relative_to"]
    assert set(ours) == {"frozen model", "ours, dense"}
    assert "ours, kept by norm" in arms["plain PyTorch, kept by norm"]["relative_to"]


def test_every_method_of_the_delta_algebra_equals_the_dense_way(smoke: Any) -> None:
    cases = smoke[1]["delta_algebra"]["train_info"]["cases"]
    assert {record["case"]["method"] for record in cases} == {"dare", "ties", "breadcrumbs", "pcb"}
    for record in cases:
        assert {arm["status"] for arm in record["arms"].values()} == {"measured"}, record
        errors = record["arms"]["ours"]["errors"]
        assert errors["relative_norm"] < 1e-4
        assert record["case"]["method"] == "pcb" or errors["differing"] == 0
        assert record["arms"]["ours"]["memory"]["share_of_dense"] > 0


def test_the_tables_are_printed(smoke: Any) -> None:
    process, _ = smoke
    assert "Time per training step, relative to the frozen model." in process.stdout
    assert "Microseconds per forward + backward of one tiny layer." in process.stdout


def test_a_gpu_suite_without_a_gpu_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = run("--suite", "gpu")
    assert process.returncode == 1
    assert "needs a CUDA device" in process.stderr


def test_no_case_begins_after_the_time_limit(tmp_path: Path) -> None:
    process = run("--suite", "smoke", "--only", "call_overhead", "--time-limit", "0", "--output", str(tmp_path))
    assert process.returncode == 0, process.stderr
    (path,) = tmp_path.glob("*/smoke.json")
    train_info = json.loads(path.read_text())["sections"]["call_overhead"]["train_info"]
    assert train_info["cases"] == []
    assert len(train_info["not_reached"]) == 1
