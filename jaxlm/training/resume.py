"""What a run starts from: afresh, an earlier run that goes on, or the base model of another. Knows no framework.

CHECKPOINTS.md has the table of what is restored when.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxlm import config as configs
from jaxlm.config import BASE, Config, Layer, TrainConfig
from jaxlm.data import metrics
from jaxlm.data.position import Position
from jaxlm.data.sources import listed, numbered
from jaxlm.errors import UserError, slow
from jaxlm.io import checksums, storage
from jaxlm.params import layout
from jaxlm.tasks.parameters import model_kind
from jaxlm.training import history, teacher
from jaxlm.weights import formats, huggingface, snapshots

if TYPE_CHECKING:  # settings are read before anything that takes long to import
    from rich.table import Table

    from jaxlm.data.prepare import Data

LOCK = ".lock"  # in a run folder, locked for as long as a process works in it
# What the tensors of a base model depend on; a run that starts from one has it from there.
BASE_SETTINGS = (
    *("model.d_model", "model.n_layers", "model.n_heads", "model.vocab_size", "model.positions"),
    *("model.final_norm", "model.post_norm", "model.embedding_norm", "model.norm_epsilon", "model.gelu"),
    "model.pad_id",
)
# What the tensors of a head depend on.
HEAD_SETTINGS = (
    *("model.tied_embedding", "model.head_outputs", "model.pooling", "model.head_dense", "model.output_bias"),
    "data.n_labels",
)
# What a run cannot change when it goes on. Its data and tokenizer it cannot either, which is seen in their contents.
FIXED = (
    *(*BASE_SETTINGS, *HEAD_SETTINGS, "model.seq_len"),
    *("train.seed", "model.frozen_embedding", "model.frozen_layers"),
    *("model.lora_rank", "model.lora_alpha", "model.lora_products"),
)
SCHEDULE = (
    *("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "stable_steps", "decay_steps"),
    *("rewarmup_steps", "cycle_steps", "cycle_amplitude"),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from. `path` is a checkpoint, and `info` what it tells of itself, unless it starts afresh."""

    kind: Literal["afresh", "resume", "base"] = "afresh"
    path: Path | None = None
    form: str = ""  # of formats.py
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ()  # of PARTS: what is restored; the rest starts afresh
    run: Path | None = None  # folder of the run that made it, where that is known
    run_dir: str = ""  # of the run that goes on, in its own folder; "": the run has a new folder
    is_retry: bool = False  # the run folder may have what a run without a checkpoint has left
    damaged: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that cannot be used, and why
    teacher: "Start | None" = None  # the model that the run learns from
    is_student: bool = False  # it is this one, of whose layers the run begins with some

    def is_public(self) -> bool:
        """Return whether it is a model of transformers, which is in a folder with its tokenizer."""
        return self.form.startswith(formats.TRANSFORMERS)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run that made the checkpoint; those that it does not tell are the defaults."""
        return configs.flat(self.config())

    def config(self) -> Config:
        """Return them as Config."""
        return snapshots.config_of(self.info["config"], self.path or Path())

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes by number, which are the numbers where the checkpoint has no names."""
        n, names = self.config().data.n_classes, self.info.get("classes") or ()
        if names and (len(names) != n or not all(isinstance(name, str) for name in names) or len({*names}) != n):
            raise UserError(
                f"{self.path}: its classes are {names!r}, but have to be {n} different names; convert its run again"
            )
        return tuple(names) or numbered(n)

    def known_classes(self) -> tuple[str, ...]:
        """Return the classes that the labels have to be of; (): the run finds its own."""
        if "head" in self.parts:
            return self.classes()
        return self.teacher.classes() if self.teacher else ()

    def layers(self, task: str = "") -> list[Layer]:
        """Return the settings that a run of a task takes from the checkpoint."""
        if self.path is None:
            return []
        stored = self.settings()
        if self.kind == "base":
            names = self._fixed()
            if stored.get("model.positions") == "learned" or self.is_student:
                names = (*names, "model.seq_len")
            if "head" not in self.parts:  # the layer before the output is a part of some bases' design
                names = (*names, "model.head_dense")
            if self.is_public():
                names = (*names, "tokenizer.path", "tokenizer.lowercase")
            is_causal = model_kind(stored["task"]) == "causal" or stored["model.pooling"] == "last"
            stored = {name: stored[name] for name in names}
            if is_causal and model_kind(task) == "classifier":
                stored["model.pooling"] = "last"
            folder = self.run or self.path.parent
            if not self.is_public() and not storage.is_remote(folder) and (folder / "tokenizer.json").is_file():
                stored["tokenizer.path"] = str(folder / "tokenizer.json")
        if self.run_dir:
            stored["run.dir"] = self.run_dir
            if self.path.parent != Path(self.run_dir) / "checkpoints":
                stored["run.checkpoint_dir"] = str(self.path.parent)
        return [(name, value, str(self.path)) for name, value in stored.items()]

    def changes(self, config: Config) -> list[tuple[str, Any, Any]]:
        """Return the settings that are not those of the run that goes on: name, old and new value.

        Raises UserError for one that it cannot change.
        """
        if self.path is None:
            return []
        if self.run_dir and (named := config.run.checkpoint_dir):
            if storage.absolute(storage.path(named)) != storage.absolute(self.path.parent):
                raise UserError(
                    f"run.checkpoint_dir={named}: the checkpoints of {self.run_dir} are in {self.path.parent}; "
                    "leave it, or go on in a new folder with --run.dir"
                )
        found = [(name, old, configs.get(config, name)) for name, old in self.settings().items()]
        found = [(name, old, new) for name, old, new in found if old != new]
        fixed = FIXED if self.kind == "resume" else self._fixed()
        for name, old, new in found:
            if name in fixed and not (name == "model.vocab_size" and old == 0):
                raise UserError(
                    f"{name}={new}, but {self.path} has {old}, which cannot change; leave it, or start a new run"
                )
        return found if self.kind == "resume" else []

    def _fixed(self) -> tuple[str, ...]:
        """Return the settings that the tensors of a base depend on."""
        names = (*BASE_SETTINGS, *HEAD_SETTINGS) if "head" in self.parts else BASE_SETTINGS
        return tuple(name for name in names if not self.is_student or name != "model.n_layers")

    def check(self, data: "Data") -> None:
        """Raise UserError if the data or the tokenizer are not those of the checkpoint."""
        from jaxlm.data import tokenization

        classes = data.source.classes
        own = self.teacher.classes() if self.teacher and classes else classes
        if self.teacher and own != classes and numbered(len(own)) not in (own, classes):
            raise UserError(
                f"distill.teacher: the classes of {self.teacher.path} are {listed(own)}, but those of {self.path} are "
                f"{listed(classes)}; give models of the same classes, in the same order"
            )
        wanted = self.info.get("tokenizer")
        if wanted and wanted != tokenization.fingerprint(data.tokenizer):
            raise UserError(
                f"{self.path}: its tokenizer is another than that of this run; "
                "give its own with --tokenizer.path (a run has it as tokenizer.json)"
            )
        wanted = self.info.get("data")
        if self.kind == "resume" and wanted and wanted != data.source.fingerprint:
            raise UserError(
                f"{self.path}: the data have changed since ({data.source.description}), so that the run cannot go on "
                "as the same; put them back as they were, or start a new run with --init-from"
            )

    def position(self) -> Position:
        """Return where the run is in its data."""
        if self.kind != "resume":
            return Position()
        skipped = tuple((first, end) for first, end in self.info.get("skipped") or ())
        return Position(self.info["step"], self.info["sample_iter"], skipped)

    def rewarmed(self, train: TrainConfig) -> tuple[int, float] | None:
        """Return the update at which a re-warmup begins, and the rate before it; None if there is none.

        It begins here if the schedule is another than that of the checkpoint; else the one that was goes on.
        """
        if self.kind != "resume" or not train.rewarmup_steps:
            return None
        stored = TrainConfig(
            **{name[6:]: value for name, value in self.settings().items() if name.startswith("train.")}
        )
        if self.run_dir and _schedule(stored) == _schedule(train):
            before = self.info.get("rewarmed")
            return (before[0], before[1]) if before else None
        return self.info["step"], self.info["rate"]


