"""The page beside this file: the task in its code blocks, put into a copy of the package, is trained and used."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

PAGE = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
REPOSITORY = Path(__file__).parents[2]
SIZES = (
    "--train.max-steps 60 --train.eval-interval 20 --train.warmup-steps 5 --train.learning-rate 0.01"
    " --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.seq-len 32 --tokenizer.vocab-size 300"
)
WORDS = ("dreadful", "weak", "fair", "good", "superb")


def block(language: str, file: str = "") -> str:
    """Return the code block of a language, behind a line with the name of the file that it is."""
    name = f"`{re.escape(file)}`\n\n" if file else ""
    found = re.findall(rf"^{name}```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(found) == 1, (language, file, len(found))
    return found[0]


def patch(text: str, diff: str) -> str:
    """Return the text with a change of the form of a diff: lines that begin with a space are there, + is added."""
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line.startswith(" "))
    assert text.count(old) == 1
    return text.replace(old, "\n".join(line[1:] for line in lines))


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a command of the page in a folder with the example, which is trained."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(REPOSITORY / "jaxlm", folder / "jaxlm", ignore=shutil.ignore_patterns("*_test.py", "__pycache__"))
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for language, file in (("python", "jaxlm/tasks/rating.py"), ("toml", "configs/rating.toml")):
        assert not (folder / file).exists()
        (folder / file).write_text(block(language, file))
    tasks = folder / "jaxlm/tasks/__init__.py"
    diffs = re.findall(r"^```diff\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(diffs) == 2
    for diff in diffs:
        tasks.write_text(patch(tasks.read_text(), diff))
    # A second task, by the same file alone: no preset.
    (folder / "jaxlm/tasks/plain.py").write_text("from jaxlm.tasks.rating import Rating as Plain\n")
    text = tasks.read_text().replace('"rating": Rating,', '"rating": Rating,\n    "plain": Plain,')
    tasks.write_text(f"from jaxlm.tasks.plain import Plain\n{text}")

    random = np.random.default_rng(0)
    rows = [
        f"a film that is {WORDS[n]} from the start, number {i}\t{n}" for i, n in enumerate(random.integers(5, size=400))
    ]
    (folder / "reviews.tsv").write_text("\n".join([block("tsv", "reviews.tsv").splitlines()[0], *rows]))
    env = {**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}

    def start(command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        args = [sys.executable, *shlex.split(command)[1:]]
        return subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True, input=stdin, check=False)

    command = commands()[0]
    assert command in block("toml", "configs/rating.toml")
    trained = start(f"{command} {SIZES}")
    assert trained.returncode == 0, trained.stderr
    (folder / "trained.txt").write_text(trained.stdout)
    return start


def commands() -> list[str]:
    """Return the commands of the page, that which trains first."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [line for text in blocks for line in text.splitlines()]


def folder_of(run: Run) -> Path:
    return Path(run("python -c 'import os; print(os.getcwd())'").stdout.strip())


def run_dir(folder: Path) -> Path:
    return next(folder.glob("runs/rating-*-1"))


@pytest.mark.slow
def test_the_example_trains(run: Run) -> None:
    folder = folder_of(run)
    output = " ".join((folder / "trained.txt").read_text().split())
    assert "always the mean rating" in output and "within_one" in output
    scores = [json.loads(line) for line in (run_dir(folder) / "metrics.jsonl").read_text().splitlines()]
    tested = [row for row in scores if row["split"] == "test"]
    assert len(tested) == 1 and {"accuracy", "within_one", "loss"} < set(tested[0])
    # The mean rating is off by the variance of five equally likely ones, 2.
    assert tested[0]["loss"] < 0.5 and tested[0]["within_one"] > 0.9
    shown = (run_dir(folder) / "samples.txt").read_text()
    assert re.search(r"rating (\d), predicted -?\d\.\d: a film that is", shown)

    without_data = run("python -m jaxlm.train --task rating")
    assert without_data.returncode == 2 and "--data.path" in without_data.stderr
    assert len(without_data.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_commands_that_its_summary_names_run(run: Run) -> None:
    output = " ".join((folder_of(run) / "trained.txt").read_text().split())
    use, see, further = re.findall(r"python -m jaxlm\.(?:(?!; see it| Next,).)+", output.partition("Use it:")[2])
    for command in (
        f"{use} --text 'a good film'",
        see,
        f"{further} {SIZES} --run.dir LONGER",
    ):
        done = run(command)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
def test_the_example_is_used_by_every_command_of_the_page(run: Run) -> None:
    folder = folder_of(run)
    _, predict, evaluate, serve, report, convert = commands()
    answered = run(predict)
    assert re.fullmatch(r"rating -?\d+\.\d*  not one dull minute\n", answered.stdout), answered.stderr

    texts = "\n".join(f"a film that is {word} from the start, number 7" for word in WORDS)
    lines = run(f"{predict.partition(' --text')[0]} --json", stdin=texts).stdout.splitlines()
    ratings = [json.loads(line)["rating"] for line in lines]
    assert np.allclose(ratings, range(5), atol=1) and ratings == sorted(ratings)

    evaluated = run(evaluate)
    assert evaluated.returncode == 0, evaluated.stderr
    for name in ("accuracy", "within_one", "loss"):
        assert re.search(rf"{name} \(\w+ is better\).* \d\.\d+ to \d\.\d+", evaluated.stdout)
    assert re.search(r"worst errors, by the loss:\n  \d\.\d{4}  label \d, predicted -?\d", evaluated.stdout)

    assert run(report).returncode == 0
    page = (run_dir(folder) / "report.html").read_text()
    assert "Worst errors" in page and "within one" in page

    assert run(convert).returncode == 0
    there = run("python -m jaxlm.convert rating.safetensors BACK")
    assert there.returncode == 0, there.stderr
    assert (folder / "rating.safetensors").exists()
    again, last = (
        run(f"{predict.replace('runs/rating', source)} --tokenizer.path {run_dir(folder)}/tokenizer.json")
        for source in ("BACK", f"{run_dir(folder)}/checkpoints/60")
    )
    assert again.stdout == last.stdout != ""  # a run is converted by its last checkpoint


@pytest.mark.slow
def test_the_example_is_served(run: Run) -> None:
    folder = folder_of(run)
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONUNBUFFERED": "1"}
    args = [sys.executable, *shlex.split(commands()[3])[1:], "--port", "0"]
    server = subprocess.Popen(args, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr
        address = next(line.split()[-1] for line in server.stderr if "serving http" in line)
        request = urllib.request.Request(
            f"{address}predict", b'{"text": "a film"}', {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request) as answer:
            assert set(json.load(answer)) == {"text", "rating"}
        with urllib.request.urlopen(address) as answer:
            assert b"showValues" in answer.read()
    finally:
        server.terminate()
        server.communicate()


@pytest.mark.slow
def test_a_task_without_a_preset_trains(run: Run) -> None:
    done = run(f"python -m jaxlm.train --task plain --data.path reviews.tsv --data.n-labels 5 --run.dir PLAIN {SIZES}")
    assert done.returncode == 0, done.stderr
    used = run("python -m jaxlm.predict --checkpoint PLAIN --text film")
    assert used.stdout.startswith("rating ")
