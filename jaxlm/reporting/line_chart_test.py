"""Line charts: that points lie where their values are, and what is left out."""

import math
import re

import numpy as np
import pytest

from jaxlm.reporting import line_chart
from jaxlm.reporting.line_chart import Curve


def drawn(svg: str, colour: str = "var(--c1)") -> np.ndarray:
    """Return the points [N, 2] of the line of a colour."""
    (path,) = re.findall(
        rf'<path d="M([\d. -]+)" fill="none" stroke-linejoin="round" stroke="{re.escape(colour)}"', svg
    )
    return np.array(path.split(), np.float64).reshape(-1, 2)


def ticks(svg: str) -> dict[str, dict[float, float]]:
    """Return {axis: {value: place}} of the numbers at the axes."""
    found: dict[str, dict[float, float]] = {"x": {}, "y": {}}
    for x, y, anchor, text in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)"[^>]*text-anchor="(\w+)">([^<]+)</text>', svg
    ):
        size = {"k": 1e3, "M": 1e6}.get(text[-1], 1)
        if re.fullmatch(r"-?[\d.e+-]+[kM]?", text):
            axis, place = ("y", y) if anchor == "end" else ("x", x)
            found[axis][float(text.rstrip("kM")) * size] = float(place)
    return found


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.2, 7.5), (1e-4, 3e-3), (900.0, 56_000.0), (2.0, 2.5)])
def test_points_lie_where_the_axes_say(low: float, high: float, is_log: bool) -> None:
    x, y = np.array([0, 250, 1000]), np.array([low, high, (low + high) / 2])
    svg = line_chart.chart("loss", [Curve("", x, y)], is_log=is_log)
    found = ticks(svg)
    scale = np.log if is_log else np.asarray
    for axis, values, places in (("x", x, drawn(svg)[:, 0]), ("y", scale(y), drawn(svg)[:, 1])):
        at = np.array(sorted(found[axis]))
        assert 2 <= len(at) <= 12
        slope, start = np.polyfit(scale(at) if axis == "y" else at, [found[axis][value] for value in at], 1)
        np.testing.assert_allclose(start + slope * values, places, atol=0.5)
    assert drawn(svg)[:, 1].min() >= line_chart.TOP and drawn(svg)[:, 1].max() <= line_chart.HEIGHT - line_chart.BOTTOM


def test_updates_are_whole_numbers() -> None:
    for n in (2, 3, 6, 14, 15):
        at = ticks(line_chart.chart("", [Curve("", np.arange(n), np.arange(n))]))["x"]
        assert len(at) >= 2 and all(value == round(value) for value in at)
    assert 0.4 in ticks(line_chart.chart("", [Curve("", np.array([0.1, 0.9]), np.arange(2))]))["x"]


def test_what_has_no_place_is_left_out() -> None:
    y = np.array([1.0, math.nan, 3.0, math.inf, 0.0, 2.0])
    assert len(drawn(line_chart.chart("", [Curve("", np.arange(6), y)]))) == 4
    assert len(drawn(line_chart.chart("", [Curve("", np.arange(6), y)], is_log=True))) == 3
    assert "2 values are not finite, and left out." in line_chart.chart("", [Curve("", np.arange(6), y)])
    assert "3 values are zero, negative or not finite" in line_chart.chart(
        "", [Curve("", np.arange(6), y)], is_log=True
    )
    nothing = line_chart.chart("loss", [Curve("", np.arange(6), y * math.nan)])
    assert "<b>loss</b>" in nothing and "All 6 values are not finite." in nothing and "<svg" not in nothing
    assert line_chart.chart("", [Curve("", np.arange(0), np.arange(0))]) == ""
    single = line_chart.chart("", [Curve("", np.array([7]), np.array([0.5]))])
    assert single.count('class="dots"') == 1


def test_a_long_curve_keeps_its_peaks() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    y[[1234, 77_777]] = 50, -60
    svg = line_chart.chart("", [Curve("", np.arange(len(y)), y)])
    points, at = drawn(svg), ticks(svg)["y"]
    values = np.array(sorted(at))
    slope, start = np.polyfit([at[value] for value in values], values, 1)
    assert len(points) <= line_chart.MOST_POINTS + 2 and np.all(np.diff(points[:, 0]) >= 0)
    np.testing.assert_allclose([start + slope * f(points[:, 1]) for f in (np.min, np.max)], [50, -60], atol=0.5)


