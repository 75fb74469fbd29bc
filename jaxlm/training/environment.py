"""What a run was made with: versions, machine, devices and command, a line of environment.jsonl for each start."""

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
    """Return what a run that goes on after an update, or begins with 0, is made with."""
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
    """Return the lines of a run folder that can be read."""
    read_dict = lambda value: value if isinstance(value, dict) else None  # noqa: E731
    return [value for _, value in history.json_lines(run_dir / FILE, read_dict, history.warn_once)]


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the commit of the checkout that the package is in, with + if files differ from it; "" if there is none."""
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(here.parent)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=5)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changes = subprocess.run(status, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "") if commit.returncode == 0 else ""
