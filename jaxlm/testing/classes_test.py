"""Names of classes, from the labels of a file to every command and form of checkpoint, and back."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm import convert, predict, serve_test
from jaxlm.data import labels
from jaxlm.inference import evaluation, load
from jaxlm.reporting import run_page
from jaxlm.testing import tiny_runs
from jaxlm.training import resume
from jaxlm.weights import formats, snapshots

CLASSES = ("negative", "neutral", "positive")
# Settings of BERT, with which a model can be written for transformers.
BERT = {
    "model.positions": "learned",
    "model.post_norm": True,
    "model.embedding_norm": True,
    "model.head_dense": "bert",
    "data.n_labels": 3,
}
ROWS = "text\tlabel\n" + "".join(f"the cat {i}\t{CLASSES[i % 3]}\n" for i in range(30))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes have names."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "rows.tsv").write_text(ROWS)
    settings: dict[str, Any] = {**BERT, "data.path": str(folder / "rows.tsv"), "data.cache_dir": str(folder / "cache")}
    return tiny_runs.write(folder / "run", "sst2", classes=CLASSES, **settings)


@pytest.mark.parametrize(
    "names", ["a.pt", "a.safetensors", "a.pt b.safetensors c d.pt", "public:bert", "public:roberta"]
)
def test_every_form_of_checkpoint_keeps_the_names(names: str, run: Path, tmp_path: Path) -> None:
    source = run
    for name in names.split():
        family = name.removeprefix("public:") if name.startswith("public:") else ""
        target = tmp_path / (family or name)
        assert not convert.main([str(source), str(target), *(["--as", family] if family else [])])
        assert resume.to_use(target).classes() == CLASSES
        source = target
    if names == "public:bert":
        config = json.loads((source / "config.json").read_text())
        assert config["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
        assert config["label2id"] == {name: i for i, name in enumerate(CLASSES)}
        assert not convert.main([str(source), str(tmp_path / "back")])
        assert resume.to_use(tmp_path / "back").classes() == CLASSES


def test_classes_without_names_are_written_as_transformers_calls_them(tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "sst2", **BERT)
    assert resume.to_use(run).classes() == ("0", "1", "2")
    convert.main([str(run), str(tmp_path / "public"), "--as", "bert"])
    config = json.loads((tmp_path / "public/config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert resume.to_use(tmp_path / "public").classes() == ("0", "1", "2")


@pytest.mark.parametrize(
    "names", [["a", "b"], ["a", "b", "b"], ["a", "b", 3], ["a", "b", "c", "d"]], ids=["few", "twice", "number", "many"]
)
def test_names_that_do_not_fit_the_model_are_refused(names: list[Any], run: Path, tmp_path: Path) -> None:
    convert.main([str(run), str(tmp_path / "public"), "--as", "bert"])
    path = tmp_path / "public/config.json"
    stored = {str(i): name for i, name in enumerate(names)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": stored}))
    if names == ["a", "b", 3]:  # a name all the same
        assert resume.to_use(tmp_path / "public").classes() == ("a", "b", "3")
    else:
        with pytest.raises(resume.UserError, match="id2label=.*3 different names"):
            resume.to_use(tmp_path / "public")
    snapshot = snapshots.read(run)
    info = snapshot.info | {"classes": names}
    formats.WRITERS[formats.SAFETENSORS](
        tmp_path / "a.safetensors", snapshot.__class__(**vars(snapshot) | {"info": info})
    )
    with pytest.raises(resume.UserError, match="must be 3 different names"):
        resume.to_use(tmp_path / "a.safetensors").classes()


def test_predictions_tell_names(run: Path) -> None:
    classify = predict.load(run)
    (answer,) = classify(["the cat sat on the mat"])
    probabilities = answer["probabilities"]
    assert list(probabilities) == list(CLASSES) and sum(probabilities.values()) == pytest.approx(1)
    assert answer["label"] == max(probabilities, key=probabilities.get)
    assert json.loads(json.dumps(answer)) == answer
    assert classify.shown(answer).startswith(f"label {answer['label']}  (negative: 0.")
    with contextlib.closing(serve_test.Server(classify)) as server:
        status, _, answered = server.ask("POST", "/predict", {"text": "the cat sat on the mat"})
    assert (status, answered) == (200, answer)


def test_evaluation_and_report_tell_names(run: Path, tmp_path: Path) -> None:
    model = load.load(run)
    given = {"data.path": str(tmp_path / "other.tsv")}
    # In another order of rows and with a class less, labels are the same classes by their names.
    (tmp_path / "other.tsv").write_text("text\tlabel\na cat\tpositive\na dog\tnegative\n")
    source, samples = evaluation.samples_of(model, "test", given)
    assert source.classes == CLASSES and samples.split.labels.tolist() == [2, 0]
    result = evaluation.evaluate(model, samples)
    assert result.classes == list(CLASSES)
    labels = {mistake.text: mistake.label for mistake in result.worst}
    assert labels.items() <= {"a cat": "positive", "a dog": "negative"}.items() and labels
    assert all(mistake.predicted in CLASSES for mistake in result.worst)

    (tmp_path / "other.tsv").write_text("text\tlabel\na cat\tpositive\na dog\tawful\n")
    with pytest.raises(
        resume.UserError, match="other.tsv, line 3: label 'awful' is none of the classes negative, neutral"
    ):
        evaluation.samples_of(model, "test", given)


def test_checkpoint_without_names_answers_with_numbers(tmp_path: Path) -> None:
    """As those of earlier versions."""
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"the cat {i}\t{i % 3}\n" for i in range(30)))
    run = tiny_runs.write(tmp_path / "run", "sst2", **{**BERT, "data.path": str(tmp_path / "rows.tsv")})
    (answer,) = predict.load(run)(["the cat"])
    assert answer["label"] == max(range(3), key=answer["probabilities"].__getitem__)
    assert len(answer["probabilities"]) == 3
    model = load.load(run)
    (tmp_path / "other.tsv").write_text("text\tlabel\na cat\t2\na dog\t0\n")
    _, samples = evaluation.samples_of(model, "test", {"data.path": str(tmp_path / "other.tsv")})
    assert samples.split.labels.tolist() == [2, 0]
    assert labels.numbered(3) == model.task.classes


TINY = (
    "--task sst2 --model.d-model 12 --model.n-layers 1 --model.n-heads 2 --model.seq-len 16 --train.max-steps 4 "
    "--train.eval-interval 2 --train.batch-size 8 --train.warmup-steps 1 --tokenizer.vocab-size 300 --log.samples true "
)
FOR_BERT = "--model.positions learned --model.post-norm true --model.embedding-norm true --model.head-dense bert "


@pytest.mark.slow
@pytest.mark.parametrize("package", ["jaxlm", "torchlm"])
def test_words_from_a_file_to_transformers_and_back(package: str, tmp_path: Path) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def done(command: str, status: int = 0) -> str:
        words = [sys.executable, "-m", *command.split()]
        process = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert process.returncode == status, process.stderr
        return " ".join((process.stdout + process.stderr).split())

    def train(args: str, status: int = 0) -> str:
        return done(f"{package}.train {TINY}{args}", status)

    (tmp_path / "rows.tsv").write_text(ROWS + ROWS.partition("\n")[2].replace("cat", "dog"))
    out = train(f"--data.path rows.tsv --run.dir run {FOR_BERT}")
    assert "classes negative (" in out and ", neutral (" in out
    shown = re.findall(
        r"^. label (\w+), predicted (\w+): the ", (tmp_path / "run/samples.txt").read_text(), re.MULTILINE
    )
    assert len(shown) == 8 and {name for pair in shown for name in pair} <= {*CLASSES}
    assert "sst2 finished" in done(f"{package}.train --resume run --train.max-steps 6")

    assert '"probabilities": {"negative": 0.' in done("jaxlm.predict --checkpoint run --text cat --json")
    assert "label neutral" in done("jaxlm.evaluate --checkpoint run --split validation")
    done("jaxlm.report run")
    page = (tmp_path / "run/report.html").read_text()
    assert "label neutral" in page and "predicted positive" in page

    done(f"jaxlm.convert {'run' if package == 'jaxlm' else 'run/checkpoints/6.pt'} public --as bert")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "public")
    assert model.config.id2label == dict(enumerate(CLASSES))
    if package == "torchlm":
        return  # the rest is the same code
    (tmp_path / "other.tsv").write_text(ROWS.replace("positive", "good"))
    other = "--data.path other.tsv --init-from public --run.dir new"
    assert "other.tsv, line 4: label 'good' is none of the classes negative, neutral, positive" in train(other, 2)
    out = train(f"{other} --train.switch-training true")  # as the message says
    assert "classes good (" in out and "switch_training=True has no effect" not in out
    assert resume.to_use(tmp_path / "new").classes() == ("good", "negative", "neutral")


def test_report_of_an_earlier_evaluation_has_numbers() -> None:
    result = {"confusion": [[1, 2, 0], [3, 4, 0]], "worst": []}
    assert "predicted 1" in "".join(run_page._errors(result, ""))
