"""Checkpoints of a run in the original's file format, written by torch.save: the last one and the best one are kept.

A file has the original's keys and names of tensors (jaxlm/names.py), and its buffers, so that the original reads it.
"""

import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jaxlm import names
from jaxlm.errors import UserError
from torchlm import parallel
from torchlm.step import TrainState

FORMAT = "1.2"
KEYS = (
    *("version", "task_type", "iter", "sample_iter", "base_model", "lm_head"),
    *("optimizer", "lr", "val_loss", "config"),
)


class Checkpoints:
    """The checkpoints in one folder, by step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def save(self, state: TrainState, info: dict[str, Any], validation_loss: float | None = None) -> None:
        """Save; returns when the file is there.

        Without a validation loss, the checkpoint is kept only until the next one.
        """
        if state.step in self._steps():
            return
        self.folder.mkdir(exist_ok=True)
        # Infinite means none: whoever reads the file compares it with losses.
        loss = math.inf if validation_loss is None else validation_loss
        write(self._path(state.step), content(state, info, loss))
        kept = (state.step, self.best_step())
        for step in self._steps():
            if step not in kept:
                self._path(step).unlink()

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss, None if nothing has been evaluated and saved."""
        losses = {step: read(self._path(step), is_mapped=True)["val_loss"] for step in self._steps()}
        evaluated = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        return min(evaluated, key=evaluated.__getitem__) if evaluated else None

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state saved at `step`: `like`, changed in place."""
        return load(self._path(step), like)

    def close(self) -> None:
        """Nothing is left to do, since `save` waits."""

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.pt"

    def _steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.pt"))


def content(state: TrainState, info: dict[str, Any], validation_loss: float) -> dict[str, Any]:
    """Return what a checkpoint file holds; `info` has the step, task, rate, settings and tokenizer."""
    model, settings = parallel.single(state.model), info["config"]
    parts: dict[str, dict[str, Tensor]] = {"base": {}, "head": {}}
    for name, tensor in model.state_dict().items():
        (original,) = names.to_original({name: tensor}, info["task"])
        parts[name.partition(".")[0]][original.partition(".")[2]] = tensor
    return {
        "version": FORMAT,
        "task_type": info["task"],
        "iter": info["step"],
        "sample_iter": info["step"] * settings["train.batch_size"] * settings["train.accumulate"],
        "base_model": parts["base"] | _buffers(model),
        "lm_head": parts["head"],
        "optimizer": state.optimizer.state_dict(),
        "lr": info["rate"],
        "val_loss": validation_loss,
        "config": _original_settings(info["task"], settings)
        | {"torchlm": settings | {"tokenizer": info["tokenizer"]}},  # what the original has not
    }


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint file; under its name there is never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(checkpoint, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, is_mapped: bool = False) -> dict[str, Any]:
    """Return a checkpoint file's content; if `is_mapped`, tensors stay in the file. Raises UserError if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint of torch.save: {reason}") from error
    missing = [key for key in KEYS if key not in checkpoint] if isinstance(checkpoint, dict) else list(KEYS)
    if missing:
        raise UserError(f"{path}: no checkpoint of version {FORMAT}: it lacks {', '.join(missing)}")
    if checkpoint["version"] != FORMAT:
        raise UserError(f"{path}: checkpoint of version {checkpoint['version']}, but only {FORMAT} can be read")
    return checkpoint


def weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under torchlm's names."""
    task = checkpoint["task_type"]
    parts = zip(names.prefixes(task), (checkpoint["base_model"], checkpoint["lm_head"]), strict=True)
    state = {f"{prefix}.{name}": tensor for prefix, part in parts for name, tensor in part.items()}
    return names.from_original(state, task)


def load(path: Path, like: TrainState) -> TrainState:
    """Return `like`, changed in place to the state in a checkpoint file. Raises UserError if it is of another model."""
    checkpoint = read(path)
    model = parallel.single(like.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(names.check(weights(checkpoint), shapes, str(path)))
    like.optimizer.load_state_dict(checkpoint["optimizer"])
    like.step = checkpoint["iter"]
    return like


def _buffers(model: Any) -> dict[str, Tensor]:
    """Return what the original's state dict has beside the parameters: position table and masks of the future."""
    base, buffers = model.base, {}
    if base.config.positions == "fixed":
        buffers["embedding.position.pe"] = base.embedding.table_TD[None]
    T = base.config.seq_len
    is_past_TT = torch.ones(T, T).tril()[None, None]  # one tensor for all blocks is stored once
    for i, block in enumerate(base.blocks):
        if block.attention.is_causal:
            buffers[f"encoder_blocks.{i}.self_multihead.bias"] = is_past_TT
    return buffers


def _original_settings(task: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the original knows, under its names."""
    words = names.ORIGINAL_SETTINGS
    decay_steps = settings["train.decay_steps"] or settings["train.max_steps"]
    return {
        "model": {"task_type": task} | {name: settings[f"model.{ours}"] for name, ours in words["model"].items()},
        "train": {name: settings[f"train.{ours}"] for name, ours in words["train"].items()}
        | {"lr_decay_iters": decay_steps},
    }
