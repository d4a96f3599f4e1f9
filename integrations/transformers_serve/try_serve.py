"""Does `serve.py` answer HTTP clients as `tp.attach` does in one process? Several in flight, whole and streamed.

python try_serve.py          # exit code 1 if an answer differs

The server is started by the command of docs/serving.md, with the embedded model and another port in it.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from serve import folder_of

import tokenprune as tp
from tokenprune.families.chat import Chat

ROOT = Path(__file__).parents[2]
TOKENS, TOGETHER, PORT, WAIT = 12, 6, 8127, 300


def command() -> tuple[list[str], str, float]:
    """What the page starts the server with, and the recipe and share in it."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    ((script, recipe, keep),) = re.findall(r"^python (\S+/serve\.py) MODEL (\S+) (\S+) 8000$", page, re.MULTILINE)
    return [sys.executable, script, "embedded", recipe, keep, str(PORT)], recipe, float(keep)


def starts(server: subprocess.Popen[bytes]) -> bool:
    """Wait until it answers; False where it ends before, or takes too long."""
    end = time.monotonic() + WAIT
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.2)
    return False


def asked(case: Any, *, stream: bool) -> str:
    """The answer of the server over HTTP."""
    png = io.BytesIO()
    case.picture().save(png, format="png")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": case.question}]
    body = {
        "model": folder_of("embedded"),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": stream,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text = answer.read().decode()
    if not stream:
        return str(json.loads(text)["choices"][0]["message"]["content"]).strip()
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in events if each["choices"]).strip()


def alone(chat: Chat, case: Any) -> str:
    """The answer in this process."""
    return chat.text(chat.generate(chat.inputs([case.picture()], case.question), TOKENS)[0])


def main() -> int:
    line, recipe, keep = command()
    cases = tp.scene_cases(3)
    chat = Chat("embedded", *tp.load("embedded"))
    untouched = [alone(chat, case) for case in cases]
    with tp.attach(chat.model, recipe, keep=keep):
        expected = [alone(chat, case) for case in cases]
    print(
        f"without the recipe {sum(a == b for a, b in zip(untouched, expected, strict=True))}/{len(cases)} are the same"
    )
    server = subprocess.Popen(line, cwd=ROOT)
    try:
        if not starts(server):
            print("the server did not start")
            return 1
        return 0 if compared(cases, expected) else 1
    finally:
        server.terminate()
        server.wait()


def compared(cases: list[Any], expected: list[str]) -> bool:
    """Whether all answers of the server are the expected ones, whole and streamed."""
    good = True
    for stream in (False, True):
        with ThreadPoolExecutor(TOGETHER) as pool:
            got = list(pool.map(partial(asked, stream=stream), cases))
        same = sum(a == b for a, b in zip(got, expected, strict=True))
        good = good and same == len(cases)
        print(f"{'streamed' if stream else 'whole':9} {TOGETHER} in flight: same answers {same}/{len(cases)}", got[:3])
    return good


if __name__ == "__main__":
    sys.exit(main())
