"""Addresses in object stores, the connection to them, and the errors of each way to get them wrong."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from merging.errors import InputError
from merging.object_stores.address import check_address, file_path, hide_secrets, is_store_address
from merging.object_stores.connection import ask_store, connect, explain_store_error
from merging.object_stores.retries import Unreachable


@pytest.mark.parametrize(
    ("name", "is_address"),
    [
        ("s3://bucket/folder", True),
        ("memory://folder", True),
        ("file:///folder", True),
        ("sftp://host/folder", True),  # refused by name, and no missing local path
        ("hf://org/name", False),
        ("https://huggingface.co/org/name", False),
        ("org/name", False),
        ("folder/s3://x", False),
    ],
)
def test_addresses_are_known_by_their_scheme(name: str, is_address: bool) -> None:
    assert is_store_address(name) is is_address


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s4://bucket/a", r"s4://bucket/a: there is no scheme s4://: s3://, .* are known"),
        ("s3://", "names no bucket: write s3://BUCKET/FOLDER"),
        ("s3://bucket/a/../b", r"is not a path in a bucket"),
        ("s3://bucket//a", r"is not a path in a bucket"),
        ("s3://bucket/a\nb", r"is not a path in a bucket: .* control characters"),
        ("s3://bucket/a\udcff", r"is not a path in a bucket"),
        ("s3://KEY:hunter2@bucket/a", r"s3://\.\.\.@bucket/a: an address with a user or key in it would be written"),
        ("s3://KEY:hunter2/hunter2@bucket/a", r"s3://\.\.\.@bucket/a: an address with a user or key in it would be"),
        ("s3://KEY:a@hunter2@bucket/a", r"s3://\.\.\.@bucket/a: an address with a user or key in it would be written"),
        ("s3://bucket/a?versionId=hunter2", r"s3://bucket/a\?\.\.\.: an address has no query"),
        ("az://user:hunter2@account.dfs.core.windows.net/a", "an address with a user or key in it"),
    ],
)
def test_wrong_addresses_are_refused_without_their_secrets(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check_address(name)
    assert "hunter2" not in str(caught.value)


def test_addresses_are_normalized() -> None:
    assert check_address("s3://bucket/a/b/") == "s3://bucket/a/b"
    assert check_address("s3://bucket/") == "s3://bucket"
    assert check_address("abfs://box@account.dfs.core.windows.net/a") == "abfs://box@account.dfs.core.windows.net/a"
    assert file_path("file:///a/b c") == Path("/a/b c")
    with pytest.raises(InputError, match="write file:///FOLDER"):
        file_path("file://host/a")


def test_secrets_are_hidden_in_any_text() -> None:
    text = 'Cannot reach "https://user:hunter2@host/path?sig=hunter2" (s3://b/a@v1)'
    assert hide_secrets(text) == 'Cannot reach "https://...@host/path?..." (s3://b/a@v1)'
    for plain in ("http://127.0.0.1:9000/a@v1", "s3://arn:aws:s3:us-east-1:1:accesspoint/box/a@v1"):
        assert hide_secrets(plain) == plain


def test_a_connection_is_a_file_system_and_a_path() -> None:
    system, path = connect("memory://box/folder/")
    system.pipe_file(f"{path}/a", b"abc")
    assert system.cat_file(connect("memory://box/folder/a")[1], 1, 3) == b"bc"
    assert connect("file:///a/b")[1] == "/a/b"


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(
        InputError, match=r"read and written with s3fs, .* not installed: pip install 'merging\[fsspec\]'"
    ):
        connect("s3://bucket/a")


class NoCredentialsError(Exception):
    """Named like the error of botocore, which is not installed everywhere."""


class ParamValidationError(Exception):
    """Named like the error of botocore for a bucket's name that is not allowed."""


class HttpError(OSError):
    """An error with the status of an answer, as the drivers' libraries raise it."""

    def __init__(self, status: int) -> None:
        super().__init__(errno.EIO, f"answered {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoCredentialsError("Unable to locate credentials"), "the store wants credentials, and none are found: `aws"),
        (PermissionError("Access Denied"), r"refuses access \(Access Denied\): check the credentials: `aws"),
        (FileNotFoundError("The specified bucket does not exist"), "s3://bucket/a: there is no bucket bucket"),
        (FileNotFoundError("my-bucket/container/a"), "s3://bucket/a: there is no such file or folder"),
        (ValueError("Must provide an account_name with credentials!!"), "wants credentials, and none are found: `aws"),
        (
            ParamValidationError('Parameter validation failed:\nInvalid bucket name "b b"'),
            'refuses the request: Parameter validation failed: Invalid bucket name "b b": check the address',
        ),
        (FileNotFoundError("bu/a"), "s3://bucket/a: there is no such file or folder"),
        (HttpError(501), "refuses the request: .*answered 501"),
        (HttpError(503), "cannot be reached, or fails: .*answered 503: try again later"),
    ],
)
def test_errors_of_stores_say_what_to_do(error: Exception, said: str) -> None:
    explained = explain_store_error(error, "s3://bucket/a")
    with pytest.raises(InputError, match=said):
        raise explained
    assert isinstance(explained, Unreachable) is ("try again later" in said)


def test_passing_failures_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("merging.object_stores.retries.time.sleep", waits.append)
    answers: list[Exception] = [HttpError(503), ConnectionResetError("reset")]

    def ask() -> str:
        if answers:
            raise answers.pop(0)
        return "here"

    assert ask_store(ask, "s3://bucket/a") == "here"
    assert len(waits) == 2
    answers += [HttpError(503)] * 9
    with pytest.raises(Unreachable, match="try again later"):
        ask_store(ask, "s3://bucket/a")
    assert len(answers) == 6  # three tries


def test_lasting_failures_are_not_tried_again() -> None:
    answers: list[Exception] = [HttpError(403), PermissionError("no")]

    def ask() -> str:
        raise answers.pop(0)

    with pytest.raises(InputError, match="refuses access"):
        ask_store(ask, "s3://bucket/a")
    assert len(answers) == 1
