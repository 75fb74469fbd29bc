"""Training states as NumPy arrays, read from any form of file and written in any."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.data import tokenization
from jaxlm.errors import UserError, nearest, os_errors, reason, slow
from jaxlm.io import temporary, utf8
from jaxlm.params import muon, names
from jaxlm.params.layout import MEND
from jaxlm.params.names import Arrays
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.weights import formats, huggingface
from jaxlm.weights.families import FAMILIES
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, STATE_DICT, StoredFile

TABLE = "base.embedding.token.weight"


def read(path: Path, config: Config | None = None) -> Snapshot:
    """Return the training state in a file or folder; `config` is that of a file of bare weights.

    Raises UserError if it cannot be read, or if its tensors are not those of the model that its settings tell.
    """
    return to_snapshot(load(path), config)


@slow("writing the model")
def write(path: Path, snapshot: Snapshot, form: str, tokenizer: Tokenizer | None = None) -> None:
    """Write a training state in a form of formats.py. Raises UserError if `path` exists or cannot be written.

    With the form of a model of transformers, its weights alone; `tokenizer` is that of a folder.

    Under its name there is never half of one.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already; give a new name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if form in (CHECKPOINT_1_2, STATE_DICT):
        formats.need_torch(path)
    n_bytes = sum(array.nbytes for array in snapshot.weights.values()) * (1 if snapshot.moments is None else 3)
    n_free = shutil.disk_usage(path.absolute().parent).free
    if n_free < n_bytes:
        raise UserError(f"{path}: needs {n_bytes / 1e6:,.1f} MB, but {n_free / 1e6:,.1f} MB are free; free some space")
    try:
        with temporary.replacing(path) as new:
            if form.startswith(formats.TRANSFORMERS):
                huggingface.write(new, snapshot, FAMILIES[form.removeprefix(formats.TRANSFORMERS)], tokenizer)
            else:
                formats.WRITERS[form](new, snapshot)
            if form == RUN and tokenizer is not None:
                tokenization.save(tokenizer, new / "tokenizer.json")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error


@slow("reading the model")
def load(path: Path) -> StoredFile:
    """Return what is in a file or folder, its form told by its content. Raises UserError if it is of none."""
    if path.is_dir():
        return huggingface.load(path) if huggingface.is_model(path) else formats.load_run(path)
    with os_errors(f"{path}: cannot be read"), open(path, "rb") as file:
        start = file.read(utf8.START)
    if start[4:9] == b"\0\0\0\0{":  # behind the length of the header, whose first byte is any
        return formats.load_safetensors(path)
    if start.startswith((b"PK", b"\x80")):  # a zip archive, or the bare pickle of old
        return formats.load_torch(path)
    if why := utf8.stand_in(start):
        raise UserError(f"{path}: is {why}")
    raise UserError(
        f"{path}: neither a file of torch.save nor safetensors, nor the folder of a jaxlm run; give one of these"
    )


def to_snapshot(stored: StoredFile, config: Config | None) -> Snapshot:
    """Return the training state in what was loaded, checked against the model of its settings, or of `config`."""
    path, info = stored.path, stored.info
    if info and config:
        raise UserError(f"--config: {path} has settings of its own; leave --config away")
    if not info and not config:
        raise UserError(f"{path}: bare weights without settings; give those of their run with --config FILE")
    if config is None:
        config = config_of(info["config"], path)
        if (task := info["task"]) != config.task:
            raise UserError(f"{path}: it is of task {task}, but its settings are of task {config.task}; save it again")
    else:
        info = {"step": 0, "task": config.task, "rate": 0.0, "tokenizer": None}
        if not config.model.vocab_size and TABLE in stored.weights:  # settings from before the tokenizer was known
            config = configs.replace(config, "model.vocab_size", len(stored.weights[TABLE]))
    shapes = parameters.shapes(config)
    weights = _float32(stored.weights, shapes, str(path) if stored.info else f"{path}, with the settings of --config")
    shapes = names.trained(config.model, shapes)
    moments, n_updates = formats.moments(stored, config, shapes)
    if moments is not None:
        first = _float32(moments[0], shapes, f"{path}: first moments of the optimizer")
        shapes = muon.with_second_moment(config.train, shapes)
        moments = first, _float32(moments[1], shapes, f"{path}: second moments of the optimizer")
    train = config.train
    info = {"sample_iter": info["step"] * train.batch_size * train.accumulate, "val_loss": None} | info
    info = {name: value for name, value in info.items() if name not in ("config", "format")}
    return Snapshot(config, info, weights, moments if n_updates else None, n_updates)


def config_of(settings: Mapping[str, Any], path: Path) -> Config:
    """Return stored settings, {dotted name: value}, as Config; those that did not exist then have their defaults.

    Where a default has changed what a run does, they are what it did (configs.BEFORE).
    """
    for name, value in settings.items():
        if name not in configs.SETTINGS:
            raise UserError(
                f"{path}: its setting {name} is unknown here{nearest(name, configs.SETTINGS)}; "
                "use the jaxlm that wrote it, or a newer one"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: its setting {name} is no finite number; {MEND}")
    try:
        config = msgspec.convert(configs.nested({**configs.BEFORE, **settings}), Config)
        configs.check_model(config)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: in its settings: {error}; {MEND}") from error
    except UserError as error:
        raise UserError(f"{path}: in its settings: {error}") from error
    return config


def _float32(arrays: Mapping[str, np.ndarray], shapes: names.Shapes, source: str) -> Arrays:
    """Return the arrays in model order. Raises UserError if they are not those of the model, or not float32."""
    arrays = {name: names.exact(x) for name, x in names.check(arrays, shapes, source).items()}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(
                f"{source}: {name} is {array.dtype}, but can be read as float32, float16 or bfloat16 only; "
                "save it again as float32, as with tensor.float() in PyTorch"
            )
    return arrays


def parts_of_file(path: Path, config: Config, parts: Sequence[str], is_base: bool = False) -> dict[str, Any]:
    """Return the given parts of a checkpoint of any form, but with all weights, in NumPy's arrays."""
    snapshot = read(path)
    weights = snapshot.weights_for(parameters.shapes(config), parts, str(path), is_base)
    result = names.to_jax(weights)
    if "optimizer" in parts:
        first, second = (names.to_jax(x) for x in snapshot.moments_or_zeros())
        result["optimizer"] = {"first_moment": first, "second_moment": second, "count": np.int32(snapshot.n_updates)}
    return result
