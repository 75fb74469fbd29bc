"""Trains what configs/RESULTS.md tells of on real data, and writes that page from the run folders.

    python scripts/results.py FOLDER --data DATA                 # hours; continues where it was stopped
    python scripts/results.py FOLDER --write configs/RESULTS.md  # trains nothing: the page, of what is there

DATA has the folders prose (*.txt.xz), wikitext-2 (test.txt), sst2 (train.tsv, dev.tsv: GLUE's) and cola
(in_domain_train.tsv, out_of_domain_dev.tsv: the public raw release).
"""

import argparse
import contextlib
import json
import lzma
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_systems import read_data
from ngram import NGram

from jaxlm import config as configs
from jaxlm.data import prepare
from jaxlm.errors import UserError, reported
from jaxlm.reporting import run_reader as folders

SEEDS = range(5)
SIZE = (
    "--model.d-model 256 --model.n-layers 4 --model.seq-len 128 --model.positions rotary --model.final-norm "
    "--model.dropout 0.1 --tokenizer.vocab-size 8192 --train.precision bfloat16"
)
LONG = "--train.learning-rate 1e-3 --train.eval-interval 500"
LANGUAGE = {
    "mlm": f"--task mlm --data.path prose.txt {SIZE} {LONG} --train.max-steps 2500",
    "gpt": f"--task gpt --data.path prose.txt {SIZE} {LONG} --train.max-steps 2500 --train.batch-size 16 "
    "--model.tied-embedding",
}
CLASSIFIED = "--train.group-by-length --train.precision bfloat16 --train.warmup-steps 200"
DATA = {
    "sst2": "--data.path sst2/train.tsv --data.test-path sst2/dev.tsv --data.validation-fraction 0.05 "
    "--train.batch-size 32 --train.max-steps 2000 --train.eval-interval 500",
    "cola": "--data.path cola/in_domain_train.tsv --data.test-path cola/out_of_domain_dev.tsv --data.header no "
    "--data.text-column 3 --data.label-column 1 --train.batch-size 32 --train.max-steps 1000 --train.eval-interval 250",
}
KINDS = {  # in turn, since the last learns from the second
    "scratch": SIZE,
    "base": "--init-from mlm --model.dropout 0.1",
    "small": f"{SIZE} --model.n-layers 2",
    "distilled": "--model.n-layers 2 --model.dropout 0.1",
}
RATES = ("3e-4", "1e-3")  # among which the validation part, a share of train, chooses with seed 0
SHORT = f"{LANGUAGE['gpt']} --train.max-steps 600 --train.eval-interval 200"
ABLATIONS = {  # of the gpt: without one of its departures from the original, and without any
    "none": "",
    "fixed": "--model.positions fixed",
    "no-norm": "--model.final-norm false",
    "untied": "--model.tied-embedding false",
    "constant": "--train.schedule constant",
    "wsd": "--train.schedule wsd --train.stable-steps 400",
    "original": "--model.positions fixed --model.final-norm false --model.tied-embedding false",
}
TOLD = {
    "none": "rotary positions, a final norm, a tied output layer, a cosine",
    "fixed": "the original's table of positions instead of rotary ones",
    "no-norm": "no final norm",
    "untied": "an output layer of its own",
    "constant": "a constant rate after the warmup",
    "wsd": "warmup, stable, decay from update 500",
    "original": "the original's table, no final norm, an output layer of its own",
    "scratch": "from scratch",
    "base": "from the mlm base",
    "small": "2 layers, from scratch",
    "distilled": "2 layers, distilled from the one above with seed 0",
}
OF_DISTILBERT = "(dev, arXiv 1910.01108, table 1)"
PUBLISHED = (  # what was not attempted, and the settings that would
    ("masked accuracy above 60% on WikiText-103, the original", "mlm_base"),
    (f"accuracy of about 87% on SST-2, the original; 92.7, BERT-base; 91.3, DistilBERT {OF_DISTILBERT}", "sst2_base"),
    (f"Matthews correlation of 56.3 on CoLA, BERT-base; 51.3, DistilBERT {OF_DISTILBERT}", "cola_base"),
)
TOPOLOGY = "v5e:2x4"


@dataclass(frozen=True)
class Trial:
    """A training: its run folder, and the arguments of jaxlm.train but for that."""

    name: str
    arguments: str

    def command(self) -> str:
        return f"python -m jaxlm.train {self.arguments} --run.dir {self.name}"


