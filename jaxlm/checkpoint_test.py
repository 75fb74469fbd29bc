"""Checkpoints on a real disk: bitwise the same in another process, the best and the last kept, whole or not there."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import optim, step
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import TrainConfig

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
    optimizer = optim.adamw(TrainConfig(), lambda i: 0.1)
    state = step.init_state({"base": {"kernel": jnp.zeros((n, 50))}, "head": {"bias": jnp.zeros(50)}}, optimizer)
    random = np.random.default_rng(i)
    floats = lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype) if x.ndim else jnp.full_like(x, i)  # noqa: E731
    return jax.tree.map(floats, state)


def assert_bitwise_equal(got: step.TrainState, want: step.TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


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
        assert checkpoints.best_step(so_far) == best
        for i in kept:
            assert_bitwise_equal(checkpoints.restore(i, state_at(0)), state_at(i))
    assert steps_on_disk(tmp_path) == kept


def test_a_state_saved_twice_is_kept_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(1), INFO, {1: 2.0})
        checkpoints.save(state_at(1), INFO, {})
        assert checkpoints.best_step({1: 2.0}) == 1
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
from jaxlm.checkpoint_test import INFO, Checkpoints, state_at
with Checkpoints(Path({str(tmp_path)!r})) as checkpoints:
    checkpoints.save(state_at(1, n=1000), INFO | {{"step": 1}}, {{1: 2.0}})
    assert checkpoints.best_step({{1: 2.0}}) == 1
    # The kernel ends this process as soon as a file grows beyond this: in the midst of the second save.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    checkpoints.save(state_at(2, n=1000), INFO | {{"step": 2}}, {{1: 2.0, 2: 1.0}})
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == -signal.SIGXFSZ, process.stderr
    assert len(list(tmp_path.iterdir())) > 1  # something of the second is there

    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step({1: 2.0}) == 1
        assert_bitwise_equal(checkpoints.restore(1, state_at(0, n=1000)), state_at(1, n=1000))
        checkpoints.save(state_at(2, n=1000), INFO | {"step": 2}, {1: 2.0, 2: 1.0})  # and the run can go on
        assert checkpoints.best_step({1: 2.0, 2: 1.0}) == 2
    info = json.loads((tmp_path / "2" / "info" / "metadata").read_text())
    assert info == INFO | {"step": 2, "val_loss": 1.0}
