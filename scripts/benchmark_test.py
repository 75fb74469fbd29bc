"""The arithmetic of benchmark.py on figures made by hand, its files, and one tiny measurement with real processes."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_child
import bench_systems
import bench_tables
import benchmark
import numpy as np
import pytest
from launch_settings import ROOT

from jaxlm import config as configs
from jaxlm.tasks import flops


def row(system: str, precision: str, rounds: list[float], compiled: bool = False, **others: Any) -> bench_tables.Row:
    fields = {"work": "mlm", "system": system, "precision": precision, "compiled": compiled, "rounds": rounds}
    fields |= {
        "tokens_per_s": benchmark.spread(rounds),
        "first_update_s": 5.0,
        "peak_mb": 900.0,
        "loss": 7.0,
        "note": "",
    }
    return fields | others


ROWS = [
    row("jaxlm", "float32", [300.0, 330.0, 300.0], True, peak_mb=500.0),
    row("jaxlm", "bfloat16", [700.0, 900.0, 800.0], True),
    row("original", "float32", [100.0, 100.0, 80.0], loss=7.1),
    row("torchlm", "float32", [100.0, 110.0, 120.0], peak_mb=1000.0),
    row("transformers", "bfloat16", [1000.0, 1000.0, 1000.0]),
    row("transformers", "bfloat16", [350.0, 600.0, 500.0], True),
]


def found(rows: list[bench_tables.Row]) -> dict[str, Any]:
    machine = {
        "started": "2026-01-02T",
        "threads": 2,
        "load": 0.1,
        "processor": "a processor",
        "commit": "",
        "packages": {"jax": "1"},
    }
    return {
        "quick": False,
        "sst2": "real",
        "machine": machine,
        "results": rows,
        "ratios": benchmark.ratios_to_reach("mlm", rows),
    }


def test_ratios_are_of_single_rounds() -> None:
    bf16, float32, compiled, memory = benchmark.ratios_to_reach("mlm", ROWS)
    assert (bf16["against"], bf16["ratio"], bf16["low"], bf16["high"]) == ("original float32", 9.0, 7.0, 10.0)
    assert bf16["reached"] and float32["ratio"] == 3.3 and float32["note"] == "of jaxlm float32"
    # The target does not include the eager one.
    assert compiled["against"] == "transformers bfloat16 compiled" and compiled["ratio"] == 1.6
    assert not compiled["reached"]
    assert memory["ratio"] == 0.5 and memory["at_most"] and memory["reached"]


@pytest.mark.parametrize("loss", [7.6, float("nan")])
def test_a_fast_wrong_step_does_not_count(loss: float) -> None:
    rows = copy.deepcopy(ROWS)
    rows[1]["loss"] = loss
    bf16, float32, *_ = benchmark.ratios_to_reach("mlm", rows)
    assert bf16["ratio"] == 9.0 and not bf16["reached"] and bf16["note"].startswith("does not count: loss")
    assert float32["reached"]


def test_the_best_of_several_systems_counts() -> None:
    rows = [{**x, "work": "evaluation"} for x in ROWS]
    (ratio,) = benchmark.ratios_to_reach("evaluation", rows)
    assert ratio["against"] == "transformers bfloat16" and ratio["ratio"] == 0.8


def test_every_target_is_of_systems_that_are_measured() -> None:
    for target in benchmark.TARGETS:
        systems = benchmark.ALL_WORKS[target.work].systems
        assert target.ours in map(str, systems)
        assert sum(target.is_of(system) for system in systems) > 1, target


def test_compare_can_tell_the_targets_apart() -> None:
    assert len({(target.work, target.quantity, target.target) for target in benchmark.TARGETS}) == len(
        benchmark.TARGETS
    )


def test_compare_tells_noise_from_a_slower_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy, slower = copy.deepcopy(ROWS), copy.deepcopy(ROWS)
    noisy[1] = row("jaxlm", "bfloat16", [560.0, 700.0, 720.0], True)  # medians 7 for 9, but up to 9 for at least 7
    slower[1] = row("jaxlm", "bfloat16", [400.0, 450.0, 420.0], True)
    more_memory = copy.deepcopy(ROWS)
    more_memory[0]["peak_mb"] = 600.0
    paths = {}
    for name, rows in {"old": ROWS, "noisy": noisy, "slower": slower, "memory": more_memory}.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(found(rows)))
    for name, status in {"old": 0, "noisy": 0, "slower": 1, "memory": 1}.items():
        assert benchmark.main(["--read", str(paths[name]), "--compare", str(paths["old"])]) == status, name
        told = capsys.readouterr().out
        assert ("worse" in told) == bool(status)
    assert benchmark.main(["--read", str(paths["old"]), "--compare", str(paths["slower"])]) == 0
    assert "better" in capsys.readouterr().out


def test_page_and_picture(tmp_path: Path) -> None:
    results, page = tmp_path / "new.json", tmp_path / "PAGE.md"
    results.write_text(json.dumps(found(ROWS)))
    page.write_text(f"before\n{''.join(bench_tables.marks(is_on_gpu=False))}after\n")
    argv = ["--read", str(results), "--markdown", str(page), "--plot", str(tmp_path / "plot.png")]
    for _ in range(2):  # what it has written it replaces
        assert benchmark.main(argv) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("| mlm | jaxlm float32 |") == 1
    assert "| mlm | tokens_per_s | original float32 | 9 | 7 to 10 | at least 7 | yes |  |" in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert all(bench_tables.read_page(ROOT / "scripts" / "SPEED.md", is_on_gpu) for is_on_gpu in (False, True))


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--only bert", "--only bert: there is no such work; there are mlm, "),
        ("--compare nowhere.json", "--compare nowhere.json: cannot be read"),
        ("--json nowhere/new.json", "--json nowhere/new.json: there is no folder nowhere"),
        ("--markdown README.md", "--markdown README.md: it needs the lines <!-- benchmark --> and"),
        ("--sst2 nowhere", "--sst2 nowhere: it has no train.tsv"),
        ("--read pyproject.toml", "--read pyproject.toml: cannot be read as what --json writes"),
    ],
)
def test_bad_input_is_told_in_a_line(argv: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main(argv.split())
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.parametrize("task", ["mlm", "gpt"])
def test_the_products_are_those_of_an_update(task: str) -> None:
    sizes = {
        "model.d_model": 12,
        "model.n_heads": 3,
        "model.seq_len": 20,
        "model.vocab_size": 29,
        "train.batch_size": 7,
    }
    config = configs.build({"task": task, **sizes})
    products = list(bench_systems.products(config))
    assert sum(n * bench_systems.flops_of(a, b, s) for a, b, s, n in products) == flops.flops_per_update(config)
    for a, b, subscripts, _ in products:
        np.einsum(subscripts, np.zeros(a), np.zeros(b))


def test_memory_is_that_of_this_process() -> None:
    before = bench_child.memory()
    held = np.ones(50 * 2**20 // 8)
    after = bench_child.memory()
    assert 45 < after["own_mb"] - before["own_mb"] < 60 and held.sum()
    assert after["peak_mb"] >= after["own_mb"]


@pytest.mark.slow
def test_a_measurement_of_real_processes(tmp_path: Path) -> None:
    results = tmp_path / "new.json"
    command = [sys.executable, "scripts/benchmark.py", "--quick", "--only", "generation of 1 row", "--only", "host"]
    done = subprocess.run([*command, "--json", str(results)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(results.read_text())
    assert {x["system"] for x in measured["results"]} == {"jaxlm", "transformers"}
    for x in measured["results"]:
        speed = x["tokens_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"] and x["peak_mb"] > 100
    assert [x["work"] for x in measured["ratios"]] == ["generation of 1 row", "host", "host"]
