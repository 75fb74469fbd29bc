"""Brings what one run started from, and was given, to the other: start values and batches. For masks see record.torch.

    weights = carry.start(model, weights)    # a PyTorch model's values in a JAX tree, or in a module of NNX or Equinox
    carry.start(weights, model)              # and back: the model's parameters are set
    for batch in carry.batches(a): ...       # what a.batch(...) was given

Parameters are paired by their names and shapes, since values differ. Linear and convolution kernels of Flax are
transposed to the weights of PyTorch, stacked layers are numbered. If names are ambiguous, a map is required.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from parity_tests.compare import pairing
from parity_tests.compare.pairing import Arrays, Names
from parity_tests.record.files import Record, record_of


def start(source: Any, target: Any, names: Names | Path | str = "auto") -> Any:
    """Return `target` with the start values of `source`; a torch.nn.Module or an NNX module is changed itself.

    Both may be a torch.nn.Module, or a tree or module of JAX; `source` may be a recorder, a record or its folder, too.
    `names` is "auto", or a map or its file (compare/pairing.py) whose A is `source`. Raises UserError where a parameter
    of `target` has no value, or more than one way is possible.
    """
    values, into = _values(source), _arrays(target)
    if names == "auto":
        pairs = pairing.by_name(values, into)
    else:
        pairs = (names if isinstance(names, Names) else pairing.read_names(names)).pairs
    filled = {name: np.full(np.shape(x), np.nan) for name, x in into.items()}
    for pair in pairs:
        try:
            pair.put(values[pair.a.name], filled[pair.b.name])
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"carry.start: {pair.a} does not fit {pair.b} ({error}); mend the map of names") from error
    if lonely := [name for name, x in filled.items() if np.isnan(x).any()]:
        listed = ", ".join(lonely[:4]) + (", ..." if lonely[4:] else "")
        raise UserError(f"carry.start: nothing is known to be {listed}; give names=FILE with a map")
    if _is_torch(target):
        for name, x in target.named_parameters():
            x.data.copy_(x.data.new_tensor(filled[name]))
        return target
    from parity_tests.record.jax_taps import replaced

    return replaced(target, filled)


def batches(source: Any) -> list[dict[str, np.ndarray]]:
    """Return what each call of a recorder's `batch` was given, in order; `source` as in `start`.

    With accumulated batches, an update has several.
    """
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for entry in record_of(source).all("batch"):
        if entry.sketch:
            raise UserError(f"carry.batches: only a sample of {entry.name} is recorded; record it with a larger whole=")
        found.setdefault((entry.update, entry.call), {})[entry.name] = entry.array()
    return list(found.values())


def _is_torch(x: Any) -> bool:
    return hasattr(x, "named_parameters")


def _values(source: Any) -> Arrays:
    if not (isinstance(source, Record | Path | str) or hasattr(source, "read")):
        return {name: np.asarray(x, np.float64) for name, x in _arrays(source).items()}
    entries = [e for e in record_of(source).all("parameter") if e.update == 0]
    if not entries:
        raise UserError("carry.start: the record has no start values; give params= to record.jax")
    if sketched := [e.name for e in entries if e.sketch]:
        text = f"only a sample of {sketched[0]} is recorded; give the model in place of its record, or record it with"
        raise UserError(f"carry.start: {text} a larger whole=")
    return {e.name: e.array() for e in entries}


def _arrays(x: Any) -> dict[str, Any]:
    if _is_torch(x):
        return {name: p.detach().double().cpu().numpy() for name, p in x.named_parameters()}
    from parity_tests.record.jax_taps import named

    return named(x)
