"""One of the systems that benchmark.py compares, in a process that runs commands and reports.

    python scripts/bench_child.py '{"system": "jaxlm", "settings": {"task": "mlm"}, ...}'

It reads lines of JSON [command, argument ...], a method of the system and its arguments, and answers each with a line.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_peers import Mapped, Peer
from bench_systems import Data, Jaxlm, Reply, Torchlm, TorchProducts

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.runtime import huge_pages


def memory() -> Reply:
    """Return the peak of the resident memory of this process, and what it holds now but for pages of files, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return {"peak_mb": peak_mb, "own_mb": peak_mb}
    # Not getrusage: after a fork, its peak is at least the parent's.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    peak_kb, own_kb = (int(lines[name].split()[0]) for name in ("VmHWM", "RssAnon"))
    return {"peak_mb": peak_kb / 1024, "own_mb": own_kb / 1024}


SYSTEMS: dict[str, Callable[[Config, dict[str, Any]], Any]] = {
    "data": Data,
    "jaxlm": Jaxlm,
    "jaxlm tied": Jaxlm,
    "torchlm": Torchlm,
    "original": Torchlm,
    "transformers": Peer,
    "transformers grouped": Peer,
    "plain GPT": Peer,
    "datasets.map": Mapped,
    "PyTorch": TorchProducts,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["system"] not in ("torchlm", "original"):
        huge_pages.ask()  # as jaxlm does by itself, and a careful user of another system would
    # What libraries print goes to stderr; the answers have the pipe for themselves.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system = SYSTEMS[spec["system"]](configs.build(spec["settings"]), spec)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        reply = getattr(system, command)(*arguments)
        print(json.dumps(memory() | reply), file=channel, flush=True)  # on a GPU, a reply tells the peak there


if __name__ == "__main__":
    main()
