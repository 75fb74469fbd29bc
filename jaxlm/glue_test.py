"""The command jaxlm.glue: which data it finds, its table, and that it continues where it was stopped."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from jaxlm import glue, predict
from jaxlm.errors import UserError
from jaxlm.testing import tiny_runs

ROWS = "index\tsentence1\tsentence2\tlabel\n" + "".join(f"{i}\ta cat {i}\tthe dog {i}\t{i % 2}\n" for i in range(40))


def data_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for part in ("train", "dev"):
            (folder / name / f"{part}.tsv").write_text(ROWS)
    return folder


def test_folders_are_found_by_any_spelling_of_their_task(tmp_path: Path) -> None:
    data = data_of(tmp_path, "WNLI", "STS-B", "rte", "other")
    (data / "QNLI").mkdir()
    (data / "QNLI" / "dev.tsv").write_text(ROWS)  # nothing to train on
    assert glue.find(data) == {"stsb": data / "STS-B", "rte": data / "rte", "wnli": data / "WNLI"}
    assert list(glue.find(data, ["rte"])) == ["rte"]
    with pytest.raises(UserError, match="no data to train qnli; there are"):
        glue.find(data, ["rte", "qnli"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "{none}"], "there is no such folder"),
        (["--data", "{empty}"], "has no folder with data of cola, sst2, mrpc"),
        (["--data", "{empty}", "--seeds", "0"], "--seeds 0: has to be 1 or more"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {name: str(tmp_path / name) for name in ("none", "empty")}
    with pytest.raises(SystemExit) as ending:
        glue.main(["--checkpoint", "m", *(arg.format(**places) for arg in args)])
    assert ending.value.code == 2 and said in capsys.readouterr().err


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    runs = [{"validation": {"accuracy": x}, "test": {"accuracy": 0.5}} for x in (0.6, 0.7, 0.8)]
    lines = glue.table("m", {"rte": runs, "wnli": [{"validation": {"accuracy": 0.25}}]}).splitlines()
    assert "| rte | accuracy | 70.0 ± 10.0 | 50.0 ± 0.0 | 3 | 66.4 |" in lines
    assert "| wnli | accuracy | 25.0 |  | 1 |  |" in lines


def test_a_submission_has_a_prediction_of_each_test_row(tmp_path: Path) -> None:
    data = data_of(tmp_path, "RTE", "STS-B") / "RTE"
    for part in ("train", "dev"):
        rows = "".join(
            f"{i}\ta cat {i}\tthe dog {i}\t{'entailment' if i % 2 else 'not_entailment'}\n" for i in range(40)
        )
        (data / f"{part}.tsv").write_text(f"index\tsentence1\tsentence2\tlabel\n{rows}")
    texts = [("the cat sat", "a dog"), ("a cat " * 30, "old"), ("and", "the log: what they saw"), ("mat", "mat")]
    (data / "test.tsv").write_text(
        "index\tsentence1\tsentence2\n" + "".join(f"{i}\t{a}\t{b}\n" for i, (a, b) in enumerate(texts))
    )
    settings: dict[str, Any] = {
        "data.path": str(data),
        "data.pair_column": "auto",
        "model.segments": 2,
        "data.cache_dir": str(tmp_path),
    }
    run = tiny_runs.write(tmp_path / "run", "rte", classes=("entailment", "not_entailment"), **settings)
    ((name, content),) = glue.submission(run, data, glue.test_files(data, "rte"), "rte").items()
    header, *lines = content.splitlines()
    assert (name, header) == ("RTE.tsv", "index\tprediction") and len(lines) == 4
    predictor = predict.load(run)
    for i in (0, 2, 3):  # the second is cut, which the predictor refuses
        (answer,) = predictor(["\t".join(texts[i])])
        assert lines[i] == f"{i}\t{answer['label']}"
    assert lines[1].split("\t")[1] in ("entailment", "not_entailment")
    with pytest.raises(UserError, match="has no test file, test or"):
        glue.test_files(tmp_path / "STS-B", "stsb")


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    segments: dict[str, Any] = {"model.segments": 2}
    base = tiny_runs.write(tmp_path / "base", "mlm", **segments)
    sizes = "--train.batch-size 4 --train.warmup-steps 1 --train.eval-interval 2 --model.seq-len 16".split()
    out = tmp_path / "out"
    common = ["--checkpoint", str(base), "--data", str(data_of(tmp_path / "data", "RTE")), "--out", str(out), *sizes]
    common += ["--data.cache-dir", str(tmp_path / "cache")]
    assert glue.main([*common, "--train.max-steps", "2"]) == 0  # the first seed alone
    settings = out / "rte-0" / "config.toml"  # as that of a run of 4 updates that was stopped after 2
    settings.write_text(settings.read_text().replace("max_steps = 2\n", "max_steps = 4\n"))
    assert glue.main([*common, "--train.max-steps", "4", "--seeds", "2"]) == 0
    said = capfd.readouterr().out
    assert "resumes" in said and said.count("rte finished after") == 3
    table = (out / glue.TABLE).read_text()
    assert said.endswith(table) and "| rte | accuracy | " in table and " ± " in table
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    assert len(before) == 2
    (tmp_path / "data" / "RTE" / "test.tsv").write_text(ROWS.replace("label\n", "\n"))
    assert glue.main([*common, "--train.max-steps", "4", "--seeds", "2", "--submission"]) == 0
    with zipfile.ZipFile(out / glue.ZIP) as packed:
        assert packed.read("RTE.tsv").decode().count("\n") == 41
    assert before == {path: path.stat().st_mtime_ns for path in before}
