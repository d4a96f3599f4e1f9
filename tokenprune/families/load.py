"""A vision-language model with its processor, by name, and the way from pictures and a question to an answer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokenprune.errors import InputError, UnsupportedModelError, did_you_mean
from tokenprune.families.catalogue import adapters

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True, eq=False)
class Chat:
    """A model and the processor that speaks to it."""

    name: str
    """As the user gave it: ``embedded``, a folder or a hub id."""
    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def prompt(self, question: str, images: int) -> str:
        """The text that asks `question` about so many `images`, by the model's chat template or else LLaVA-1.5's.

        Raises:
            InputError: the question contains the placeholder that stands for an image.
        """
        marker = getattr(self.processor, "image_token", None)
        if marker and marker in question:
            raise InputError(f"the question contains {marker!r}, which this model takes for an image; reword it")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
            talk = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
            return str(text)
        return "USER: " + f"{marker or '<image>'}\n" * images + f"{question} ASSISTANT:"

    def inputs(self, images: Sequence[Image], question: str) -> dict[str, Any]:
        """Model inputs for a batch of one, on the model's device and in its dtype."""
        text = self.prompt(question, len(images))
        start = getattr(self.tokenizer, "bos_token", None)
        extra = {"add_special_tokens": False} if start and text.startswith(start) else {}  # never two of them
        made = self.processor(images=list(images), text=[text], return_tensors="pt", **extra)
        device, dtype = self.model.device, self.model.dtype
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in made.items()
            if isinstance(value, torch.Tensor)
        }

    def generate(self, inputs: dict[str, Any], max_new_tokens: int, streamer: Any = None) -> torch.Tensor:
        """Token ids of the greedy answer, without the prompt. A `streamer` hears of every token, as in transformers."""
        settings = self.model.generation_config
        pad = settings.pad_token_id
        if pad is None:
            end = settings.eos_token_id
            pad = end[0] if isinstance(end, list) else end
        with torch.inference_mode():
            ids: torch.Tensor = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                streamer=streamer,
            )
        return ids[0, inputs["input_ids"].shape[1] :]

    def text(self, ids: torch.Tensor) -> str:
        """The answer that generated `ids` spell."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def unknown_words(self, question: str) -> list[str]:
        """Words of the question that a word-level vocabulary does not hold; none for ordinary tokenizers."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None:
            return []
        words = dict.fromkeys(re.findall(r"[\w'-]+", question))
        return [word for word in words if unknown in self.tokenizer(word, add_special_tokens=False)["input_ids"]]

    def seen(self, image: Image) -> Image:
        """The part of `image` that the vision tower sees: all of it, unless the processor crops or pads it square."""
        from PIL import ImageOps

        steps: Any = getattr(self.processor, "image_processor", None)
        tiled = hasattr(steps, "image_grid_pinpoints")  # LLaVA-NeXT crops tiles out of the whole picture
        if tiled or not (getattr(steps, "do_center_crop", False) or getattr(steps, "do_pad", False)):
            return image
        if getattr(steps, "do_pad", False):
            side = max(image.size)
            return ImageOps.pad(image, (side, side), color=tuple(int(255 * mean) for mean in steps.image_mean))
        size, crop = dict(steps.size), dict(steps.crop_size)
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(image.size)
            wide, high = image.width * scale, image.height * scale
        else:
            wide, high = float(size["width"]), float(size["height"])
        left = max(0.0, (1 - crop["width"] / wide) / 2) * image.width
        top = max(0.0, (1 - crop["height"] / high) / 2) * image.height
        return image.crop((round(left), round(top), round(image.width - left), round(image.height - top)))


def load(name: str, *, dtype: str | None = None, device: str | None = None, attention: Attention = "sdpa") -> Chat:
    """A model and its processor from a local folder or the Hugging Face hub.

    Args:
        name: a folder, or a hub id (``owner/name``).
        dtype: ``float32``, ``bfloat16`` or ``float16``; float32 on a CPU and the checkpoint's own dtype elsewhere when
            not given.
        device: as in `torch.device`; a GPU if there is one when not given.
        attention: transformers' attention implementation.

    Raises:
        InputError: no such model, folder, dtype or device, or a folder that holds no model.
        UnsupportedModelError: a model of no supported family, told before its weights are read.
    """
    given = dtype_named(dtype)
    where = device_named(device)
    quiet()
    source = _source(name)
    config = _config(source)
    processor = _processor(source, config)
    model = _model(source, config, given or (torch.float32 if where.type == "cpu" else "auto"), attention)
    return Chat(name, model.to(where).eval(), processor)


def read_config(name: str, *, also: Sequence[str] = ()) -> Any:
    """The configuration of a model, without weights or processor; arguments and errors as in `load`.

    Args:
        name: a folder, or a hub id.
        also: other names that the caller would have taken, to suggest the nearest.
    """
    quiet()
    return _config(_source(name, also))


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

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _source(name: str, also: Sequence[str] = ()) -> str:
    """What `from_pretrained` takes: a checked folder, or a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"no model in folder {name}: it has no config.json")
        return str(path)
    if path.exists():
        raise InputError(f"model {name} is a file; expected a folder with config.json, weights and processor")
    if name.startswith((".", "/", "~")) or name.endswith(("/", os.sep)) or name.count("/") != 1 or "\\" in name:
        near = did_you_mean(name, ["embedded", *also])
        known = ", ".join(repr(known) for known in ("embedded", *also))
        raise InputError(f"no such model folder: {name}{near}; expected {known}, a folder, or a hub id (owner/name)")
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
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _explained(source, error) from None
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModelError(f"{source} is a {config.model_type} model, which takes no images")
    if config.model_type not in adapters():
        known = ", ".join(adapters())
        raise UnsupportedModelError(f"{source} is a {config.model_type} model, not supported yet; supported: {known}")
    return config


def _processor(source: str, config: Any) -> Any:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        processor = _images_only(source, config)
        if processor is None:
            if "torchvision" in str(error).lower():
                raise InputError(f"the processor of {source} needs torchvision, which is not installed") from None
            raise InputError(f"no usable processor in {source}: {_first_line(error)}") from None
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


def _model(source: str, config: Any, dtype: Any, attention: Attention) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _explained(source, error) from None


def _explained(source: str, error: BaseException) -> InputError | UnsupportedModelError:
    """transformers' error in one line that says what to do."""
    text = str(error)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UnsupportedModelError(f"this transformers version does not know the architecture of {source}")
    if "trust_remote_code" in text:
        return UnsupportedModelError(f"{source} runs code of its own (trust_remote_code), which is not supported")
    if os.path.isdir(source):
        return InputError(f"cannot load {source}: {_first_line(error)}")
    chain = " ".join(f"{type(link).__name__} {link}" for link in _links(error))
    if "Gated" in chain:
        return InputError(f"model {source} is gated: accept its licence on huggingface.co, then `hf auth login`")
    if "RepositoryNotFound" in chain or "not a valid model identifier" in chain:
        return InputError(f"no such model: {source} is no folder here and no public model on the hub")
    if any(word in chain for word in ("Offline", "offline", "LocalEntryNotFound", "Connect", "connect to")):
        return InputError(f"no such model folder: {source}; as a hub id it is not cached and the hub is out of reach")
    return InputError(f"cannot load {source}: {_first_line(error)}")


def _links(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
