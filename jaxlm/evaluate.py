"""The command `python -m jaxlm.evaluate`: all scores of a trained model on one part of the data, and how sure they are.

Each sample is scored for itself, so that the figures depend neither on what it shares a batch with nor on the number
of devices, and so that what they would be on other articles of the same kind can be told. USING.md has an example.
"""

import argparse
import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.config import DataConfig
from jaxlm.data.labels import numbered
from jaxlm.data.metrics import number
from jaxlm.errors import UserError, reported, slow
from jaxlm.io import storage
from jaxlm.runtime import huge_pages
from jaxlm.terminal import dumps

if TYPE_CHECKING:  # the command line is looked at before anything that takes long to import
    from jaxlm.data.samples import Samples
    from jaxlm.data.sources import Source
    from jaxlm.inference.load import LoadedModel

BATCH_SIZE = 16  # samples that a device has at once; what fits beside any model
N_DRAWS, INTERVAL = 2000, 0.95  # of the bootstrap
N_BINS = 10  # of the reliability table
N_WORST = 10  # errors that are told
FEWEST = 20  # articles that can stand for others like them; of fewer, samples are drawn
Totals = dict[str, np.ndarray]  # of each sample: as Task.loss has them, and those of `_one`


@dataclasses.dataclass(frozen=True)
class Score:
    value: float
    low: float  # of the interval that has it with INTERVAL's certainty
    high: float
    baseline: float | None  # of the best guess that looks at no input; None: there is none
    better: str  # lower or higher


@dataclasses.dataclass(frozen=True)
class Bin:
    """The predictions that are made with a confidence from `low` to `high`."""

    low: float
    high: float
    count: int
    confidence: float  # mean of the probabilities that they are given
    accuracy: float  # share of them that are right


