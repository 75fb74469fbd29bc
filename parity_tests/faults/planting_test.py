"""Faults are planted by the form of the code: layout and names may change, and what is planted goes away again."""

import ast
import builtins
import functools
import inspect
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from parity_tests.faults import FAULTS, planting
from parity_tests.faults.planting import Edit
from parity_tests.faults.targets import positions


class Renamed(ast.NodeTransformer):
    """Another name for each local name, and for each function and module of the project that a function uses."""

    def __init__(self, tree: ast.FunctionDef, frameworks: set[str], modules: set[str]):
        self.kept = {arg.arg for arg in ast.walk(tree.args) if isinstance(arg, ast.arg)} | KNOWN | frameworks
        self.modules = modules

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(node.id if node.id in self.kept else f"renamed_{node.id}", node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg if node.arg in self.kept else f"renamed_{node.arg}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = f"renamed_{node.name}"
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        is_imported = isinstance(node.value, ast.Name) and node.value.id in self.modules
        return ast.Name(f"renamed_{node.attr}", node.ctx) if is_imported else self.generic_visit(node)


KNOWN = set(dir(builtins))


def taken_from_outside(tree: ast.AST) -> set[str]:
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    given |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    given |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names} - given


def test_every_fault_survives_other_names_modules_and_layout() -> None:
    edits_of = [fault.plant for fault in FAULTS if fault.plant.func is planting.edited]  # type: ignore[attr-defined]
    assert len(edits_of) > 200
    for plant in edits_of:
        function, *edits = plant.args  # type: ignore[attr-defined]
        function = inspect.unwrap(function)
        modules = {name: x.__name__ for name, x in function.__globals__.items() if isinstance(x, ModuleType)}
        own = {name for name in modules if modules[name].startswith(("jaxlm", "torchlm"))}
        frameworks = set(modules) - own
        tree = planting.parsed(function)
        renamed = ast.parse(ast.unparse(Renamed(tree, frameworks, own).visit(tree)))
        planted = ast.parse(ast.unparse(planting.rewritten(renamed.body[0], *edits)))  # type: ignore[arg-type]
        assert ast.unparse(planted) != ast.unparse(renamed), edits
        assert taken_from_outside(planted) <= taken_from_outside(renamed) | frameworks | KNOWN, edits


def scaled(values: list[int], *, by: int = 2) -> dict[str, Any]:
    total: int = sum(values)  # in front of a filter
    shares = [
        value / total
        for value in values
    ]  # fmt: skip
    return {"values": [by * value for value in values], "largest": max(shares, default=0), "total": total}


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ([("_by * _value", "_by + _value")], ([3, 5], 0.75, 4)),
        ([("_v/_t", "_t - _v")], ([2, 6], 3, 4)),
        ([("max(*_values, default=_x)", "min(*_values, default=_x)")], ([2, 6], 0.25, 4)),
        ([("max(_values, **_rest)", "len(_values)")], ([2, 6], 2, 4)),
        ([("{'total': _n, **_rest}", "{**_rest, 'total': -_n}")], ([2, 6], 0.75, -4)),
        ([("[_x / _n for _x in _all]", "[_x for _x in _all]")], ([2, 6], 3, 4)),
        ([("_a = [_x / _n for _x in _all]", "_n = 2; _a = [_x / _n for _x in _all]")], ([2, 6], 1.5, 2)),
        ([("{'total': _n, **_rest}", "{**_rest}"), ("return _x", "return _x | {'total': 2 * _n}")], ([2, 6], 0.75, 8)),
    ],
)
def test_an_edit_names_an_expression_or_statements(edits: list[Edit], expected: tuple[Any, ...]) -> None:
    right = {"values": [2, 6], "largest": 0.75, "total": 4}
    assert scaled([1, 3]) == right
    with planting.edited(scaled, *edits):
        assert tuple(scaled([1, 3]).values()) == expected
    assert scaled([1, 3]) == right


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_x // _y", "_x", "scaled has 0 places of the form '_x // _y': a fault needs exactly one"),
        ("for _x in _y: pass", "pass", "scaled has 0 places"),
        ("values", "[]", "scaled has 3 places of the form 'values'"),
        ("max(*_values)", "0", "scaled has 0 places"),  # it has a keyword argument
        ("sum(values)", "sum(_other)", "_other is in what a fault puts in, but not in what it replaces"),
    ],
)
def test_what_does_not_fit_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)), planting.edited(scaled, (old, new)):
        pass
    assert scaled([1, 3], by=1)["values"] == [1, 3]


@pytest.mark.parametrize(
    "plant", [planting.edit(scaled, ("_by * _x", "_x")), planting.instead(scaled, lambda *_, by=2: by)]
)
def test_an_exception_leaves_the_function_as_it_was(plant: planting.Plant) -> None:
    code, defaults = scaled.__code__, scaled.__kwdefaults__
    with pytest.raises(KeyError), plant():
        assert scaled.__code__ is not code
        raise KeyError
    assert (scaled.__code__, scaled.__kwdefaults__) == (code, defaults)


def test_all_who_hold_a_function_get_what_stands_instead_of_it() -> None:
    class Holder:
        @functools.lru_cache  # noqa: B019
        def method(self, x: int) -> int:
            return x

    held = Holder().method
    with planting.replaced(Holder.method, lambda self, x: -x):
        assert held(3) == -3
    held.cache_clear()
    assert held(3) == 3


@pytest.mark.parametrize("table", positions)
def test_a_fault_is_gone_when_its_context_ends(table: planting.Function) -> None:
    before = table(5, 12)
    with planting.edited(table, ("2 * _column", "_column")):
        assert np.abs(table(5, 12) - before).max() > 0.01
    np.testing.assert_array_equal(table(5, 12), before)
