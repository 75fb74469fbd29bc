"""Tables and scores on the console: restored parts, evaluations, and the final summary."""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from jaxlm.data import metrics
from jaxlm.data.samples import Batch
from jaxlm.errors import UserError
from jaxlm.params import layout
from jaxlm.terminal import command
from jaxlm.training import meter, run_dir
from jaxlm.training.resume import Start
from jaxlm.training.run import Run

N_SHOWN = 4  # validation samples shown after an evaluation
N_SKIPPED = 10  # skipped updates that the summary names
FILES = {
    "config.toml": "all settings; a new run of the same: --config with this file",
    "tokenizer.json": "the tokenizer",
    "metrics.jsonl": "scores by step, one JSON object a line",
    "samples.txt": "predictions for some validation samples, by step",
    "log.txt": "a copy of this output",
}
T = TypeVar("T")


def start_table(start: Start, sizes: Mapping[str, Sequence[int]]) -> Table:
    """Return a table of the restored parts; `sizes` are the numbers of parameters of each tensor, by part."""
    title = f"started from {start.path}"
    result = Table("part", "tensors", "parameters", "", title=title, title_style="", title_justify="left")
    for name in (part for part in layout.PARTS if part in sizes):
        origin = "restored" if name in start.parts else "new"
        result.add_row(name, str(len(sizes[name])), f"{sum(sizes[name]):,}", origin)
    position = start.position()
    counters = f"restored: {position.step:,} updates, {position.sample:,} samples"
    result.add_row("counters", "", "", counters if start.kind == "resume" else "new")
    return result


def log_scores(run: Run, i: int, totals: Mapping[str, Any]) -> None:
    """Print, log and keep the validation scores after update `i`; `totals` are by source.

    Raises UserError if the loss is NaN or infinite.
    """
    scores = run.scores(totals)
    if not math.isfinite(scores["loss"]):
        raise meter.diverged(run, scores["loss"], i, max((step for step in run.validation if step < i), default=0))
    run.validation[i] = scores
    run.log.row(i, "validation", scores)
    shown = "  ".join(f"{name} {metrics.number(name, x)}" for name, x in scores.items())
    run.log.say(f"step {i}  validation: {shown}")
    if warning := run.warning(totals):
        run.log.warn(warning)


