"""`python -m jaxlm.schedule`: the rates of all phases, each where the one before has ended, drawn and told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import schedule
from jaxlm.errors import UserError
from jaxlm.reporting import plot_schedule

FIRST = """task = "gpt"
train.max_steps = 30
train.learning_rate = 4e-3
train.min_learning_rate = 1e-4
train.warmup_steps = 5
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three phases: a cosine, linear with a re-warmup, and the same with more updates."""
    monkeypatch.chdir(tmp_path)
    more = ("train.max_steps = 50\ntrain.schedule = 'linear'\ntrain.rewarmup_steps = 8\n", "train.max_steps = 55\n")
    for name, text in zip(("one.toml", "two.toml", "three.toml"), (FIRST, *more), strict=True):
        Path(name).write_text(text)
    return ["one.toml", "two.toml", "three.toml"]


def test_each_phase_goes_on_where_the_one_before_has_ended(files: list[str]) -> None:
    one, two, three = plot_schedule.phases(files)
    assert [(phase.name, phase.updates[0], len(phase.updates)) for phase in (one, two, three)] == [
        ("one", 0, 30),
        ("two", 30, 20),
        ("three", 50, 5),
    ]
    # What is not said anew is as before; the rates are those of training.
    assert two.config.train.learning_rate == 4e-3 and three.config.train.schedule == "linear"
    assert one.rates[0] == 0 and one.rates.max() == pytest.approx(4e-3)
    np.testing.assert_array_equal(one.rates, schedule.learning_rate(one.config.train)(np.arange(30)))
    assert two.rates[0] == one.rates[-1] and three.rates[0] == two.rates[-1]
    rate = schedule.learning_rate(two.config.train, (30, float(one.rates[-1])))
    np.testing.assert_array_equal(two.rates, rate(np.arange(30, 50)))
    asked = 4e-3 + (38 - 5) / (50 - 5) * (1e-4 - 4e-3)  # after the re-warmup
    assert two.rates[8] == pytest.approx(asked, rel=1e-5) and two.rates[8] > two.rates[0]


def test_a_phase_without_updates_is_told(files: list[str]) -> None:
    with pytest.raises(UserError, match="one.toml: train.max_steps=30 is not after update 50, the end of .*; raise it"):
        plot_schedule.phases(["two.toml", "one.toml"])


def test_the_phases_are_told_and_drawn(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_schedule.main(["--config", *files, "--png", "rates.png"]) == 0
    output = capsys.readouterr().out
    assert "one: updates 0 to 29, cosine; rate 0 at its start, 0.004 at most, 0.000115 at its end" in output
    assert "two: updates 30 to 49, linear; rate 0.000115 at its start" in output
    assert "\x1b" not in output and "update" in output and "⠁" <= max(output) <= "⣿"  # braille dots
    assert Path("rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_preset_of_the_second_phase_rises_again() -> None:
    folder = configs.presets_dir()
    one, two = plot_schedule.phases([str(folder / "gpt.toml"), str(folder / "gpt_phase2.toml")])
    assert (two.updates[0], len(two.updates)) == (700, 400)
    assert two.rates[0] == one.rates[-1] and two.rates.argmax() in range(30, 51)
    assert two.rates.max() > 3 * two.rates[0] and two.rates[-1] < 1.1 * one.rates[-1]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("--config gone.toml", "gone.toml: there is no such file, nor such a preset"),
        ("--config one.toml two.toml one.toml", "one.toml: train.max_steps=30 is not after update 50"),
        ("--config one.toml --png gone/rates.png", "--png gone/rates.png: cannot be written"),
        ("--config one.toml --png rates.xyz", "--png rates.xyz: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: str, why: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        plot_schedule.main(args.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and why in error


def test_without_the_plotting_packages_one_line_names_the_extra(files: list[str]) -> None:
    code = (
        "import sys; sys.modules['plotext'] = None; from jaxlm.reporting.plot_schedule import main; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, "--config", "one.toml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: plotext is not installed; pip install 'jaxlm[plot]'\n"
