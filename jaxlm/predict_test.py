"""`python -m jaxlm.predict` on runs of all tasks: its answers by the whole model, its words, and what it refuses."""

import gzip
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import predict
from jaxlm.config import TokenizerConfig
from jaxlm.data import sources, tokenization
from jaxlm.data.cache import Split
from jaxlm.data.samples import ClassifiedSamples
from jaxlm.errors import UserError
from jaxlm.inference import load
from jaxlm.inference.predictors import Continue
from jaxlm.testing import tiny_runs

Told = tuple[int, str, str]  # exit status, stdout, stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for task in tiny_runs.OF_TASK:
        tiny_runs.write(folder / task, task)
    return folder


@pytest.fixture(scope="module")
def predictors(runs: Path) -> dict[str, Any]:
    return {task: predict.load(runs / task) for task in tiny_runs.OF_TASK}


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> Told:
    try:
        status = predict.main([str(arg) for arg in argv])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_masks_are_filled_by_the_whole_model(runs: Path, predictors: dict[str, Any]) -> None:
    fill = predictors["mlm"]
    texts = ["the [MASK] sat on the <mask>, and [MASK]", "[MASK]", "a dog and a [MASK]"]
    (first, second, third) = fill(texts, top_k=4)
    model, _ = load.load_model(runs / "mlm")
    ids = fill.encode(texts[0])
    tokens = [fill.tokenizer.id_to_token(i) for i in ids]
    assert tokens == ["[CLS]", "the", "[MASK]", "sat", "on", "the", "[MASK]", ",", "and", "[MASK]", "[SEP]"]
    expected = jax.nn.softmax(model(np.array([ids + [0] * (16 - len(ids))])))[0]
    for position, guesses in zip((2, 6, 9), first["masks"], strict=True):
        order = np.argsort(-expected[position])[:4]
        assert [guess["id"] for guess in guesses] == order.tolist()
        np.testing.assert_allclose([g["probability"] for g in guesses], expected[position][order], rtol=1e-4)
    best = [guesses[0]["token"] for guesses in first["masks"]]
    assert first["filled"].replace(" ", "") == "the{}saton the{},and{}".format(*best).replace(" ", "").replace("##", "")
    # Alone, a text has the same answer.
    for text, answer in zip(texts, (first, second, third), strict=True):
        (alone,) = fill([text], top_k=4)
        assert [[g["id"] for g in mask] for mask in alone["masks"]] == [[g["id"] for g in m] for m in answer["masks"]]


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_bytes_and_characters_are_filled_and_continued(kind: str, tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "mlm", "mlm", **{"tokenizer.kind": kind})
    (answer,) = predict.load(run)(["the [MASK]at"])
    assert answer["filled"] == f"the {answer['masks'][0][0]['token']}at"  # the space stays
    run = tiny_runs.write(tmp_path / "gpt", "gpt", **{"tokenizer.kind": kind})
    predictor = predict.load(run)
    *pieces, answer = predictor.stream("the cat", temperature=1.0, seed=3, max_new_tokens=6)
    assert "".join(pieces) == answer["continuation"] != ""


def test_a_byte_level_mask_has_the_space_before_its_word(tmp_path: Path) -> None:
    tokenizer = tokenization.train(TokenizerConfig(kind="bpe", vocab_size=300), lambda: iter(tiny_runs.TEXTS))
    tokenizer.add_special_tokens(["<pad>", "<mask>"])
    pad = tokenizer.token_to_id("<pad>")
    run = tiny_runs.write(tmp_path / "run", "mlm", tokenizer=tokenizer, **{"model.pad_id": pad})
    fill = predict.load(run)
    cat = fill.tokenizer.encode(" cat").ids
    assert fill.tokenizer.decode(cat) == " cat"
    expected = fill.tokenizer.encode("the").ids + [fill.specials["mask"]] + fill.tokenizer.encode(" sat").ids
    assert fill.encode("the [MASK] sat") == expected
    assert fill._filled("the <mask> sat", [" cat"]) == "the cat sat"
    (answer,) = fill(["the <mask> sat"])
    assert answer["filled"] == f"the{answer['masks'][0][0]['token']} sat"


