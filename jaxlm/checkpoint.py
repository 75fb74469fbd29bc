"""Asynchronous checkpoints with Orbax: the latest ones and the best one are kept.

A checkpoint is a folder STEP. It holds `base`, `head` and `optimizer`, which can be read separately, `info` (JSON:
format, versions, settings, tokenizer, data, progress) and checksums.json. The checksums are written last: a folder
without them is incomplete. Blocks are stacked along a leading axis of layers. CHECKPOINTS.md has examples.
"""

import contextlib
import functools
import logging
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
PAUSES_S = (0.0, 1.0, 4.0)  # before each attempt to save the last state
logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs its progress, and also the errors that it raises


class Checkpoints:
    """The checkpoints of one folder, by step. `close`, or the end of the `with` block, waits for the last save.

    Keeps the `keep` latest checkpoints and the best one. If a save fails, `warn` gets the reason, older checkpoints
    stay, and the run continues; with several processes, all of them end. Every process calls the same methods; process
    0 checks, records and removes. `record` gets the step of each complete checkpoint. Other files in the folder stay.
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
        self.place = self.closing.enter_context(storage.plain(self.folder))  # the same folder, as a path for Orbax
        silence_failed_saves()
        self.checkpointer = new_checkpointer()
        self.finishing: threading.Thread | None = None
        self.n_saved, self.stalled_s = 0, 0.0  # complete saves, and the seconds that training waited for them
        self.failed: tuple[int, str] | None = None  # step and reason, if the latest save failed
        self.failure: UserError | None = None  # if set, `wait` and `save` raise it and so end the run
        self.own: set[int] = set()  # in process 0: steps of this run, also those found at the start
        self.device = storage.device(self.folder)
        if processes.is_first():
            remove_unfinished(self.folder)
            self.own = {step for step, path in checksums.finished_in(self.folder) if path.is_dir()}
        processes.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None or jax.process_count() == 1:  # after an error, other processes never reach a barrier
            self.close()

    def save(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Start a save; return once the arrays are copied from the device.

        `losses` are the validation losses by step: the checkpoint with the lowest loss is the best.
        """
        started_s = time.monotonic()
        self.wait()
        step = int(state.step)
        if step not in self.steps():
            try:
                needs_frozen = self._start(step, state, info | {"val_loss": losses.get(step)})
                self.finishing = threading.Thread(target=self._finish, args=(step, dict(losses), needs_frozen))
                self.finishing.start()
            except Exception as error:  # from Orbax or the system; the run continues
                self._failed(step, error)
                if self.failure:
                    raise self.failure from error
        self.stalled_s += time.monotonic() - started_s

    def save_last(self, state: TrainState, info: dict[str, Any], losses: Mapping[int, float]) -> None:
        """Save and wait. Retries a failed save, because no later one will replace it."""
        for pause_s in PAUSES_S:
            time.sleep(pause_s)
            self.save(state, info, losses)
            self.wait()
            if int(state.step) in self.steps():
                return

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return processes.from_first(self._own_steps())

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state saved at `step`, with the shapes, types and shardings of `like`.

        Raises UserError in all processes if the checkpoint is damaged.
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
        """Wait until the save in progress is complete."""
        if self.finishing is not None:
            self.finishing.join()
            self.finishing = None
            if self.failure:
                raise self.failure
            processes.wait()  # for process 0, which writes the checksums

    def summary(self) -> str:
        """Return a line of text about the saves so far."""
        self.wait()
        n, stalled_s = self.n_saved, self.stalled_s / max(self.n_saved, 1)
        failed = f"; that of step {self.failed[0]} could not be saved ({self.failed[1]})" if self.failed else ""
        return f"{n} checkpoint{'s' * (n != 1)} saved; each stopped training for {stalled_s:.3f} s{failed}"

    def close(self) -> None:
        """Wait for the last save, and release Orbax's threads."""
        self.wait()
        with contextlib.suppress(Exception):  # the error of a failed save, which was reported before
            self.checkpointer.close()
        self.closing.close()

    def _own_steps(self) -> list[int]:
        try:
            return [step for step, path in checksums.finished_in(self.folder) if step in self.own and path.is_dir()]
        except UserError:  # the disk fails
            return []

    def _check_folder(self, step: int, has_frozen: bool) -> None:
        """Raise OSError if the folder is on another disk than before, or a save would replace files of others."""
        device = storage.device(self.folder)
        if device != self.device and self.own and not self._own_steps():
            raise OSError(f"{self.folder} is on another disk now, without the earlier checkpoints; mount it again")
        self.device = device
        for name in (str(step), *([checksums.FROZEN] if has_frozen else [])):
            place = self.folder / name
            if place.is_dir() and not checksums.is_ours(place) or place.is_file():
                raise OSError(f"{place} exists and is not a checkpoint; move it away")
        if checksums.is_finished(self.folder / str(step)):
            raise OSError(f"{self.folder / str(step)} belongs to another run; use one folder per run")

    def _start(self, step: int, state: TrainState, info: dict[str, Any]) -> bool:
        """Start to write a checkpoint; return whether it needs frozen weights, which are stored once per run."""
        items = parts_of(state)
        frozen_weights = frozen_of(state)
        if processes.is_first():
            self._check_folder(step, bool(frozen_weights))
        if not storage.is_remote(self.folder) and processes.is_first():
            n_bytes = sum(x.nbytes for x in jax.tree.leaves([items, frozen_weights]))
            self.folder.mkdir(parents=True, exist_ok=True)
            n_free = shutil.disk_usage(self.folder).free
            if n_free < 1.05 * n_bytes + 1e5:  # with a margin for the small files
                raise OSError(f"it needs {n_bytes / 1e6:,.1f} MB, and {n_free / 1e6:,.1f} MB are free")
        # Frozen weights in a folder without checkpoints are left from a failed run: save them again.
        has_frozen = self.steps() and processes.from_first(checksums.is_finished(self.folder / checksums.FROZEN))
        if frozen_weights and not has_frozen:
            self._save_frozen(frozen_weights)
        saved: dict[str, Any] = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self.checkpointer.save(
            self.place / str(step), args=ocp.args.Composite(**saved, info=ocp.args.JsonSave(info)), force=True
        )
        return bool(frozen_weights)

    def _save_frozen(self, weights: dict[str, Any]) -> None:
        folder = self.folder / checksums.FROZEN
        saved = {name: ocp.args.PyTreeSave(tree) for name, tree in weights.items()}
        self.checkpointer.save(self.place / folder.name, args=ocp.args.Composite(**saved), force=True)
        self.checkpointer.wait_until_finished()
        if processes.is_first():
            checksums.write(folder)
        processes.wait()

    def _finish(self, step: int, losses: Mapping[int, float], needs_frozen: bool) -> None:
        """Complete the checkpoint, and only then remove those that it replaces."""
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
            steps = self._own_steps()
            for old in set(steps[: -self.keep]) - {metrics.best(steps, losses)}:
                try:
                    checksums.remove(self.folder / str(old))
                except Exception as error:  # the disk or the network fails
                    self.warn(f"the checkpoint of step {old} could not be removed ({reason(error)})")

    def _failed(self, step: int, error: Exception) -> None:
        failed = step, re.sub(r" \[(os_error_code|tensorstore_spec|source locations)=.*", "", reason(error))
        is_new, self.failed = failed != self.failed, failed
        if jax.process_count() > 1:  # the other processes wait for this one's shards
            self.failure = UserError(
                f"{self.folder}: the checkpoint of step {step} could not be saved ({failed[1]}); free some space, and "
                "resume with --resume auto"
            )
            return
        self.checkpointer = new_checkpointer()  # the old one would raise its remaining errors in the next save
        with contextlib.suppress(Exception):  # the disk or the network fails
            remove_unfinished(self.folder)
        if is_new:
            self.warn(f"the checkpoint of step {step} could not be saved ({failed[1]}); the run continues")


