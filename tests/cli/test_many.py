"""`tokenprune run --images`: lists of pictures, and answers that survive kills, in one process or several."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tokenprune.cli.many import Work, _facts, _time
from tokenprune.cli.picture_list import read_lines
from tokenprune.cli.workers import Loading, device_of
from tokenprune.errors import InputError
from tokenprune.study.many import AnswersFile, Line, Measured, in_batches
from tokenprune.study.workers import Alone, Processes
from tokenprune.study.workers.processes import share_processor

QUESTION = "is there a red ring ?"
LOADING = Loading("embedded", None, None, "sdpa")
WORK = Work(LOADING, "fastv", {"keep": 0.25}, 8)


def asked(album: Path, output: Path, *more: object) -> tuple[object, ...]:
    budget = ("--recipe", "fastv", "--keep", 0.25, "--max-new-tokens", 8)
    return ("run", "--images", album, "--question", QUESTION, "--output", output, "--batch-size", 3, *budget, *more)


def test_a_folder_is_answered_and_told(album: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    output = tmp_path / "a.jsonl"
    ran = cli(*asked(album, output, "--json"))
    facts = json.loads(ran.out)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(album / f"{number}.png") for number in range(4)]
    assert {line["question"] for line in lines} == {QUESTION} and all(line["answer"] for line in lines)
    assert [(line["vision_tokens"], line["average"], line["final"]) for line in lines] == [(144, 49.5, 36)] * 4
    assert (facts["questions"], facts["answered_now"], facts["answered_before"]) == (4, 4, 0)
    assert (facts["vision_tokens"], facts["average"], facts["saved"]) == (4 * 144, 4 * 49.5, 1 - 49.5 / 144)
    assert facts["measured"]["questions"] == 4  # both batches
    # Each answer is that of the picture alone.
    alone = cli("run", album / "2.png", QUESTION, "--recipe", "fastv", "--keep", 0.25, "--json")
    assert json.loads(alone.out)["answer"] == lines[2]["answer"]
    # Whatever a kill leaves, the same command ends with the same bytes.
    whole = output.read_bytes()
    for left in (whole[: len(whole) // 2], whole.splitlines(keepends=True)[3], whole):
        output.write_bytes(left)
        ran = cli(*asked(album, output, "--measure", 0))
        assert output.read_bytes() == whole
        assert ran.out.splitlines()[-1] == f"answers: {output}"
        assert f"{left.count(10)} of them before" in ran.out
    assert " s for " not in ran.out  # nothing was left to ask


def test_answers_of_another_run_are_never_mixed(album: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    output = tmp_path / "a.jsonl"
    lines = read_lines([str(album)], QUESTION)
    AnswersFile(output, lines, "one").add([(lines[0], {"answer": "yes"})])
    before = output.read_bytes()
    with pytest.raises(InputError, match=r"a\.jsonl:1: error: an answer of another model, recipe or length of answers"):
        AnswersFile(output, lines, "two")
    (album / "0.png").write_bytes((album / "1.png").read_bytes())
    with pytest.raises(InputError, match=r"a\.jsonl:1: error: answers a question that is not asked now, or .*0\.png"):
        AnswersFile(output, read_lines([str(album)], QUESTION), "one")
    output.write_text('{"key": 1}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:1: error: not an answer of `tokenprune run --images`"):
        AnswersFile(output, lines, "one")
    output.write_bytes(before)
    ran = cli(*asked(album, output))
    assert ran.status == 2 and "take another --output" in ran.err and output.read_bytes() == before


def test_lists_patterns_and_files(album: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    rows = [{"image": "album/1.png", "id": 7}, {"image": "album/1.png", "question": "where is it?"}]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_lines([str(file)], QUESTION)
    assert [(line.image, line.question, line.given) for line in found] == [
        ("album/1.png", QUESTION, {"id": 7}),
        ("album/1.png", "where is it?", {}),
    ]
    assert found[0].path == album / "1.png" and found[0].key != found[1].key
    names = [[line.path.name for line in read_lines([source], "?")] for source in (f"{album}/[12].*", f"{album}/3.png")]
    assert names == [["1.png", "2.png"], ["3.png"]]
    assert pickle.loads(pickle.dumps(found)) == found


def test_thousands_of_mistakes_end_in_a_count(album: Path) -> None:
    file = album / "list.jsonl"
    file.write_text("{}\n" * 2000)
    with pytest.raises(InputError) as error:
        read_lines([str(file)], "?")
    assert str(error.value).splitlines()[-2:] == [
        f"{file}:20: error: no image; expected the path of a picture",
        "error: and 1,980 more like these",
    ]


def test_time_is_saved_only_where_the_interval_says_so() -> None:
    def told(*untouched: float) -> str:
        measured = [Measured(1.0, seconds, 3, 2) for seconds in untouched]
        file = SimpleNamespace(answers={"a": {"vision_tokens": 4, "average": 1.0}}, path="a.jsonl")
        return _time(_facts(file, [], 0, 10.0, measured))  # type: ignore[arg-type]

    assert told(1.5, 1.5).startswith(
        "10.0 s for 1 answers\n1.50× as fast in 2 batches, too few to tell that from noise"
    )
    gained = told(*[1.5, 1.6] * 4)
    assert "about [bold]5.5 s saved[/]\nanswers 1.55× as fast (95 %: 1.5" in gained and "paired by batch)" in gained
    assert "saved" not in told(*[0.8, 1.3] * 4) and "no difference beyond this run's noise" in told(*[0.8, 1.3] * 4)
    assert "which is slower" in told(*[0.8, 0.9] * 4) and "saved" not in told(*[0.8, 0.9] * 4)
    assert told(1.5).endswith("of 3 asked both ways, 2 got the same answer")


@pytest.mark.parametrize(
    ("rows", "question", "message"),
    [
        (['{"image": "0.png"}'], None, "LIST:1: error: no question, and no --question for all of them"),
        (['{"image": "0.png"}', "x"], "?", "LIST:2: error: not JSON: "),
        (["[]"], "?", "LIST:1: error: expected an object in braces, got []"),
        (['{"picture": "0.png"}'], "?", "LIST:1: error: no image; expected the path of a picture"),
        (['{"imag": "0.png"}'], "?", "LIST:1: error: no image (is it 'imag'?); expected the path of a picture"),
        (['{"image": "0.png", "qestion": "x"}'], None, "LIST:1: error: no question (is it 'qestion'?), and no "),
        (['{"image": "0.png", "question": "x"}'], "y", "--question is asked of no picture: each line has a question"),
        (['{"image": "0.png", "question": 3}'], "?", "LIST:1: error: question: expected text, got 3"),
        (['{"image": "0.png"}'] * 2, "?", "LIST:2: error: asks the same about 0.png as LIST:1"),
        (['{"image": "7.png"}'], "?", "LIST:1: error: no such file: "),
        (['{"image": "notes.txt"}'], "?", "LIST:1: error: DIR/notes.txt is not a picture that Pillow can read"),
        ([], "?", "--images: no pictures in LIST"),
    ],
)
def test_lists_are_checked_before_anything_runs(
    rows: list[str], question: str | None, message: str, album: Path
) -> None:
    file = album / "list.jsonl"
    file.write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(InputError) as error:
        read_lines([str(file)], question)
    assert str(error.value).startswith(message.replace("LIST", str(file)).replace("DIR", str(album)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images DIR --question x", "--images needs --output FILE.jsonl for the answers"),
        ("--images DIR --question x --output DIR/a.json", "--output: expected a name that ends in .jsonl, got a.json"),
        (
            "--images DIR --output DIR/a.jsonl",
            "error: --images needs --question TEXT: what to ask about each",
        ),
        ("--images DIR/none --question x --output DIR/a.jsonl", "--images: no such folder, file or pattern: DIR/none"),
        ("--images DIR/below --question x --output DIR/a.jsonl", "--images: no pictures in DIR/below"),
        ("--workers 2", "--workers goes with --images, which asks about many pictures"),
        ("--images DIR --image DIR/0.png --question x", "--image is for one prompt; leave it out with --images"),
    ],
)
def test_mistakes(arguments: str, message: str, album: Path, cli: Callable[..., Any]) -> None:
    ran = cli("run", *arguments.replace("DIR", str(album)).split())
    assert (ran.status, ran.out) == (2, "")
    assert message.replace("DIR", str(album)) in ran.err


def test_what_the_processor_refuses_is_told_in_its_line(
    album: Path, qwen_folder: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Qwen's processor takes no picture that is 200 times as wide as high; the others are answered."""
    Image.new("RGB", (900, 3)).save(album / "9.png")
    output = tmp_path / "a.jsonl"
    ran = cli(*asked(album, output, "--model", qwen_folder, "--device", "cpu"))
    assert ran.status == 2 and f"1 of 5 were refused; {output} says why" in ran.err
    told = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["answer" in line for line in told] == [True] * 4 + [False]
    assert "aspect ratio" in told[4]["error"]


