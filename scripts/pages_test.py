"""Every command of every page runs as printed. One that carries a visible mark is parsed only: see MARK.

A page is one shell script, from its top to its end, in a folder like a clone: with the package, presets of tiny models,
a run of each task, and files under the names that the pages use. Commands that train get few updates.
"""

import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tomli_w

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.rglob("*.md")
    if not {".venv", "node_modules", "runs", "build", "dist"} & set(path.relative_to(ROOT).parts)
)
MARK = re.compile(
    r"\((accelerator|network|cloud)\b.*?\)"
)  # in a comment behind a command, or before the rest of a block
STARTS = r"(\$ |#|export |python|pip |pytest|curl |docker |diff |jaxlm |torchrun |sbatch |gcloud |\.ci/run)"
# Commands that run elsewhere in the tests or in CI, by what runs them.
ELSEWHERE = {
    r"pip install": ".ci/run",
    r"pytest$": ".ci/run",
    r"\.ci/run": ".ci/run",
    r"pre-commit install": "",  # writes a hook into .git
    r"python -m parity_tests\.replay": "parity_tests/replay_test.py",
    r"python -m parity_tests\.faults": "parity_tests/faults_test.py",
    r"python -m parity_tests\.report": "parity_tests/report_test.py",
    r"python -m parity_tests\.compare A B$": "parity_tests/compare/verdict_test.py",
    r"python -m jaxlm\.plan .*--topology v5e": "jaxlm/plan_test.py",
    r"python -m jaxlm\.\w+ .*\brating\b": "jaxlm/tasks/readme_test.py",
    r"python -m jaxlm\.report .*--png": "jaxlm/report_test.py",  # where there is Chromium
    r"jaxlm completion (bash|zsh|fish) ": "jaxlm/completion_test.py",
    r"python scripts/launch_": "scripts/launch_page_test.py",
    r"python scripts/benchmark\.py": "scripts/benchmark_test.py",
    r"python scripts/torture\.py": "scripts/torture_test.py",
    r"python scripts/load_server\.py": "scripts/load_server_test.py",
    r"python scripts/real_weights\.py --random": "scripts/real_weights_test.py",
}
TASKS = ("mlm", "gpt", "sst2", "cola", "pairs", "embed")
TINY = {
    "model": {"d_model": 16, "n_heads": 2},
    "train": {"warmup_steps": 1, "stable_steps": 0, "batch_size": 16, "precision": "float32", "accumulate": 1},
}
BERT = (
    "--model.positions learned --model.post-norm --model.embedding-norm --model.tied-embedding --model.head-dense bert"
)
GPT2 = "--model.positions learned --model.final-norm --model.tied-embedding --model.gelu tanh --model.output-bias false"
FEW = "--train.max-steps 4 --train.eval-interval 2 --train.batch-size 8"


class Command(NamedTuple):
    page: str
    line: int
    text: str  # without its comment
    is_marked: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text[:60]}"


