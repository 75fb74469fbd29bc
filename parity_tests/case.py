"""A recorded case of the original: what it did in one run, in a folder of three files.

- `case.json`: settings, and for each update its rate `lr`, `loss`, `grad_norm` before clipping, and `micro`, the
  number of batches it accumulated. A cycle (`cycle_len`) and a resume (`resume_at`) are part of the settings.
- `arrays.npz`: `init/NAME` and `final/NAME` weights under the original's names, `x`, `y` batches in order, `logits0`,
  `loss0` and `grad0/NAME` of batch 0 at the start, and `eval_*` of the final weights on the last batch.
- `checkpoint.pt`: written at the end, or before update `resume_at`.

Float32, dropout 0, on a CPU. The fixed position table, id 0 as the pad of all tasks, labels 0 that do not count, and
a classifier with an output for each token of the vocabulary are the original's.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from jaxlm import config as configs
from jaxlm.config import Config, Count, Positive, Rate, Share
from jaxlm.errors import UserError
from jaxlm.io import utf8
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.tasks import parameters
from parity_tests.plan import Batch, Plan, Resume
from parity_tests.trajectory import First, Saved, Trajectory
from torchlm import checkpoint as checkpoints
from torchlm.original import from_original

CASES = Path(__file__).parent / "cases"
# What `after_resume` may change: all that the rate depends on.
RESUMABLE = ("learning_rate", "min_learning_rate", "warmup_iters", "lr_decay_iters", "cycle_len", "resume_warmup_iters")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The content of case.json."""

    task: Literal["mlm", "gpt", "sst2", "cola"]
    vocab_size: Positive
    d_model: Positive
    n_layers: Positive
    heads: Positive
    seq_len: Positive
    batch_size: Positive
    steps: Positive
    learning_rate: Rate
    min_learning_rate: Rate
    warmup_iters: Count
    lr_decay_iters: Count
    cycle_len: Positive
    resume_at: Positive | None
    resume_warmup_iters: Count
    weight_decay: Rate
    betas: tuple[Share, Share]
    eps: Annotated[float, Meta(gt=0)]
    clip: Annotated[float, Meta(gt=0)]
    dropout: Annotated[float, Meta(ge=0, le=0)]  # masks are not recorded
    after_resume: dict[str, float | int] | None
    lr: list[float]
    loss: list[float]
    micro: list[Positive]
    grad_norm: list[float]


@dataclass(frozen=True)
class Case:
    """A case whose parts are known to fit each other."""

    name: str
    recorded: Recorded
    resumed: Recorded | None  # with the settings of after_resume
    config: Config
    arrays: Arrays
    saved: Saved

    def weights(self, kind: str) -> Arrays:
        """Return the arrays `kind`/NAME under torchlm's names."""
        arrays = {name.removeprefix(f"{kind}/"): x for name, x in self.arrays.items() if name.startswith(f"{kind}/")}
        return from_original(arrays, parameters.prefixes(self.recorded.task))

    def batch(self, i: int) -> Batch:
        """Return batch i as the tasks have it: labels -1 do not count, and mlm has logits at its `positions` only."""
        tokens, labels = self.arrays["x"][i].astype(np.int32), self.arrays["y"][i].astype(np.int32)
        if self.recorded.task in ("sst2", "cola"):
            return {"tokens": tokens, "labels": labels}
        batch = {"tokens": tokens, "labels": np.where(labels == 0, -1, labels)}
        if self.recorded.task == "mlm":
            batch["positions"] = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return batch

    def plan(self) -> Plan:
        """Return the run that was recorded."""
        recorded, batches, first = self.recorded, [], 0
        for n in recorded.micro:
            parts = [self.batch(i) for i in range(first, first + n)]
            batches.append({key: np.stack([part[key] for part in parts]) for key in parts[0]})
            first += n
        resume = None
        if self.resumed:
            step, n_steps = self.resumed.resume_at, self.resumed.resume_warmup_iters
            assert step is not None
            resume = Resume(step, n_steps, _config(self.resumed).train, self.resumed.cycle_len)
        return Plan(
            name=self.name,
            config=self.config,
            start=self.weights("init"),
            batches=batches,
            evaluated=self.batch(-1),
            evaluated_weights=self.weights("final"),
            cycle_steps=recorded.cycle_len,
            resume=resume,
            is_mean_of_means=True,
        )

    def trajectory(self) -> Trajectory:
        """Return what the original computed."""
        counts = ["eval_total", "eval_correct"] if self.recorded.task != "gpt" else []  # of gpt it counts nothing
        return Trajectory(
            config=self.config,
            start=self.weights("init"),
            first=First(self.arrays["logits0"], float(self.arrays["loss0"]), self.weights("grad0")),
            rates=np.array(self.recorded.lr),
            used_rates=np.array(self.recorded.lr),
            n_batches=np.array(self.recorded.micro),
            losses=np.array(self.recorded.loss),
            grad_norms=np.array(self.recorded.grad_norm),
            saved=self.saved,
            final=self.weights("final"),
            eval_loss=float(self.arrays["eval_loss"]),
            eval_counts=np.array([int(self.arrays[name]) for name in counts]),
        )


