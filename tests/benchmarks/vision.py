"""The image benchmarks of the field: CLIP ViT-B/32 on 8, 14 and 20 tasks, full fine-tunes or LoRAs.

    python tests/benchmarks/vision.py --tasks 8 --json vision.json
    python tests/benchmarks/vision.py --kind lora --methods ties knots+ties

Needs network, `pip install datasets`, and better a GPU. Full fine-tunes are FusionBench's (tanganke/...), of the vision
encoder alone; LoRAs are KnOTS's of rank 16 (hoffman-lab/..., the first eight tasks). Heads are zero-shot: the base's
text encoder on the names of the classes in several texts. Each method's parameter is searched on --valid images of the
training split, which the fine-tunes have seen, or set by --fixed. Images, heads and answers are kept by content under
--work, so that a run that was stopped goes on. Images take 150 kB each there.

--local FOLDER reads models and tasks from FOLDER/tasks.json: base, full and lora name folders of models, tasks lists
name, data (a folder of folders split/class/image), templates and classes.

Verified in the repositories' own files or pages: the names of all models and datasets, the order of the tasks, the
texts of the classes, and the class names that vision_tasks.py has. Not verified: whether the label features of gtsrb,
resisc45, stanford-cars, dtd, cifar100, oxford_flowers102 and oxford-iiit-pet name their classes just as FusionBench
does, and the columns of the datasets beyond FusionBench's rule (image and label). A task whose own model is hardly
better than the base has other names: compare the column "individual".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hub_merges import HubJudge, HubModels, make_parser, run_protocol
from kept_answers import digest, remembered
from PIL import Image
from torch import Tensor
from vision_tasks import KNOTS, TASKS, ImageTask

from merging import MergingError

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """A split of a dataset, whose images are decoded one at a time.

    Attributes:
        count: The number of images.
        identity: Changes with the images.
        classes: The names of the classes, empty where the dataset has none.
        read: Returns an image and its label.
    """

    count: int
    identity: str
    classes: tuple[str, ...]
    read: Callable[[int], tuple[Image.Image, int]]


def open_split(task: ImageTask, split: str) -> ImageSplit:
    """Open a split of a task's dataset: a folder, or a dataset on the Hub."""
    if Path(task.data).is_dir():
        return _open_folder(Path(task.data) / split)
    import datasets

    data: Any = datasets.load_dataset(task.data, task.config, split=split)

    def read(number: int) -> tuple[Image.Image, int]:
        row = data[number]
        return row[task.image], int(row[task.label])

    names = tuple(name.replace("_", task.underscores) for name in getattr(data.features[task.label], "names", ()))
    return ImageSplit(count=len(data), identity=data._fingerprint, classes=names, read=read)


