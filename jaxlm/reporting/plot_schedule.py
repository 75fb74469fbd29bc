"""The command `python -m jaxlm.schedule`: plots the learning rate over all phases of a training, in advance.

Each --config is a phase that resumes the previous one, like `--resume`: its settings override earlier ones. It has a
re-warmup if train.rewarmup_steps is set.
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
from jaxlm.terminal import command, shown


class Phase(NamedTuple):
    name: str
    config: Config
    updates: np.ndarray  # [N] their numbers
    rates: np.ndarray  # [N]


def phases(files: Sequence[str]) -> list[Phase]:
    """Return the phases of some settings files. Raises UserError if one ends before it begins."""
    from jaxlm import schedule

    result: list[Phase] = []
    for i, file in enumerate(files):
        # Settings of earlier phases are lower layers, like those of a checkpoint.
        config, _ = configs.load([word for earlier in files[: i + 1] for word in ("--config", earlier)])
        first = int(result[-1].updates[-1]) + 1 if result else 0
        if config.train.max_steps <= first:
            rule = f"is not after update {first}, the end of the previous phase"
            raise UserError(f"{file}: train.max_steps={config.train.max_steps} {rule}; raise it")
        rewarmed = (first, float(result[-1].rates[-1])) if result and config.train.rewarmup_steps else None
        updates = np.arange(first, config.train.max_steps)
        rates = np.asarray(schedule.learning_rate(config.train, rewarmed)(updates))
        result.append(Phase(shown(Path(file).stem), config, updates, rates))
    return result


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Plot the phases of a command line; return the exit status. Bad input exits with 2."""
    args = make_parser().parse_args(argv)
    try:
        import matplotlib.figure
        import plotext
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'jaxlm[plot]'") from error
    planned = phases(args.config)
    for name, config, updates, rates in planned:
        print(
            f"{name}: updates {updates[0]:,} to {updates[-1]:,}, {config.train.schedule}; rate {rates[0]:.3g} at "
            f"its start, {rates.max():.3g} at most, {rates[-1]:.3g} at its end"
        )
    plotext.clear_figure()  # of an earlier call in this process
    plotext.plot_size(min(100, plotext.terminal_width() or 100), 20)
    plotext.theme("clear")
    figure = matplotlib.figure.Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="update", ylabel="learning rate")
    for name, _, updates, rates in planned:
        plotext.plot(updates, rates, label=name, marker="braille")
        axes.plot(updates, rates, label=name)
    plotext.xlabel("update")
    drawn = plotext.build()
    try:
        plotext.uncolorize(drawn).encode(sys.stdout.encoding or "utf-8")
        Console().print(Text.from_ansi(drawn))
    except UnicodeEncodeError:
        print(f"The curves are not drawn: the output is {sys.stdout.encoding}, not UTF-8. A picture: --png FILE")
    if args.png:
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3)
        try:
            figure.savefig(args.png, dpi=120)
        except (OSError, ValueError) as error:
            raise UserError(f"--png {args.png}: cannot be written: {error}") from error
        print(f"picture: {args.png}")
    return 0


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        command("schedule"), description="Plots the learning rate over all phases of a training, in advance."
    )
    parser.add_argument("--config", nargs="+", required=True, metavar="FILE", help="settings of each phase, in order")
    parser.add_argument("--png", metavar="FILE", help="picture to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
