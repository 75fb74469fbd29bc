"""The four forms in which a training state lies in files, and what reads and writes each.

    jaxlm run          folder with checkpoints/STEP by Orbax, and config.toml
    checkpoint 1.2     file of torch.save, by torchlm or the original
    state dict         file of torch.save, torchlm's weights and nothing else
    safetensors        weights under torchlm's names; moments, where there are any, as optimizer.first_moment.NAME and
                       optimizer.second_moment.NAME, with optimizer.step; all else as JSON in the metadata `jaxlm`

Between two forms, arrays are NumPy's under torchlm's names (names.py). There are two counts: `step`, that of the run,
drives the rate; `n_updates`, that of the moments, is what AdamW corrects their bias by. What Muon updates has no second
moment. torch, jax and safetensors are
imported where they are needed. Models of transformers (huggingface.py) have no training state.
"""

import contextlib
import json
import logging
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import UserError, outside, reason
from jaxlm.io import checksums, storage, utf8
from jaxlm.params import frozen, layout, names
from jaxlm.params.names import Arrays, Shapes
from jaxlm.params.snapshot import Moments, Snapshot

RUN, CHECKPOINT_1_2, STATE_DICT, SAFETENSORS = "jaxlm run", "checkpoint 1.2", "state dict", "safetensors"
TRANSFORMERS = "transformers "  # and the kind of model: the forms of huggingface.py begin with it
FIRST, SECOND, N_UPDATES = "optimizer.first_moment.", "optimizer.second_moment.", "optimizer.step"


class StoredFile(NamedTuple):
    """A file or folder as it is."""

    form: str
    path: Path
    tree: Any  # all in it, under its own names: dicts and lists of arrays or tensors, and other values
    weights: Arrays  # under torchlm's names; whether they fit a model is not checked
    info: dict[str, Any]  # what it tells of itself, with the keys of `info` in jaxlm's checkpoints; {} for bare weights


@contextlib.contextmanager
def _reading(failure: str, mend: str) -> Iterator[None]:
    """Turn what libraries raise for a damaged file, which can be anything, into a UserError: FAILURE: REASON; MEND."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or outside(error):
            raise
        why = reason(error).partition(". ")[0]
        raise UserError(f"{failure}: {type(error).__name__}: {why}; {mend}") from error


def moments(stored: StoredFile, config: Config, shapes: Shapes) -> tuple[Moments | None, int]:
    """Return the moments of the optimizer, not checked, and how many updates they are of; None if there are none.

    `shapes` are those of what is trained. Raises UserError for another optimizer than that of the settings.
    """
    with _reading(f"{stored.path}: its optimizer is not that of its settings", "save it again"):
        if stored.form == RUN:
            part = stored.tree["optimizer"]
            first, second = (
                names.to_torch(part[f"{order}_moment"], config.model.frozen_layers) for order in ("first", "second")
            )
            return (first, second), int(part["count"])
        if stored.form == CHECKPOINT_1_2:
            from torchlm import original

            tensors, n_updates = original.moments(stored.tree["optimizer"], config.train, shapes, str(stored.path))
            if not tensors:
                return None, 0
            first, second = (_arrays(x, f"{stored.path}: optimizer: ") for x in tensors)
            return (first, second), n_updates
        if N_UPDATES not in stored.tree:
            return None, 0
        first, second = (
            {name.removeprefix(prefix): x for name, x in stored.tree.items() if name.startswith(prefix)}
            for prefix in (FIRST, SECOND)
        )
        return (first, second), int(stored.tree[N_UPDATES].item())


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the array of each array or tensor in a tree of dicts and lists."""
    if isinstance(tree, np.ndarray | np.generic):
        yield path, np.asarray(tree)
    elif hasattr(tree, "detach"):  # a tensor, told without torch
        yield path, _array(tree, path)
    elif isinstance(tree, Mapping | list):
        for name, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from leaves(value, f"{path}/{name}" if path else str(name))


def need_torch(path: Path) -> None:
    """Raise UserError if PyTorch, without which `path` cannot be read or written, is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: needs PyTorch, which is not installed: pip install 'jaxlm[torch]'") from error


def load_run(path: Path) -> StoredFile:
    """Return what is in a jaxlm run's last checkpoint, or in the folder of one checkpoint."""
    folder = _step_folder(path)
    layout.check_run(folder)
    info = layout.info_of_run(folder)
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it does, and what it raises, too
    tree: dict[str, Any] = {}
    failure = f"{folder}: cannot be read as a checkpoint of jaxlm"
    with _reading(failure, "use another of its run"), ocp.PyTreeCheckpointer() as checkpointer:
        for part, place in layout.places(folder, info).items():
            with storage.plain(place) as item:
                stored = checkpointer.metadata(item).item_metadata.tree
                # As NumPy's arrays, whatever devices they were saved from.
                kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
                tree[part] = checkpointer.restore(item, args=ocp.args.PyTreeRestore(restore_args=kinds))
        tree["base"] = frozen.joined(tree.pop(checksums.FROZEN, {}), tree.get("base", {}))
        weights = names.to_torch({part: tree[part] for part in ("base", "head") if part in tree})
        return StoredFile(RUN, folder, tree, weights, info)


