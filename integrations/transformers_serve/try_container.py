"""Do the commands of the Containerfile serve? Without a container: its pip in a fresh virtual environment, its server.

python try_container.py          # needs a network for pip; exit code 1 if an answer is not that of `attach`

PIP_EXTRA_INDEX_URL may name the index of PyTorch's CPU builds. What it does not try: the base image, the user.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PORT, TOKENS, WAIT = 8131, 12, 900


def commands() -> tuple[str, list[str]]:
    """The line of the Containerfile that installs, and the command that serves."""
    text = (HERE / "Containerfile").read_text(encoding="utf-8")
    (install,) = re.findall(r"^RUN (pip .*)$", text, re.MULTILINE)
    (serve,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    return install, json.loads(serve)


def asked(model: str, picture: Path, question: str) -> str:
    """The server's answer."""
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": model, "max_tokens": TOKENS, "temperature": 0, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"]).strip()


def told(python: Path) -> list[dict[str, Any]]:
    """From the environment's own tokenprune: the shipped samples, the model's folder, and answers with the recipe."""
    code = (
        "import json, tokenprune as tp; from tokenprune.scenes import samples, embedded_path;"
        "from tokenprune.families.chat import Chat; from PIL import Image;"
        "chat = Chat('embedded', *tp.load('embedded')); tp.attach(chat.model, 'divprune', keep=0.25);"
        "ask = lambda s: chat.text(chat.generate(chat.inputs([Image.open(s.path).convert('RGB')], s.question), "
        f"{TOKENS})[0]);"
        "print(json.dumps([dict(model=str(embedded_path()), path=str(s.path), question=s.question, answer=ask(s)) "
        "for s in samples()]))"
    )
    done = subprocess.run([python, "-c", code], cwd="/", check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    install, serve = commands()
    with TemporaryDirectory() as made:
        subprocess.run([sys.executable, "-m", "venv", made], check=True)
        folder = Path(made, "bin")
        clean = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        clean.pop("PYTHONPATH", None)
        subprocess.run(install, shell=True, cwd=ROOT, env=clean, check=True, stdout=subprocess.DEVNULL)
        expected = told(folder / "python")
        serve = [word.replace("8000", str(PORT)) for word in serve]
        server = subprocess.Popen(serve, cwd=ROOT, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            _wait(server)
            same = [asked(each["model"], Path(each["path"]), each["question"]) == each["answer"] for each in expected]
        finally:
            server.terminate()
            server.wait()
    print(f"same answers {sum(same)}/{len(same)}: {expected[0]['question']} {expected[0]['answer']}")
    return 0 if all(same) else 1


def _wait(server: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    for _ in range(WAIT):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit status {server.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    sys.exit(main())
