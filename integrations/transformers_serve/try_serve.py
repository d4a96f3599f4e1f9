"""Does `serve.py` answer HTTP clients as `tp.attach` does in one process? Several in flight, whole and streamed.

python try_serve.py          # the embedded model, `random` at 36 of 144 tokens; exit code 1 if an answer differs
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import uvicorn
from serve import app, folder_of

import tokenprune as tp
from tokenprune.families.chat import Chat

RECIPE, KEEP, TOKENS, TOGETHER, PORT = "random", 0.25, 12, 6, 8127


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
    cases = tp.scene_cases(3)
    chat = Chat("embedded", *tp.load("embedded"))
    untouched = [alone(chat, case) for case in cases]
    with tp.attach(chat.model, RECIPE, keep=KEEP):
        expected = [alone(chat, case) for case in cases]
    print(
        f"without the recipe {sum(a == b for a, b in zip(untouched, expected, strict=True))}/{len(cases)} are the same"
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app(RECIPE, KEEP, force_model=folder_of("embedded"), dtype="float32", device="cpu"),
            host="127.0.0.1",
            port=PORT,
            log_level="warning",
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.1)
        if not thread.is_alive():
            print("the server did not start")
            return 1
    good = True
    for stream in (False, True):
        with ThreadPoolExecutor(TOGETHER) as pool:
            got = list(pool.map(partial(asked, stream=stream), cases))
        same = sum(a == b for a, b in zip(got, expected, strict=True))
        good = good and same == len(cases)
        print(f"{'streamed' if stream else 'whole':9} {TOGETHER} in flight: same answers {same}/{len(cases)}", got[:3])
    server.should_exit = True
    thread.join(10)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
