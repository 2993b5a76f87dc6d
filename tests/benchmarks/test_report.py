"""Result files and the tables made from them; documents hold exactly the committed figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, results

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "<!-- benchmarks:begin {0} -->\nold\n<!-- benchmarks:end {0} -->"


def ratio(value: float) -> dict[str, float]:
    return {"ratio_of_medians": value, "median_of_ratios": value, "q1": value, "q3": value}


def call_section(ours: float = 0.5) -> dict[str, Any]:
    arms = {
        "frozen linear": {"median_s": 1e-5, "relative_to": {"PEFT": ratio(0.1)}},
        "PEFT": {"median_s": 1e-4, "relative_to": {"frozen linear": ratio(10.0)}},
        "ours": {"median_s": 1e-4 * ours, "relative_to": {"PEFT": ratio(ours)}},
    }
    case = {"M": 1, "K": 64, "N": 64, "r": 16, "dropout_p": 0.0, "iterations": 10}
    return {
        "run_info": {"created_at": "2026-01-02T00:00:00+00:00", "commit": "0123456789abcdef", "dirty": False},
        "train_info": {"cases": [{"case": case, "arms": arms}], "not_reached": [{**case, "K": 128}]},
        "meta_info": {
            "system_info": {"cpu": "A CPU", "threads": 2},
            "package_info": {"torch": "2.13.0", "peft": "0.21.2", "triton": None},
        },
    }


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    results.write_section(results.path_of(tmp_path, "a-cpu", "cpu"), "cpu", "call_overhead", call_section())
    return tmp_path


def test_a_block_is_filled_from_the_result_file(directory: Path) -> None:
    text = report.render(f"before\n{BLOCK.format('call-overhead-cpu')}\nafter\n", directory)
    assert text.startswith("before\n<!-- benchmarks:begin call-overhead-cpu -->\n")
    assert text.endswith("<!-- benchmarks:end call-overhead-cpu -->\nafter\n")
    assert "A CPU, 2 threads; torch 2.13.0, peft 0.21.2; commit 0123456789ab; 2026-01-02 (`a-cpu`)" in text
    assert "| 64 to 64, M=1, r=16 | 0.0 | 10.0 | 100.0 | 50.0 | 0.500 (0.500-0.500) |" in text
    assert "old" not in text


def test_what_was_not_measured_says_so(directory: Path) -> None:
    assert report.table("model-time-gpu", directory) == "not measured"
    unreached = "| 128 to 64, M=1, r=16 | 0.0 | not measured | not measured | not measured | not measured |"
    assert unreached in report.table("call-overhead-cpu", directory)


def test_an_arm_without_a_figure_says_why(directory: Path) -> None:
    section = call_section()
    section["train_info"]["cases"][0]["arms"]["ours"] = {"status": "wrong", "reason": "y is off"}
    results.write_section(results.path_of(directory, "a-cpu", "cpu"), "cpu", "call_overhead", section)
    table = report.table("call-overhead-cpu", directory)
    assert "| wrong | wrong |" in table
    assert "- ours: wrong: y is off" in table


def test_every_device_gets_its_table(directory: Path) -> None:
    other = results.path_of(directory, "b-cpu", "cpu")
    results.write_section(other, "cpu", "call_overhead", call_section(ours=0.25))
    table = report.table("call-overhead-cpu", directory)
    assert table.index("0.500") < table.index("`b-cpu`") < table.index("0.250")


def test_unknown_tables_and_halved_markers_are_refused(directory: Path) -> None:
    with pytest.raises(report.ReportError, match="unknown table 'no-such'"):
        report.render(BLOCK.format("no-such"), directory)
    with pytest.raises(report.ReportError, match="other half"):
        report.render("<!-- benchmarks:begin call-overhead-cpu -->\nno end\n", directory)
    with pytest.raises(report.ReportError, match="holds another marker"):
        nested = BLOCK.format("call-overhead-cpu").replace("old", "<!-- benchmarks:end call-overhead-gpu -->")
        report.render(nested, directory)


def test_check_fails_on_a_stale_document_and_update_mends_it(directory: Path, capsys: pytest.CaptureFixture) -> None:
    document = directory / "README.md"
    document.write_text(BLOCK.format("call-overhead-cpu"))
    arguments = ["--results", str(directory)]
    assert report.main([*arguments, "--check", str(document)]) == 1
    assert "-old" in capsys.readouterr().err
    assert report.main([*arguments, "--update", str(document)]) == 0
    assert report.main([*arguments, "--check", str(document)]) == 0


def test_documents_hold_the_committed_figures() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        text = path.read_text()
        assert report.render(text) == text, f"run: python -m benchmarks report --update {path.relative_to(ROOT)}"


def test_committed_results_come_from_a_known_clean_commit() -> None:
    for path in results.RESULTS.glob("*/*.json"):
        for name, section in results.read(path)["sections"].items():
            assert section["run_info"]["commit"], f"{path}: {name} has no commit"
            assert section["run_info"]["dirty"] is False, f"{path}: {name} was measured with uncommitted changes"


def test_writing_a_section_keeps_the_others(directory: Path) -> None:
    path = results.path_of(directory, "a-cpu", "cpu")
    results.write_section(path, "cpu", "lora_layer", {"run_info": {}})
    assert set(results.read(path)["sections"]) == {"call_overhead", "lora_layer"}


def test_a_failed_write_leaves_the_old_file(directory: Path) -> None:
    path = results.path_of(directory, "a-cpu", "cpu")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_section(path, "cpu", "call_overhead", {"train_info": float("nan")})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="schema 1 are understood, got 99"):
        results.read(path)
