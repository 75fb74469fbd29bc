"""The files of a jaxlm checkpoint, and checks that it is complete. Imports no framework."""

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.config import BASE, EMBED
from jaxlm.errors import UserError, outside, reason
from jaxlm.io import checksums, storage, utf8

PARTS = ("base", "head", "optimizer")
RUN_FORMAT = 2  # of the checkpoints in a jaxlm run
MEND = "convert its run again"  # for bad metadata
# Types of the metadata of a checkpoint: required and optional keys.
_NEEDED: dict[str, Any] = {"step": int, "task": str, "rate": int | float, "config": dict, "tokenizer": str | None}
_OPTIONAL: dict[str, Any] = {
    **{"sample_iter": int, "val_loss": int | float | None, "original_config": dict},
    **dict.fromkeys(("data", "teacher"), str | None),
    **dict.fromkeys(("skipped", "rewarmed", "classes"), list | tuple | None),
}


def info_of_run(folder: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint folder. Raises UserError if it cannot be read."""
    try:
        info = utf8.read_json(folder / "info" / "metadata")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: cannot be read as a checkpoint of jaxlm: {reason(error)}; use another of its run"
        ) from error
    if "format" not in info:
        raise UserError(f"{folder}: damaged: info/metadata has no format; use another of its run")
    if info["format"] != RUN_FORMAT:
        writer = ", ".join(["the jaxlm that wrote it", *([info["version"]] if "version" in info else [])])
        raise UserError(
            f"{folder}: checkpoint of format {info['format']}, but only {RUN_FORMAT} can be read; use {writer}"
        )
    return checked_info(info, folder)


def checked_info(info: Any, path: Path) -> dict[str, Any]:
    """Return metadata. Raises UserError if required keys are missing or values have wrong types."""
    if not isinstance(info, dict):
        raise UserError(f"{path}: its metadata is not an object; it was not written by jaxlm, give another file")
    if missing := [name for name in _NEEDED if name not in info]:
        raise UserError(f"{path}: its metadata has no {', '.join(missing)}; {MEND}")
    for name, kinds in (_NEEDED | _OPTIONAL).items():
        value = info.get(name)
        if name in info and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(f"{path}: its {name}={reprlib.repr(value)} has a wrong type; {MEND}")
    if info["step"] < 0 or info.get("sample_iter", 0) < 0:
        raise UserError(f"{path}: its step or sample_iter is below 0; {MEND}")
    return info


def check_run(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError unless a checkpoint of jaxlm, or its `parts`, matches its checksums and can be opened."""
    parts = None if parts is None else tuple(parts)
    checksums.check(folder, parts)
    check_opens(folder, parts)


def places(folder: Path, info: Mapping[str, Any], parts: Iterable[str] | None = None) -> dict[str, Path]:
    """Return the folders of arrays of a checkpoint by part, only of `parts` if given; FROZEN: the frozen base."""
    result = {part: folder / part for part in PARTS if parts is None or part in parts}
    if info["task"] in (BASE, EMBED):
        result.pop("head", None)
    if "base" in result and not configs.is_whole(info["config"]):
        result[checksums.FROZEN] = folder.parent / checksums.FROZEN / "base"
        if not result["base"].exists():  # the whole base is frozen
            del result["base"]
    return result


def check_opens(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError unless every array in a checkpoint of jaxlm, or in its `parts`, can be read."""
    for name, place in places(folder, info_of_run(folder), parts).items():
        try:
            _read_arrays(place)
        except Exception as error:  # of many kinds in TensorStore
            if outside(error) or storage.is_remote(folder) and not isinstance(error, ValueError):
                raise  # memory or the network fails: the checkpoint may be fine
            why = reason(error).partition(" [")[0]  # without TensorStore's source lines
            raise UserError(f"{folder}: damaged: {name} cannot be opened ({why})") from error


def _read_arrays(folder: Path) -> None:
    """Read the arrays in an Orbax folder; raises any error. Imports no framework."""
    import tensorstore

    leaves = utf8.read_json(folder / "_METADATA")["tree_metadata"].values()
    if not (folder / "manifest.ocdbt").is_file():
        raise ValueError("manifest.ocdbt is missing")
    with storage.plain(folder) as place:
        base = f"{place}/" if storage.is_remote(place) else f"file://{place}/"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()
        for leaf in leaves:
            name = ".".join(str(key["key"]) for key in leaf["key_metadata"])
            is_array = leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray", "scalar")
            if is_array and f"{name}/.zarray".encode() not in keys:
                raise ValueError(f"{name} is missing")
        for key in keys:
            store.read(key).result()
