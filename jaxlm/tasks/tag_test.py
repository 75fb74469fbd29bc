"""The task `tag`: trained on files, scored, predicted with offsets, served, and written for transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxlm import config as configs
from jaxlm import convert, predict, train
from jaxlm.data import embedded, grammar, tags
from jaxlm.errors import UserError
from jaxlm.inference import evaluation, http_api, load
from jaxlm.inference.batching import Engine
from jaxlm.tasks import TASKS
from jaxlm.testing import tiny_runs

CLASSES = ("O", "B-PER", "I-PER")
TEXT = "Anna Ashford lives in Millbury, says the U.S. man.  "


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write(tmp_path_factory.mktemp("runs") / "tag", "tag", classes=CLASSES)


def test_embedded_sentences_have_new_words_and_tags_of_whole_names() -> None:
    splits = grammar.sentences("tag")
    known = {word for text, _ in splits["train"] for word in text.lower().split()}
    assert all(set(text.lower().split()) - known for text, _ in splits["test"])
    for text, found in splits["test"][:50]:
        assert len(text.split()) == len(found) and tags.to_bio(found) == found
        assert all(text.split()[start][0].isupper() for _, start, _ in tags.spans(found))
    source = embedded.tagged_sentences()
    assert source.classes == ("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    assert sum(article.label < 0 for article in source.articles()) == sum(map(len, splits.values()))


def test_spans_are_at_their_characters_however_long_the_text(run: Path) -> None:
    tagger: Any = predict.load(run)
    long = " ".join([TEXT] * 9)
    answers = tagger([long, "", "Anna", TEXT])
    assert [answer["text"] for answer in answers] == [long, "", "Anna", TEXT]
    assert answers[1]["spans"] == [] and sum(len(answer["spans"]) for answer in answers) > 1
    for answer in answers:
        for span in answer["spans"]:
            assert answer["text"][span["start"] : span["end"]] == span["text"] and span["text"].strip() == span["text"]
            assert span["type"] == "PER" and 0 < span["probability"] <= 1
    alone, among = ([(x["start"], x["end"]) for x in answer["spans"]] for answer in (tagger([TEXT])[0], answers[3]))
    assert alone == among


def test_words_of_windows_have_the_tags_that_they_have_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tagger: Any = predict.load(run)
    words = [match[0] for match in tags.WORD.finditer(TEXT)]
    assert words[:2] == ["Anna", "Ashford"] and "U.S" in words and "," in words
    whole = list(tagger._windows(words))
    assert len(whole) > 1 and sum(len(at) for _, at in whole) == len(words)
    ids = [i for row, at in whole for i in row[1:-1]]
    assert ids == [i for word in words for i in tagger.tokenizer.encode(f" {word}", add_special_tokens=False).ids]
    found = iter(words)
    for row, at in whole:
        assert len(row) <= tagger.model.seq_len
        for k in at:
            word = next(found)
            first = tagger.tokenizer.encode(f" {word}", add_special_tokens=False).ids[0]
            assert row[k] == first


def test_it_is_served_with_its_page(run: Path) -> None:
    engine = Engine(predict.load(run))
    try:
        client = TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost")
        answer = client.post("/predict", json={"text": TEXT * 5})
        assert answer.status_code == 200 and answer.json() == predict.load(run)([TEXT * 5])[0]
        assert "Find names" in client.get("/").text and '"kind": "tag"' in client.get("/").text
        assert "Tagged" in client.get("/openapi.json").text
        assert client.post("/attention", json={"text": "Anna"}).status_code == 200
        compiled = engine.metrics.compiled._value.get()
        client.post("/predict", json={"text": TEXT})
        assert engine.metrics.compiled._value.get() == compiled
    finally:
        engine.close()


def test_transformers_finds_the_same_spans_in_what_is_converted(tmp_path: Path) -> None:
    import transformers

    settings = {"model.post_norm": True, "model.embedding_norm": True, "model.positions": "learned"}
    settings |= {"model.head_dense": "bert", "model.norm_epsilon": 1e-12, "model.seq_len": 32}
    source = tiny_runs.write(tmp_path / "run", "tag", {1: None}, classes=CLASSES, **settings)
    assert convert.main([str(source), str(tmp_path / "hf"), "--as", "bert"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"] == dict(
        zip("012", CLASSES, strict=True)
    )
    folder = str(tmp_path / "hf")
    pipeline: Any = transformers.pipeline("token-classification", folder, aggregation_strategy="first")
    texts = [*tiny_runs.TEXTS, "cat, dog", "log", "the mat; old"]
    theirs = [[(x["entity_group"], x["start"], x["end"]) for x in found] for found in pipeline(texts)]
    assert any(theirs)
    for tagger in (predict.load(source), predict.load(tmp_path / "hf")):
        assert [[(x["type"], x["start"], x["end"]) for x in one["spans"]] for one in tagger(texts)] == theirs


def test_classes_that_are_no_tags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task=tag: tag 'NOUN' is neither O nor"):
        TASKS["tag"](configs.Config(), ("NOUN", "VERB")).scores({"spans": np.zeros((1, 3)), "loss": 1, "count": 1})


@pytest.mark.slow
def test_it_is_trained_on_files_and_scored_on_another(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Few sentences and a large vocabulary would let the model learn names by heart: the places tell the types.
    for name, n in (("train", 3000), ("valid", 40), ("test", 40)):
        lines = []
        for _ in range(n):
            who = "".join(random.choice(list("abcdef"), 4)).title()
            lines += [f"{who} I-PER", "met O", f"{who[::-1].title()} I-PER", "in O", f"{who} I-LOC", ". O", ""]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    sizes = "--model.d-model 16 --model.n-heads 2 --model.n-layers 2 --train.batch-size 16 --train.warmup-steps 10"
    sizes += " --tokenizer.vocab-size 300"
    updates = "--train.max-steps 240 --train.eval-interval 120 --train.learning-rate 1e-2 --model.dropout 0"
    files = [
        "--data.path",
        str(tmp_path),
        "--data.cache-dir",
        str(tmp_path / "cache"),
        "--run.dir",
        str(tmp_path / "run"),
    ]
    assert train.main(["--task", "tag", *files, *sizes.split(), *updates.split()]) == 0
    trained = load.load(tmp_path / "run")
    assert trained.task.classes == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    _, samples = evaluation.samples_of(trained, "test", {})
    found = evaluation.evaluate(trained, samples)
    assert found.scores["f1"].value > 0.95 and found.scores["f1"].baseline == 0 and found.n_counted == 240
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["split"] == "test" and row["f1"] == pytest.approx(found.scores["f1"].value)
    (answer,) = predict.load(tmp_path / "run")(["Abcd met Fade in Cafe."])
    assert [(x["type"], x["text"]) for x in answer["spans"]] == [("PER", "Abcd"), ("PER", "Fade"), ("LOC", "Cafe")]
