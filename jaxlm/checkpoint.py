"""Checkpoints, written by Orbax while training goes on: the last ones and the best one are kept.

A checkpoint is a folder STEP with the parts `base`, `head` and `optimizer`, each readable alone, `info` (JSON: format,
versions, settings, tokenizer, data, and how far the run was), and checksums.json, which is written last: a folder
without it was never finished. Blocks are stacked along a leading axis of layers. CHECKPOINTS.md has examples.
"""

import contextlib
import functools
import logging
import operator
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import optim
from jaxlm.data import metrics
from jaxlm.errors import UserError, reason
from jaxlm.io import checksums, storage, utf8
from jaxlm.params import frozen, layout, names
from jaxlm.runtime import processes
from jaxlm.step import TrainState

FORMAT = layout.RUN_FORMAT
PARTS = layout.PARTS
PAUSES_S = (0.0, 1.0, 4.0)  # before the tries to save the last state
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it does, and what it raises, too


class Checkpoints:
    """The checkpoints in one folder, by step. Call `close` (or leave the `with` block) to wait for the last save.

    `keep` of the last are kept, and the best. A save that fails tells `warn` why, and leaves the others as they are; of
    several processes, it ends all. All of them call the same methods, and the first of them decides. `record` gets the
    step of each that is whole. Checkpoints that others put into the folder are left alone.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 1,
        warn: Callable[[str], None] = print,
        record: Callable[[int], None] = lambda step: None,
    ):
        self.folder, self.keep, self.warn, self.record = storage.absolute(folder), keep, warn, record
        self.closing = contextlib.ExitStack()
        self.place = self.closing.enter_context(storage.plain(self.folder))  # for Orbax
        silence_failed_saves()
        self.checkpointer = new_checkpointer()
        self.finishing: threading.Thread | None = None
        self.n_saved, self.stalled_s = 0, 0.0  # saves that are whole, and how long training stood still for all
        self.failed: tuple[int, str] | None = None  # step of the save that failed, if it was the last one, and why
        self.failure: UserError | None = None
        self.own: set[int] = set()
        self.device = storage.device(self.folder)
        if processes.is_first():
            remove_unfinished(self.folder)
            self.own = {step for step, path in checksums.finished_in(self.folder) if path.is_dir()}
        processes.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None or jax.process_count() == 1:  # else the others are not here to wait for
            self.close()

    def save(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Start to save; returns when the arrays are copied from the device.

        `losses` are the validation losses by step: the checkpoint with the lowest is the best.
        """
        started_s = time.monotonic()
        self.wait()
        step = int(state.step)
        if step not in self.steps():
            try:
                needs_frozen = self._start(step, state, info | {"val_loss": losses.get(step)})
                self.finishing = threading.Thread(target=self._finish, args=(step, dict(losses), needs_frozen))
                self.finishing.start()
            except Exception as error:  # whatever Orbax and the system raise: a run outlives it
                self._failed(step, error)
                if self.failure:
                    raise self.failure from error
        self.stalled_s += time.monotonic() - started_s

    def save_last(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Save as `save` does and wait for it; try again where that fails, since nothing is saved after it."""
        for pause_s in PAUSES_S:
            time.sleep(pause_s)
            self.save(state, info, losses)
            self.wait()
            if int(state.step) in self.steps():
                return

    def steps(self) -> list[int]:
        """Return the steps of all that is whole."""
        return processes.from_first(self._found())

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state saved at `step`, with the shapes, types and placement of `like`.

        Raises UserError, in all processes, if it is damaged.
        """
        self.wait()
        path = self.folder / str(step)
        problem = ""
        if processes.is_first():
            try:
                layout.check_run(path)
            except UserError as error:
                problem = str(error)
        if problem := processes.from_first(problem):
            raise UserError(problem)
        return restore(path, like, is_checked=True)

    def wait(self) -> None:
        """Wait until what is being saved is whole."""
        if self.finishing is not None:
            self.finishing.join()
            self.finishing = None
            if self.failure:
                raise self.failure
            processes.wait()  # for the first, which has made it whole

    def summary(self) -> str:
        """Return a line on the saves so far."""
        self.wait()
        n, stalled_s = self.n_saved, self.stalled_s / max(self.n_saved, 1)
        failed = f"; that of step {self.failed[0]} could not be saved ({self.failed[1]})" if self.failed else ""
        return f"{n} checkpoint{'s' * (n != 1)} saved; training stood still {stalled_s:.3f} s for each{failed}"

    def close(self) -> None:
        """Wait for the last save, and end."""
        self.wait()
        with contextlib.suppress(Exception):  # of a save that failed, which was told then
            self.checkpointer.close()
        self.closing.close()

    def _found(self) -> list[int]:
        try:
            return [step for step, path in checksums.finished_in(self.folder) if step in self.own and path.is_dir()]
        except UserError:  # a disk that fails
            return []

    def _check_folder(self, step: int, kept: bool) -> None:
        """Raise OSError if a save would go to another disk than earlier ones, or replace what is not of this run."""
        device = storage.device(self.folder)
        if device != self.device and self.own and not self._found():
            raise OSError(f"{self.folder} is on another disk now, without the earlier checkpoints; mount it again")
        self.device = device
        for name in (str(step), *([checksums.FROZEN] if kept else [])):
            place = self.folder / name
            if place.is_dir() and not checksums.is_ours(place) or place.is_file():
                raise OSError(f"{place} is there, and is no checkpoint; move it away")
        if checksums.is_finished(self.folder / str(step)):
            raise OSError(f"{self.folder / str(step)} is of another run; give each its own folder")

    def _start(self, step: int, state: TrainState, info: dict[str, Any]) -> bool:
        """Start to write a checkpoint; return whether it needs the weights that are not trained beside it."""
        items = parts_of(state)
        kept = frozen_of(state)
        if processes.is_first():
            self._check_folder(step, bool(kept))
        if not storage.is_remote(self.folder) and processes.is_first():
            n_bytes = sum(x.nbytes for x in jax.tree.leaves([items, kept]))
            self.folder.mkdir(parents=True, exist_ok=True)
            n_free = shutil.disk_usage(self.folder).free
            if n_free < 1.05 * n_bytes + 1e5:  # and a little for the small files
                raise OSError(f"it needs {n_bytes / 1e6:,.1f} MB, and {n_free / 1e6:,.1f} MB are free")
        # Once, before the first; what lies there without one is of a run that never had one.
        if kept and not (self.steps() and processes.from_first(checksums.is_finished(self.folder / checksums.FROZEN))):
            self._save_frozen(kept)
        saved: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self.checkpointer.save(
            self.place / str(step), args=ocp.args.Composite(**saved, info=ocp.args.JsonSave(info)), force=True
        )
        return bool(kept)

    def _save_frozen(self, kept: dict[str, Any]) -> None:
        folder = self.folder / checksums.FROZEN
        saved = {name: ocp.args.PyTreeSave(tree) for name, tree in kept.items()}
        self.checkpointer.save(self.place / folder.name, args=ocp.args.Composite(**saved), force=True)
        self.checkpointer.wait_until_finished()
        if processes.is_first():
            checksums.write(folder)
        processes.wait()

    def _finish(self, step: int, losses: Mapping[int, float], needs_frozen: bool) -> None:
        """Make the checkpoint whole, and only then remove those that it replaces."""
        try:
            self.checkpointer.wait_until_finished()
            if processes.is_first():
                layout.check_opens(self.folder / str(step))
                checksums.write(self.folder / str(step), needs_frozen)
                self.own.add(step)
                self.record(step)
            self.n_saved, self.failed = self.n_saved + 1, None
        except Exception as error:
            self._failed(step, error)
            return
        if processes.is_first():
            steps = self._found()
            for old in set(steps[: -self.keep]) - {metrics.best(steps, losses)}:
                try:
                    checksums.remove(self.folder / str(old))
                except Exception as error:  # of a disk or a network that fails
                    self.warn(f"the checkpoint of step {old} could not be removed ({reason(error)})")

    def _failed(self, step: int, error: Exception) -> None:
        failed = step, re.sub(r" \[(os_error_code|tensorstore_spec|source locations)=.*", "", reason(error))
        is_new, self.failed = failed != self.failed, failed
        if jax.process_count() > 1:  # the others wait for this part of it
            self.failure = UserError(
                f"{self.folder}: the checkpoint of step {step} could not be saved ({failed[1]}); free some space, and "
                "go on with --resume auto"
            )
            return
        self.checkpointer = new_checkpointer()  # the old one would raise the rest of its errors in the next save
        with contextlib.suppress(Exception):  # of a disk or a network that fails
            remove_unfinished(self.folder)
        if is_new:
            self.warn(f"the checkpoint of step {step} could not be saved ({failed[1]}); the run goes on")


def new_checkpointer() -> ocp.AsyncCheckpointer:
    """Return an asynchronous checkpointer of Orbax that makes its folders before `save` returns.

    Orbax can make them in a thread as well. If that fails, its other threads wait 300 s, and the process cannot end.
    """
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
    return ocp.AsyncCheckpointer(handler, async_options=options)


@functools.cache
def silence_failed_saves() -> None:
    """Keep Python and TensorStore from printing tracebacks of a save that fails, for which there is a warning.

    Orbax closes its event loop when the first array cannot be written. The others then find it closed, or never begin.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def parts_of(state: TrainState) -> dict[str, Any]:
    """Return what a checkpoint has of a state, by part; of weights, those that are trained."""
    first, second, count = optim.moments(state.opt_state)
    trained, _ = frozen.apart(state.params, first)
    return {**trained, "optimizer": {"first_moment": first, "second_moment": second, "count": count}}


def frozen_of(state: TrainState) -> dict[str, Any]:
    """Return what all checkpoints of a run have of a state, by part: the weights that are not trained."""
    return frozen.apart(state.params, optim.moments(state.opt_state)[0])[1]


def remove_unfinished(folder: Path) -> None:
    """Remove what a save that never came to its end has left."""
    for path in storage.children(folder):
        if checksums.DAMAGED not in path.name and checksums.is_cut_short(path):
            storage.remove(path)


def restore(
    path: Path,
    like: TrainState,
    parts: Sequence[str] = PARTS,
    step: int | None = None,
    is_checked: bool = False,
) -> TrainState:
    """Return `like` with the given parts of a checkpoint of jaxlm, and no other byte of it read.

    `like` has arrays, or jax.ShapeDtypeStruct with shardings where the part is restored. The update number is that of
    the checkpoint, or `step`. Raises UserError if a part has other shapes or types, or, unless that has been looked
    for, is damaged.
    """
    if not is_checked:
        layout.check_run(path, (*parts, "info"))
    found = restored(path, {name: tree for name, tree in parts_of(like).items() if name in parts})
    if step is None:
        step = int(utf8.read_json(path / "info" / "metadata")["step"])
    state = with_parts(like, found, step)
    return jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), state, like)


def with_parts(state: TrainState, parts: Mapping[str, Any], step: int) -> TrainState:
    """Return a state with some parts replaced, in the form that `parts_of` gives them, at an update number."""
    params = frozen.with_trained(state.params, {name: parts[name] for name in ("base", "head") if name in parts})
    opt_state = state.opt_state
    if "optimizer" in parts:
        part = parts["optimizer"]
        opt_state = optim.with_moments(opt_state, part["first_moment"], part["second_moment"], part["count"])
    # Two arrays, since an update is given both of them to use again.
    counts = [jax.device_put(np.int32(step), state.step.sharding) for _ in range(2)]
    return TrainState(counts[0], params, optim.at_step(opt_state, counts[1]))


def restored(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts of a checkpoint of jaxlm, with the shapes, types and placement of those `wanted`, by name.

    Raises UserError if a part has other shapes or types.
    """
    found = {}
    with ocp.PyTreeCheckpointer() as checkpointer, storage.plain(path) as place:
        for name, tree in wanted.items():
            stored = checkpointer.metadata(place / name).item_metadata.tree
            n_stored, n_rows = (_n_positions(x) for x in (stored, tree))
            is_cut = n_stored > n_rows > 0  # learned positions: the first of them are used
            if is_cut:
                tree = _with_positions(tree, functools.partial(_abstract, n_rows=n_stored))
            _check(f"{path}/{name}", _shapes(stored), _shapes(tree))
            kinds = ocp.checkpoint_utils.construct_restore_args(tree)
            found[name] = checkpointer.restore(place / name, args=ocp.args.PyTreeRestore(item=tree, restore_args=kinds))
            if is_cut:
                found[name] = _with_positions(found[name], operator.itemgetter(slice(n_rows)))
    return found


def _n_positions(tree: Any) -> int:
    """Return the rows of a part's table of learned positions, 0 if it has none."""
    table = tree.get("embedding", {}).get("position")
    return 0 if table is None else table.shape[0]


def _with_positions(tree: Any, change: Callable[[Any], Any]) -> Any:
    embedding = tree["embedding"]
    return {**tree, "embedding": {**embedding, "position": change(embedding["position"])}}


def _abstract(x: Any, n_rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((n_rows, *x.shape[1:]), x.dtype, sharding=x.sharding)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of each array in a tree, by its path."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def _check(source: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError unless two trees are alike, since Orbax restores what is not without a word."""
    found, needed = ({name: shape for name, (shape, _) in tree.items()} for tree in (stored, wanted))
    names.check_shapes(found, needed, source)
    for name, (_, dtype) in wanted.items():
        if stored[name][1] != dtype:
            raise UserError(
                f"{source}: {name} is {stored[name][1]}, but has to be {dtype} here; jaxlm.convert makes a run of that"
            )
