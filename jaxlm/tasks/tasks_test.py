"""What tasks make of data: scores against scikit-learn, exact evaluation, baselines by hand, and what a person sees."""

import contextlib
import dataclasses
import functools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sklearn
from flax import nnx

from jaxlm import config as configs
from jaxlm import loop, parallel
from jaxlm.data import prepare
from jaxlm.tasks import TASKS
from jaxlm.training.log import RunLog
from jaxlm.training.run import Run

WORDS = "cold dark green house lamp moon river stone summer water".split()


def sentence(i: int) -> str:
    """Return sentence i: 1 to 12 words."""
    random = np.random.default_rng(i)
    return " ".join(random.choice(WORDS, random.integers(1, 13)))


def label(i: int) -> int:
    return i % 7 // 5


TRAINING, VALIDATION = range(100, 160), range(23)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and labelled sentences, 23 of them for validation."""
    path = tmp_path_factory.mktemp("tasks")
    for name, numbers in (("train", TRAINING), ("validation", VALIDATION)):
        (path / f"{name}.txt").write_text("".join(f"{sentence(i)}\n" for i in numbers))
        rows = "".join(f"{sentence(i)}\t{label(i)}\n" for i in numbers)
        (path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    return path


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Any:
    """A function of a task's name that returns a tiny run of it, ready to train."""

    @functools.cache
    def run(name: str) -> Run:
        ending = "txt" if name in ("mlm", "gpt") else "tsv"
        config = configs.build(
            {
                "task": name,
                "data.path": str(folder / f"train.{ending}"),
                "data.validation_path": str(folder / f"validation.{ending}"),
                "data.test_fraction": 0.0,
                "data.cache_dir": str(folder / "cache"),
                "tokenizer.kind": "bpe" if name == "gpt" else "wordpiece",
                "tokenizer.vocab_size": 300,
                "train.batch_size": 1,
                "model.pad_id": -1 if name == "gpt" else 0,
                "model.d_model": 12,
                "model.n_layers": 1,
                "model.n_heads": 3,
                "model.seq_len": 6 if name == "gpt" else 16,
            }
        )
        task = TASKS[name](config)
        progress = lambda title, n_bytes: contextlib.nullcontext(lambda done: None)  # noqa: E731
        config, data = prepare.prepare(config, task.samples, task.embedded, progress)
        return Run(config, TASKS[name](config), data, folder, RunLog(), started_s=0.0, program="")

    return run


# Scores


@pytest.mark.parametrize(("n_labels", "n_outputs"), [(2, 2), (3, 3), (2, 5)])
def test_classification_scores_are_those_of_scikit_learn(n_labels: int, n_outputs: int) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(-1, n_labels, 100)
    logits = random.normal(size=(100, n_outputs)).astype(np.float32) + np.eye(n_labels, n_outputs)[labels]
    config = configs.build({"data.n_labels": n_labels})
    totals = TASKS["sst2"](config).loss(lambda *inputs: logits, {"tokens": None, "labels": labels}, None)

    is_counted = labels >= 0
    labels, logits = labels[is_counted], logits[is_counted]
    guesses = logits.argmax(axis=-1)
    scores = TASKS["sst2"](config).scores(totals) | TASKS["cola"](config).scores(totals)
    classes = [1] if n_labels == 2 else list(range(n_labels))
    expected = {
        "accuracy": sklearn.accuracy_score(labels, guesses),
        "f1": sklearn.f1_score(labels, guesses, labels=classes, average="macro"),
        # All predictions that are no class count as one more.
        "matthews": sklearn.matthews_corrcoef(labels, np.minimum(guesses, n_labels)),
        "loss": sklearn.log_loss(
            labels, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), labels=list(range(n_outputs))
        ),
    }
    assert 0.3 < expected["accuracy"] < 0.95
    assert scores == pytest.approx(expected, rel=1e-6)


def test_cola_shows_matthews_correlation_first() -> None:
    totals = {"loss": 1.0, "count": 4, "correct": 3, "confusion": np.array([[1, 1, 0], [0, 2, 0]])}
    assert list(TASKS["cola"](configs.Config()).scores(totals)) == ["matthews", "accuracy", "loss"]


