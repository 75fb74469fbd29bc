"""Losses, computed again from logits and labels, and metrics."""

from collections.abc import Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import EXACT, Cause, Formula, Rule, explained, meaning
from parity_tests.compare.catalogue.place import Divergence

SMOOTHINGS = (0.1, 0.05, 0.2)
TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0)
NORMS = ("grad_norm", "norm")


def cross_entropy(d: Divergence) -> Iterator[Cause]:
    """Logits agree, and what is made of them and of labels does not."""
    labels = d.batch("labels")
    logits = None if labels is None else _logits(d, labels.shape)
    if d.name == "loss" and labels is not None and logits is not None:
        x, y = (np.asarray(z, float) for z in d.both)
        yield from explained(x, y, _formulas(logits, labels, d.tokens, x, y), d.where, near=EXACT)


def _logits(d: Divergence, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the logits of labels of a shape: the output of the model or of its head, or else the widest array."""
    found = None
    for (update, kind, name, call), e in d.a.entries.items():
        is_here = update == d.update and kind == "activation" and call == d.first.call
        if is_here and e.is_number and e.shape[:-1] == shape:
            if name == "" or "head" in name or found is None or e.shape[-1] >= found.shape[-1]:
                found = e.array().astype(np.float64)
    return found


def _formulas(
    logits: np.ndarray, labels: np.ndarray, tokens: np.ndarray | None, x: np.ndarray, y: np.ndarray
) -> Iterator[Formula]:
    """Yield what a loss may be; x and y are the losses of both."""
    largest = logits.max(-1, keepdims=True)
    shifted = np.log(np.exp(logits - largest).sum(-1))
    log_sum = shifted + largest[..., 0]
    log_p = logits - log_sum[..., None]
    is_counted, n = labels >= 0, max(1, int((labels >= 0).sum()))

    def of(targets: np.ndarray) -> np.ndarray:
        index = np.clip(targets, 0, logits.shape[-1] - 1).astype(int)
        return -np.take_along_axis(log_p, index[..., None], -1)[..., 0]

    def mean(each: np.ndarray, weights: np.ndarray = is_counted) -> float:
        return float((each * weights).sum()) / max(1, int(weights.sum()))

    each = of(labels)
    total, plain = float((each * is_counted).sum()), mean(each)
    all_of = of(np.maximum(labels, 0))
    per_sample = (each * is_counted).reshape(len(labels), -1).sum(1)
    counts = is_counted.reshape(len(labels), -1).sum(1)
    table: list[tuple[str, str, float]] = [
        ("", "is the mean over labels that count", plain),
        ("sum against mean", "is the sum over labels", total),
        ("sum against mean", "is divided by all positions, ignored ones too", total / labels.size),
        ("sum against mean", "is divided by the batch size", total / len(labels)),
        ("ignored labels", "counts ignored labels as class 0", float(all_of.sum()) / n),
        ("ignored labels", "counts ignored labels as class 0, over all", float(all_of.mean())),
        ("mean of means", "is the mean of each sample's mean", float(np.mean(per_sample / np.maximum(counts, 1)))),
        ("label shift", "takes labels plus 1", mean(of(labels + 1))),
        ("label shift", "takes labels minus 1", mean(of(labels - 1))),
    ]
    for s in SMOOTHINGS:
        table.append(("label smoothing", f"smooths labels by {s}", mean((1 - s) * each - s * log_p.mean(-1))))
    if tokens is not None and tokens.shape == labels.shape:
        for targets, text in (
            (tokens, "the tokens themselves"),
            (np.roll(tokens, -1, -1), "the next tokens"),
            (np.roll(labels, 1, -1), "labels one to the right"),
            (np.roll(labels, -1, -1), "labels one to the left"),
        ):
            for weights in (targets >= 0, is_counted):
                table.append(("label shift", f"takes {text} as labels", mean(of(targets), weights)))
    for kind, text, value in table:
        yield Formula({kind or "loss": text}, np.array(value), kind)
    yield from _z_losses(plain, float(x), float(y), {
        "mean of squares": mean(log_sum**2),
        "mean, not squared": mean(log_sum),
        "mean of squares without the largest logit": mean(shifted**2),
        "mean of squares over all positions": float((log_sum**2).sum()) / n,
        "mean of squares of all": float((log_sum**2).mean()),
    })  # fmt: skip


def _z_losses(plain: float, x: float, y: float, terms: dict[str, float]) -> Iterator[Formula]:
    """Yield losses with a z-loss, whose weight follows from the loss of one side: A's, or if A has none, B's."""
    usual = terms["mean of squares"]
    rest = x - plain if abs(x - plain) > 1e-9 * abs(plain) else y - plain
    weight = rest / usual
    if weight <= 0 or abs(float(f"{weight:.3g}") - weight) > 1e-5 * weight:  # a weight is a round number
        return
    for text, term in terms.items():
        for sign in (1, -1):
            how = f"{'adds' if sign > 0 else 'subtracts'} a z-loss of {weight:.3g} times the {text} of log Z"
            yield Formula({"z-loss": how}, np.array(plain + sign * weight * term), "z-loss")


def factor(d: Divergence) -> Iterator[Cause]:
    """One loss is a number times the other."""
    x, y = (float(z) for z in d.both)
    if d.name in NORMS or not x or y / x <= 0:
        return
    ratio = y / x
    is_constant = _is_constant(d)
    name = meaning(ratio, _sizes(d), _counts(d))
    squares = {t**2: t for t in TEMPERATURES}
    square = next((t for t2, t in squares.items() if min(abs(ratio / t2 - 1), abs(ratio * t2 - 1)) < 1e-4), None)
    text = f"{d.where}: B's is {ratio:.6g} times A's"
    if square and not name:
        yield Cause("temperature", f"{text}: the square of a temperature of {square:g}", 0.85)
    elif name:
        yield Cause("sum against mean", text + name, 0.85)
    elif is_constant:
        yield Cause("loss scale", f"{text} in each batch", 0.5)


def _sizes(d: Divergence) -> set[int]:
    return {n for e in d.a.record.all("activation") for n in e.shape[-1:]}


def _counts(d: Divergence) -> dict[str, float]:
    labels = d.batch("labels")
    if labels is None:
        return {}
    n = float((labels >= 0).sum())
    counts = {"the number of labels": n, "the share of labels that count": n / labels.size}
    return counts | {"the batch size": float(len(labels)), "all positions": float(labels.size)}


def _is_constant(d: Divergence) -> bool:
    """Return whether the losses of all batches have one ratio."""
    one, two = ([float(e.array()) for e in s.record.all("loss") if e.name == d.name] for s in d.sides)
    ratios = [y / x for x, y in zip(one, two, strict=False) if x]
    return len(ratios) > 1 and float(np.ptp(ratios)) < 1e-4 * abs(float(np.mean(ratios)))


def gradient_norm(d: Divergence) -> Iterator[Cause]:
    """The norm that is reported differs."""
    if d.name not in NORMS:
        return
    x, y = (float(z) for z in d.both)
    one, two = (np.array([float(e.array()) for e in s.record.all("loss") if e.name == d.name]) for s in d.sides)
    n = min(len(one), len(two))
    yield Cause("norm of gradients", f"{d.where}: B says {y:.5g}, A {x:.5g}", 0.5)
    if n and (two[:n] <= one[:n] * (1 + 1e-6)).all() and two[:n].max() < 0.999 * one[:n].max():
        yield Cause("clipping", f"{d.where}: B's is never above {two.max():.4g}: taken after clipping", 0.8)


def metric(d: Divergence) -> Iterator[Cause]:
    if d.name == "correct":
        yield Cause("metric", f"{d.where}: right predictions are counted otherwise", 0.9)


def unknown(d: Divergence) -> Iterator[Cause]:
    if d.name not in NORMS:
        yield Cause("loss", f"{d.where}: outputs agree, and the loss does not: labels, weights or another formula", 0.4)


RULES: tuple[Rule, ...] = (cross_entropy, factor, gradient_norm, metric, unknown)
