"""Start values and dropout's seeds, in each package's own random numbers."""

import pytest

from parity_tests import randomness
from parity_tests.compare.rows import Row


def failures(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.passes]


@pytest.mark.parametrize(("task", "departure"), [("mlm", ""), ("gpt", "tied_embedding"), ("cola", "embedding_norm")])
def test_start_values_have_the_right_distributions(task: str, departure: str) -> None:
    rows = randomness.start_values(task, departure)
    assert {row.package for row in rows} == {"jaxlm", "torchlm"}
    assert not failures(rows)


@pytest.mark.parametrize(
    ("task", "initialization"), [("gpt", "gpt2"), ("gpt", "llama"), ("mlm", "modernbert"), ("cola", "modernbert")]
)
def test_start_values_of_others_have_the_right_distributions(task: str, initialization: str) -> None:
    assert not failures(randomness.start_values(task, "embedding_norm", initialization))


def test_each_update_drops_others_and_a_run_anew_the_same() -> None:
    assert not failures(randomness.masks_of_updates())