def test_a_log_scale_is_labelled() -> None:
    x = np.arange(1, 4)
    assert "log scale" not in line_chart.chart("norm", [Curve("", x, x)])
    svg = line_chart.chart("norm", [Curve("", x, x)], is_log=True)
    assert "<b>norm</b> <small>(log scale)</small>" in svg and 'aria-label="norm, log scale: ' in svg


@pytest.mark.parametrize("is_log", [False, True])
def test_the_best_value_and_the_levels_lie_where_they_should(is_log: bool) -> None:
    x, y = np.array([10, 20, 30, 40]), np.array([4.0, 2.0, math.nan, 1.0])
    level = Curve("baseline", np.zeros(1), np.array([64.0]))
    svg = line_chart.chart("loss", [Curve("validation", x, y, best=20)], is_log=is_log, levels=[level])
    ((at_x, at_y),) = re.findall(r'<circle class="best" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert [float(at_x), float(at_y)] == drawn(svg)[1].tolist()
    ((height, end),) = re.findall(rf'class="level" d="M{line_chart.LEFT} ([\d.]+)H(\d+)"', svg)
    assert line_chart.TOP <= float(height) < drawn(svg)[:, 1].min() and int(end) == line_chart.WIDTH - line_chart.RIGHT
    assert re.findall(r"</svg> ([\w ]+)</span>", svg) == ["validation", "baseline", "best step"]
    without = line_chart.chart("loss", [Curve("validation", x, y, best=30)])
    assert "<circle" not in without.split("</svg>")[0]  # the best one is not a number


@pytest.mark.parametrize("n", [1, 2, 7, 5000])
def test_every_value_is_shown_where_it_lies(n: int) -> None:
    x = np.arange(n) * 10
    curves = [Curve("a", x, np.linspace(1, 2, n), best=0), Curve("b", x[::3], np.linspace(3, 4, n)[::3], "red")]
    svg = line_chart.chart("loss", curves, levels=[Curve("baseline", np.zeros(1), np.array([2.5]))])
    areas = re.findall(r'<rect class="hover" x="([\d.]+)"[^>]*width="([\d.]+)"[^>]*><title>([^<]*)</title>', svg)
    starts, widths = (np.array([float(area[i]) for area in areas]) for i in (0, 1))
    assert len(areas) <= line_chart.MOST_HOVERS and starts[0] == line_chart.LEFT
    np.testing.assert_allclose(starts[1:], (starts + widths)[:-1], atol=0.11)
    assert starts[-1] + widths[-1] == pytest.approx(line_chart.WIDTH - line_chart.RIGHT, abs=0.11)
    shown = [dict(line.split(": ") for line in area[2].split("\n")[1:]) for area in areas]
    places = [[float(i.replace(",", "")) for i in area[2].split("\n")[0][7:].split(" to ")] for area in areas]
    for curve in curves:
        for step, value in zip(curve.x, curve.y, strict=True):
            (i,) = (i for i, place in enumerate(places) if place[0] <= step <= place[-1])
            low, *high = map(float, shown[i][curve.label].removesuffix(" (best step)").split(" to "))
            assert low - 1e-3 <= value <= (high or [low])[0] + 1e-3
    assert [i for i, lines in enumerate(shown) if "best step" in lines["a"]] == [0]
    assert all(lines["baseline"] == "2.5" for lines in shown)


def test_curves_differ_without_their_colours() -> None:
    x = np.arange(3)
    curves = [Curve(f"run {i}", x, x + i, line_chart.COLOURS[i], line_chart.DASHES[i]) for i in range(6)]
    svg = line_chart.chart("all", curves)
    assert len(set(re.findall(r'stroke-linejoin="round"[^>]*stroke-dasharray="([^"]*)"', svg))) == 6
    assert re.findall(r"</svg> (run \d)</span>", svg) == [f"run {i}" for i in range(6)]
    assert 'role="img" aria-label="all: run 0 from 0 to 2; ' in svg
