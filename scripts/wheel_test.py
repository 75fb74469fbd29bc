"""The wheel has the packages and the files that they read, and nothing of the tests; it works outside of a checkout.

Its parity_tests works in an environment that has PyTorch and NumPy alone, and in one that has JAX and NumPy alone.
"""

import functools
import importlib.metadata
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
from packaging.requirements import Requirement
from structure import ROOT

PACKAGES = ("jaxlm", "torchlm", "parity_tests")
# Of parity_tests, the tool for any port is in the wheel; the cases of this project are not.
TOOL = r"parity_tests(\.(carry|compare|record|pytest_plugin)(\..*)?)?$"
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


# Three updates of a linear layer, and of its port, right and with its bias added twice.
TORCH_PROGRAM = """
import torch
from parity_tests import record
model = torch.nn.Linear(4, 2)
with torch.no_grad():
    for x in model.parameters():
        x.copy_(torch.linspace(-1, 1, x.numel()).reshape(x.shape))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with record.torch(model, optimizer, path="of_torch") as a:
    for i in range(3):
        optimizer.zero_grad()
        model(torch.arange(12.0).reshape(3, 4) / (12 + i)).square().mean().backward()
        optimizer.step()
"""
JAX_PROGRAM = """
import jax, jax.numpy as jnp
from parity_tests import record
for path, scale in (("of_jax", 1.0), ("wrong", 2.0)):
    weights = {"weight": jnp.linspace(-1, 1, 8).reshape(2, 4), "bias": jnp.linspace(-1, 1, 2)}
    @jax.jit
    def step(weights, x):
        def loss(weights):
            return jnp.mean(record.tag("", x @ weights["weight"].T + scale * weights["bias"][None]) ** 2)
        return jax.value_and_grad(loss)(weights)
    with record.jax(path=path, params=weights) as b:
        for i in range(3):
            loss, grads = step(weights, jnp.arange(12.0).reshape(3, 4) / (12 + i))
            weights = jax.tree.map(lambda x, g: x - 0.1 * g, weights, grads)
            b.step(loss=loss, grads=grads, params=weights, rate=0.1)
"""
COMPARE = ("python", "-m", "parity_tests.compare")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    options = ("--quiet", "--no-deps", "--wheel-dir", str(folder))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (built,) = folder.iterdir()
    return built


def run_in(folder: Path, environment: Path, *command: str, status: int = 0, **variables: str) -> str:
    """Run a command in an environment, outside of the checkout; return what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    env["PATH"] = f"{environment / 'bin'}:{env['PATH']}"
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def new_environment(path: Path, wheel: Path, others: dict[str, Path]) -> Path:
    """Make an environment with the wheel, without what it depends on; `others` are files that it has, too."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    (site,) = path.glob("lib/python*/site-packages")
    for name, target in others.items():
        (site / name).symlink_to(target)
    pip = (sys.executable, "-m", "pip", "--python", str(path / "bin" / "python"))
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    return site


def distribution(name: str) -> dict[str, Path]:
    """Return the files and folders of an installed distribution, and of all that it requires."""
    found: dict[str, Path] = {}
    names, known = [name], set[str]()
    while names:
        one = importlib.metadata.distribution(names.pop())
        for file in one.files or []:
            if file.parts[0] != "..":
                found[file.parts[0]] = Path(str(one.locate_file(file.parts[0])))
        required = [Requirement(text) for text in one.requires or []]
        new = {x.name for x in required if not x.marker or x.marker.evaluate({"extra": ""})} - known
        names += new
        known |= new
    return found


@pytest.mark.slow
def test_the_tool_works_beside_one_framework_alone(wheel: Path, tmp_path: Path) -> None:
    for name, other, program in (("torch", "jax", TORCH_PROGRAM), ("jax", "torch", JAX_PROGRAM)):
        environment = tmp_path / f"with_{name}"
        new_environment(environment, wheel, distribution(name) | distribution("numpy"))
        is_there = f"[x for x in {(other, 'flax', 'optax', 'msgspec')} if importlib.util.find_spec(x)]"
        run_in(tmp_path, environment, "python", "-c", f"import importlib.util\nassert not {is_there}\n{program}")
    for name in ("torch", "jax"):  # each compares what both have recorded
        environment = tmp_path / f"with_{name}"
        assert "numbers pass, of 3 updates" in run_in(tmp_path, environment, *COMPARE, "of_torch", "of_jax")
        output = run_in(tmp_path, environment, *COMPARE, "of_torch", "wrong", status=1)
        assert "first: update 0, output of the model" in output and "1. bias:" in output, output


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed, variables = tmp_path / "installed", {"XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "100"}
    site = new_environment(installed, wheel, {})
    # It finds all but the packages of the checkout where this environment has it.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    run = functools.partial(run_in, tmp_path, installed, **variables)

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
