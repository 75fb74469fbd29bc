"""The trace that --profile writes, by a real run, and the arithmetic of its table."""

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.runtime import profile


def test_a_run_writes_a_trace_and_tells_where_time_goes(
    launch: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = "--model.d-model 16 --model.n-layers 1 --train.max-steps 8 --train.eval-interval 8 --train.batch-size 4"
    run = tmp_path / "run"
    assert launch(f"--task mlm {sizes} --run.dir {shlex.quote(str(run))} --profile 3", tmp_path).wait() == 0
    out = capfd.readouterr().out
    assert re.search(rf"3 updates in \d\.\d{{3}} s; the trace is in {re.escape(str(run))}/trace", out)
    rows = re.findall(r"^│ (.+?) +│ +[\d.]+ +│ +([\d.]+)% +│$", out, re.MULTILINE)
    shares = {name: float(share) for name, share in rows}
    assert shares.keys() == {*profile.SCOPES, profile.REST, "waiting for data", "device idle: host, data"}
    assert all(shares[part] > 0 for part in profile.SCOPES)
    busy = sum(shares[part] for part in (*profile.SCOPES, profile.REST))
    assert busy + shares["device idle: host, data"] == pytest.approx(100, abs=1)
    # What Perfetto opens: complete events with names and times.
    [path] = run.glob("trace/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.open(path).read())["traceEvents"]
    assert sum(event.get("name") == profile.DATA and event["ph"] == "X" for event in events) == 3


def test_operations_are_told_by_their_innermost_scope() -> None:
    @jax.named_scope("attention")
    def attention(x: jax.Array) -> jax.Array:
        return x @ x.T

    def loss(x: jax.Array) -> jax.Array:
        with jax.named_scope("output layer"):
            return jnp.sum(jnp.sin(attention(x)))

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 64))).compile().as_text()
    parts = dict(profile._scopes(program))
    assert {part for name, part in parts.items() if name.startswith("dot")} == {"attention"}
    assert "output layer" in parts.values()


def test_time_inside_other_operations_is_counted_once() -> None:
    # A loop of 100 with operations of 30 and 20 in it, one of which has another of 5; then one of 7.
    events = [(0, 100), (10, 30), (12, 5), (50, 20), (100, 7)]
    assert profile._own_times([(start, start + n) for start, n in events]) == [50, 25, 5, 20, 7]
    assert profile._covered([(0, 10), (5, 12), (6, 7), (20, 21)]) == 13
