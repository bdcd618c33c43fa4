"""Pickles that were harmed, or that ask for more than they hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import zipfile
from random import Random
from typing import Any

import torch

from fuzzing.corpus import Corpus
from fuzzing.mutation import STRANGE, bytes_harmed
from fuzzing.sample import Sample

# --- PyTorch's files


class _Payload:
    """What a hostile pickle holds: a call of its own."""

    def __init__(self, random: Random) -> None:
        self._call = random.choice(
            (
                (os.system, ("true",)),
                (eval, ("1",)),
                (os.mkdir, ("/tmp/owned",)),
                (open, ("/tmp/owned", "w")),
                (torch.load, ("x",)),
            )
        )

    def __reduce__(self) -> Any:
        return self._call


def make_pickle(random: Random, corpus: Corpus) -> Sample:
    content, kind = random.choice(corpus.pickles), random.randrange(8)
    if kind < 3:
        content = bytes_harmed(random, content)
    elif kind < 6 and zipfile.is_zipfile(io.BytesIO(content)):
        content = _zip_harmed(random, content)
    elif kind == 6:
        stream = io.BytesIO()
        torch.save(_odd_state(random), stream)
        content = stream.getvalue()
    ending = random.choice((".bin", ".pt", ".pth", ".ckpt"))
    if random.random() < 0.3:
        config = random.choice(corpus.peft).config
        files = {"a/adapter_model.bin": content, "a/adapter_config.json": json.dumps(config).encode()}
        return Sample(files, {}, {"models": ["a"], "do": "plan"})
    return Sample(
        {f"a{ending}": content},
        {},
        {"models": [f"a{ending}"], "do": random.choice(("plan", "merge", "inspect", "verify"))},
    )


def _odd_state(random: Random) -> Any:
    """Something that is nearly a state dict."""
    keys: tuple[Any, ...] = ("w", 3, None, ("a", 1), 2.5, b"w", *STRANGE)
    values: tuple[Any, ...] = (
        torch.ones(2, 2), torch.ones(2, 2).to_sparse(), torch.empty(3, device="meta"),
        torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex128),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 1, torch.qint8), 3, "text", None, [torch.ones(1)],
        torch.nn.Parameter(torch.ones(2)), torch.ones(1).expand(10**5, 10**5), torch.Size([3]),
        torch.zeros(0, 2**40), torch.ones(4).as_strided((2, 2), (0, 1)), torch.float32, _Payload(random),
        torch.ones(3).conj(),
    )  # fmt: skip
    state: Any = {random.choice(keys): random.choice(values) for _ in range(random.randrange(4))}
    return random.choice((state, state, state, {"state_dict": state}, [state], random.choice(values)))


def _zip_harmed(random: Random, content: bytes) -> bytes:
    """A zip file whose pickle or data is harmed, its checksums right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as after:
        names = before.namelist()
        for name in names:
            data, kind = before.read(name), random.randrange(8)
            if name.endswith("data.pkl"):
                data = _pickle_harmed(random, data) if kind < 6 else data
            elif kind == 0:
                data = bytes_harmed(random, data)
            elif kind == 1:
                continue
            if random.random() < 0.03:
                name = random.choice(
                    ("../../escaped", "/tmp/escaped", "archive/data/0", name.upper(), "archive/data.pkl")
                )
            after.writestr(name, data)
    return stream.getvalue()


def _pickle_harmed(random: Random, data: bytes) -> bytes:
    """A pickle with one of its numbers, names or instructions replaced."""
    try:
        codes = [(code.name, place) for code, _, place in pickletools.genops(data)]
    except Exception:
        return bytes_harmed(random, data)
    kind = random.randrange(4)
    changed = bytearray(data)
    places = [place for name, place in codes if name.startswith("BININT")]
    if kind == 0 and places:
        place = random.choice(places)
        code = {b"K": 1, b"M": 2, b"J": 4}[bytes(changed[place : place + 1])]
        changed[place + 1 : place + 1 + code] = random.choice((b"\0", b"\xff", b"\x7f", b"\x05")) * code
        return bytes(changed)
    if kind == 1:
        for old, new in (
            (b"FloatStorage", b"HalfStorage "),
            (b"_rebuild_tensor_v2", b"_rebuild_parameter"),
            (b"torch", b"posix"),
        ):
            if old in data and random.random() < 0.5:
                return data.replace(old, new[: len(old)].ljust(len(old)))
    if kind == 2:
        return pickle.dumps(_Payload(random), 2)
    return bytes_harmed(random, data)