@pytest.mark.parametrize("task", ["sst2", "cola"])
def test_classes_are_those_of_the_whole_model(task: str, runs: Path, predictors: dict[str, Any]) -> None:
    classify = predictors[task]
    texts = [" ".join(["the cat sat on a dog and saw a mat".split()[i], *["cat"] * i]) for i in range(10)]
    model, config = load.load_model(runs / task)
    ids = [classify.encode(text) for text in texts]
    expected = jax.nn.softmax(model(np.array([row + [0] * (16 - len(row)) for row in ids])))
    n = config.data.n_classes
    for answer, p in zip(classify(texts), np.asarray(expected), strict=True):
        np.testing.assert_allclose(answer["probabilities"], p[:n], rtol=1e-4)
        assert answer["label"] == (int(p.argmax()) if p.argmax() < n else None)
    assert len({answer["label"] for answer in classify(texts)}) > 1 or task == "cola"


def test_a_causal_classifier_answers_as_it_was_trained(tmp_path: Path) -> None:
    settings = {"tokenizer.kind": "bpe", "model.pad_id": -1, "model.pooling": "last"}
    run = tiny_runs.write(tmp_path / "run", "sst2", **settings)
    classify = predict.load(run)
    texts = ["the cat", "", "a dog and a cat sat on the mat"]
    ids = [classify.encode(text) for text in texts]
    split = Split(
        np.concatenate([row[1:-1] for row in ids]),
        np.cumsum([0, *(len(row) - 2 for row in ids)]),
        *[np.zeros(3, int)] * 2,
    )
    samples = ClassifiedSamples(split, classify.trained.config, classify.specials, 300)
    batch = samples.batch(np.arange(3), np.zeros(3, int))
    expected = jax.nn.softmax(classify.trained.model(batch["tokens"], None, batch["last"]))
    for answer, row, p, tokens in zip(classify(texts), ids, np.asarray(expected), batch["tokens"], strict=True):
        assert tokens[: len(row)].tolist() == row
        np.testing.assert_allclose(answer["probabilities"], p, rtol=1e-4)
    seen = np.array(classify.attention(texts[0], 1, 0)["weights"])
    assert np.triu(seen, 1).max() == 0 and seen[-1].min() > 0


def test_several_prompts_are_continued_as_one_by_one(predictors: dict[str, Any]) -> None:
    go_on = predictors["gpt"]
    texts = ["the", "", "a cat and a dog", "the cat sat"]
    together = go_on(texts, seed=3, temperature=1.2, top_p=1.0)
    assert together == [go_on([text], seed=3, temperature=1.2, top_p=1.0)[0] for text in texts]
    for text, answer in zip(texts, together, strict=True):
        *pieces, streamed = go_on.stream(text, seed=3, temperature=1.2, top_p=1.0)
        assert ("".join(pieces), streamed) == (answer["continuation"], answer)
        assert go_on.shown(answer) == text + answer["continuation"]
    assert go_on(["the"], seed=4) != go_on(["the"], seed=5)
    assert go_on(["the"])[0]["seed"] != go_on(["the"])[0]["seed"]
    assert (go_on.decoder._extend._cache_size(), go_on.decoder._fill._cache_size()) == (2, 2)  # for 4 rows and for 1


