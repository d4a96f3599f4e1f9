"""A recipe is data: reading hostile ones imports nothing, opens nothing outside their folder, and starts nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipe.bad_recipes import BAD, FIXED

WATCH = """
import os
import sys
from pathlib import Path
import tokenprune.recipe as recipes

folder = Path(sys.argv[1]).resolve()
allowed = (f"{folder}/", *(f"{recipes.recipe_path(name).parent}/" for name in ("none", "fastv")))
recipes.load_recipe("sparsevlm").build_stages()  # everything that parts import is imported now
recipes.json_schema()  # and what describes our own parts is made
seen = []
HARMLESS = {"os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "pathlib.Path.rglob", "builtins.id",
            "object.__getattr__", "object.__setattr__", "sys._getframe"}


def watch(event, args):
    if event == "open" and os.path.realpath(str(args[0])).startswith(allowed):  # "..", links
        return
    if event not in HARMLESS:
        seen.append((event, str(args)[:100]))


sys.addaudithook(watch)
before = set(sys.modules)
counts = [0, 0]
for path in sorted(folder.rglob("*.yaml")):
    for sets in [[], ["stages.0.scorer=!!python/name:os.system"], ["extends=/etc/passwd"], ["paper=${HOME}"]]:
        try:
            recipes.load_recipe(path, sets=sets).dump()
            counts[0] += 1
        except recipes.InvalidRecipeError as error:
            str(error)
            counts[1] += 1
seen_then, modules = list(seen), set(sys.modules) - before
assert not seen_then, seen_then[:9]
assert not modules, modules
assert counts[0] and counts[1] > 100, counts
open(sys.argv[2])  # the watch works
assert seen, "the hook sees nothing"
"""

ATTACKS = {
    "apply": "version: 1\nstages: !!python/object/apply:os.system [touch owned]\n",
    "new": "version: 1\nname: !!python/object/new:subprocess.Popen [[touch, owned]]\n",
    "module": "version: 1\nname: !!python/module:antigravity\n",
    "import": FIXED + "    scorer: {type: os.system}\n",
    "target": FIXED + "    scorer: {_target_: os.system, command: touch owned}\n",
    "path": FIXED + "    scorer: {type: tokenprune.parts.scorers.NormScorer}\n",
    "dunder": FIXED + "    scorer: {type: __class__}\n",
    "environment": "version: 1\nextends: ${HOME}/x.yaml\n",
    "home": "version: 1\nextends: ~/x.yaml\n",
    "network": "version: 1\nextends: https://example.com/x.yaml\n",
    "absolute": "version: 1\nextends: /etc/passwd.yaml\n",
    "upwards": "version: 1\nextends: ../outside.yaml\n",
    "link": "version: 1\nextends: link.yaml\n",
    "device": "version: 1\nextends: /dev/zero\n",
    "pipe": "version: 1\nextends: fifo.yml\n",
    "shipped": "version: 1\nextends: sparsevlm\n",
    "neighbour": "version: 1\nextends: fixed.yaml\n",
    "fixed": FIXED,
}


def test_hostile_recipes_touch_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    outside = tmp_path / "outside.yaml"
    outside.write_text(FIXED)
    for name, text in {**{name: text for name, (text, _) in BAD.items()}, **ATTACKS}.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    (folder / "link.yaml").unlink()
    (folder / "linked.yaml").write_text(ATTACKS["link"])
    (folder / "link.yaml").symlink_to(folder / "linked.yaml")
    (folder / "away.yml").symlink_to(outside)
    (folder / "leave.yaml").write_text("version: 1\nextends: away.yml\n")
    subprocess.run(["mkfifo", str(folder / "fifo.yml")], check=True)
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(folder), str(outside)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (Path.cwd() / "owned").exists()
