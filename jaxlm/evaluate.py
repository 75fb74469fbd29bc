"""The command `python -m jaxlm.evaluate`: scores a trained model on a split of its data. USING.md has an example."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.data.metrics import number
from jaxlm.errors import UserError, note, reported, warn
from jaxlm.io import storage
from jaxlm.runtime import huge_pages
from jaxlm.terminal import command, dumps

if TYPE_CHECKING:  # the command line is parsed before slow imports
    from rich.table import Table

    from jaxlm.inference.evaluation import Evaluation


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Evaluate the model of a command line; return the exit status. Bad input exits with 2."""
    args, given = _parse(sys.argv[1:] if argv is None else argv)
    from jaxlm.data import prepare
    from jaxlm.inference import evaluation, load

    tokenizer, batch_size = given.pop("tokenizer.path", ""), given.pop("train.batch_size", evaluation.BATCH_SIZE)
    trained = load.load(args.checkpoint, tokenizer, "float32" if args.benchmark else "")
    if args.benchmark:
        return _benchmark(trained, args)
    source, samples = evaluation.samples_of(trained, args.split, given)
    for text in prepare.length_notes(trained.config, [samples]):
        note(text)
    result = evaluation.evaluate(trained, samples, batch_size, args.split, source.description)
    values = _finite(dataclasses.asdict(result))
    if args.json:
        print(dumps(values))
    else:
        _print(result)
    run = trained.start.run
    if run is not None and not storage.is_remote(run) and not given.keys() - {"data.cache_dir"}:
        path = run / f"evaluation_{args.split}.json"  # jaxlm.report reads it
        try:
            path.write_text(dumps(values, indent=1), encoding="utf-8")
        except OSError as error:
            warn(f"{path}: cannot be written ({error.strerror})")
        else:
            print(f"saved as {path}", file=sys.stderr)
    return 0


def _benchmark(trained: Any, args: argparse.Namespace) -> int:
    """Print the scores of a benchmark; return the exit status."""
    from jaxlm.inference import benchmarks
    from jaxlm.io.console import Console

    if args.path is None:
        raise UserError(f"--benchmark {args.benchmark}: name its rows, a file of JSON Lines, with --data.path")
    result = benchmarks.score(trained, args.benchmark, Path(args.path))
    if args.json:
        print(dumps(_finite(result)))
        return 0
    console = Console()
    console.print(f"{trained}: {args.benchmark}, {result['n']:,} rows of {args.path}")
    rows = [
        [name, number(name, x), f"{number(name, low)} to {number(name, high)}"]
        for name, (x, low, high) in result["scores"].items()
    ]
    console.print(_table("", ["", "score", "interval"], rows))
    if result["kinds"]:
        console.print(_table("accuracy by kind", ["", "score"], [[k, f"{x:.4f}"] for k, x in result["kinds"].items()]))
    return 0


def _print(result: "Evaluation") -> None:
    from jaxlm.inference.evaluation import INTERVAL, N_DRAWS
    from jaxlm.io.console import Console

    console = Console()
    console.print(f"{result.checkpoint}: task {result.task}, step {result.step:,}")
    console.print(
        f"{result.split} split of {result.data}: {result.n_samples:,} samples, {result.n_counted:,} predictions"
    )
    scores = result.scores | ({"calibration_error": result.calibration_error} if result.calibration_error else {})
    rows = []
    for name, x in scores.items():
        interval = f"{number(name, x.low)} to {number(name, x.high)}"
        baseline = "" if x.baseline is None else number(name, x.baseline)
        rows.append([f"{name} ({x.better} is better)", number(name, x.value), interval, baseline])
    title = f"intervals: {INTERVAL:.0%}, from {N_DRAWS:,} bootstraps of {result.n_drawn:,} {result.drawn}"
    console.print(_table(title, ["", "score", "interval", "baseline"], rows))
    if result.warning:
        console.print(f"warning: {result.warning}")
    if result.confusion:
        has_none = any(row[-1] for row in result.confusion)
        heads = [f"predicted {name}" for name in result.classes] + (["no class"] if has_none else [])
        rows = [
            [f"label {name}", *(f"{x:,}" for x in row[: len(heads)])]
            for name, row in zip(result.classes, result.confusion, strict=True)
        ]
        console.print(_table("confusion", ["", *heads], rows))
    if result.bins:
        title = "calibration: accuracy of the predictions by confidence"
        rows = [
            [f"{b.low:.1f} to {b.high:.1f}", f"{b.count:,}", f"{b.confidence:.3f}", f"{b.accuracy:.3f}"]
            for b in result.bins
        ]
        console.print(_table(title, ["confidence", "predictions", "mean confidence", "right"], rows))
    if result.worst:
        console.print(f"worst errors, by the {'probability of the label' if result.confusion else 'loss'}:")
        for error in result.worst:
            text = " ".join(error.text.split())
            text = text if len(text) <= 100 else f"{text[:97]}..."
            measure = error.loss if error.probability is None else error.probability
            console.print(f"  {measure:.4f}  label {_shown(error.label)}, predicted {_shown(error.predicted)}: {text}")


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Return a table of numbers; a column without a heading has names."""
    from rich.table import Table

    table = Table(title=title, title_style="", title_justify="left")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _shown(value: Any) -> str:
    return "no class" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """Return a value for JSON, with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("evaluate"),
        description="Scores a trained model on a split of its run's data, or on a file.",
        epilog="Settings on reading files are those of jaxlm.train: --data.format, --data.header, --data.text-column, "
        "--data.label-column, --data.cache-dir, --tokenizer.path.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run (its best checkpoint), checkpoint, or public model"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="split to score (test)")
    parser.add_argument("--data.path", dest="path", metavar="FILE", help="score all of this file instead")
    parser.add_argument(
        "--benchmark", choices=("blimp", "lambada"), help="gpt: score the minimal pairs, or last words, of data.path"
    )
    parser.add_argument("--train.batch-size", dest="size", metavar="N", help="samples per device at a time (16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments, and the given settings by name."""
    args, rest = make_parser().parse_known_args(argv)
    rest += [f"--data.path={args.path}"] if args.path is not None else []
    rest += [f"--train.batch-size={args.size}"] if args.size is not None else []
    given = configs.given(rest)
    for name in given:
        if not name.startswith("data.") and name not in ("tokenizer.path", "train.batch_size"):
            raise UserError(f"--{name.replace('_', '-')}: cannot change for a trained model; leave it out")
    return args, given


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
