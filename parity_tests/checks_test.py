"""All checks, the fast ones by default; that tolerances go by what was measured, and that checks notice a mistake."""

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import torchlm.ops.layers
from jaxlm.config import Config, ModelConfig
from parity_tests import case as cases
from parity_tests import checks, families, rounding, trajectory
from parity_tests.checks import CHECKS, FAST
from parity_tests.compare.rows import Row, table, worst
from parity_tests.compare.tolerances import FLOAT32, ROUNDING
from parity_tests.packages import Torchlm


def marks_of(check: str) -> list[pytest.MarkDecorator]:
    is_longest = check in ("bfloat16: sst2", "bfloat16: pairs", "bfloat16: mlm")
    return [] if check in FAST else [pytest.mark.slow, *([pytest.mark.longest] if is_longest else [])]


@pytest.mark.parametrize("name", [pytest.param(x, marks=marks_of(x)) for x in CHECKS])
def test_check(name: str) -> None:
    if name.startswith("transformers"):
        pytest.importorskip("transformers")
    rows = CHECKS[name]()
    assert {row.package for row in rows} <= {"jaxlm", "torchlm", "jaxlm, torchlm", "original.py"} and rows
    failed = [row for row in rows if not row.passes]
    assert not failed, table(failed)


def test_every_fast_check_is_one_of_all() -> None:
    assert FAST <= CHECKS.keys()


def test_bounds_are_four_to_twenty_times_what_rounding_does() -> None:
    for field in dataclasses.fields(FLOAT32):
        measured, bound = getattr(ROUNDING, field.name), getattr(FLOAT32, field.name)
        if field.name in ("rates", "used_rates", "moments_of_key_biases", "key_biases"):
            assert measured <= bound, field.name  # for another reason, which is given there
        else:
            assert 4 * measured <= bound <= 20 * measured, field.name


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.RECORDED)
def test_no_recorded_case_needs_more_than_the_bounds_as_they_stand(name: str) -> None:
    plan = cases.load(cases.CASES / name).plan()
    assert rounding.bounds(plan, trajectory.run(Torchlm, plan)) == FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("name", families.SETTINGS)
def test_transformers_still_computes_what_was_recorded(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    families.record(name, tmp_path)
    with np.load(tmp_path / f"{name.lower()}.npz") as found, np.load(families.FOLDER / f"{name.lower()}.npz") as want:
        assert found.keys() == want.keys()
        for key in want:
            # Its sines are float32, and other processors round them otherwise.
            np.testing.assert_allclose(found[key], want[key], rtol=0, atol=1e-5 * max(1, np.abs(want[key]).max()))


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("name", checks.RECORDED)
def test_rounding_is_still_what_was_measured(name: str) -> None:
    found: dict[str, float] = {}
    for row in rounding.measure(cases.load(cases.CASES / name).plan()):
        found[row.quantity] = max(found.get(row.quantity, 0), row.difference)
    for quantity, field in {
        "logits of batch 0": "logits",
        "loss of batch 0": "loss",
        "gradients of batch 0": "gradients",
        "gradients of batch 0 (key biases)": "gradients_of_key_biases",
        "rates as used": "used_rates",
        "losses": "losses",
        "norms of gradients": "grad_norms",
        "first moments": "moments",
        "roots of second moments": "moments",
        "final weights": "weights",
        "final weights (key biases)": "key_biases",
        "loss of the evaluation": "eval_loss",
    }.items():
        # Other versions and processors add up in another order.
        assert found[quantity] <= 2 * getattr(ROUNDING, field), quantity


def test_a_mistake_in_one_package_is_noticed() -> None:
    exact = torchlm.ops.layers.norm(ModelConfig(d_model=12))
    with mock.patch.object(torchlm.model, "norm", lambda config: type(exact)(config.d_model, eps=1e-6)):
        rows = CHECKS["edges: mlm"]()
    assert not all(row.passes for row in rows)


def test_a_bound_that_grows_excuses_nothing_early() -> None:
    rows, want = trajectory._Rows("case", "jaxlm", Config()), np.ones(3)
    rows.add_updates("losses", want + [2e-5, 0, 1e-4], want, want, np.array([1e-5, 1e-5, 1e-3]))
    (row,) = rows.rows
    assert not row.passes and row.where == "update 0"


def test_nan_fails_and_the_worst_row_is_kept() -> None:
    rows = [Row("case", "jaxlm", "losses", x, 1e-5, str(x)) for x in (1e-6, float("nan"), 2e-5)]
    assert [row.passes for row in rows] == [True, False, False]
    assert np.isnan(worst(rows)[0].difference)
    assert "FAIL" in table(rows[1:2]) and "pass" in table(rows[:1])
