"""Damaged and hostile GGUF files: one error each, whatever they claim."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from merging.errors import FormatError, MergingError
from merging.hub.open_model import open_model
from merging.sources.gguf.files import open_gguf

Bytes = Callable[[], bytes]


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, string("llama"))
HEADS = pair("llama.attention.head_count", 4, struct.pack("<I", 2))
LAYERS = pair("llama.block_count", 4, struct.pack("<I", 1))


def tensor(name: str = "token_embd.weight", shape: tuple[int, ...] = (4, 6), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def file(
    pairs: tuple[bytes, ...] = (ARCHITECTURE, HEADS, LAYERS),
    tensors: tuple[bytes, ...] = (tensor(),),
    *,
    data: int = 96,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % 32 + data)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file, or not all of one"),
    "wrong magic": (file(magic=b"GGML"), "does not begin with GGUF"),
    "old version": (file(version=1), "its version of the format is 1"),
    "big-endian": (file(version=3 << 24), "its bytes are in big-endian order"),
    "many tensors": (file(counts=(2**60, 1)), "the number of its tensors is 1,152,921,504,606,846,976, and at most"),
    "many entries": (file(counts=(1, 2**40)), "the number of its metadata entries is 1,099,511,627,776"),
    "more tensors than there are": (file(counts=(2, 3), data=0), "it ends within"),
    "cut": (file()[:-1], r"'token_embd.weight' ends at byte \d+, and the file has \d+: download it again"),
    "cut in the header": (file()[:60], "it ends within"),
    "long key": (file((string("k" * 70_000),)), "the length of a key of its metadata is 70,000"),
    "long string": (file((pair("a", 8, struct.pack("<Q", 2**62)),)), "the length of 'a' is 4,611,686,018,427,387,904"),
    "type of a value": (file((pair("a", 77, b""),)), "'a' has the type 77, which GGUF does not have"),
    "nested array": (file((pair("a", 9, struct.pack("<IQ", 9, 3)),)), "an array of the type 9"),
    "endless array": (file((pair("a", 9, struct.pack("<IQ", 4, 2**61)),)), "it ends within 'a'"),
    "endless strings": (file((pair("a", 9, struct.pack("<IQ", 8, 2**61)),)), "would have 2,305,843,009,213,693,952"),
    "key twice": (file((ARCHITECTURE, ARCHITECTURE)), "the key 'general.architecture' twice"),
    "alignment": (file((pair("general.alignment", 4, struct.pack("<I", 7)),)), "its alignment is 7"),
    "alignment in words": (file((pair("general.alignment", 8, string("\u00b2")),)), "its alignment is \u00b2"),
    "axes": (file(tensors=(tensor(shape=(1,) * 9),)), "has 9 axes"),
    "shape": (file(tensors=(tensor(shape=(2**40, 2**40)),)), "has the impossible shape"),
    "no elements": (file(tensors=(tensor(shape=(2**40, 0)),)), "has the impossible shape"),
    "type": (file(tensors=(tensor(kind=99),)), "'token_embd.weight' has the type 99, which GGUF does not have"),
    "type taken away": (file(tensors=(tensor(kind=4),)), "has the type 4"),
    "blocks": (file(tensors=(tensor(kind=2),)), "have 4 elements, no multiple of Q4_0's block"),
    "offset": (file(tensors=(tensor(offset=2**62),)), r"ends at byte .*, and the file has"),
    "crooked offset": (file(tensors=(tensor(offset=3),)), "begins at 3, which is not a multiple of 32"),
    "overlap": (file(tensors=(tensor(), tensor("b.weight", offset=64)), data=200), "'b.weight' overlaps"),
    "name twice": (file(tensors=(tensor(), tensor(offset=96)), data=200), "it holds 'token_embd.weight' twice"),
    "no tensors": (file(tensors=()), "holds no tensors"),
    "no architecture": (file(()), "of the architecture ''"),
    "other architecture": (file((pair("general.architecture", 8, string("clip")),)), "of the architecture 'clip'"),
    "no heads": (file((ARCHITECTURE, LAYERS)), "do not state the model's num_attention_heads"),
    "deep heads": (
        file((ARCHITECTURE, LAYERS, pair("llama.attention.head_count", 8, string("[" * 100_000)))),
        "do not state the model's num_attention_heads",
    ),
    "no embedding": (file(tensors=(tensor("output.weight"),)), "has no token embedding"),
    "unknown name": (
        file(tensors=(tensor(), tensor("blk.0.surprise.weight", offset=96)), data=200),
        "blk.0.surprise.weight has no name in transformers' LlamaForCausalLM",
    ),
    "crooked heads": (
        file(tensors=(tensor(), tensor("blk.0.attn_q.weight", (4, 6), offset=96)), data=200),
        "blk.0.attn_q.weight has 6 rows, which do not make 2 heads",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str, tmp_path: Path) -> None:
    content, wanted = DAMAGED[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(FormatError, match=wanted) as caught:
        open_model(tmp_path / "a.gguf", dequantize=True)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file())
    tensors, metadata = open_gguf(tmp_path / "a.gguf")
    assert (tensors["token_embd.weight"].shape, metadata["llama.block_count"]) == ((6, 4), "1")


def test_any_harm_is_one_error(tmp_path: Path) -> None:
    """Bytes changed and cut at random: it is read, or refused."""
    chance = random.Random(5)
    pairs = (ARCHITECTURE, HEADS, LAYERS, pair("a", 9, struct.pack("<IQ3I", 4, 3, 1, 2, 3)))
    sound = file(pairs, (tensor(), tensor("output.weight", (32, 3), kind=2, offset=96)), data=160)
    for _ in range(300):
        harmed = bytearray(sound)
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(harmed) - 150)
            harmed[place : place + chance.choice((1, 4, 8))] = chance.choice((b"\xff" * 8, b"\0" * 4, b"\x7f", b"A"))
        (tmp_path / "a.gguf").write_bytes(bytes(harmed[: chance.choice((len(harmed), len(harmed), 90))]))
        try:
            open_model(tmp_path / "a.gguf", dequantize=True)
        except MergingError as error:
            assert str(tmp_path) in str(error)
