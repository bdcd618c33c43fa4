"""LoRAs of diffusion models, merged into files of every format."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import merging
from support.diffusion_models import (
    State,
    build,
    components,
    factors,
    kohya_modules,
    quietly,
    state_of,
    trained,
)

__all__ = ["WEIGHTS", "Made", "check_close", "merge", "metadata", "modules"]

WEIGHTS = (0.7, -0.4)


class Made:
    """A folder with a pipeline of each kind, two LoRAs of it in each format, and what diffusers makes of any two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lora = cache(self._lora)
        self.together = cache(self._together)
        self.before = cache(lambda model: state_of(build(model)))

    @cache  # noqa: B019
    def base(self, model: str) -> Path:
        with quietly():
            build(model).save_pretrained(self.folder / model)
        return self.folder / model

    def _lora(self, model: str, kind: str, seed: int) -> Path:
        path = self.folder / f"{model}-{kind}-{seed}"
        if kind == "diffusers":
            return trained(model, path, seed=seed, lora_alpha=3)
        return factors(path.with_suffix(".safetensors"), kohya_modules(model, 1), seed=seed)

    def pair(self, model: str, kinds: str) -> list[Path]:
        """Two LoRAs, of the kinds that their letters say."""
        return [self.lora(model, {"d": "diffusers", "k": "kohya"}[kind], seed) for seed, kind in enumerate(kinds)]

    def _together(self, model: str, kinds: str) -> State:
        """The pipeline's weights when diffusers has loaded the two and fused them with their weights."""
        pipeline = build(model)
        with quietly():
            for name, lora in zip("ab", self.pair(model, kinds), strict=True):
                pipeline.load_lora_weights(
                    lora.parent, weight_name=lora.name, adapter_name=name, low_cpu_mem_usage=False
                )
            pipeline.set_adapters(["a", "b"], list(WEIGHTS))
            pipeline.fuse_lora(components=list(components(pipeline)), adapter_names=["a", "b"])
            pipeline.unload_lora_weights()
        return state_of(pipeline)


def merge(loras: list[Path], out: Path, **options: Any) -> Path:
    """The file of a weighted sum."""
    settings: dict[str, Any] = {"method": "task_arithmetic", "weights": WEIGHTS[: len(loras)], **options}
    merging.merge(loras, output=out, **settings)
    if out.is_file():
        return out
    (file,) = out.glob("*.safetensors")
    return file


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def check_close(got: dict[str, Tensor], wanted: dict[str, Tensor], error: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    off = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    assert not {name: each for name, each in off.items() if not each <= error}


def modules(file: Path) -> set[str]:
    """The modules that a file changes; those of text encoders by their names in any version of transformers."""
    names = (re.sub(r"\.(?:lora_\w+(?:\.(?:up|down))?\.weight|alpha)$", "", name) for name in load_file(file))
    return {name.replace("text_model.", "") for name in names}
