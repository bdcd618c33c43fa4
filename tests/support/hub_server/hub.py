"""What the ports of the Hub share: repositories, accounts, the log and the faults."""

from __future__ import annotations

import hashlib
import hmac
import threading
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from faults import Faults
from log import Log
from refusals import Refusal
from repositories import Objects, Repository

__all__ = ["OUTSIDER_TOKEN", "OWNER", "OWNER_TOKEN", "Account", "Hub"]

Account = Literal["owner", "outsider", None]
"""The owner may do everything, an outsider is known but has no rights; None has sent no token."""

OWNER = "me"
OWNER_TOKEN = "hf_theTokenOfTheOwner"
OUTSIDER_TOKEN = "hf_theTokenOfAnOutsider"

_SECRET = b"signs the addresses of the storage"


class Hub:
    """Everything the Hub knows. `lock` is held by whoever changes a repository."""

    def __init__(self, root: Path) -> None:
        self.objects = Objects(root / "objects")
        self.repositories: dict[str, Repository] = {}
        self.log = Log()
        self.faults = Faults()
        self.page_size = 1000
        self.lock = threading.RLock()
        self.url = self.storage_url = ""

    def account(self, authorization: str | None) -> Account:
        """Whose token it is. One that nobody has is refused, even where none is needed."""
        accounts: dict[str | None, Account] = {
            None: None,
            f"Bearer {OWNER_TOKEN}": "owner",
            f"Bearer {OUTSIDER_TOKEN}": "outsider",
        }
        if authorization not in accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return accounts[authorization]

    def signed(self, path: str) -> str:
        """The address of a path of the storage, which whoever has it may use without a token."""
        return f"{self.storage_url}{quote(path)}?signature={self._signature(path)}"

    def check_signature(self, path: str, signature: str) -> None:
        if not hmac.compare_digest(self._signature(path), signature):
            raise Refusal(403, "SignatureDoesNotMatch")

    @staticmethod
    def _signature(path: str) -> str:
        return hmac.new(_SECRET, path.encode(), hashlib.sha256).hexdigest()