@pytest.mark.parametrize("name", ["mlm", "gpt", "cola"])
def test_evaluation_counts_every_sample_once_at_any_batch_size(name: str, prepared: Any) -> None:
    run = prepared(name)
    fresh, compiled = loop.build(run.config, run.task, parallel.make_mesh(run.config))
    state = fresh()
    results = []
    for batch_size, are_cut in ((1, False), (3, True), (7, False), (100, False)):
        train = dataclasses.replace(run.config.train, batch_size=batch_size, group_by_length=are_cut)
        config = dataclasses.replace(run.config, train=train)
        this = dataclasses.replace(run, config=config)
        results.append(loop.evaluate(this, compiled, state.params, "validation", lambda: False)[""])

    lengths = [len(run.data.tokenizer.encode(sentence(i)).ids) for i in VALIDATION]
    expected = {
        "cola": {"count": len(VALIDATION)},
        # gpt guesses each token, and that the article ends.
        "gpt": {"count": sum(lengths) + len(VALIDATION), "bytes": sum(len(sentence(i)) for i in VALIDATION)},
        "mlm": {"count": sum(max(1, int(0.15 * (length + 2))) for length in lengths)},
    }
    for totals in results:
        assert {key: totals[key] for key in expected[name]} == expected[name]
        assert totals["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert totals["correct"] == results[0]["correct"]
    if name == "cola":
        rows = Counter(label(i) for i in VALIDATION)
        for totals in results:
            np.testing.assert_array_equal(totals["confusion"], results[0]["confusion"])
            np.testing.assert_array_equal(totals["confusion"].sum(axis=1), [rows[0], rows[1]])

    # What is shown as right is what counts as right.
    if name != "gpt":
        batch = run.data.samples["validation"].batch(np.arange(23), np.zeros(23, int))
        guesses = np.asarray(jax.jit(compiled.predict)(state.params, batch))
        assert np.sum(guesses == batch["labels"]) == results[0]["correct"]


@pytest.mark.parametrize("name", ["mlm", "gpt"])
def test_a_task_with_a_loss_of_its_own_is_scored_by_it(name: str) -> None:
    class Doubled(TASKS[name]):  # type: ignore[name-defined,misc]
        def loss(self, model: Any, batch: Any, key: Any) -> Any:
            totals = super().loss(model, batch, key)
            return totals | {"loss": 2 * totals["loss"]}

    sizes = {"vocab_size": 11, "d_model": 12, "n_heads": 3, "n_layers": 1, "seq_len": 6, "dropout": 0.0}
    config = configs.build({"task": name} | {f"model.{key}": x for key, x in sizes.items()})
    batch: dict[str, Any] = {"tokens": jnp.array([[1, 2, 3, 4, 5, 6]]), "labels": jnp.array([[2, 3, 4, 5, 6, 7]])}
    if name == "mlm":
        batch |= {"positions": jnp.array([[1, 4]]), "labels": jnp.array([[7, 8]])}
    model = TASKS[name](config).build_model(nnx.Rngs(0))
    totals, logits = TASKS[name](config).loss_with_logits(model, batch)
    doubled, same = Doubled(config).loss_with_logits(model, batch)
    assert float(doubled["loss"]) == pytest.approx(2 * float(totals["loss"]), rel=1e-6)
    np.testing.assert_array_equal(logits, same)


# Baselines


def entropy(counts: Counter) -> float:
    """Return the mean loss in nats of guessing by these frequencies."""
    n = counts.total()
    return -sum(count / n * math.log(count / n) for count in counts.values())


def test_baseline_of_classification_is_the_majority_class(prepared: Any) -> None:
    labels = [label(i) for i in VALIDATION]
    counts = Counter(labels)
    assert counts == {0: 17, 1: 6}
    for name, first in (("sst2", {"f1": 0.0}), ("cola", {"matthews": 0.0})):
        run = prepared(name)
        expected = {"accuracy": 17 / 23, "loss": entropy(counts), **first}
        assert run.task.baseline(run.data.samples["validation"]) == pytest.approx(expected)


def test_baseline_of_language_models_is_the_frequency_of_words(prepared: Any) -> None:
    words = [word for i in VALIDATION for word in sentence(i).split()]
    counts = Counter(words)
    loss = entropy(counts)
    run = prepared("mlm")
    expected = {"loss": loss, "accuracy": max(counts.values()) / len(words), "perplexity": math.exp(loss)}
    assert run.task.baseline(run.data.samples["validation"]) == pytest.approx(expected)

    run = prepared("gpt")
    tokens = [token for i in VALIDATION for token in [*run.data.tokenizer.encode(sentence(i)).tokens, "the end"]]
    loss, n_bytes = entropy(Counter(tokens)), sum(len(sentence(i)) for i in VALIDATION)
    bits = loss * len(tokens) / math.log(2) / n_bytes
    expected = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}
    assert run.task.baseline(run.data.samples["validation"]) == pytest.approx(expected)


