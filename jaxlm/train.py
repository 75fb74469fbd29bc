"""The command `python -m jaxlm.train`: checks the settings, then imports JAX and runs loop.py."""

import sys
import time

from jaxlm.errors import interruptible, outlive_full_disks, reported
from jaxlm.runtime import huge_pages
from jaxlm.terminal import command


def main(argv: list[str] | None = None) -> int:
    """Train with a command line; return the exit status: 130 after Ctrl-C, 143 after SIGTERM, 2 for bad input."""
    started_s = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    outlive_full_disks()
    with interruptible():
        with reported(debug="--debug" in argv):
            # Imported here, because huge_pages restarts the process before this line.
            from jaxlm import repeat
            from jaxlm.training import resume
            from jaxlm.weights import formats

            if repeat.is_asked(argv):
                return repeat.main(argv, "jaxlm.train")
            config, origins, start = resume.load(argv, command("train"), formats.RUN)
        print(f"jaxlm: task {config.task}; loading JAX", flush=True)
        with reported(config.debug):
            from jaxlm import loop

            return loop.run(config, origins, start, started_s)
    raise AssertionError("reported() exits on the errors it does not pass on")


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
