"""PyTorch files that ask for more than they hold: refused by their description, before anything of it is made."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from merging.errors import FormatError
from merging.hub.open_model import open_model
from merging.sources.pickled import open_pickle
from merging.sources.unpickle import Other, unpickle

DICT = b"ccollections\nOrderedDict\n"
AGAIN = b"c_codecs\nencode\nh\0X\3\0\0\0hex\x86Rq\0"
"""Encodes what was made last, which doubles it."""


def saved(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A PyTorch file with such a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 64)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(key: str = "0", count: int = 16) -> bytes:
    """The instructions that refer to a storage of floats."""
    return (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", count)
        + b"tQ"
    )


def tensor(shape: bytes, strides: bytes, count: int = 16, key: str = "0") -> bytes:
    """A file's state with one tensor, whose shape and strides are given as instructions."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key, count) + b"K\0" + shape + strides + b"\x89)R"
    return b"\x80\x02}" + text("w") + made + b"tRs."


def long(value: int) -> bytes:
    data = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def nest() -> bytes:
    """Keeps a tuple as number 39: forty deep, each holds the one before thrice, 3**38 values in all."""
    deeper = (b"h%c" % (level - 1) * 3 + b"\x87q%c0" % level for level in range(2, 40))
    return b"K\1\x85q\x010" + b"".join(deeper)


MADE = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0))\x89)tR"
"""A number as a tensor."""

MANY = b"(" + b"N" * 100_000 + b"tq\1" + b"0"
"""Keeps a tuple of 100,000 values as number 1."""
LONG = text("k" * 1_000_000) + text("k" * 1_000_000) + b"q\x010"
"""A long text, and as number 1 another that has to be compared with it to the end."""