# For a person


def test_mlm_shows_the_words_and_marks_wrong_predictions(prepared: Any) -> None:
    run = prepared("mlm")
    index = next(i for i in VALIDATION if len(sentence(i).split()) == 12)  # two masks
    batch = run.data.samples["validation"].batch(np.array([index]), np.array([0]))
    labels = batch["labels"][0]
    words = [run.data.tokenizer.id_to_token(int(token)) for token in labels]
    assert len(words) == 2
    wrong = next(word for word in WORDS if word not in words)
    guesses = np.array([[labels[0], run.data.tokenizer.token_to_id(wrong)]])

    masked, original, predicted = run.task.show(batch, guesses, run.data.tokenizer).splitlines()
    assert (masked[:11], original[:11], predicted[:11]) == ("   masked: ", " original: ", "predicted: ")
    assert re.findall(r"\[(\w+)\]", original[11:]) == ["CLS", *sorted(words, key=original.index), "SEP"]
    assert re.sub(r"[\[\]]", "", original[11:]) == f"CLS {sentence(index)} SEP"
    assert predicted.count("*") == 2 and f"*{wrong}*" in predicted and f"[{words[0]}]" in predicted
    assert masked[11:].split() == [
        run.data.tokenizer.id_to_token(int(token)) for token in batch["tokens"][0] if token != 0
    ]


def test_gpt_shows_prompts_with_both_continuations(prepared: Any) -> None:
    run = prepared("gpt")
    samples = run.data.samples["validation"]
    batch = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
    is_long = batch["labels"][:, 2] >= 0
    assert 0 < np.sum(is_long) < len(is_long)
    guesses = np.where(batch["labels"] >= 0, batch["labels"], 0)[:, 2:5]
    shown = run.task.show(batch, guesses, run.data.tokenizer).split("\n\n")
    assert len(shown) == np.sum(is_long)
    texts = [f"<|endoftext|>{sentence(i)}<|endoftext|>" for i in VALIDATION]
    for text in shown:
        prompt, continued, original = (line[11:] for line in text.splitlines())
        assert any(f"{prompt} {original}" in article or f"{prompt}{original}" in article for article in texts), text
        assert continued.startswith(original)


@pytest.mark.parametrize("name", ["sst2", "cola"])
def test_classification_shows_sentences_and_marks_wrong_predictions(name: str, prepared: Any) -> None:
    run = prepared(name)
    batch = run.data.samples["validation"].batch(np.array([4, 5]), np.array([0, 0]))
    lines = run.task.show(batch, np.array([1, 1]), run.data.tokenizer).splitlines()
    assert lines == [f"* label 0, predicted 1: {sentence(4)}", f"  label 1, predicted 1: {sentence(5)}"]


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        ([[3, 0, 0], [2, 0, 0]], "class 0 for every sample, which is right for 60.0% of them"),
        ([[0, 3, 0], [0, 2, 0]], "class 1 for every sample, which is right for 40.0% of them"),
        ([[0, 0, 3], [0, 0, 2]], "no class for every sample, which is right for 0.0% of them"),
        ([[0, 3, 0], [0, 0, 0]], "class 1 for every sample, which is right for 0.0% of them"),
        ([[3, 0, 0], [0, 0, 0]], ""),  # all right: the labels are of one class
        ([[3, 0, 0], [1, 1, 0]], ""),
    ],
)
def test_a_model_that_always_predicts_the_same_is_told(confusion: list, expected: str) -> None:
    warning = TASKS["cola"](configs.Config()).warning({"confusion": np.array(confusion)})
    assert expected in warning and bool(warning) == bool(expected)
