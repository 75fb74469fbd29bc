"""What a run starts from: nothing, the last checkpoint of a run, or the base model of another run.

`load` is the entry point; `find` reads --resume and --init-from. CHECKPOINTS.md lists which parts are restored when.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm import config as configs
from jaxlm.config import BASE, EMBED, Config, Layer, TrainConfig
from jaxlm.data import metrics, tokenization
from jaxlm.data.labels import listed, numbered
from jaxlm.data.mixture import Mix
from jaxlm.data.position import Position
from jaxlm.data.prepare import Data
from jaxlm.errors import UserError, slow
from jaxlm.io import checksums, storage
from jaxlm.params import layout
from jaxlm.tasks.parameters import model_kind
from jaxlm.terminal import command
from jaxlm.training import history, teacher
from jaxlm.weights import formats, huggingface, snapshots

LOCK = ".lock"  # in a run folder, locked while a process uses it
# Settings that the tensors of a base model depend on; a run that starts from a base model takes them from it.
BASE_SETTINGS = (
    *("model.d_model", "model.n_layers", "model.n_heads", "model.vocab_size", "model.positions"),
    *("model.final_norm", "model.post_norm", "model.embedding_norm", "model.norm_epsilon", "model.gelu"),
    *("model.norm", "model.mlp", "model.d_ff", "model.biases", "model.pad_id", "model.segments"),
    *("model.n_kv_heads", "model.head_dim", "model.qk_norm", "model.first_norm"),
    *("model.window", "model.global_every", "model.global_first"),
    *("model.rotary_base", "model.rotary_base_local", "model.rotary_scaling", "model.rotary_scaling_len"),
)
# Settings that the tensors of a head depend on.
HEAD_SETTINGS = (
    *("model.tied_embedding", "model.head_outputs", "model.pooling", "model.head_dense", "model.output_bias"),
    *("model.head_hidden", "model.classifier_bias", "model.logit_softcap", "data.n_labels"),
)
# Settings that cannot change when a run resumes. Data and tokenizer cannot either; their contents are compared.
FIXED = (
    *(*BASE_SETTINGS, *HEAD_SETTINGS, "model.seq_len"),
    *("data.stride", "data.pack", "tokenizer.marks", "train.seed", "model.frozen_embedding", "model.frozen_layers"),
    *("model.lora_rank", "model.lora_alpha", "model.lora_products", "train.optimizer"),
)
SCHEDULE = (
    *("learning_rate", "min_learning_rate", "schedule", "warmup_steps", "stable_steps", "decay_steps"),
    *("rewarmup_steps", "cycle_steps", "cycle_amplitude"),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from. Without a `path`, nothing."""

    kind: Literal["new", "resume", "base"] = "new"
    path: Path | None = None  # of a checkpoint
    form: str = ""  # file format of the checkpoint (formats.py)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # metadata of the checkpoint
    parts: tuple[str, ...] = ()  # which of PARTS are restored; the others are new
    run: Path | None = None  # folder of the run that made the checkpoint, if known
    run_dir: str = ""  # the same folder if the run continues in it; "": this run gets a new folder
    is_retry: bool = False  # the run folder may have files of an attempt that saved no checkpoint
    damaged: tuple[tuple[Path, str], ...] = ()  # newer checkpoints that cannot be used, and why
    teacher: "Start | None" = None  # the model to distil
    is_student: bool = False  # the run starts from layers of its teacher

    def is_public(self) -> bool:
        """Return whether the start is a model in the format of Hugging Face transformers."""
        return self.form.startswith(formats.TRANSFORMERS)

    def config(self) -> Config:
        """Return the settings of the run that made the checkpoint; defaults for those it does not store."""
        return snapshots.config_of(self.info["config"], self.path or Path())

    def settings(self) -> dict[str, Any]:
        """Return the settings of `config()` by their dotted names."""
        return configs.flat(self.config())

    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes in order; their numbers if the checkpoint stores no names."""
        n, names = self.config().data.n_classes, self.info.get("classes") or ()
        if names and (len(names) != n or not all(isinstance(name, str) for name in names) or len({*names}) != n):
            raise UserError(
                f"{self.path}: its classes are {names!r}, but must be {n} different names; convert its run again"
            )
        return tuple(names) or numbered(n)

    def known_classes(self) -> tuple[str, ...]:
        """Return the classes that all labels must belong to; (): take them from the data."""
        if "head" in self.parts:
            return self.classes()
        return self.teacher.classes() if self.teacher else ()

    def layers(self, task: str = "") -> list[Layer]:
        """Return the settings that a run of `task` takes from the checkpoint: name, value and origin of each."""
        if self.path is None:
            return []
        values = self._settings_of_base(task, self.run or self.path.parent) if self.kind == "base" else self.settings()
        if self.run_dir:
            values["run.dir"] = self.run_dir
            if self.path.parent != Path(self.run_dir) / "checkpoints":
                values["run.checkpoint_dir"] = str(self.path.parent)
        return [(name, value, str(self.path)) for name, value in values.items()]

    def _settings_of_base(self, task: str, folder: Path) -> dict[str, Any]:
        stored = self.settings()
        names = list(self._fixed())
        if stored["model.positions"] == "learned" or self.is_student:
            names.append("model.seq_len")
        if model_kind(task) != "tagger":
            names.append("model.head_dense")  # some architectures have a layer before the output
        if self.is_public():
            names += ["tokenizer.path", "tokenizer.lowercase", "tokenizer.marks", "tokenizer.end_ids"]
        values = {name: stored[name] for name in names}
        is_causal = model_kind(stored["task"]) == "causal" or stored["model.pooling"] == "last"
        if is_causal and model_kind(task) in ("classifier", "tagger", "embedder"):
            values["model.pooling"] = "last"
        elif task == stored["task"] == EMBED:
            values["model.pooling"] = stored["model.pooling"]
        if not self.is_public() and not storage.is_remote(folder) and (folder / "tokenizer.json").is_file():
            values["tokenizer.path"] = str(folder / "tokenizer.json")
        return values

    def _fixed(self) -> tuple[str, ...]:
        """Return the names of the settings that cannot change."""
        if self.kind == "resume":  # in packed rows, mask_fraction determines which samples share a row
            is_packed = self.settings()["data.pack"] == "documents"
            fixed = (*FIXED, "data.mask_fraction") if is_packed else FIXED
            return fixed if "optimizer" in self.parts else tuple(name for name in fixed if name != "train.optimizer")
        names = (*BASE_SETTINGS, *HEAD_SETTINGS) if "head" in self.parts else BASE_SETTINGS
        return tuple(name for name in names if not self.is_student or name != "model.n_layers")

    def changes(self, config: Config) -> list[tuple[str, Any, Any]]:
        """Return the settings that a resumed run changes: name, old and new value.

        Raises UserError for a setting that cannot change.
        """
        if self.path is None:
            return []
        if self.run_dir and (folder := config.run.checkpoint_dir):
            if storage.absolute(storage.path(folder)) != storage.absolute(self.path.parent):
                raise UserError(
                    f"run.checkpoint_dir={folder}: the checkpoints of {self.run_dir} are in {self.path.parent}; "
                    "leave this setting out, or resume in a new folder with --run.dir"
                )
        now = configs.flat(config)
        changed = [(name, old, now[name]) for name, old in self.settings().items()]
        changed = [(name, old, new) for name, old, new in changed if old != new]
        fixed = self._fixed()
        for name, old, new in changed:
            if name in fixed and not (name == "model.vocab_size" and old == 0):  # 0: the size of the tokenizer
                mend = "start it anew with --train.reset-optimizer" if name == "train.optimizer" else "start a new run"
                raise UserError(
                    f"{name}={new}, but {self.path} has {old}, which cannot change; leave this setting out, or {mend}"
                )
        return changed if self.kind == "resume" else []

    def check(self, data: Data) -> None:
        """Raise UserError if data or tokenizer differ from those of the checkpoint or the teacher."""
        classes, expected = data.source.classes, self.info.get("tokenizer")
        if self.teacher and classes:
            known = self.teacher.classes()
            if known != classes and numbered(len(known)) not in (known, classes):
                raise UserError(
                    f"distill.teacher: the classes of {self.teacher.path} are {listed(known)}, but those of "
                    f"{self.path} are {listed(classes)}; give models of the same classes, in the same order"
                )
        if expected and expected != tokenization.fingerprint(data.tokenizer):
            raise UserError(
                f"{self.path}: it has another tokenizer than this run; "
                "give its tokenizer with --tokenizer.path (tokenizer.json in the run folder)"
            )
        if self.kind == "resume":
            self._check_sources(data)
        if self.teacher:
            self.teacher.check(data)

    def _check_sources(self, data: Data) -> None:
        """Raise UserError if the data are not those of the checkpoint. A resumed run may have more or fewer sources."""
        stored, source, train = self.info.get("data"), data.source, data.samples["train"]
        before = {stored: ""} if stored else {}
        if isinstance(train, Mix):
            mixed = self.info.get("mix") or {}
            now = dict(zip(train.fingerprints, train.parts, strict=True))
            before = {key: x["name"] for key, x in mixed.get("sources", {}).items() if x["name"] in now.values()}
            if stored is None or before.keys() <= now.keys():
                return
            (name, *_) = [name for key, name in before.items() if key not in now]
            what = f"the source {name} has changed, so the run cannot resume with it"
            raise UserError(f"{self.path}: {what}; restore it, or give other text another name")
        if before and source.fingerprint not in before:
            raise UserError(
                f"{self.path}: the data have changed ({source.description}), so the run cannot resume; restore "
                "the data, name several in data.sources, or start a new run with --init-from"
            )

    def position(self) -> Position:
        """Return where the run is in its data: where it resumes, otherwise the start. One source is a mix of one."""
        if self.kind != "resume":
            return Position()
        skipped = tuple((first, end) for first, end in self.info.get("skipped") or ())
        step, sample, data = self.info["step"], self.info["sample_iter"], self.info.get("data")
        mix = self.info.get("mix") or {"sources": {data: {"name": "", "rate": 0, "before": 0, "used": sample}}}
        return Position(step, sample, skipped, mix)

    def rewarmed(self, train: TrainConfig) -> tuple[int, float] | None:
        """Return the update at which a re-warmup begins, and the rate before it; None without one.

        A re-warmup begins now if the schedule or the run folder changes; otherwise an earlier one continues.
        """
        if self.kind != "resume" or not train.rewarmup_steps:
            return None
        if self.run_dir and _schedule(self.config().train) == _schedule(train):
            before = self.info.get("rewarmed")
            return (before[0], before[1]) if before else None
        return self.info["step"], self.info["rate"]


def load(argv: list[str], prog: str, form: str) -> tuple[Config, dict[str, str], Start]:
    """Return the settings of a command line, the origin of each, and what the run starts from.

    `form` is the format of the program's own checkpoints. Raises UserError.
    """
    if any(arg in configs.HELP for arg in argv):
        configs.load(argv, prog)  # prints, and exits
    given = configs.given(argv)
    start = find(given, form)
    layers = start.layers(given.get("task", Config().task))
    config, origins = configs.load(argv, prog, layers, has_preset=start.kind != "resume")
    for name in ("init_from", "distill.teacher"):  # store the run itself: `latest` will name another run later
        if named := configs.get(config, name):
            config = configs.replace(config, name, str(storage.run_path(named)))
    start.changes(config)
    if named := config.distill.teacher:
        teacher_start = dataclasses.replace(start, is_student=False) if start.is_student else _teacher(named)
        teacher.check(config, teacher_start.config(), start.is_student)
        start = dataclasses.replace(start, teacher=teacher_start)
    return config, origins, start


@slow("checking the checkpoint to start from")
def find(given: Mapping[str, Any], form: str) -> Start:
    """Return the start that the given settings name, with its checksums verified. Raises UserError."""
    names = ("resume", "init_from", "run.dir", "run.checkpoint_dir", "distill.teacher")
    resume, base, run_dir, folder, teacher_name = (given.get(name, "") for name in names)
    if storage.is_remote(folder) and form != formats.RUN:
        raise UserError(f"run.checkpoint_dir={folder}: torchlm needs a local folder; give one")
    if resume and resume != "auto":
        if base:
            raise UserError(
                f"resume={resume} and init_from={base} name two starts; give one, or --resume auto with the second"
            )
        return _resume(storage.run_path(resume), given, form)
    is_retry = False
    if resume == "auto":
        if not run_dir:
            raise UserError("resume=auto: needs the folder of a run; give it with --run.dir")
        if start := _resume_auto(Path(run_dir), given, form):
            return start
        is_retry = Path(run_dir, LOCK).exists() or not Path(run_dir).exists()  # no checkpoint yet
    if base:
        source = huggingface.find(base)
        start = _newest(source, layout.PARTS[:1])
        if (parts := _parts_of_base(given, start)) != start.parts:  # its output layer is used, too: verify both
            start = _newest(source, parts)
    elif teacher_name:
        start = dataclasses.replace(_teacher(teacher_name), is_student=True)
    else:
        start = Start()
    return dataclasses.replace(start, is_retry=is_retry)


def to_use(named: str | Path) -> Start:
    """Return a checkpoint or model by name; for a run, the one with the lowest validation loss (the last if unknown).

    The checksums of its weights are verified, but not those of its optimizer. Raises UserError.
    """
    source = huggingface.find(named)
    paths = _candidates(source)
    losses = {}
    for i, path in enumerate(paths if len(paths) > 1 else ()):
        if (loss := formats.validation_loss(path)) is not None:
            losses[i] = loss
    return _read(paths[metrics.best(losses, losses) or 0], source, layout.PARTS[:2])


def _teacher(named: str) -> Start:
    try:
        return to_use(named)
    except UserError as error:
        raise UserError(f"distill.teacher={named}: {str(error).removeprefix(f'{named}: ')}") from error


def _resume_auto(run_dir: Path, given: Mapping[str, Any], form: str) -> Start | None:
    """Return the newest checkpoint of the run in a folder, None if it never saved one.

    Raises UserError if it saved one that is missing or unusable: such a run does not start from scratch.
    """
    # The folder in the run's settings, and the one on the command line in case the run folder is lost.
    folders = [storage.checkpoints(run_dir, named) for named in ("", given.get("run.checkpoint_dir", ""))]
    folders = list({storage.absolute(folder): folder for folder in folders}.values())
    reason = ""
    for folder in folders:
        if not checksums.finished_in(folder):
            continue
        try:
            start = _newest(folder)
        except _AllDamagedError as error:
            path, what = error.damaged[0]
            reason = f"none can be used (the newest, {path.name}: {what})"
            continue
        if given.get("task", start.info["task"]) != start.info["task"]:
            raise UserError(f"run.dir={run_dir}: its run is of task {start.info['task']}; give another folder")
        if start.form != form:
            raise UserError(
                f"run.dir={run_dir}: its checkpoints are of another program ({start.form}); "
                f"resume from them in a new folder: --resume {run_dir} --run.dir NEW"
            )
        if start.run and storage.absolute(start.run).resolve() != run_dir.resolve():
            raise UserError(
                f"run.checkpoint_dir={folder}: these checkpoints are of the run {start.run}; resume it by "
                f"--run.dir {start.run}, or start from it in a new folder with --resume {start.run}"
            )
        return dataclasses.replace(start, kind="resume", run=run_dir, run_dir=str(run_dir))
    if not reason and (step := history.last_saved(run_dir)):
        reason = f"there is none, and one of step {step} was saved"
    if reason:
        places = [str(storage.absolute(folder)) for folder in folders]
        has_own = places == [str(run_dir.absolute() / "checkpoints")]
        new = "--run.dir" if has_own else "--run.dir and --run.checkpoint-dir"
        raise UserError(
            f"run.dir={run_dir}: it cannot resume from a checkpoint in {' or '.join(places)}: {reason}; mount or "
            f"restore that folder, give its new place with --run.checkpoint-dir, or start a new run with a new {new}"
        )
    return None


def _resume(source: Path, given: Mapping[str, Any], form: str) -> Start:
    """Return the start of `--resume PATH`. It is a base model if the task differs or train.switch_training is set."""
    start = _newest(source)
    path, run, task = start.path, start.run, start.info["task"]
    assert path is not None, "_newest returns a checkpoint"
    if start.is_public():
        raise UserError(f"resume={source}: is a model without a training state; start a new run with --init-from")
    if "task" not in given and task == BASE:
        raise UserError(f"resume={source}: has no output layer; start a new run with --task TASK --init-from {source}")
    if given.get("task", task) != task or given.get("train.switch_training"):
        return dataclasses.replace(start, parts=_parts_of_base(given, start))
    parts = layout.PARTS[:2] if given.get("train.reset_optimizer") else layout.PARTS
    start = dataclasses.replace(start, kind="resume", parts=parts)
    new_dir = given.get("run.dir", "")
    if run is None or start.form != form or (new_dir and Path(new_dir).absolute() != run.absolute()):
        return dataclasses.replace(start, damaged=())  # a new folder: the other run stays as it is
    is_damaged = dict(start.damaged)
    newer = [x for step, x in checksums.finished_in(path.parent) if step > int(path.stem) and x not in is_damaged]
    if newer:
        raise UserError(
            f"resume={path}: {run} has newer checkpoints ({newer[-1].name}), which would be lost; "
            "resume in a new folder with --run.dir"
        )
    return dataclasses.replace(start, run_dir=str(run))


def _parts_of_base(given: Mapping[str, Any], start: Start) -> tuple[str, ...]:
    """Return the parts that a new run takes from a model: the base, and in two cases the output layer.

    These are: both tasks are causal language models; or the model is public, and the task is its own.
    """
    task, stored = given.get("task", Config().task), start.info["task"]
    has_head = (start.is_public() and task == stored != EMBED) or model_kind(task) == model_kind(stored) == "causal"
    return layout.PARTS[:2] if has_head and not given.get("train.switch_training") else layout.PARTS[:1]


class _AllDamagedError(UserError):
    def __init__(self, damaged: Sequence[tuple[Path, str]]):
        path, what = damaged[0]
        super().__init__(f"{path}: damaged: {what}; there is no other checkpoint")
        self.damaged = damaged


def _newest(source: Path, parts: tuple[str, ...] = layout.PARTS) -> Start:
    """Return the newest checkpoint whose `parts` match their checksums; its `damaged` lists newer ones that do not.

    `source` is a run, a folder of checkpoints, or a checkpoint.
    """
    paths = _candidates(source)
    damaged: list[tuple[Path, str]] = []
    for path in paths:
        try:
            return dataclasses.replace(_read(path, source, parts), damaged=tuple(damaged))
        except UserError as error:
            if paths == [source]:
                raise
            damaged.append((path, str(error).removeprefix(f"{path}: ").removeprefix("damaged: ")))
    raise _AllDamagedError(damaged)


def _candidates(source: Path) -> list[Path]:
    """Return the paths of all checkpoints of a run, newest first. Raises UserError if there is none."""
    if not source.exists():
        raise UserError(f"{source}: there is no such run or checkpoint")
    if source.is_file() or (source / "info").is_dir() or huggingface.is_model(source):
        return [source]
    for folder in (storage.checkpoints(source), source):
        if finished := checksums.finished_in(folder):
            return [path for _, path in reversed(finished)]
    raise UserError(f"{source}: there is no checkpoint of a run")


def _read(path: Path, source: Path, parts: tuple[str, ...]) -> Start:
    """Return a checkpoint of `source`, with the checksums of its parts verified. Raises UserError."""
    if path.is_file() or huggingface.is_model(path):
        stored = snapshots.load(path)
        if not stored.info:
            raise UserError(
                f"{path}: weights without settings; {command('convert')} {shlex.quote(str(path))} NEW "
                "--config FILE makes a run of them, with the config.toml of their run"
            )
        form, info = stored.form, stored.info
    else:
        layout.check_run(path, None if parts == layout.PARTS else (*parts, "info"))
        form, info = formats.RUN, layout.info_of_run(path)
    return Start("base", path, form, info, parts, _run_of(path, source))


def _run_of(path: Path, source: Path) -> Path | None:
    """Return the run folder of a checkpoint, if it is `source` or two levels above the checkpoint; else None."""
    for folder in (source, path.parent.parent):
        if (folder / "config.toml").is_file():
            if storage.absolute(storage.checkpoints(folder)) == storage.absolute(path.parent):
                return folder
    return None


def _schedule(train: TrainConfig) -> list[Any]:
    values = [getattr(train, name) for name in SCHEDULE]
    return [*values, train.max_steps if not train.decay_steps else None]
