"""The GPU's suite without a GPU: every case runs, scaled down, on a device that refuses tensors left on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    delta_arms,
    deltas,
    model,
    model_memory,
    operations,
    s2ft,
    s2ft_arms,
    sparse_delta,
    tables,
    token_arms,
    token_elimination,
)
from benchmarks.cases import Progress
from benchmarks.gpu_suite import gpu
from benchmarks.harness import Plan
from benchmarks.model_arms import FROZEN
from benchmarks.served import as_if_recorded, served
from benchmarks.suites import DeltaCase, S2FTModelCase, Suite
from peft_kernels import backends
from peft_kernels.backends import BackendUnavailable

from .test_report import ratio

ROOT = Path(__file__).resolve().parents[2]
QUICK = Plan(warmup=1, min_rounds=1, max_rounds=1, seconds=0.0)
LLAMA_3_8B = {(4096, 4096), (4096, 14336), (14336, 4096)}


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the sections of the suite have measured on the pretended device."""
    file = tmp_path_factory.mktemp("pretend") / "sections.json"
    command = [sys.executable, "-m", "tests.benchmarks.pretend_gpu", str(file)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return json.loads(file.read_text())


def arms(sections: dict[str, Any], name: str, **wanted: object) -> list[dict[str, Any]]:
    """The arms of a section's cases that have these values; what is not measured has to say why."""
    records = sections[name]["cases"]
    found = [record for record in records if all(record["case"][key] == value for key, value in wanted.items())]
    assert found
    for record in found:
        for arm, taken in record["arms"].items():
            reasons = ("has no cuda kernel", "has no triton kernel", "serves cuda tensors only")
            no_kernel = taken["status"] == "unavailable" and any(reason in taken["reason"] for reason in reasons)
            assert taken["status"] == "measured" or no_kernel, (record["case"], arm, taken)
    return [record["arms"] for record in found]


def test_what_was_left_on_the_cpu_does_not_go_unnoticed(sections: dict[str, Any]) -> None:
    assert "on cpu, others on pretend:0" in sections["refused"]


def test_every_operation_on_slices_runs_on_a_device(sections: dict[str, Any]) -> None:
    for found in arms(sections, "s2ft", operation="layer", dim="input"):
        assert set(found) == {s2ft.OURS, s2ft.FROZEN, s2ft.PACA, s2ft.LORA, s2ft.FULL}
        assert found[s2ft.OURS]["backends"]["gather_columns"] == "cuda"
        assert found[s2ft.OURS]["backends"]["slice_grad"] == "triton"
        assert set(found[s2ft.OURS]["relative_to"]) == set(found) - {s2ft.OURS}
    for found in arms(sections, "s2ft", operation="layer", dim="output"):
        assert set(found) == {s2ft.OURS, s2ft.FROZEN, s2ft.LORA, s2ft.FULL}
    for dim in ("input", "output"):
        for found in arms(sections, "s2ft", operation="gradient", dim=dim):
            assert found["ours [triton]"]["backends"]["slice_grad"] == "triton"
            assert set(found["ours [reference]"]["backends"].values()) == {"reference"}
            assert found["ours [cuda]"]["status"] == "unavailable"
        for found in arms(sections, "s2ft", operation="adamw", dim=dim):
            assert found[s2ft.OURS]["backends"] == {"slice_adamw_": "cuda"}
    for found in arms(sections, "s2ft", operation="swiglu"):
        assert set(found[s2ft.OURS]["backends"]) == {"swiglu", "swiglu_backward"}
    for found in arms(sections, "s2ft", operation="switch"):
        assert set(found) == {s2ft.OURS, *s2ft.bases("switch", "input", None)}
        assert set(found[s2ft.OURS]["backends"]) == {"slice_exchange_"}


def test_every_operation_on_sparse_deltas_runs_on_a_device(sections: dict[str, Any]) -> None:
    for found in arms(sections, "sparse_delta", operation="gradient"):
        assert [found[f"ours [{name}]"]["backends"]["sampled_product"] for name in gpu().backends] == [*gpu().backends]
    for found in arms(sections, "sparse_delta", operation="write"):
        assert set(found) == {sparse_delta.OURS, sparse_delta.INDEX_PUT}  # the C loop is for the CPU
    for name, operator in (("write", "scatter_write_"), ("adamw", "sparse_adamw_"), ("layer", "sampled_product")):
        for found in arms(sections, "sparse_delta", operation=name):
            assert found[sparse_delta.OURS]["backends"][operator] == "cuda"


def test_every_arm_of_a_model_runs_on_a_device(sections: dict[str, Any]) -> None:
    for found in arms(sections, "s2ft_model"):
        assert len(found) == 8
        ours = found[s2ft_arms.INJECT]
        assert set(ours["backends"]) == {"gather_columns", "slice_grad", "slice_write_", "swiglu", "swiglu_backward"}
        assert found[s2ft_arms.CO_PERMUTED]["backends"]["slice_adamw_"] == "cuda"
        added = {name: arm["memory"].get("added", {}).get("tensor_bytes") for name, arm in found.items()}
        assert added[s2ft_arms.FULL] > added[s2ft_arms.LORA] > added[s2ft_arms.INJECT] > 0
        assert added[FROZEN] is None
        assert s2ft_arms.LORA in ours["relative_to"]
    for found in arms(sections, "sparse_delta_model"):
        assert len(found) == 5
        assert found["ours, inject"]["backends"] == {"sampled_product": "cuda", "scatter_write_": "cuda"}
        assert found["ours, inject and SparseAdamW"]["backends"]["sparse_adamw_"] == "cuda"


def test_every_operation_of_token_elimination_runs_on_a_device(sections: dict[str, Any]) -> None:
    operators = {
        "norm": {"gather_rms_norm", "gather_rms_norm_backward"},
        "scatter": {"scatter_add_rows"},
        "linear": {"gather_linear_scatter"},
        "scores": {"block_scores"},
        "loss": {"cross_entropy_rows_"},
    }
    for name, wanted in operators.items():
        for found in arms(sections, "token_elimination", operation=name):
            assert set(found[token_elimination.OURS]["backends"]) == wanted
            assert set(found[token_elimination.OURS]["relative_to"]) == set(token_elimination.BASES[name])
            if name != "scatter":
                assert set(found["ours [reference]"]["backends"].values()) == {"reference"}
    for found in arms(sections, "token_elimination", operation="linear"):
        assert found["ours [triton]"]["backends"] == {"gather_linear_scatter": "triton"}
        in_place = found[token_elimination.IN_PLACE]
        assert set(in_place["backends"]) == {"gather_linear_scatter_"}
        assert {token_elimination.ADDED_DENSE, token_elimination.DENSE} <= set(in_place["relative_to"])
    for found in arms(sections, "token_elimination", operation="loss"):
        assert all(found[name]["peak_bytes"] > 0 for name in (token_elimination.OURS, token_elimination.LOGITS))


def test_every_arm_of_token_elimination_runs_on_a_device(sections: dict[str, Any]) -> None:
    for found in arms(sections, "token_elimination_model"):
        assert set(found) == set(token_arms.arm_names(gpu().token_models[0]))
        ours = found[token_arms.BY_ATTENTION]["backends"]
        assert {"block_scores", "select_tokens", "gather_rms_norm", "scatter_add_rows_", "cross_entropy_rows_"} <= set(
            ours
        )
        assert found[token_arms.PLAIN]["backends"] == {}
        bytes_of = {name: arm["memory"]["tensor_bytes"] for name, arm in found.items()}
        assert bytes_of[token_arms.CHECKPOINTED] < bytes_of[token_arms.DENSE]


def test_the_gpu_suite_asks_for_what_is_claimed_of_token_elimination() -> None:
    suite = gpu()
    first = suite.tokens[0]
    assert (first.operation, first.M, first.K, first.N, first.keep) == ("linear", 16384, 4096, 4096, 0.5)
    assert {case.operation for case in suite.tokens} == set(token_elimination.BASES)
    assert [case.sequence_length for case in suite.token_models] == [8192, 16384]


def test_cases_have_the_sizes_of_llama_3_8b() -> None:
    suite = gpu()
    for case in (*suite.s2ft, *suite.sparse):
        assert (case.K, case.N) in LLAMA_3_8B and case.M in (0, 4096, 16384) and case.dtype == torch.bfloat16
    layers = {(case.K, case.N, case.M, case.ratio) for case in suite.s2ft if case.operation == "layer"}
    squares = {(K, 4096, M, share) for K in (4096, 14336) for M in (4096, 16384) for share in (0.03, 0.05)}
    assert squares <= layers
    assert {case.density for case in (*suite.sparse, *suite.sparse_models)} == {0.01}
    assert {case.operation for case in suite.s2ft} == {"layer", "gradient", "adamw", "swiglu", "switch"}
    assert {case.operation for case in suite.sparse} == {"layer", "gradient", "adamw", "write"}


def test_the_model_is_made_where_it_is_used_and_has_the_size_that_its_memory_was_estimated_for() -> None:
    suite = gpu()
    loaded = model._Models(torch.device("meta")).get(suite.s2ft_models[0])
    parameters = list(loaded.model.parameters())
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert {buffer.device.type for buffer in loaded.model.buffers()} == {"meta"}
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert sum(parameter.nbytes for parameter in parameters) == pytest.approx(3.0e9, rel=0.01)
    decoder = [module for module in loaded.model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(linear.weight.nbytes for linear in decoder) == pytest.approx(1.9e9, rel=0.03)
    written = [linear for linear in decoder if linear.out_features == 2048 and linear.in_features == 8192]
    written += [layer.self_attn.o_proj for layer in loaded.model.model.layers]
    assert sum(linear.weight.nbytes for linear in written) == pytest.approx(0.7e9, rel=0.05)
    hidden = loaded.model.config
    assert (hidden.hidden_size, hidden.num_hidden_layers) == (2048, 16)


def test_the_text_is_long_enough_for_the_batches() -> None:
    from benchmarks import model_arms
    from peft_kernels.training.models import byte_tokenizer

    for case in (*gpu().s2ft_models, *gpu().sparse_models, *gpu().token_models):
        batches = model_arms.batches(byte_tokenizer(), case, count=4)
        assert [tuple(batch.shape) for batch in batches] == 4 * [(case.batch_size, case.sequence_length)]


def test_backends_that_serve_are_noted() -> None:
    x = torch.randn(4, 6)
    with served() as found:
        backends.kernel("gather_columns", "cpu", torch.float32)(x, torch.tensor([1, 3]))
        backends.kernel("scatter_write_", "cpu", torch.float32, "reference")
        with backends.use_backend("reference"):
            backends.kernel("slice_grad", "cpu", torch.float32)
    default = backends.choice("gather_columns", "cpu", torch.float32)[0]
    assert found == {"gather_columns": default, "scatter_write_": "reference", "slice_grad": "reference"}
    backends.kernel("swiglu", "cpu", torch.float32)
    assert "swiglu" not in found


def test_kernels_that_no_record_names_are_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "_record", {})
    registered = backends.Registration(lambda: None, ("cuda",), backends.DTYPES)
    monkeypatch.setitem(backends._registrations["gather_columns"], "cuda", registered)
    question = ("gather_columns", "cuda", torch.bfloat16)
    assert backends.choice(*question)[0] == "reference"
    with as_if_recorded("cuda"):
        assert backends.choice(*question)[0] == "cuda"
    assert backends.choice(*question)[0] == "reference"
    with as_if_recorded("cpu"):
        assert backends.recorded_runs("gather_columns", "cuda") == []


def test_an_arm_that_cannot_be_had_leaves_the_others_measured() -> None:
    def missing() -> operations.Work:
        raise ImportError("no such package")

    def unavailable() -> operations.Work:
        raise BackendUnavailable("not here")

    def breaks(_: int) -> None:
        raise RuntimeError("out of memory")

    def make() -> list[operations.Run]:
        return [
            *(("ours", lambda _: None), operations.attempt("peer", missing), operations.attempt("kernel", unavailable)),
            ("late", breaks),
        ]

    found = operations.measure(make, {}, ("peer",), QUICK, "cpu")["arms"]
    assert {name: arm["status"] for name, arm in found.items()} == {
        "ours": "measured", "peer": "failed", "kernel": "unavailable", "late": "failed",
    }  # fmt: skip
    assert "no such package" in found["peer"]["reason"] and "out of memory" in found["late"]["reason"]


def test_the_gpu_has_a_head_start_and_the_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operations.head_start("cpu") is None
    assert operations._FLUSHED_BYTES == 2**30
    monkeypatch.setattr(operations, "_FLUSHED_BYTES", 8)
    write = operations.head_start("meta")
    assert write is not None and write().shape == (8,)


def test_an_arm_of_a_model_that_needs_too_much_memory_is_the_only_one_without_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = S2FTModelCase("random:llama-tiny", 1, 8, 0.1, 0.3, 4, torch.float32)
    right = s2ft_arms.build

    def build(name: str, base: torch.nn.Module, case: S2FTModelCase) -> Any:
        arm = right(name, base, case)
        if name == s2ft_arms.FULL:
            monkeypatch.setattr(arm, "forward_backward", lambda batch: 1 / 0)
        if name == s2ft_arms.PACA:
            monkeypatch.setattr(arm.optimizer, "step", lambda: 1 / 0)
        return arm

    monkeypatch.setattr(model, "family_of", lambda case: replace(s2ft_arms.S2FT, build=build))
    loaded = model._Models(torch.device("cpu")).get(case)
    suite = Suite("test", "cpu", (), QUICK, (), QUICK, model_plan=QUICK)
    found = model.measure(case, suite, loaded.model, [torch.randint(256, (1, 8))])["arms"]
    failed = {name for name, arm in found.items() if arm["status"] == "failed"}
    assert failed == {s2ft_arms.FULL, s2ft_arms.PACA}
    assert {arm["status"] for name, arm in found.items() if name not in failed} == {"measured"}
    assert set(found[s2ft_arms.INJECT]["backends"].values()) <= {"cpu", "reference"}


def test_peaks_beside_each_other_are_those_of_the_arm_alone() -> None:
    case = S2FTModelCase("random:llama-tiny", 1, 8, 0.1, 0.3, 4, torch.float32)
    loaded = model._Models(torch.device("cpu")).get(case)
    names = (FROZEN, s2ft_arms.LORA, s2ft_arms.FULL)
    taken = [s2ft_arms.build(name, loaded.model, case) for name in names]
    batch = torch.randint(256, (1, 8))
    for arm in taken:
        arm.step(batch)
    records: dict[str, Any] = {name: {} for name in names}
    model_memory.add_peaks(records, taken, batch, case)
    parameters = sum(parameter.nbytes for parameter in loaded.model.parameters())
    frozen, lora, full = (records[name]["memory"] for name in names)
    assert frozen["tensor_bytes"] > frozen["tensor_before_bytes"] >= parameters
    trained = sum(parameter.nbytes for parameter in taken[2].trainable().values())
    assert full["tensor_before_bytes"] - frozen["tensor_before_bytes"] == pytest.approx(2 * trained, rel=0.01)
    assert lora["added"] == {
        "tensor_bytes": lora["tensor_bytes"] - frozen["tensor_bytes"],
        "relative_to_peft": {"tensor_bytes": 1.0},
    }
    section = {"train_info": {"cases": [{"case": described(case), "arms": records}], "not_reached": []}}
    expected = f"{(full['tensor_bytes'] - frozen['tensor_bytes']) / 1e6:+.1f} ("
    assert expected in tables.model_memory(section)


def described(case: S2FTModelCase) -> dict[str, Any]:
    return {**asdict(case), "dtype": "bfloat16"}


def test_the_table_of_steps_is_relative_to_lora() -> None:
    case = described(gpu().s2ft_models[0])
    found = {
        FROZEN: {"median_s": 0.05, "relative_to": {s2ft_arms.LORA: ratio(0.7)}},
        s2ft_arms.LORA: {"median_s": 0.0625, "relative_to": {FROZEN: ratio(1.4)}},
        s2ft_arms.INJECT: {"median_s": 0.06, "relative_to": {FROZEN: ratio(1.2), s2ft_arms.LORA: ratio(0.85)}},
        s2ft_arms.FULL: {"status": "failed", "reason": "too little memory"},
    }
    section = {"train_info": {"cases": [{"case": case, "arms": found}], "not_reached": [case]}}
    table = tables.model_time_to_lora(section)
    start = "| random:llama-1b, 4 x 2048 | down 3%, o 5%; LoRA r=16 | bfloat16 |"
    assert f"{start} 0.062 | 0.700 (0.700-0.700) | failed | 0.850 (0.850-0.850) |" in table
    assert f"{start} not measured | not measured | not measured | not measured |" in table


def test_deltas_are_merged_densely_on_the_gpu_and_weighed_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load_file(path: Path, device: str) -> dict[str, torch.Tensor]:
        asked.append(device)
        return right(path)

    right = delta_arms.load_file
    monkeypatch.setattr(delta_arms, "load_file", load_file)
    monkeypatch.setattr(deltas, "run_apart", lambda function, *arguments, preload: function(*arguments))
    cases = (DeltaCase("tiny", "ties", 0.05, torch.float32),)
    suite = Suite("test", "cuda", (), QUICK, (), QUICK, deltas=cases, delta_plan=QUICK)
    train_info = deltas.run(suite, Progress(lambda _: None, lambda _: None, lambda: 1.0))
    assert set(asked) == {"cuda"}
    assert train_info["devices"] == {"dense, sorted": "cuda", "ours": "cpu"}
    (record,) = train_info["cases"]
    assert {arm["status"] for arm in record["arms"].values()} == {"measured"}
    assert not any("memory" in arm for arm in record["arms"].values())
    assert "| not measured | not measured | not measured |" in tables.delta_algebra({"train_info": train_info})
