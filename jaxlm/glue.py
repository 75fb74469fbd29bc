"""The command `python -m jaxlm.glue`: fine-tunes a model on tasks of GLUE with several seeds, and makes one table.

Each run is one of `jaxlm.train` in a process and a folder of its own. Called again, the command skips runs that have
ended, and resumes those that were stopped.
"""

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from jaxlm import config as configs
from jaxlm import repeat
from jaxlm.cli import Parser
from jaxlm.config import GLUE
from jaxlm.errors import UserError, reported
from jaxlm.io import temporary
from jaxlm.terminal import command

NAMES = ("cola", "sst2", *GLUE)
# BERT base on the hidden test parts (arXiv 1810.04805, table 1, May 2019): F1 of mrpc and qqp, Matthews of cola,
# accuracy of sst2, qnli, rte and the matched and mismatched part of mnli. The table leaves wnli out.
PUBLISHED = {
    "cola": "52.1",
    "sst2": "93.5",
    "mrpc": "88.9",
    "qqp": "71.2",
    "stsb": "85.8 (Spearman)",
    "mnli": "84.6, 83.4",
    "qnli": "90.5",
    "rte": "66.4",
}
TABLE = "glue.md"
# Names that GLUE's server has for its files of predictions.
SERVED = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "qnli": "QNLI", "rte": "RTE"}
SERVED |= {"wnli": "WNLI"}
TESTS = ("test", "msr_paraphrase_test", "sts-test")  # stems of their test files
OF_MNLI = {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"}
ZIP = "submission.zip"


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Fine-tune as the command line says; return the exit status: that of the first run that fails."""
    args, settings = _parse(sys.argv[1:] if argv is None else argv)
    folders = find(Path(args.data), args.tasks)
    tests = {task: test_files(data, task) for task, data in folders.items()} if args.submission else {}
    common = ["--init-from", args.checkpoint, *settings]
    runs = {
        task: {
            Path(args.out) / f"{task}-{seed}": [
                *("--task", task, "--data.path", str(data), "--train.seed", str(seed), *common)
            ]
            for seed in range(args.seeds)
        }
        for task, data in folders.items()
    }
    for some in runs.values():
        if status := repeat.run_all(some):
            return status
    text = table(args.checkpoint, {task: list(map(repeat.scores, some)) for task, some in runs.items()})
    temporary.replace_text(Path(args.out) / TABLE, text)
    print(text, end="")
    if args.submission:
        contents: dict[str, str] = {}
        for task, some in runs.items():
            first = next(iter(repeat.scores(next(iter(some)))["validation"]))
            best = max(some, key=lambda folder: repeat.scores(folder)["validation"][first])
            contents |= submission(best, folders[task], tests[task], task)
        with temporary.replacing(Path(args.out) / ZIP) as new, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in contents.items():
                file.writestr(name, content)
        print(f"{Path(args.out) / ZIP} is for gluebenchmark.com, which wants files of all tasks and of AX")
    return 0


def test_files(data: Path, task: str) -> dict[str, Path]:
    """Return a task's files of test rows, by the names that GLUE's server has. Raises UserError if there is none."""
    stems = OF_MNLI if task == "mnli" else dict.fromkeys(TESTS, SERVED[task])
    by_stem = {path.name.lower().partition(".")[0]: path for path in sorted(data.iterdir())}
    files = {name: by_stem[stem] for stem, name in stems.items() if stem in by_stem}
    if not files:
        raise UserError(f"{data}: has no test file, {' or '.join(stems)}.tsv, to predict; leave --submission out")
    return files


def submission(run: Path, data: Path, files: dict[str, Path], task: str) -> dict[str, str]:
    """Return the content of each file that GLUE's server takes of a task, by name: a prediction for each test row."""
    import jax
    import numpy as np

    from jaxlm.data import loader, prepare
    from jaxlm.inference import evaluation, load
    from jaxlm.training.log import RunLog

    trained = load.load(run)
    here = configs.replace(trained.config, "data.path", str(data.absolute()))
    own, compiled, found = trained.task, jax.jit(trained.task.predict), {}
    for name, file in files.items():
        config = configs.replace(here, "data.test_path", str(file.absolute()))
        progress = RunLog(stderr=True).pass_bar
        _, samples = prepare.part(config, own.samples, own.embedded, trained.tokenizer, "test", progress, own.classes)
        batches = loader.evaluation_batches(samples, evaluation.BATCH_SIZE)
        values = np.concatenate([np.asarray(compiled(trained.model, batch)) for batch in batches])[: len(samples)]
        shown = [f"{np.clip(x, 0, 5):.3f}" if task == "stsb" else str(own.label(int(x))) for x in values]
        found[f"{name}.tsv"] = "index\tprediction\n" + "".join(f"{i}\t{x}\n" for i, x in enumerate(shown))
    return found


def find(folder: Path, tasks: Sequence[str] = ()) -> dict[str, Path]:
    """Return the folder of each task with data for training, in the order of NAMES; its name may be written as STS-B.

    Raises UserError if there is none, or none of a task that is asked for.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder}: there is no such folder; give one with a folder for each task, such as RTE")
    by_name = {path.name.lower().replace("-", ""): path for path in sorted(folder.iterdir()) if path.is_dir()}
    found = {name: by_name[name] for name in NAMES if name in by_name and _has_train(by_name[name])}
    if missing := [name for name in tasks if name not in found]:
        raise UserError(
            f"--data {folder}: there are no data to train {missing[0]}; there are {', '.join(found) or 'none'}"
        )
    if not found:
        raise UserError(f"--data {folder}: has no folder with data of {', '.join(NAMES)}; name one of them by its task")
    return {name: path for name, path in found.items() if name in tasks or not tasks}


def _has_train(folder: Path) -> bool:
    return any("train" in file.name.lower() for file in folder.iterdir())


def table(checkpoint: str, results: dict[str, list[repeat.Scores]]) -> str:
    """Return the table of tasks and scores, in Markdown: mean and standard deviation over the seeds, in percent."""
    lines = [
        f"# GLUE of {checkpoint}",
        "",
        "Mean and standard deviation over seeds, in percent, of the checkpoint with the lowest validation loss.",
        "Published: BERT base on the hidden test parts (arXiv 1810.04805, table 1, May 2019).",
        "`mnli` has its mismatched part as test.",
        "",
        "| task | score | validation | test | seeds | published |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for task, runs in results.items():
        for i, name in enumerate(x for x in runs[0]["validation"] if x != "loss"):
            cells = [repeat.cell(runs, split, name, 100, 1) for split in ("validation", "test")]
            published = PUBLISHED.get(task, "") if i == 0 else ""
            lines.append(f"| {task} | {name} | {' | '.join(cells)} | {len(runs)} | {published} |")
    return "\n".join(lines) + "\n"


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("glue"),
        description="Fine-tunes a model on each task of GLUE for which a folder has data, and makes one table.",
        epilog="Further options are settings of jaxlm.train, for all runs. Called again, it resumes where it stopped.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run, checkpoint, or public model to start from"
    )
    parser.add_argument(
        "--data", required=True, metavar="PATH", help="folder with a folder for each task: RTE, MRPC, ..."
    )
    parser.add_argument(
        "--out", default="runs/glue", metavar="PATH", help="folder of the runs and the table (runs/glue)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each task, with seeds 0 to N - 1 (1)"
    )
    parser.add_argument(
        "--submission", action="store_true", help="also predict the test files, by the best seed on validation"
    )
    parser.add_argument("--tasks", nargs="+", default=[], choices=NAMES, metavar="TASK", help="only these tasks")
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    args, settings = make_parser().parse_known_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: has to be 1 or more")
    return args, settings


if __name__ == "__main__":
    sys.exit(main())
