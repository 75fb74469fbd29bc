"""The command `python -m jaxlm.report`: one page about a run, or about several beside each other. USING.md shows it.

The page is one file that needs nothing else. It has what run folders tell, of jaxlm and of torchlm.
"""

import argparse
import re
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.cli import Parser
from jaxlm.data import metrics
from jaxlm.errors import UserError, reported
from jaxlm.io import storage, utf8
from jaxlm.reporting import html_page, run_reader
from jaxlm.reporting.html_page import COLOURS, DASHES, Curve
from jaxlm.reporting.run_reader import RunRecord
from jaxlm.tasks.parameters import BUILT_IN
from jaxlm.training import environment, history

MOST_STEPS = 8  # evaluations whose samples are shown
COMPARABLE = ("data.path", "data.hub", "tokenizer.path", "tokenizer.kind", "model.vocab_size")  # where losses are
TRAINING = {  # what is drawn of the rows of training: title, and whether on a log scale
    "accuracy": ("accuracy in training", False),
    "rate": ("learning rate", False),
    "grad_norm": ("gradient norm, before clipping", True),
    "tokens_per_s": ("throughput, tokens/s", False),
}


def report(runs: Sequence[RunRecord]) -> str:
    """Return the page of a run, or of several."""
    names = _names(runs)
    title = names[0] if len(runs) == 1 else "Runs compared: " + ", ".join(names)
    parts = [_head(runs[0]) if len(runs) == 1 else _results(runs, names), *_curves(runs, names)]
    if len(runs) > 1:
        parts += ["<h2>Settings that differ</h2>", _differences(runs, names)]
    try:
        parts += _evaluations(runs, names)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        files = ", ".join(str(path) for run in runs for path in sorted(run.path.glob("evaluation_*.json")))
        raise UserError(f"{files}: no evaluation of jaxlm.evaluate ({error!r}); run it again, or remove it") from error
    parts += _samples(runs, names)
    parts += ["<h2>Settings</h2>", *(_settings(run, name) for run, name in zip(runs, names, strict=True))]
    parts += ["<h2>Environment</h2>", *(_environment(run, name) for run, name in zip(runs, names, strict=True))]
    return html_page.page(title, parts)


