"""What packing gains on a file: padding, and real tokens a second of the same update, packed and unpacked in turns.

    python scripts/bench_packing.py --data.path reviews.txt --model.seq-len 512 --train.batch-size 4

Takes the settings of jaxlm.train; packs as data.pack says, or else documents. Prints a row of a table: the share of
padding and the speed of each, the median of rounds, and the ratio of each round (median, and from least to most); the
same for the CPU time of the process, which work of others hardly changes.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm import loop, parallel
from jaxlm.data import loader, prepare
from jaxlm.tasks import TASKS
from jaxlm.training.log import RunLog

ROUNDS, UPDATES = 5, 4
CLOCKS = (time.monotonic, time.process_time)


class Trained:
    """A run in memory that makes updates on demand."""

    def __init__(self, config: configs.Config):
        task = TASKS[config.task]
        config, data = prepare.prepare(config, task.samples, task(config).embedded, RunLog(stderr=True).pass_bar)
        print(*data.notes, sep="\n", file=sys.stderr)
        self.samples, self.mesh = data.samples["train"], parallel.make_mesh(config)
        fresh, self.compiled = loop.build(config, task(config, data.source.classes), self.mesh)
        self.state, self.key = fresh(), jax.random.key(0)
        self.batches = loader.training_batches(self.samples, config.train)
        self.n_tokens = self.n_positions = 0
        self.speed()  # compiles
        self.n_tokens = self.n_positions = 0

    def speed(self) -> tuple[float, ...]:
        """Make some updates; return the tokens per second that are not padding, by each clock."""
        batches = [next(self.batches) for _ in range(UPDATES)]
        n_tokens, started_s = sum(map(self.samples.n_tokens, batches)), [clock() for clock in CLOCKS]
        metrics: Any = None
        for batch in batches:
            on_device = parallel.put_batch(self.mesh, batch, axis=1)
            self.state, metrics = self.compiled.update(self.state, on_device, self.key, None)
        jax.block_until_ready(metrics)
        speeds = tuple(n_tokens / (clock() - start_s) for clock, start_s in zip(CLOCKS, started_s, strict=True))
        self.n_tokens += n_tokens
        self.n_positions += sum(batch["tokens"].size for batch in batches)
        return speeds


def main() -> None:
    config, _ = configs.load(sys.argv[1:])
    packs: list[Any] = ["none", config.data.pack if config.data.pack != "none" else "documents"]
    datas = [dataclasses.replace(config.data, pack=pack) for pack in packs]
    runs = [Trained(dataclasses.replace(config, data=data)) for data in datas]
    rounds = [[run.speed() for run in (runs if i % 2 else runs[::-1])][:: 1 if i % 2 else -1] for i in range(ROUNDS)]
    cells = [f"{1 - run.n_tokens / run.n_positions:.1%}" for run in runs]
    for unpacked, packed in zip(*(zip(*speeds, strict=True) for speeds in zip(*rounds, strict=True)), strict=True):
        ratios = sorted(y / x for x, y in zip(unpacked, packed, strict=True))
        cells += [f"{statistics.median(speeds):,.0f}" for speeds in (unpacked, packed)]
        cells += [f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
    speeds = "tokens/s unpacked | packed | ratio"
    print(f"| padding unpacked | packed | {speeds} | {speeds.replace('/s', ' a CPU second')} |")
    print("|" + " --- |" * len(cells))
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
