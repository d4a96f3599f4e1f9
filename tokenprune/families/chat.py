"""A model and the processor that speaks to it: the way from pictures and questions to answers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.clip import EXTRA, Clip
from tokenprune.errors import InputError
from tokenprune.families.adapter import Adapter
from tokenprune.families.catalogue import adapter_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.core.pictures import Picture


@dataclass(frozen=True, eq=False)
class Chat:
    """A model and the processor that speaks to it."""

    name: str
    """As the user gave it: ``embedded``, a folder or a hub id."""
    model: Any
    processor: Any

    def __iter__(self) -> Iterator[Any]:
        """``model, processor = chat``."""
        return iter((self.model, self.processor))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def adapter(self) -> Adapter:
        """What is known of the model's family."""
        return adapter_of(self.model, asker="chat")

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """The prompt that asks `question` about `images` pictures: by chat template, or as the family does without one.

        Videos stand before pictures.

        Raises:
            InputError: the question contains the placeholder of an image, or another token that is no text.
        """
        marker = getattr(self.processor, "image_token", None)
        if marker and marker in question:
            raise InputError(f"the question contains {marker!r}, which this model takes for an image; reword it")
        for token in getattr(self.tokenizer, "all_special_tokens", ()):
            if token in question:
                raise InputError(f"the question contains {token!r}, which this model takes for no text; reword it")
        if getattr(self.processor, "chat_template", None):
            shown = [{"type": "video"}] * videos + [{"type": "image"}] * images
            content = [*shown, {"type": "text", "text": question}]
            talk = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False))
        if not videos:
            return self.adapter.bare_prompt(question, images, marker or "<image>")
        if images:
            raise InputError(f"without a chat template {self.adapter.title} takes a video or pictures, not both")
        return self.adapter.bare_prompt(question, videos, getattr(self.processor, "video_token", None) or "<video>")

    def process(
        self,
        images: Sequence[Sequence[Picture]],
        texts: Sequence[str],
        *,
        videos: Sequence[Clip] = (),
        padding_side: str = "left",
    ) -> dict[str, Tensor]:
        """What the processor makes of prompts, on the model's device and in its dtype.

        Args:
            images: of each prompt.
            texts: from `prompt`.
            videos: of all prompts, in order.
            padding_side: where shorter prompts are padded; on the left for `generate`.

        Raises:
            InputError: the processor refuses a picture or a prompt, such as a picture that is far longer than wide; or
                the model takes no video.
        """
        try:
            made = self.processor(
                images=[list(own) for own in images] if any(images) or not videos else None,
                text=list(texts),
                return_tensors="pt",
                padding=True,
                padding_side=padding_side,
                **self.video_arguments(videos),
                **self.token_arguments(texts),
            )
        except ValueError as error:
            raise InputError(f"the model's processor refuses this input: {str(error).splitlines()[0]}") from error
        return to_model(made, self.model)

    def batch(self, images: Sequence[Sequence[Picture]], questions: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs of a batch: a question about the images of each sample, padded on the left."""
        texts = [self.prompt(question, len(own)) for own, question in zip(images, questions, strict=True)]
        return self.process(images, texts)

    def inputs(self, shown: Sequence[Picture | Clip], question: str) -> dict[str, Tensor]:
        """Model inputs for a batch of one: a question about pictures, and about videos, which stand before them."""
        videos = [each for each in shown if isinstance(each, Clip)]
        images = [each for each in shown if not isinstance(each, Clip)]
        self.check_video(videos)
        return self.process([images], [self.prompt(question, len(images), len(videos))], videos=videos)

    def check_video(self, videos: Sequence[Clip]) -> None:
        """Nothing where there are none, or the processor makes inputs of them.

        Raises:
            InputError: the family takes no video, or torchvision is missing, in which transformers' processors work.
        """
        if not videos or getattr(self.processor, "video_processor", None) is not None:
            return
        title = self.adapter.title
        if "video_processor" not in inspect.signature(type(self.processor).__init__).parameters:
            raise InputError(f"{title} takes no video; docs/models.md names the families that do")
        if find_spec("torchvision") is None:
            raise InputError(f"videos for {title} need torchvision, which is not installed: {EXTRA}")
        raise InputError(f"videos for {title} need a processor with its part for videos, which this one lacks")

    def video_arguments(self, videos: Sequence[Clip]) -> dict[str, Any]:
        """Arguments of the processor for these videos: frames that have been chosen, and when they are shown."""
        if not videos:
            return {}
        told = [video.metadata() for video in videos]
        return {"videos": [video.array() for video in videos], "video_metadata": told, "do_sample_frames": False}

    def token_arguments(self, texts: Sequence[str]) -> dict[str, bool]:
        """Arguments of the tokenizer for these prompts: a template that writes the first token wants no second one."""
        start = getattr(self.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if start and texts[0].startswith(start) else {}

    def generate(self, inputs: Mapping[str, Tensor], max_new_tokens: int, **more: Any) -> Tensor:
        """Token ids ``[B, new]`` of the greedy answers, without the prompts.

        What else `generate` of transformers takes, such as a `streamer`, is passed on.
        """
        with torch.inference_mode():
            ids: Tensor = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=end_tokens(self.model)[1],
                **more,
            )
        return ids[:, inputs["input_ids"].shape[1] :]

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

    def seen(self, image: Image, *, video: bool = False) -> Image:
        """The part of `image` that the vision tower sees: all of it, unless the processor crops or pads it square.

        Args:
            image: a picture, or a frame.
            video: it is a frame of a video, which has a processor of its own and no tiles.
        """
        from PIL import ImageOps

        steps: Any = getattr(self.processor, "video_processor" if video else "image_processor", None)
        if (self.adapter.tiles and not video) or not (
            getattr(steps, "do_center_crop", False) or getattr(steps, "do_pad", False)
        ):
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


def to_model(made: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """The tensors that a processor made, on the model's device, and those of real numbers in its dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in made.items()
        if isinstance(value, Tensor)
    }


def end_tokens(model: Any) -> tuple[list[int], int | None]:
    """Token ids that end an answer of `model`, and the one that fills rows which ended before others."""
    settings = model.generation_config
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = settings.pad_token_id
    return ends, pad if pad is not None else ends[0] if ends else None
