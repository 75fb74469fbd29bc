"""Two runs as arrays that the user has written: are they the same? For any model, in any framework.

A run is a file of numpy.savez; what it has is up to you:

    logits, logits0, ...          any array without "/": largest difference over the largest value
    loss, rate, grad_norm         one number an update: the relative difference at the worst update
    grad0/NAME, weights/NAME      tensors: norm of the difference over the norm, for each NAME
    start/NAME                    start weights: if there, weights are compared by how far they have moved since

`--names MAP.json` says what a tensor of A is called in B, and which of its axes go where:

    {"layers\\.(\\d+)\\.weight": {"name": "Dense_\\1/kernel", "axes": [1, 0]},
     "layers\\.(\\d+)\\.bias": "Dense_\\1/bias"}

A key is a regular expression that the whole name in A matches; the first that does counts. Names that match none are
the same in both. `axes` is what numpy.transpose makes of A's tensor, so that it is laid out as B's.

Nothing may be farther apart than tolerances.py allows for the lower precision of the two.
"""

import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.io import utf8
from parity_tests.compare.rows import Row, ratio
from parity_tests.compare.tolerances import FLOAT32, FLOAT64, Tolerances

Arrays = dict[str, np.ndarray]
Names = dict[str, Any]  # regular expression -> name, or {"name": name, "axes": [...]}


def compare(a: Arrays, b: Arrays, names: Names | None = None) -> list[Row]:
    """Return how far each number of run `a` is from that of run `b`; what only one of them has is infinitely far."""
    a = renamed(a, names or {})
    if not a.keys() & b.keys():
        raise UserError(f"the runs have nothing in common: {_some(a)} in the one, {_some(b)} in the other")
    bounds = _bounds(a, b)
    rows = []
    for key in dict.fromkeys([*a, *b]):
        kind, _, tensor = key.partition("/")
        if key not in a or key not in b:
            row = Row("A, B", "A", kind, math.inf, 0, f"{tensor or kind} is only in {'A' if key in a else 'B'}")
        elif a[key].shape != b[key].shape:
            shapes = " and ".join(str(list(x[key].shape)) for x in (a, b))
            row = Row("A, B", "A", kind, math.inf, 0, f"{tensor or kind} has the shapes {shapes}")
        else:
            start = b.get(f"start/{tensor}", np.zeros(())) if kind == "weights" else np.zeros(())
            x, y = (z[key].astype(np.float64) for z in (a, b))
            difference, where = _difference(kind, tensor, x, y, start)
            row = Row("A, B", "A", kind, difference, _bound(kind, tensor, a[key].ndim, start.ndim > 0, bounds), where)
        rows.append(row)
    return rows


def renamed(arrays: Arrays, names: Names) -> Arrays:
    """Return arrays with their tensors under the names and with the axes that a map gives them."""
    result = {}
    for key, array in arrays.items():
        kind, slash, tensor = key.partition("/")
        for pattern, target in names.items() if slash else ():
            match = re.fullmatch(pattern, tensor)
            if match:
                rule = target if isinstance(target, dict) else {"name": target}
                try:
                    array = np.transpose(array, rule["axes"]) if "axes" in rule else array
                    tensor = match.expand(rule["name"])
                except (ValueError, IndexError, re.error) as error:
                    raise UserError(f"{pattern}: {target} does not fit {key} {list(array.shape)}: {error}") from error
                break
        result[kind + slash + tensor] = array
    return result


def read(path: Path) -> Arrays:
    """Return the arrays of a run. Raises UserError if there are none."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as arrays of numpy.savez: {error}") from error


def read_names(path: Path) -> Names:
    """Return a map of names. Raises UserError if a rule is invalid."""
    try:
        names = utf8.from_json(utf8.read(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(names, dict):
        raise UserError(f"{path}: no map of names; write an object of regular expressions and names")
    for pattern, target in names.items():
        rule = target if isinstance(target, dict) else {"name": target}
        if not isinstance(rule.get("name"), str) or rule.keys() - {"name", "axes"}:
            raise UserError(
                f'{path}: {pattern}: {json.dumps(target)} is neither a name nor {{"name": ..., "axes": ...}}'
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: {pattern}: no regular expression: {error}") from error
    return names


def _some(arrays: Arrays) -> str:
    return ", ".join(list(arrays)[:3]) + (", ..." if len(arrays) > 3 else "")


def _bounds(*runs: Arrays) -> Tolerances:
    types = [x.dtype for run in runs for x in run.values() if np.issubdtype(x.dtype, np.floating) and x.size > 1]
    return FLOAT64 if all(dtype == np.float64 for dtype in types) else FLOAT32


def _bound(kind: str, tensor: str, rank: int, is_moved: bool, bounds: Tolerances) -> float:
    if tensor:
        return bounds.weights if is_moved else bounds.gradients
    if kind.startswith("rate"):
        return bounds.used_rates
    return bounds.losses if rank < 2 else bounds.logits


def _difference(kind: str, tensor: str, a: np.ndarray, b: np.ndarray, start: np.ndarray) -> tuple[float, str]:
    """Return how far two arrays are apart, and where."""
    if tensor:
        return ratio(float(np.linalg.norm(a - b)), float(np.linalg.norm(b - start))), tensor
    if a.ndim > 1:
        return ratio(float(np.abs(a - b).max()), float(np.abs(b).max())), kind
    scale = np.full(b.shape, np.abs(b).max()) if kind.startswith("rate") else np.abs(b)
    ratios = [ratio(*pair) for pair in zip(np.abs(a - b).ravel(), scale.ravel(), strict=True)]
    worst = max(range(len(ratios)), key=lambda i: math.inf if math.isnan(ratios[i]) else ratios[i])
    return ratios[worst], f"update {worst}"
