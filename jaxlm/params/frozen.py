"""Which part of jaxlm's tree of parameters is trained, where the settings freeze some of them; names.py has the rule.

Trees are dicts, as everywhere. The trained part has no entry for what is frozen, and of stacked blocks the upper ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.params import names

Tree = Mapping[str, Any]


def trained(model: ModelConfig, params: Tree, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the part of the parameters that is trained; `path` is where in the tree of all `params` are."""
    result = {}
    for name, x in params.items():
        if isinstance(x, Mapping):
            if part := trained(model, x, (*path, name)):
                result[name] = part
        elif (first := names.first_trained(model, (*path, name))) is not None:
            n_missing = model.n_layers - len(x) if first else 0  # blocks that have none of it, without model.first_norm
            result[name] = x[max(first - n_missing, 0) :] if first else x
    return result


def apart(params: Tree, like: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is trained and what is frozen; `like` has the shape of what is trained, as moments have."""
    above: dict[str, Any] = {}
    below: dict[str, Any] = {}
    for name, x in params.items():
        if isinstance(x, Mapping):
            upper, lower = apart(x, like.get(name, {}))
            above |= {name: upper} if upper else {}
            below |= {name: lower} if lower else {}
        elif name not in like:
            below[name] = x
        elif first := len(x) - len(like[name]):
            above[name], below[name] = x[first:], x[:first]
        else:
            above[name] = x
    return above, below


def with_trained(params: Tree, part: Tree) -> dict[str, Any]:
    """Return parameters with the trained part replaced. If that has only the upper blocks, arrays must be jax.Array."""

    def replace(x: Any, new: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: replace(child, new[name]) if name in new else child for name, child in x.items()}
        return new if new.shape == x.shape else x.at[-len(new) :].set(new)

    return replace(params, part)


def joined(below: Any, above: Any) -> Any:
    """Return what is frozen and what is trained, both with NumPy's arrays, as one tree."""
    if isinstance(below, Mapping):
        return dict(below) | {name: joined(below[name], x) if name in below else x for name, x in above.items()}
    return np.concatenate([below, above])
