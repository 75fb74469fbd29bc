"""The environment of a run: versions, machine, devices, command, commit. Each start appends a line to a file."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxlm.training import history

FILE = "environment.jsonl"
PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "numpy", "tokenizers", "datasets")


def describe(step: int, device: str) -> dict[str, Any]:
    """Return the environment of a run that starts after update `step`, 0 for a new run."""
    return {
        "step": step,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "device": device,
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _versions(),
        "commit": _commit(),
    }


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return the recorded environments of a run, one per start; unreadable ones are skipped."""
    lines = history.json_lines(run_dir / FILE, lambda x: x if isinstance(x, dict) else None, history.warn_once)
    return [description for _, description in lines]


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit() -> str:
    """Return the commit of the checkout that contains the package, "+" behind it if files differ; "" without one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return ""
    git = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=5).stdout.strip()  # "" if git fails
    except (OSError, subprocess.SubprocessError):
        return ""