def test_a_prompt_is_answered_as_in_training(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reply = predict.load(runs / "pairs")
    ids = reply.encode("the cat?")
    article, tokenizer = reply.specials["article"], reply.tokenizer
    assert ids == [article, *tokenizer.encode(sources.pair("train", "the cat?", "yes")[0].text).ids]
    (answer,) = reply(["the cat?"], max_new_tokens=3)
    logits = reply.trained.model(np.array([ids + [0] * (16 - len(ids))]))[0, len(ids) - 1]
    assert tokenizer.decode([int(logits.argmax())]) == answer["continuation"][:1]
    assert reply(["the cat?"], max_new_tokens=3, seed=answer["seed"] + 1) == [answer | {"seed": answer["seed"] + 1}]
    _, output, _ = told(capsys, "--checkpoint", runs / "pairs", "--prompt", "the cat?", "--max-new-tokens", 3)
    assert output == f"the cat?\n{answer['continuation']}\n" == f"{reply.shown(answer)}\n"


def test_how_a_continuation_ends(runs: Path, predictors: dict[str, Any]) -> None:
    go_on = predictors["gpt"]
    n = len(go_on.encode("the cat"))
    (answer,) = go_on(["the cat"], seed=0)
    assert (answer["ending"], answer["tokens"]) in {("positions", 17 - n), ("article", answer["tokens"])}
    (answer,) = go_on(["the cat"], seed=0, max_new_tokens=1)
    assert (answer["ending"], answer["tokens"]) == ("length", 1)
    trained = predict.load(runs / "gpt").trained
    bias = trained.model.head.linear.bias
    bias[...] = bias[...].at[go_on.stop].set(1e4)
    (answer,) = Continue(trained)(["the cat"])
    assert (answer["ending"], answer["tokens"], answer["continuation"]) == ("article", 1, "")


def test_characters_of_several_tokens_are_streamed_whole(predictors: dict[str, Any]) -> None:
    go_on = predictors["gpt"]
    whole = "the €"
    ids = go_on.tokenizer.encode(whole).ids
    ready = [go_on._ready(go_on.tokenizer.decode(ids[:n])) for n in range(1, len(ids) + 1)]
    assert all(whole.startswith(text) for text in ready) and ready[-1] == whole and "the " in ready


def test_what_is_printed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = told(capsys, "--checkpoint", runs / "mlm", "--text", "the [MASK] sat", "--top-k", "2")
    first, second = output.splitlines()
    assert (status, errors) == (0, f"{runs}/mlm/checkpoints/3 (task mlm, step 3)\n")
    assert first.startswith("the") and first.endswith(" sat") and second.startswith("  [MASK]: ")
    status, output, errors = told(capsys, "--checkpoint", runs / "gpt", "--prompt", "the", "--temperature", 0)
    assert output.startswith("the") and "tokens, seed" in errors
    _, again, _ = told(capsys, "--checkpoint", runs / "gpt", "--prompt", "the", "--temperature", 0, "--seed", 7)
    assert output == again
    status, output, _ = told(capsys, "--checkpoint", runs / "sst2", "--text", "the cat", "--text", "a dog")
    assert [line.split()[0] for line in output.splitlines()] == ["label", "label"]
    assert output.splitlines()[1].endswith("  a dog")


def test_lines_and_json(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("the [MASK]\r\n\nno mask\n" + "the [MASK] " * 10 + "\n" + "a [MASK]\n" * 20)
    status, output, errors = told(capsys, "--checkpoint", runs / "mlm", "--file", tmp_path / "texts.txt", "--json")
    answers = [json.loads(line) for line in output.splitlines()]
    assert status == 2
    assert [answer["text"][:10] for answer in answers] == ["the [MASK]", "no mask", "the [MASK]", *["a [MASK]"] * 20]
    assert "there is no [MASK]" in answers[1]["error"] and answers[2]["error"].startswith("the text has 22 tokens")
    assert {len(guesses) for answer in answers[3:] for guesses in answer["masks"]} == {5}
    assert [line.split(":")[1] for line in errors.splitlines()[1:]] == [" line 3", " line 4"]


@pytest.mark.parametrize("way", ["file", "compressed", "pipe"])
@pytest.mark.parametrize("task", ["sst2", "gpt"])
def test_a_line_that_is_no_text_is_refused_and_the_others_are_answered(
    task: str, way: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbfthe cat\r\nth\xe9 cat\na\0dog\n\xed\xa0\x80\nthe \xe2\x80\xa8dog\x0c")
    argv = ["--file", path]
    if way == "compressed":
        argv = ["--file", tmp_path / "texts.txt.gz"]
        argv[1].write_bytes(gzip.compress(path.read_bytes()))
    elif way == "pipe":
        monkeypatch.setattr(sys, "stdin", stdin := path.open())
        argv = []
    status, output, errors = told(capsys, "--checkpoint", runs / task, "--json", *argv)
    if way == "pipe":
        stdin.close()
    answers = [json.loads(line) for line in output.splitlines()]
    fine = [answer.get("text", answer.get("prompt")) for answer in answers if "error" not in answer]
    assert (status, fine) == (2, ["the cat", "the \u2028dog\x0c"])
    for line, message in (
        (2, "the text is not UTF-8 at byte 2 (from 0); convert it, as with iconv -f LATIN1"),
        (3, "the text is binary, or text in UTF-16"),
        (4, "the text is not UTF-8 at byte 0 "),
    ):
        assert f"error: line {line}: {message}" in errors


def test_input_in_another_encoding_is_refused_once(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("the cat\nthe dog\n".encode("utf-16"))
    status, output, errors = told(capsys, "--checkpoint", runs / "sst2", "--file", path)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (status, output) == (2, "") and line.startswith(
        f"error: --file {path}: cannot be read (UTF-16, not UTF-8; convert it"
    )
    status, output, errors = told(capsys, "--checkpoint", runs / "sst2", "--text", "caf\udce9", "--text", "the cat")
    assert status == 2 and len(output.splitlines()) == 1
    assert "error: text 1: the text is not UTF-8 at byte 3 (from 0); convert it" in errors


@pytest.mark.parametrize(
    ("task", "argv", "message"),
    [
        ("mlm", ["--text", "[MASK]", "--seed", "1"], "--seed: does not go with"),
        ("sst2", ["--text", "a", "--top-k", "1"], "--top-k: does not go with"),
        ("mlm", ["--text", "[MASK]", "--top-k", "0"], "--top-k 0: has to be 1 to"),
        ("gpt", ["--text", "a", "--top-p", "1.5"], "--top-p 1.5: has to be above 0, and 1 (all) at most"),
        ("gpt", ["--text", "a", "--temperature", "nan"], "--temperature nan: has to be 0 or more"),
        ("gpt", ["--text", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: has to be 1 or more"),
        ("gpt", ["--text", "cat " * 30], "the text has 32 tokens, with special ones, but the model takes 16"),
        ("gpt", ["--text", "a", "--file", "b"], "name two sources"),
        ("gpt", ["--file", "nothing.txt"], "--file nothing.txt: cannot be read"),
        ("none", ["--text", "a"], "there is no such run or checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    task: str, argv: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, errors = told(capsys, "--checkpoint", runs / task, *argv)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (status, output, len(lines)) == (2, "", 1) and message in lines[0]


def test_the_best_checkpoint_is_used_without_its_optimizer(tmp_path: Path) -> None:
    run = tiny_runs.write(tmp_path / "run", "mlm", {2: 3.0, 4: 2.0, 6: 2.5})
    shutil.rmtree(run / "checkpoints" / "4" / "optimizer")
    assert predict.load(run).trained.start.info["step"] == 4
    assert predict.load(run / "checkpoints" / "6").trained.start.info["step"] == 6
    (run / "tokenizer.json").rename(tmp_path / "moved.json")
    with pytest.raises(UserError, match="there is no tokenizer.json of its run; give it with --tokenizer.path"):
        predict.load(run)
    assert predict.load(run, str(tmp_path / "moved.json")).trained.start.path == run / "checkpoints" / "4"
    shutil.rmtree(run / "checkpoints" / "4" / "head")
    with pytest.raises(UserError, match="checkpoints/4: damaged: head/.* is missing"):
        predict.load(run, str(tmp_path / "moved.json"))


def test_in_a_terminal_texts_are_asked_for(runs: Path) -> None:
    here, there = pty.openpty()
    command = [sys.executable, "-m", "jaxlm.predict", "--checkpoint", str(runs / "sst2")]
    process = subprocess.Popen(command, stdin=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(there)
    os.write(here, b"the cat\n" + b"cat " * 30 + b"\n\x04")
    output, errors = process.communicate(timeout=300)
    os.close(here)
    assert process.returncode == 0 and "Traceback" not in errors
    assert "the cat" in output and "error: the text has 32 tokens" in errors and "Ctrl-D ends" in errors


def test_the_help_needs_no_framework() -> None:
    code = "import sys; from jaxlm import predict\ntry: predict.main(['--help'])\nfinally: print('jax' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--max-new-tokens" in process.stdout and process.stdout.endswith("False\n")


def test_the_python_of_the_page(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = (Path(predict.__file__).parent / "inference" / "USING.md").read_text(encoding="utf-8")
    (code,) = [
        code for code in re.findall("^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if "predict" in code
    ]
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    assert [answer["prompt"] for answer in found["answers"]] == ["The statement", "A class"]
    assert found["piece"].keys() == found["answers"][0].keys()
