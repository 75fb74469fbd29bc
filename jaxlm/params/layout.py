"""How a checkpoint of jaxlm lies on the disk, and whether it is whole. Imports no framework."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.config import BASE
from jaxlm.errors import UserError, outside, reason
from jaxlm.io import checksums, storage

RUN_FORMAT = 2  # of the checkpoints in a jaxlm run
_NEEDED: dict[str, Any] = {
    **{"step": int, "task": str, "rate": int | float, "config": dict, "tokenizer": str | None},
}
_OPTIONAL: dict[str, Any] = {
    **{"sample_iter": int, "val_loss": int | float | None, "skipped": list | tuple | None, "data": str | None},
    **{"rewarmed": list | tuple | None, "teacher": str | None, "original_config": dict},
    "classes": list | tuple | None,
}


def info_of_run(folder: Path) -> dict[str, Any]:
    """Return what the folder of a checkpoint tells of itself. Raises UserError if it cannot be read."""
    try:
        info = checksums.read_json(folder / "info" / "metadata")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder}: cannot be read as a checkpoint of jaxlm: {reason(error)}; use another of its run"
        ) from error
    if "format" not in info:
        raise UserError(f"{folder}: damaged: info/metadata does not tell its format; use another of its run")
    if info.get("format") != RUN_FORMAT:
        raise UserError(
            f"{folder}: checkpoint of format {info.get('format')}, but only {RUN_FORMAT} can be read; "
            f"use the jaxlm that wrote it{f', {version}' if (version := info.get('version')) else ''}"
        )
    return checked_info(info, folder)


def checked_info(info: Any, path: Path) -> dict[str, Any]:
    """Return what a file or folder tells of itself. Raises UserError unless the needed is there, and of its type."""
    if not isinstance(info, dict):
        raise UserError(f"{path}: its metadata is no object; it was not written by jaxlm, give another file")
    if missing := [name for name in _NEEDED if name not in info]:
        raise UserError(f"{path}: it does not tell its {', '.join(missing)}; convert the run that it is from again")
    for name, kinds in {**_NEEDED, **_OPTIONAL}.items():
        value = info.get(name)
        if name in info and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise UserError(
                f"{path}: its {name}={reprlib.repr(value)} is of a wrong type; convert the run that it is from again"
            )
    if info["step"] < 0 or info.get("sample_iter", 0) < 0:
        raise UserError(f"{path}: its step or sample_iter is below 0; convert the run that it is from again")
    return info


def check_run(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError unless a checkpoint of jaxlm, or its `parts`, is as it was written and can be opened."""
    parts = None if parts is None else tuple(parts)
    checksums.check(folder, parts)
    check_opens(folder, parts)


def check_opens(folder: Path, parts: Iterable[str] | None = None) -> None:
    """Raise UserError unless every array in a checkpoint of jaxlm, or in its `parts`, can be read."""
    info = info_of_run(folder)
    is_whole = configs.is_whole(info.get("config") or {})
    places = {part: folder / part for part in ("base", "head", "optimizer") if parts is None or part in parts}
    if info.get("task") == BASE:
        places.pop("head", None)
    if "base" in places and not is_whole:
        places[checksums.FROZEN] = folder.parent / checksums.FROZEN / "base"
        if not places["base"].exists():  # nothing of the base is trained
            del places["base"]
    for part, place in places.items():
        try:
            _read_arrays(place)
        except Exception as error:  # TensorStore raises whatever its parts do
            if outside(error) or storage.is_remote(folder) and not isinstance(error, ValueError):
                raise  # memory or the network fails, which tells nothing of the checkpoint
            why = reason(error).partition(" [")[0]  # without TensorStore's source lines
            raise UserError(f"{folder}: damaged: {part} cannot be opened ({why})") from error


def _read_arrays(folder: Path) -> None:
    """Read the arrays of one part, as Orbax stores them; raises any error. Imports no framework."""
    import tensorstore

    leaves = checksums.read_json(folder / "_METADATA")["tree_metadata"].values()
    if not (folder / "manifest.ocdbt").is_file():
        raise ValueError("manifest.ocdbt is missing")
    with storage.plain(folder) as place:
        base = {"driver": "file", "path": f"{place}/"}
        if storage.is_remote(place):
            bucket, _, path = str(place).removeprefix("gs://").partition("/")
            base = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = store.list().result()
        for leaf in leaves:
            name = ".".join(str(key["key"]) for key in leaf["key_metadata"])
            is_array = leaf["value_metadata"]["value_type"] in ("jax.Array", "np.ndarray", "scalar")
            if is_array and f"{name}/.zarray".encode() not in keys:
                raise ValueError(f"{name} is missing")
        for key in keys:
            store.read(key).result()


PARTS = ("base", "head", "optimizer")