def shown_samples(run: Run, multiple: int) -> Batch:
    """Return evenly spaced validation samples to show; their number is a multiple of `multiple`."""
    samples = run.data.samples["validation"]
    samples = getattr(samples, "unpacked", samples)
    n_shown = -(-N_SHOWN // multiple) * multiple
    indices = np.linspace(0, len(samples) - 1, n_shown).astype(int)
    return samples.batch(indices, np.zeros_like(indices))


def best_step(run: Run, last: int, saved: Iterable[int]) -> int | None:
    """Return the saved or last step with the lowest validation loss; None if none was scored."""
    return metrics.best({*saved, last}, run.losses())


def best_state(run: Run, last: int, saved: list[int], state: T, restore: Callable[[int, T], T]) -> T:
    """Return the state of `best_step`: restored if it was saved, otherwise `state`, the last one.

    A damaged checkpoint is removed from `saved`, and the next best one is tried.
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
    totals: Mapping[str, Any],
    saves: str,
    is_interrupted: bool,
) -> bool:
    """Print the summary of a run that ended after update `last`; return whether the last state is saved.

    `saved` are the steps on disk, and `saves` is a line about saving. `sizes` are the numbers of all parameters and of
    trained ones. `totals` are the results of the final evaluations of `best_step`, by their names in run.chosen; None
    for one that a signal interrupted.
    """
    say = run.log.say
    _say_ending(run, last, sizes, is_interrupted)
    folder = run.config.run.checkpoint_dir or run.dir / "checkpoints"
    best, lowest = best_step(run, last, saved), metrics.best(run.validation, run.losses())
    if lowest is None:
        say("No scores: the run ended before its first evaluation.")
    else:
        _say_result(run, lowest if best is None else best, totals)
        if lowest not in saved:
            loss = metrics.number("loss", run.losses()[lowest])
            say(f"Step {lowest:,} has the lowest validation loss, {loss}, but no checkpoint in {folder}.")
    if run.skipped:
        some = ", ".join(map(str, run.skipped[:N_SKIPPED])) + (" ..." if len(run.skipped) > N_SKIPPED else "")
        say(f"{len(run.skipped)} updates were skipped, because they were NaN or infinite: {some}")
    say(saves)
    if saved:
        try:
            run_dir.write_settings(run.dir, run.config, run.data)  # in case someone removed them
        except UserError as error:
            run.log.warn(str(error))
    _list_files(run, {run.config.run.checkpoint_dir or "checkpoints": _steps(saved, best, last)} if saved else {})
    where = shlex.quote(str(run.dir))
    if saved:
        say(f"Use it: {command('predict')} --checkpoint {where}; see it: {command('report')} {where}")
    if last in saved:
        resume = f"{run.program} --resume {where}"
        if is_interrupted or not run.is_over(last):
            say(f"Next, resume it: {resume}")
        else:
            is_early = last < run.config.train.max_steps
            say(f"Next, {f'train on: {resume} --train.patience 0' if is_early else _next_command(run)}")
        return True
    if saved:
        elsewhere = f"{run.program} --resume {where} --run.dir NEW, which resumes from step {saved[-1]:,}"
    else:
        elsewhere = f"{_same_command(run)} --run.dir NEW --run.checkpoint-dir FOLDER"
    run.log.warn(
        f"{folder}: the weights of step {last:,} are not saved; free some space, or save elsewhere: {elsewhere}",
        "error",
    )
    return False


def _say_ending(run: Run, last: int, sizes: tuple[int, int], is_interrupted: bool) -> None:
    n_updates, (n_parameters, n_trained) = run.config.train.max_steps, sizes
    minutes, seconds = divmod(int(time.monotonic() - run.started_s), 60)
    ending = "interrupted" if is_interrupted else "finished" if run.is_over(last) else "stopped"
    if run.is_stalled():
        ending += f", with no new lowest validation loss in {run.config.train.patience} evaluations,"
    share = f", {n_trained:,} of them trained" if n_trained < n_parameters else ""
    run.log.say(
        f"\n{run.config.task} {ending} after {minutes} min {seconds} s: {last:,} of {n_updates:,} updates of "
        f"{n_parameters:,} parameters{share}, on {run.data.source.description}"
    )


def _say_result(run: Run, best: int, totals: Mapping[str, Any]) -> None:
    """Print the scores of the best checkpoint beside the baseline, and log those of the final evaluations."""
    scores = {"validation": run.validation[best]}
    for name, by_source in totals.items():
        if by_source is not None:
            split = name.removeprefix("final_")
            scores[split] = run.scores(by_source)
            run.log.row(best, name, scores[split])
            if split == "test" and (warning := run.warning(by_source)):
                run.log.warn(f"test: {warning}")
    left = " of the remaining checkpoints" if min(run.losses().values()) < run.losses()[best] else ""
    title = f"scores of step {best}, the best by validation loss{left}; baseline: {run.task.baseline_name}"
    table = Table("", *(column for split in scores for column in (split, "baseline")), title=title, title_style="")
    for name in run.baselines["validation"]:
        if name not in scores["validation"]:  # the row in the log was lost
            continue
        better = "lower" if run.is_lower_better(name) else "higher"
        numbers = (x for split in scores for x in (scores[split].get(name), run.baselines[split].get(name)))
        table.add_row(f"{name} ({better} is better)", *(metrics.number(name, x) for x in numbers))
    run.log.say(table)
    loss, baseline = (of_split["validation"]["loss"] for of_split in (scores, run.baselines))
    if not baseline > 0:
        run.log.say("All validation samples have the same answer, so the baseline is perfect: scores mean little.")
    elif not loss < baseline:
        run.log.say("The model's loss is not below the baseline's: try more updates, or other settings.")
    if run.data.source.test_refusal:
        run.log.say(run.data.source.test_refusal)


def _list_files(run: Run, checkpoints: dict[str, str]) -> None:
    """Print which files the run has written, and which of them are incomplete."""
    run.log.flush()
    unwritten = run.log.unwritten()
    files = checkpoints | {name: what for name, what in FILES.items() if (run.dir / name).is_file()}
    run.log.say(f"\nEverything is in {run.dir}:" if files else f"\n{run.dir} is empty.")
    for name, what in files.items():
        run.log.say(f"  {name:<14} {what}" + (f"; {unwritten[name]}" if name in unwritten else ""))


def _steps(saved: list[int], best: int | None, last: int) -> str:
    """Return a list of the saved steps, with the best and the last marked."""
    notes = {last: ", the last"}
    if best is not None:
        notes[best] = ", the best" if best != last else ", the best and the last"
    texts = [f"step {step}{notes.get(step, '')}" for step in saved]
    return ", and ".join(texts) if len(texts) == 2 else "; ".join(texts)


def _same_command(run: Run) -> str:
    """Return the command of a run with the same settings."""
    path = run.dir / "config.toml"
    return run.program + (f" --config {shlex.quote(str(path))}" if path.is_file() else "")


def _next_command(run: Run) -> str:
    """Return a suggestion for a run that has made all of its updates."""
    if run.config.data.path or run.config.data.hub or run.config.data.sources:
        elsewhere = " --run.checkpoint-dir NEW" if run.config.run.checkpoint_dir else ""
        n_updates = 2 * run.config.train.max_steps
        return f"train for longer: {_same_command(run)}{elsewhere} --train.max-steps {n_updates}"
    files = {"text": "your_text.txt", "labels": "reviews.tsv", "values": "scores.tsv", "pairs": "questions.jsonl"}
    files |= {"tags": "names.conll", "couples": "pairs.tsv"}
    own = files[run.task.samples.reads]
    return f"train on your own file: {run.program} --task {run.config.task} --data.path {own}"