def test_batches_are_the_same_everywhere() -> None:
    lines = [Line(Path("x"), str(n), "", (2 - n % 2, 1), "a b"[: 1 + 2 * (n % 3 > 0)]) for n in range(7)]
    assert in_batches(lines, 3) == [[3, 1, 5], [0, 6, 2], [4]]


def test_workers_take_gpus_in_turn() -> None:
    assert [device_of(None, number, 2) for number in range(3)] == [None, "cuda:1", "cuda:0"]
    assert [device_of("cuda", 1, 1), device_of("cpu", 1, 2), device_of("cuda:0", 1, 2)] == ["cuda", "cpu", "cuda:0"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_loses_nothing(workers: int, album: Path) -> None:
    lines = read_lines([str(album)], QUESTION)
    batches = [([line], False) for line in lines]
    alone = dict(Alone(WORK).answers(batches))
    with Processes(WORK, workers) as pool:
        found, killed = {}, False
        for number, done in pool.answers(batches):
            found[number] = done
            if not killed:  # all: at work for certain, but for the one that has just answered
                for worker in multiprocessing.active_children():
                    assert worker.pid is not None
                    os.kill(worker.pid, signal.SIGKILL)
                killed = True
        assert pool.run == Alone(WORK).run
    assert {number: done.told for number, done in found.items()} == {n: done.told for n, done in alone.items()}
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_workers_that_cannot_start_say_why() -> None:
    work = replace(WORK, loading=replace(LOADING, model="nowhere"))
    with pytest.raises(InputError, match="no such model folder: nowhere"), Processes(work, 1):
        pass


def test_processes_share_the_cores() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        share_processor(10**6)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
