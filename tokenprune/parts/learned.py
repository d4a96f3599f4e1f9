"""`Learned`: what parts with weights of their own share, and how those are written and read."""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tokenprune.core.tokens import Tokens
from tokenprune.errors import InputError, RecipeError
from tokenprune.parts.part import Part

Weights = Annotated[
    str,
    "FILE.safetensors#DIGEST, twelve digits of its SHA-256",
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.safetensors#[0-9a-f]{12}$", max_length=120),
]
"""A file of weights as recipes name it, with the digest that it must have: ``trimmer.safetensors#3f9c01ab77de``. It
lies beside the recipe, or comes with the package."""


HEAD = "tokenprune"
"""The entry in a file's head that says, as JSON, what the weights are of."""


@dataclass(frozen=True)
class Host:
    """The model that weights are made for: they fit no other width, and mean nothing in another family."""

    family: str
    """``model_type`` of its configuration; empty for a model of one's own."""
    width: int
    """Numbers per hidden state where the part acts."""
    heads: int = 0
    """Attention heads of a decoder layer, for parts that weigh them one by one; 0 where there are none."""
    depth: int = field(default=0, compare=False)
    """Decoder layers, for parts that have something for each, which compare it; 0 where it is not told."""

    def __str__(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ""
        return f"{self.family or 'a model of one’s own'}, width {self.width}{heads}"


class Learned(Part):
    """Base of parts with weights of their own, beside the base class of the role: ``class Mine(Learned, Scorer)``.

    The constructor takes hyper-parameters and the name of the weights, and makes no parameters: it touches no file, and
    widths are the model's. Where a recipe is built to run, `read` makes the parameters and fills them; `tokenprune fit`
    makes them with `make` and trains them. Until then the part raises, unless it is `plain`: untrained weights are
    noise, not a method.

    A subclass keeps ``weights: Weights | None = None`` among its settings, makes its parameters in `make`, and calls
    `ready` first in `forward`.
    """

    plain: ClassVar[bool] = False
    """Whether it is something known without weights, and so needs none; then `forward` knows what to do without."""
    weights: str | None = None
    host: Host | None = None
    """The model that its parameters were made for; None as long as it has none."""

    @abstractmethod
    def make(self, host: Host) -> None:
        """Make the parameters, with what training starts from."""

    def start(self, host: Host, *, seed: int) -> Self:
        """Make the parameters for `host`, frozen, the same for the same seed; PyTorch's generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.make(host)
        self.host = host
        return self.requires_grad_(False)

    def __repr__(self) -> str:
        # Settings alone, as for every part: what the modules inside are follows from them.
        return f"{type(self).__name__}({self.extra_repr()})"

    def ready(self, tokens: Tokens) -> None:
        """Raise unless there are parameters, and for tokens of this width.

        Raises:
            RecipeError: no parameters; the command that makes them is told.
            InputError: they were made for another width.
        """
        if self.host is None:
            if self.plain:
                return
            raise RecipeError(self.missing())
        if tokens.hidden.shape[-1] != self.host.width:
            raise InputError(
                f"{self.title}: its weights are for hidden states of {self.host.width} numbers"
                f"{f' ({self.host.family})' if self.host.family else ''}, got {tokens.hidden.shape[-1]}; "
                "fit the recipe to this model: tokenprune fit RECIPE --model MODEL --data DIR"
            )

    def missing(self) -> str:
        """What to tell a user whose recipe has no weights for this part."""
        return (
            f"{self.title} has no weights: make them with `tokenprune fit RECIPE --model MODEL --data DIR`, "
            "which writes a recipe that names them"
        )

    def check_host(self, host: Host) -> None:
        """Raise unless the weights were made for this model: told when a recipe is attached, before anything runs.

        Raises:
            RecipeError: no weights.
            InputError: weights of another family or width.
        """
        if self.host is None:
            if self.plain:
                return
            raise RecipeError(self.missing())
        if self.host != host:
            raise InputError(
                f"{self.title}: its weights were made for {self.host}, and this model is {host}; "
                "fit the recipe to it: tokenprune fit RECIPE --model MODEL --data DIR"
            )

    def to_bytes(self, **about: str) -> bytes:
        """The weights as a safetensors file, which says what they are of.

        Args:
            about: whatever else is worth knowing, such as the command that made them.
        """
        assert self.host is not None, "nothing to write"
        told = {"part": self.title, "settings": self._hyper(), **asdict(self.host), **about}
        # One entry, as safetensors writes several in any order: the same weights must be the same bytes.
        head = {HEAD: json.dumps(told, sort_keys=True)}
        return save({name: value.contiguous() for name, value in self.state_dict().items()}, metadata=head)

    def read(self, path: Path) -> Self:
        """Make the parameters that a file of `to_bytes` holds.

        Raises:
            RecipeError: no such file, not one of ours, of another part, or of other settings.
        """
        try:
            with safe_open(path, framework="pt") as file:
                told = json.loads((file.metadata() or {}).get(HEAD, "{}"))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (OSError, ValueError, SafetensorError) as error:
            raise RecipeError(f"{self.title}: {path} is no readable safetensors file: {error}") from None
        self._check_origin(told, path)
        self.start(Host(told["family"], told["width"], told["heads"], told.get("depth", 0)), seed=0)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise RecipeError(f"{self.title}: {path} does not hold its parameters: {error}") from None
        return self

    def _check_origin(self, told: Any, path: Path) -> None:
        """Refuse a file of something else, by what its head says."""
        if not _is_head(told):
            raise RecipeError(f"{self.title}: {path} was not written by tokenprune fit: it does not say what it is of")
        if told["part"] != self.title:
            raise RecipeError(f"{self.title}: {path} holds the weights of {told['part']}")
        made, wanted = told["settings"], json.loads(json.dumps(self._hyper()))
        differ = [f"{key}={made.get(key)!r}, not {wanted.get(key)!r}" for key in {**made, **wanted}
                  if made.get(key) != wanted.get(key)]  # fmt: skip
        if differ:
            raise RecipeError(f"{self.title}: {path} was made with {'; '.join(differ)}")

    def _hyper(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings().items() if key != "weights"}


def _is_head(told: Any) -> bool:
    """Whether that is what `to_bytes` writes, whatever its values."""
    kinds = {"part": str, "settings": dict, "family": str, "width": int, "heads": int}
    if not isinstance(told, dict) or any(not isinstance(told.get(key), kind) for key, kind in kinds.items()):
        return False
    depth = told.get("depth", 0)  # older files do not tell it
    return bool(told["width"] > 0 and told["heads"] >= 0 and isinstance(depth, int) and depth >= 0)
