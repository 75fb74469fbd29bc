"""Prints how large jaxlm is and how its modules import each other.

    python scripts/structure.py

Tests, conftest.py and jaxlm/testing/ are not counted. FLOORS is the order of imports: a room (a folder, or a file at
the top of jaxlm) imports rooms of lower floors only, imports inside functions included.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxlm", "torchlm", "parity_tests")
FLOORS = (
    ("terminal",),
    ("errors",),
    ("cli", "io"),
    ("config",),
    ("data",),
    ("params", "parallel", "schedule"),
    ("runtime", "ops"),
    ("model", "loss", "optim"),
    ("heads", "step"),
    ("generate",),
    ("tasks", "checkpoint"),
    ("weights",),
    ("training",),
    ("distill",),
    ("loop",),
    ("cost", "reporting"),
    ("inference", "repeat"),
    ("cache", "convert", "embed", "evaluate", "glue", "plan", "predict", "report", "runs", "train"),
    ("serve", "__main__"),
    ("completion",),
)
# What torchlm mirrors, file by file, and the tasks.
CORE = (
    *("train", "loop", "step", "loss", "model", "heads", "optim", "schedule", "checkpoint", "parallel", "generate"),
    *("distill", "tasks"),
)
MOST_CORE = 2_950  # lines; each task is a file of about a hundred
MOST_LINES = 22_600  # of the whole package: to be lowered whenever a room shrinks, down to GOAL
GOAL = 13_700


def modules(package: str) -> dict[str, Path]:
    """Return the files of a package by the names of their modules, without tests and what only tests use."""
    files = sorted((ROOT / package).rglob("*.py"))
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {
        name.removesuffix(".__init__"): path
        for name, path in found.items()
        if not path.name.endswith("_test.py") and path.name != "conftest.py" and "testing" not in path.parts
    }


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules in `known` that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        asked: list[str] = []
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            asked = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in asked:
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def graph() -> dict[str, set[str]]:
    """Return which modules of all packages each of them imports."""
    known = {name: path for package in PACKAGES for name, path in modules(package).items()}
    return {name: set(imports(name, path, known)) for name, path in known.items()}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Return the modules that are in an import cycle, or import one that is."""
    left = {name: set(targets) for name, targets in edges.items()}
    while ready := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ready:
            del left[name]
    return sorted(left)


def room(name: str) -> str:
    """Return the room of a module of jaxlm; "" for the package itself."""
    return (name.split(".") + [""])[1]


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def sizes() -> dict[str, int]:
    """Return the lines of each room of jaxlm, from the lowest floor up."""
    counts = {name: 0 for floor in FLOORS for name in floor}
    for name, path in modules("jaxlm").items():
        counts[room(name)] = counts.get(room(name), 0) + lines(path)
    return counts


def summary() -> str:
    """Return the sentence on sizes that the README has."""
    counts = sizes()
    core = sum(counts[name] for name in CORE)
    return (
        f"The mirrored core of `jaxlm` has {core:,} lines, the whole package {sum(counts.values()):,}, without tests."
    )


def main() -> None:
    counts = sizes()
    for i, floor in enumerate(FLOORS, start=1):
        print(f"{i:>2}  " + ", ".join(f"{name} {counts[name]:,}" for name in floor))
    print(summary())
    print(f"Limits: {MOST_CORE:,} and {MOST_LINES:,}, the goal of the latter {GOAL:,}.")
    print(f"In import cycles: {', '.join(cycles(graph())) or 'none'}.")


if __name__ == "__main__":
    main()
