"""Questions about scenes, with answers that hold by construction.

Every task has several wordings: the words of a question that do not name the target are what a rater selector
should learn to reject.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokenprune.scenes.world.boxes import BINS, box_answer, same_box
from tokenprune.scenes.world.generate import COLOURS, SHAPES, SIZES, Scene, SceneObject
from tokenprune.scenes.world.grounds import GROUNDS
from tokenprune.scenes.world.plates import LETTERS

TASKS = ("localisation", "relation", "box", "colour", "shape", "size", "existence", "counting", "code", "ground")
MAX_COUNT = 5
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> direction from the anchor to the target; y points down."""
_CLEARLY = 5.0
"""Least distance in scene units of a target from its anchor, on the side asked for; rivals lie as far on the other."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "localisation": (
        "where is the {thing} ?",
        "in which cell is the {thing} ?",
        "please tell me where the {thing} is .",
        "can you find the {thing} in this picture ?",
        "give the row and the column of the {thing} .",
    ),
    "relation": (
        "where is the {thing} {side} the {anchor} ?",
        "in which cell is the {thing} {side} the {anchor} ?",
        "can you find the {thing} that is {side} the {anchor} ?",
    ),
    "box": (
        "what is the box of the {thing} ?",
        "give the box around the {thing} .",
        "please draw a box around the {thing} in this picture .",
    ),
    "colour": (
        "what colour is the {thing} ?",
        "what color is the {thing} ?",
        "please name the colour of the {thing} .",
        "which colour does the {thing} in the picture have ?",
    ),
    "shape": (
        "what shape is the {thing} ?",
        "what is the shape of the {thing} ?",
        "please name the shape of the {thing} .",
        "which shape does the {thing} in the image have ?",
    ),
    "size": (
        "what size is the {thing} ?",
        "how big is the {thing} ?",
        "tell me the size of the {thing} in the picture .",
    ),
    "existence": (
        "is there {a_thing} ?",
        "do you see {a_thing} in the picture ?",
        "does the image show {a_thing} ?",
        "can you find {a_thing} here ?",
    ),
    "counting": (
        "how many {things} are there ?",
        "how many {things} do you see in this image ?",
        "please count the {things} .",
        "what is the number of {things} in the picture ?",
    ),
    "code": (
        "what is the code on the plate ?",
        "please read the code .",
        "which letters are on the plate in the image ?",
        "what does the plate say ?",
    ),
    "ground": (
        "what is the ground made of ?",
        "what is behind the objects ?",
        "which ground does the picture show ?",
        "please name the background of this image .",
    ),
}

PLURALS = {shape: ("crosses" if shape == "cross" else f"{shape}s") for shape in SHAPES} | {"thing": "things"}


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    `box` is the target's (left, top, right, bottom) in scene units, None where no single object is asked for.
    `difficulty` names the attributes that a reader needs to single out the target: `colour`, `shape`,
    `size+shape`, `colour+shape`; for other tasks what has to be matched.
    """

    task: str
    question: str
    answer: str
    box: tuple[float, float, float, float] | None
    difficulty: str

    def is_right(self, given: str) -> bool:
        """Whether `given` is right: see the function `is_right`."""
        return is_right(self.task, given, self.answer)


def is_right(task: str, given: str, answer: str) -> bool:
    """Whether `given` counts as `answer`: the same words, and for `box` an IoU of at least one half."""
    if task == "box":
        return same_box(given, answer)
    return given.lower().split() == answer.lower().split()


def _phrase(attributes: dict[str, str]) -> str:
    words = [attributes[name] for name in ("size", "colour") if name in attributes]
    return " ".join([*words, attributes.get("shape", "thing")])


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _matching(scene: Scene, attributes: dict[str, str]) -> list[SceneObject]:
    return [o for o in scene.objects if all(getattr(o, name) == value for name, value in attributes.items())]


_SUBSETS: tuple[tuple[str, ...], ...] = (
    ("colour",),
    ("shape",),
    ("size",),
    ("colour", "shape"),
    ("size", "colour"),
    ("size", "shape"),
)


def _identifying(scene: Scene, target: SceneObject, names: Iterable[str]) -> str | None:
    """The smallest subset of `names` that singles out `target` (colour before shape), or None."""
    allowed = set(names)
    for subset in _SUBSETS:
        if allowed.issuperset(subset) and len(_matching(scene, {n: getattr(target, n) for n in subset})) == 1:
            return "+".join(subset)
    return None


def _wording(rng: np.random.Generator, task: str, **slots: str) -> str:
    templates = TEMPLATES[task]
    text = templates[rng.integers(len(templates))].format(**slots)
    return text[:-2] if rng.random() < 0.15 else text


def _about_target(rng: np.random.Generator, scene: Scene, task: str) -> Question | None:
    """A question about one object, named by attributes that do not give the answer away."""
    choices: tuple[tuple[str, ...], ...] = {
        "localisation": (("colour", "shape"), ("colour", "shape"), ("colour",), ("shape",)),
        "box": (("colour", "shape"), ("colour", "shape"), ("colour",), ("shape",)),
        "colour": (("shape",), ("size", "shape")),
        "shape": (("colour",), ("size", "colour")),
        "size": (("colour", "shape"),),
    }[task]
    for _ in range(12):
        target = scene.objects[rng.integers(len(scene.objects))]
        names = choices[rng.integers(len(choices))]
        difficulty = _identifying(scene, target, names)
        if difficulty is None:
            continue
        answer = _answer(task, target)
        thing = _phrase({name: getattr(target, name) for name in names})
        return Question(task, _wording(rng, task, thing=thing), answer, target.box, difficulty)
    return None


