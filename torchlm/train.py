"""The command `python -m torchlm.train`: checks the settings, then imports PyTorch and runs loop.py.

Several processes: `torchrun --nproc-per-node N -m torchlm.train ...`.
"""

import os
import sys
import time

from jaxlm import repeat
from jaxlm.errors import UserError, interruptible, outlive_full_disks, reported
from jaxlm.training import resume
from jaxlm.weights import formats


def main(argv: list[str] | None = None) -> int:
    """Train with a command line; return the exit status: 130 after Ctrl-C, 143 after SIGTERM, 2 for bad input."""
    started_s = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    outlive_full_disks()
    with interruptible():
        with reported(debug="--debug" in argv):
            if repeat.is_asked(argv):
                return repeat.main(argv, "torchlm.train")
            config, origins, start = resume.load(argv, "python -m torchlm.train", formats.CHECKPOINT_1_2)
        if os.environ.get("RANK", "0") == "0":
            print(f"torchlm: task {config.task}; loading PyTorch", flush=True)
        with reported(config.debug):
            # Threads that spin while they wait starve each other beside other programs: a fifth of the speed or less.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            try:
                import torch  # noqa: F401
            except ImportError as error:
                raise UserError(f"PyTorch is not installed ({error}); add it with pip install -e '.[torch]'") from error
            except ValueError as error:
                raise UserError(
                    f"PyTorch cannot start: {error}; see the variables TORCH_* in the environment"
                ) from error
            from torchlm import loop

            return loop.run(config, origins, start, started_s)
    raise AssertionError("reported() exits on the errors it does not pass on")


if __name__ == "__main__":
    sys.exit(main())