def load(argv: list[str], prog: str, form: str) -> tuple[Config, dict[str, str], Start]:
    """Return the settings of a command line, where each came from, and what the run starts from.

    `form` is that of the program's own checkpoints. Raises UserError.
    """
    if any(arg in configs.HELP for arg in argv):
        configs.load(argv, prog)  # prints, and exits
    given = configs.given(argv)
    start = find(given, form)
    layers = start.layers(given.get("task", Config().task))
    config, origins = configs.load(argv, prog, layers, has_preset=start.kind != "resume")
    for name in ("init_from", "distill.teacher"):  # a later run is not what `latest` stood for
        if named := configs.get(config, name):
            config = configs.replace(config, name, str(storage.run_path(named)))
    start.changes(config)
    if config.distill.teacher:
        found = dataclasses.replace(start, is_student=False) if start.is_student else _teacher(config.distill.teacher)
        teacher.check(config, found.config(), start.is_student)
        start = dataclasses.replace(start, teacher=found)
    return config, origins, start


@slow("checking the checkpoint to start from")
def find(given: Mapping[str, Any], form: str) -> Start:
    """Return what the settings `resume` and `init_from` ask for, checked to be whole. Raises UserError."""
    resume, base, run_dir = (given.get(name, "") for name in ("resume", "init_from", "run.dir"))
    start, folder = Start(), given.get("run.checkpoint_dir", "")
    if storage.is_remote(folder) and form != formats.RUN:
        raise UserError(f"run.checkpoint_dir={folder}: torchlm has its checkpoints in a local folder; give one")
    if resume == "auto":
        if not run_dir:
            raise UserError("resume=auto: which run is to go on? give its folder with --run.dir")
        start = _resume_auto(Path(run_dir), given, form)
        if start.path:
            return start
    elif resume and base:
        raise UserError(
            f"resume={resume} and init_from={base} name two starts; give one, or --resume auto with the second"
        )
    elif resume:
        return _resume(storage.run_path(resume), given, form)
    if base:
        source = huggingface.find(base)
        path, stored_form, info, damaged = _newest(source, ("base", "info"))
        parts = _parts_of_base(given, stored_form, info)
        if "head" in parts:
            path, stored_form, info, damaged = _newest(source, (*parts, "info"))
        run = _run_of(path, source)
        return Start("base", path, stored_form, info, parts, run, is_retry=start.is_retry, damaged=damaged)
    if named := given.get("distill.teacher"):
        return dataclasses.replace(_teacher(named), is_student=True, is_retry=start.is_retry)
    return start