@dataclass(frozen=True)
class Results:
    """A folder with runs, and with the data by the names that commands have for them."""

    path: Path

    def run(self, name: str) -> folders.RunRecord | None:
        """Return a run that was tested, None if it was not yet."""
        with contextlib.suppress(UserError):
            found = folders.read(self.path / name)
            return found if found.scores("test") else None
        return None

    def seconds(self, names: Sequence[str]) -> float:
        path = self.path / "times.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return sum(row["seconds"] for row in rows if row["name"] in names)

    def train(self, trial: Trial) -> None:
        if self.run(trial.name):
            return
        print(f"[{time.strftime('%H:%M:%S')}] {trial.command()}", flush=True)
        command = [sys.executable, *shlex.split(trial.command())[1:], "--resume", "auto"]
        started_s = time.monotonic()
        with open(self.path / "log.txt", "a") as log:
            process = subprocess.Popen(command, cwd=self.path, stdout=log, stderr=log)
            try:
                status = process.wait()
            except KeyboardInterrupt:
                status = process.wait()  # which saves
        with open(self.path / "times.jsonl", "a") as file:
            print(json.dumps({"name": trial.name, "seconds": time.monotonic() - started_s}), file=file)
        if status:
            raise UserError(f"{trial.command()}: exit status {status}; {self.path / 'log.txt'} tells why")

    def kept(self, name: str, make: Any) -> Any:
        """Return what `make` returns, which is JSON and takes long, from a file if it is there."""
        path = self.path / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(make()))
        return json.loads(path.read_text())


def trial(results: Results, task: str, kind: str, rate: str, seed: int) -> Trial:
    arguments = (
        f"--task {task} {DATA[task]} {KINDS[kind]} {CLASSIFIED} --train.learning-rate {rate} --train.seed {seed}"
    )
    if kind == "distilled":
        arguments += f" --distill.teacher {task}-base-{chosen_rate(results, task, 'base')}-0"
    return Trial(f"{task}-{kind}-{rate}-{seed}", arguments)


def chosen_rate(results: Results, task: str, kind: str) -> str | None:
    """Return the rate with the best validation score, the first of the task's; None if not all were tried."""
    found = {rate: results.run(trial(results, task, kind, rate, 0).name) for rate in RATES}
    scores = {rate: next(iter(run.scores("validation").values())) for rate, run in found.items() if run}
    return max(scores, key=lambda rate: scores[rate]) if len(scores) == len(RATES) else None


def trials(results: Results) -> Iterator[Trial]:
    """Yield all trainings in turn; later ones depend on the scores of those before."""
    yield from (Trial(name, arguments) for name, arguments in LANGUAGE.items())
    for task in DATA:
        for kind in KINDS:
            yield from (trial(results, task, kind, rate, 0) for rate in RATES)
            rate = chosen_rate(results, task, kind)
            assert rate, "all have just been tried"
            yield from (trial(results, task, kind, rate, seed) for seed in SEEDS)
    yield from (Trial(f"ablation-{name}", f"{SHORT} {arguments}") for name, arguments in ABLATIONS.items())


def link(path: Path, data: Path) -> None:
    """Make a folder with the data under the names that the commands have for them."""
    for name in ("prose", "wikitext-2", *DATA):
        if not (data / name).is_dir():
            raise UserError(f"--data {data}: it has no folder {name}")
    path.mkdir(parents=True, exist_ok=True)
    for name in ("wikitext-2", *DATA):
        if not (path / name).exists():
            (path / name).symlink_to((data / name).absolute())
    if not (path / "prose.txt").exists():
        texts = [lzma.open(file, "rt", encoding="utf-8").read() for file in sorted((data / "prose").glob("*.txt.xz"))]
        (path / "prose.txt").write_text("".join(text.rstrip("\n") + "\n" for text in texts), encoding="utf-8")


def data_of(results: Results, run: folders.RunRecord) -> prepare.Data:
    """Return the samples that a run was trained and tested on."""
    config = configs.build({name: value for name, value in run.settings.items() if name in configs.SETTINGS})
    with contextlib.chdir(results.path):
        return read_data(config)[1]


