"""The wheel has the packages and the files that they read, and nothing of the tests; it works outside of a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import structure

IMPORT_ALL = """
import importlib, pkgutil
for package in ("jaxlm", "torchlm"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        print(importlib.import_module(module.name).__file__)
"""


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        env = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "COLUMNS": "100"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "built", str(structure.ROOT))
    (wheel,) = (tmp_path / "built").iterdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", "installed", str(wheel))
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    modules = [path for package in ("jaxlm", "torchlm") for path in structure.modules(package).values()]
    modules = [path.relative_to(structure.ROOT).as_posix() for path in modules]
    presets = [f"jaxlm/configs/{path.name}" for path in (structure.ROOT / "configs").glob("*.toml")]
    assert {name for name in names if not name.endswith((".md", ".png"))} == {
        *modules,
        *presets,
        "jaxlm/data/grammar.toml",
        "jaxlm/inference/page.html",
        "jaxlm/reporting/page.css",
        "jaxlm/weights/families.toml",
        *("jaxlm/py.typed", "torchlm/py.typed"),
    }
    imported = run("-c", IMPORT_ALL).splitlines()
    assert {Path(name) for name in imported} <= {tmp_path / "installed" / name for name in modules}
    assert len(imported) == len(modules) - 2  # the packages themselves
    assert "--train.max-steps" in run("-m", "jaxlm.train", "--help")