def new_checkpointer() -> ocp.AsyncCheckpointer:
    """Return an asynchronous Orbax checkpointer that creates its folders before `save` returns.

    Orbax can also create them in a thread. If that fails, its other threads wait 300 s and the process cannot end.
    """
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(async_options=options))
    return ocp.AsyncCheckpointer(handler, async_options=options)


@functools.cache
def silence_failed_saves() -> None:
    """Suppress tracebacks of failed saves from Python and TensorStore; the run prints a warning instead.

    Orbax closes its event loop when the first array cannot be written. Writes of other arrays then fail as well.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def parts_of(state: TrainState) -> dict[str, Any]:
    """Return the trees that a checkpoint stores, by part: trained weights in `base` and `head`, and `optimizer`."""
    first, second, count = optim.moments(state.opt_state)
    trained, _ = frozen.apart(state.params, first)
    return {**trained, "optimizer": {"first_moment": first, "second_moment": second, "count": count}}


def frozen_of(state: TrainState) -> dict[str, Any]:
    """Return the frozen weights, by part; a run stores them once, for all of its checkpoints."""
    return frozen.apart(state.params, optim.moments(state.opt_state)[0])[1]


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that a killed process left incomplete."""
    for path in storage.children(folder):
        if checksums.DAMAGED not in path.name and checksums.is_cut_short(path):
            storage.remove(path)


