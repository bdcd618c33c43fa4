"""The 20 image tasks of vision.py: datasets on the Hub, class names, and texts of the classes.

Names and order are those of FusionBench's configurations (TA8, TALL14, TALL20). Class names that are not here are the
names of the dataset's label feature.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KNOTS", "TASKS", "ImageTask"]


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """A classification of images.

    Attributes:
        name: The name of the task in FusionBench's repositories.
        data: The dataset: a name on the Hub, or a folder of folders split/class/image.
        templates: Texts of a class, {} in place of its name.
        classes: The names of the classes by label; empty for those of the dataset.
        config: The dataset's configuration, where it has several.
        train: The split that validation examples are from.
        test: The split of the test examples.
        image: The column of the images.
        label: The column of the labels.
        underscores: Written in place of underscores in the dataset's names of classes.
    """

    name: str
    data: str
    templates: tuple[str, ...]
    classes: tuple[str, ...] = ()
    config: str | None = None
    train: str = "train"
    test: str = "test"
    image: str = "image"
    label: str = "label"
    underscores: str = "_"


def _both(text: str, *articles: str) -> tuple[str, ...]:
    return tuple(text.replace("<>", article) for article in articles)


_A_THE = _both("a photo of <> {}.", "a", "the")
_QUALITIES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_CIFAR = tuple(
    f"a {kind}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for kind, size in (*((quality, "") for quality in _QUALITIES), ("", "small "), ("", "big "))
)
_AERIAL = tuple(
    f"{kind} of {article}{{}}."
    for article in ("", "a ", "the ")
    for kind in (f"{view} {what}" for what in ("imagery", "photo", "view") for view in ("satellite", "aerial"))
)
_DTD = tuple(
    f"a photo of {article} {{}} {what}."
    for article in ("a", "the")
    for what in ("texture", "pattern", "thing", "object")
)
_CARS = (
    *_A_THE,
    "a photo of my {}.",
    "i love my {}!",
    "a photo of my dirty {}.",
    "a photo of my clean {}.",
    "a photo of my new {}.",
    "a photo of my old {}.",
)
_SIGNS = tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up"))
_FACES = (
    "a photo of a {} looking face.",
    "a photo of a face showing the emotion: {}.",
    "a photo of a face looking {}.",
    "a face that looks {}.",
    "they look {}.",
    "look at how {} they are.",
)
_NUMBER = ('a photo of the number: "{}".',)
_DIGITS = tuple("0123456789")
_EUROSAT = (
    "annual crop land",
    "forest",
    "brushland or shrubland",
    "highway or road",
    "industrial buildings or commercial buildings",
    "pasture land",
    "permanent crop land",
    "residential buildings or homes or apartments",
    "river",
    "lake or sea",
)
_EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")
_CLOTHES = (
    "T - shirt / top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_STL = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

TASKS = (
    ImageTask(name="sun397", data="tanganke/sun397", templates=_A_THE),
    ImageTask(name="stanford-cars", data="tanganke/stanford_cars", templates=_CARS),
    ImageTask(name="resisc45", data="tanganke/resisc45", templates=_AERIAL),
    ImageTask(
        name="eurosat",
        data="tanganke/eurosat",
        templates=_both("a centered satellite photo of <>{}.", "", "a ", "the "),
        classes=_EUROSAT,
    ),
    ImageTask(name="svhn", data="ufldl-stanford/svhn", config="cropped_digits", templates=_NUMBER, classes=_DIGITS),
    ImageTask(name="gtsrb", data="tanganke/gtsrb", templates=_SIGNS),
    ImageTask(name="mnist", data="ylecun/mnist", templates=_NUMBER, classes=_DIGITS),
    ImageTask(name="dtd", data="tanganke/dtd", templates=_DTD),
    ImageTask(
        name="oxford_flowers102",
        data="dpdl-benchmark/oxford_flowers102",
        templates=("a photo of a {}, a type of flower.",),
    ),
    ImageTask(
        name="pcam",
        data="1aurent/PatchCamelyon",
        templates=("this is a photo of {}",),
        classes=("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    ImageTask(
        name="fer2013",
        data="clip-benchmark/wds_fer2013",
        templates=_FACES,
        classes=_EMOTIONS,
        image="jpg",
        label="cls",
    ),
    ImageTask(name="oxford-iiit-pet", data="timm/oxford-iiit-pet", templates=("a photo of a {}, a type of pet.",)),
    ImageTask(name="stl10", data="tanganke/stl10", templates=_A_THE, classes=_STL),
    ImageTask(name="cifar100", data="tanganke/cifar100", templates=_CIFAR),
    ImageTask(name="cifar10", data="tanganke/cifar10", templates=_CIFAR, classes=_CIFAR_CLASSES),
    ImageTask(
        name="food101",
        data="ethz/food101",
        templates=("a photo of {}, a type of food.",),
        test="validation",
        underscores=" ",
    ),
    ImageTask(name="fashion_mnist", data="zalando-datasets/fashion_mnist", templates=_A_THE, classes=_CLOTHES),
    ImageTask(
        name="emnist_letters",
        data="tanganke/emnist_letters",
        templates=('a photo of the digit character: "{}".',),
        classes=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ),
    ImageTask(
        name="kmnist",
        data="tanganke/kmnist",
        templates=("a photo of the character {}.",),
        classes=tuple("おきすつなはまやれを"),
    ),
    ImageTask(
        name="rendered-sst2",
        data="nateraw/rendered-sst2",
        templates=("a {} review of a movie.",),
        classes=("negative", "positive"),
    ),
)
KNOTS = {task.name: task.name.replace("-", "_") for task in TASKS[:8]}
"""The names of the first eight tasks in KnOTS's repositories."""
