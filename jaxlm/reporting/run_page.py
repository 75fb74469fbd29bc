"""The HTML page about one run, or comparing several. Runs are {name: run}, by their shortest distinct names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data import metrics
from jaxlm.reporting import html_page, run_reader
from jaxlm.reporting.html_page import folded, note, table, text
from jaxlm.reporting.line_chart import BOUND, COLOURS, DASHES, Curve, chart
from jaxlm.reporting.run_reader import RunRecord
from jaxlm.tasks.parameters import BUILT_IN
from jaxlm.terminal import command
from jaxlm.training import environment, history

MOST_STEPS = 8  # evaluations whose samples are shown
# Losses of runs that differ in these settings cannot be compared.
COMPARABLE = (*("data.path", "data.hub", "data.sources", "tokenizer.path", "tokenizer.kind", "model.vocab_size"),)
TRAINING = {  # charts of training metrics: title, and whether the scale is logarithmic
    "accuracy": ("accuracy in training", False),
    "rate": ("learning rate", False),
    "grad_norm": ("gradient norm, before clipping", True),
    "tokens_per_s": ("throughput, tokens/s", False),
    "real_share": ("share of positions that are not padding", False),
}
STARTS = ("started", "step", "command", "device", "host", "cores", "system", "python", "packages", "commit")
Runs = Mapping[str, RunRecord]


def page(records: Sequence[RunRecord]) -> str:
    """Return the page of one or several runs. Raises UserError for an unreadable evaluation."""
    runs = _named(records)
    if len(runs) == 1:
        (title,) = runs
        parts = [_head(records[0]), *_curves(runs)]
    else:
        title = "Runs compared: " + ", ".join(runs)
        parts = [_results(runs), *_curves(runs), "<h2>Settings that differ</h2>", _differences(runs)]
    files = (path for run in records for path in sorted(run.path.glob("evaluation_*.json")))
    with run_reader.evaluation_errors(*files):
        parts += _evaluations(runs)
    parts += _samples(runs)
    parts += ["<h2>Settings</h2>", *(_settings(run, name) for name, run in runs.items())]
    parts += ["<h2>Environment</h2>", *(_environment(run, name) for name, run in runs.items())]
    return html_page.page(title, parts)


def _named(records: Sequence[RunRecord]) -> Runs:
    """Return runs by folder name, with as many parent folders as needed to distinguish them."""
    paths = [run.path.absolute().parts for run in records]
    for n in range(1, max(map(len, paths)) + 1):
        runs = {"/".join(path[-n:]): run for path, run in zip(paths, records, strict=True)}
        if len(runs) == len(records):
            break
    return runs


def _head(run: RunRecord) -> str:
    """Return the state of a run, and the scores of its best step beside the baselines."""
    step = run.best_score_step()
    figures = [(f"task {run.task}", run.state), ("updates", run.progress)]
    for split, at in (("validation", step), ("test", run.tested_step())):
        if at is not None and (scores := run.scores(split)):
            name, value = next(iter(scores.items()))
            baseline = run.baselines(split).get(name)
            beside = "" if baseline is None else f"; baseline {metrics.number(name, baseline)}"
            figures.append((f"{split} {name}, step {at:,}{beside}", metrics.number(name, value)))
    if speed := run.speed():
        figures.append(("tokens/s, median", f"{speed:,.0f}"))
    if step is None:
        return html_page.totals(figures)
    splits = [split for split in ("validation", *history.ENDING) if run.scores(split)]
    lower = run.baseline.get("lower_is_better")
    lines = []
    for name in run.scores("validation"):
        better = ["lower" if name in lower else "higher"] if isinstance(lower, list) else []
        pairs = [(run.scores(split).get(name), run.baselines(split).get(name)) for split in splits]
        lines.append([name, *(metrics.number(name, x) for pair in pairs for x in pair), *better])
    heads = [
        f"score of step {step:,}, the best",
        *(x for split in splits for x in (split.replace("_", " "), "baseline")),
        "better",
    ]
    guess = run.baseline.get("name", "not recorded in this run")
    below = note(f"Best step: the lowest validation loss. Baseline: {guess}.")
    return html_page.totals(figures) + table(heads[: len(lines[0])], lines, "scores") + below


def _results(runs: Runs) -> str:
    lines = [[name, *values] for name, values in run_reader.results(list(runs.values())).items()]
    return table(["", *runs], [["task", *(run.task for run in runs.values())], *lines], "results")


def _differences(runs: Runs) -> str:
    lines = [[name, *values] for name, values in run_reader.differences(list(runs.values())).items()]
    if not lines:
        return "<p>None: the runs have the same settings.</p>"
    return table(["setting", *runs], lines, "settings that differ")


# Curves


def _curves(runs: Runs) -> list[str]:
    """Return the charts, separately for each task, because losses of two tasks cannot be compared."""
    tasks = dict.fromkeys(run.task for run in runs.values())
    parts = ["<h2>Curves</h2>"]
    for task in tasks:
        of_task = {name: run for name, run in runs.items() if run.task == task}
        figures = "".join(_charts(of_task, task))
        if len(tasks) > 1:
            parts.append(f"<h3>Task {text(task)}</h3>")
        parts.append(f'<div class="figures">{figures}</div>' if figures else "<p>Nothing is logged yet.</p>")
        differing = ", ".join(x for x in run_reader.differences(list(of_task.values())) if x in COMPARABLE)
        if differing and figures:
            parts.append(note(f"These runs differ in {differing}, so losses and perplexities are not comparable."))
    return parts


def _charts(runs: Runs, task: str) -> Iterator[str]:
    """Yield the charts of runs of a task: loss, validation scores, training metrics."""
    unit = ", nats" if task in BUILT_IN else ""  # the loss of a user's task can be anything
    if len(runs) > 1:
        yield _chart(runs, "train", "loss", f"training loss{unit}")
    else:
        for run in runs.values():
            train = _curve(run, "train", "loss", "training", width=1.2)
            validation = _curve(run, "validation", "loss", "validation", **_style(1), has_dots=True)
            yield chart(f"loss{unit}", [train, validation], levels=_levels(runs, "loss"))
    rows = [row for run in runs.values() for row in run.rows if row["split"] == "validation"]
    for name in dict.fromkeys(name for row in rows for name in row if name not in history.KEYS):
        if name != "loss" or len(runs) > 1:
            title = f"validation {name.replace('_', ' ')}{unit if name == 'loss' else ''}"
            yield _chart(runs, "validation", name, title, is_log=name == "perplexity")
    for name, (title, is_log) in TRAINING.items():
        yield _chart(runs, "train", name, title, is_log)


def _chart(runs: Runs, split: str, score: str, title: str, is_log: bool = False) -> str:
    """Return the chart of one score or metric of all runs; "" if no run has it."""
    is_score = split == "validation"
    curves = [
        _curve(run, split, score, name, **_style(i), width=1.4, has_dots=is_score)
        for i, (name, run) in enumerate(runs.items())
    ]
    return chart(title, curves, is_log=is_log, levels=_levels(runs, score) if is_score else ())


def _curve(run: RunRecord, split: str, score: str, label: str, **style: Any) -> Curve:
    rows = [row for row in run.rows if row["split"] == split and score in row]
    # Values that are not finite are logged as null.
    values = [row[score] if isinstance(row[score], int | float) else np.nan for row in rows]
    best = run.best_score_step() if split == "validation" else None
    return Curve(label, np.array([row["step"] for row in rows]), np.array(values), best=best, **style)


def _style(i: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {"colour": COLOURS[i % n], "dashes": DASHES[(i + i // n) % n]}


def _levels(runs: Runs, score: str) -> list[Curve]:
    """Return levels for the baselines of a validation score: one if they are equal."""
    baselines = [(i, name, run.baselines("validation").get(score)) for i, (name, run) in enumerate(runs.items())]
    lines = [(f"baseline of {name}", x, _style(i)["colour"]) for i, name, x in baselines if x is not None]
    if len({x for _, x, _ in lines}) == 1:
        lines = [("baseline", lines[0][1], BOUND)]
    return [Curve(label, np.zeros(1), np.array([x]), colour, "2 3", 1.2) for label, x, colour in lines]


# Evaluations that jaxlm.evaluate has written


def _evaluations(runs: Runs) -> list[str]:
    parts = []
    for split in ("validation", "test"):
        if results := {name: x for name, run in runs.items() if (x := run.evaluation(split))}:
            parts += [f"<h2>Evaluation of the {split} split</h2>", *_evaluation(runs, split, results)]
    if not parts:
        run = str(next(iter(runs.values())).path) if len(runs) == 1 else "RUN"
        line = text(f"{command('evaluate')} --checkpoint {run}")
        parts = ["<h2>Evaluation</h2>", f"<p>There is none yet: <code>{line}</code> makes one.</p>"]
    return parts


def _evaluation(runs: Runs, split: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Yield scores, calibration, and errors of the evaluations of a split, by name of the run."""
    is_single = len(runs) == 1
    lines = []
    for name, result in results.items():
        step, is_best = f"{result['step']:,}", result["step"] == runs[name].best_score_step()
        if is_single:
            yield f"<p>Checkpoint of step {step}{', the best' if is_best else ''}.</p>"
        where = [] if is_single else [name, f"{step}{' (best)' if is_best else ''}"]
        error = result["calibration_error"]
        for score, x in {**result["scores"], **({"calibration_error": error} if error else {})}.items():
            value, low, high = (metrics.number(score, x[key]) for key in ("value", "low", "high"))
            baseline = "" if x["baseline"] is None else metrics.number(score, x["baseline"])
            lines.append([*where, score.replace("_", " "), value, f"{low} to {high}", baseline, x["better"]])
    head = [*([] if is_single else ["run", "step"]), "score", "", "95% interval", "baseline", "better"]
    yield table(head, lines, f"scores of the {split} split")
    yield from _calibration(runs, results)
    for name, result in results.items():
        yield from _errors(result, "" if is_single else f" of {name}")


