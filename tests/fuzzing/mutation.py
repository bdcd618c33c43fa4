"""Harm done to bytes, to text and to JSON, every choice taken from a generator of random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["EXTREMES", "STRANGE", "bytes_harmed", "dumped", "json_harmed", "text_harmed", "value"]

EXTREMES = (
    0, 1, -1, 2, 3, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
    -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e300, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
"""Numbers at which readers of numbers break."""

STRANGE = (
    "", " ", ".", "..", "/", "//", "../../escaped", "/etc/passwd", "a/../b", "a\\b", "C:\\x", "CON", "~", "-",
    "--help", "\0", "a\0b", "\n", "\r\n", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "\udcff", "é", "e\u0301", "模型",
    "\U0001d54f", "'", '"', "{}", "[]", "null", "true", "1e9", "0x10", "1_000", "%s%n", "%2e%2e%2f", "$HOME", "`id`",
    "*", "**", "?", "[a-", "(", "(a+)+$", "(.*)*x", r"\1", "a{1,99999}", "x" * 300, "y" * 5000, "a." * 2000,
    "base_model.model.", ".weight",
)  # fmt: skip
"""Texts at which readers of text break: paths, escapes, halves of characters, regular expressions, lengths."""

_DEEP, _DIGITS, _TWICE = "\0deep\0", "\0digits\0", "\0twice\0"
"""What stands in a tree for what no tree can hold; put in its place when it becomes text."""


def value(random: Random, depth: int = 0) -> Any:
    """A JSON value of any kind."""
    kind = random.randrange(12 if depth < 3 else 8)
    if kind < 3:
        return random.choice(EXTREMES)
    if kind < 5:
        return random.choice(STRANGE)
    if kind < 8:
        return random.choice((None, True, False, _DEEP, _DIGITS, "8", 4, -4, 1.5))
    if kind < 10:
        return [value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 3, 20)))]
    return {str(random.choice(STRANGE)): value(random, depth + 1) for _ in range(random.choice((0, 1, 2, 5)))}


def dumped(random: Random, tree: Any) -> bytes:
    """A tree as JSON, with what stands for deep nesting, long numbers and repeated keys put in."""
    text = json.dumps(tree, ensure_ascii=random.random() < 0.8)
    escaped = {marker: json.dumps(marker)[1:-1] for marker in (_DEEP, _DIGITS, _TWICE)}
    depth = random.choice((100, 900, 3000, 100_000))
    text = text.replace(
        f'"{escaped[_DEEP]}"', random.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    )
    text = text.replace(f'"{escaped[_DIGITS]}"', "9" * random.choice((20, 400, 5000)))
    text = text.replace(escaped[_TWICE], "")
    return text.encode("utf-8", "surrogatepass")


def json_harmed(random: Random, tree: Any, words: Sequence[str] = ()) -> Any:
    """A tree of JSON with one to three changes somewhere in it; the tree itself is left alone."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        holders = [each for each in _nodes(tree) if isinstance(each, (dict, list)) and each]
        if not holders:
            return value(random)
        # those near the root are few, and as likely as all of the rest
        holder = random.choice(holders if random.random() < 0.5 else holders[:3])
        if isinstance(holder, dict):
            _harm_object(random, holder, words)
        else:
            _harm_list(random, holder)
    return tree if random.random() > 0.01 else value(random)


def _nodes(tree: Any) -> list[Any]:
    found, position = [tree], 0
    while position < len(found):
        node = found[position]
        found += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        position += 1
    return found


def _harm_object(random: Random, holder: dict[str, Any], words: Sequence[str]) -> None:
    key = random.choice(list(holder))
    kind = random.randrange(12)
    if kind < 5:
        holder[key] = value(random)
    elif kind < 6:
        holder[key] = random.choice(list(holder.values()))
    elif kind < 7:
        del holder[key]
    elif kind < 8:
        holder[_TWICE + key] = value(random) if random.random() < 0.5 else holder[key]
    elif kind < 9:
        holder[random.choice((*STRANGE, *words) or (key,))] = holder.pop(key)
    elif kind < 10 and words:
        holder[random.choice(list(words))] = value(random)
    elif kind < 11 and isinstance(holder[key], str):
        holder[key] = text_harmed(random, holder[key])
    else:
        holder[key] = _near(random, holder[key])


