"""What a run prints of its scores: at each evaluation, and at its end."""

import math
import shlex
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from jaxlm.data import metrics
from jaxlm.data.samples import Batch
from jaxlm.errors import UserError
from jaxlm.training import meter, run_dir
from jaxlm.training.run import Run

N_SHOWN = 4  # validation samples of the debug dump
T = TypeVar("T")


def tell_scores(run: Run, i: int, totals: Any) -> None:
    """Log and print the scores of the validation part after update `i`, and keep them."""
    scores = run.task.scores(totals)
    if not math.isfinite(scores["loss"]):
        raise meter.diverged(run, scores["loss"], i, max((at for at in run.validation if at < i), default=0))
    run.validation[i] = scores
    run.log.row(i, "validation", scores)
    shown = "  ".join(f"{name} {metrics.number(name, x)}" for name, x in scores.items())
    run.log.say(f"step {i}  validation: {shown}")
    if warning := run.task.warning(totals):
        run.log.warn(warning)


def shown_samples(run: Run, multiple: int) -> Batch:
    """Return the validation samples of the debug dump, spread over the part; their number is one of `multiple`."""
    samples = run.data.samples["validation"]
    n_rows = -(-N_SHOWN // multiple) * multiple
    indices = np.linspace(0, len(samples) - 1, n_rows).astype(int)
    return samples.batch(indices, np.zeros_like(indices))


def best_step(run: Run, last: int, saved: Iterable[int]) -> int | None:
    """Return the step with the lowest validation loss among those saved and the last one; None if none has one."""
    return metrics.best({*saved, last}, run.losses())


def best_state(run: Run, last: int, saved: list[int], state: T, restore: Callable[[int, T], T]) -> T:
    """Return the state of `best_step`: restored, or that of the last update, `state`, where it is not saved.

    A checkpoint that is found damaged is removed from `saved`, and the next best is taken.
    """
    while (best := best_step(run, last, saved)) in saved:
        try:
            return restore(best, state)
        except UserError as error:
            run.log.warn(str(error))
            saved.remove(best)
    return state


def sum_up(
    run: Run,
    last: int,
    saved: list[int],
    sizes: tuple[int, int],
    test_totals: Any,
    saves: str,
    is_interrupted: bool,
) -> bool:
    """Print the summary of a run that ended after update `last`; return whether that state is saved.

    `saved` are the steps that are on the disk, and `saves` is a line on them. `sizes` are the numbers of all
    parameters, and of those that are trained. `test_totals` are those of `best_step`; None if it was not tested.
    """
    n_updates = run.config.train.max_steps
    seconds = int(time.monotonic() - run.started_s)
    n_parameters, n_trained = sizes
    share = f", {n_trained:,} of them trained" if n_trained < n_parameters else ""
    ending = "interrupted" if is_interrupted else "finished" if last == n_updates else "stopped"
    run.log.say("")
    run.log.say(
        f"{run.config.task} {ending} after {seconds // 60} min {seconds % 60} s: {last:,} of {n_updates:,} updates of "
        f"{n_parameters:,} parameters{share}, on {run.data.source.description}"
    )
    folder = run.config.run.checkpoint_dir or run.dir / "checkpoints"
    best, lowest = best_step(run, last, saved), metrics.best(run.validation, run.losses())
    if lowest is None:
        run.log.say("There are no scores: the run ended before its first evaluation.")
    else:
        _tell_result(run, lowest if best is None else best, test_totals)
        if lowest not in saved:
            loss = metrics.number("loss", run.losses()[lowest])
            run.log.say(f"Step {lowest:,} has the lowest validation loss, {loss}, but no checkpoint in {folder}.")
    if run.skipped:
        run.log.say(f"{len(run.skipped)} updates were skipped, since they were no numbers: {_some(run.skipped)}")
    run.log.say(saves)
    if saved:
        try:
            run_dir.write_settings(run.dir, run.config, run.data)  # someone may have removed them
        except UserError as error:
            run.log.warn(str(error))
    run.log.flush()
    files = [
        ("config.toml", "all settings; a new run of the same: --config with this file"),
        ("tokenizer.json", "the tokenizer"),
        ("metrics.jsonl", "scores by step, one JSON object a line"),
        ("samples.txt", "what the model made of some validation samples, by step"),
        ("log.txt", "what is printed here"),
    ]
    files = [(name, what) for name, what in files if (run.dir / name).is_file()]
    if saved:
        files.insert(0, (run.config.run.checkpoint_dir or "checkpoints", _steps(saved, best, last)))
    run.log.say(f"\nEverything is in {run.dir}:" if files else f"\nNothing is left in {run.dir}.")
    unwritten = run.log.unwritten()
    for name, what in files:
        run.log.say(f"  {name:<14} {what}" + (f"; {unwritten[name]}" if name in unwritten else ""))
    where = shlex.quote(str(run.dir))
    if saved:
        run.log.say(f"Use it: python -m jaxlm.predict --checkpoint {where}; see it: python -m jaxlm.report {where}")
    if last in saved:
        go_on = f"go on with it: {run.program} --resume {where}"
        run.log.say(f"Next, {go_on if last < n_updates else _next_command(run)}")
        return True
    settings = f" --config {shlex.quote(str(run.dir / 'config.toml'))}" if (run.dir / "config.toml").is_file() else ""
    elsewhere = f"{run.program}{settings} --run.dir NEW --run.checkpoint-dir FOLDER"
    if saved:
        elsewhere = f"{run.program} --resume {where} --run.dir NEW, which goes on from step {saved[-1]:,}"
    run.log.warn(
        f"{folder}: the weights of step {last:,} are not saved; free some space, or save elsewhere: {elsewhere}",
        "error",
    )
    return False


def _steps(saved: list[int], best: int | None, last: int) -> str:
    """Return a list of the steps that are on the disk, with the best and the last marked."""
    notes = {last: ["the last"]}
    if best is not None:
        notes[best] = ["the best"] if best != last else ["the best and the last"]
    texts = [", ".join([f"step {step}", *notes.get(step, [])]) for step in saved]
    return ", and ".join(texts) if len(texts) == 2 else "; ".join(texts)


def _tell_result(run: Run, best: int, test_totals: Any) -> None:
    """Print the scores of the best checkpoint beside the baseline, and log those of the test part."""
    scores = {"validation": run.validation[best]}
    if test_totals is not None:
        scores["test"] = run.task.scores(test_totals)
        run.log.row(best, "test", scores["test"])
        if warning := run.task.warning(test_totals):
            run.log.warn(f"test: {warning}")
    baselines = run.baselines
    title = f"scores of step {best}, the best by validation loss"
    if min(run.losses().values()) < run.losses()[best]:
        title += " of those that are left"
    title += f"; baseline: {run.task.baseline_name}"
    table = Table("", *(column for split in scores for column in (split, "baseline")), title=title, title_style="")
    for name in baselines["validation"]:
        if any(name not in x for x in scores.values()):  # of a checkpoint whose row in the log was lost
            continue
        pairs = ((scores[split][name], baselines[split][name]) for split in scores)
        better = "lower" if name in run.task.lower_is_better else "higher"
        table.add_row(f"{name} ({better} is better)", *(metrics.number(name, x) for pair in pairs for x in pair))
    run.log.say(table)
    if not baselines["validation"]["loss"] > 0:
        run.log.say("The baseline is never wrong on validation, whose samples have one answer: scores say little.")
    elif not scores["validation"]["loss"] < baselines["validation"]["loss"]:
        run.log.say("The model is no better than the baseline by loss: try more updates, or other settings.")
    if run.data.source.test_refusal:
        run.log.say(run.data.source.test_refusal)


def _some(steps: list[int], most: int = 10) -> str:
    return ", ".join(map(str, steps[:most])) + (" ..." if len(steps) > most else "")


def _next_command(run: Run) -> str:
    again = f"{run.program} --config {shlex.quote(str(run.dir / 'config.toml'))}"
    if run.config.run.checkpoint_dir:
        again += " --run.checkpoint-dir NEW"
    if run.config.data.path or run.config.data.hub:
        return f"train for longer: {again} --train.max-steps {2 * run.config.train.max_steps}"
    own = {"text": "your_text.txt", "labels": "reviews.tsv", "pairs": "questions.jsonl"}[run.task.samples.reads]
    return f"train on a file of yours: {run.program} --task {run.config.task} --data.path {own}"
