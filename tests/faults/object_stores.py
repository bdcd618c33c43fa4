"""Kills and failing requests for merges into a store with the interface of S3, for real.

    python tests/faults/object_stores.py

The server is moto's, in a process of its own. Before each request of a merge in turn: the process is killed, or the
request fails and all after it, or it fails alone. Then kills at random moments. Done to a new folder of shards, to a
single file, and to both over an old output.

Afterwards, each time: the old output is there or the new one, whole, or, once all of it is in the store, none for which
a reader finds a beginning; `merge clean --remove` puts a complete output in place, and leaves no upload and no record;
a failure is told in one message. One line sums it up; the exit code is 1 if anything of that went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import make_parser, report, sample_of, work_folder
from saboteur import Ended, Saboteur, command

import merging
from merging.errors import InputError
from merging.object_stores.store import Store
from support.s3_server import BUCKET, connect_to_bucket, run_server
from support.tiny import checkpoint

ERRORS = ("kill", "down", "once")

ENTRIES = ("config.json", ".index.json")


@dataclass
class Interference(Saboteur):
    """Harm done before a request to a store."""

    at: int | None = None
    error: str = ""
    calls: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Stand between this process and the store, for good."""
        plain, harmer = Store.ask, self

        def ask(self: Store, request: Any, path: str, *options: Any, **more: Any) -> Any:
            harmer.calls.append(path)
            turn = len(harmer.calls)
            if harmer.error == "kill" and turn == harmer.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if (harmer.error == "once" and turn == harmer.at) or (harmer.error == "down" and turn >= (harmer.at or 0)):
                raise InputError(f"{path}: the store cannot be reached")
            return plain(self, request, path, *options, **more)

        Store.ask = ask  # type: ignore[method-assign]


@dataclass(frozen=True)
class Case:
    """A merge to an address, over the files ``old``, which gives the files ``new``."""

    name: str
    words: list[str]
    old: dict[str, bytes]
    new: dict[str, bytes]

    @property
    def address(self) -> str:
        """The address of the output."""
        return self.words[self.words.index("-o") + 1]


def files_at(path: Path) -> dict[str, bytes]:
    """All files of an output on the disk, by their keys in the bucket."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path.parent).as_posix(): each.read_bytes() for each in files}


def cases(folder: Path) -> list[Case]:
    """All merges, with the same merges on the disk."""
    tuned = checkpoint(folder / "models", 2, layers=2)[1]
    quiet = ["--threads", "1", "--quiet"]
    found = []
    for name, options in (("out", {"shard_size": 1000}), ("out.safetensors", {})):
        new, old = folder / "new" / name, folder / "old" / name
        merging.merge(tuned, method="linear", output=new, threads=1, **options)
        merging.merge(tuned, method="linear", output=old, threads=1, weights=[0.9, 0.1], shard_size=500)
        words = ["--method", "linear", *map(str, tuned), "-o", f"s3://{BUCKET}/{name}", *quiet]
        words += ["--shard-size", "1000"] if options else []
        found.append(Case(name, words, {}, files_at(new)))
        found.append(Case(f"over {name}", [*words, "--overwrite"], files_at(old), files_at(new)))
    return found


class Bucket:
    """The bucket of the server."""

    def __init__(self) -> None:
        self.system = connect_to_bucket()

    def fill(self, files: dict[str, bytes]) -> None:
        """Make these the only files, without any upload."""
        for path in self.system.find(BUCKET):
            self.system.rm_file(path)
        for key, upload in self.uploads():
            self.system.call_s3("abort_multipart_upload", Bucket=BUCKET, Key=key, UploadId=upload)
        for name, content in files.items():
            self.system.pipe_file(f"{BUCKET}/{name}", content)

    def files(self) -> dict[str, bytes]:
        """All files."""
        return {path.partition("/")[2]: self.system.cat_file(path) for path in self.system.find(BUCKET)}

    def uploads(self) -> list[tuple[str, str]]:
        """The keys and names of all uploads that are not complete."""
        listed = self.system.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", ())
        return [(each["Key"], each["UploadId"]) for each in listed]


def look(case: Case, ended: Ended, bucket: Bucket) -> list[str]:
    """Return what is wrong after a harm, and after `merge clean`."""
    wrong = []
    found = bucket.files()
    output = {name: content for name, content in found.items() if ".partial/" not in name}
    records = [json.loads(content) for name, content in found.items() if name.endswith(".partial/uploads.json")]
    whole = any(record["whole"] for record in records)
    begins = any(name.endswith(ENTRIES) for name in output)
    unbegun = [
        {name: content for name, content in each.items() if not name.endswith("/config.json")}
        for each in (case.old, case.new)
    ]
    if output not in (case.old, case.new) and (not whole or (begins and output not in unbegun)):
        wrong.append(f"{sorted(output)} is neither the old nor the new output")
    if ended.code == 0 and output != case.new:
        wrong.append("exit code 0 without the output")
    if ended.code and (ended.said.count("Error: ") != 1 or "Traceback" in ended.said or "hunter2" in ended.said):
        wrong.append(f"exit code {ended.code}: {ended.said.strip()}")
    if ended.code not in (None, 0) and found != output and "merge clean" not in ended.said:
        wrong.append(f"{sorted(found)} stays, unsaid: {ended.said.strip()}")
    cleaned = command(["clean", case.address, "--remove"])
    found = bucket.files()
    wanted = case.new if whole else output
    if cleaned.code or found != wanted or bucket.uploads():
        wrong.append(f"cleaned, there is {sorted(found)} with uploads of {bucket.uploads()}: {cleaned.said.strip()}")
    return wrong


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills at random moments")
    args = parser.parse_args()
    began = time.perf_counter()
    errors: Counter[str] = Counter()
    wrong: list[str] = []
    with work_folder(args) as (folder, chance), run_server():
        os.environ["TMPDIR"] = str(folder)
        bucket = Bucket()
        made = cases(folder)
        seconds = {}
        for case in made:
            bucket.fill(case.old)
            dry = command(case.words, Interference())
            seconds[case.name] = dry.seconds
            if dry.code or bucket.files() != case.new or bucket.uploads():
                raise SystemExit(f"an undisturbed merge failed: {dry.said}")
            harms = [(turn, error) for turn in range(1, len(dry.calls) + 1) for error in ERRORS]
            for turn, error in sample_of(harms, args.calls, chance):
                bucket.fill(case.old)
                ended = command(case.words, Interference(turn, error))
                errors[error] += 1
                wrong += [f"{case.name}, request {turn}, {error}: {each}" for each in look(case, ended, bucket)]
        for number in range(args.kills):
            case = made[number % len(made)]
            bucket.fill(case.old)
            after = chance.uniform(0.0, 1.1 * seconds[case.name])
            ended = command(case.words, kill_after=after)
            errors["random kill"] += ended.code is None
            wrong += [f"{case.name}, killed after {after:.3f} s: {each}" for each in look(case, ended, bucket)]
    counts = ", ".join(f"{name} {count}" for name, count in errors.items())
    report("object stores", f"{counts}; wrong: {len(wrong)}", {"wrong": wrong}, args.show, began)


if __name__ == "__main__":
    main()
