"""Records what a JAX model computes, inside jit, grad, vmap, remat and scan, and what an update is handed over.

A tap is an operation that returns its argument, and whose compiled form also calls Python with it. Under vmap it gets
the whole batch, with its axis in front; in a scan it gets the number of the iteration, for which `jax.lax.scan` is
wrapped while a recorder is open. Rematerialization computes some taps twice: what is the same but for rounding is kept
once. What no result needs is not computed, and so not recorded.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from parity_tests.record import sketch
from parity_tests.record.files import sketched
from parity_tests.record.recorder import WHOLE, Recorder

_open: list["JaxRecorder"] = []


@dataclasses.dataclass(eq=False)
class Scan:
    """A scan that is traced now: its number, and its iteration, an array. Layers of a stack are counted by its path."""

    number: int
    iteration: Any
    n_before: collections.Counter[str]
    n_inside: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Which of several alike a call of a module is: the iteration of a scan, or the layer of a stack with this path."""

    depth: int | None = None  # of the scan
    first: int = 0
    scan: Scan | None = None
    path: str = ""

    def number(self, iterations: tuple[int, ...]) -> int:
        step = self.scan.n_inside[self.path] if self.scan else 1
        return self.first + (0 if self.depth is None else iterations[self.depth] * step)


@dataclasses.dataclass(eq=False)
class Tap:
    """A place in a program. `order` has the numbers of the scans around it, and last its own."""

    recorder: "JaxRecorder"
    kind: str
    name: str  # with {0}, {1}, ... for numbers of layers
    order: tuple[int, ...]
    info: dict[str, Any]
    layers: tuple[Layer, ...]
    aliases: list["Tap"] = dataclasses.field(default_factory=list)  # the same array as another module's

    def placed(self, iterations: tuple[int, ...]) -> tuple[int, ...]:
        """Return where a call of it stands in the order of execution."""
        pairs = zip(self.order, iterations, strict=False)
        return (*itertools.chain.from_iterable(pairs), self.order[-1])


tap_p = Primitive("parity_tap")


def _emit(x: Any, *iterations: Any, tap: Tap) -> Any:
    is_sketched = sketched(x, tap.recorder.whole) and jnp.issubdtype(x.dtype, jnp.floating)
    shape, sent, sums = (x.shape, *_sketch(x)) if is_sketched else (None, x, None)
    if x.dtype == jnp.float64:
        # As its bits: a callback may run in a thread in which jax.enable_x64 is off, where float64 becomes float32.
        sent, sums = jax.tree.map(lambda z: jax.lax.bitcast_convert_type(z, jnp.uint32), (sent, sums))
    jax.debug.callback(functools.partial(_received, tap, shape, x.dtype), sent, sums, *iterations)
    return x


def _received(tap: Tap, shape: tuple[int, ...] | None, dtype: Any, x: Any, sums: Any, *iterations: Any) -> None:
    if dtype == jnp.float64:
        x, sums = jax.tree.map(lambda z: np.asarray(z).view(np.float64)[..., 0], (x, sums))
    tap.recorder.receive(tap, shape, x, sums, tuple(int(i) for i in iterations))


