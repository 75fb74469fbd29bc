"""The rooms of jaxlm: no import cycle, imports downwards only, no framework where none is needed, and sizes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structure
from structure import FLOORS, ROOT

# What knows no framework: not even inside functions is one imported.
PLAIN = ("data", "training", "io", "config", "errors", "cli", "terminal")
FRAMEWORKS = ("jax", "flax", "optax", "orbax", "torch")
GRAPH = structure.graph()


def test_there_is_no_import_cycle() -> None:
    assert structure.cycles(GRAPH) == []
    assert structure.cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_each_room_has_its_floor() -> None:
    assert {structure.room(name) for name in structure.modules("jaxlm")} == {
        "",
        *(x for floor in FLOORS for x in floor),
    }


def test_rooms_import_downwards_only() -> None:
    level = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    upwards = [
        f"{name} -> {target}"
        for name, targets in GRAPH.items()
        for target in targets
        if name.startswith("jaxlm.") and target.startswith("jaxlm.") and structure.room(name) != structure.room(target)
        if level[structure.room(target)] >= level[structure.room(name)]
    ]
    assert upwards == []


@pytest.mark.parametrize("room", PLAIN)
def test_what_knows_no_framework_imports_none(room: str) -> None:
    paths = [path for name, path in structure.modules("jaxlm").items() if structure.room(name) == room]
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not [name for name in names if name.split(".")[0] in FRAMEWORKS], path


def test_private_names_of_jax_are_imported_in_one_file() -> None:
    paths = [path for package in structure.PACKAGES for path in structure.modules(package).values()]
    private = [path for path in paths if re.search(r"\bjax\._src|\bpartial_eval", path.read_text(encoding="utf-8"))]
    assert private == [ROOT / "jaxlm" / "runtime" / "jax_private.py"]


def test_no_import_alias_hides_a_module() -> None:
    packages = [*structure.PACKAGES, "scripts"]
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    stems = {path.stem for path in files} | {path.name for path in (ROOT / "jaxlm").iterdir() if path.is_dir()}
    taken = stems | {"tokenizers", "datasets", "optax", "flax", "jax", "torch", *sys.stdlib_module_names}
    hiding = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {alias.name} as {alias.asname}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if alias.asname and alias.asname in taken
    ]
    assert hiding == []


def test_torchlm_trains_where_jax_is_not_installed(tmp_path: Path) -> None:
    program = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "orbax.checkpoint"):
    sys.modules[name] = None
from torchlm import train
sys.exit(train.main(sys.argv[1:]))
"""
    sizes = "--model.d-model 12 --model.n-heads 3 --model.n-layers 1 --model.seq-len 16 --tokenizer.vocab-size 300"
    settings = f"--task sst2 {sizes} --train.max-steps 4 --train.eval-interval 2 --train.batch-size 8 --run.dir run"
    command = [sys.executable, "-c", program, *settings.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the best" in done.stdout and (tmp_path / "run" / "checkpoints" / "4.pt").is_file()


def test_each_room_says_what_is_in_it() -> None:
    for path in sorted((ROOT / "jaxlm").iterdir()):
        if path.is_dir() and any(path.glob("*.py")):
            page = (path / "README.md").read_text(encoding="utf-8")
            missing = [file.name for file in path.glob("*.py") if not file.name.endswith("_test.py")]
            missing = [name for name in missing if name != "__init__.py" and f"`{name}`" not in page]
            assert missing == [], path


def test_the_sizes_are_those_of_the_readme_and_within_their_limits() -> None:
    counts = structure.sizes()
    assert structure.summary() in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert sum(counts[name] for name in structure.CORE) <= structure.MOST_CORE
    assert sum(counts.values()) <= structure.MOST_LINES


def test_the_six_files_of_the_readme_have_about_the_lines_that_it_says() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| \[`(jaxlm/\S+\.py)`\]\(\1\) \| (\d+) \|", page, re.MULTILINE)
    assert len(stated) == 6
    for path, n in stated:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(n)) <= 0.15 * lines, (path, lines)