def n_gram(results: Results, run: folders.RunRecord) -> dict[str, float]:
    """Return the test loss of the n-gram model on what a language model was tested on, and bits per byte of a gpt."""
    data = data_of(results, run)
    train, test = data.samples["train"].windows, data.samples["test"].windows  # type: ignore[union-attr]

    def articles(split: Any) -> list[np.ndarray]:
        pairs = zip(split.offsets[:-1], split.offsets[1:], strict=True)
        return [np.asarray(split.tokens[a:b], np.int64) for a, b in pairs if b > a]

    V = data.tokenizer.get_vocab_size()
    model = NGram(articles(train.split), V + 1, end=V)
    losses = [model.losses(article) for article in articles(test.split)]
    if run.task == "gpt":
        nats, n = sum(float(x.sum()) for x in losses), sum(len(x) for x in losses)
        return {"loss": nats / n, "bits_per_byte": nats / math.log(2) / data.samples["test"].constants["bytes"]}
    # Those tokens that are masked, with all before them to be seen.
    samples = data.samples["test"]
    indices = np.arange(len(samples))
    batch = samples.batch(indices, np.zeros_like(indices))
    article, start = test._places(indices)
    place = start[:, None] + batch["positions"] - samples.n_start  # type: ignore[union-attr]
    is_masked = batch["labels"] >= 0
    ends = np.cumsum([0, *(len(x) for x in losses)])
    numbers = np.cumsum(np.diff(test.split.offsets) > 0) - 1  # of an article among those that are not empty
    flat = np.concatenate(losses)[(ends[numbers[article]][:, None] + place)[is_masked]]
    return {"loss": float(flat.mean())}


def bag_of_words(results: Results, task: str) -> dict[str, float]:
    """Return the test scores of a logistic regression on which words are there; a part of train chooses its C."""
    import sklearn.metrics
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    files = {"sst2": ("train.tsv", "dev.tsv"), "cola": ("in_domain_train.tsv", "out_of_domain_dev.tsv")}[task]
    text, label, header = {"sst2": (0, 1, 1), "cola": (3, 1, 0)}[task]
    parts = []
    for file in files:
        lines = (results.path / task / file).read_text(encoding="utf-8").splitlines()[header:]
        columns = [line.split("\t") for line in lines if line]
        parts.append(([row[text] for row in columns], np.array([int(row[label]) for row in columns])))
    (texts, labels), (test_texts, test_labels) = parts
    vectorizer = CountVectorizer(binary=True, token_pattern=r"\S+")
    X, test_X = vectorizer.fit_transform(texts), vectorizer.transform(test_texts)
    score = sklearn.metrics.matthews_corrcoef if task == "cola" else sklearn.metrics.accuracy_score
    held_out = np.random.default_rng(0).random(len(labels)) < 0.1

    def fitted(C: float, chosen: np.ndarray) -> Any:
        return LogisticRegression(C=C, max_iter=2000).fit(X[chosen], labels[chosen])

    best = max(
        (0.03, 0.1, 0.3, 1.0, 3.0), key=lambda C: score(labels[held_out], fitted(C, ~held_out).predict(X[held_out]))
    )
    guesses = fitted(best, np.full(len(labels), True)).predict(test_X)
    return {"C": best, "score": float(score(test_labels, guesses)), "accuracy": float(np.mean(guesses == test_labels))}


def elsewhere(results: Results, name: str) -> dict[str, float]:
    """Return the scores of a language model on WikiText-2's test part."""
    return evaluated(results, name, "--data.path", "wikitext-2/test.txt")


def at_the_end(results: Results, run: folders.RunRecord) -> dict[str, float]:
    """Return the test scores of the last checkpoint, which need not be the one with the lowest validation loss."""
    last = [checkpoint for checkpoint in run.checkpoints if checkpoint.is_whole][-1]
    if last == run.best:
        return run.scores("test")
    name = f"{run.path.name}/checkpoints/{last.step}"
    return results.kept(f"end-{run.path.name}", lambda: evaluated(results, name, "--split", "test"))


def evaluated(results: Results, checkpoint: str, *arguments: str) -> dict[str, float]:
    words = ["jaxlm.evaluate", "--checkpoint", checkpoint, *arguments, "--json"]
    process = subprocess.run([sys.executable, "-m", *words], cwd=results.path, capture_output=True, text=True)
    if process.returncode:
        raise UserError(process.stderr.strip().splitlines()[-1])
    return {key: score["value"] for key, score in json.loads(process.stdout)["scores"].items()}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def language_models(results: Results) -> str:
    rows, baselines = [], []
    for name in LANGUAGE:
        run = results.run(name)
        if run is None:
            continue
        test = run.scores("test")
        other = results.kept(f"wikitext-2-{name}", lambda name=name: elsewhere(results, name))
        cells = [f"{x['loss']:.3f}" for x in (run.scores("validation"), test, other)]
        bits = [f"{x['bits_per_byte']:.3f}" if "bits_per_byte" in x else "" for x in (test, other)]
        shares = [f"{x['accuracy']:.3f}" for x in (test, other) if "accuracy" in x] or ["", ""]
        rows.append([f"`{name}`", *cells, *bits, *shares, minutes(results.seconds([name]))])
        model = results.kept(f"n-gram-{name}", lambda run=run: n_gram(results, run))
        bits = [f"{model['bits_per_byte']:.3f}" if "bits_per_byte" in model else "", ""]
        baselines.append([f"5-grams, for `{name}`", "", f"{model['loss']:.3f}", "", *bits, "", "", ""])
    heads = ["", "validation loss", "test loss", "WikiText-2 loss", "bits per byte", "WikiText-2 bits per byte"]
    return table([*heads, "accuracy", "WikiText-2 accuracy", "time"], rows + baselines)


