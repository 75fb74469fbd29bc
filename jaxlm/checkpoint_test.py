"""Checkpoints on a real disk: bitwise the same in another process, the best and the last kept, whole or not there."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import optim, step
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import TrainConfig
from jaxlm.data import metrics
from jaxlm.errors import UserError

INFO = {
    "format": 2,
    "step": 7,
    "task": "mlm",
    "rate": 0.1,
    "config": {"model.d_model": 12, "data.path": ""},
    "tokenizer": "abc",
}


def state_at(i: int, n: int = 7) -> step.TrainState:
    """Return a state with random numbers everywhere, a function of i; the kernel has n rows."""
    optimizer = optim.make_optimizer(TrainConfig(), lambda i: 0.1, 2)
    state = step.init_state({"base": {"kernel": jnp.zeros((n, 50))}, "head": {"bias": jnp.zeros(50)}}, optimizer)
    random = np.random.default_rng(i)
    floats = lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype) if x.ndim else jnp.full_like(x, i)  # noqa: E731
    return jax.tree.map(floats, state)


def assert_bitwise_equal(got: step.TrainState, want: step.TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def best_step(checkpoints: Checkpoints, losses: dict[int, float]) -> int | None:
    checkpoints.wait()
    return metrics.best(checkpoints.steps(), losses)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 2.5], [2, 4], 2),
        ([3.0, 1.0, 2.0, None], [2, 4], 2),
        ([3.0, 2.0, 1.0], [3], 3),
        ([None, None], [2], None),
        ([2.0, 1.0, math.nan, math.nan], [2, 4], 2),
        ([math.nan, 1.0, 2.0], [2, 3], 2),
    ],
)
def test_the_best_and_the_last_are_kept(
    losses: list[float | None], kept: list[int], best: int | None, tmp_path: Path
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        so_far: dict[int, float] = {}
        for i, loss in enumerate(losses, start=1):
            so_far |= {} if loss is None else {i: loss}
            checkpoints.save(state_at(i), INFO | {"step": i}, so_far)
        assert best_step(checkpoints, so_far) == best
        for i in kept:
            assert_bitwise_equal(checkpoints.restore(i, state_at(0)), state_at(i))
    assert steps_on_disk(tmp_path) == kept


def test_a_state_saved_twice_is_kept_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), INFO, {1: 2.0})
        checkpoints.save(state_at(1), INFO, {})
        assert best_step(checkpoints, {1: 2.0}) == 1
    assert steps_on_disk(tmp_path) == [1]


def test_donated_arrays_can_be_saved(tmp_path: Path) -> None:
    state = state_at(3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, INFO | {"step": 3}, {})
        jax.tree.map(lambda x: x.delete(), state)  # as the next update does, while the files are being written
        assert_bitwise_equal(checkpoints.restore(3, state_at(0)), state_at(3))


def test_a_save_that_is_cut_off_leaves_what_was_there(tmp_path: Path) -> None:
    script = f"""
import resource, signal
from pathlib import Path
from jaxlm.checkpoint_test import INFO, Checkpoints, best_step, state_at
with Checkpoints(Path({str(tmp_path)!r})) as checkpoints:
    checkpoints.save(state_at(1, n=1000), INFO | {{"step": 1}}, {{1: 2.0}})
    assert best_step(checkpoints, {{1: 2.0}}) == 1
    # The kernel ends this process as soon as a file grows beyond this: in the midst of the second save.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    checkpoints.save(state_at(2, n=1000), INFO | {{"step": 2}}, {{1: 2.0, 2: 1.0}})
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGXFSZ, process.stderr
    assert len(list(tmp_path.iterdir())) > 1  # something of the second is there

    with Checkpoints(tmp_path) as checkpoints:
        assert best_step(checkpoints, {1: 2.0}) == 1
        assert_bitwise_equal(checkpoints.restore(1, state_at(0, n=1000)), state_at(1, n=1000))
        checkpoints.save(state_at(2, n=1000), INFO | {"step": 2}, {1: 2.0, 2: 1.0})  # and the run can go on
        assert best_step(checkpoints, {1: 2.0, 2: 1.0}) == 2
    info = json.loads((tmp_path / "2" / "info" / "metadata").read_text())
    assert info == INFO | {"step": 2, "val_loss": 1.0}


@pytest.mark.parametrize(("keep", "kept"), [(1, [2, 6]), (2, [2, 5, 6]), (3, [2, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])])
def test_as_many_of_the_last_are_kept_as_asked_for(keep: int, kept: list[int], tmp_path: Path) -> None:
    losses: dict[int, float] = {}
    with Checkpoints(tmp_path, keep) as checkpoints:
        for i in range(1, 7):
            losses[i] = abs(i - 2)
            checkpoints.save(state_at(i), INFO | {"step": i}, losses)
    assert steps_on_disk(tmp_path) == kept


