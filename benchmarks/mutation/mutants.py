"""Mutants: small changes to one place of the code that some test should notice. Made by cosmic-ray's operators.

Not every operator of cosmic-ray is used: it turns each ``+`` into eleven others, most of which nobody would ever write,
and which any test notices. One or two near misses for each operator say more about the tests.
"""

from __future__ import annotations

import ast
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

GROUPS = {
    "pure": ("tokenprune/core/*.py", "tokenprune/budget/*.py", "tokenprune/parts/**/*.py"),
    "engine": ("tokenprune/stage.py", "tokenprune/engine/**/*.py"),
}
"""What is asked about, by the share of mutants that tests must notice: pure parts 90 %, the engine 80 %."""

NEAR_MISSES = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Add", "Div_Mul", "FloorDiv_Add")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Mod_Add", "Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_Gt", "Gt_Lt", "Is_IsNot", "IsNot_Is")),
    *(f"ReplaceUnaryOperator_{pair}" for pair in ("Delete_USub", "Delete_Not", "Delete_Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop"),
)


class SwapName(Operator):
    """Puts the name of an opposite in place of a function's, such as ``min`` for ``max``."""

    OPPOSITES: ClassVar = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "any": "all", "all": "any",
                 "floor": "ceil", "ceil": "floor", "argmin": "argmax", "argmax": "argmin",
                 "zeros": "ones", "ones": "zeros", "clamp_min": "clamp_max"}  # fmt: skip

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(node, parso.python.tree.Name) and node.value in self.OPPOSITES:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = self.OPPOSITES[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


OPERATORS = {"SwapName": SwapName, **{name: get_operator(f"core/{name}") for name in NEAR_MISSES}}


UNCHANGED = "unchanged"
"""Stands in for an operator where the code is to stay as it is."""


@dataclass(frozen=True)
class Mutant:
    """One operator at one of its occurrences in a file."""

    path: str
    operator: str
    occurrence: int
    line: int
    column: int

    @property
    def code(self) -> str:
        """The changed file."""
        if self.operator == UNCHANGED:
            return _source(self.path)
        changed = mutate_code(_source(self.path), OPERATORS[self.operator](), self.occurrence)
        assert changed is not None, f"{self} is no mutant"
        return changed

    @property
    def key(self) -> str:
        """Tells it from all others, and from what it was before its file changed."""
        text = f"{self.path} {self.operator} {self.occurrence} {_source(self.path)}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def shown(self) -> str:
        """Both lines, for people."""
        before, after = _source(self.path).splitlines(), self.code.splitlines()
        return f"- {before[self.line - 1].strip()}\n+ {after[self.line - 1].strip()}"


def sample(group: str, count: int | None, seed: int) -> list[Mutant]:
    """So many mutants of a group, drawn alike from all; the same for the same seed and code."""
    paths = sorted({str(path) for pattern in GROUPS[group] for path in Path().glob(pattern)})
    mutants = [mutant for path in paths for mutant in _mutants_of(path)]
    random.Random(seed).shuffle(mutants)
    return mutants[:count]


def _mutants_of(path: str) -> Iterator[Mutant]:
    source = _source(path)
    silent = _without_effect(ast.parse(source))
    tree = get_ast(source)
    for name, operator in OPERATORS.items():
        occurrence = 0
        for node in ast_nodes(tree):
            for (line, column), _ in operator().mutation_positions(node):
                if not any(start <= (line, column) < end for start, end in silent):
                    yield Mutant(path, name, occurrence, line, column)
                occurrence += 1


def _without_effect(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where code is never run, or only makes a message: annotations, messages of errors, imports for types."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            nodes.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            nodes.append(node.returns)
        elif isinstance(node, ast.Raise | ast.JoinedStr):
            nodes.append(node.exc if isinstance(node, ast.Raise) else node)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes.append(node)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in nodes
        if isinstance(node, ast.expr | ast.stmt)
    ]


@cache
def _source(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