def commands(page: str) -> Iterator[Command]:
    """Yield the commands of the code blocks of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    fence, is_indented, is_block_marked, start, pending = "", False, False, 0, ""
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            fence = "" if fence else line.removeprefix("```") or "text"
            is_block_marked = False
            continue
        if not fence and not pending and not (is_indented and not line):
            is_indented = line.startswith("    ") and (is_indented or not lines[number - 2])
            is_block_marked &= is_indented
        if not (fence == "sh" or (is_indented and not fence)) or not line.strip():
            continue
        text = line.strip()
        if not pending and not re.match(STARTS, text):
            continue
        text, _, comment = text.partition(" #") if not text.startswith("#") else ("", "", text)
        if not text.strip():
            is_block_marked |= bool(MARK.search(comment))
            continue
        start, pending = (start, pending) if pending else (number, "")
        pending += text.strip().removesuffix("\\")
        if not text.rstrip().endswith("\\"):
            yield Command(page, start, pending, is_block_marked or bool(MARK.search(comment)))
            pending = ""


COMMANDS = [command for page in PAGES for command in commands(page)]


def runner(text: str) -> str | None:
    """Return what runs a command elsewhere, None if nothing does."""
    return next((where for pattern, where in ELSEWHERE.items() if re.match(pattern, text)), None)


def shortened(command: str) -> str:
    """Return a command as printed, but with few updates."""
    return " && ".join(
        f"{simple} {FEW}" if re.search(r"python -m (jaxlm|torchlm)\.train", simple) else simple
        for simple in command.split(" && ")
        if runner(simple) is None
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone of the project, with small presets, data files, and a run of each task."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("jaxlm", "torchlm", "parity_tests", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.toml"):
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        for section, values in TINY.items():
            settings[section] = settings.get(section, {}) | values
        settings.setdefault("tokenizer", {}).setdefault("vocab_size", 400)
        settings["tokenizer"]["vocab_size"] = min(settings["tokenizer"]["vocab_size"], 400)
        (folder / "configs" / path.name).write_text(tomli_w.dumps(settings), encoding="utf-8")
    shutil.copytree(ROOT / "configs" / "architectures", folder / "configs" / "architectures")
    write_data(folder)
    models = {"bert": f"--task mlm {BERT}", "a_gpt2": f"--task gpt {GPT2}"}
    trainings = [f"--task {task}" for task in TASKS] + [f"{x} --run.dir runs/{name}" for name, x in models.items()]
    script(
        folder,
        [
            *(f"python -m jaxlm.train {training} {FEW}" for training in trainings),
            "mkdir my_models",
            "python -m jaxlm.convert runs/bert my_models/roberta --as roberta",
            "python -m jaxlm.convert runs/a_gpt2 my_models/gpt2 --as gpt2",
        ],
    )
    return folder


def write_data(folder: Path) -> None:
    """Write the files that the pages name."""
    sentences = [f"The value of an object, number {i}, is what its method number {i % 7} returns." for i in range(400)]
    (folder / "my_texts").mkdir()
    for path in ("my_texts/train.txt", "other.txt", "texts.txt", "prose.txt"):
        (folder / path).write_text("\n".join(sentences), encoding="utf-8")
    (folder / "input.txt").write_text("\n\n".join("\n".join(sentences[i : i + 4]) for i in range(0, 400, 4)))
    (folder / "reviews.txt").write_text("a fine film\nnot one dull minute\n", encoding="utf-8")
    rows = [f"a film number {i}\ta film number {i}\t{i % 2}" for i in range(400)]
    (folder / "reviews.tsv").write_text("\n".join(["sentence\treview\tlabel", *rows]), encoding="utf-8")
    for name in ("A.npz", "B.npz"):
        np.savez(folder / name, **{"loss/0": np.float32(1.5), "gradient/0/w": np.ones(3, np.float32)})
    pairs = [json.dumps({"prompt": f"What is {i}?", "answer": f"a number, {i}"}) for i in range(400)]
    (folder / "questions.jsonl").write_text("\n".join(pairs), encoding="utf-8")


def script(folder: Path, lines: list[str]) -> None:
    """Run lines as one shell script in a folder; fail with what the failing one printed."""
    text = "\n".join(["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *lines])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "BROWSER": "true",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@functools.cache
def help_of(program: str) -> str:
    done = subprocess.run([*shlex.split(program), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pages_have_commands() -> None:
    assert {"README.md", "jaxlm/inference/USING.md", "jaxlm/training/CHECKPOINTS.md"} <= {
        command.page for command in COMMANDS
    }
    assert len(COMMANDS) > 80
    for where in filter(None, ELSEWHERE.values()):
        assert (ROOT / where).is_file()


@pytest.mark.parametrize(
    "extra", sorted({x for c in COMMANDS for x in re.findall(r"pip install -e '\.\[(\w+)\]'", c.text)})
)
def test_an_extra_that_a_page_installs_is_there(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


@pytest.mark.slow
def test_marked_commands_are_understood() -> None:
    """The options of a command that cannot run here are those of its program, and its files are there."""
    for command in COMMANDS:
        if not command.is_marked or (program := re.match(r"python (-m [\w.]+|scripts/\w+\.py)", command.text)) is None:
            continue
        program_text = re.sub("^python", sys.executable, program[0])
        for option in re.findall(r" (--[\w.-]+)", command.text.partition(" -- ")[0]):
            assert option == "--config" or option in help_of(program_text), f"{command}: {option}"
        for config in re.findall(r"--config (\S+)", command.text):
            assert (ROOT / config).is_file(), f"{command}: {config}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.longest if page == "jaxlm/params/TUNING.md" else [])
        for page in sorted({c.page for c in COMMANDS if not c.is_marked and runner(c.text) is None})
    ],
)
def test_the_commands_of_a_page_run(page: str, clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, symlinks=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = []
    for command in commands(page):
        if command.is_marked or not (text := shortened(command.text)):
            continue
        if "python -m jaxlm.serve" in text:
            log = f"serve-{command.line}.log"
            lines += [
                "kill $(jobs -p) 2>/dev/null && wait || true",
                f"{text} --port {port} >{log} 2>&1 &",
                f"until curl -s -o /dev/null http://127.0.0.1:{port}/health; do",
                f"    kill -0 $! || {{ cat {log} >&2; exit 1; }}; sleep 0.1",
                "done",
            ]
        else:
            text = text.replace(":8000/", f":{port}/").replace("curl ", "curl --fail-with-body --silent --show-error ")
            # diff says by its status that files differ.
            text += " || [ $? -eq 1 ]" if text.startswith("diff ") else ""
            lines += [f"echo {shlex.quote(f'+ {command}')} >&2", text]
    script(folder, lines)
