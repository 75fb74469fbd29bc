"""A run and its start: run folder, data, and the lines that describe the run."""

import contextlib
import functools
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import loader, metrics, mixture, prepare, tokenization
from jaxlm.data.labels import listed
from jaxlm.data.parts import ANNOTATED, LABELLED
from jaxlm.data.position import Position
from jaxlm.errors import CLEANUPS, UserError, slow
from jaxlm.io import storage, temporary
from jaxlm.training import environment, history, log, run_dir, teacher
from jaxlm.training.log import RunLog
from jaxlm.training.resume import Start
from jaxlm.training.teacher import Teacher

N_CLASSES = 30  # that are printed at the start
MOST_SEQ_LEN = 512  # tokens of a sample, where the data tell how many
# Paths may differ between processes; their contents are compared.
OWN_SETTINGS = ("data.cache_dir", "data.path", "data.validation_path", "data.test_path", "tokenizer.path")
LOSS_OF = "loss_"  # prefix of the name of the loss on one of several sources
UNSAVED = 1  # exit status of a run whose last state could not be saved


@dataclass(frozen=True)
class Run:
    """One training: what stays the same from start to end, and the scores so far."""

    config: Config
    task: Any  # a tasks.Task of either framework
    data: prepare.Data
    dir: Path
    log: RunLog
    started_s: float
    program: str  # the command that started it, without settings
    start: Start = Start()
    rewarmed: tuple[int, float] | None = None  # the update at which a re-warmup begins, and the rate before it
    lock: TextIO | contextlib.ExitStack | None = None  # locks run folder and checkpoints until it is closed
    validation: dict[int, metrics.Scores] = field(default_factory=dict)  # scores by step
    skipped: list[int] = field(default_factory=list)  # updates skipped because of NaN or infinity
    undo: list[Callable[[], None]] = field(default_factory=list)  # removes the folder; empty after the first update

    @functools.cached_property
    @slow("reading the teacher")
    def teacher(self) -> Teacher | None:
        """The model to distil; read at first use, because Orbax requires that all processes read it together."""
        if self.start.teacher is None:
            return None
        path, is_resumed = self.start.teacher.path, self.start.kind == "resume"
        assert path is not None, "a teacher is always read from a checkpoint"
        return teacher.load(path, self.start.info.get("teacher", "") if is_resumed else "")

    @functools.cached_property
    @slow("scoring the baselines")
    def baselines(self) -> dict[str, metrics.Scores]:
        """The scores of the best constant prediction, for each scored split."""
        found = {}
        for split in ("validation", *(["test"] if has_test(self) else [])):
            found[split] = self.task.baseline(self.data.samples[split])
            if len(parts := mixture.parts_of(self.data.samples[split])) > 1:
                losses = {loss_of(name): self.task.baseline(part)["loss"] for name, part in parts.items() if len(part)}
                found[split] = {**found[split], **losses}
        return found

    @functools.cached_property
    @slow("choosing the samples to score")
    def chosen(self) -> dict[str, dict[str, loader.Chosen]]:
        """The samples of each evaluation, by source: "validation" in training; "final_validation", "test" at the end.

        "final_validation" is missing if it would score no more than "validation". Several sources have equal shares of
        the tokens to score.
        """
        data, samples = self.config.data, self.data.samples
        reads_labels = self.task.samples.reads in ANNOTATED
        in_training, at_end = (0, 0) if reads_labels else (data.validation_tokens, data.final_tokens)

        def choose(split: str, *n_tokens: int) -> list[dict[str, loader.Chosen]]:
            parts = {name: part for name, part in mixture.parts_of(samples[split]).items() if len(part)}
            numbers = [-(-n // max(len(parts), 1)) for n in n_tokens]
            found = {name: loader.choose(part, split, numbers, data.split_seed) for name, part in parts.items()}
            return [{name: chosen[i] for name, chosen in found.items()} for i in range(len(numbers))]

        during, final = choose("validation", in_training, at_end)
        found = {"validation": during}
        if sum(x.n_tokens for x in final.values()) > sum(x.n_tokens for x in during.values()):
            found["final_validation"] = final
        if has_test(self):
            (found["test"],) = choose("test", at_end)
        return found

    def scores(self, totals: Mapping[str, Any]) -> metrics.Scores:
        """Return the scores over all sources together, and the loss of each if there are several."""
        summed: dict[str, Any] = {}
        for of_source in totals.values():
            metrics.add(summed, of_source)
        scores = self.task.scores(summed)
        if len(totals) > 1:
            losses = {loss_of(name): self.task.scores(of_source)["loss"] for name, of_source in totals.items()}
            scores = {**scores, **losses}
        return scores

    def warning(self, totals: Mapping[str, Any]) -> str:
        """Return a warning if the totals of a source look like those of a collapsed model, or ""."""
        return next(filter(None, map(self.task.warning, totals.values())), "")

    def is_lower_better(self, score: str) -> bool:
        return score in self.task.lower_is_better or score.startswith(LOSS_OF)

    @property
    def ending(self) -> list[str]:
        """The names in `chosen` of the final evaluations."""
        return [name for name in self.chosen if name != "validation"]

    def is_over(self, i: int) -> bool:
        """Return whether there are no updates left after `i`: all are made, or train.patience has ended the run."""
        return i >= self.config.train.max_steps or self.is_stalled()

    def is_stalled(self) -> bool:
        train = self.config.train
        return bool(train.patience) and metrics.is_stalled(self.losses(), train.eval_interval, train.patience)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the loggers and unlock the run folder; after an error before the first update, remove it."""
        if exception[0] is not None and self.undo:
            self.undo[0]()
        else:
            self.log.close()
        if self.lock is not None:
            self.lock.close()

    def losses(self) -> dict[int, float]:
        """Return the validation losses by step."""
        return {step: scores["loss"] for step, scores in self.validation.items()}


def loss_of(source: str) -> str:
    return f"{LOSS_OF}{source}"


@contextlib.contextmanager
def started(
    config: Config,
    origins: dict[str, str],
    start: Start,
    tasks: dict[str, Any],
    device: str,
    started_s: float,
    program: str,
) -> Iterator[Run]:
    """Create the run folder, prepare the data, and describe the run; `tasks` are the task classes by name.

    Raises UserError for bad input. After an error before the first update, the run folder is removed; the folder of a
    resumed run stays, with its logs truncated at the checkpoint.
    """
    if config.task not in tasks:
        raise UserError(f"task={config.task}: {program} has no such task; it has {', '.join(tasks)}")
    if config.data.pack == "documents" and not tasks[config.task].can_pack():
        mend = "leave it out, or pass `segments` on in its loss and set `packs = True` there (jaxlm/tasks/README.md)"
        raise UserError(f"data.pack=documents: the loss of task={config.task} takes no packed rows; {mend}")
    log.check_loggers(config)
    task_class, step = tasks[config.task], start.position().step
    run_log = RunLog()
    claim = run_dir.Claim(config, start)
    folder = claim.path

    def undo() -> None:
        claim.undo()
        temporary.remove(temporary.user_cache_dir(config.data.cache_dir), temporary.is_own)
        run_log.console.show_cursor()  # a progress bar hides it

    CLEANUPS.append(undo)
    try:
        claim.add_checkpoints(config.run.checkpoint_dir)
        config, data = prepare.prepare(
            *(config, task_class.samples, task_class(config).embedded, run_log.pass_bar, start.known_classes()),
            _most_seq_len(config, origins, start, task_class.samples.reads),
        )
        start.check(data)

        run_dir.set_aside(start, storage.checkpoints(folder, config.run.checkpoint_dir), folder, run_log)
        if start.is_retry:
            claim.empty()
        run_dir.record_saved(folder, step if start.run_dir else 0)
        run_dir.write_settings(folder, config, data)
        run_log.open(folder, log.open_loggers(config, run_log, folder, step))
        validation: dict[int, metrics.Scores] = {}
        if start.kind == "resume" and start.path and start.run:
            validation = history.restore(folder, step, start.run, start.path.parent, run_log.warn)

        task, rewarmed = task_class(config, data.source.classes), start.rewarmed(config.train)
        run = Run(config, task, data, folder, run_log, started_s, program, start, rewarmed, claim.locks, validation)
        run.undo.append(undo)
        _announce(run, origins, device, {name for task in tasks.values() for name in task.settings})
        run_log.append(environment.FILE, json.dumps(environment.describe(step, device)) + "\n")
        run_dir.write(folder / history.BASELINE, _baseline_json(run))
        yield run
    except BaseException:
        undo()
        claim.locks.close()
        raise
    finally:
        CLEANUPS.remove(undo)


def _most_seq_len(config: Config, origins: dict[str, str], start: Start, reads: str) -> int:
    """Return the largest model.seq_len that may be taken from the data; 0: it is set, or not to be taken from there.

    That of a preset is for its embedded data. A base model with learned positions has the most in its settings.
    """
    presets = configs.presets_dir()
    own = {str(presets / f"{config.task}.toml"), str(presets / "glue.toml")}
    origin = origins.get("model.seq_len", "")
    is_of_base = start.kind == "base" and origin == str(start.path)
    is_free = not origin or origin in own or is_of_base
    has_rows_of_texts = reads in LABELLED and bool(config.data.path or config.data.hub) and config.data.pack == "none"
    if not (is_free and has_rows_of_texts) or start.kind == "resume" or start.teacher:
        return 0
    return min(MOST_SEQ_LEN, config.model.seq_len) if is_of_base else MOST_SEQ_LEN


def _announce(run: Run, origins: dict[str, str], device: str, task_settings: set[str]) -> None:
    """Describe the run: data, samples, devices, start, and the origin of each setting that is not a default.

    `task_settings` are the settings that only some tasks use.
    """
    config, start, data, say = run.config, run.start, run.data, run.log.say
    say(f"run     {run.dir}")
    say(f"data    {data.source.description}")
    sizes = ", ".join(f"{len(samples):,} {split}" for split, samples in data.samples.items())
    say(f"samples {sizes}; of {config.model.seq_len} tokens, vocabulary {config.model.vocab_size:,}")
    if data.source.classes:
        labels = data.samples["train"].labels  # type: ignore[union-attr]
        counts = labels.sum(axis=0) if labels.ndim == 2 else None  # a text may have several
        counts = np.bincount(labels[labels >= 0], minlength=len(data.source.classes)) if counts is None else counts
        shown = [f"{name} ({n:,})" for name, n in zip(data.source.classes, counts, strict=True)]
        say(f"classes {listed(shown, N_CLASSES)}")
    if isinstance(data.samples["train"], mixture.Mix):
        for i, line in enumerate(data.samples["train"].describe(config.train, start.position())):
            say(f"{'' if i else 'sources':<7} {line}")
    for i, line in enumerate(_cost(run)):
        say(f"{'' if i else 'scores':<7} {line}")
    say(f"device  {device}")
    if start.teacher:
        n = start.teacher.config().model.n_layers
        say(f"teacher {start.teacher.path}, {n} layers; the training loss is weighted by distill.*")
    if start.kind == "resume":
        say(f"resumes {start.path}, after {start.info['step']:,} updates and {start.info['sample_iter']:,} samples")
        for name, old, new in start.changes(config):
            say(f"  {name} = {new!r}, was {old!r}")
        if run.rewarmed:
            say(f"  the rate warms up again from {run.rewarmed[1]:.3e} for {config.train.rewarmup_steps} updates")
    for name, origin in origins.items():
        is_stored = start.kind == "resume" and origin == str(start.path)
        value = configs.get(config, name)
        if value != configs.get(Config(), name) and not is_stored and name != "resume":
            kind = "preset " if Path(origin).parent == configs.presets_dir() else ""
            say(f"  {name} = {value!r}  ({kind}{origin})")
    for note in data.notes:
        say(f"note: {note}")
    for line in configs.warnings(config, origins, task_settings.difference(run.task.settings)):
        run.log.warn(line)


def _cost(run: Run) -> Iterator[str]:
    """Yield lines on what is scored and how long that takes: a scored batch costs a third of an update's batch."""
    train, chosen = run.config.train, run.chosen

    def updates(names: Iterable[str]) -> int:
        found = [part for name in names for part in chosen[name].values()]
        n_batches = sum(-(-len(part.indices) // train.batch_size) for part in found)
        return max(1, round(n_batches / (3 * train.accumulate)))

    def counted(name: str) -> str:
        parts = list(chosen[name].values())
        n, n_all, n_tokens = (
            sum(len(x.indices) for x in parts),
            len(run.data.samples[parts[0].split]),
            sum(x.n_tokens for x in parts),
        )
        shown = f"{n:,} of {n_all:,}" if n < n_all else f"all {n_all:,}"
        return f"{shown} {parts[0].split} samples ({n_tokens:,} tokens)"

    often = f"every {train.eval_interval:,} updates, which takes as long as about {updates(['validation']):,}"
    yield f"{counted('validation')} {often}"
    if run.ending:
        n = updates(run.ending)
        is_bounded = n > train.max_steps and run.task.samples.reads not in ANNOTATED
        bound = " (data.final_tokens bounds it)" if is_bounded else ""
        yield f"{' and '.join(map(counted, run.ending))} at the end, which takes as long as about {n:,}{bound}"


def _baseline_json(run: Run) -> str:
    """Return the content of baseline.json."""
    scores = {
        split: {name: x if math.isfinite(x) else None for name, x in baseline.items()}
        for split, baseline in run.baselines.items()
    }
    lower = [
        name for name in dict.fromkeys((*run.task.lower_is_better, *scores["validation"])) if run.is_lower_better(name)
    ]
    content = {"name": run.task.baseline_name, "lower_is_better": lower, **scores}
    return json.dumps(content, indent=2) + "\n"


def has_test(run: Run) -> bool:
    """Return whether there is a test split with labels."""
    return len(run.data.samples["test"]) > 0 and not run.data.source.test_refusal


def info(run: Run, i: int, position: Position, rate: float) -> dict[str, Any]:
    """Return the metadata of a checkpoint after update `i`, which was made with learning rate `rate`."""
    sample = position.after(i - 1, run.config.train)
    return {
        "step": i,
        "task": run.config.task,
        "rate": rate,
        "sample_iter": sample,
        "config": configs.flat(run.config),
        "tokenizer": tokenization.fingerprint(run.data.tokenizer),
        "data": run.data.source.fingerprint,
        "classes": run.data.source.classes,
        "teacher": run.teacher.fingerprint if run.teacher else "",
        "rewarmed": run.rewarmed,
        "skipped": position.skipped,
        "mix": mixture.state_of(run.data.samples["train"], run.config.train, position, sample),
        "version": importlib.metadata.version("jaxlm"),
    }


def identity_at_start(config: Config, start: Start) -> dict[str, Any]:
    """Return what must be equal in all processes before they read data: settings, start and versions."""
    names = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "datasets")
    return {
        **{name: value for name, value in configs.flat(config).items() if name not in OWN_SETTINGS},
        "data.sources": [
            {key: value for key, value in source.items() if f"data.{key}" not in OWN_SETTINGS}
            for source in config.data.sources
        ],
        "what it starts from": start.kind,
        "the step of its checkpoint": start.info.get("step"),
        **{f"the version of {name}": importlib.metadata.version(name) for name in names},
        "the version of Python": platform.python_version(),
    }


def identity(run: Run) -> dict[str, Any]:
    """Return what must be equal in all processes after they have read the data."""
    return {
        "the data": run.data.source.fingerprint,
        "the tokenizer": tokenization.fingerprint(run.data.tokenizer),
        "the teacher": run.teacher.fingerprint if run.teacher else "",
        "model.vocab_size": run.config.model.vocab_size,
        **{f"the number of {split} samples": len(samples) for split, samples in run.data.samples.items()},
    }
