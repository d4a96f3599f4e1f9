"""Errors of transformers and the hub, in one line that says what to do."""

from __future__ import annotations

import os

from tokenprune.errors import InputError, UnsupportedModelError


def explained(source: str, error: BaseException) -> InputError | UnsupportedModelError:
    """transformers' error in one line that says what to do."""
    text = str(error)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UnsupportedModelError(f"this transformers version does not know the architecture of {source}")
    if "trust_remote_code" in text:
        return UnsupportedModelError(f"{source} runs code of its own (trust_remote_code), which is not supported")
    if os.path.isdir(source):
        return InputError(f"cannot load {source}: {first_line(error)}")
    chain = " ".join(f"{type(link).__name__} {link}" for link in _links(error))
    if "Gated" in chain:
        return InputError(f"model {source} is gated: accept its licence on huggingface.co, then `hf auth login`")
    if "RepositoryNotFound" in chain or "not a valid model identifier" in chain:
        return InputError(f"no such model: {source} is no folder here and no public model on the hub")
    if any(word in chain for word in ("Offline", "offline", "LocalEntryNotFound", "Connect", "connect to")):
        return InputError(f"no such model folder: {source}; as a hub id it is not cached and the hub is out of reach")
    return InputError(f"cannot load {source}: {first_line(error)}")


def _links(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