def _calibration(runs: Runs, results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a chart for each classification task, and an explanation."""
    ends = np.array([0.0, 1.0])
    curves: dict[str, list[Curve]] = {}
    for name, bins in ((name, result["bins"]) for name, result in results.items() if result["bins"]):
        confidence, accuracy = (np.array([x[key] for x in bins]) for key in ("confidence", "accuracy"))
        drawn = curves.setdefault(runs[name].task, [Curve("as often as it says", ends, ends, BOUND, "2 3", 1.0)])
        drawn.append(Curve(name, confidence, accuracy, **_style(len(drawn) - 1), has_dots=True))
    label = "confidence of a prediction"
    if figures := "".join(chart(f"calibration, {task}", drawn, label) for task, drawn in curves.items()):
        yield f'<div class="figures">{figures}</div>'
        yield note("Calibration: accuracy of predictions by their confidence. On the dotted line, both are equal.")


def _errors(result: Mapping[str, Any], of_run: str) -> Iterator[str]:
    """Yield the confusion matrix of a classifier, and the worst errors."""
    confusion, title, measure = result["confusion"], f"Worst errors{of_run}", "loss"
    if confusion:
        n, measure = len(confusion), "probability"
        classes = result.get("classes") or range(n)  # evaluations of earlier versions have no names
        n_columns = n + 1 + any(row[n] for row in confusion)
        heads = ["", *(f"predicted {name}" for name in classes), "no class"]
        lines = [[f"label {name}", *map(str, row)] for name, row in zip(classes, confusion, strict=True)]
        yield f"<h3>Confusion{text(of_run)}</h3>"
        yield table(heads[:n_columns], [line[:n_columns] for line in lines], "confusion")
        n_wrong = sum(sum(row) - row[i] for i, row in enumerate(confusion))
        title = f"Worst errors: {len(result['worst'])} of {n_wrong:,}"
    if result["worst"]:
        head = ["text", "label", "predicted", "probability of the label" if confusion else "loss"]
        lines = [
            [x["text"], str(x["label"]), _predicted(x["predicted"]), metrics.number(measure, x[measure])]
            for x in result["worst"]
        ]
        yield folded(title, table(head, lines, "worst errors"))


def _predicted(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# What else a folder has


def _samples(runs: Runs) -> list[str]:
    parts = []
    for name, run in runs.items():
        samples, best = run.samples(), run.best_score_step()
        if not samples:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{text(name)}</h3>")
        steps = list(samples)
        chosen = {steps[i] for i in np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)} | {best}
        shown = [step for step in steps if step in chosen]
        if left_out := len(steps) - len(shown):
            path = f"<code>{text(str(run.path / 'samples.txt'))}</code>"
            count = f"{len(shown)} of {len(steps)} evaluations are shown"
            parts.append(f"<p>{count}; the other {left_out} are in {path}.</p>")
        for step in shown:
            is_last = step == steps[-1] and len(runs) == 1
            title = f"step {step:,}{', the best' if step == best else ''}"
            parts.append(folded(title, f"<pre>{text(samples[step])}</pre>", is_open=is_last))
    intro = ["<h2>Samples over time</h2>", "<p>Predictions for the same validation samples.</p>"]
    return [*intro, *parts] if parts else []


def _settings(run: RunRecord, name: str) -> str:
    changed = run.changed_settings()
    lines = [[key, str(x), "" if key in changed else "default"] for key, x in run.settings.items()]
    lines.sort(key=lambda line: bool(line[2]))
    summary = f"{name}: {len(changed)} of {len(lines)} are not defaults"
    return folded(summary, table(["setting", "", ""], lines, name))


def _environment(run: RunRecord, name: str) -> str:
    starts = environment.read(run.path)
    if not starts:
        return f"<p>{text(name)}: not recorded.</p>"
    lines = []
    for key in STARTS:
        values = [start.get(key, "") for start in starts]
        shown = [", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in values]
        lines.append(["after updates" if key == "step" else key, *shown])
    heads = [f"start {i}" for i in range(1, len(starts) + 1)] if len(starts) > 1 else [""]
    return folded(name, table(["", *heads], lines, f"environment of {name}"), is_open=True)
