"""How a fault is planted: a function gets other code, in memory, and all who hold the function run it.

A fault names the function. Inside it, an edit names only the expression or statements that are the mistake, as Python
fragments that are compared as syntax trees, so that layout, comments and other lines do not matter:

    _x               any expression or identifier, the same wherever `_x` stands in the edits of a fault
    *_rest           all other arguments, elements or statements
    **_rest          all other keyword arguments or entries of a dict, in any order

Parameters of the function, attributes and JAX's, NumPy's and PyTorch's names may stand in a fragment; for local names,
helpers and modules of jaxlm and torchlm it has wildcards, so that they can be renamed (planting_test.py renames them).
"""

import ast
import contextlib
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

Function = Any  # with the code that a function of Python has
Plant = Callable[[], contextlib.AbstractContextManager[None]]
Edit = tuple[str, str]  # fragments of Python: what is there, and what replaces it


@dataclass(frozen=True)
class Fault:
    """A mistake, and the check that is expected to notice it; where it does not, all others are tried."""

    name: str
    description: str
    package: str
    check: str
    plant: Plant


class Pair(NamedTuple):
    """A function of jaxlm and its mirror in torchlm."""

    jaxlm: Function
    torchlm: Function


def mirrored(title: str, check: str, functions: Pair, *edits: Edit) -> list[Fault]:
    """Return a fault that has the same edits in both packages. Its title is "name: description"."""
    return both(title, check, *(edit(function, *edits) for function in functions))


def both(title: str, check: str, jaxlm: Plant | None, torchlm: Plant | None) -> list[Fault]:
    """Return a fault that differs between the packages; None: one of them cannot have it."""
    name, _, description = title.partition(": ")
    plants = {"jaxlm": jaxlm, "torchlm": torchlm}
    return [Fault(name, description, package, check, plant) for package, plant in plants.items() if plant]


def edit(function: Function, *edits: Edit) -> Plant:
    """Return how to plant edits of a function."""
    return functools.partial(edited, function, *edits)


def instead(function: Function, wrong: Function) -> Plant:
    """Return how to plant another function in place of a function."""
    return functools.partial(replaced, function, wrong)


@contextlib.contextmanager
def edited(function: Function, *edits: Edit) -> Iterator[None]:
    """Replace fragments of a function. Raises ValueError if it does not have each exactly once."""
    function = inspect.unwrap(function)
    free = function.__code__.co_freevars  # `__class__`, where a method calls super()
    outer = ast.parse(f"def outer({', '.join(free)}):\n    return planted")
    inner: Any = rewritten(parsed(function), *edits)
    inner.name = "planted"  # so that a function that calls itself calls the one that gets this code
    outer.body[0].body.insert(0, inner)  # type: ignore[attr-defined]
    namespace: dict[str, Any] = {}
    # As text, which knows nothing of Load and Store: a wildcard may stand on either side of an assignment.
    exec(compile(ast.unparse(outer), f"<fault in {function.__qualname__}>", "exec"), function.__globals__, namespace)
    with _planted(function, namespace["outer"](*free).__code__, function.__kwdefaults__):
        yield


@contextlib.contextmanager
def replaced(function: Function, wrong: Function) -> Iterator[None]:
    """Let a function be another one, which takes the same arguments."""

    def call(*args: Any, wrong: Function, **kwargs: Any) -> Any:
        return wrong(*args, **kwargs)

    with _planted(inspect.unwrap(function), call.__code__, {"wrong": wrong}):
        yield


@contextlib.contextmanager
def _planted(function: Function, code: CodeType, kwdefaults: dict[str, Any] | None) -> Iterator[None]:
    before = function.__code__, function.__kwdefaults__
    function.__code__, function.__kwdefaults__ = code, kwdefaults
    try:
        yield
    finally:
        function.__code__, function.__kwdefaults__ = before


