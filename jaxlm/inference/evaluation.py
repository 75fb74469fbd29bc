"""Evaluation of a trained model: scores with bootstrap intervals, calibration, confusion matrix, worst errors.

Each sample is scored separately: results depend neither on batches nor on the number of devices, and the bootstrap can
draw samples or articles.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config, DataConfig
from jaxlm.data import loader, metrics, prepare
from jaxlm.data.labels import numbered
from jaxlm.data.packing import StreamSamples
from jaxlm.data.parts import LABELLED
from jaxlm.data.samples import Samples
from jaxlm.data.sources import Source
from jaxlm.errors import UserError, slow
from jaxlm.inference.load import LoadedModel
from jaxlm.tasks import Task
from jaxlm.training.log import RunLog

BATCH_SIZE = 16  # samples per device at a time; small enough for any model
N_DRAWS, INTERVAL = 2000, 0.95  # of the bootstrap
N_BINS = 10  # of the reliability table
N_WORST = 10  # errors that are reported
FEWEST = 20  # articles for a bootstrap of articles; with fewer, samples are drawn
Totals = dict[str, np.ndarray]  # of Task.loss and `_one`: per sample, per group, or summed


@dataclasses.dataclass(frozen=True)
class Score:
    value: float
    low: float  # of the bootstrap interval at level INTERVAL
    high: float
    baseline: float | None  # score of the best constant prediction; None: there is none
    better: str  # lower or higher


@dataclasses.dataclass(frozen=True)
class Bin:
    """The predictions with a confidence from `low` to `high`."""

    low: float
    high: float
    count: int
    confidence: float  # mean probability of the predictions
    accuracy: float  # share of correct ones


@dataclasses.dataclass(frozen=True)
class Mistake:
    text: str
    label: float | str
    predicted: Any  # prediction of the task; None: no class (possible with the original's head)
    probability: float | None  # of the label; None for tasks without probabilities
    loss: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The output of `jaxlm.evaluate --json`, also saved in the run folder."""

    checkpoint: str
    task: str
    step: int
    split: str
    data: str
    n_samples: int
    n_counted: int  # scored predictions
    n_drawn: int
    drawn: str  # units of the bootstrap: articles or samples
    scores: dict[str, Score]
    calibration_error: Score | None  # expected, ECE (arXiv 1706.04599, eq. 3); None for tasks without probabilities
    bins: list[Bin]
    classes: list[str]  # names in order; []: there are none
    confusion: list[list[int]] | None  # [C][C + 1]: row label, column prediction, last column: no class
    worst: list[Mistake]
    warning: str
    version: str


@slow("scoring the samples")
def evaluate(
    trained: LoadedModel, samples: Samples, batch_size: int = BATCH_SIZE, split: str = "", data: str = ""
) -> Evaluation:
    """Return the evaluation of samples; `split` and `data` are their names for the output."""
    task: Any = trained.task
    articles = _articles(samples)
    groups, drawn = _groups(articles)
    totals = totals_of_samples(trained, samples, batch_size) | _constants(samples, articles)
    grouped = {name: _grouped(totals[name], groups) for name in totals.keys() - {"prediction", "probability"}}
    sums = {name: x.reshape(-1, 2) if name in metrics.LISTED else x.sum(axis=0) for name, x in grouped.items()}
    intervals = bootstrap(grouped, functools.partial(_scores, task))
    baseline: Mapping[str, float] = task.chance(len(samples)) if task.ranks else task.baseline(samples)
    lower = (*task.lower_is_better, "calibration_error")
    scores = {
        name: Score(value, *intervals[name], baseline.get(name), "lower" if name in lower else "higher")
        for name, value in _scores(task, sums).items()
    }
    confusion = sums["confusion"].astype(int).tolist() if "confusion" in sums else None
    n_classes = len(confusion or [])  # in a user's own task, rows of the matrix may be other things
    return Evaluation(
        checkpoint=str(trained.start.path),
        task=trained.config.task,
        step=trained.start.info["step"],
        split=split,
        data=data,
        n_samples=len(samples),
        n_counted=int(sums["count"]),
        n_drawn=int(groups.max()) + 1,
        drawn=drawn,
        calibration_error=scores.pop("calibration_error", None),
        scores=scores,
        bins=_bins(sums["reliability"]) if "reliability" in sums else [],
        classes=list(task.classes if n_classes == len(task.classes) else numbered(n_classes)),
        confusion=confusion,
        worst=_worst(trained, samples, totals) if "prediction" in totals else [],
        warning=task.warning(sums),
        version=importlib.metadata.version("jaxlm"),
    )


