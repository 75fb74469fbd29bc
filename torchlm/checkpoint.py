"""Checkpoints in the file format of the original (my-best-day/medium), written by torch.save.

A file has the original's keys, tensor names (original.py) and buffers, so that the original can read it. The latest
ones and the best one are kept.
"""

import contextlib
import math
import os
import pickle
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jaxlm.config import BASE
from jaxlm.data import metrics
from jaxlm.errors import UserError, reason
from jaxlm.io import checksums, storage, temporary
from jaxlm.params import layout, names
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from torchlm import original, parallel
from torchlm.heads import BaseModel, Classifier, LanguageModel
from torchlm.step import TrainState

FORMAT = "1.2"
PARTS = layout.PARTS
PAUSES_S = (0.0, 1.0, 4.0)  # before each attempt to save the last state
KEYS = (
    *("version", "task_type", "iter", "sample_iter", "base_model", "lm_head"),
    *("optimizer", "lr", "val_loss", "config"),
)
# Metadata that the original's format lacks.
OWN = ("tokenizer", "data", "classes", "teacher", "rewarmed", "skipped", "version")


class Checkpoints:
    """The checkpoints in one folder, by step.

    Keeps the `keep` latest checkpoints and the best one. If a save fails, `warn` gets the reason, older checkpoints
    stay, and the run continues. `record` gets the step of each complete checkpoint. Other files in the folder stay.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 1,
        warn: Callable[[str], None] = print,
        record: Callable[[int], None] = lambda step: None,
    ):
        self.folder, self.keep, self.warn, self.record = folder, keep, warn, record
        self.n_saved, self.stalled_s = 0, 0.0  # complete saves, and the seconds that training waited for them
        self.failed: tuple[int, str] | None = None  # step and reason, if the latest save failed
        self.own = {step for step, path in checksums.checkpoints_in(folder) if path.is_file()}
        self.device = storage.device(folder)
        for path in storage.children(folder):
            if re.fullmatch(r"\d+\.pt\.(.+\.)?\d+\.tmp", path.name):  # an incomplete save
                with contextlib.suppress(OSError):
                    path.unlink()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Save; returns when the file is there.

        `losses` are the validation losses by step: the checkpoint with the lowest loss is the best.
        """
        started_s = time.monotonic()
        if state.step not in self.steps():
            try:
                self._check_folder(state.step)
                self.folder.mkdir(parents=True, exist_ok=True)
                n_bytes = 3 * sum(x.nbytes for x in state.model.parameters())
                n_free = shutil.disk_usage(self.folder).free
                if n_free < n_bytes:  # torch.save reports less
                    raise OSError(f"it needs {n_bytes / 1e6:,.1f} MB, and {n_free / 1e6:,.1f} MB are free")
                # Infinity means none: readers of the file compare it with losses.
                write(self.path(state.step), content(state, info, losses.get(state.step, math.inf)))
                self.own.add(state.step)
                self.record(state.step)
                self.n_saved, self.failed = self.n_saved + 1, None
                self._remove_old(losses)
            except (OSError, RuntimeError, zipfile.BadZipFile) as error:
                failed = state.step, reason(error)
                is_new, self.failed = failed != self.failed, failed
                if is_new:
                    self.warn(f"the checkpoint of step {failed[0]} could not be saved ({failed[1]}); the run continues")
        self.stalled_s += time.monotonic() - started_s

    def save_last(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Save. Retries a failed save, because no later one will replace it."""
        for pause_s in PAUSES_S:
            time.sleep(pause_s)
            self.save(state, info, losses)
            if state.step in self.steps():
                return

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        try:
            return [step for step, path in checksums.checkpoints_in(self.folder) if step in self.own and path.is_file()]
        except UserError:  # the disk fails
            return []

    def wait(self) -> None:
        """Do nothing: `save` waits."""

    def summary(self) -> str:
        """Return a line of text about the saves so far."""
        n, stalled_s = self.n_saved, self.stalled_s / max(self.n_saved, 1)
        failed = f"; that of step {self.failed[0]} could not be saved ({self.failed[1]})" if self.failed else ""
        return f"{n} checkpoint{'s' * (n != 1)} saved; each stopped training for {stalled_s:.3f} s{failed}"

    def close(self) -> None:
        """Do nothing: there are no threads."""

    def _remove_old(self, losses: Mapping[int, float]) -> None:
        steps = self.steps()
        for old in set(steps[: -self.keep]) - {metrics.best(steps, losses)}:
            try:
                self.path(old).unlink()
            except OSError as error:
                self.warn(f"the checkpoint of step {old} could not be removed ({reason(error)})")

    def _check_folder(self, step: int) -> None:
        """Raise OSError if the folder is on another disk than before, or a save would replace files of others."""
        device = storage.device(self.folder)
        if device != self.device and self.own and not self.steps():
            raise OSError(f"{self.folder} is on another disk now, without the earlier checkpoints; mount it again")
        self.device = device
        if os.path.lexists(self.path(step)):
            raise OSError(f"{self.path(step)} exists and belongs to another run; move it away")

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.folder / f"{step}.pt"


def with_snapshot(
    like: TrainState,
    snapshot: Snapshot,
    source: str,
    parts: Sequence[str] = PARTS,
    step: int | None = None,
    is_base: bool = False,
) -> TrainState:
    """Return `like`, changed in place to the given parts of the snapshot; errors begin with `source`."""
    model = parallel.single(like.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    trained = {name: shapes[name] for name, tensor in model.named_parameters() if tensor.requires_grad}
    weights = snapshot.weights_for(shapes, parts, source, is_base)
    model.load_state_dict(model.state_dict() | {name: torch.tensor(x) for name, x in weights.items()})
    if "optimizer" in parts and snapshot.moments is not None:
        first, second = snapshot.moments
        states = {
            i: {
                "step": torch.tensor(float(snapshot.n_updates)),
                "exp_avg": torch.tensor(first[name]),
                **({"exp_avg_sq": torch.tensor(second[name])} if name in second else {}),
            }
            for i, name in enumerate(sum(names.decay_groups(trained), []))
        }
        like.optimizer.load_state_dict(like.optimizer.state_dict() | {"state": states})
    if "optimizer" in parts:
        for group in like.optimizer.param_groups:
            group["lr"] = snapshot.info["rate"]
    like.step = snapshot.info["step"] if step is None else step
    return like


def model_for(snapshot: Snapshot, source: str) -> torch.nn.Module:
    """Return a model for the weights. For a task that torchlm lacks, it is the model of heads.py for that kind of task.

    Raises UserError, which begins with `source`, if the weights do not fit it.
    """
    from torchlm.tasks import TASKS

    config, kind, rngs = snapshot.config, parameters.model_kind(snapshot.config.task), torch.Generator()
    if config.task in TASKS:
        return TASKS[config.task](config).build_model(rngs)
    model: torch.nn.Module
    if kind == BASE:
        model = BaseModel(config.model, torch.float32, rngs)
    elif kind in ("classifier", "tagger"):
        n_outputs = len(snapshot.weights.get("head.linear.bias", (0,)))
        model = Classifier(config.model, n_outputs, torch.float32, rngs)
    else:
        model = LanguageModel(config.model, kind == "causal", torch.float32, rngs)
    if {name: x.shape for name, x in model.named_parameters()} != {n: x.shape for n, x in snapshot.weights.items()}:
        raise UserError(
            f"{source}: the model of task={config.task} is none of heads.py, so torchlm cannot load it; "
            "convert it to safetensors"
        )
    return model


def content(state: TrainState, info: dict[str, Any], validation_loss: float) -> dict[str, Any]:
    """Return the content of a checkpoint file; `info` has the step, task, rate, settings and tokenizer."""
    model, settings = parallel.single(state.model), info["config"]
    own = {name: info[name] for name in OWN if name in info}
    parts: dict[str, dict[str, Tensor]] = {"base": {}, "head": {}}
    for name, tensor in model.state_dict().items():
        (theirs,) = original.to_original({name: tensor}, parameters.prefixes(info["task"]))
        parts[name.partition(".")[0]][theirs.partition(".")[2]] = tensor
    return {
        "version": FORMAT,
        "task_type": info["task"],
        "iter": info["step"],
        "sample_iter": info["sample_iter"],
        "base_model": parts["base"] | _buffers(model),
        "lm_head": parts["head"],
        "optimizer": state.optimizer.state_dict(),
        "lr": info["rate"],
        "val_loss": validation_loss,
        "config": original.settings_for(info["task"], settings) | {"torchlm": {"settings": settings, "info": own}},
    }


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint file atomically."""
    with temporary.replacing(path) as new:
        torch.save(checkpoint, new)
        with zipfile.ZipFile(new) as archive:  # checks it before an earlier checkpoint is removed
            if damaged := archive.testzip():
                raise OSError(f"{damaged} is not as it was written")


def read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file. Raises UserError if the file is not one."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint of torch.save: {reason(error)}; copy it again"
        ) from error
    missing = [key for key in KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else list(KEYS)
    if missing:
        raise UserError(f"{path}: no checkpoint of version {FORMAT}: it lacks {', '.join(missing)}; save it again")
    if checkpoint["version"] != FORMAT:
        raise UserError(
            f"{path}: checkpoint of version {checkpoint['version']}, but only {FORMAT} can be read; convert another"
        )
    return checkpoint


def weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under torchlm's names."""
    task = checkpoint["task_type"]
    parts = zip(parameters.prefixes(task), (checkpoint["base_model"], checkpoint["lm_head"]), strict=True)
    state = {
        f"{prefix}.{name}": tensor
        for prefix, part in parts
        for name, tensor in names.unwrapped(part, "weights").items()
    }
    return original.from_original(state, parameters.prefixes(task))


def _buffers(model: Any) -> dict[str, Tensor]:
    """Return the buffers of the original's state dict: the position table and the causal masks."""
    base, buffers = model.base, {}
    if base.config.positions == "fixed":
        buffers["embedding.position.pe"] = base.embedding.table_TD[None]
    T = base.config.seq_len
    is_past_TT = torch.ones(T, T).tril()[None, None]  # one tensor for all blocks is stored once
    for i, block in enumerate(base.blocks):
        if block.attention.is_causal:
            buffers[f"encoder_blocks.{i}.self_multihead.bias"] = is_past_TT
    return buffers
