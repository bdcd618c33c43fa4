"""A model that examples are run through. Only this file imports transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from merging.display.tables import plural
from merging.errors import FormatError, InputError, OptionError, option
from merging.maths.lazy_torch import Tensor, torch
from merging.pool.network import explain_errors, loading_options, quiet
from merging.statistics.examples import StatisticsExample

__all__ = ["ComputeType", "RunnableModel", "load_runnable"]

ComputeType = Literal["float32", "bfloat16", "float16", "float64"]
"""Names of types to compute in."""


@dataclass(slots=True, eq=False)
class RunnableModel:
    """A model of transformers in evaluation mode, with a tokenizer or an image processor.

    Attributes:
        name: its name, for messages.
        network: the model.
        processor: the tokenizer, or the image processor.
        images: whether examples are images.
        limit: the most tokens of an example.
    """

    name: str
    network: Any
    processor: Any
    images: bool
    limit: int

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def two_parts(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    def encode(self, example: StatisticsExample, most: int | None = None) -> dict[str, Tensor]:
        """Return the inputs of an example, of at most ``most`` tokens. Raises :class:`~merging.errors.FormatError`."""
        device = self.network.device
        if self.images:
            pixels = self.processor(images=_open_image(example), return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels.to(device, self.network.dtype)}
        ids = self._tokens(example.text, example.where, most)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.two_parts:
            answer = ids if example.completion is None else self._tokens(example.completion, example.where, most)
            start = torch.full((1, 1), self.config.decoder_start_token_id or 0, device=device)
            found["decoder_input_ids"] = torch.cat([start, answer[:, :-1]], 1)
        return found

    def _tokens(self, text: str, where: str, most: int | None) -> Tensor:
        limit = self.limit if most is None else min(self.limit, most)
        ids = self.processor(text, truncation=True, max_length=limit)["input_ids"]
        if not ids:
            raise FormatError(f"{where}: the text has no tokens")
        rows = self.config.get_text_config().vocab_size
        if max(ids) >= rows:
            raise InputError(
                f"{self.name}: {where} has the token {max(ids)}, and the model knows {rows} tokens: the tokenizer "
                f"belongs to another model"
            )
        return torch.tensor([ids], device=self.network.device)

    def run(self, inputs: dict[str, Tensor]) -> Any:
        """Return the output of the model for the inputs of one example."""
        if hasattr(self.network, "get_image_features"):  # models of two towers, such as CLIP
            tower = self.network.get_image_features if self.images else self.network.get_text_features
            return tower(**inputs)
        if not self.images and hasattr(self.config, "use_cache"):
            return self.network(**inputs, use_cache=False)
        return self.network(**inputs)


def load_runnable(
    model: str, *, name: str, images: bool, max_length: int, device: torch.device, dtype: ComputeType | None
) -> RunnableModel:
    """Load a model from a folder or the Hub, in the class that its config names.

    Args:
        model: the folder or name on the Hub.
        name: its name in messages.
        images: whether examples are images, else texts.
        max_length: the most tokens of an example.
        device: the device to run on.
        dtype: the type to compute in; None for float32 on a CPU, and the stored type elsewhere.

    Raises:
        InputError: for a model that transformers cannot load, or with missing tensors.
        OptionError: for a type that is none to compute in.
    """
    if dtype not in (None, *get_args(ComputeType)):
        raise OptionError(f"{option('dtype', str(dtype))}: give one of {', '.join(get_args(ComputeType))}")
    import transformers

    where, options = loading_options(model)
    loader = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    with quiet(), explain_errors(name):
        config = transformers.AutoConfig.from_pretrained(where, **options)
        processor = loader.from_pretrained(where, **options)
        cls = getattr(transformers, str((config.architectures or [""])[0]), transformers.AutoModel)
        kind: Any = dtype or ("float32" if device.type == "cpu" else "auto")
        network, loading = cls.from_pretrained(where, dtype=kind, output_loading_info=True, **options)
    missing = sorted(each for each in loading["missing_keys"] if ".pooler." not in f".{each}")
    if missing:
        others = f" and {plural(len(missing) - 1, 'more tensor')}" if len(missing) > 1 else ""
        raise InputError(f"{name}: lacks {missing[0]}{others} of a {cls.__name__}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [max_length, getattr(processor, "model_max_length", max_length)]
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    network = network.to(device).eval().requires_grad_(False)
    return RunnableModel(name, network, processor, images, min(limits))


def _open_image(example: StatisticsExample) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise OptionError(f"images need Pillow: pip install pillow, or give texts with {option('data')}") from None
    assert example.image is not None
    try:
        with Image.open(example.image) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise FormatError(f"{example.where}: is no image that can be read: {error}") from None
