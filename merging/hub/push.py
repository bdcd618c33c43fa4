"""Publishing an output on the Hub: one commit, on top of the very state that was looked at before the merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import InputError, OptionError, OutputError
from merging.hub.address import hub_address
from merging.hub.client import api, endpoint, explained, offline, patiently
from merging.sources.links import check_inside

__all__ = ["Target", "push", "target_of"]

_OURS = (".gitattributes", "README.md", "LICENSE")
"""Files that a repository may hold without being a model that is in use."""


@dataclass(frozen=True, slots=True)
class Target:
    """The repository that an output goes to: ``parent`` is its last commit, None if it is yet to be created."""

    repo: str
    private: bool
    parent: str | None


def target_of(name: str, *, private: bool, overwrite: bool) -> Target:
    """The repository of that name, looked at before anything is merged.

    Raises :class:`~merging.errors.OptionError` for what is no name, :class:`~merging.errors.InputError` without a
    token, and :class:`~merging.errors.OutputError` for a repository that holds a model, unless it may be overwritten.
    """
    address = hub_address(name if name.startswith("hf://") else f"hf://{name}")
    if address is None or address.revision or address.path:
        raise OptionError(f"--push {name}: write ORG/NAME")
    if offline():
        raise OptionError(f"--push {name}: HF_HUB_OFFLINE is set, so nothing can be published: unset it")
    _check_token(name)
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def look() -> Any:
        try:
            return api().model_info(address.repo)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            return None

    info = patiently(look, address.repo)
    if info is None:
        return Target(address.repo, private, None)
    held = [each.rfilename for each in info.siblings or [] if not each.rfilename.startswith(_OURS)]
    if held and not overwrite:
        raise OutputError(
            f"{address.repo}: holds {held[0]} and {len(held) - 1} more files on the Hub: choose another name, or use "
            f"--overwrite, which replaces them in a new commit"
        )
    return Target(address.repo, private, info.sha)


def _check_token(name: str) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"--push {name}: log in first, with `hf auth login` or HF_TOKEN, and a token that may write")
    patiently(lambda: api().whoami(), "your token")


def push(folder: Path, target: Target, message: str) -> str:
    """Publish a folder as one commit, and return the address that means it for ever.

    What the repository held is replaced. Raises :class:`~merging.errors.FormatError` for a link out of the folder, and
    :class:`~merging.errors.OutputError` if someone else has changed the
    repository since it was looked at: nothing is published then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    found = [check_inside(path, folder) for path in sorted(folder.rglob("*"))]
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}
    try:
        parent = target.parent or _created(target)
        held = {each.rfilename for each in api().model_info(target.repo, revision=parent).siblings or []}
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        gone = held - files.keys() - {".gitattributes"}
        operations += [CommitOperationDelete(name) for name in sorted(gone)]
        commit = api().create_commit(target.repo, operations, commit_message=message, parent_commit=parent)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 412:
            raise OutputError(
                f"{target.repo}: was changed by someone else meanwhile: nothing was published. {folder} is complete: "
                f"look at what is there, then publish it with `merge push {folder} {target.repo} --overwrite`"
            ) from None
        raise _failed(error, folder, target) from None
    except OSError as error:
        raise _failed(error, folder, target) from None
    return f"{target.repo}@{commit.oid}"


def _created(target: Target) -> str:
    api().create_repo(target.repo, private=target.private, exist_ok=False)
    return str(api().model_info(target.repo).sha)


def _failed(error: Exception, folder: Path, target: Target) -> OutputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        reason = f"your token may not write to {target.repo} on {endpoint()}"
    elif status == 409:
        reason = f"{target.repo} was created by someone else meanwhile"
    else:
        reason = str(explained(error, target.repo))
    return OutputError(
        f"nothing was published: {reason}. {folder} is complete: try again with `merge push {folder} {target.repo}`"
    )