def restore(
    path: Path, like: TrainState, parts: Sequence[str] = PARTS, step: int | None = None, is_checked: bool = False
) -> TrainState:
    """Return `like` with the given parts of a jaxlm checkpoint; other parts are not read.

    `like` has arrays, or for restored parts jax.ShapeDtypeStruct with shardings. The update number is `step`, by
    default the checkpoint's. Raises UserError if a part has other shapes or types, or if it is damaged. With
    `is_checked`, the caller has verified the checksums already.
    """
    if not is_checked:
        layout.check_run(path, (*parts, "info"))
    trees = read_parts(path, {name: tree for name, tree in parts_of(like).items() if name in parts})
    if step is None:
        step = int(utf8.read_json(path / "info" / "metadata")["step"])
    state = with_parts(like, trees, step)
    return jax.tree.map(lambda x, place: jax.device_put(x, place.sharding), state, like)


def with_parts(state: TrainState, parts: Mapping[str, Any], step: int) -> TrainState:
    """Return a state with some parts replaced, and its update number set; `parts` are trees as in `parts_of`."""
    params = frozen.with_trained(state.params, {name: parts[name] for name in ("base", "head") if name in parts})
    opt_state = state.opt_state
    if "optimizer" in parts:
        stored = parts["optimizer"]
        opt_state = optim.with_moments(opt_state, stored["first_moment"], stored["second_moment"], stored["count"])
    # Two arrays, because an update donates the memory of each.
    counts = [jax.device_put(np.int32(step), state.step.sharding) for _ in range(2)]
    return TrainState(counts[0], params, optim.at_step(opt_state, counts[1]))


def read_parts(path: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts of a jaxlm checkpoint by name, with the shapes, types and shardings of the trees in `like`.

    If the checkpoint has more learned positions than `like`, the first ones are returned. Raises UserError if a part
    has other shapes or types.
    """
    result = {}
    with ocp.PyTreeCheckpointer() as checkpointer, storage.plain(path) as place:
        for name, tree in like.items():
            stored = checkpointer.metadata(place / name).item_metadata.tree
            table, stored_table = (x.get("embedding", {}).get("position") for x in (tree, stored))
            is_cut = table is not None and stored_table is not None and stored_table.shape[0] > table.shape[0]
            if is_cut:
                shape = (stored_table.shape[0], *table.shape[1:])
                tree = _with_positions(tree, jax.ShapeDtypeStruct(shape, table.dtype, sharding=table.sharding))
            _check(f"{path}/{name}", _shapes(stored), _shapes(tree))
            kinds = ocp.checkpoint_utils.construct_restore_args(tree)
            arrays = checkpointer.restore(place / name, args=ocp.args.PyTreeRestore(item=tree, restore_args=kinds))
            if is_cut:
                arrays = _with_positions(arrays, arrays["embedding"]["position"][: table.shape[0]])
            result[name] = arrays
    return result


def _with_positions(tree: Any, table: Any) -> Any:
    return {**tree, "embedding": {**tree["embedding"], "position": table}}


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and type of each array in a tree, by its path."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def _check(source: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise UserError unless two trees have the same shapes and types; Orbax does not report a difference."""
    stored_shapes, shapes = ({name: shape for name, (shape, _) in tree.items()} for tree in (stored, expected))
    names.check_shapes(stored_shapes, shapes, source)
    for name, (_, dtype) in expected.items():
        if stored[name][1] != dtype:
            raise UserError(
                f"{source}: {name} is {stored[name][1]}, but has to be {dtype} here; jaxlm.convert makes a run of that"
            )
