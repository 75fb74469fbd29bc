"""A run, and how it starts: its folder, its data, and the lines that tell what is about to run. Knows no framework."""

import contextlib
import functools
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import cache, metrics, prepare, sources, tokenization
from jaxlm.data.position import Position
from jaxlm.errors import CLEANUPS, UserError, slow
from jaxlm.io import storage, temporary
from jaxlm.training import environment, history, log, run_dir, teacher
from jaxlm.training.history import SAVED
from jaxlm.training.log import RunLog
from jaxlm.training.resume import LOCK, Start
from jaxlm.training.teacher import Teacher

N_CLASSES = 30  # that are shown at the start
# Each process may have these otherwise: what lies there is compared instead.
OWN_SETTINGS = ("data.cache_dir", "data.path", "data.validation_path", "data.test_path", "tokenizer.path")
UNSAVED = 1  # exit status of a run whose last state could not be saved


@dataclass(frozen=True)
class Run:
    """All that stays the same during a run. `task` is of a class like tasks.Task, of either framework."""

    config: Config
    task: Any
    data: prepare.Data
    dir: Path
    log: RunLog
    started_s: float
    program: str  # the command that started it, without settings
    start: Start = Start()
    rewarmed: tuple[int, float] | None = None  # the update at which a re-warmup begins, and the rate before it
    lock: TextIO | contextlib.ExitStack | None = None  # of the run folder and its checkpoints, until this is closed
    validation: dict[int, metrics.Scores] = field(default_factory=dict)  # scores so far, by step
    skipped: list[int] = field(default_factory=list)  # updates that were no numbers and were not made
    undo: list[Callable[[], None]] = field(default_factory=list)  # what removes the folder; empty from update 1 on

    @functools.cached_property
    @slow("reading the teacher")
    def teacher(self) -> Teacher | None:
        """The model to learn from, read at first use: by all processes at a time, as Orbax wants it."""
        if self.start.teacher is None:
            return None
        is_same = self.start.kind == "resume"
        assert self.start.teacher.path is not None, "it was found"
        return teacher.load(self.start.teacher.path, self.start.info.get("teacher", "") if is_same else "")

    @functools.cached_property
    @slow("scoring the baselines")
    def baselines(self) -> dict[str, metrics.Scores]:
        """The scores of the best guess that looks at no input, of each split that is scored."""
        splits = ("validation", *(["test"] if has_test(self) else []))
        return {split: self.task.baseline(self.data.samples[split]) for split in splits}

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the loggers, and let go of the run folder; remove it after an error before the first update."""
        if exception[0] is not None and self.undo:
            self.undo[0]()
        else:
            self.log.close()
        if self.lock is not None:
            self.lock.close()

    def losses(self) -> dict[int, float]:
        """Return the validation losses so far, by step."""
        return {step: scores["loss"] for step, scores in self.validation.items()}


@contextlib.contextmanager
def started(
    config: Config,
    origins: dict[str, str],
    start: Start,
    tasks: dict[str, Any],
    device: str,
    started_s: float,
    program: str = "python -m jaxlm.train",
) -> Iterator[Run]:
    """Make the run folder, prepare the data, and tell what is about to run; `tasks` are the task classes by name.

    Raises UserError for bad input. Then, or if anything inside the `with` block raises, or in that of the Run before
    its first update, the run folder is removed; one in which a run goes on stays as it was, but for rows past its
    checkpoint.
    """

    def clean() -> None:
        if made or not start.is_retry and not start.run_dir:
            run_dir.remove(folder, made)
            for path in place_made:
                storage.remove(path) if path.name == LOCK else run_dir.remove_empty([path])
        elif is_emptied:
            run_dir.empty(folder)
        temporary.remove(cache.user_cache_dir(config.data.cache_dir), temporary.is_own)
        run_log.console.show_cursor()  # which a progress bar hides

    if config.task not in tasks:
        raise UserError(f"task={config.task}: {program} has no such task; it has {', '.join(tasks)}")
    run_log = RunLog()
    log.check_loggers(config)
    folder, made = run_dir.make(config, start)
    is_emptied = False
    place = storage.checkpoints(folder, config.run.checkpoint_dir)
    place_made: list[Path] = []
    held = contextlib.ExitStack()
    try:
        # Before anything in the folder is touched, which may be another process's.
        held.enter_context(run_dir.lock(folder))
    except UserError:
        run_dir.remove_empty(made)
        raise
    CLEANUPS.append(clean)
    try:
        place_made += run_dir.lock_checkpoints(held, folder, config.run.checkpoint_dir)
        task_class = tasks[config.task]
        config, data = prepare.prepare(
            config, task_class.samples, task_class(config).embedded, run_log.bytes_bar, start.known_classes()
        )
        start.check(data)
        if start.teacher:
            start.teacher.check(data)
        run_dir.set_aside(start, place, folder, run_log)
        if start.is_retry:
            is_emptied = True
            run_dir.empty(folder)
        if not start.run_dir:
            run_dir.write(folder / SAVED, run_dir.saved(0))
        else:
            run_dir.record_saved(folder, start.position().step)
        run_dir.write_settings(folder, config, data)
        loggers = log.open_loggers(config, run_log, folder, configs.flat(config), start.position().step)
        run_log.open(folder, loggers)
        validation: dict[int, metrics.Scores] = {}
        if start.kind == "resume" and start.path and start.run:
            step = start.position().step
            validation = history.restore(folder, step, start.run, start.path.parent, run_log.warn)
        used = task_class.settings
        unused = {name for task in tasks.values() for name in task.settings if name not in used}
        rewarmed = start.rewarmed(config.train)
        _announce(config, origins, start, rewarmed, data, folder, device, unused, run_log)
        run_log.append(environment.FILE, json.dumps(environment.describe(start.position().step, device)) + "\n")
        task = task_class(config, data.source.classes)
        this = Run(config, task, data, folder, run_log, started_s, program, start, rewarmed, held, validation)
        this.undo.append(clean)
        run_dir.write(folder / history.BASELINE, _recorded(this))
        yield this
    except BaseException:
        clean()
        held.close()
        raise
    finally:
        CLEANUPS.remove(clean)


def _announce(
    config: Config,
    origins: dict[str, str],
    start: Start,
    rewarmed: tuple[int, float] | None,
    data: prepare.Data,
    run_dir: Path,
    device: str,
    unused: set[str],
    run_log: RunLog,
) -> None:
    """Print what is about to run, and where each value that is no default came from."""
    run_log.say(f"run     {run_dir}")
    run_log.say(f"data    {data.source.description}")
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in data.samples.items())
    run_log.say(f"samples {sizes}; of {config.model.seq_len} tokens, vocabulary {config.model.vocab_size:,}")
    if data.source.classes:
        labels = data.samples["train"].split.labels  # type: ignore[union-attr]
        counts = np.bincount(labels, minlength=len(data.source.classes))
        shown = [f"{name} ({n:,})" for name, n in zip(data.source.classes, counts, strict=True)]
        run_log.say(f"classes {sources.listed(shown, N_CLASSES)}")
    run_log.say(f"device  {device}")
    if start.teacher:
        n = start.teacher.config().model.n_layers
        run_log.say(f"teacher {start.teacher.path}, {n} layers; the loss of train is the weighted one of distill.*")
    if start.kind == "resume":
        step = start.info["step"]
        run_log.say(f"resumes {start.path}, after {step:,} updates and {start.info['sample_iter']:,} samples")
        for name, old, new in start.changes(config):
            run_log.say(f"  {name} = {new!r}, was {old!r}")
        if rewarmed:
            run_log.say(f"  the rate re-warms from {rewarmed[1]:.3e} for {config.train.rewarmup_steps} updates")
    for name, origin in origins.items():
        is_stored = start.kind == "resume" and origin == str(start.path)
        if configs.get(config, name) != configs.get(Config(), name) and not is_stored and name != "resume":
            if Path(origin).parent == configs.presets_dir():
                origin = f"preset {origin}"
            run_log.say(f"  {name} = {configs.get(config, name)!r}  ({origin})")
    for note in data.notes:
        run_log.say(f"note: {note}")
    for line in configs.warnings(config, origins, unused):
        run_log.warn(line)


def _recorded(run: Run) -> str:
    """Return the JSON of baseline.json."""
    scores = {
        split: {name: x if math.isfinite(x) else None for name, x in baseline.items()}
        for split, baseline in run.baselines.items()
    }
    told = {"name": run.task.baseline_name, "lower_is_better": run.task.lower_is_better, **scores}
    return json.dumps(told, indent=2) + "\n"


def info(run: Run, i: int, position: Position, rate: float) -> dict[str, Any]:
    """Return what a checkpoint after update `i`, made with `rate`, tells of itself."""
    return {
        "step": i,
        "task": run.config.task,
        "rate": rate,
        "sample_iter": position.after(i - 1, run.config.train),
        "config": configs.flat(run.config),
        "tokenizer": tokenization.fingerprint(run.data.tokenizer),
        "data": run.data.source.fingerprint,
        "classes": run.data.source.classes,
        "teacher": run.teacher.fingerprint if run.teacher else "",
        "rewarmed": run.rewarmed,
        "skipped": position.skipped,
        "version": importlib.metadata.version("jaxlm"),
    }


def identity(run: Run) -> dict[str, Any]:
    """Return what has to be the same in all processes of a run, once there are data."""
    return {
        "the data": run.data.source.fingerprint,
        "the tokenizer": tokenization.fingerprint(run.data.tokenizer),
        "the teacher": run.teacher.fingerprint if run.teacher else "",
        "model.vocab_size": run.config.model.vocab_size,
    } | {f"the number of {split} samples": len(samples) for split, samples in run.data.samples.items()}


def has_test(run: Run) -> bool:
    """Return whether there is a test part, with labels."""
    return len(run.data.samples["test"]) > 0 and not run.data.source.test_refusal


def identity_at_start(config: Config, start: Start) -> dict[str, Any]:
    """Return what has to be the same in all processes of a run before there are any data."""
    names = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "datasets")
    versions = {f"the version of {name}": importlib.metadata.version(name) for name in names}
    settings = {name: value for name, value in configs.flat(config).items() if name not in OWN_SETTINGS}
    begun = {"what it starts from": start.kind, "the step of its checkpoint": start.info.get("step")}
    return {**settings, **begun, **versions, "the version of Python": platform.python_version()}
