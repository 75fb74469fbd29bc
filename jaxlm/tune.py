"""Which part of jaxlm's tree of parameters is trained, where the settings freeze some of them; names.py has the rule.

Trees are dicts, as everywhere; the part has no entry for what is frozen, and of stacked blocks those that are not.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm import names
from jaxlm.config import ModelConfig

Cut = Callable[[Any, slice], Any]  # some rows of an array


def trained(model: ModelConfig, params: Mapping[str, Any], cut: Cut = lambda x, rows: x[rows]) -> dict[str, Any]:
    """Return the part of the parameters that is trained."""

    def part(path: tuple[str, ...], x: Any) -> Any:
        first = names.first_trained(model, path)
        return None if first is None else cut(x, slice(first, None)) if first else x

    return _part(params, part)


def with_trained(params: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters, JAX's arrays, with the part that is trained replaced."""

    def replace(x: Any, new: Any) -> Any:
        if isinstance(x, Mapping):
            return {name: replace(child, new[name]) if name in new else child for name, child in x.items()}
        return new if new.shape == x.shape else x.at[-len(new) :].set(new)

    return replace(params, part)


def _part(tree: Mapping[str, Any], choose: Callable[[tuple[str, ...], Any], Any], path: tuple[str, ...] = ()) -> Any:
    """Return a tree of what `choose` makes of the leaves, without those of which it makes None, and empty dicts."""
    found = {}
    for name, x in tree.items():
        part = _part(x, choose, (*path, name)) if isinstance(x, Mapping) else choose((*path, name), x)
        if part is not None and (not isinstance(part, dict) or part):
            found[name] = part
    return found
