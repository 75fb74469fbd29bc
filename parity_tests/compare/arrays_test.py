"""The comparison of any two runs: the example as a process, differences of each kind, names, and bad input."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.errors import UserError
from parity_tests.compare import arrays as of_arrays
from parity_tests.compare.arrays import Arrays
from parity_tests.compare.command import main

ROOT = Path(__file__).parents[2]


def run(**changes: Any) -> Arrays:
    """Return a run of 5 updates in float32, with changes."""
    random = np.random.default_rng(0)
    arrays = {
        "logits0": random.normal(size=(2, 3, 7)),
        "loss": random.uniform(1, 2, 5),
        "rate": np.array([0.0, 0.1, 0.2, 0.1, 0.0]),
        "grad0/a": random.normal(size=(4, 6)),
        "weights/a": random.normal(size=(4, 6)),
        "weights/b": random.normal(size=6),
    }
    return {name: np.float32(x) for name, x in arrays.items()} | changes


def test_the_example_of_another_model_passes_and_notices_a_change(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/compare_own_port.py", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all 14 numbers pass\n")
    arrays = of_arrays.read(tmp_path / "flax.npz")
    arrays["grad0/layers_2/kernel"] = arrays["grad0/layers_2/kernel"] * np.float32(1 + 3e-5)
    names = of_arrays.read_names(tmp_path / "names.json")
    failed = [row for row in of_arrays.compare(of_arrays.read(tmp_path / "torch.npz"), arrays, names) if not row.passes]
    assert [(row.quantity, row.where) for row in failed] == [("grad0", "layers_2/kernel")]


@pytest.mark.parametrize(
    ("key", "factor", "where"),
    [
        ("logits0", 1 + 3e-5, "logits0"),
        ("loss", 1 + 3e-5, "update "),
        ("rate", 1 + 1e-5, "update 2"),
        ("grad0/a", 1 + 3e-5, "a"),
        ("weights/b", 1 + 3e-5, "b"),
        ("weights/b", np.nan, "b"),
    ],
)
def test_each_kind_of_number_fails_beyond_its_tolerance(key: str, factor: float, where: str) -> None:
    assert all(row.passes and row.difference == 0 for row in of_arrays.compare(run(), run()))
    failed = [row for row in of_arrays.compare(run(**{key: run()[key] * np.float32(factor)}), run()) if not row.passes]
    assert [row.quantity for row in failed] == [key.partition("/")[0]]
    assert failed[0].where.startswith(where)


def test_weights_are_compared_by_their_way_where_the_start_is_known() -> None:
    b = run()
    start = {"start/b": b["weights/b"] * np.float32(1 - 1e-3)}
    a = b | {"weights/b": b["weights/b"] * np.float32(1 + 5e-6)}
    assert all(row.passes for row in of_arrays.compare(a, b))
    assert [row.where for row in of_arrays.compare(a | start, b | start) if not row.passes] == ["b"]


def test_runs_in_float64_have_its_tolerances() -> None:
    a, b = ({name: np.float64(x) for name, x in run().items()} for _ in range(2))
    a["loss"][3] *= 1 + 1e-7
    failed = [row for row in of_arrays.compare(a, b) if not row.passes]
    assert [(row.quantity, row.where) for row in failed] == [("loss", "update 3")]
    assert all(row.passes for row in of_arrays.compare(a, run()))


def test_names_and_axes_of_a_map() -> None:
    a = {"weights/h.0.w": np.ones((2, 3)), "weights/h.11.w": np.full((2, 3), 2.0), "weights/h.0.b": np.arange(3.0)}
    names = {r"h\.(\d+)\.w": {"name": r"layer_\1/kernel", "axes": [1, 0]}, r"h\.0\.b": "bias", "h.*": "never"}
    found = of_arrays.renamed(a, names)
    assert {name: x.shape for name, x in found.items()} == {
        "weights/layer_0/kernel": (3, 2),
        "weights/layer_11/kernel": (3, 2),
        "weights/bias": (3,),
    }
    assert found["weights/layer_11/kernel"].max() == 2


def test_what_one_run_lacks_or_has_in_another_shape_fails() -> None:
    a = run(loss=run()["loss"][:4], extra=np.ones(2))
    del a["weights/b"]
    failed = {row.quantity: row.where for row in of_arrays.compare(a, run()) if not row.passes}
    assert failed == {
        "loss": "loss has the shapes [4] and [5]",
        "extra": "extra is only in A",
        "weights": "b is only in B",
    }


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", **run())
    np.savez(tmp_path / "b.npz", **run(loss=run()["loss"] * np.float32(1.1)))
    assert main([str(tmp_path / "a.npz"), str(tmp_path / "a.npz")]) == 0
    assert main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum("FAIL" in line for line in lines) == 2 and lines[-1] == "1 of 6 numbers FAIL"
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "a.npz"), str(tmp_path / "none.npz")])
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no map of names"),
        ('{"a": 1}', "a: 1 is neither a name nor"),
        ('{"a": {"name": "b", "transpose": true}}', "is neither a name nor"),
        ('{"(": "b"}', "no regular expression"),
    ],
)
def test_a_bad_map_is_told(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        of_arrays.read_names(file)


def test_runs_with_nothing_in_common_are_told() -> None:
    with pytest.raises(UserError, match="nothing in common: a/b in the one, loss in the other"):
        of_arrays.compare({"a/b": np.ones(2)}, {"loss": np.ones(2)})


@pytest.mark.parametrize("names", [{"b": {"name": "b", "axes": [1, 0]}}, {"b": r"\7"}])
def test_a_map_that_does_not_fit_is_told(names: of_arrays.Names) -> None:
    with pytest.raises(UserError, match=r"does not fit weights/b \[6\]"):
        of_arrays.renamed(run(), names)
