"""Models of two texts: what they predict is what their task makes of the same samples, on a command line and served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from jaxlm import convert, evaluate, predict
from jaxlm.data.samples import ClassifiedSamples
from jaxlm.errors import UserError
from jaxlm.inference import http_api, predictors
from jaxlm.inference.batching import Engine
from jaxlm.testing import tiny_runs

A, B = "the cat sat on the mat", "a dog and a cat"
SETTINGS: dict[str, Any] = {"data.pair_column": "auto", "model.segments": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "rte": tiny_runs.write(folder / "rte", "rte", classes=("no", "yes"), **SETTINGS),
        "stsb": tiny_runs.write(folder / "stsb", "stsb", **SETTINGS),
    }


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_a_prediction_is_what_the_model_makes_of_the_sample(runs: dict[str, Path], task: str) -> None:
    predictor = predict.load(runs[task])
    (answer,) = predictor([f"{A}\t{B}"])
    ids = [predictor.tokenizer.encode(text, add_special_tokens=False).ids for text in (A, B)]
    split = type("Split", (), {})()
    split.tokens, split.offsets = np.array(ids[0] + ids[1]), np.cumsum([0, len(ids[0]), len(ids[1])])
    split.labels = np.zeros(2, np.int32)
    samples = ClassifiedSamples(split, predictor.trained.config, predictor.specials, 300)
    batch = samples.batch(np.arange(1), np.zeros(1, int))
    assert batch["types"].sum() == len(ids[1]) + 1
    logits = np.asarray(predictor.trained.task.logits(predictor.trained.model, batch), np.float64)[0]
    assert (answer["text"], answer["pair"]) == (A, B)
    if task == "stsb":
        assert answer["value"] == pytest.approx(logits[0], rel=1e-5)
    else:
        p = np.exp(logits) / np.exp(logits).sum()
        assert answer["probabilities"] == pytest.approx(dict(zip(("no", "yes"), p, strict=True)), rel=1e-5)
    (other,) = predictor([f"{B}\t{A}"])
    assert other.get("value", other.get("probabilities")) != answer.get("value", answer.get("probabilities"))


def test_the_command_takes_pairs_and_lines_of_two_columns(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--checkpoint", str(runs["rte"]), "--json"]
    assert predict.main([*run, "--text", A, "--pair", B, "--text", B, "--pair", A]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    (tmp_path / "two.tsv").write_text(f"{A}\t{B}\n{A}\n")
    assert predict.main([*run, "--file", str(tmp_path / "two.tsv")]) == 2
    out, err = capsys.readouterr()
    again = json.loads(out.splitlines()[0])
    assert again["probabilities"] == pytest.approx(first["probabilities"]) != pytest.approx(second["probabilities"])
    assert "error: line 2: the model compares two texts; give the second with --pair, or behind a tab" in err


def test_as_many_pairs_as_texts_are_needed(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(runs["rte"]), "--text", A, "--text", B, "--pair", B])
    assert "--pair is the second text of a --text; give as many of each" in capsys.readouterr().err


def test_a_model_of_one_text_refuses_a_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_runs.write(tmp_path / "sst2", "sst2")
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(run), "--text", A, "--pair", B])
    out, err = capsys.readouterr()
    assert not out and "reads one text; leave --pair out" in err


def test_the_worst_errors_have_labels_as_the_file_has_them(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.tsv"
    file.write_text("sentence1\tsentence2\tscore\n" + f"{A}\t{B}\t4.77\n{B}\t{A}\t1.1\n")
    assert evaluate.main(["--checkpoint", str(runs["stsb"]), "--data.path", str(file)]) == 0
    assert "label 4.77, predicted" in capsys.readouterr().out


def test_served_answers_and_attention_are_those_of_the_predictor(runs: dict[str, Path]) -> None:
    predictor = predict.load(runs["rte"])
    engine = Engine(predictor)
    try:
        client = TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost")
        answer = client.post("/predict", json={"text": A, "pair": B})
        assert answer.status_code == 200 and answer.json() == predictor([f"{A}\t{B}"])[0]
        assert client.post("/predict", json={"text": A}).status_code == 422
        refused = client.post("/predict", json={"text": A, "pair": B * 20})
        assert refused.status_code == 422 and "shorten it" in refused.text
        looked = client.post("/attention", json={"text": A, "pair": B, "layer": 1, "head": 0}).json()
        assert looked == predictor.attention(f"{A}\t{B}", 1, 0)
        assert '"takesTwo": true' in client.get("/").text
    finally:
        engine.close()


def test_a_public_classifier_is_served_with_two_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = {
        "positions": "learned",
        "embedding_norm": True,
        "post_norm": True,
        "head_dense": "bert",
        "norm_epsilon": 1e-12,
    }
    settings = SETTINGS | {f"model.{name}": x for name, x in bert.items()}
    run = tiny_runs.write(tmp_path / "rte", "rte", classes=("no", "yes"), **settings)
    assert convert.main([str(run), str(tmp_path / "public"), "--as", "bert"]) == 0
    predictor = predict.load(tmp_path / "public")
    predictor.take_two()  # as serve --pair
    engine = Engine(predictor)
    try:
        client = TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost")
        answer = client.post("/predict", json={"text": A, "pair": B}).json()
        (expected,) = predict.load(run)([f"{A}\t{B}"])
        assert answer["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5) and answer["pair"] == B
        assert '"takesTwo": true' in client.get("/").text
    finally:
        engine.close()
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", str(run), "--text", A, "--pair", B, "--query", A])
    assert "--query compares single texts; leave --pair out" in capsys.readouterr().err


def test_attention_is_of_the_types_of_both_texts(runs: dict[str, Path]) -> None:
    predictor = predict.load(runs["rte"])
    seen = predictor.attention(f"{A}\t{B}", 0, 0)["weights"]
    predictor._types = lambda texts, n_rows: {}  # type: ignore[method-assign]
    assert seen != predictor.attention(f"{A}\t{B}", 0, 0)["weights"]


def test_one_text_is_refused(runs: dict[str, Path]) -> None:
    predictor = predict.load(runs["rte"])
    assert isinstance(predictor, predictors.Classify) and predictor.takes_two
    with pytest.raises(UserError, match="two texts"):
        predictor([A])
