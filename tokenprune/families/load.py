"""A vision-language model with its processor, by name: a folder or a hub id."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal

import torch

from tokenprune.errors import InputError, UnsupportedModelError, did_you_mean
from tokenprune.families import plugins
from tokenprune.families.catalogue import REFUSED, families
from tokenprune.families.chat import Chat
from tokenprune.families.explain import explained, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Kernel = Literal["sdpa", "eager"]
EMBEDDED = "embedded"
"""The name of the model that comes with the package."""
EMBEDDED_FOLDER = Path(__file__).parents[1] / "scenes" / "assets" / "embedded"
"""Known here by its files alone: `tokenprune.scenes`, which trained it, builds on this package."""


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    attention: Kernel = "sdpa",
    also: Sequence[str] = (),
) -> Chat:
    """A model and its processor from a local folder or the Hugging Face hub.

    Args:
        name: a folder, or a hub id (``owner/name``).
        dtype: ``float32``, ``bfloat16`` or ``float16``; float32 on a CPU and the checkpoint's own dtype elsewhere when
            not given.
        device: as in `torch.device`; a GPU if there is one when not given.
        attention: transformers' attention implementation.
        also: other names that the caller takes, to suggest the nearest.

    Raises:
        InputError: no such model, folder, dtype or device, or a folder that holds no model.
        UnsupportedModelError: a model of no supported family, told before its weights are read.
    """
    given = dtype_named(dtype)
    where = device_named(device)
    quiet()
    source = _source(name, also)
    config = _config(source)
    processor = _processor(source, config)
    model = _model(source, config, given or (torch.float32 if where.type == "cpu" else "auto"), attention)
    return Chat(name, model.to(where).eval(), processor)


def read_config(name: str, *, also: Sequence[str] = ()) -> Any:
    """The configuration of a model, without weights or processor; arguments and errors as in `load`.

    Args:
        name: a folder, or a hub id.
        also: other names that the caller takes, to suggest the nearest; `EMBEDDED` among them stands for its folder.
    """
    quiet()
    return _config(_source(name, also))


def processor_of(name: str) -> Any:
    """The processor of a model, without its weights; arguments and errors as in `load`."""
    quiet()
    source = _source(name)
    return _processor(source, _config(source))


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None stays None.

    Raises:
        InputError: a name that is not in `DTYPES`.
    """
    if name is not None and name not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}{did_you_mean(name, DTYPES)}")
    return None if name is None else DTYPES[name]


def device_named(name: str | None) -> torch.device:
    """The device of that name; a GPU if there is one, else the CPU, when not given.

    Raises:
        InputError: no such device, or not on this machine.
    """
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return gpu or torch.device("cpu")
    try:
        where = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected cpu, cuda, cuda:0 or mps, got {name!r}") from None
    if where.type == "cpu":
        return where
    if gpu is None or gpu.type != where.type or (where.index or 0) >= torch.accelerator.device_count():
        here = "only the CPU" if gpu is None else f"{torch.accelerator.device_count()} × {gpu.type}"
        raise InputError(f"device {name!r} is not available: PyTorch sees {here} here")
    return where


def quiet() -> None:
    """No advice and no bars from transformers: a command line says its own things."""
    from transformers.utils import logging

    getLogger("huggingface_hub").setLevel(ERROR)  # a hub out of reach is told once, in our words
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _source(name: str, also: Sequence[str] = ()) -> str:
    """What `from_pretrained` takes: a checked folder, or a hub id."""
    if name == EMBEDDED and name in also:
        return str(EMBEDDED_FOLDER)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"no model in folder {name}: it has no config.json")
        return str(path)
    if path.exists():
        raise InputError(f"model {name} is a file; expected a folder with config.json, weights and processor")
    if name.startswith((".", "/", "~")) or name.endswith(("/", os.sep)) or name.count("/") != 1 or "\\" in name:
        known = ", ".join([*map(repr, also), "a folder, or a hub id (owner/name)"])
        told = f"no such model folder: {name}{did_you_mean(name, also)}; expected {known}"
        raise InputError(told if also else f"{told}; tokenprune.scenes.load_embedded() gives the embedded model")
    return name


def _config(source: str) -> Any:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    if os.path.isdir(source):
        # transformers' own messages about these two send people to the hub.
        file = Path(source) / "config.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InputError(f"{file} is not readable JSON: {error}") from None
        if not isinstance(content, dict) or "model_type" not in content:
            raise InputError(f"{file} names no model_type, so it is no transformers model")
        if content["model_type"] in plugins.declared():
            plugins.load(content["model_type"])  # its package tells transformers of its classes when it is imported
    else:
        _ask_hub(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise explained(source, error) from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModelError(f"{source} is a {config.model_type} model, which takes no images")
    if config.model_type not in families():
        if config.model_type in REFUSED:
            raise UnsupportedModelError(f"{source} is a {config.model_type} model: {REFUSED[config.model_type]}")
        known = ", ".join(families())
        raise UnsupportedModelError(f"{source} is a {config.model_type} model, not supported yet; supported: {known}")
    return config


def _ask_hub(source: str) -> None:
    """One question to the hub where nothing is cached: transformers would try six times, for half a minute.

    Raises:
        InputError: the hub is out of reach.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except Exception as error:  # of httpx, of the hub, of sockets; only what is out of reach is told here
        told = explained(source, error)
        if "out of reach" in str(told):
            raise told from None


def _processor(source: str, config: Any) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        processor = _images_only(source, config)
        if processor is None:
            if "torchvision" in str(error).lower():
                raise InputError(f"the processor of {source} needs torchvision, which is not installed") from None
            raise InputError(f"no usable processor in {source}: {first_line(error)}") from None
    if not hasattr(processor, "image_processor"):
        raise InputError(f"no image processor in {source}: found only a {type(processor).__name__}")
    return processor


def _images_only(source: str, config: Any) -> Any:
    """The model's processor class without its video processor, which needs torchvision; None where that fails too."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        base = PROCESSOR_MAPPING[type(config)]
        parts = [name for name in base.get_attributes() if name != "video_processor"]
        # A subclass under the same name: transformers looks up defaults by it.
        light: Any = type(base.__name__, (base,), {"get_attributes": classmethod(lambda cls: parts)})
        return light.from_pretrained(source, trust_remote_code=False)
    except Exception:  # whatever goes wrong, the first error is the one to tell
        return None


def _model(source: str, config: Any, dtype: Any, attention: Kernel) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise explained(source, error) from None
