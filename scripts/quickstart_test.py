"""The notebook runs from top to bottom, and the API reference is built without a warning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name, value in (ENVIRONMENT | {"QUICKSTART_STEPS": "10", "XDG_CACHE_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(ROOT / "scripts" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    assert "mlm finished" in text and "largest relative difference" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_api_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, "-m", "pdoc", "jaxlm", "torchlm", "parity_tests", "--no-search", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Optax's types of trees have a forward reference that pdoc cannot resolve.
    assert [line for line in done.stderr.splitlines() if "ArrayTree" not in line] == []
    assert "[B, n_new] token ids" in (tmp_path / "jaxlm" / "generate.html").read_text(encoding="utf-8")
