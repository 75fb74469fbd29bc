"""The command `python -m jaxlm.schedule`: the learning rate over all phases of a training, drawn before any of it.

Each --config is a phase that goes on where the one before has ended, as `--resume` would: with the settings of that
one but for its own, and with a re-warmup where it has train.rewarmup_steps.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.text import Text

from jaxlm import config as configs
from jaxlm.cli import Parser
from jaxlm.config import Config
from jaxlm.errors import UserError, reported
from jaxlm.io.console import Console
from jaxlm.terminal import shown


class Phase(NamedTuple):
    """A phase by the file of its settings; `rates` of the updates from `first` on."""

    name: str
    config: Config
    first: int
    rates: np.ndarray


def phases(files: Sequence[str]) -> list[Phase]:
    """Return the phases that some files of settings make. Raises UserError if one ends before it begins."""
    from jaxlm import schedule

    found: list[Phase] = []
    for i, file in enumerate(files):
        # The settings of the phases before are layers below, as a checkpoint's are.
        argv = [word for earlier in files[: i + 1] for word in ("--config", earlier)]
        config, _ = configs.load(argv)
        first = len(found[-1].rates) + found[-1].first if found else 0
        n = config.train.max_steps - first
        if n <= 0:
            raise UserError(
                f"{file}: train.max_steps={config.train.max_steps} is not after update {first}, where the phase before "
                "ends; raise it"
            )
        rewarmed = (first, float(found[-1].rates[-1])) if found and config.train.rewarmup_steps else None
        rates = np.asarray(schedule.learning_rate(config.train, rewarmed)(np.arange(first, first + n)))
        found.append(Phase(Path(file).stem, config, first, rates))
    return found


def main(argv: list[str] | None = None) -> int:
    """Draw the phases of a command line; return the exit status. Bad input exits with 2."""
    parser = Parser("python -m jaxlm.schedule", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="settings of each phase, in order")
    parser.add_argument("--png", metavar="FILE", help="picture to write")
    with reported(debug=False):
        args = parser.parse_args(argv)
        try:
            import plotext
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; pip install 'jaxlm[plot]'") from error
        found = phases(args.config)
        for phase in found:
            last, train = phase.first + len(phase.rates) - 1, phase.config.train
            print(
                f"{phase.name}: updates {phase.first:,} to {last:,}, {train.schedule}; rate {phase.rates[0]:.3g} at "
                f"its start, {phase.rates.max():.3g} at most, {phase.rates[-1]:.3g} at its end"
            )
        plotext.clear_figure()  # of an earlier call in this process
        plotext.plot_size(min(100, plotext.terminal_width() or 100), 20)
        plotext.theme("clear")
        for phase in found:
            plotext.plot(
                phase.first + np.arange(len(phase.rates)), phase.rates, label=shown(phase.name), marker="braille"
            )
        plotext.xlabel("update")
        drawn = plotext.build()
        try:
            plotext.uncolorize(drawn).encode(sys.stdout.encoding or "utf-8")
            Console().print(Text.from_ansi(drawn))
        except UnicodeEncodeError:
            print(f"The curves are not drawn: the output is {sys.stdout.encoding}, not UTF-8. A picture: --png FILE")
        if args.png:
            _picture(Figure(figsize=(8, 3.5), layout="constrained"), found, Path(args.png))
    return 0


def _picture(figure: "object", found: Sequence[Phase], path: Path) -> None:
    axes = figure.add_subplot()  # type: ignore[attr-defined]
    for phase in found:
        axes.plot(phase.first + np.arange(len(phase.rates)), phase.rates, label=shown(phase.name))
    axes.set_xlabel("update")
    axes.set_ylabel("learning rate")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)  # type: ignore[attr-defined]
    try:
        figure.savefig(path, dpi=120)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path}: cannot be written: {error}") from error
    print(f"picture: {path}")


if __name__ == "__main__":
    sys.exit(main())