def to_use(named: str | Path) -> Start:
    """Return the checkpoint or model named, or that of a run with the lowest validation loss; its last, without any.

    Its weights are checked to be whole, but nothing else of it. Raises UserError.
    """
    source = huggingface.find(named)
    paths = list(_candidates(source))
    if not paths:
        raise UserError(f"{source}: there is no checkpoint of a run")
    parts = ("base", "head", "info")
    path = paths[0]
    if len(paths) > 1:
        losses: dict[int, float] = {}
        for i, candidate in enumerate(paths):
            loss = formats.validation_loss(candidate)
            losses |= {} if loss is None else {i: loss}
        path = paths[metrics.best(range(len(paths)), losses) or 0]
    form, info = _read(path, parts)
    return Start("base", path, form, info, parts[:2], _run_of(path, source))


def _teacher(named: str) -> Start:
    try:
        return to_use(named)
    except UserError as error:
        raise UserError(f"distill.teacher={named}: {str(error).removeprefix(f'{named}: ')}") from error


def table(start: Start, sizes: Mapping[str, Sequence[int]]) -> "Table":
    """Return what of a run is from where; `sizes` has the parameters of each tensor, by part."""
    from rich.table import Table

    title = f"started from {start.path}"
    result = Table("part", "tensors", "parameters", "", title=title, title_style="", title_justify="left")
    for part in layout.PARTS:
        what = "restored" if part in start.parts else "afresh"
        result.add_row(part, str(len(sizes[part])), f"{sum(sizes[part]):,}", what)
    position = start.position()
    counters = f"restored: {position.step:,} updates, {position.sample:,} samples"
    result.add_row("counters", "", "", counters if start.kind == "resume" else "afresh")
    return result


def _resume_auto(run_dir: Path, given: Mapping[str, Any], form: str) -> Start:
    # That of the run, and that of the command line, should the run folder be lost.
    named = given.get("run.checkpoint_dir", "")
    folders = {storage.absolute(storage.checkpoints(run_dir, x)): storage.checkpoints(run_dir, x) for x in ("", named)}
    reason = ""
    for folder in folders.values():
        if not checksums.finished_in(folder):
            continue
        try:
            path, stored_form, info, damaged = _newest(folder, None)
        except _AllDamagedError as error:
            broken, what = error.damaged[0]
            reason = f"none can be used (the newest, {broken.name}: {what})"
            continue
        if given.get("task", info["task"]) != info["task"]:
            raise UserError(f"run.dir={run_dir}: its run is of task {info['task']}; give another folder")
        if stored_form != form:
            raise UserError(
                f"run.dir={run_dir}: its checkpoints are of another program ({stored_form}); "
                f"go on from them in a new folder: --resume {run_dir} --run.dir NEW"
            )
        owner = _run_of(path, folder.parent)
        if owner and storage.absolute(owner).resolve() != run_dir.resolve():
            raise UserError(
                f"run.checkpoint_dir={folder}: these checkpoints are of the run {owner}; go on with it by --run.dir "
                f"{owner}, or start from it in a new folder with --resume {owner}"
            )
        return Start("resume", path, stored_form, info, layout.PARTS, run_dir, str(run_dir), damaged=damaged)
    if step := history.last_saved(run_dir):
        reason = reason or f"there is none, and one of step {step} was saved"
    if reason:
        places = [str(folder) for folder in folders]
        has_own = places == [str(run_dir.absolute() / "checkpoints")]
        new = "--run.dir" if has_own else "--run.dir and --run.checkpoint-dir"
        raise UserError(
            f"run.dir={run_dir}: it cannot go on from a checkpoint in {' or '.join(places)}: {reason}; mount or "
            f"restore that folder, give its new place with --run.checkpoint-dir, or begin anew with a new {new}"
        )
    # What has been killed before its first checkpoint.
    return Start(is_retry=(run_dir / LOCK).exists() or not run_dir.exists())


