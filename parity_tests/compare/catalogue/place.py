"""The first array that differs, and what is known of it: what went into it, its module, the module's parameters."""

import functools
from typing import Any

import numpy as np

from parity_tests.compare.divergence import Finding, Side, aligned
from parity_tests.compare.pairing import Pair, shown
from parity_tests.record.files import Entry

TOKENS = (("input", ""), ("batch", "tokens"), ("batch", "input_ids"), ("batch", "ids"))


class Divergence:
    """Two runs, all that differs, and what differs first."""

    def __init__(self, a: Side, b: Side, found: list[Finding], first: Finding):
        self.a, self.b, self.found, self.first = a, b, found, first
        self.sides = (a, b)
        self.update, self.name = first.update, first.name
        self.module = first.name.partition("#")[0]
        self.where = f"{'input of ' if first.kind == 'input' else ''}{self.module or 'the model'}"
        self.pairs = {str(pair.a): pair for pair in a.names.pairs}

    def failed(self, stage: str) -> list[Finding]:
        """Return what differs at this stage of this update."""
        return [f for f in self.of(stage) if not f.passes]

    def of(self, stage: str) -> list[Finding]:
        """Return all that was compared at this stage of this update."""
        return [f for f in self.found if f.stage == stage and f.update == self.update]

    def arrays(self, kind: str, name: str) -> list[np.ndarray | None]:
        """Return an array of this update in A and in B."""
        return [side.get(self.update, kind, name, self.first.call) for side in self.sides]

    @functools.cached_property
    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the array that differs, of A and of B, in one layout."""
        x, y = self.arrays(self.first.kind, self.name)
        assert x is not None and y is not None
        return aligned(*(z.astype(np.float64) if z.dtype.kind == "f" else z for z in (x, y)))

    @property
    def x(self) -> np.ndarray:
        return self.both[0]

    @property
    def y(self) -> np.ndarray:
        return self.both[1]

    @functools.cached_property
    def tokens(self) -> np.ndarray | None:
        """Return the ids that A's model gets [B, T]."""
        for kind, name in TOKENS:
            x = self.a.get(self.update, kind, name, self.first.call)
            if x is not None and x.dtype.kind in "iu" and x.ndim == 2:
                return x.astype(np.int64)
        return None

    def batch(self, name: str) -> np.ndarray | None:
        """Return labels, positions, or what else A's model is given by this name."""
        return self.a.get(self.update, "batch", name, self.first.call)

    def entry(self, side: Side) -> Entry:
        return side.entries[self.update, self.first.kind, self.name, self.first.call]

    def input(self, module: str) -> np.ndarray | None:
        """Return what A's module gets."""
        x = self.a.get(self.update, "input", module, self.first.call)
        return None if x is None else x.astype(np.float64)

    @functools.cached_property
    def maker(self) -> str:
        """Return the module that makes the output: the last one inside whose output is returned as it is."""
        source = self.entry(self.a).source
        return source.name.partition("#")[0] if source.kind == "activation" else self.module

    def earlier(self, side: Side, n: int) -> list[tuple[str, np.ndarray]]:
        """Return the last n arrays that a side computes before this one and both have, the latest first, each once.

        Names are A's.
        """
        me, result = self.entry(side), list[tuple[str, np.ndarray]]()
        known = {(b if side.is_b else a): a for a, b in side.names.modules.items()} | {"": ""}
        for e in reversed(side.record.entries[: me.number]):
            is_own = e.update == me.update and e.kind in ("input", "activation") and e.is_number and e.source is e
            name = e.name.partition("#")[0]
            if is_own and name in known and len(result) < n:
                text = f"the {'input' if e.kind == 'input' else 'output'} of {known[name] or 'the model'}"
                z = e.array().astype(np.float64)
                result.append((text, self._aligned(z) if e.shape == me.shape else z))
        return result

    def _aligned(self, z: np.ndarray) -> np.ndarray:
        """Return an array of the shape of the one that differs in the layout in which both are compared."""
        shape = self.x.shape
        is_cut = z.shape != shape and z.shape[-1] == shape[-1] and z.size >= self.x.size
        return z.reshape(-1, shape[-1])[: self.x.size // shape[-1]].reshape(shape) if is_cut else z

    def parameters(self, module: str) -> dict[str, np.ndarray]:
        """Return A's parameters of a module, by the last part of their names."""
        found = {}
        for pair in self.a.names.pairs:
            if shown(pair.a, self.modules) == module:
                x = self.a.tensor("parameter", self.update, pair)
                if x is not None:
                    found[pair.a.name.rpartition(".")[2]] = x
        return found

    @functools.cached_property
    def modules(self) -> list[str]:
        """Return A's modules in the order of execution."""
        return list(dict.fromkeys(name for _, kind, name, _ in self.a.entries if kind == "activation"))

    def gradients(self, update: int | None = None) -> list[tuple[Pair, np.ndarray, np.ndarray]]:
        """Return the gradients that both have."""
        result = []
        for pair in self.a.names.pairs:
            x, y = (side.tensor("gradient", self.update if update is None else update, pair) for side in self.sides)
            if x is not None and y is not None and x.shape == y.shape and np.isfinite(x).all() and np.isfinite(y).all():
                result.append((pair, x, y))
        return result

    @functools.cached_property
    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rate of each update in A and in B."""
        n = min(side.n_updates for side in self.sides)
        one, two = (np.array([side.rate(i) for i in range(n)]) for side in self.sides)
        return one, two

    def settings(self, side: Side, name: str = "") -> dict[str, Any]:
        """Return the settings of the optimizer for a parameter."""
        infos = [e.info for e in side.record.all("setting") if e.name.startswith("group")]
        own = [x for x in infos if name in x.get("parameters", [])] or infos
        return own[0] if own else {}
