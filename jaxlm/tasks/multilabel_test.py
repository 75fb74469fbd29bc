"""Several labels a text: files, both packages, prediction, evaluation, and models of transformers in and out."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from starlette.testclient import TestClient

import jaxlm.train
import torchlm.train
from jaxlm import config as configs
from jaxlm import convert, predict
from jaxlm.data import label_sets, metrics, packing, sources
from jaxlm.errors import UserError
from jaxlm.inference import evaluation, http_api, load
from jaxlm.inference.batching import Engine
from jaxlm.testing import tiny_runs

THREE: dict[str, Any] = {"data.n_labels": 3}
WORDS = {"cat": "animal", "dog": "animal", "log": "thing", "mat": "thing", "old": "age"}
TINY = (
    "--task multilabel --model.d-model 12 --model.n-heads 3 --model.n-layers 1 --tokenizer.vocab-size 300 "
    "--train.batch-size 8 --train.warmup-steps 0 --train.learning-rate 0.02 --train.max-steps 80 "
    "--train.eval-interval 80 --data.test-fraction 0 --data.validation-fraction 0.2 --model.dropout 0"
)


def rows() -> list[tuple[str, list[str]]]:
    random = np.random.default_rng(0)
    texts = [random.choice([*WORDS, "the", "a", "and"], 4).tolist() for _ in range(160)]
    return [(" ".join([*text, str(i)]), sorted({WORDS[x] for x in text if x in WORDS})) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets")
    lines = [json.dumps({"text": text, "labels": names}) for text, names in rows()]
    (path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (path / "texts.csv").write_text("text,labels\n" + "".join(f"{text},{'|'.join(names)}\n" for text, names in rows()))
    return path


def test_labels_are_lists_or_texts_with_marks_between_them(folder: Path) -> None:
    found = {}
    for name in ("texts.jsonl", "texts.csv"):
        source = sources.open_source(configs.build({"data.path": str(folder / name)}).data, "sets")
        assert source.classes == ("age", "animal", "thing")
        found[name] = list(source.articles())
        texts: list[tuple[str, list[str]]] = []
        for article in found[name]:
            if article.label < 0:
                texts.append((article.text, []))
            else:
                assert not article.text
                texts[-1][1].append(source.classes[int(article.label)])
        assert texts == rows()
    assert found["texts.jsonl"] == found["texts.csv"]
    with pytest.raises(UserError, match="line 3: label 'plant' is none of the classes"):
        (folder / "other.csv").write_text("text,labels\na,age\nb,plant;age\n")
        data = configs.build({"data.path": str(folder / "other.csv"), "data.validation_fraction": 0.0}).data
        list(sources.open_source(data, "sets", ("age", "animal")).articles())


def test_scores_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(1)
    labels, guesses = random.random((50, 4)) < 0.4, random.random((50, 4)) < 0.5
    marks = np.stack([x.sum(axis=0) for x in (labels & guesses, guesses, labels)], axis=1)
    totals = {"marks": marks, "loss": 3.0, "count": 50, "correct": np.all(labels == guesses, axis=1).sum()}
    found = label_sets.scores("abcd", totals)
    assert found["f1"] == pytest.approx(f1_score(labels, guesses, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert [found[f"f1_{x}"] for x in "abcd"] == pytest.approx(f1_score(labels, guesses, average=None).tolist())
    assert found["accuracy"] == accuracy_score(labels, guesses)
    constant = label_sets.constant(labels.astype(np.int32))
    shares = torch.tensor(labels.mean(axis=0)).expand(50, 4)
    expected = torch.nn.functional.binary_cross_entropy(shares, torch.tensor(labels).double())
    assert metrics.loss(constant) == pytest.approx(float(expected))


@pytest.mark.parametrize("package", [jaxlm.train, torchlm.train], ids=["jaxlm", "torchlm"])
def test_a_run_learns_labels_and_is_used(
    package: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    data = ["--data.path", str(folder / "texts.jsonl"), "--data.cache-dir", str(folder), "--run.dir", str(run)]
    assert package.main([*TINY.split(), *data]) == 0
    said = capsys.readouterr().out
    assert "classes age (" in said and "f1_macro (higher is better)" in said
    (row,) = [
        x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if x["split"] == "validation"
    ]
    assert row["f1"] > 0.9
    text = ["--checkpoint", str(run), "--text", "the cat and log 3", "--json"]
    assert predict.main(text) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["labels"] == ["animal", "thing"] and answer["probabilities"].keys() == {"age", "animal", "thing"}
    assert predict.main([*text, "--threshold", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["age", "animal", "thing"]
    trained = load.load(run)
    _, samples = evaluation.samples_of(trained, "validation", {})
    result = evaluation.evaluate(trained, samples)
    assert {name: score.value for name, score in result.scores.items()} == pytest.approx(
        {name: row[name] for name in result.scores}, abs=1e-5
    )
    assert all(set(str(error.label).split(", ")) <= {"age", "animal", "thing", "none"} for error in result.worst)


def test_transformers_reads_and_is_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model: dict[str, Any] = {
        "positions": "learned",
        "embedding_norm": True,
        "post_norm": True,
        "head_dense": "bert",
        "norm_epsilon": 1e-12,
    }
    settings: dict[str, Any] = {"data.n_labels": 3, **{f"model.{name}": x for name, x in model.items()}}
    run = tiny_runs.write(tmp_path / "run", "multilabel", classes=("x", "y", "z"), **settings)
    assert convert.main([str(run), str(tmp_path / "out"), "--as", "bert"]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.problem_type == "multi_label_classification" and theirs.config.id2label[1] == "y"
    ours, back = predict.load(run), predict.load(tmp_path / "out")
    ids = torch.tensor([ours.encode("the cat sat")])
    labels = torch.tensor([[1.0, 0.0, 1.0]])
    with torch.no_grad():
        found = theirs(input_ids=ids, labels=labels)
    for predictor in (ours, back):
        (answer,) = predictor(["the cat sat"])
        np.testing.assert_allclose(list(answer["probabilities"].values()), found.logits.sigmoid()[0], atol=1e-5)
        assert answer["labels"] == [name for name, x in zip("xyz", found.logits[0], strict=True) if x > 0]
    batch = {"tokens": jnp.asarray(ids.numpy(), jnp.int32), "labels": jnp.asarray(labels.numpy(), jnp.int32)}
    totals = ours.trained.task.loss(ours.trained.model, batch, None)
    assert float(totals["loss"]) == pytest.approx(float(found.loss), rel=1e-4)


def test_it_is_served_and_two_ways_to_train_it_are_refused(tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "multilabel", classes=("x", "y", "z"), **THREE)
    predictor = predict.load(run)
    engine = Engine(predictor)
    try:
        client = TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost")
        answer = client.post("/predict", json={"text": "the cat sat"})
        assert answer.status_code == 200 and answer.json() == predictor(["the cat sat"])[0]
        assert answer.json().keys() == {"text", "labels", "probabilities"} and "Label a text" in client.get("/").text
        assert "probabilities" in client.get("/openapi.json").json()["components"]["schemas"]["Labelled"]["properties"]
    finally:
        engine.close()
    with pytest.raises(UserError, match="threshold 2: has to be 0 to 1"):
        predictor(["the cat"], threshold=2)
    with pytest.raises(UserError, match="task=multilabel has no softmax to learn from"):
        configs.load(["--task", "multilabel", "--distill.teacher", "runs/x"])
    with pytest.raises(UserError, match="task=multilabel reads a text a row"):
        packing.samples_of(
            label_sets.LabelSetSamples, None, configs.build({"task": "multilabel", "data.pack": "documents"}), {}, 0
        )  # type: ignore[arg-type]