def _resume(source: Path, given: Mapping[str, Any], form: str) -> Start:
    path, stored_form, info, damaged = _newest(source, None)
    if stored_form.startswith(formats.TRANSFORMERS):
        raise UserError(f"resume={source}: is a model without a training state; start a new run with --init-from")
    if "task" not in given and info["task"] == BASE:
        raise UserError(f"resume={source}: has no output layer; start a new run with --task TASK --init-from {source}")
    run = _run_of(path, source)
    if given.get("task", info["task"]) != info["task"] or given.get("train.switch_training"):
        return Start("base", path, stored_form, info, _parts_of_base(given, stored_form, info), run, damaged=damaged)
    parts = layout.PARTS[:2] if given.get("train.reset_optimizer") else layout.PARTS
    start = Start("resume", path, stored_form, info, parts, run, damaged=damaged)
    new_dir = given.get("run.dir", "")
    if run is None or stored_form != form or (new_dir and Path(new_dir).absolute() != run.absolute()):
        return dataclasses.replace(start, damaged=())  # a new folder: the other run stays as it is
    newer = [x for step, x in checksums.finished_in(path.parent) if step > int(path.stem) and x not in dict(damaged)]
    if newer:
        raise UserError(
            f"resume={path}: {run} has newer checkpoints ({newer[-1].name}), which would be lost; "
            "go on in a new folder with --run.dir"
        )
    return dataclasses.replace(start, run_dir=str(run))


def _parts_of_base(given: Mapping[str, Any], form: str, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a new run takes: its base, and the output layer where that goes on as well.

    It does of a causal language model as one, and of a public model for its own task.
    """
    task = given.get("task", Config().task)
    is_own = form.startswith(formats.TRANSFORMERS) and task == info["task"]
    goes_on = is_own or (model_kind(task) == model_kind(info["task"]) == "causal")
    return layout.PARTS[:2] if goes_on and not given.get("train.switch_training") else layout.PARTS[:1]


def _run_of(path: Path, source: Path) -> Path | None:
    """Return the folder of the run that has a checkpoint, which was found by `source`; None if that is not known."""
    for folder in (source, path.parent.parent):
        if (folder / "config.toml").is_file() and storage.absolute(storage.checkpoints(folder)) == storage.absolute(
            path.parent
        ):
            return folder
    return None


class _AllDamagedError(UserError):
    def __init__(self, damaged: tuple[tuple[Path, str], ...]):
        path, what = damaged[0]
        super().__init__(f"{path}: damaged: {what}; and there is no other checkpoint to use")
        self.damaged = damaged


def _newest(source: Path, parts: Iterable[str] | None) -> tuple[Path, str, dict[str, Any], Any]:
    """Return path, form and info of the newest checkpoint that is whole, and the damaged ones that are newer.

    Looks at every byte of it, or of its `parts`. `source` is a run, a folder of checkpoints, or a checkpoint.
    """
    candidates = list(_candidates(source))
    damaged: list[tuple[Path, str]] = []
    for path in candidates:
        try:
            form, info = _read(path, parts)
            return path, form, info, tuple(damaged)
        except UserError as error:
            if len(candidates) == 1 and path == source:
                raise
            damaged.append((path, str(error).removeprefix(f"{path}: ").removeprefix("damaged: ")))
    if not damaged:
        raise UserError(f"{source}: there is no checkpoint of a run")
    raise _AllDamagedError(tuple(damaged))


def _candidates(source: Path) -> Iterator[Path]:
    if not source.exists():
        raise UserError(f"{source}: there is no such run or checkpoint")
    if source.is_file() or (source / "info").is_dir() or huggingface.is_model(source):
        yield source
        return
    for folder in (storage.checkpoints(source), source):
        found = [path for _, path in reversed(checksums.finished_in(folder))]
        yield from found
        if found:
            return


def _read(path: Path, parts: Iterable[str] | None) -> tuple[str, dict[str, Any]]:
    if path.is_file() or huggingface.is_model(path):
        stored = snapshots.load(path)
        if not stored.info:
            raise UserError(
                f"{path}: bare weights without settings; python -m jaxlm.convert {shlex.quote(str(path))} NEW "
                "--config FILE makes a run of them, with the config.toml of theirs"
            )
        return stored.form, stored.info
    layout.check_run(path, parts)
    return formats.RUN, layout.info_of_run(path)


def _schedule(train: TrainConfig) -> list[Any]:
    values = [getattr(train, name) for name in SCHEDULE]
    return [*values, train.max_steps if not train.decay_steps else None]
