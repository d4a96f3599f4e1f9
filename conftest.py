"""What every test and every code block of the documentation shares."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser
from sybil.sybil import SybilCollection
from xdist.scheduler import LoadScopeScheduling

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers: nothing here may need a network

settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile("fixed")  # pytest --hypothesis-profile explore looks further


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)  # pytest -n: one process a core
    socket.socket.connect = _connect  # type: ignore[method-assign]
    gc.disable()  # until everything is imported, all of which stays


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        mark = item.get_closest_marker("in_turn")
        if mark is not None and _turn(item) % mark.args[0]:
            item.add_marker(pytest.mark.slow)


def _turn(item: pytest.Item) -> int:
    """The places of a case's values in the lists of their parameters, summed: each value has its turn, and a case that
    runs does so whatever else is collected."""
    assert isinstance(item, pytest.Function)
    number, turn = next(iter(item.callspec.indices.values())), 0  # of the case, in the product of all lists
    for mark in reversed([*item.iter_markers("parametrize")]):
        number, place = divmod(number, len(mark.args[1]))
        turn += place
    return turn


def pytest_collection_finish() -> None:
    """What the libraries have made stays: going through it again and again took a seventh of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


def _connect(self: socket.socket, address: Any, _real: Any = socket.socket.connect) -> None:
    if isinstance(address, tuple) and address[0] not in {"127.0.0.1", "::1", "localhost"}:
        raise OSError(f"a test tried to reach the network: {address}")
    _real(self, address)


# ----------------------------------------------------------------------------- code in README.md, docs/ and docstrings


def check_recipe(example: Example) -> None:
    """A block of YAML that is a whole recipe must load."""
    import yaml

    from tokenprune import load_recipe

    text = str(example.parsed)
    if "version" in (yaml.safe_load(text) or {}):
        with TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(text, encoding="utf-8")
            load_recipe(path)


def enter_folder(namespace: dict[str, Any]) -> None:
    """What a page writes lands in a folder of its own."""
    namespace["_home"], namespace["_folder"] = Path.cwd(), TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def leave_folder(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


_parsers = [PythonCodeBlockParser(), CodeBlockParser("yaml", check_recipe), SkipParser()]
_readme = Sybil(parsers=_parsers, patterns=["README.md"])  # read in a checkout, whose pictures it names
_pages = Sybil(
    parsers=_parsers,
    patterns=["docs/*.md", "docs/**/*.md"],
    setup=enter_folder,
    teardown=leave_folder,
)
_docstrings = Sybil(parsers=[DocTestParser()], patterns=["tokenprune/*.py", "tokenprune/**/*.py"])
_collect = SybilCollection([_readme, _pages, _docstrings]).pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return _collect(file_path, parent)


class _PagesTogether(LoadScopeScheduling):
    """Tests go to any worker, one by one; the blocks of a page build on each other and stay together."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return nodeid if path.startswith("tests/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _PagesTogether:
    return _PagesTogether(config, log)  # type: ignore[arg-type]
