"""The wheel has the packages and the files that they read, and nothing of the tests; it works outside of a checkout."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import structure
from structure import ROOT

PACKAGES = ("jaxlm", "torchlm", "parity_tests")
# Of parity_tests, the tool for any port is in the wheel; the cases of this project are not.
TOOL = r"parity_tests(\.(compare|record|pytest_plugin)(\..*)?)?$"
FILES = {
    "jaxlm/data/grammar.toml",
    "jaxlm/inference/page.html",
    "jaxlm/reporting/page.css",
    "jaxlm/weights/families.toml",
    *(f"{package}/py.typed" for package in PACKAGES),
}
IMPORT_ALL = f"""
import importlib, pkgutil
for package in {PACKAGES}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            print(importlib.import_module(module.name).__file__)
"""
SIZES = "--model.d-model 16 --model.n-heads 2 --model.n-layers 1 --train.max-steps 4 --train.eval-interval 2"


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(tmp_path: Path) -> None:
    installed, variables = tmp_path / "installed", {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "100"}

    def run(*command: str, environment: Path = installed) -> str:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
        env["PATH"] = f"{environment / 'bin'}:{env['PATH']}"
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "built", str(ROOT))
    (wheel,) = (tmp_path / "built").iterdir()
    # An environment of its own, which finds all but the packages of the checkout where this one has it.
    run(sys.executable, "-m", "venv", str(installed))
    (site,) = installed.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel))

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {name: path for package in PACKAGES for name, path in structure.modules(package).items()}
    paths = {
        path.relative_to(ROOT).as_posix()
        for name, path in modules.items()
        if not name.startswith("parity_tests") or re.match(TOOL, name)
    }
    presets = {f"jaxlm/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.toml")}
    assert {name for name in names if not name.endswith((".md", ".png"))} == paths | presets | FILES
    imported = {Path(name) for name in run("python", "-c", IMPORT_ALL).splitlines()}
    roots = {site / package / "__init__.py" for package in PACKAGES}
    assert imported | roots == {site / path for path in paths if not path.endswith("__main__.py")}

    output = run("jaxlm", "train", "--task", "mlm", "--run.dir", "run", *SIZES.split())
    use, see = re.findall(r"jaxlm (?:predict|report) [^;\n]*", output)
    assert "[MASK]" in run(*use.split(), "--text", "A [MASK] of text.")
    assert run(*see.split()) == "run/report.html\n"
    np.savez(tmp_path / "a.npz", loss=np.arange(1.0, 4.0))
    assert "loss" in run("python", "-m", "parity_tests.compare", "a.npz", "a.npz")