BOMBS = {
    "a memo of 16 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of 16 GB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b".",
    "a text that doubles": b"\x80\x02" + text("x" * 1000) + b"q\0" + AGAIN * 40 + b".",
    "a dict that is copied": b"\x80\x02](K\1K\2\x86K\3K\4\x86eq\0" + (DICT + b"h\0\x85R") * 9 + b".",
    "a number without end": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\1" * (1 << 20) + b".",
    "a tensor beyond its storage": tensor(b"M\xff\xff\x85", b"K\1\x85"),
    "a tensor of 2**62 elements": tensor(long(1 << 62) + b"\x85", b"K\0\x85"),
    "a storage beyond its record": tensor(b"K\x20\x85", b"K\1\x85", count=1 << 30),
    "a storage that is not there": tensor(b"K\1\x85", b"K\1\x85", key="../7"),
    "a tensor by its size": b"\x80\x02ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR.",
    "a number of the system's": b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.",
    "a deep nest": b"\x80\x02" + b"]q\0" + b"]h\0a" * 100_000 + b".",
    "a nest for a key": b"\x80\x02}" + nest() + b"h\x27K\1s.",
    "a nest among keys": b"\x80\x02}" + nest() + b"(h\x27K\1h\x26K\1u.",
    "a nest in a dict": b"\x80\x02" + nest() + b"(h\x27K\1d.",
    "a nest in a set": b"\x80\x04" + nest() + b"\x8f(h\x27\x90.",
    "a nest in a set for good": b"\x80\x04" + nest() + b"(h\x27\x91.",
    "a nest for a state": b"\x80\x02" + nest() + MADE + b"}h\x27K\1sb.",
    "a nest for a place": b"\x80\x02" + nest() + MADE.replace(b"))", b"h\x27h\x27") + b".",
    "a nest for a storage": b"\x80\x02" + nest() + b"h\x27Q.",
    "a nest for a type": b"\x80\x02" + nest() + b"ctorch._tensor\n_rebuild_from_type_v2\n(h\x27h\x27h\x27tR.",
    "a long key again and again": b"\x80\x02}" + LONG + b"K\1s" + b"h\1K\1s" * 100_000 + b".",
    "many values again and again": (
        b"\x80\x02" + MANY + b"ctorch.nn.parameter\nParameter\nq\x020" + b"h\2h\1R0" * 100_000 + b"N."
    ),
    "many axes again and again": tensor(MANY[:-3] + b"q\1", b"h\1"),
    "steps without end": b"\x80\x02" + b"N0" * (1 << 22) + b"N.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(tmp_path: Path, bomb: str) -> None:
    path = saved(tmp_path / "a.bin", BOMBS[bomb])
    with pytest.raises(FormatError, match=r"a\.bin: (is a damaged|holds more|is a PyTorch file, but)"):
        open_model(path)


def test_a_text_that_doubles_is_not_made() -> None:
    """What torch would make, and nobody needs, stays without content."""
    made = unpickle(BOMBS["a text that doubles"])
    assert isinstance(made, Other) and vars(made) == {"kind": "encode"}


def test_nothing_that_is_made_is_changed_by_a_file(tmp_path: Path) -> None:
    """A state would give a tensor any shape, and a function of ours other defaults for the files to come."""
    state = b"(" + storage() + b"ctorch\nfloat16\nK\0h\x27h\x27tb"
    defaults = b"ctorch._utils\n_rebuild_parameter\nN}" + text("__defaults__") + b"K\1\x85s\x86b0"
    saved(tmp_path / "a.bin", b"\x80\x02}" + nest() + text("w") + MADE + state + defaults + b"s.")
    tensors, _ = open_pickle(tmp_path / "a.bin")
    assert tensors["w"].shape == () and tensors["w"].dtype == torch.float32
    assert unpickle(b"\x80\x02ctorch._utils\n_rebuild_parameter\n.").__defaults__ is None


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """Torch never compresses; a megabyte of such a file can be a gigabyte of instructions."""
    path = saved(tmp_path / "a.bin", b"\x80\x02" + b"N0" * (1 << 20) + b"}.", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    with pytest.raises(FormatError, match=r"data\.pkl is compressed, which torch\.save never does"):
        open_model(path)


def test_list_of_records_that_never_ends(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", b"\x80\x02}.")
    data = bytearray(path.read_bytes())
    (tmp_path / "a.bin").write_bytes(bytes(1 << 26) + data)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.seek(-22 + 12, io.SEEK_END)
        file.write(struct.pack("<II", 1 << 26, len(data)))
    with pytest.raises(FormatError, match="a damaged PyTorch file"):
        open_model(path)


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    """Every kind of tensor and of place in a storage, by both protocols, as torch itself reads them."""
    whole = torch.arange(48.0).reshape(6, 8)
    state = {
        "rows": whole[2:4], "columns": whole[:, 1:3], "transposed": whole.mT, "expanded": torch.ones(1).expand(3, 2),
        "number": torch.tensor(3), "empty": torch.empty(0, 2), "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(2).half(), "byte": torch.ones(2).to(torch.uint8), "unsigned": torch.ones(2).to(torch.uint16),
        "float8": torch.ones(2).to(torch.float8_e4m3fn), "complex": torch.ones(2) * 1j, "flag": torch.ones(2) > 0,
    }  # fmt: skip
    for protocol in (2, 4):
        torch.save({"state_dict": state, "epoch": 3, "done": {1, 2}}, tmp_path / "a.pt", pickle_protocol=protocol)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "load", None)
            tensors, shared = open_pickle(tmp_path / "a.pt")
        assert not shared and tensors.keys() == state.keys()
        for name, stored in tensors.items():
            assert stored.dtype == state[name].dtype and stored.shape == state[name].shape
            assert stored.read().equal(state[name].detach()), name
    piece = torch.empty(5)
    tensors["transposed"].read_into(piece, 3)
    assert piece.equal(whole.mT.reshape(-1)[3:8])


def test_a_bin_that_is_cut_is_an_error_and_no_signal(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1 << 16)}, tmp_path / "a.bin")
    tensors, _ = open_pickle(tmp_path / "a.bin")
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(FormatError, match="it was cut while it was read"):
        tensors["w"].read()


def test_numbers_with_their_highest_byte_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(FormatError, match="highest byte first"):
        open_model(tmp_path / "a.bin")


def test_tensors_of_a_pickle_that_are_not_in_it(tmp_path: Path) -> None:
    """A number that is said to be a matrix of forty gigabytes, tensors without values, keys that are no names."""
    cases = (
        ({"w": torch.ones(1).expand(10**5, 10**5)}, "larger than its file"),
        ({"w": torch.empty(3, device="meta")}, "is not an ordinary tensor"),
        ({"w": torch.eye(3).to_sparse()}, "is not an ordinary tensor"),
        ({3: torch.ones(2)}, "is not a name"),
    )
    for state, told in cases:
        torch.save(state, tmp_path / "a.bin")
        with pytest.raises(FormatError, match=told):
            open_model(tmp_path / "a.bin")