def classifiers(results: Results) -> str:
    rows = []
    for task in DATA:
        words = results.kept(f"bag-of-words-{task}", lambda task=task: bag_of_words(results, task))
        name = "Matthews" if task == "cola" else "accuracy"
        told = f"words, logistic regression (C {words['C']})"
        rows.append([task, told, "", f"{name} {words['score']:.3f}", f"{words['accuracy']:.3f}", "", ""])
        for kind in KINDS:
            rate = chosen_rate(results, task, kind)
            names = [trial(results, task, kind, rate, seed).name for seed in SEEDS] if rate else []
            runs = [run for run in map(results.run, names) if run]
            if len(runs) < 2:
                continue
            found, ends = [run.scores("test") for run in runs], [at_the_end(results, run) for run in runs]
            score = name.lower()
            columns = [x[score] for x in found], [x["accuracy"] for x in found], [x[score] for x in ends]
            cells = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" for x in columns]
            time_of_one = minutes(results.seconds(names) / len(runs))
            model = f"{TOLD[kind]}, {len(runs)} seeds"
            rows.append([task, model, str(rate), f"{name} {cells[0]}", *cells[1:], time_of_one])
    return table(["task", "model", "rate", "test score", "accuracy", "score at the end", "time of one"], rows)


def ablations(results: Results) -> str:
    rows = []
    for name in ABLATIONS:
        if run := results.run(f"ablation-{name}"):
            test = run.scores("test")
            rows.append([TOLD[name], f"{run.scores('validation')['loss']:.3f}", f"{test['bits_per_byte']:.3f}"])
    return table(["gpt, 600 updates", "validation loss", "test bits per byte"], rows)


def not_attempted(results: Results) -> str:
    def plan(name: str) -> dict[str, Any]:
        words = [
            "jaxlm.plan",
            "--config",
            str(configs.presets_dir() / f"{name}.toml"),
            "--topology",
            TOPOLOGY,
            "--json",
        ]
        process = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        if not process.stdout:
            raise UserError(process.stderr.strip().splitlines()[-1])
        return {key: json.loads(process.stdout).get(key) for key in ("chip_hours", "utilization", "bound")}

    rows = []
    for what, name in PUBLISHED:
        found = results.kept(f"plan-{name}", lambda name=name: plan(name))
        hours = f"{found['chip_hours']:,.2g}" if found["chip_hours"] else "not known"
        rows.append([what, f"`python -m jaxlm.train --config configs/{name}.toml`", hours])
    return table(["published", "what would attempt it", f"chip-hours on {TOPOLOGY}, at least"], rows)


def page(results: Results, text: str) -> str:
    """Return the page with new tables: what is between `<!-- name -->` and `<!-- end -->`."""
    commands = [*(Trial(name, arguments) for name, arguments in LANGUAGE.items())]
    for task in DATA:
        for kind in KINDS:
            rate = chosen_rate(results, task, kind)
            commands += [trial(results, task, kind, rate, 0)] if rate else []
    commands.append(Trial("ablation-original", f"{SHORT} {ABLATIONS['original']}"))
    parts = {
        "language models": language_models(results),
        "classifiers": classifiers(results),
        "ablations": ablations(results),
        "not attempted": not_attempted(results),
        "commands": "\n".join(["    # (network: the public data)", *(f"    {found.command()}" for found in commands)]),
    }
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise UserError(f"--write: the page has no marks <!-- {name} --> and <!-- end -->")
        text = f"{before}{mark}\n{part}\n\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Train or write as the command line says; return the exit status."""
    parser = argparse.ArgumentParser("python scripts/results.py", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--data", type=Path, help="folder of the data; trains what is missing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables to a page")
    args = parser.parse_args(argv)
    with reported(debug=False):
        results = Results(args.folder.absolute())
        if args.data:
            link(results.path, args.data)
            for found in trials(results):
                results.train(found)
        if args.write:
            args.write.write_text(page(results, args.write.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
