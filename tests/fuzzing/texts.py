"""Random texts of recipes, good ones with a few characters changed, and what an error about one must tell."""

# ruff: noqa: E501  (lists of odd pieces)

from __future__ import annotations

import string
from random import Random

from hypothesis import strategies as st
from recipe.bad_recipes import BAD, FIXED

from tokenprune.recipe import InvalidRecipeError, list_recipes, recipe_path
from tokenprune.recipe.text.yaml_reader import text_source

GOOD = [*(recipe_path(name).read_text() for name in list_recipes()), FIXED]
PIECES = [
    "version: 1\n", "stages:\n", "  - place: after_vision\n", "    scheduler: ", "{type: fixed, keep: ", "extends: ", "variants: ",
    "&a ", "*a", "!!int ", "!!python/name:os.system ", "[", "]", "{", "}", ",", ": ", "- ", "\n", "  ", "\t", "'", '"', "|\n", ">\n", "---\n",
    "...\n", "%YAML 1.1\n", "%TAG ! x\n", "\\UFFFFFFFF", "\\ud800", "<<: ", "? ", "# ", "017", "1e999", ".nan", "null", "true", "0x",
    "9" * 25, "\x00", "\x85", "\u2028", "\ufeff", "宽", "\r", "\r\n", "keep", "budget: {keep: 0.5}\n", "name: ", "after_vision", "25%",
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.sampled_from([text for text, _ in BAD.values() if len(text) < 2000]),
)


def mutated(text: str, rng: Random) -> str:
    """`text` with a few characters or pieces put in, taken out or repeated."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 0, 1, 3, 20]))
        piece = rng.choice([*PIECES, "", text[start:end] * 2, rng.choice(string.printable)])
        text = text[:start] + piece + text[end:]
    return text


def check(error: InvalidRecipeError, texts: dict[str, str]) -> None:
    """Every location lies inside the text that it names, and the report can be shown."""
    assert error.problems
    for problem in error.problems:
        assert problem.message
        if problem.path not in texts:
            continue
        lines = text_source(problem.path, texts[problem.path]).lines
        assert lines is not None
        assert problem.line is not None
        assert problem.column is not None
        assert 1 <= problem.line <= len(lines)
        assert problem.source_line == lines[problem.line - 1]
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
    assert len(str(error).splitlines()) >= len(error.problems)
