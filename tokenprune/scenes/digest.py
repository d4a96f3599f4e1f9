"""Digest of a file: ties a published number to the weights that gave it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(path: Path) -> str:
    """First 16 hex digits of the file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