def _open_folder(folder: Path) -> ImageSplit:
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())]

    def read(number: int) -> tuple[Image.Image, int]:
        path, label = files[number]
        return Image.open(path), label

    identity = digest(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path, _ in files)
    return ImageSplit(count=len(files), identity=identity, classes=tuple(classes), read=read)


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """Resize an image's shorter side and cut out the middle, as CLIP does: uint8 [3, size, size]."""
    image = image.convert("RGB")
    times = size / min(image.size)
    image = image.resize([max(size, int(side * times)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    image = image.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def to_input(pixels: Tensor) -> Tensor:
    """Pixels as CLIP takes them: float32 of mean 0 and deviation 1 over CLIP's own images."""
    mean, deviation = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (MEAN, DEVIATION))
    return (pixels.float() / 255 - mean) / deviation


@torch.no_grad()
def zero_shot_head(network: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The head [classes, features] of a CLIP: what the texts of each class have in common."""
    rows = []
    for name in classes:
        texts = [template.format(name) for template in templates]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(network.device)
        features = network.text_projection(network.text_model(**inputs).pooler_output)
        mean = torch.nn.functional.normalize(features, dim=-1).mean(0)
        rows.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.stack(rows)


class VisionJudge(HubJudge):
    """CLIP with a merged vision encoder, asked for the class of each image by its zero-shot head."""

    def __init__(self, tasks: Sequence[ImageTask], base: str, work: Path, options: Any) -> None:
        import transformers

        super().__init__([task.name for task in tasks], work)
        self.network: Any = transformers.CLIPModel.from_pretrained(base).to(options.device).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self._size, self._batch = self.network.config.vision_config.image_size, options.batch
        self._counts = {"valid": options.valid, "test": options.limit}
        self._kept: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._tasks = {task.name: task for task in tasks}

    def examples(self, name: str, split: str) -> dict[str, Tensor]:
        """The pixels and labels of a task's images, and the digest of both."""
        if (name, split) not in self._kept:
            task = self._tasks[name]
            data, most = open_split(task, task.test if split == "test" else task.train), self._counts[split]
            if not task.classes:
                self._tasks[name] = replace(task, classes=data.classes)
            order = torch.randperm(data.count, generator=torch.Generator().manual_seed(0))[:most].sort().values

            def decode() -> dict[str, Tensor]:
                pairs = [data.read(number) for number in order.tolist()]
                pixels = torch.stack([to_pixels(image, self._size) for image, _ in pairs])
                labels = torch.tensor([label for _, label in pairs])
                content = bytearray.fromhex(digest([pixels, labels]))
                return {"pixels": pixels, "labels": labels, "content": torch.frombuffer(content, dtype=torch.uint8)}

            path = self._work / "images" / f"{digest([data.identity, str(self._size), order])}.safetensors"
            self._kept[name, split] = remembered(path, decode)
        return self._kept[name, split]

    @cached_property
    def heads(self) -> dict[str, Tensor]:
        """The zero-shot head of each task, [classes, features]."""
        return {name: self._make_head(name) for name in self.tasks}

    def _make_head(self, name: str) -> Tensor:
        self.examples(name, "test")  # which knows the names of the classes
        task = self._tasks[name]
        if not task.classes:
            raise MergingError(f"{task.data}: its column {task.label} names no classes: write them in vision_tasks.py")
        return zero_shot_head(self.network, self._tokenizer, task.classes, task.templates)

    def identity(self, name: str, split: str) -> str:
        return digest([self.heads[name], self.examples(name, split)["content"]])

    @torch.no_grad()
    def ask(self, name: str, split: str) -> Tensor:
        examples, answers = self.examples(name, split), []
        for pixels in examples["pixels"].split(self._batch):
            inputs = to_input(pixels.to(self.network.device))
            features = self.network.visual_projection(self.network.vision_model(pixel_values=inputs).pooler_output)
            answers.append((features @ self.heads[name].T).argmax(-1).cpu())
        return (torch.cat(answers) == examples["labels"]).to(torch.uint8)


def from_hub(kind: str, count: int) -> tuple[str, dict[str, str], list[ImageTask]]:
    """The base, the model of each task, and the tasks of the field's protocols."""
    tasks = list(TASKS[:count])
    if kind == "lora":
        return (
            "openai/clip-vit-base-patch32",
            {name: f"hoffman-lab/KnOTS-ViT-B-32_lora_R16_{own}" for name, own in KNOTS.items()},
            tasks,
        )
    return (
        "openai/clip-vit-base-patch32",
        {task.name: f"tanganke/clip-vit-base-patch32_{task.name}" for task in tasks},
        tasks,
    )


def from_folder(folder: Path, kind: str) -> tuple[str, dict[str, str], list[ImageTask]]:
    """The base, the model of each task, and the tasks of a folder's tasks.json."""
    listed = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    tasks = [ImageTask(**{**task, "data": str(folder / task["data"])}) for task in listed["tasks"]]
    return str(folder / listed["base"]), {task.name: str(folder / listed[kind][task.name]) for task in tasks}, tasks


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line, ask what is not known yet, and print the tables."""
    parser = make_parser(__doc__, "merging-vision")
    parser.add_argument("--tasks", type=int, choices=(8, 14, 20), default=8, help="how many (%(default)s)")
    parser.add_argument("--kind", choices=("full", "lora"), default="full", help="what is merged (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.kind == "lora" and chosen.tasks > len(KNOTS):
        parser.error(f"--kind lora: there are LoRAs of {len(KNOTS)} tasks")
    source = from_folder(chosen.local, chosen.kind) if chosen.local else from_hub(chosen.kind, chosen.tasks)
    base, models, tasks = source
    judge = VisionJudge(tasks, base, chosen.work, chosen)
    return run_protocol(chosen, HubModels(chosen.kind, models, base, judge.network), judge)


if __name__ == "__main__":
    main()