def parsed(function: Function) -> ast.FunctionDef:
    """Return the syntax tree of a function, without its decorators and the types of arguments."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return tree


def rewritten(tree: ast.FunctionDef, *edits: Edit) -> ast.FunctionDef:
    """Return the tree with all edits made, one after the other."""
    tree, bound = copy.deepcopy(tree), dict[str, Any]()
    for old, new in edits:
        pattern, filling = (ast.parse(textwrap.dedent(text)).body for text in (old, new))
        kind: type[ast.AST] = ast.stmt
        if all(len(body) == 1 and isinstance(body[0], ast.Expr) for body in (pattern, filling)):
            pattern, filling = ([body[0].value] for body in (pattern, filling))  # type: ignore[attr-defined]
            kind = ast.expr
        places = []
        for parent in ast.walk(tree):
            for field, child in ast.iter_fields(parent):
                nodes = child if isinstance(child, list) else [child]
                for i in (i for i, node in enumerate(nodes) if isinstance(node, kind)):
                    names = dict(bound)
                    if _matches(pattern, nodes[i : i + len(pattern)], names):
                        places.append((parent, field, nodes, i, names))
        if len(places) != 1:
            raise ValueError(f"{tree.name} has {len(places)} places of the form {old!r}: a fault needs exactly one")
        ((parent, field, nodes, i, bound),) = places
        nodes[i : i + len(pattern)] = _Filled(bound).visit(ast.Module(filling, [])).body
        if not isinstance(getattr(parent, field), list):
            setattr(parent, field, nodes[0])
    return tree


def _matches(pattern: Any, node: Any, bound: dict[str, Any]) -> bool:
    """Return whether a node has the form of a pattern, and add to `bound` what the wildcards stand for."""
    if isinstance(pattern, ast.expr) and (name := _wildcard(pattern)):
        return isinstance(node, ast.expr) and _binds(name, node, bound)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, ast.Constant):
        return type(pattern.value) is type(node.value) and pattern.value == node.value
    if isinstance(pattern, str) and (name := _wildcard(ast.Name(pattern))):
        return _binds(name, ast.Name(node), bound)
    if isinstance(pattern, list):
        is_named = any(isinstance(x, ast.keyword) for x in (*pattern, *node))
        return (_keywords_match if is_named else _list_matches)(pattern, node, bound)
    if isinstance(pattern, ast.Dict):
        return _keywords_match(_keywords(pattern), _keywords(node), bound)
    if isinstance(pattern, ast.AST):
        fields = [name for name in pattern._fields if name != "ctx"]
        return all(_matches(getattr(pattern, name, None), getattr(node, name, None), bound) for name in fields)
    return pattern == node


def _list_matches(patterns: list[Any], nodes: list[Any], bound: dict[str, Any]) -> bool:
    i = next((i for i, pattern in enumerate(patterns) if _rest(pattern)), len(patterns))
    if i == len(patterns):
        return len(nodes) == i and all(_matches(*pair, bound) for pair in zip(patterns, nodes, strict=True))
    end = len(nodes) - len(patterns[i + 1 :])
    return (
        i <= end
        and _list_matches(patterns[:i], nodes[:i], bound)
        and _list_matches(patterns[i + 1 :], nodes[end:], bound)
        and _binds(_rest(patterns[i]), nodes[i:end], bound)
    )


def _keywords_match(patterns: list[ast.keyword], nodes: list[ast.keyword], bound: dict[str, Any]) -> bool:
    named = {x.arg: x.value for x in patterns if not _rest(x)}
    values = {x.arg: x.value for x in nodes if x.arg in named}
    others = [x for x in nodes if x.arg not in named]
    (rest,) = [_rest(x) for x in patterns if _rest(x)] or [""]
    is_whole = _binds(rest, others, bound) if rest else not others
    return is_whole and named.keys() == values.keys() and all(_matches(x, values[k], bound) for k, x in named.items())


def _keywords(entries: ast.Dict) -> list[ast.keyword]:
    """Return the entries of a dict as keyword arguments, by the text of their keys."""
    pairs = zip(entries.keys, entries.values, strict=True)
    return [ast.keyword(ast.unparse(key) if key else None, value) for key, value in pairs]


def _wildcard(node: ast.AST) -> str:
    """Return the name of a wildcard, or "" if the node is not one."""
    is_wildcard = isinstance(node, ast.Name) and node.id[:1] == "_" and node.id.strip("_") and node.id[:2] != "__"
    return node.id if is_wildcard else ""  # type: ignore[attr-defined]


def _rest(node: ast.AST) -> str:
    """Return the name in `*_rest`, as an expression or as a statement, and in `**_rest`; or ""."""
    node = node.value if isinstance(node, ast.Expr) else node
    is_rest = isinstance(node, ast.Starred) or (isinstance(node, ast.keyword) and node.arg is None)
    return _wildcard(node.value) if is_rest else ""  # type: ignore[attr-defined]


def _binds(name: str, node: Any, bound: dict[str, Any]) -> bool:
    return ast.unparse(bound.setdefault(name, node)) == ast.unparse(node)


class _Filled(ast.NodeTransformer):
    """Puts what wildcards stand for in their place."""

    def __init__(self, bound: dict[str, Any]):
        self.bound = bound

    def visit(self, node: ast.AST) -> Any:
        name = _wildcard(node) or _rest(node)
        if name and name not in self.bound:
            raise ValueError(f"{name} is in what a fault puts in, but not in what it replaces")
        return copy.deepcopy(self.bound[name]) if name else super().visit(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        entries = self.visit(ast.Call(ast.Name("dict"), [], _keywords(node))).keywords
        return ast.Dict([x.arg and ast.parse(x.arg, mode="eval").body for x in entries], [x.value for x in entries])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self.visit(ast.Name(node.name)).id
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self.visit(ast.Name(node.arg)).id)
