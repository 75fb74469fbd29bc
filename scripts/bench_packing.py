"""What packing gains on a file: padding, and real tokens a second of the same update, packed and unpacked in turns.

    python scripts/bench_packing.py --data.path reviews.txt --model.seq-len 512 --train.batch-size 4

Takes the settings of jaxlm.train. Prints a row of a table: the share of padding and the speed of each, the median of
rounds, and the ratio of each round (median, and from least to most).
"""

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

ROUNDS, UPDATES = 5, 3


class Trained:
    """A run in memory that makes updates on demand."""

    def __init__(self, argv: list[str], pack: str):
        config, _ = configs.load([*argv, "--data.pack", pack])
        task = TASKS[config.task]
        config, data = prepare.prepare(config, task.samples, task(config).embedded, RunLog(stderr=True).pass_bar)
        self.samples, self.mesh = data.samples["train"], parallel.make_mesh(config)
        fresh, self.compiled = loop.build(config, task(config, data.source.classes), self.mesh)
        self.state, self.key = fresh(), jax.random.key(0)
        self.batches = loader.training_batches(self.samples, config.train)
        self.n_tokens = self.n_positions = 0
        self.speed()  # compiles
        self.n_tokens = self.n_positions = 0

    def speed(self) -> float:
        """Make some updates; return the tokens a second that are no padding."""
        batches = [next(self.batches) for _ in range(UPDATES)]
        n_tokens, started_s = sum(map(self.samples.n_tokens, batches)), time.monotonic()
        metrics: Any = None
        for batch in batches:
            on_device = parallel.put_batch(self.mesh, batch, axis=1)
            self.state, metrics = self.compiled.update(self.state, on_device, self.key, None)
        jax.block_until_ready(metrics)
        seconds = time.monotonic() - started_s
        self.n_tokens += n_tokens
        self.n_positions += sum(batch["tokens"].size for batch in batches)
        return n_tokens / seconds


def main() -> None:
    runs = [Trained(sys.argv[1:], pack) for pack in ("none", "documents")]
    rounds = [[run.speed() for run in (runs if i % 2 else runs[::-1])][:: 1 if i % 2 else -1] for i in range(ROUNDS)]
    ratios = sorted(packed / unpacked for unpacked, packed in rounds)
    cells = [f"{1 - run.n_tokens / run.n_positions:.0%}" for run in runs]
    cells += [f"{statistics.median(speeds):,.0f}" for speeds in zip(*rounds, strict=True)]
    cells += [f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"]
    print("| padding unpacked | packed | tokens/s unpacked | packed | ratio |\n| --- | --- | --- | --- | --- |")
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
