"""`python -m jaxlm.evaluate` on runs of all tasks: its scores by training's own, its intervals by other programs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from flax import nnx

from jaxlm import checkpoint, evaluate, loop, parallel, predict
from jaxlm import config as configs
from jaxlm.data import loader, metrics
from jaxlm.inference import evaluation, load
from jaxlm.testing import tiny_runs
from jaxlm.training.log import RunLog

N_ARTICLES = 90
TASKS = [task for task in tiny_runs.OF_TASK if task != "embed"]  # which ranks each pair among more than a batch
CLASSES = {"tag": ["B-A", "I-A", "O"]}
WORDS = sorted({word.strip(",:") for text in tiny_runs.TEXTS for word in text.split()})


def article(random: np.random.Generator, n: int) -> str:
    return " ".join(random.choice(WORDS, n))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all tasks whose data are files beside them, with a test part and a validation part of about a third."""
    folder = tmp_path_factory.mktemp("runs")
    random = np.random.default_rng(0)
    texts = [article(random, n) for n in random.integers(1, 40, N_ARTICLES)]
    (folder / "texts.txt").write_text("\n".join(texts))
    rows = [f"{article(random, n)}\t{label}" for n, label in random.integers((1, 0), (9, 2), (N_ARTICLES, 2))]
    (folder / "rows.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n")
    sentences = [article(random, n).split() for n in random.integers(1, 12, N_ARTICLES)]
    tags = [random.choice(["O", "B-A", "I-A"], len(words)) for words in sentences]
    blocks = [zip(*x, strict=True) for x in zip(sentences, tags, strict=True)]
    lines = ["".join(f"{word} {tag}\n" for word, tag in block) for block in blocks]
    (folder / "tags.txt").write_text("\n".join(lines))
    for task in TASKS:
        path = folder / {"mlm": "texts.txt", "gpt": "texts.txt", "tag": "tags.txt"}.get(task, "rows.tsv")
        shares: dict[str, Any] = {f"data.{split}_fraction": 0.35 for split in ("validation", "test")}
        if task == "pairs":
            shares |= {"data.prompt_column": "sentence", "data.answer_column": "label"}
        shares |= {"data.path": str(path), "data.cache_dir": str(folder / "cache")}
        tiny_runs.write(folder / task, task, classes=CLASSES.get(task, ()), **shares)
    return folder


def evaluated(runs: Path, task: str, **options: Any) -> Any:
    found = load.load(runs / task)
    samples = evaluation.samples_of(found, "validation", {})[1]
    return found, samples, evaluation.evaluate(found, samples, **options)


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_training(task: str, runs: Path) -> None:
    found, samples, result = evaluated(runs, task)
    config = configs.replace(found.config, "train.batch_size", 8)
    _, compiled = loop.build(config, found.task, parallel.make_mesh(config))
    chosen = {"validation": {"": loader.choose(samples, "validation", [0], 0)[0]}}
    data = SimpleNamespace(samples={"validation": samples})
    run: Any = SimpleNamespace(config=config, data=data, chosen=chosen, log=RunLog())
    params = nnx.to_pure_dict(nnx.split(found.model, nnx.Param)[1])
    totals = loop.evaluate(run, compiled, params, "validation", lambda: 0)[""]
    assert result.n_counted == totals["count"] and len(samples) > 20
    expected, baseline = found.task.scores(totals), found.task.baseline(samples)
    assert list(result.scores) == list(expected)
    for name, score in result.scores.items():
        np.testing.assert_allclose(score.value, expected[name], rtol=2e-6)
        assert score.baseline == baseline[name]
        assert score.low < score.value < score.high or name in ("matthews", "f1", "accuracy")
        assert score.better == ("lower" if name in ("loss", "perplexity", "bits_per_byte") else "higher")


