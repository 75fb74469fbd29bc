"""Splitting jaxlm's tree of parameters into trained and frozen ones; names.first_trained has the rule.

Trees are nested dicts. The trained tree has no entries for frozen parameters, and only the upper blocks of a stack.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.params import names

Tree = Mapping[str, Any]


def trained(model: ModelConfig, params: Tree, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tree of trained parameters; `path` is the path of `params` in the whole tree."""
    result = {}
    for name, x in params.items():
        if isinstance(x, Mapping):
            if subtree := trained(model, x, (*path, name)):
                result[name] = subtree
        elif (first := names.first_trained(model, (*path, name))) is not None:
            n_missing = model.n_layers - len(x) if first else 0  # the first block has none if not model.first_norm
            result[name] = x[max(first - n_missing, 0) :] if first else x
    return result


def apart(params: Tree, like: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the trees of trained and of frozen parameters; `like` has the structure of the trained one (moments)."""
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


def with_trained(params: Tree, new: Tree) -> dict[str, Any]:
    """Return parameters with the trained ones replaced. If only the upper blocks are, arrays must be jax.Array."""

    def replace(x: Any, new: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: replace(child, new[name]) if name in new else child for name, child in x.items()}
        return new if new.shape == x.shape else x.at[-len(new) :].set(new)

    return replace(params, new)


def joined(below: Any, above: Any) -> Any:
    """Return one tree of frozen and trained parameters, both NumPy arrays."""
    if isinstance(below, Mapping):
        return dict(below) | {name: joined(below[name], x) if name in below else x for name, x in above.items()}
    return np.concatenate([below, above])
