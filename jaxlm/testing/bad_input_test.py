"""Bad input, each kind as a real process: one line that says what and how to mend it, status 2, and nothing left."""

import concurrent.futures
import os
import re
import resource
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# name: (arguments, what the message says: the setting or file, the value, the rule, the mend)
CASES: dict[str, tuple[str, list[str]]] = {
    "unknown setting": ("--model.d-modle 16", ["--model.d-modle", "unknown setting", "did you mean --model.d-model"]),
    "unknown section": ("--d-model 16", ["--d-model", "unknown setting", "did you mean --model.d-model"]),
    "unknown setting in a file": ("--config {files}/unknown.toml", ["unknown.toml", "model.d_modle", "model.d_model?"]),
    "no setting": ("model.d_model 16", ["'model.d_model'", "--section.key value"]),
    "no value": ("--model.d-model", ["--model.d-model", "value is missing"]),
    "wrong type": ("--model.d-model wide", ["--model.d-model wide", "expected int", "default: 128"]),
    "wrong type in a file": ("--config {files}/type.toml", ["type.toml", "model.d_model = '16'", "expected int"]),
    "out of range": ("--train.batch-size 0", ["--train.batch-size 0", ">= 1", "default: 32"]),
    "no choice": ("--train.precision float16", ["--train.precision float16", "one of float32, bfloat16"]),
    "heads": ("--model.d-model 100 --model.n-heads 12", ["model.d_model=100", "model.n_heads=12", "use 96 or 108"]),
    "unknown task": ("--task mlmm", ["task=mlmm", "did you mean mlm", "cola, embed, gpt, mlm"]),
    "no config file": ("--config {files}/none.toml", ["--config", "none.toml", "No such file"]),
    "config no TOML": ("--config {files}/latin.txt", ["--config", "latin.txt", "cannot be read as TOML"]),
    "missing file": ("--data.path {files}/txt.txt", ["data.path", "txt.txt", "no such file", "did you mean text.txt"]),
    "empty file": ("--data.path {files}/empty.txt --run.dir a/b/c", ["empty.txt", "is empty", "give a file with text"]),
    "binary file": ("--data.path {files}/binary.txt", ["binary.txt", "is binary", "UTF-8"]),
    "not UTF-8": ("--data.path {files}/latin.txt", ["latin.txt", "not UTF-8 at byte 25 ", "convert it"]),
    "missing column": (
        "--task sst2 --data.path {files}/reviews.csv --data.text-column text",
        ["data.text_column=text", "reviews.csv", "there are sentence, label"],
    ),
    "label of another kind": (
        "--task sst2 --data.path {files}/word.csv",
        ["word.csv, line 9", "'good'", "is a word, but others are numbers (0, 1, good)", "set data.n_labels=3"],
    ),
    "label of a class too many": (
        "--task cola --data.path {files}/five.csv --data.n-labels 2",
        ["five.csv, line 9", "data.n_labels=2", "3 classes, 0, 1, 5", "leave data.n_labels out"],
    ),
    "too small for a batch": (
        "--data.path {files}/text.txt --train.batch-size 5000",
        ["text.txt", "too small", "tokens", "model.seq_len=64", "5000 are needed", "train.batch_size"],
    ),
    "too small for a window": (
        "--task gpt --data.path {files}/tiny.txt --data.validation-fraction 0 --train.batch-size 1",
        ["tiny.txt", "validation part is too small", "0 articles with 0 tokens make 0 samples", "1 are needed"],
    ),
    "no special tokens": (
        "--data.path {files}/text.txt --tokenizer.path {files}/vocab.txt",
        ["tokenizer.path", "vocab.txt", "no [MASK]", "task=mlm needs", "choose another"],
    ),
    "vocabulary": (
        "--data.path {files}/text.txt --model.vocab-size 10",
        ["model.vocab_size=10", "smaller than", "raise it, or set it to 0"],
    ),
    "no hub": (
        "--data.hub wikitext --data.hub-config wikitext-2-raw-v1",
        ["data.hub=wikitext", "cannot be reached", "use a local file with --data.path"],
    ),
    "silent hub": ("--data.hub nyu-mll/glue", ["data.hub=nyu-mll/glue", "no answer", "use a local file"]),
    "used run folder": ("--run.dir {files}/used", ["run.dir=", "used", "already", "give a new folder"]),
    "unwritable run folder": ("--run.dir {files}/text.txt/run", ["run.dir=", "cannot be written", "--run.dir"]),
    "unwritable cache": ("--data.cache-dir {files}/text.txt", ["text.txt", "cannot be written", "--data.cache-dir"]),
    "wandb not installed": ("--log.wandb project", ["log.wandb=project", "not installed", "pip install"]),
}


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str
    left: list[str]  # what lies in the working folder
    cpu_s: float


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    text = "\n".join(f"the quick brown fox jumps over {i} lazy dogs and runs away from them" for i in range(200))
    rows = "sentence,label\n" + "".join(f"film number {i},{i % 2}\n" for i in range(100))
    for name, content in {
        "text.txt": text,
        "empty.txt": "",
        "tiny.txt": "one two\n",
        "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\nquick\n",
        "reviews.csv": rows,
        "word.csv": rows.replace("number 7,1", "number 7,good"),
        "five.csv": rows.replace("number 7,1", "number 7,5"),
        "unknown.toml": "[model]\nd_modle = 16\n",
        "type.toml": "[model]\nd_model = '16'\n",
    }.items():
        (folder / name).write_text(content)
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "latin.txt").write_bytes("a first line in ASCII\ncaf\xe9 au lait\n".encode("latin-1"))
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def results(files: Path, launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every case, two processes at a time."""

    def run(name: str) -> Result:
        cwd = tmp_path_factory.mktemp(re.sub(r"\W", "_", name))
        port = silent.getsockname()[1] if name == "silent hub" else closed.getsockname()[1]
        with open(f"{cwd}.out", "w+") as out, open(f"{cwd}.err", "w+") as err:
            process = launch(
                CASES[name][0].format(files=files),
                cwd,
                {"HF_ENDPOINT": f"http://127.0.0.1:{port}"},
                stdout=out,
                stderr=err,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            left = [str(path.relative_to(cwd)) for path in cwd.rglob("*")]
            return Result(process.returncode, out.read(), err.read(), left, usage.ru_utime + usage.ru_stime)

    # One takes connections and never answers; the other refuses them.
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = dict(zip(CASES, pool.map(run, CASES), strict=True))
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before
    return results


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_with_status_2_and_nothing_left(name: str, results: dict[str, Result]) -> None:
    result, fragments = results[name], CASES[name][1]
    assert result.status == 2, result.stderr
    # A busy machine may tell of slow steps first.
    assert re.fullmatch(r"([^\n]+ \.\.\.\n)*error: [^\n]+\n", result.stderr)
    for fragment in fragments:
        assert fragment in result.stderr
    assert result.left == []
    assert "compiling" not in result.stdout
    # In processor time, because the wall clock also counts what else the machine does; the hub is waited for 3 s.
    assert result.cpu_s < 5


def test_debug_shows_the_traceback(files: Path, launch: Any, tmp_path: Path) -> None:
    process = launch(f"--debug --data.path {files}/empty.txt", tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    _, stderr = process.communicate()
    assert "Traceback" in stderr and "in open_source" in stderr
    assert stderr.rstrip().splitlines()[-1].startswith(f"error: {files}/empty.txt: ")
    assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_the_program_keeps_its_traceback_with_status_1(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "tensorboardX.py").write_text("raise RuntimeError('this module is broken')\n")
    (tmp_path / "cwd").mkdir()
    process = launch(
        "--log.tensorboard",
        tmp_path / "cwd",
        {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "Traceback" in stderr
    assert stderr.rstrip().splitlines()[-1] == "RuntimeError: this module is broken"
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("limit", [5_000, 100_000], ids=["tokenizer", "tokens"])
def test_a_full_disk_while_caching_leaves_nothing_half_written(limit: int, tmp_path: Path, launch: Any) -> None:
    (tmp_path / "cwd").mkdir()
    process = launch(
        "--data.cache-dir ../cache --tokenizer.vocab-size 300 --train.max-steps 1",
        tmp_path / "cwd",
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    # A limit on the size of a file fails as a full disk does, and needs no rights to mount one.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert re.fullmatch(r"([^\n]+ \.\.\.\n)*error: [^\n]+cannot be written[^\n]+--data.cache-dir\n", stderr)
    assert list((tmp_path / "cwd").iterdir()) == []
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".json"] == []