def validation_loss(path: Path) -> float | None:
    """Return the validation loss that a checkpoint of jaxlm or torchlm tells, None if none. Reads no weights.

    Raises UserError if it cannot be read.
    """
    if path.is_dir():
        loss = layout.info_of_run(path).get("val_loss")
    else:
        need_torch(path)
        import torch

        with _reading(f"{path}: cannot be read as a file of torch.save", "copy it again"), storage.plain(path) as place:
            loss = torch.load(place, map_location="cpu", weights_only=True, mmap=True)["val_loss"]
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def _step_folder(path: Path) -> Path:
    """Return the folder of one checkpoint: `path`, or the last one in it."""
    if (path / "info").is_dir():
        return path
    for folder in (storage.checkpoints(path), path):
        if found := [child for _, child in checksums.finished_in(folder) if child.is_dir()]:
            return found[-1]
    both = (*storage.children(path), *storage.children(storage.checkpoints(path)))
    files = sorted(file for file in both if file.suffix == ".pt")
    mend = f"; give a file of it, such as {files[0]}" if files else "; give a run, a checkpoint or a model"
    raise UserError(f"{path}: a folder without a checkpoint of jaxlm{mend}")


def _write_run(path: Path, snapshot: Snapshot) -> None:
    import jax

    from jaxlm import optim, schedule
    from jaxlm.checkpoint import Checkpoints
    from jaxlm.step import TrainState

    params, first, second = (names.to_jax(x) for x in (snapshot.weights, *snapshot.moments_or_zeros()))
    step: Any = np.int32(snapshot.info["step"])  # Orbax takes NumPy's arrays as well as JAX's
    train = snapshot.config.train
    optimizer = optim.make_optimizer(train, schedule.learning_rate(train), snapshot.config.model.n_layers)
    opt_state = jax.eval_shape(optimizer.init, first)
    opt_state = optim.with_moments(opt_state, first, second, np.int32(snapshot.n_updates))
    path.mkdir()
    info = {"format": layout.RUN_FORMAT, **snapshot.info, "config": configs.flat(snapshot.config)}
    losses = {} if info["val_loss"] is None else {info["step"]: info["val_loss"]}

    failures: list[str] = []
    with Checkpoints(path / "checkpoints", warn=failures.append) as checkpoints:
        checkpoints.save(TrainState(step, params, opt_state), info, losses)
    if failures:
        raise OSError(failures[0])
    (path / "config.toml").write_text(configs.dump(snapshot.config), encoding="utf-8")


def read_torch(path: Path) -> Any:
    """Return what is in a file of torch.save: tensors and plain values, in dicts and lists."""
    need_torch(path)
    import torch

    with _reading(
        f"{path}: cannot be read as a file of torch.save", "copy it again, or save what model.state_dict() returns"
    ):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not look
                    part = damaged.partition("/")[2]
                    raise UserError(f"{path}: damaged: its part {part} is not as it was written; copy it again")
        # As a stream, for PyTorch takes any file that is called .safetensors for one. Warnings: of others' pickles.
        try:
            with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: refused: its pickle is damaged, or has more than tensors and plain values, which could run "
                "code; where you trust it, save what its model.state_dict() returns, and give that file"
            ) from error


def load_torch(path: Path) -> StoredFile:
    """Return what is in a file of torch.save: a checkpoint 1.2 or a state dict."""
    tree = read_torch(path)
    if _is_state_dict(tree):
        return StoredFile(STATE_DICT, path, tree, _arrays(names.unwrapped(tree, str(path)), f"{path}: "), {})
    if not isinstance(tree, dict) or "version" not in tree:
        if inner := next(_state_dicts(tree), ""):
            raise UserError(
                f"{path}: no checkpoint 1.2, but a {type(tree).__name__} that has a state dict in it; save that alone: "
                f"torch.save(torch.load(FILE, weights_only=True){inner}, NEW)"
            )
        kind = f"a value of type {type(tree).__name__}"
        if isinstance(tree, dict):
            others = (name for name, value in tree.items() if not _is_state_dict({name: value}))
            kind = next((f"{name!r} of type {type(tree[name]).__name__}" for name in others), "nothing")
        raise UserError(
            f"{path}: neither a checkpoint 1.2 nor a state dict: it has {kind}; save what model.state_dict() returns"
        )

    from torchlm import checkpoint, original

    tree = checkpoint.read(path)
    with _reading(f"{path}: not as a checkpoint 1.2 is", "save it again"):
        weights = _arrays(checkpoint.weights(tree), f"{path}: ")
        return StoredFile(CHECKPOINT_1_2, path, tree, weights, layout.checked_info(original.info(tree, weights), path))