@dataclasses.dataclass(frozen=True)
class Mistake:
    text: str
    label: int | str
    predicted: Any  # what the task predicts; None: the original's head predicts no class
    probability: float | None  # of the label; None for tasks without probabilities
    loss: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `--json` prints, and what a run folder keeps."""

    checkpoint: str
    task: str
    step: int
    split: str
    data: str
    n_samples: int
    n_counted: int  # predictions that the scores are of
    n_drawn: int
    drawn: str  # what the intervals are a bootstrap of: articles or samples
    scores: dict[str, Score]
    calibration_error: Score | None  # expected, ECE (arXiv 1706.04599, eq. 3); None for tasks without probabilities
    bins: list[Bin]
    classes: list[str]  # their names by number; []: there are none
    confusion: list[list[int]] | None  # [C][C + 1]: row label, column prediction, the last: no class
    worst: list[Mistake]
    warning: str
    version: str


@slow("scoring the samples")
def evaluate(trained: "LoadedModel", samples: "Samples", batch_size: int = BATCH_SIZE) -> dict[str, Any]:
    """Return the fields of an Evaluation that depend on the samples alone."""
    articles = _articles(samples)
    groups, drawn = _groups(articles)
    totals = totals_of_samples(trained, samples, batch_size) | _constants(samples, articles)
    grouped = {name: _sums(totals[name], groups) for name in totals.keys() - {"prediction", "probability"}}
    task = trained.task
    lower = (*task.lower_is_better, "calibration_error")
    scores = _scores(task.scores, grouped)
    baseline: Mapping[str, float] = task.baseline(samples)
    intervals = bootstrap(grouped, lambda sums: _scores(task.scores, sums))
    told = {
        name: Score(value, *intervals[name], baseline.get(name), "lower" if name in lower else "higher")
        for name, value in scores.items()
    }
    summed = _summed(grouped)
    confusion = summed["confusion"].astype(int).tolist() if "confusion" in summed else None
    return {
        "n_samples": len(samples),
        "n_counted": int(summed["count"]),
        "n_drawn": int(groups.max()) + 1,
        "drawn": drawn,
        "calibration_error": told.pop("calibration_error", None),
        "scores": told,
        "bins": _bins(summed["reliability"]) if "reliability" in summed else [],
        "classes": _class_names(task, confusion or []),
        "confusion": confusion,
        "worst": _worst(trained, samples, totals) if "prediction" in totals else [],
        "warning": task.warning(summed),
    }


def totals_of_samples(trained: "LoadedModel", samples: "Samples", batch_size: int) -> Totals:
    """Return the totals of each sample, [N, ...], in order.

    Every device has the whole model and whole batches, one after the other, so that their number makes no difference.
    """
    import jax

    from jaxlm.data import loader

    devices = jax.local_devices()
    models = [jax.device_put(trained.model, device) for device in devices]
    compiled = jax.jit(jax.vmap(lambda model, sample: _one(trained, model, sample), in_axes=(None, 0)))
    ahead: list[Any] = []
    found: list[Any] = []
    for i, batch in enumerate(loader.evaluation_batches(samples, batch_size)):
        k = i % len(devices)
        ahead.append(compiled(models[k], jax.device_put(batch, devices[k])))
        if len(ahead) > 2 * len(devices):
            found.append(jax.device_get(ahead.pop(0)))
    found += jax.device_get(ahead)
    names = found[0] if found else {}
    return {name: np.concatenate([part[name] for part in found])[: len(samples)] for name in names}


def bootstrap(
    totals: Mapping[str, np.ndarray], scores: Callable[[Totals], Mapping[str, float]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the interval of each score of summed totals [G, ...], if other groups of the same kind were drawn.

    The percentile method: Efron, Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    random = np.random.default_rng(seed)
    n = len(next(iter(totals.values())))
    flat = {name: np.asarray(x, np.float64).reshape(n, -1) for name, x in totals.items()}
    found: dict[str, list[float]] = {}
    for _ in range(N_DRAWS):
        times = np.bincount(random.integers(n, size=n), minlength=n).astype(np.float64)
        sums = {name: (times @ x).reshape(totals[name].shape[1:]) for name, x in flat.items()}
        if sums["count"] > 0:  # else nothing that counts was drawn
            for name, value in scores(sums).items():
                found.setdefault(name, []).append(value)
    tail = (1 - INTERVAL) / 2
    with np.errstate(invalid="ignore"):  # a perplexity may be infinite
        return {name: tuple(np.quantile(x, (tail, 1 - tail)).tolist()) for name, x in found.items()}


def part(trained: "LoadedModel", split: str, given: Mapping[str, Any]) -> "tuple[Source, Samples]":
    """Return the samples of a part of the run's data, or those of the file data.path in `given`, and their source.

    `given` are settings that are other than the run's. Raises UserError.
    """
    from jaxlm.data import prepare
    from jaxlm.training.log import RunLog

    config = trained.config
    if path := given.get("data.path"):
        if Path(path).is_dir():
            raise UserError(f"data.path={path}: is a folder; name the file in it that is to be scored")
        # All of the file, with the settings that say what a sample is.
        kept = {name: configs.get(config, f"data.{name}") for name in ("n_labels", "mask_fraction", "n_maskings")}
        data = DataConfig(**kept, cache_dir=config.data.cache_dir, validation_fraction=0.0, test_fraction=0.0)
        config, read = dataclasses.replace(config, data=data), "train"
    else:
        read = split
    for name, value in given.items():
        config = configs.replace(config, name, value)
    source, samples = prepare.part(
        config,
        trained.task.samples,
        trained.task.embedded,
        trained.tokenizer,
        read,
        RunLog(stderr=True).bytes_bar,
        trained.task.classes,
    )
    stored = trained.start.info.get("data")
    if not path and stored and stored != source.fingerprint:
        raise UserError(
            f"{source.description}: the data are others than those of {trained}, so that its parts may be, too; "
            "put them back as they were, or give a file with --data.path"
        )
    if read == "test" and source.test_refusal:
        raise UserError(source.test_refusal.replace("--data.test-path with", "--data.path with"))
    if not len(samples):
        raise UserError(f"{source.description}: its {split} part has no sample; give a file with --data.path")
    return source, samples


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit status. Bad input exits with 2."""
    args, given = _parse(sys.argv[1:] if argv is None else argv)
    from jaxlm.data import prepare
    from jaxlm.inference import load

    tokenizer, batch_size = given.pop("tokenizer.path", ""), given.pop("train.batch_size", BATCH_SIZE)
    trained = load.load(args.checkpoint, tokenizer)
    source, samples = part(trained, args.split, given)
    for note in prepare.length_notes(trained.config, [samples]):
        print(f"note: {note}", file=sys.stderr)
    found = Evaluation(
        checkpoint=str(trained.start.path),
        task=trained.config.task,
        step=trained.start.info["step"],
        split=args.split,
        data=source.description,
        version=importlib.metadata.version("jaxlm"),
        **evaluate(trained, samples, batch_size),
    )
    if args.json:
        print(dumps(_finite(dataclasses.asdict(found))))
    else:
        _tell(found)
    run = trained.start.run
    if run is not None and not storage.is_remote(run) and not given.keys() - {"data.cache_dir"}:
        _keep(run, found)
    return 0


