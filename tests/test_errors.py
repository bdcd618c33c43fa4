"""Messages of errors can be printed, whatever a file holds."""

from __future__ import annotations

from merging.errors import FormatError


def test_messages_can_be_printed() -> None:
    r"""What a file holds may be an escape of a terminal, half a character, or a book."""
    message = str(FormatError("a\x1b[2J\u202e\ud800\0 b\nc é 模型"))
    assert message == "a\\x1b[2J\\u202e\\ud800\\x00 b\\nc é 模型"
    assert len(str(FormatError("x" * 10**6))) < 6100
