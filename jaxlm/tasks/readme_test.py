"""The page beside this file: the task in its code blocks, put into a copy of the package, trains."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

PAGE = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
REPOSITORY = Path(__file__).parents[2]
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


def test_the_example_trains(tmp_path: Path, launch: Callable[..., subprocess.Popen]) -> None:
    shutil.copytree(REPOSITORY / "jaxlm", tmp_path / "jaxlm", ignore=shutil.ignore_patterns("*_test.py", "__pycache__"))
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    for language, file in (("python", "jaxlm/tasks/rating.py"), ("toml", "configs/rating.toml")):
        assert not (tmp_path / file).exists()
        (tmp_path / file).write_text(block(language, file))
    tasks = tmp_path / "jaxlm/tasks/__init__.py"
    diffs = re.findall(r"^```diff\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(diffs) == 2
    for diff in diffs:
        tasks.write_text(patch(tasks.read_text(), diff))

    random = np.random.default_rng(0)
    rows = [
        f"a film that is {WORDS[n]} from the start, number {i}\t{n}" for i, n in enumerate(random.integers(5, size=400))
    ]
    (tmp_path / "reviews.tsv").write_text("\n".join([block("tsv", "reviews.tsv").splitlines()[0], *rows]))

    command = block("sh").strip()
    assert command in block("toml", "configs/rating.toml")
    args = command.removeprefix("python -m jaxlm.train ") + (
        " --run.dir run --train.max-steps 60 --train.eval-interval 20 --train.warmup-steps 5 --train.learning-rate 0.01"
        " --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.seq-len 16 --tokenizer.vocab-size 300"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = launch(args, tmp_path, env, **pipes)
    without_data = launch("--task rating", tmp_path, env, **pipes)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "always the mean rating" in output and "within_one" in output

    scores = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    tested = [row for row in scores if row["split"] == "test"]
    assert len(tested) == 1 and {"accuracy", "within_one", "loss"} < set(tested[0])
    # The mean rating is off by the variance of five equally likely ones, 2.
    assert tested[0]["loss"] < 0.5 and tested[0]["within_one"] > 0.9
    shown = (tmp_path / "run/samples.txt").read_text()
    assert re.search(r"rating (\d), predicted -?\d\.\d: a film that is", shown)

    _, errors = without_data.communicate()
    assert without_data.returncode == 2 and "--data.path" in errors and len(errors.splitlines()) == 1