def _sketch(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    sums = sketch.projections(wide, jnp.einsum, lambda signs: jnp.asarray(signs, wide.dtype))
    return x[np.ix_(*sketch.axes(x.shape))], jnp.concatenate([jnp.sqrt(jnp.sum(wide * wide))[None], sums])


def _batched(args: Any, axes: Any, tap: Tap) -> Any:
    x, *iterations = args
    if axes[0] is None:
        return tap_p.bind(x, *iterations, tap=tap), None
    return tap_p.bind(jnp.moveaxis(x, axes[0], 0), *iterations, tap=tap), 0


tap_p.def_impl(_emit)
tap_p.def_abstract_eval(lambda x, *iterations, tap: x)
mlir.register_lowering(tap_p, mlir.lower_fun(_emit, multiple_results=False))
ad.primitive_jvps[tap_p] = lambda primals, tangents, tap: (tap_p.bind(*primals, tap=tap), tangents[0])
batching.primitive_batchers[tap_p] = _batched


def tag(name: str, x: Any) -> Any:
    """Return an array, or a tree of arrays, and record it where a recorder is open."""
    for recorder in _open[-1:]:
        x = recorder.tap("activation", name, x, {})
    return x


class JaxRecorder(Recorder):
    """Records a model of NNX, Linen or Equinox by its calls, and what `step` is given. See record.jax."""

    def __init__(self, model: Any = None, path: Path | str | None = None, whole: int = WHOLE, params: Any = None):
        linen = sys.modules.get("flax.linen")
        if not (model is None or _base(model) or (linen and isinstance(model, linen.Module))):
            raise TypeError(
                f"record.jax: a {type(model).__name__} is no module of NNX, Linen or Equinox; give None and let its "
                "function call parity_tests.record.tag"
            )
        process = jax.process_index() if jax.process_count() > 1 else None
        super().__init__(f"jax {jax.__version__}", path, whole, process)
        self.model, self.lock = model, threading.Lock()
        self.received: dict[tuple[int, ...], list[tuple[Tap, tuple[int, ...], dict[str, Any], np.ndarray]]] = {}
        self.numbers = itertools.count()
        self.scans: list[Scan] = []  # around what is traced now
        self.n_layers: collections.Counter[str] = collections.Counter()  # called so far of each stack
        # Modules that are called now: each with its path, what it is called here, scans around it, and layers.
        self.calls: list[tuple[Any, str, str, int, tuple[Layer, ...]]] = []
        self.paths: dict[int, tuple[Any, str]] = {}
        self.seen: dict[int, tuple[Any, Tap, tuple[int, ...]]] = {}
        self.used: dict[Any, int] = {}
        self.is_muted = False  # while another model is called
        self.exits = contextlib.ExitStack()
        params = model if params is None and _base(model) else params
        self.start = {} if params is None else named(params)

    def __enter__(self) -> Self:
        if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # functions compiled earlier have no taps
            jax.clear_caches()
            self.exits.callback(jax.clear_caches)
        self.exits.callback(_open.remove, self)
        _open.append(self)
        _patch(self.exits, jax.lax, "scan", self._scan(jax.lax.scan))
        _patch(self.exits, jax.random, "bernoulli", self._drawn(jax.random.bernoulli))
        base, linen = _base(self.model), sys.modules.get("flax.linen")
        if base:
            classes = {type(module) for module in _modules(self.model, base).values()}
            for kind in classes:
                if callable(getattr(kind, "__call__", None)):  # noqa: B004  an instance may be called
                    _patch(self.exits, kind, "__call__", self._wrapped(kind.__call__))
        elif linen and self.model is not None:
            self.exits.enter_context(linen.intercept_methods(self._intercepted))
        for name, x in self.start.items():
            self.add("parameter", name, x)
        return self

    def __exit__(self, *error: Any) -> None:
        self._flush()
        self.exits.close()
        super().__exit__()

    def step(
        self, loss: Any = None, grads: Any = None, params: Any = None, state: Any = None, rate: Any = None, **info: Any
    ) -> None:
        """End an update: add its loss, gradients, new parameters, optimizer state and rate; what is not given is not
        compared. `info` is what is known of the optimizer: b1, b2, eps, weight_decay."""
        jax.block_until_ready([x for x in (loss, grads, params, state) if x is not None])
        self._flush()
        if loss is not None:
            self.add("loss", "loss", loss)
        shapes = {name: np.shape(x) for name, x in (named(grads) if grads is not None else {}).items()}
        for name, x in (named(grads) if grads is not None else {}).items():
            self.add("gradient", name, x)
        if info:
            self.writer.add(self.update, "setting", "group 0", info=info)
        if rate is not None:
            self.add("rate", "group 0", rate)
        after = named(params) if params is not None else {}
        shapes |= {name: np.shape(x) for name, x in after.items()}
        for name, x in (named(state) if state is not None else {}).items():
            parameter = next((y for y in shapes if name.endswith("." + y) and shapes[y] == np.shape(x)), "")
            slot = name.removesuffix("." + parameter).removesuffix(".params").rpartition(".")[2] if parameter else name
            self.add("moment", f"{slot}/{parameter}", x)
        self.update += 1
        for name, x in after.items():
            self.add("parameter", name, x)

    def stored(self, x: Any) -> dict[str, Any]:
        if not isinstance(x, jax.Array):
            return super().stored(x)
        dtype, shape = str(x.dtype), x.shape
        if sketched(x, self.whole) and jnp.issubdtype(x.dtype, jnp.floating):
            kept, sums = _sketch(x)
            return self.writer.array(_plain(kept), dtype, shape) | {"sketch": sketch.line(shape, np.asarray(sums))}
        if x.is_fully_replicated:
            return self.writer.array(_plain(x.addressable_data(0)), dtype)
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        starts = [[part.start or 0 for part in shard.index] for shard in shards]
        pieces = [_plain(shard.data) for shard in shards]
        return self.writer.shards(dtype, shape, list(zip(starts, pieces, strict=True)))

    def optimizer(self, transformation: Any) -> Any:
        """Return an optax transformation whose gradients are recorded, as it gets them, wherever it is called."""

        def update(grads: Any, *args: Any, **kwargs: Any) -> Any:
            names = named(grads)
            leaves, structure = jax.tree.flatten(grads)
            taps = zip(names, leaves, strict=True)
            tapped = [self._tapped("gradient", name, x, {}, itertools.count()) for name, x in taps]
            return transformation.update(jax.tree.unflatten(structure, tapped), *args, **kwargs)

        return type(transformation)(transformation.init, update)

    def tap(self, kind: str, name: str, x: Any, info: dict[str, Any]) -> Any:
        """Return a tree of arrays with a tap on each."""
        numbers = itertools.count()
        return jax.tree.map(lambda leaf: self._tapped(kind, name, leaf, info, numbers), x)

    def _tapped(self, kind: str, name: str, x: Any, info: dict[str, Any], numbers: Iterator[int]) -> Any:
        if isinstance(x, np.ndarray):  # outside of jit; the module gets it as it is
            self._tapped(kind, name, jnp.asarray(x), info, numbers)
            return x
        if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        is_number = jnp.issubdtype(x.dtype, jnp.floating)
        known = self.seen.get(id(x))
        if not (is_number or (kind == "input" and name == "")):
            return x
        name += f"#{i}" if (i := next(numbers)) else ""
        tap = self._new_tap(kind, name, info)
        here = tuple(id(scan.iteration) for scan in self.scans)
        if known and known[2] == here:
            known[1].aliases.append(tap)
            return x
        x = tap_p.bind(x, *(scan.iteration for scan in self.scans), tap=tap)
        if self.calls:
            self.seen[id(x)] = x, tap, here
        return x

    def _new_tap(self, kind: str, name: str, info: dict[str, Any]) -> Tap:
        layers = self.calls[-1][4] if self.calls else ()
        return Tap(self, kind, name, (*(scan.number for scan in self.scans), next(self.numbers)), info, layers)

    def _drawn(self, bernoulli: Any) -> Any:
        """Return jax.random.bernoulli, whose masks are recorded where a module draws them: what dropout keeps."""

        @functools.wraps(bernoulli)
        def drawn(*args: Any, **kwargs: Any) -> Any:
            mask = bernoulli(*args, **kwargs)
            if not self.calls:
                return mask
            return tap_p.bind(mask, *(s.iteration for s in self.scans), tap=self._new_tap("mask", "dropout", {}))

        return drawn

    def receive(self, tap: Tap, shape: Any, x: Any, sums: Any, iterations: tuple[int, ...]) -> None:
        """Take an array of a running program, from whatever thread."""
        dtype, plain = str(x.dtype), _plain(x)
        few = np.asarray(x).reshape(-1)[:: max(1, x.size // 256)].astype(np.float64)
        with self.lock:
            calls = self.received.setdefault(tap.placed(iterations), [])
            if self.writer.data.closed or any(_is_again(few, known[3]) for known in calls):
                return
            line = self.writer.array(plain, dtype, shape)
            if shape is not None:
                line["sketch"] = sketch.line(shape, np.asarray(sums))
            calls.append((tap, iterations, line, few))

    def _flush(self) -> None:
        """Write the lines of what has been received, in order of execution."""
        jax.effects_barrier()
        lines: list[tuple[int, tuple[int, ...], Tap, tuple[int, ...], dict[str, Any], Any]] = []
        for place, calls in self.received.items():
            for i, (tap, iterations, line, _) in enumerate(calls):
                lines.append((i, place, tap, iterations, line, None))
                for alias in tap.aliases:
                    lines.append((i, alias.placed(iterations), alias, iterations, {}, (i, place)))
        numbers: dict[Any, int] = {}
        for i, place, tap, iterations, line, same in sorted(lines, key=lambda x: x[:2]):
            body = line if same is None else {"same": numbers[same]}
            name = tap.name.format(*(layer.number(iterations) for layer in tap.layers))
            numbers[i, place] = self.writer.add(self.update, tap.kind, name, info=tap.info, **body)
        self.received.clear()

    # Where a module is in its model

    def _called(self, module: Any, path: str | None, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module, with taps on what it gets and returns. `path` is None where the model has to tell."""
        if self.is_muted or (self.calls and self.calls[-1][0] is module):
            return function(*args, **kwargs)  # the latter: a method of a base class
        if not self.calls and self._is_another(module):
            self.is_muted = True
            try:
                return function(*args, **kwargs)
            finally:
                self.is_muted = False
        if not self.calls:
            self.seen.clear()
            self.used.clear()
            self.n_layers.clear()
            self.paths = {}
        is_in_model = path is not None or id(module) in self.paths
        path = self._path(module) if path is None else path
        shown, depth = path, len(self.scans)
        layers: tuple[Layer, ...] = ()
        if self.calls:
            _, parent, parent_shown, parent_depth, layers = self.calls[-1]
            inner = path.removeprefix(parent).lstrip(".") if path.startswith(parent) else path
            own = self._layers(module, path, parent_depth, is_in_model)
            numbers = "".join(f".{{{i}}}" for i in range(len(layers), len(layers) + len(own)))
            shown, layers = ".".join(x for x in (parent_shown, inner) if x) + numbers, layers + own
        self.calls.append((module, path, shown, depth, layers))
        try:
            args, kwargs = self.tap("input", shown, (args, kwargs), {})
            return self.tap("activation", shown, function(*args, **kwargs), _info(module))
        finally:
            self.calls.pop()
            if not self.calls:
                self.seen.clear()
                self.paths.clear()

    def _is_another(self, module: Any) -> bool:
        """Return whether a module is of the model's class, and not the model: a teacher of other sizes."""
        if type(module) is not type(self.model) or _base(module) is None:
            return False
        one, two = ({name: np.shape(x) for name, x in named(y).items()} for y in (module, self.model))
        return one != two

    def _layers(self, module: Any, path: str, parent_depth: int, is_in_model: bool) -> tuple[Layer, ...]:
        """Return which layer of its stack a call is: one more than the call before, also where scans run groups."""
        depths = range(parent_depth, len(self.scans))
        if is_in_model or not self._is_stacked(module, path):
            return tuple(Layer(depth) for depth in depths)
        if not depths:
            self.n_layers[path] += 1
            return (Layer(first=self.n_layers[path] - 1),)
        scan = self.scans[-1]
        scan.n_inside[path] += 1
        first = scan.n_before[path] + scan.n_inside[path] - 1
        return (*(Layer(depth) for depth in depths[:-1]), Layer(depths[-1], first, scan, path))

    def _is_stacked(self, module: Any, path: str) -> bool:
        """Return whether the model's module has one more axis than this one: the axis of layers."""
        whole = _modules(self.model, _base(self.model)).get(path)
        one, all_ = (jax.tree.leaves(named(x)) for x in (module, whole))
        return bool(one) and bool(all_) and np.ndim(all_[0]) == np.ndim(one[0]) + 1

    def _path(self, module: Any) -> str:
        base: Any = _base(module)
        if not self.calls and type(module) is type(self.model):
            self._known(module, "", base)
        if id(module) not in self.paths:
            # Another object than in the model, as in a scan over stacked layers: the one of the same form, or in turn.
            form = _form(module, base)
            known = [name for name, x in _modules(self.model, base).items() if _form(x, base) == form]
            turn = self.used[form] = self.used.get(form, -1) + 1
            self._known(module, known[turn % len(known)] if known else type(module).__name__, base)
        return self.paths[id(module)][1]

    def _known(self, module: Any, path: str, base: Any) -> None:
        for name, x in _modules(module, base).items():
            self.paths[id(x)] = x, ".".join(part for part in (path, name) if part)

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            return self._called(module, None, functools.partial(function, module), args, kwargs)

        return call

    def _intercepted(self, function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or context.module.scope is None:
            return function(*args, **kwargs)
        return self._called(context.module, ".".join(context.module.path), function, args, kwargs)

    def _scan(self, scan: Any) -> Any:
        @functools.wraps(scan)
        def counted(f: Any, init: Any, xs: Any = None, length: int | None = None, **options: Any) -> Any:
            leaves, number, n_before = jax.tree.leaves(xs), next(self.numbers), self.n_layers.copy()
            n = leaves[0].shape[0] if leaves else length
            assert n is not None, "jax.lax.scan tells what is wrong with its arguments"

            scans: list[Scan] = []

            def body(carry: Any, x: Any) -> Any:
                self.scans.append(Scan(number, x[0], n_before))
                try:
                    return f(carry, x[1])
                finally:
                    scans.append(self.scans.pop())

            result = scan(body, init, (jnp.arange(n), xs), length, **options)
            for path, n_inside in (scans[-1].n_inside if scans else {}).items():
                self.n_layers[path] = n_before[path] + n * n_inside
            return result

        return counted


def _is_again(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether some elements of two arrays at one place are the same but for rounding: one is computed anew."""
    return x.shape == y.shape and bool(np.linalg.norm(x - y) <= 1e-2 * np.linalg.norm(y))


def named(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree, or the parameters of an NNX module, by dotted names."""
    nnx = sys.modules.get("flax.nnx")
    if nnx and isinstance(tree, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(tree, nnx.Param))
    found = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.Array | np.ndarray | np.generic | float | int):
            found[_dotted(path)] = x
    return found


def _dotted(path: Any) -> str:
    """Return the name of a leaf."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    parts = parts[1:] if parts[:1] == ["params"] else parts
    return ".".join(parts[:-1] if parts[-1:] in (["value"], ["raw_value"]) else parts)


def replaced(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return a tree with other values of the arrays that `named` returns, as they are typed and sharded there."""
    nnx = sys.modules.get("flax.nnx")
    if nnx and isinstance(tree, nnx.Module):
        nnx.update(tree, replaced(nnx.state(tree, nnx.Param), arrays))
        return tree

    def value(path: Any, x: Any) -> Any:
        if _dotted(path) not in arrays:
            return x
        y = np.asarray(arrays[_dotted(path)]).astype(x.dtype)
        return jax.device_put(y, x.sharding) if isinstance(x, jax.Array) else y

    return jax.tree_util.tree_map_with_path(value, tree)


def _base(module: Any) -> type | None:
    """Return the class of NNX's or Equinox's modules, if `module` is one."""
    for name, kind in (("flax.nnx", "Module"), ("equinox", "Module")):
        base = getattr(sys.modules.get(name), kind, None)
        if base and isinstance(module, base):
            return base
    return None


def _modules(root: Any, base: Any, path: str = "") -> dict[str, Any]:
    """Return a module and all modules in it, by dotted names."""
    found = {path: root} if isinstance(root, base) else {}
    items: Any = ()
    if isinstance(root, dict):
        items = root.items()
    elif isinstance(root, list | tuple):
        items = enumerate(root)
    elif isinstance(root, base):
        fields = getattr(root, "__dict__", {})
        items = [(key, x) for key, x in fields.items() if not str(key).startswith("_")]
    for key, x in items:
        if isinstance(x, base | dict | list | tuple):
            found |= _modules(x, base, f"{path}.{key}" if path else str(key))
    return found


def _form(module: Any, base: Any) -> Any:
    return tuple((name, type(x)) for name, x in _modules(module, base).items())


def _info(module: Any) -> dict[str, Any]:
    """Return what tells what a module does: its class and its numbers."""
    numbers = {
        key: x
        for key, x in getattr(module, "__dict__", {}).items()
        if isinstance(x, int | float | str) and key[:1] != "_" and key not in ("name", "parent")
    }
    return {"class": type(module).__name__, **numbers}


def _patch(exits: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    if name in vars(owner):
        exits.callback(setattr, owner, name, vars(owner)[name])
    else:
        exits.callback(delattr, owner, name)
    setattr(owner, name, value)


def _plain(x: Any) -> np.ndarray:
    """Return an array as one of NumPy's own types: bfloat16 and smaller as the integers of their bits."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}") if x.dtype.kind == "V" or str(x.dtype) == "bfloat16" else x
