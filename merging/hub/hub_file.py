"""A weights file of a repository on the Hub, checked by its hash."""

from __future__ import annotations

from pathlib import Path

from merging.display.progress import Progress
from merging.errors import OutputError
from merging.hub.client import Unreachable, with_retries
from merging.hub.download import download, fetch_range, file_hash
from merging.hub.remote import RemoteFile

__all__ = ["HubFile"]


class HubFile(RemoteFile):
    """A file of a repository at a commit. Downloads go into the library's cache, and are checked by ``sha256``."""

    def __init__(self, repo: str, commit: str, name: str, size: int, sha256: str | None, path: Path) -> None:
        super().__init__(repo, name, size, path, sha256)
        self.commit = commit

    @property
    def label(self) -> str:
        return f"{self.repo}@{self.commit[:12]}/{self.name}"

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.repo, self.name, revision=self.commit))

    def identity(self) -> str:
        return self.sha256 or f"{self.repo}/{self.commit}/{self.name}"

    def cached_path(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, self.name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch_range(self, start: int, stop: int) -> bytes:
        return fetch_range(self.url, start, stop, self.label)

    def download_to(self, place: Path) -> None:
        download(self.url, place, self.size, self.sha256, self.label)

    def download_to_cache(self, progress: Progress | None) -> Path:
        from filelock import FileLock
        from huggingface_hub import constants, hf_hub_download

        by_library = self._in_chunks() or self.sha256 is None
        if not by_library:
            folder = f"models--{self.repo.replace('/', '--')}"
            blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / str(self.sha256)
            lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder / f"{self.sha256}.lock"  # the library's own
            try:
                blob.parent.mkdir(parents=True, exist_ok=True)
                lock.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{blob.parent}: cannot be written: {error.strerror}: set HF_HOME") from None
            with FileLock(lock):
                download(self.url, blob, self.size, self.sha256, self.label, progress=progress)
        path = Path(with_retries(lambda: hf_hub_download(self.repo, self.name, revision=self.commit), self.label))
        if by_library:
            if self.sha256 is not None and file_hash(path) != self.sha256:
                path.resolve().unlink()
                raise Unreachable(f"{self.label}: what came has another hash than the Hub states: try again")
            if progress is not None:
                progress(self.size, self.size)
        return path

    def _in_chunks(self) -> bool:
        """Whether the Hub has the file in chunks, which the library fetches faster than any single stream."""
        from importlib.util import find_spec

        from huggingface_hub import constants, get_hf_file_metadata

        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return False
        return with_retries(lambda: get_hf_file_metadata(self.url), self.label).xet_file_data is not None
