"""The examples of scripts/use_models.py, on small runs of a task each."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from jaxlm.testing import tiny_runs

SPEC = importlib.util.spec_from_file_location("use_models", Path(__file__).parent / "use_models.py")
assert SPEC and SPEC.loader
use_models = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(use_models)


@pytest.mark.parametrize("task", ["sst2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mlm", "gpt"))])
def test_the_examples(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if task == "gpt":
        pytest.importorskip("uvicorn")
    data = tmp_path / "data.tsv"
    rows = [f"the cat saw {'a dog and ' * (i % 7)}me\t{i % 2}\n" for i in range(60)]
    data.write_text("sentence\tlabel\n" + "".join(rows))
    settings = {"model.seq_len": 64, "data.path": str(data), "data.validation_fraction": 0.4, "data.test_fraction": 0.3}
    if task != "sst2":
        data.write_text(data.read_text().replace("\t", " "))
    run = tiny_runs.write(tmp_path / "run", task, **{**settings, "data.cache_dir": str(tmp_path / "cache")})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "split": "train", "loss": 2.5}) + "\n")
    monkeypatch.setattr(sys, "argv", ["use_models.py", str(run)])
    use_models.main()
    told = capsys.readouterr().out.split("--- ")
    assert len(told) == 1 + len(use_models.USES[task]) and all(part.count("\n") > 2 for part in told[1:])