def _is_state_dict(value: Any) -> bool:
    import torch

    is_dict = isinstance(value, dict) and bool(value)
    return is_dict and all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in value.items())


def _state_dicts(tree: Any, place: str = "") -> Iterator[str]:
    """Yield how each state dict within dicts and lists is got, such as "['model']"."""
    if _is_state_dict(tree):
        yield place
    elif isinstance(tree, dict | list | tuple) and len(place) < 200:  # a list may have itself in it
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _state_dicts(value, f"{place}[{name!r}]")


def _write_1_2(path: Path, snapshot: Snapshot) -> None:
    from torchlm import checkpoint, optim, step

    config, info = snapshot.config, snapshot.info
    model = checkpoint.model_for(snapshot, str(path))
    state = step.init_state(model, optim.make_optimizer(config.train, model))
    state = checkpoint.with_snapshot(state, snapshot, str(path))
    loss = math.inf if info["val_loss"] is None else info["val_loss"]
    content = checkpoint.content(state, {**info, "config": configs.flat(config)}, loss)
    content["config"] = info.get("original_config", content["config"])
    checkpoint.write(path, content)


def _write_state_dict(path: Path, snapshot: Snapshot) -> None:
    import torch

    torch.save({name: torch.from_numpy(array.copy()) for name, array in snapshot.weights.items()}, path)


def tensors_of(path: Path) -> Arrays:
    """Return the arrays in a file of safetensors, or of torch.save if its name ends in .bin, by their names there."""
    if path.suffix != ".bin":
        return read_safetensors(path)[0]
    tree = read_torch(path)
    if not _is_state_dict(tree):
        raise UserError(f"{path}: has other things than tensors by name; save what model.state_dict() returns")
    return _arrays(tree, f"{path}: ")


def read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Return the arrays and the metadata in a file of safetensors."""
    import ml_dtypes  # noqa: F401  # by which NumPy has bfloat16
    from safetensors import safe_open

    with _reading(f"{path}: cannot be read as safetensors", "copy it again"):
        with path.open("rb") as start:
            if why := utf8.stand_in(start.read(utf8.START)):
                raise UserError(f"{path}: is {why}")
        with storage.plain(path) as place, safe_open(place, framework="np") as file:
            try:
                tree = {name: file.get_tensor(name) for name in file.keys()}
            except AttributeError as error:  # of NumPy, which lacks a type
                mend = "save it as float32, as with tensor.float() in PyTorch"
                raise UserError(f"{path}: has numbers of type {error.name}, which cannot be read; {mend}") from error
            return tree, file.metadata() or {}


def load_safetensors(path: Path) -> StoredFile:
    """Return what is in a file of safetensors; without the metadata `jaxlm`, it is one of bare weights."""
    tree, metadata = read_safetensors(path)
    with _reading(f"{path}: cannot be read as safetensors", "copy it again"):
        info = layout.checked_info(utf8.from_json(metadata["jaxlm"]), path) if "jaxlm" in metadata else {}
    weights = {name: array for name, array in tree.items() if not name.startswith("optimizer.")}
    return StoredFile(SAFETENSORS, path, tree, weights if info else names.unwrapped(weights, str(path)), info)


def _write_safetensors(path: Path, snapshot: Snapshot) -> None:
    from safetensors.numpy import save

    tensors = dict(snapshot.weights)
    if snapshot.moments is not None:
        for prefix, arrays in zip((FIRST, SECOND), snapshot.moments, strict=True):
            tensors |= {prefix + name: array for name, array in arrays.items()}
        tensors[N_UPDATES] = np.array(snapshot.n_updates)
    info = {"format": 1, **snapshot.info, "config": configs.flat(snapshot.config)}
    path.write_bytes(save(tensors, {"jaxlm": json.dumps(info, sort_keys=True)}))


WRITERS: dict[str, Callable[[Path, Snapshot], None]] = {
    RUN: _write_run,
    CHECKPOINT_1_2: _write_1_2,
    STATE_DICT: _write_state_dict,
    SAFETENSORS: _write_safetensors,
}


def _arrays(tensors: Mapping[str, Any], source: str) -> Arrays:
    return {name: _array(tensor, f"{source}{name}") for name, tensor in tensors.items()}


def _array(tensor: Any, source: str) -> np.ndarray:
    """Return a tensor as an array. Raises UserError, which begins with `source`, if NumPy has none of its kind."""
    import torch

    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # which NumPy has only from JAX's types
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        kind = f"{tensor.dtype}, {tensor.layout} on {tensor.device}".replace("torch.", "")
        raise UserError(
            f"{source}: a tensor of {kind} cannot be read; save it as float32, as with tensor.to_dense().float()"
        ) from error