def load(folder: Path) -> Case:
    """Return the case in a folder. Raises UserError if a file is missing, unreadable, or does not fit the others."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a case is a folder with case.json, arrays.npz and checkpoint.pt")
    for name in ("case.json", "arrays.npz", "checkpoint.pt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no case: {name} is missing")
    recorded, resumed = _read_json(folder / "case.json")
    config = _config(recorded)
    arrays = _read_arrays(folder / "arrays.npz")
    case = Case(folder.resolve().name, recorded, resumed, config, arrays, _read_checkpoint(folder, recorded, config))
    _check_arrays(case, str(folder / "arrays.npz"))
    return case


def _read_json(path: Path) -> tuple[Recorded, Recorded | None]:
    def convert(values: Any) -> Recorded:
        try:
            return msgspec.convert(values, Recorded)
        except msgspec.ValidationError as error:
            raise UserError(f"{path}: {str(error).replace('`', '')}") from error

    try:
        values = utf8.from_json(utf8.read(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    recorded = convert(values)
    if recorded.d_model % 2 or recorded.d_model % recorded.heads:
        raise UserError(f"{path}: d_model={recorded.d_model} must be even and divisible by heads={recorded.heads}")
    for name in ("lr", "loss", "micro", "grad_norm"):
        if len(values[name]) != recorded.steps:
            raise UserError(f"{path}: {name} has {len(values[name])} entries, but there are steps={recorded.steps}")
    if recorded.resume_at is None:
        return recorded, None
    if recorded.resume_at >= recorded.steps:
        raise UserError(f"{path}: resume_at={recorded.resume_at} is not below steps={recorded.steps}")
    changes = recorded.after_resume or {}
    for name in changes:
        if name not in RESUMABLE:
            raise UserError(f"{path}: after_resume.{name}: only {', '.join(RESUMABLE)} can change with a resume")
    return recorded, convert(values | changes)


def _config(recorded: Recorded) -> Config:
    return configs.build(
        {
            "task": recorded.task,
            "model.vocab_size": recorded.vocab_size,
            "model.d_model": recorded.d_model,
            "model.n_layers": recorded.n_layers,
            "model.n_heads": recorded.heads,
            "model.seq_len": recorded.seq_len,
            "model.dropout": recorded.dropout,
            "model.pad_id": 0,
            "model.head_outputs": "vocabulary",
            "train.max_steps": recorded.steps,
            "train.batch_size": recorded.batch_size,
            "train.learning_rate": recorded.learning_rate,
            "train.min_learning_rate": recorded.min_learning_rate,
            "train.warmup_steps": recorded.warmup_iters,
            # 0 means something else to us; a decay that ends at update 1 has ended as well after any warmup.
            "train.decay_steps": recorded.lr_decay_iters or 1,
            "train.weight_decay": recorded.weight_decay,
            "train.beta1": recorded.betas[0],
            "train.beta2": recorded.betas[1],
            "train.epsilon": recorded.eps,
            "train.clip_norm": recorded.clip,
        }
    )


def _read_arrays(path: Path) -> Arrays:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as arrays of numpy.savez: {error}") from error


def _read_checkpoint(folder: Path, recorded: Recorded, config: Config) -> Saved:
    path = folder / "checkpoint.pt"
    checkpoint = checkpoints.read(path)
    shapes = parameters.shapes(config)
    try:
        weights = names.check(checkpoints.weights(checkpoint), shapes, str(path))
        tensors = [name for group in names.decay_groups(shapes) for name in group]
        states = [checkpoint["optimizer"]["state"][i] for i in range(len(tensors))]
        moments = [
            names.check({name: state[key] for name, state in zip(tensors, states, strict=True)}, shapes, str(path))
            for key in ("exp_avg", "exp_avg_sq")
        ]
        return Saved(
            weights={name: tensor.numpy() for name, tensor in weights.items()},
            first_moments={name: tensor.numpy() for name, tensor in moments[0].items()},
            second_moments={name: tensor.numpy() for name, tensor in moments[1].items()},
            updates=[int(checkpoint["iter"]), *(int(state["step"]) for state in states)],
            samples=int(checkpoint["sample_iter"]),
            rate=float(checkpoint["lr"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {type(error).__name__} {error}: no checkpoint of this case's run") from error


def _check_arrays(case: Case, source: str) -> None:
    recorded, shapes = case.recorded, parameters.shapes(case.config)
    n_batches = len(case.arrays["x"]) if "x" in case.arrays else 0
    samples = (n_batches, recorded.batch_size)
    is_classifier = recorded.task in ("sst2", "cola")
    wanted: dict[str, tuple[int, ...]] = {
        "x": (*samples, recorded.seq_len),
        "y": samples if is_classifier else (*samples, recorded.seq_len),
        "logits0": (recorded.batch_size, *([] if is_classifier else [recorded.seq_len]), recorded.vocab_size),
        **dict.fromkeys(("loss0", "eval_loss", "eval_total", "eval_correct"), ()),
    }
    for name, shape in wanted.items():
        found = case.arrays[name].shape if name in case.arrays else None
        if found != shape:
            is_what = "is missing" if found is None else f"has the shape {list(found)}"
            raise UserError(f"{source}: {name} {is_what}, but the case needs {list(shape)}")
    if n_batches < sum(recorded.micro):
        raise UserError(f"{source}: x has {n_batches} batches, but the updates consume {sum(recorded.micro)}")
    for name in ("x", "y"):
        ids = case.arrays[name]
        if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= recorded.vocab_size:
            raise UserError(f"{source}: {name} has values that are no ids of vocab_size={recorded.vocab_size}")
    for kind in ("init", "final", "grad0"):
        names.check(case.weights(kind), shapes, f"{source}: {kind}/")