class _Watched:
    """A model that remembers its last logits."""

    def __init__(self, model: Any):
        self.model, self.logits = model, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.logits = self.model(*args, **kwargs)
        return self.logits

    def loss(self, tokens_BT: Any, labels_BM: Any, *args: Any) -> Any:
        from jaxlm.loss import cross_entropy

        return cross_entropy(self(tokens_BT, *args), labels_BM)  # the model's own keeps no logits


def _class_names(task: Any, confusion: list[list[int]]) -> list[str]:
    n = len(confusion)  # of a task of the user's own, it may be of something else
    return list(task.classes if n == len(task.classes) else numbered(n))


def _one(trained: "LoadedModel", model: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the totals of one sample; where samples have labels, also its prediction.

    Of a task with probabilities, also that of a class label, and `reliability`: by bin of confidence, how many
    predictions there are, how many are right, and their confidence.
    """
    import jax
    import jax.numpy as jnp

    watched, task, batch = _Watched(model), trained.task, {name: x[None] for name, x in sample.items()}
    totals = task.loss(watched, batch, None)
    if watched.logits is None or not trained.has_probabilities():
        return totals | ({"prediction": task.predict(model, batch)[0]} if task.samples.reads == "labels" else {})
    p, labels = jax.nn.softmax(watched.logits[0]), sample["labels"]
    confidence, prediction, is_counted = p.max(axis=-1), p.argmax(axis=-1), labels >= 0
    of_bin = jax.nn.one_hot(jnp.minimum(confidence * N_BINS, N_BINS - 1).astype(int), N_BINS) * is_counted[..., None]
    rows = jnp.stack([jnp.ones_like(confidence), 1.0 * (prediction == labels), confidence], axis=-1)
    # Counts, which products that round would spoil.
    sums = jnp.matmul(of_bin.reshape(-1, N_BINS).T, rows.reshape(-1, 3), precision="highest")
    totals = totals | {"reliability": sums}
    if "confusion" in totals:
        totals |= {"prediction": prediction, "probability": p[jnp.maximum(labels, 0)]}
    return totals


def _articles(samples: "Samples") -> np.ndarray:
    """Return the number of the article that each sample is of, [N]."""
    indices = np.arange(len(samples))
    windows = getattr(samples, "windows", None)
    return indices if windows is None else np.searchsorted(windows.ends, indices, side="right")


def _groups(articles: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the number of what each sample is drawn with, [N], and what that is: the samples of an article together.

    They are alike, and to draw them one by one would make the intervals too narrow.
    """
    groups = np.unique(articles, return_inverse=True)[1]
    return (groups, "articles") if groups.max() + 1 >= FEWEST else (np.arange(len(articles)), "samples")


def _sums(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    result = np.zeros((int(groups.max()) + 1, *x.shape[1:]))
    np.add.at(result, groups, x)
    return result


def _constants(samples: "Samples", articles: np.ndarray) -> Totals:
    """Return what belongs to the part as a whole, shared out to the samples by the bytes of their articles."""
    if not samples.constants:
        return {}
    sizes: np.ndarray = samples.windows.split.n_bytes  # type: ignore[union-attr]
    n_bytes = sizes[articles] / np.bincount(articles)[articles]
    return {name: total * n_bytes / n_bytes.sum() for name, total in samples.constants.items()}


def _summed(totals: Mapping[str, np.ndarray]) -> Totals:
    return {name: x.sum(axis=0) for name, x in totals.items()}


def _scores(of_task: Callable[[Any], Mapping[str, float]], totals: Mapping[str, np.ndarray]) -> dict[str, float]:
    sums = _summed(totals) if np.ndim(totals["count"]) else dict(totals)
    scores = dict(of_task(sums))
    if "reliability" in sums:
        n, n_right, confidence = sums["reliability"].T
        scores["calibration_error"] = float(np.sum(np.abs(n_right - confidence)) / np.sum(n))
    return scores


def _bins(reliability: np.ndarray) -> list[Bin]:
    return [
        Bin(i / N_BINS, (i + 1) / N_BINS, int(n), float(confidence / n), float(n_right / n))
        for i, (n, n_right, confidence) in enumerate(reliability)
        if n
    ]


def _worst(trained: "LoadedModel", samples: Any, totals: Totals) -> list[Mistake]:
    """Return the wrong predictions of the largest loss; without probabilities, all with a loss count as wrong."""
    labels, split, losses, task = samples.split.labels, samples.split, totals["loss"], trained.task
    has_probabilities = "probability" in totals
    wrong = np.flatnonzero(totals["prediction"] != labels if has_probabilities else losses > 0)
    order = np.argsort(totals["probability"][wrong] if has_probabilities else -losses[wrong], kind="stable")
    found = []
    for i in wrong[order][:N_WORST]:
        text = trained.tokenizer.decode(split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist())
        label: int | str = int(labels[i])
        predicted = totals["prediction"][i].tolist()
        if has_probabilities:
            label = task.label(int(labels[i]))
            predicted = task.label(predicted) if predicted < len(task.classes) else None
        probability = float(totals["probability"][i]) if has_probabilities else None
        found.append(Mistake(text, label, predicted, probability, float(losses[i])))
    return found


def _tell(found: Evaluation) -> None:
    from rich.table import Table

    from jaxlm.io.console import Console

    console = Console()
    where = f"{found.split} part of {found.data}"
    console.print(f"{found.checkpoint}: task {found.task}, step {found.step:,}")
    console.print(f"{where}: {found.n_samples:,} samples, {found.n_counted:,} predictions")
    title = f"intervals: {INTERVAL:.0%}, from {N_DRAWS:,} bootstraps of {found.n_drawn:,} {found.drawn}"
    table = Table("", title=title, title_style="", title_justify="left")
    for name in ("score", "interval", "baseline"):
        table.add_column(name, justify="right")
    rows = found.scores | ({"calibration_error": found.calibration_error} if found.calibration_error else {})
    for name, score in rows.items():
        interval = f"{number(name, score.low)} to {number(name, score.high)}"
        baseline = "" if score.baseline is None else number(name, score.baseline)
        table.add_row(f"{name} ({score.better} is better)", number(name, score.value), interval, baseline)
    console.print(table)
    if found.warning:
        console.print(f"warning: {found.warning}")
    if found.confusion:
        n = len(found.confusion)
        has_none = any(row[n] for row in found.confusion)
        heads = [f"predicted {name}" for name in found.classes] + (["no class"] if has_none else [])
        table = Table("", title="confusion", title_style="", title_justify="left")
        for head in heads:
            table.add_column(head, justify="right")
        for name, row in zip(found.classes, found.confusion, strict=True):
            table.add_row(f"label {name}", *(f"{x:,}" for x in row[: len(heads)]))
        console.print(table)
    if found.bins:
        title = "calibration: how often predictions of some confidence are right"
        table = Table(title=title, title_style="", title_justify="left")
        for name in ("confidence", "predictions", "mean confidence", "right"):
            table.add_column(name, justify="right")
        for b in found.bins:
            span = f"{b.low:.1f} to {b.high:.1f}"
            table.add_row(span, f"{b.count:,}", f"{b.confidence:.3f}", f"{b.accuracy:.3f}")
        console.print(table)
    if found.worst:
        console.print(f"worst errors, by the {'probability of the label' if found.confusion else 'loss'}:")
        for error in found.worst:
            text = " ".join(error.text.split())
            text = text if len(text) <= 100 else f"{text[:97]}..."
            measure = error.loss if error.probability is None else error.probability
            console.print(f"  {measure:.4f}  label {error.label}, predicted {_predicted(error.predicted)}: {text}")


def _predicted(value: Any) -> str:
    return "no class" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _keep(run: Path, found: Evaluation) -> None:
    """Write the evaluation to the folder of its run, where jaxlm.report finds it."""
    path = run / f"evaluation_{found.split}.json"
    try:
        path.write_text(dumps(_finite(dataclasses.asdict(found)), indent=1), encoding="utf-8")
    except OSError as error:
        print(f"warning: {path}: cannot be written ({error.strerror})", file=sys.stderr)
    else:
        print(f"kept as {path}", file=sys.stderr)


def _finite(value: Any) -> Any:
    """Return a value for JSON, which has no NaN: null is what every reader takes."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments, and the settings among them by name."""
    parser = Parser(
        prog="python -m jaxlm.evaluate",
        description="Scores a trained model on a part of its run's data, or on a file.",
        epilog="Settings that say how a file is read, or where to, can be given as for jaxlm.train: --data.format, "
        "--data.header, --data.text-column, --data.label-column, --data.cache-dir, --tokenizer.path.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run (its best checkpoint), checkpoint, or public model"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="part to score (test)")
    parser.add_argument("--data.path", dest="path", metavar="FILE", help="score all of this file instead")
    parser.add_argument(
        "--train.batch-size", dest="size", metavar="N", help=f"samples that a device has at once ({BATCH_SIZE})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, rest = parser.parse_known_args(argv)
    rest += [f"--data.path={args.path}"] if args.path is not None else []
    rest += [f"--train.batch-size={args.size}"] if args.size is not None else []
    given = configs.given(rest)
    for name in given:
        if not name.startswith("data.") and name not in ("tokenizer.path", "train.batch_size"):
            raise UserError(f"--{name.replace('_', '-')}: a model that is trained keeps it; leave it out")
    return args, given


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
