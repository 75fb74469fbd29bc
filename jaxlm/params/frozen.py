"""Which part of jaxlm's tree of parameters is trained, where the settings freeze some of them; names.py has the rule.

Trees are dicts, as everywhere; the part has no entry for what is frozen, and of stacked blocks those that are not.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.params import names

Tree = Mapping[str, Any]


def trained(model: ModelConfig, params: Tree) -> dict[str, Any]:
    """Return the part of the parameters that is trained."""

    def part(path: tuple[str, ...], x: Any) -> Any:
        first = names.first_trained(model, path)
        return None if first is None else x[first:] if first else x

    return _part(params, part)


def apart(params: Tree, like: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is trained and what is frozen; `like` has the shape of what is trained, as moments have."""

    def rows(path: tuple[str, ...], x: Any) -> int | None:
        found: Any = like
        for name in path:
            found = found.get(name, {})
        return None if isinstance(found, Mapping) else len(x) - len(found)

    def above(path: tuple[str, ...], x: Any) -> Any:
        first = rows(path, x)
        return None if first is None else x[first:] if first else x

    def below(path: tuple[str, ...], x: Any) -> Any:
        first = rows(path, x)
        return x if first is None else x[:first] if first else None

    return _part(params, above), _part(params, below)


def with_trained(params: Tree, part: Tree) -> dict[str, Any]:
    """Return parameters with a part of them replaced; arrays of which it is the upper blocks alone have to be JAX's."""

    def replace(x: Any, new: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: replace(child, new[name]) if name in new else child for name, child in x.items()}
        return new if new.shape == x.shape else x.at[-len(new) :].set(new)

    return replace(params, part)


def joined(below: Tree, above: Tree) -> dict[str, Any]:
    """Return what is frozen and what is trained, both with NumPy's arrays, as one tree."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Mapping):
            return dict(a) | {name: join(a[name], x) if name in a else x for name, x in b.items()}
        return np.concatenate([a, b])

    return join(below, above)


def _part(tree: Tree, choose: Callable[[tuple[str, ...], Any], Any], path: tuple[str, ...] = ()) -> Any:
    """Return a tree of what `choose` makes of the leaves, without those of which it makes None, and empty dicts."""
    found = {}
    for name, x in tree.items():
        part = _part(x, choose, (*path, name)) if isinstance(x, Mapping) else choose((*path, name), x)
        if part is not None and (not isinstance(part, dict) or part):
            found[name] = part
    return found