def test_classes_by_scikit_learn_and_calibration_by_hand(runs: Path) -> None:
    found, samples, result = evaluated(runs, "sst2")
    texts = [
        found.tokenizer.decode(samples.batch(np.array([i]), np.zeros(1))["tokens"][0]) for i in range(len(samples))
    ]
    answers = predict.load(runs / "sst2")(texts)
    labels, guesses = samples.split.labels, [answer["label"] for answer in answers]
    expected = sklearn.metrics.confusion_matrix(labels, guesses, labels=range(3))
    np.testing.assert_array_equal(np.array(result.confusion), np.pad(expected, ((0, 0), (0, 1))))

    bins: dict[int, list[tuple[float, bool]]] = {}
    for answer, label in zip(answers, labels, strict=True):
        p = max(answer["probabilities"])
        bins.setdefault(min(int(10 * p), 9), []).append((p, answer["label"] == label))
    error = 0.0
    for told, (place, members) in zip(result.bins, sorted(bins.items()), strict=True):
        p, right = (float(np.mean([member[i] for member in members])) for i in (0, 1))
        assert (told.low, told.count, told.accuracy) == (place / 10, len(members), pytest.approx(right))
        assert told.confidence == pytest.approx(p, rel=1e-5)
        error += len(members) / len(labels) * abs(p - right)
    assert result.calibration_error.value == pytest.approx(error, rel=1e-4)

    of_label = [answer["probabilities"][label] for answer, label in zip(answers, labels, strict=True)]
    wrong = sorted((p, i) for i, p in enumerate(of_label) if guesses[i] != labels[i])
    assert [mistake.probability for mistake in result.worst] == pytest.approx([p for p, _ in wrong[:10]], rel=1e-4)
    for mistake, (_, i) in zip(result.worst, wrong, strict=False):
        assert (mistake.label, mistake.predicted, mistake.text) == (labels[i], guesses[i], texts[i])