def picture(html: Path, png: Path, width: int = 1200) -> None:
    """Write the whole of a page as a picture. Raises UserError if there is no browser to draw it."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise UserError(f"--png {png}: playwright is not installed; pip install 'jaxlm[report]'") from error
    with sync_playwright() as playwright:
        try:
            browser = _browser(playwright)
            tab = browser.new_page(viewport={"width": width, "height": 800}, device_scale_factor=1.5)
            tab.goto(html.absolute().as_uri())
            tab.screenshot(path=png, full_page=True)
            browser.close()
        except Error as error:
            raise UserError(f"--png {png}: {str(error).strip().splitlines()[0]}") from error


def main(argv: list[str] | None = None) -> int:
    """Write the page of a command line; return the exit status. Bad input exits with 2."""
    with reported(debug=False):
        args = _parse(sys.argv[1:] if argv is None else argv)
        runs = [run_reader.read(path) for path in args.runs]
        out = args.out or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
        try:
            out.write_text(report(runs), encoding="utf-8", errors="backslashreplace")  # a path can have any bytes
            print(out)
            if args.png:
                picture(out, args.png)
                print(args.png)
        except OSError as error:
            raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
        if args.open:
            webbrowser.open(out.absolute().as_uri())
        return 0
    raise AssertionError("reported() exits on the errors it does not pass on")


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return what the runs are called: their folders, with as many of those above as tell them apart."""
    paths = [run.path.absolute().parts for run in runs]
    most = max(map(len, paths))
    for n in range(1, most + 1):
        names = ["/".join(path[-n:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _head(run: RunRecord) -> str:
    figures = [(f"task {run.task}", run.state)]
    figures += [("updates", f"{run.last_step:,} of {run.settings['train.max_steps']:,}")]
    step = run.best_score_step()
    for split, at in (("validation", step), ("test", run.tested_step())):
        if at is not None and (scores := run.scores(split)):
            name, value = next(iter(scores.items()))
            baseline = run.baselines(split).get(name)
            beside = "" if baseline is None else f"; baseline {metrics.number(name, baseline)}"
            figures.append((f"{split} {name}, step {at:,}{beside}", metrics.number(name, value)))
    if speed := run.speed():
        figures.append(("tokens/s, the median", f"{speed:,.0f}"))
    head = html_page.totals(figures)
    if step is None:
        return head
    splits = [split for split in ("validation", "test") if run.scores(split)]
    lower = run.baseline.get("lower_is_better")
    lines = []
    for name in run.scores("validation"):
        better = ["lower" if name in lower else "higher"] if isinstance(lower, list) else []
        pairs = [(run.scores(split).get(name), run.baselines(split).get(name)) for split in splits]
        lines.append([name, *(metrics.number(name, x) for pair in pairs for x in pair), *better])
    heads = [f"score of step {step:,}, the best", *(x for split in splits for x in (split, "baseline"))]
    table = html_page.table([*heads, "better"][: len(lines[0])], lines, "scores")
    guess = run.baseline.get("name", "not recorded in this run")
    note = f"Best step: the lowest validation loss. Baseline: {html_page.text(str(guess))}."
    return f'{head}{table}<p class="soft">{note}</p>'


def _results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    lines = [[name, *values] for name, values in run_reader.results(runs).items()]
    return html_page.table(["", *names], [["task", *(run.task for run in runs)], *lines], "results")


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    found = run_reader.differences(runs)
    if not found:
        return "<p>None: the runs have the same settings.</p>"
    lines = [[name, *("-" if x is None else str(x) for x in values)] for name, values in found.items()]
    return html_page.table(["setting", *names], lines, "settings that differ")


# Curves


def _curves(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Return the charts, those of each task apart: a loss of one task is not to be compared with that of another."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    parts = ["<h2>Curves</h2>"]
    for task in tasks:
        some = [run for run in runs if run.task == task]
        labels = [name for run, name in zip(runs, names, strict=True) if run.task == task]
        figures = _loss(some, labels) + _scores(some, labels) + _training(some, labels)
        if len(tasks) > 1:
            parts.append(f"<h3>Task {html_page.text(task)}</h3>")
        parts.append(f'<div class="figures">{"".join(figures)}</div>' if figures else "<p>Nothing is logged yet.</p>")
        differing = [name for name in run_reader.differences(some) if name in COMPARABLE]
        if differing and figures:
            told = f"These runs differ in {', '.join(differing)}: losses and perplexities are not of the same tokens."
            parts.append(f'<p class="soft">{html_page.text(told)}</p>')
    return parts


def _curve(run: RunRecord, split: str, name: str, label: str, **style: Any) -> Curve:
    rows = [row for row in run.rows if row["split"] == split and name in row]
    # What is not finite is logged as null.
    values = [row[name] if isinstance(row[name], int | float) else np.nan for row in rows]
    best = run.best_score_step() if split == "validation" else None
    return Curve(label, np.array([row["step"] for row in rows]), np.array(values), best=best, **style)


def _style(i: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {"colour": COLOURS[i % n], "dashes": DASHES[(i + i // n) % n]}


def _loss(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    if len(runs) > 1:
        return _drawn(runs, names, "train", "loss", f"training loss{_unit(runs)}")
    train = _curve(runs[0], "train", "loss", "training", width=1.2)
    validation = _curve(runs[0], "validation", "loss", "validation", **_style(1), has_dots=True)
    drawn = html_page.chart(f"loss{_unit(runs)}", [train, validation], levels=_levels(runs, names, "loss"))
    return [drawn] if drawn else []


def _unit(runs: Sequence[RunRecord]) -> str:
    """Return the unit of a cross-entropy; "" for the task of a user, whose loss can be anything."""
    return ", nats" if runs[0].task in BUILT_IN else ""


def _scores(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Return pictures of the scores of the validation."""
    rows = [row for run in runs for row in run.rows if row["split"] == "validation"]
    found = dict.fromkeys(name for row in rows for name in row if name not in history.KEYS)
    figures = []
    for name in found:
        if name != "loss" or len(runs) > 1:
            title = f"validation {name.replace('_', ' ')}{_unit(runs) if name == 'loss' else ''}"
            figures += _drawn(runs, names, "validation", name, title, name == "perplexity")
    return figures


def _training(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    figures = []
    for name, (title, is_log) in TRAINING.items():
        figures += _drawn(runs, names, "train", name, title, is_log)
    return figures


def _drawn(
    runs: Sequence[RunRecord], names: Sequence[str], split: str, name: str, title: str, is_log: bool = False
) -> list[str]:
    """Return the picture of one figure of all runs; none if no run has it."""
    is_score = split == "validation"
    curves = [
        _curve(run, split, name, label, **_style(i), width=1.4, has_dots=is_score)
        for i, (run, label) in enumerate(zip(runs, names, strict=True))
    ]
    drawn = html_page.chart(title, curves, is_log=is_log, levels=_levels(runs, names, name) if is_score else ())
    return [drawn] if drawn else []


def _levels(runs: Sequence[RunRecord], names: Sequence[str], score: str) -> list[Curve]:
    """Return lines for the recorded baselines of a validation score: one, if they are the same."""
    found = {i: x for i, run in enumerate(runs) if (x := run.baselines("validation").get(score)) is not None}
    styles = [(f"baseline of {names[i]}", x, _style(i)["colour"]) for i, x in found.items()]
    if len(set(found.values())) == 1:
        styles = [("baseline", x, html_page.BOUND) for x in set(found.values())]
    return [Curve(label, np.zeros(1), np.array([x]), colour, "2 3", 1.2) for label, x, colour in styles]


# What jaxlm.evaluate has kept


def _evaluations(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    parts = []
    for split in ("validation", "test"):
        found = {name: x for run, name in zip(runs, names, strict=True) if (x := _evaluation(run, split))}
        of_name = dict(zip(names, runs, strict=True))
        bests = {name: result["step"] == of_name[name].best_score_step() for name, result in found.items()}
        if not found:
            continue
        parts.append(f"<h2>Evaluation of the {split} part</h2>")
        if len(runs) == 1:
            ((name, result),) = found.items()
            parts.append(f"<p>Of the checkpoint of step {result['step']:,}{', the best' if bests[name] else ''}.</p>")
        lines = []
        for name, result in found.items():
            scores = dict(result["scores"])
            if result["calibration_error"]:
                scores["calibration_error"] = result["calibration_error"]
            for score, x in scores.items():
                interval = f"{metrics.number(score, x['low'])} to {metrics.number(score, x['high'])}"
                values = [metrics.number(score, x["value"]), interval]
                baseline = "" if x["baseline"] is None else metrics.number(score, x["baseline"])
                where = [name, f"{result['step']:,}{' (best)' if bests[name] else ''}"] if len(runs) > 1 else []
                lines.append([*where, score.replace("_", " "), *values, baseline, x["better"]])
        head = ["run", "step"] if len(runs) > 1 else []
        parts.append(
            html_page.table(
                [*head, "score", "", "95% interval", "baseline", "better"], lines, f"scores of the {split} part"
            )
        )
        by_task: dict[str, dict[str, Any]] = {}
        for name, result in found.items():
            if result["bins"]:
                by_task.setdefault(of_name[name].task, {})[name] = result
        charts = [
            html_page.chart(f"calibration, {task}", _reliability(some), x_label="confidence of a prediction")
            for task, some in by_task.items()
        ]
        if charts:
            parts.append(f'<div class="figures">{"".join(charts)}</div>')
            parts.append(
                '<p class="soft">Calibration: how often predictions of some confidence are right. On the dotted '
                "line they are right as often as the model says.</p>"
            )
        for name, result in found.items():
            parts += _classes(result, name if len(runs) > 1 else "")
    if not parts:
        run = f"{runs[0].path}" if len(runs) == 1 else "RUN"
        command = f"python -m jaxlm.evaluate --checkpoint {run}"
        parts = ["<h2>Evaluation</h2>", f"<p>None is kept yet: <code>{html_page.text(command)}</code> makes one.</p>"]
    return parts


def _evaluation(run: RunRecord, split: str) -> dict[str, Any]:
    path = run.path / f"evaluation_{split}.json"
    try:
        found = utf8.from_json(utf8.read(path))
        return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no evaluation of jaxlm.evaluate ({error!r}); run it again, or remove it") from error


def _reliability(found: dict[str, dict[str, Any]]) -> list[Curve]:
    curves = [Curve("as often as it says", np.array([0.0, 1.0]), np.array([0.0, 1.0]), html_page.BOUND, "2 3", 1.0)]
    for i, (name, result) in enumerate(found.items()):
        x, y = (np.array([b[key] for b in result["bins"]]) for key in ("confidence", "accuracy"))
        curves.append(Curve(name, x, y, **_style(i), has_dots=True))
    return curves


def _classes(result: dict[str, Any], name: str) -> list[str]:
    parts = []
    measure = "probability" if result["confusion"] else "loss"
    if result["confusion"]:
        n = len(result["confusion"])
        classes = result.get("classes") or range(n)  # evaluations of earlier versions have no names
        lines = [[f"label {name}", *map(str, row)] for name, row in zip(classes, result["confusion"], strict=True)]
        has_none = any(row[n] for row in result["confusion"])
        heads = ["", *(f"predicted {name}" for name in classes), "no class"][: n + 1 + has_none]
        parts.append(f"<h3>Confusion{html_page.text(f' of {name}' if name else '')}</h3>")
        parts.append(html_page.table(heads, [line[: len(heads)] for line in lines], "confusion"))
    worst = [
        [x["text"], str(x["label"]), _predicted(x["predicted"]), metrics.number(measure, x[measure])]
        for x in result["worst"]
    ]
    if worst:
        head = ["text", "label", "predicted", "probability of the label" if result["confusion"] else "loss"]
        title = f"Worst errors{f' of {name}' if name and not result['confusion'] else ''}"
        if result["confusion"]:
            n_wrong = sum(sum(row) - row[i] for i, row in enumerate(result["confusion"]))
            title += f": {len(worst)} of {n_wrong:,}"
        parts.append(html_page.folded(title, html_page.table(head, worst, "worst errors")))
    return parts


def _predicted(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# What else the folder has


def _samples(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    parts: list[str] = []
    for run, name in zip(runs, names, strict=True):
        found = samples(run.path / "samples.txt")
        if not found:
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{html_page.text(name)}</h3>")
        steps, best = list(found), run.best_score_step()
        chosen = {steps[i] for i in np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int)}
        chosen |= {best} & set(steps)
        if left_out := len(steps) - len(chosen):
            told = f"{len(chosen)} of {len(steps)} evaluations are shown; the other {left_out} are in "
            parts.append(f"<p>{told}<code>{html_page.text(str(run.path / 'samples.txt'))}</code>.</p>")
        for step in [step for step in steps if step in chosen]:
            is_last = step == steps[-1] and len(runs) == 1
            title = f"step {step:,}{', the best' if step == best else ''}"
            parts.append(html_page.folded(title, f"<pre>{html_page.text(found[step])}</pre>", is_open=is_last))
    if not parts:
        return []
    return ["<h2>Samples over time</h2>", "<p>What the model makes of the same validation samples.</p>", *parts]


def samples(path: Path) -> dict[int, str]:
    """Return the samples of a samples.txt by the update after which they were made."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        history.warn_once(f"{path}: cannot be read ({error.strerror}); passed over")
        text = ""
    pieces = re.split(r"^--- step ([0-9]{1,18}) ---$", text, flags=re.MULTILINE)[1:]
    return {int(step): shown.strip("\n") for step, shown in zip(pieces[::2], pieces[1::2], strict=True)}


def _settings(run: RunRecord, name: str) -> str:
    changed = run.changed_settings()
    lines = [[key, str(x), "" if key in changed else "default"] for key, x in run.settings.items()]
    lines.sort(key=lambda line: bool(line[2]))
    return html_page.folded(
        f"{name}: {len(changed)} of {len(lines)} are no defaults", html_page.table(["setting", "", ""], lines, name)
    )


def _environment(run: RunRecord, name: str) -> str:
    found = environment.read(run.path)
    if not found:
        return f"<p>{html_page.text(name)}: not recorded.</p>"
    keys = ("started", "step", "command", "device", "host", "cores", "system", "python", "packages", "commit")
    lines = []
    for key in keys:
        values = [x.get(key, "") for x in found]
        told = [", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in values]
        lines.append([key if key != "step" else "after updates", *told])
    heads = [f"start {i}" for i in range(1, len(found) + 1)] if len(found) > 1 else [""]
    return html_page.folded(name, html_page.table(["", *heads], lines, f"environment of {name}"), is_open=True)


def _browser(playwright: Any) -> Any:
    """Start Chromium, that of Playwright or else the system's."""
    import shutil

    from playwright.sync_api import Error

    try:
        return playwright.chromium.launch()
    except Error:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if path := next((found for name in names if (found := shutil.which(name))), None):
            return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        raise UserError("--png: there is no Chromium; install it, or run: playwright install chromium") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jaxlm.report",
        description="Writes one page, a file that needs nothing else, about a run, or about several beside each other.",
    )
    parser.add_argument("runs", nargs="+", type=storage.run_path, metavar="RUN", help="run folder, of jaxlm or torchlm")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (report.html in the run, or here for several)"
    )
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture of the page to write, by Chromium")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
