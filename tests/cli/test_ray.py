"""`--ray`: what a worker on a cluster does, and, where Ray is installed, whole runs."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killing import without_times

from tokenprune.cli.many import Work
from tokenprune.cli.picture_list import read_lines
from tokenprune.cli.workers import Loading
from tokenprune.errors import InputError
from tokenprune.study.workers import Alone, OnRay, on_ray
from tokenprune.study.workers.on_ray import _Actor, _knock

QUESTION = "is there a red ring ?"
LOADING = Loading("embedded", None, None, "sdpa")
WORK = Work(LOADING, "fastv", {"keep": 0.25}, 8)


def test_a_worker_answers_as_one_process_and_only_about_the_same_files(album: Path) -> None:
    lines = read_lines([str(album)], QUESTION)
    alone = Alone(WORK)
    ((_, expected),) = alone.answers([(lines, False)])
    actor = _Actor()
    counts: list[tuple[int, int]] = []

    def make(number: int, count: int) -> Any:
        counts.append((number, count))
        return WORK(number, count)

    assert actor.start(make, 1) == ("ready", (alone.run, alone.facts))
    assert counts == [(0, 2)]  # one of several, even alone: plug-ins are not known there yet

    def refused(asked: list[Any]) -> str:
        kind, (number, error) = actor.answer(3, (asked, False))
        assert (kind, number, type(error)) == ("refused", 3, InputError)
        return str(error)

    kind, (number, done) = actor.answer(3, (lines, False))
    assert (kind, number, done.told) == ("done", 3, expected.told)
    changed = replace(lines[0], digest="0" * 16)
    assert refused([changed]) == f"{lines[0].path} is another file where a worker runs, or has changed since"
    gone = replace(lines[0], path=album / "7.png")
    assert refused([gone]).startswith(f"{album / '7.png'} cannot be read by a worker (No such file or directory); are")


def test_what_cannot_be_loaded_is_told_and_names_are_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, (number, error) = _Actor().start(replace(WORK, loading=replace(LOADING, model="nowhere")), 1)
    assert (kind, number) == ("refused", None) and "no such model folder: nowhere" in str(error)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").touch()
    whole = replace(WORK, recipe="my.yaml", loading=replace(LOADING, plugins=(Path("my.py"),))).anywhere()
    assert (whole.loading.model, whole.recipe) == ("embedded", str(tmp_path / "my.yaml"))
    assert whole.loading.plugins == (tmp_path / "my.py",)


def test_mistakes(album: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--ray goes with --images" in cli("run", "--ray", "auto").err
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray: pip install 'tokenprune-vlm\[ray\]'"):
        OnRay(WORK, "local", 1)
    ran = cli("eval", "fastv", "--scenes", 1, "--ray", "local")
    assert ran.status == 2 and "--ray needs Ray" in ran.err


def test_nobody_at_an_address_is_told_at_once() -> None:
    """Ray itself would try for minutes."""
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "ray://localhost:1"):
        with pytest.raises(ConnectionRefusedError):
            _knock(address)
    with socket.create_server(("127.0.0.1", 0)) as there:
        _knock(f"ray://127.0.0.1:{there.getsockname()[1]}")
    for address in ("auto", "local"):
        _knock(address)


@pytest.fixture(scope="module", params=["local", "two machines"])
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a cluster: started by the command itself, or one of two nodes, each with a core."""
    pytest.importorskip("ray")
    if request.param == "local":
        yield "local"
        return
    with two_nodes() as (cluster, _):
        yield cluster.address


@contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes on this machine, a core each, and its second node."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        # Its address is this machine's own in the network, which tests may not reach: conftest.py.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(on_ray, "_knock", lambda address: address == cluster.address or _knock(address))
            yield cluster, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_worker_and_a_machine_that_are_lost_lose_nothing(album: Path) -> None:
    ray = pytest.importorskip("ray")
    lines = read_lines([str(album)], QUESTION)
    batches = [([line], False) for line in lines]
    alone = {number: done.told for number, done in Alone(WORK).answers(batches)}
    with two_nodes() as (cluster, other), OnRay(WORK, cluster.address, 2) as pool:
        found = {}
        for number, done in pool.answers(batches):
            if not found:
                ray.kill(pool._links[0].actor)  # type: ignore[attr-defined]
            found[number] = done.told
        assert found == alone
        found = {}
        for number, done in pool.answers(batches):
            if not found:
                cluster.remove_node(other)  # the worker in its place waits for a machine; the other one goes on
            found[number] = done.told
        assert found == alone


@pytest.mark.slow
def test_a_cluster_writes_the_same_bytes(
    cluster: str, album: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # workers start elsewhere, so relative names have to travel whole
    asked = ("run", "--images", album.name, "--question", QUESTION, "--batch-size", 1, "--measure", 0, "--json")
    budget = ("--recipe", "fastv", "--keep", 0.25, "--max-new-tokens", 8)
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    assert cli(*asked, *budget, "--output", one).status == 0
    ran = cli(*asked, *budget, "--output", many, "--ray", cluster, "--workers", 2)
    assert ran.status == 0 and json.loads(ran.out)["ray"] == cluster
    assert many.read_bytes() == one.read_bytes()
    many.write_bytes(b"".join(one.read_bytes().splitlines(keepends=True)[1:2]))
    ran = cli(*asked, *budget, "--output", many, "--ray", cluster, "--workers", 1)
    assert json.loads(ran.out)["answered_before"] == 1 and many.read_bytes() == one.read_bytes()


@pytest.mark.slow
def test_a_cluster_evaluates_as_one_process(cluster: str, cli: Callable[..., Any]) -> None:
    asked = ("eval", "fastv", "--keep", 0.5, "--scenes", 2, "--task", "colour", "--seeds", 1, "--json")
    one, many = cli(*asked), cli(*asked, "--batch-size", 2, "--ray", cluster, "--workers", 2)
    assert (many.status, many.err) == (0, "")
    assert without_times(json.loads(many.out)) == without_times(json.loads(one.out))


@pytest.mark.slow
def test_no_cluster_and_too_many_workers_are_told(cluster: str, cli: Callable[..., Any]) -> None:
    asked = ("eval", "fastv", "--scenes", 1)
    ran = cli(*asked, "--ray", "127.0.0.1:1", "--workers", 1)
    assert ran.status == 2 and "--ray 127.0.0.1:1: no cluster" in ran.err
    ran = cli(*asked, "--ray", cluster, "--workers", 1000)
    assert ran.status == 2 and "--workers 1000: the cluster has room for " in ran.err
    ran = cli(*asked, "--ray", cluster, "--workers", 1, "--device", "cuda:7")
    assert ran.status == 2 and "device 'cuda:7' is not available" in ran.err