@pytest.mark.parametrize("task", ["mlm", "gpt"])
def test_the_calibration_of_words(task: str, runs: Path) -> None:
    found, samples, result = evaluated(runs, task)
    batch = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
    arguments = (batch["tokens"], None, batch["positions"]) if task == "mlm" else (batch["tokens"],)
    logits = np.asarray(found.model(*arguments), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    is_counted = batch["labels"] >= 0
    sure, right = p.max(axis=-1)[is_counted], (p.argmax(axis=-1) == batch["labels"])[is_counted]
    places = np.minimum((sure * 10).astype(int), 9)
    expected = [(i / 10, np.sum(places == i), right[places == i].mean()) for i in np.unique(places)]
    assert [(b.low, b.count) for b in result.bins] == [row[:2] for row in expected]
    np.testing.assert_allclose([b.accuracy for b in result.bins], [row[2] for row in expected], rtol=1e-6)


def test_intervals_by_another_program() -> None:
    random = np.random.default_rng(0)
    right, counts = random.integers(0, 5, 120).astype(float), np.full(120, 5.0)
    (low, high) = evaluation.bootstrap({"correct": right, "count": counts, "loss": right}, _accuracy)["accuracy"]
    mean = scipy.stats.bootstrap((right / 5,), np.mean, method="percentile", rng=random, n_resamples=20_000)
    np.testing.assert_allclose((low, high), mean.confidence_interval, atol=0.004)
    spread = 1.96 * np.std(right / 5) / 120**0.5
    np.testing.assert_allclose((low, high), right.mean() / 5 + np.array([-spread, spread]), atol=0.006)


def _accuracy(totals: Any) -> metrics.Scores:
    return {"accuracy": metrics.accuracy(totals)}


def test_the_samples_of_an_article_are_drawn_together(runs: Path) -> None:
    found = load.load(runs / "gpt")
    samples = evaluation.samples_of(found, "validation", {})[1]
    articles = evaluation._articles(samples)
    sizes = [-(-(n + 1) // 16) for n in np.diff(samples.windows.split.offsets)]  # one label more than there are tokens
    assert np.bincount(articles).tolist() == sizes and max(sizes) > 1
    assert evaluation._groups(articles) == (pytest.approx(articles), "articles")
    assert evaluation._groups(articles[:5]) == (pytest.approx(np.arange(5)), "samples")  # too few to stand for others
    (shared,) = evaluation._constants(samples, articles).values()
    n_bytes = np.bincount(articles, shared)
    np.testing.assert_allclose(n_bytes, samples.windows.split.n_bytes)


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    try:
        status = evaluate.main([str(arg) for arg in argv])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    lines = captured.err.splitlines(keepends=True)
    return status, captured.out, "".join(line for line in lines if not line.endswith(" ...\n"))  # of slow steps


def test_figures_are_the_same_for_any_batches_and_devices(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--checkpoint", str(runs / "cola"), "--json"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=3"
    env = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "jaxlm.evaluate", *argv, "--train.batch-size", "5"]
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    (here, other, more) = (json.loads(told(capsys, *argv, "--train.batch-size", n)[1]) for n in (5, 64, 1))
    assert json.loads(process.stdout) == here

    def numbers(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: numbers(x) for name, x in value.items()}
        if isinstance(value, list):
            return [numbers(x) for x in value]
        return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value

    assert other == numbers(here) and more == numbers(here)


def test_what_is_printed_and_kept(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = told(capsys, "--checkpoint", runs / "sst2", "--split", "validation")
    assert (status, errors) == (0, f"saved as {runs}/sst2/evaluation_validation.json\n")
    kept = json.loads((runs / "sst2" / "evaluation_validation.json").read_text())
    _, printed, _ = told(capsys, "--checkpoint", runs / "sst2", "--split", "validation", "--json")
    assert json.loads(printed) == kept
    score = kept["scores"]["accuracy"]
    for part in (f"{score['value']:.4f}", f"{score['low']:.4f} to {score['high']:.4f}", "predicted 2", "worst errors"):
        assert part in output
    assert f"{kept['n_samples']} samples" in output and f"bootstraps of {kept['n_samples']} articles" in output


def test_a_file_is_scored_as_a_whole(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("what,which\na cat,1\nthe dog,0\nthe mat,1\n")
    columns = ["--data.text-column", "what", "--data.label-column", "which"]
    argv = ["--checkpoint", runs / "sst2", "--data.path", tmp_path / "mine.csv", "--json"]
    status, output, errors = told(capsys, *argv, *columns)
    assert (status, errors, json.loads(output)["n_samples"]) == (0, "", 3)
    assert [sum(row) for row in json.loads(output)["confusion"]] == [1, 2, 0]
    assert not (runs / "sst2" / "evaluation_test.json").exists()
    status, _, errors = told(capsys, *argv)
    assert status == 2 and len(errors.splitlines()) == 1 and "data.text_column" in errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--split", "train"], "invalid choice: 'train'"),
        (["--data.path", "nothing.tsv"], "data.path=nothing.tsv: no such file or folder"),
        (["--data.path", "."], "data.path=.: is a folder; name the file in it"),
        (["--model.d-model", "8"], "--model.d-model: cannot change for a trained model"),
        (["--modle", "8"], "--modle: unknown setting"),
        (["--train.batch-size", "0"], "--train.batch-size 0:"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = told(capsys, "--checkpoint", runs / "sst2", *argv)
    assert (status, output, len(errors.splitlines())) == (2, "", 1) and message in errors


def test_data_that_have_changed_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text((runs / "rows.tsv").read_text())
    run = tiny_runs.write(tmp_path / "run", "sst2", **{"data.path": str(rows), "data.test_fraction": 0.3})
    argv = ["--checkpoint", run, "--data.cache-dir", tmp_path / "cache"]
    source, _ = evaluation.samples_of(load.load(run), "test", {"data.cache_dir": str(tmp_path / "cache")})
    info = run / "checkpoints" / "3" / "info" / "metadata"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"data": source.fingerprint}))
    checkpoint.checksums.write(info.parents[1])
    assert told(capsys, *argv)[0] == 0
    rows.write_text(rows.read_text() + "one more\t1\n")
    status, _, errors = told(capsys, *argv)
    assert status == 2 and len(errors.splitlines()) == 1 and "the data differ from those of" in errors


def test_the_help_needs_no_framework() -> None:
    code = (
        "import sys; from jaxlm import evaluate\ntry: evaluate.main(['--help'])\nfinally: print('jax' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--split" in process.stdout and process.stdout.endswith("False\n")
