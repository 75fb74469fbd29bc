"""Several runs by one command: seeds, folds, their table, and that ended runs are not made again."""

import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm.train
import torchlm.train
from jaxlm import config as configs
from jaxlm import repeat
from jaxlm.data import grammar, sources
from jaxlm.errors import UserError
from jaxlm.reporting import run_reader

TINY = (
    "--task sst2 --model.d-model 12 --model.n-heads 3 --model.n-layers 1 --model.seq-len 16 --tokenizer.vocab-size 300 "
    "--train.batch-size 8 --train.warmup-steps 0 --train.max-steps 4 --train.eval-interval 4"
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "sentences.tsv"
    rows = grammar.sentences("sst2")["train"][:200]
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def argv(texts: Path, folder: Path, more: str = "") -> list[str]:
    data = f"--data.path {texts} --data.cache-dir {texts.parent}/cache --run.dir {folder}"
    return f"{TINY} {data} {more}".split()


def test_each_text_is_for_validation_in_one_fold() -> None:
    texts = [f"text {i}" for i in range(3000)]
    splits = []
    for fold in range(4):
        config = configs.build({"data.folds": 4, "data.fold": fold, "data.test_fraction": 0.2}).data
        splits.append([sources.split_of(text, config) for text in texts])
    for of_text in zip(*splits, strict=True):
        assert of_text == ("test",) * 4 or sorted(of_text) == ["train"] * 3 + ["validation"]
    sizes = [split.count("validation") for split in splits]
    assert all(0.17 < n / 3000 < 0.23 for n in [*sizes, splits[0].count("test")])
    whole = configs.build({"data.test_fraction": 0.2}).data
    assert [s == "test" for s in splits[0]] == [sources.split_of(text, whole) == "test" for text in texts]


def test_folds_go_with_one_file_of_all(
    texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = texts.with_name("other.tsv")
    other.write_text(texts.read_text())
    data = configs.build({"data.path": str(texts), "data.validation_path": str(other), "data.folds": 3}).data
    with pytest.raises(UserError, match="it has a validation part, but data.folds=3"):
        sources.open_source(data, "labels")
    for bad in ("--data.folds 3", "--data.path x --data.folds 3 --data.fold 3", "--data.path x --data.fold 1"):
        with pytest.raises(UserError, match=r"data\.fold"):
            configs.load(bad.split())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("WORLD_SIZE", "2")
        torchlm.train.main("--seeds 2 --run.dir x".split())
    assert "in several processes (WORLD_SIZE): one process makes all runs" in capsys.readouterr().err
    for bad in ("--seeds 2", "--folds 0 --run.dir x"):
        with pytest.raises(SystemExit):
            jaxlm.train.main(bad.split())
        assert "by --run.dir the folder that all runs go to" in capsys.readouterr().err


def test_ended_runs_are_scored_together(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        assert torchlm.train.main(argv(texts, tmp_path / f"seed-{seed}", f"--train.seed {seed}")) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    capsys.readouterr()
    assert torchlm.train.main(argv(texts, tmp_path, "--seeds 2")) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before} and len(before) == 2
    table = (tmp_path / repeat.TABLE).read_text()
    assert capsys.readouterr().out == table
    with pytest.raises(SystemExit):
        torchlm.train.main(argv(texts, tmp_path, "--seeds 2 --train.learning-rate 0.5"))
    assert "seed-0: has ended with train.learning_rate=" in capsys.readouterr().err
    rows = [json.loads(line) for path in before for line in path.read_text().splitlines()]
    for name in ("accuracy", "loss"):
        cells = []
        for split in ("validation", "test"):
            values = [row[name] for row in rows if row["split"] == split]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        assert f"| {name} | {' | '.join(cells)} |" in table


@pytest.mark.slow
def test_seeds_and_folds_are_runs_of_their_own(texts: Path, tmp_path: Path) -> None:
    assert jaxlm.train.main(argv(texts, tmp_path, "--seeds 1 --folds 2")) == 0
    folders = [tmp_path / f"seed-0-fold-{i}-of-2" for i in range(2)]
    assert all(map(repeat.has_ended, folders))
    assert [run_reader.read(folder).settings["data.fold"] for folder in folders] == [0, 1]
    assert " ± " in (tmp_path / repeat.TABLE).read_text()


@pytest.mark.slow
def test_a_signal_to_the_command_ends_its_run_with_a_checkpoint(texts: Path, tmp_path: Path) -> None:
    long = argv(texts, tmp_path, "--seeds 2 --train.max-steps 1000000")
    command = [sys.executable, "-m", "jaxlm.train", *long]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout and any(line.startswith("step 4  validation") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()  # until the run has ended, too
    assert process.returncode == 143 and "Traceback" not in said and "nothing was saved" not in said
    run = run_reader.read(tmp_path / "seed-0")
    assert run.state == "interrupted" and run.last_step >= 4 and not (tmp_path / "seed-1").exists()
