"""Load models with transformers: the arguments, without progress bars, and with errors as one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merging.errors import InputError
from merging.hub.address import hub_address, local_path
from merging.sources.links import check_inside

__all__ = ["explain_errors", "loading_options", "quiet"]


def loading_options(base: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or name that transformers loads, and the options for its revision and subfolder.

    Raises :class:`~merging.errors.InputError` for a base that is no folder: running a model needs its config.
    """
    address = hub_address(base)
    if address is not None and address.in_store:
        raise InputError(f"{base}: the base has to run, from a folder on this disk: download it, and name the folder")
    if address is None:
        folder = local_path(base)
        if not folder.is_dir():
            raise InputError(f"{base}: is not a folder of a model: it has to run, so its config is needed")
        for path in folder.rglob("*"):  # transformers would follow any link
            check_inside(path, folder)
        return str(folder), {}
    revision = {"revision": address.revision} if address.revision else {}
    return address.repo, {**revision, **({"subfolder": address.path} if address.path else {})}


@contextmanager
def explain_errors(base: str) -> Iterator[None]:
    """Turn an error of transformers into one message."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, KeyError, ImportError)) and type(error) is not Exception:
            raise  # a tokenizer's file that is not understood is a plain Exception
        reason = " ".join(str(error).split())
        raise InputError(f"{base}: cannot be loaded by transformers: {reason[:300]}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and remarks. The caller reports missing tensors itself."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