def _near(random: Random, old: Any) -> Any:
    """Something that is nearly the old value: another number, or the same one of another type."""
    if isinstance(old, bool):
        return random.choice((not old, int(old), str(old).lower(), [old]))
    if isinstance(old, (int, float)):
        small = float(old) if abs(old) < 1e300 else 0.5
        return random.choice((old + 1, old - 1, -old, old * 2, small, str(old), [old], {"0": old}, old == 1))
    if isinstance(old, str):
        return random.choice((old.upper(), f"{old} ", [old], {old: old}, f"../{old}", f"./{old}", f"{old}/", None))
    return random.choice(([old], {"0": old}, str(old)[:50], len(old) if old else 0, None))


def _harm_list(random: Random, holder: list[Any]) -> None:
    place, kind = random.randrange(len(holder)), random.randrange(6)
    if kind < 3:
        holder[place] = value(random)
    elif kind == 3:
        del holder[place]
    elif kind == 4:
        holder.insert(place, random.choice(holder))
    else:
        holder[place] = _near(random, holder[place])


def text_harmed(random: Random, text: str, pieces: Sequence[str] = STRANGE) -> str:
    """A text with one to three changes: characters or stretches lost, doubled, swapped, strange ones put in."""
    for _ in range(random.choice((1, 1, 2, 3))):
        first, second = sorted(random.randrange(len(text) + 1) for _ in range(2))
        second = min(second, first + random.choice((1, 3, 20, len(text) + 1)))
        middle, kind = text[first:second], random.randrange(7)
        if kind == 0:
            text = text[:first] + text[second:]
        elif kind == 1:
            text = text[:second] + middle * random.choice((1, 2, 20)) + text[second:]
        elif kind < 5:
            text = text[:first] + random.choice(pieces) + text[second if kind == 2 else first :]
        elif kind == 5:
            text = text[:first] + middle[::-1] + text[second:]
        else:
            text = text[:second]
    return text[:20_000]


def bytes_harmed(random: Random, data: bytes) -> bytes:
    """Bytes with one to four changes: bits flipped, stretches lost, doubled, overwritten, or the end cut off."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice(_BYTES)(random, bytearray(data or b"\0"))
    return data


def _flip(random: Random, data: bytearray) -> bytes:
    for _ in range(random.choice((1, 1, 3, 16))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def _overwrite(random: Random, data: bytearray) -> bytes:
    start = random.randrange(len(data))
    count = random.choice((1, 2, 8, 64))
    data[start : start + count] = random.choice((b"\0", b"\xff", b"{", b"9", bytes([random.randrange(256)]))) * count
    return bytes(data)


def _cut(random: Random, data: bytearray) -> bytes:
    return bytes(
        data[: random.choice((random.randrange(len(data)), len(data) - 1, random.randrange(min(len(data), 80))))]
    )


def _grow(random: Random, data: bytearray) -> bytes:
    return bytes(data) + random.choice((b"\0", b"x", random.randbytes(50), bytes(data[:100])))


def _lose(random: Random, data: bytearray) -> bytes:
    start = random.randrange(len(data))
    del data[start : start + random.choice((1, 8, 100))]
    return bytes(data)


def _double(random: Random, data: bytearray) -> bytes:
    start = random.randrange(len(data))
    piece = data[start : start + random.choice((1, 8, 100))]
    place = random.randrange(len(data))
    data[place:place] = piece
    return bytes(data)


def _number(random: Random, data: bytearray) -> bytes:
    """An integer of eight bytes, at the start or anywhere, that is extreme or nearly what it was."""
    start = 0 if random.random() < 0.5 else random.randrange(len(data))
    old = int.from_bytes(data[start : start + 8], "little")
    new = random.choice((old + 1, old - 1, old + 8, 0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001, len(data) - 8)) % 2**64
    data[start : start + 8] = new.to_bytes(8, "little")
    return bytes(data)


_BYTES: tuple[Callable[[Random, bytearray], bytes], ...] = (
    _flip,
    _flip,
    _overwrite,
    _cut,
    _grow,
    _lose,
    _double,
    _number,
)