def test_a_save_that_fails_warns_and_the_next_one_is_tried(tmp_path: Path) -> None:
    # In a process of its own, since what Orbax leaves behind in memory would fail the tests after it.
    script = f"""
import resource
from pathlib import Path
from jaxlm.checkpoint_test import INFO, Checkpoints, state_at, steps_on_disk
folder, warnings = Path({str(tmp_path)!r}), []
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
with Checkpoints(folder, warn=warnings.append) as checkpoints:
    for i in (1, 2, 3):
        # As a quota would, in the midst of the files; Python has SIGXFSZ ignored.
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if i == 2 else limits[0], limits[1]))
        checkpoints.save(state_at(i, n=1000), INFO | {{"step": i}}, {{1: 2.0, 2: 1.0, 3: 3.0}})
        checkpoints.wait()
        print(steps_on_disk(folder), checkpoints.steps())
print(*warnings, checkpoints.summary(), sep="\\n")
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    *steps, warning, summary = process.stdout.splitlines()
    assert steps == ["[1] [1]", "[1] [1]", "[1, 3] [1, 3]"]
    assert re.fullmatch(r"the checkpoint of step 2 could not be saved \(.*\); the run continues", warning)
    assert "File too large" in warning
    assert summary.startswith("2 checkpoints saved; each stopped training for ")
    with Checkpoints(tmp_path) as checkpoints:
        for i in (1, 3):
            assert_bitwise_equal(checkpoints.restore(i, state_at(0, n=1000)), state_at(i, n=1000))


# Moments at which the folder of a save goes: the event, where or in which thread, and how often it happened before.
MOMENTS = [
    ("os.mkdir", "/2.orbax-checkpoint-tmp", 0),
    ("os.mkdir", "/base.orbax-checkpoint-tmp", 0),
    ("open", "/_CHECKPOINT_METADATA", 0),
    ("open", "/metadata", 0),
    ("thread", "serialize_shardings", 0),
    *(("thread", "array_type_handler", i) for i in range(3)),
]


@pytest.mark.parametrize("replacement", ["nothing", "a file"])
def test_a_folder_that_goes_during_a_save_costs_that_save(replacement: str, tmp_path: Path) -> None:
    # In a process of its own, which does not end before the threads of Orbax do.
    script = f"""
import sys, threading
from pathlib import Path
from jaxlm.checkpoint_test import INFO, MOMENTS, Checkpoints, state_at
moment, count = None, 0

def watch(event, what):
    global moment, count
    if moment and event == moment[0] and what.endswith(moment[1]):
        count += 1
        if count > moment[2]:
            moment = None
            folder.rename(folder.with_name("away"))
            if {replacement!r} == "a file":
                folder.touch()

def watched_start(thread, start=threading.Thread.start):
    watch("thread", thread.name)
    start(thread)

sys.addaudithook(lambda event, arguments: watch(event, str(arguments[0]) if arguments else ""))
threading.Thread.start = watched_start
for i, now in enumerate(MOMENTS):
    folder, warnings = Path({str(tmp_path)!r}, str(i), "checkpoints"), []
    with Checkpoints(folder, 9, warnings.append) as checkpoints:
        checkpoints.save(state_at(1), INFO | {{"step": 1}}, {{}})
        checkpoints.wait()
        state, moment, count = state_at(2), now, 0
        checkpoints.save(state, INFO | {{"step": 2}}, {{}})
        checkpoints.wait()
        assert moment is None, now
        for thread in threading.enumerate():  # of the save: one may be about to make the folder again
            if not thread.daemon and not thread.name.startswith(("MainThread", "metadata_store")):
                threading.Thread.join(thread)  # those of Orbax have their own, which raises
        folder.rename(folder.with_name("other")) if folder.exists() else None
        folder.with_name("away").rename(folder)
        checkpoints.save(state_at(3), INFO | {{"step": 3}}, {{}})
        checkpoints.wait()
        print(checkpoints.steps(), *warnings)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    saved = process.stdout.splitlines()
    assert len(saved) == len(MOMENTS)
    for i, line in enumerate(saved):
        # Orbax makes the folder again if it was about to write the first of a checkpoint, at times before the file is
        # there; the checkpoint is then whole, in a folder that is put aside here.
        if line == "[1, 3]":
            assert (tmp_path / str(i) / "other" / "2").is_dir()
        else:
            assert re.fullmatch(r"\[1, 3\] the checkpoint of step 2 could not be saved \(.*\); the run continues", line)
            assert "tensorstore_spec" not in line
    assert replacement == "nothing" or any("could not be saved" in line for line in saved)


def test_a_folder_that_cannot_be_made_warns(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warnings: list[str] = []
    with Checkpoints(tmp_path / "file" / "checkpoints", warn=warnings.append) as checkpoints:
        checkpoints.save(state_at(1), INFO, {})
        assert best_step(checkpoints, {}) is None
    assert len(warnings) == 1 and "Not a directory" in warnings[0]


def test_a_checkpoint_that_needs_more_than_is_free_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    warnings: list[str] = []
    with Checkpoints(tmp_path, warn=warnings.append) as checkpoints:
        checkpoints.save(state_at(1), INFO, {})
    assert len(warnings) == 1 and "MB, and 0.0 MB are free" in warnings[0]
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused_before_orbax_restores_it(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), INFO | {"step": 1}, {})
        with pytest.raises(UserError, match=r"1/base: .*kernel has the shape \[7, 50\], but the model needs \[8, 50\]"):
            checkpoints.restore(1, state_at(0, n=8))
        other = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state_at(0))
        with pytest.raises(UserError, match="1/base: kernel is float32, but has to be bfloat16 here"):
            checkpoints.restore(1, other)
        params = {"base": {"kernel": jnp.zeros((7, 50)), "w": jnp.zeros(1)}, "head": {"bias": jnp.zeros(50)}}
        more = step.init_state(params, optim.make_optimizer(TrainConfig(), lambda i: 0.1, 2))
        with pytest.raises(UserError, match=r"1/base: weights of another model: w \[1\] is missing"):
            checkpoints.restore(1, more)
