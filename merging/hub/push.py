"""Publishing an output on the Hub: one commit on top of the state that was checked before the merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import InputError, OptionError, OutputError, either, option
from merging.hub.address import hub_address
from merging.hub.client import api, endpoint, explain_error, offline, with_retries
from merging.sources.links import check_inside

__all__ = ["Target", "push", "target_of"]

_OURS = (".gitattributes", "README.md", "LICENSE")
"""Files that an unused repository may hold."""


@dataclass(frozen=True, slots=True)
class Target:
    """The repository for an output: ``parent`` is its last commit, None if the repository is to be created."""

    repo: str
    private: bool
    parent: str | None


def target_of(name: str, *, private: bool, overwrite: bool) -> Target:
    """Check, before anything is merged, the repository that an output is to be published in.

    Args:
        name: The repository, ``org/name``.
        private: Whether a new repository is private.
        overwrite: Whether a model that it holds may be replaced.

    Returns:
        The repository and its last commit.

    Raises:
        OptionError: ``name`` is not the name of a repository, or the Hub must not be used.
        InputError: There is no token, or the Hub cannot be reached.
        OutputError: The repository holds a model, and ``overwrite`` is not set.
    """
    address = hub_address(name if name.startswith("hf://") else f"hf://{name}")
    if address is None or address.revision or address.path:
        raise OptionError(f"{option('push', name)}: write ORG/NAME")
    if offline():
        raise OptionError(f"{option('push', name)}: HF_HUB_OFFLINE is set, so nothing can be published: unset it")
    _check_token(name)
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def look() -> Any:
        try:
            return api().model_info(address.repo)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            return None

    info = with_retries(look, address.repo)
    if info is None:
        return Target(address.repo, private, None)
    held = [each.rfilename for each in info.siblings or [] if not each.rfilename.startswith(_OURS)]
    if held and not overwrite:
        raise OutputError(
            f"{address.repo}: holds {held[0]} and {len(held) - 1} more files on the Hub: choose another name, or use "
            f"{option('overwrite', True)}, which replaces them in a new commit"
        )
    return Target(address.repo, private, info.sha)


def _check_token(name: str) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(
            f"{option('push', name)}: log in first, with `hf auth login` or HF_TOKEN, and a token that may write"
        )
    with_retries(lambda: api().whoami(), "your token")


def push(folder: Path, target: Target, message: str) -> str:
    """Publish a folder as one commit, which replaces the repository's content.

    Args:
        folder: The complete output.
        target: The repository, from :func:`target_of`.
        message: The commit's message.

    Returns:
        The permanent address of the output, ``org/name@commit``.

    Raises:
        FormatError: The folder contains a link that leads out of it.
        OutputError: Someone else changed the repository since it was checked, or the Hub refuses the commit. Nothing
            is published then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    found = [check_inside(path, folder) for path in sorted(folder.rglob("*"))]
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    try:
        parent = target.parent or _create(target)
        held = {each.rfilename for each in api().model_info(target.repo, revision=parent).siblings or []}
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        gone = held - files.keys() - {".gitattributes"}
        operations += [CommitOperationDelete(name) for name in sorted(gone)]
        commit = api().create_commit(target.repo, operations, commit_message=message, parent_commit=parent)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise OutputError(
                f"{target.repo}: was changed by someone else meanwhile: nothing was published. {folder} is complete: "
                f"look at what is there, then publish it with "
                + either(f"`merge push {folder} {target.repo} --overwrite`", "overwrite=True")
            ) from None
        raise _push_error(error, folder, target) from None
    except OSError as error:
        raise _push_error(error, folder, target) from None
    return f"{target.repo}@{commit.oid}"


def _create(target: Target) -> str:
    api().create_repo(target.repo, private=target.private, exist_ok=False)
    return str(api().model_info(target.repo).sha)


def _push_error(error: Exception, folder: Path, target: Target) -> OutputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        reason = f"your token may not write to {target.repo} on {endpoint()}"
    elif status == 409:
        reason = f"{target.repo} was created by someone else meanwhile"
    else:
        reason = str(explain_error(error, target.repo))
    again = either(f"with `merge push {folder} {target.repo}`", "to push it")
    return OutputError(f"nothing was published: {reason}. {folder} is complete: try again {again}")