def _answer(task: str, target: SceneObject) -> str:
    if task == "localisation":
        return f"row {target.row} column {target.column}"
    return box_answer(target.box) if task == "box" else str(getattr(target, task))


def _relation(rng: np.random.Generator, scene: Scene) -> Question | None:
    """A question where the thing on one side of an anchor is; without the anchor its words would fit several things."""
    for _ in range(40):
        anchor = scene.objects[rng.integers(len(scene.objects))]
        target = scene.objects[rng.integers(len(scene.objects))]
        name = ("colour", "shape")[rng.integers(2)]
        side = tuple(SIDES)[rng.integers(len(SIDES))]
        across, down = SIDES[side]
        alike = [o for o in scene.objects if getattr(o, name) == getattr(target, name) and o is not anchor]
        ahead = [(o.x - anchor.x) * across + (o.y - anchor.y) * down for o in alike]
        rivals = [gap for gap, o in zip(ahead, alike, strict=True) if o is not target]
        if target is anchor or not rivals or max(rivals) > -_CLEARLY or ahead[alike.index(target)] < _CLEARLY:
            continue
        thing, named = _phrase({name: getattr(target, name)}), f"{anchor.colour} {anchor.shape}"
        text = _wording(rng, "relation", thing=thing, side=side, anchor=named)
        return Question("relation", text, _answer("localisation", target), target.box, f"{name}+{side.split()[0]}")
    return None


def _code(rng: np.random.Generator, scene: Scene) -> Question | None:
    if scene.plate is None:
        return None
    return Question("code", _wording(rng, "code"), " ".join(scene.plate.code), scene.plate.box, "letters")


def _existence(rng: np.random.Generator, scene: Scene) -> Question:
    """A question whether something is there, yes as often as no; most absent things recombine present ones."""
    pairs = {(o.colour, o.shape) for o in scene.objects}
    if rng.random() < 0.5:
        target = scene.objects[rng.integers(len(scene.objects))]
        box, answer, pair = target.box, "yes", (target.colour, target.shape)
    else:
        seen_colours, seen_shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
        both = [(c, s) for c in seen_colours for s in seen_shapes if (c, s) not in pairs]
        everything = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
        pool = both if both and rng.random() < 0.6 else everything
        box, answer, pair = None, "no", pool[rng.integers(len(pool))]
    thing = _article(f"{pair[0]} {pair[1]}")
    return Question("existence", _wording(rng, "existence", a_thing=thing), answer, box, "colour+shape")


def _counting(rng: np.random.Generator, scene: Scene) -> Question:
    """A question how many there are; the count is drawn first, then something with that count, to balance answers."""
    by_count: dict[int, list[dict[str, str]]] = {}
    for name, values in (("colour", COLOURS), ("shape", SHAPES)):
        for value in values:
            attributes = {name: value}
            by_count.setdefault(len(_matching(scene, attributes)), []).append(attributes)
    possible = [n for n in by_count if n <= MAX_COUNT]
    weights = np.array([(0.45, 0.5, 1.0, 2.0, 3.0, 5.0)[n] for n in possible])
    count = int(rng.choice(possible, p=weights / weights.sum()))
    attributes = by_count[count][rng.integers(len(by_count[count]))]
    colour = f"{attributes['colour']} " if "colour" in attributes else ""
    things = colour + PLURALS[attributes.get("shape", "thing")]
    return Question("counting", _wording(rng, "counting", things=things), str(count), None, next(iter(attributes)))


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question | None:
    """One question of `task` about `scene`, or None where nothing in the scene can be singled out, or no code read."""
    if task == "existence":
        return _existence(rng, scene)
    if task == "relation":
        return _relation(rng, scene)
    if task == "code":
        return _code(rng, scene)
    if task == "counting":
        return _counting(rng, scene)
    if task == "ground":
        return Question("ground", _wording(rng, "ground"), scene.ground, None, "none")
    return _about_target(rng, scene, task)


def questions(scene: Scene, tasks: Iterable[str] = TASKS, stream: int = 0) -> list[Question]:
    """Questions about `scene`, one for each entry of `tasks` that can be asked; reproducible for a `stream`."""
    rng = np.random.default_rng((scene.seed, scene.index, 2, stream))
    asked = (ask(scene, task, rng) for task in tasks)
    return [question for question in asked if question is not None]


def words() -> list[str]:
    """Every word that a question or an answer can contain, sorted."""
    found = {"row", "column", "yes", "no", "a", "an", "thing", "things", "object", "objects", "top", "bottom"}
    found |= set(LETTERS) | {str(n) for n in range(BINS)} | {word for side in SIDES for word in side.split()}
    found |= set(COLOURS) | set(SHAPES) | set(SIZES) | set(GROUNDS) | set(PLURALS.values())
    found |= {str(n) for n in range(MAX_COUNT + 1)}
    for templates in TEMPLATES.values():
        for template in templates:
            found |= {word for word in template.split() if "{" not in word}
    return sorted(found)
