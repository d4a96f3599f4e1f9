"""How recipes read and write plain YAML scalars: the core schema of YAML 1.2, nothing of 1.1's surprises."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tokenprune.recipe.text.node import MAX_INTEGER

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z", re.ASCII)
_TRUE = re.compile(r"(?:true|True|TRUE)\Z", re.ASCII)
_FALSE = re.compile(r"(?:false|False|FALSE)\Z", re.ASCII)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+\Z", re.ASCII)
_DECIMAL = re.compile(r"[-+]?[0-9]+\Z", re.ASCII)
_OCTAL = re.compile(r"0o[0-7]+\Z", re.ASCII)
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z", re.ASCII)
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z", re.ASCII)

TAG = "tag:yaml.org,2002:"
KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "null": type(None)}
"""Tags that a scalar may carry, and what it must then read as."""


class ScalarError(ValueError):
    """A plain scalar that is no value of a recipe; its text is the message."""


def read_plain(text: str) -> str | int | float | bool | None:
    """The value of an unquoted scalar.

    Raises:
        ScalarError: a number that is ambiguous, not finite or too large.
    """
    if _NULL.match(text):
        return None
    if _TRUE.match(text) or _FALSE.match(text):
        return text[0] in "tT"
    if _LEADING_ZERO.match(text):
        plain = text.lstrip("+-0")[:20] or "0"
        raise ScalarError(f"a leading zero is octal to some programs: write {plain}, or quote it")
    for pattern, base in ((_DECIMAL, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.match(text):
            # Length first: Python refuses to convert more than 4,300 digits.
            if len(text) > 66 or abs(number := int(text.replace("0o", "").replace("0x", ""), base)) > MAX_INTEGER:
                raise ScalarError("this number is too large")
            return number
    if _NOT_FINITE.match(text) or (_FLOAT.match(text) and float(text) in (float("inf"), float("-inf"))):
        raise ScalarError(f"numbers must be finite (got {text[:40]})")
    # Adding 0.0 makes -0.0 plain zero: the two are equal, so they must not tell fingerprints apart.
    return float(text) + 0.0 if _FLOAT.match(text) else text


def write_yaml(data: Any) -> str:
    """Plain data as YAML that reads back the same: short mappings on one line."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


class Dumper(yaml.SafeDumper):
    """Quotes every text that `read_plain`, or a YAML 1.1 program, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        # Lists stand two spaces in, as in the recipes that people write.
        super().increase_indent(flow, False)


def _represent_list(dumper: Dumper, items: list[Any]) -> yaml.Node:
    prose = any(isinstance(item, str) and " " in item for item in items)
    return dumper.represent_sequence(f"{TAG}seq", items, flow_style=False if prose else None)


def _represent_text(dumper: Dumper, text: str) -> yaml.Node:
    # PyYAML folds rare line breaks (U+0085, U+2028) into blanks, unless they are escaped between double quotes.
    return dumper.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


Dumper.add_representer(list, _represent_list)
Dumper.add_representer(str, _represent_text)
for _kind, _patterns in {
    "null": [_NULL],
    "bool": [_TRUE, _FALSE],
    "int": [_LEADING_ZERO, _DECIMAL, _OCTAL, _HEX],
    "float": [_FLOAT, _NOT_FINITE],
}.items():
    for _pattern in _patterns:
        Dumper.add_implicit_resolver(f"{TAG}{_kind}", _pattern, None)