def samples_of(trained: LoadedModel, split: str, given: Mapping[str, Any]) -> tuple[Source, Samples]:
    """Return the source and the samples of a split of the run's data, or of the file data.path in `given`.

    `given` are settings that differ from the run's. Raises UserError.
    """
    config, task, read = trained.config, trained.task, split
    if path := given.get("data.path"):
        if Path(path).is_dir():
            raise UserError(f"data.path={path}: is a folder; name the file in it to score")
        # The whole file, with those settings of the run that define a sample.
        names = ["n_labels", "mask_fraction", "n_maskings", "pack", "pair_column"]
        names += [] if config.data.documents == "column" else ["documents"]  # the run's data may be a table, not text
        kept = {name: configs.get(config, f"data.{name}") for name in names}
        data = DataConfig(**kept, cache_dir=config.data.cache_dir, validation_fraction=0.0, test_fraction=0.0)
        config, read = dataclasses.replace(config, data=data), "train"
    for name, value in given.items():
        config = configs.replace(config, name, value) if name != "data.sources" else config
    if config.data.sources:
        config = _source_of(config, given.get("data.sources", ()))
    if config.data.pack == "documents":  # samples are scored separately, with the same result
        config = configs.replace(config, "data.pack", "none")
    progress = RunLog(stderr=True).pass_bar
    source, samples = prepare.part(config, task.samples, task.embedded, trained.tokenizer, read, progress, task.classes)
    stored, mix = trained.start.info.get("data"), trained.start.info.get("mix") or {}
    if not path and stored and source.fingerprint not in (stored, *mix.get("sources", ())):
        raise UserError(
            f"{source.description}: the data differ from those of {trained}, so its splits may differ, too; "
            "restore the data, or give a file with --data.path"
        )
    if read == "test" and source.test_refusal:
        raise UserError(source.test_refusal.replace("--data.test-path with", "--data.path with"))
    if not len(samples):
        raise UserError(f"{source.description}: its {split} split has no samples; give a file with --data.path")
    return source, samples


def _source_of(config: Config, named: Sequence[Mapping[str, Any]]) -> Config:
    """Return the settings with one of the sources of a run. Raises UserError if none of them is named."""
    found = configs.source_configs(config)
    if len(named) != 1 or named[0]["name"] not in found or len(named[0]) > 1:
        raise UserError(
            f"data.sources: the model was trained on {', '.join(found)}; name one of them, such as "
            f"--data.sources {next(iter(found))}, or give a file with --data.path"
        )
    return found[named[0]["name"]]


def totals_of_samples(trained: LoadedModel, samples: Samples, batch_size: int) -> Totals:
    """Return the totals of each sample, [N, ...], in order.

    Every device has the whole model and gets whole batches in turn, so that results do not depend on their number.
    """
    devices = jax.local_devices()
    models = [jax.device_put(trained.model, device) for device in devices]
    task: Any = trained.task
    one_by_one = jax.vmap(functools.partial(_one, trained), in_axes=(None, 0))
    compiled = jax.jit(task.predict if task.ranks else one_by_one)
    ahead: list[Any] = []
    done: list[Any] = []
    with RunLog(stderr=True).pass_bar("scoring the samples", len(samples)) as show:
        for i, batch in enumerate(loader.evaluation_batches(samples, batch_size)):
            k = i % len(devices)
            ahead.append(compiled(models[k], jax.device_put(batch, devices[k])))
            if len(ahead) > 2 * len(devices):
                done.append(jax.device_get(ahead.pop(0)))
            show(i * batch_size)
    done += jax.device_get(ahead)
    if task.ranks:
        return dict(task.ranked(np.concatenate(done)[: len(samples)]))
    return {name: np.concatenate([totals[name] for totals in done])[: len(samples)] for name in done[0]}


