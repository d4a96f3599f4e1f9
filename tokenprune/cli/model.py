"""`open_model`: the model that ``--model``, ``--dtype``, ``--device`` and ``--attention`` name, for all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenprune.families.chat import Chat
    from tokenprune.families.load import Kernel


def open_model(model: str, dtype: str | None, device: str | None, attention: Kernel) -> Chat:
    """The embedded model (float32 on the CPU unless told otherwise), or one from a folder or the hub."""
    from tokenprune.families.chat import Chat
    from tokenprune.families.load import device_named, dtype_named, load, quiet

    if model != "embedded":
        return load(model, dtype=dtype, device=device, attention=attention, also=("embedded",))
    import torch

    kind, where = dtype_named(dtype) or torch.float32, device_named(device or "cpu")
    quiet()
    from tokenprune.scenes import load_embedded

    network, processor = load_embedded()
    network.set_attn_implementation(attention)
    return Chat(model, network.to(where, kind), processor)
