"""Trains on a Slurm cluster: one process for each GPU, or for each node where there are none.

    python scripts/launch_slurm.py COMMAND [--dry-run] [--section.key VALUE ...] [-- SETTINGS OF jaxlm.train]

submit   queue the job; when its time is up, it saves a checkpoint, is requeued, and resumes
logs     follow its output, slurm-NAME.log in the repository
cancel   end it and take it off the queue; SIGTERM first, so that it saves a checkpoint

The settings are in launch.toml; LAUNCH.md is the page. --dry-run prints every command and runs none.
"""

import getpass
import sys

from launch_settings import ROOT, Settings, Shell, main


def submit(settings: Settings, shell: Shell) -> int:
    slurm = settings.slurm
    options = {
        "job-name": settings.name,
        "chdir": ROOT,
        "output": log(settings),
        "partition": slurm.partition,
        "account": slurm.account,
        "nodes": slurm.nodes,
        # JAX gives each task of Slurm the one GPU that has its number on the node.
        "ntasks-per-node": slurm.gpus_per_node or 1,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "time": slurm.time_limit,
        "signal": f"B:USR1@{slurm.stop_s}",
    }
    words = [f"--{name}={value}" for name, value in options.items() if value]
    script = str(ROOT / "scripts" / "train.sbatch")
    return shell.status(["sbatch", *words, script, *settings.training(slurm.python)])


def logs(settings: Settings, shell: Shell) -> int:
    return shell.status(["tail", "--lines=+1", "--follow=name", "--retry", log(settings)])


def cancel(settings: Settings, shell: Shell) -> int:
    return shell.status(["scancel", f"--name={settings.name}", f"--user={getpass.getuser()}"])


def log(settings: Settings) -> str:
    return str(ROOT / f"slurm-{settings.name}.log")


VERBS = {f.__name__: f for f in (submit, logs, cancel)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], __doc__, VERBS))