def _one(trained: LoadedModel, model: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the totals of one sample, and its prediction if samples have labels.

    For a task with probabilities, also the probability of the label, and `reliability` [bins, 3]: number of
    predictions, number of correct ones, and sum of their confidence.
    """
    task, batch = trained.task, {name: x[None] for name, x in sample.items()}
    if not trained.has_probabilities():
        totals = task.loss(model, batch, None)
        return totals | ({"prediction": task.predict(model, batch)[0]} if task.samples.reads in LABELLED else {})
    totals, logits = task.loss_with_logits(model, batch)
    p, labels = jax.nn.softmax(logits[0]), sample["labels"]
    confidence, prediction, is_counted = p.max(axis=-1), p.argmax(axis=-1), labels >= 0
    of_bin = jax.nn.one_hot(jnp.minimum(confidence * N_BINS, N_BINS - 1).astype(int), N_BINS) * is_counted[..., None]
    counted = jnp.stack([jnp.ones_like(confidence), 1.0 * (prediction == labels), confidence], axis=-1)
    # Counts must not be rounded to bfloat16.
    sums = jnp.matmul(of_bin.reshape(-1, N_BINS).T, counted.reshape(-1, 3), precision="highest")
    totals = totals | {"reliability": sums}
    if "confusion" in totals:
        totals |= {"prediction": prediction, "probability": p[jnp.maximum(labels, 0)]}
    return totals


def bootstrap(
    totals: Mapping[str, np.ndarray], scores: Callable[[Totals], Mapping[str, float]], seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap interval of each score, from totals of groups [G, ...].

    The percentile method: Efron, Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    random = np.random.default_rng(seed)
    n = len(next(iter(totals.values())))
    flat = {name: np.asarray(x, np.float64).reshape(n, -1) for name, x in totals.items()}
    draws: dict[str, list[float]] = {}
    for _ in range(N_DRAWS):
        times = np.bincount(random.integers(n, size=n), minlength=n).astype(np.float64)
        sums = {
            name: np.repeat(x, times.astype(int), axis=0)
            if name in metrics.LISTED
            else (times @ x).reshape(totals[name].shape[1:])
            for name, x in flat.items()
        }
        if sums["count"] > 0:  # otherwise, no scored prediction was drawn
            for name, value in scores(sums).items():
                draws.setdefault(name, []).append(value)
    tail = (1 - INTERVAL) / 2
    with np.errstate(invalid="ignore"):  # a perplexity may be infinite
        return {name: tuple(np.quantile(x, (tail, 1 - tail)).tolist()) for name, x in draws.items()}


def _articles(samples: Samples) -> np.ndarray:
    """Return the number of the article of each sample, [N]."""
    indices = np.arange(len(samples))
    windows = None if isinstance(samples, StreamSamples) else getattr(samples, "windows", None)
    return indices if windows is None else np.searchsorted(windows.ends, indices, side="right")


def _groups(articles: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the group of each sample in the bootstrap, [N], and the kind of group: articles or samples.

    Samples of an article are correlated: drawing them separately would make the intervals too narrow.
    """
    groups = np.unique(articles, return_inverse=True)[1]
    return (groups, "articles") if groups.max() + 1 >= FEWEST else (np.arange(len(articles)), "samples")


def _grouped(x: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the sums [G, ...] over the samples of each group."""
    result = np.zeros((int(groups.max()) + 1, *x.shape[1:]))
    np.add.at(result, groups, x)
    return result


def _constants(samples: Samples, articles: np.ndarray) -> Totals:
    """Return the constants of the split, distributed to the samples in proportion to the bytes of their articles."""
    if not samples.constants:
        return {}
    if isinstance(samples, StreamSamples):
        return {name: np.full(len(samples), total / len(samples)) for name, total in samples.constants.items()}
    sizes: np.ndarray = samples.windows.split.n_bytes  # type: ignore[union-attr]
    n_bytes = sizes[articles] / np.bincount(articles)[articles]
    return {name: total * n_bytes / n_bytes.sum() for name, total in samples.constants.items()}


def _scores(task: Task, sums: Totals) -> dict[str, float]:
    """Return the scores of the task, with the calibration error if it has probabilities."""
    scores = dict(task.scores(sums))
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


def _worst(trained: LoadedModel, samples: Any, totals: Totals) -> list[Mistake]:
    """Return the wrong predictions with the largest loss; without probabilities, every loss above 0 is wrong."""
    task: Any = trained.task  # with names of classes, if there are some
    labels, losses, predictions = samples.labels, totals["loss"], totals["prediction"]
    probabilities = totals.get("probability")
    is_wrong, order = (losses > 0, -losses) if probabilities is None else (predictions != labels, probabilities)
    wrong = np.flatnonzero(is_wrong)
    mistakes = []
    for i in wrong[np.argsort(order[wrong], kind="stable")][:N_WORST]:
        text = samples.text(int(i), trained.tokenizer)
        is_set, loss = labels.ndim == 2, float(losses[i])  # of several labels a text
        label, predicted = (
            map(task.named, (labels[i], predictions[i])) if is_set else (labels[i].item(), predictions[i].tolist())
        )
        if probabilities is None:
            mistakes.append(Mistake(text, label, predicted, None, loss))
        else:
            name = task.label(predicted) if predicted < len(task.classes) else None
            mistakes.append(Mistake(text, task.label(label), name, float(probabilities[i]), loss))
    return mistakes
