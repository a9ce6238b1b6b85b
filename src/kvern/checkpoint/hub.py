"""Downloads files of a model repository from the Hugging Face hub, or from a server that speaks its routes.

A download goes to `NAME.part`, continues with an HTTP Range request after a break or a kill, is checked against its
hash and only then renamed. Large files carry a SHA-256 (LFS), small ones the SHA-1 of their git blob. What this gives
up: one connection a file; speed beyond it needs another tool.

Routes: GET /api/models/REPO/revision/REV, GET /api/models/REPO/tree/REV?recursive=true (paged by Link headers),
GET /REPO/resolve/REV/PATH.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from kvern.checkpoint.file_hash import FileHash, check_file
from kvern.errors import DownloadError

HUB_URL = "https://huggingface.co"
CHUNK_BYTES = 1 << 20

Advance = Callable[[int], None]
"""Called with the bytes of the file that are there."""


class UnreachableHubError(DownloadError):
    """The hub does not answer at all, so that another source may be tried."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit, with the hash that the hub states."""

    path: str
    size: int
    hash: FileHash


@dataclass(frozen=True)
class Hub:
    """A hub by its URL. Timeouts are seconds: to connect, and between two pieces of an answer.

    HF_TOKEN, where it is set, is sent to this URL (not along redirects to other hosts).
    """

    url: str = HUB_URL
    connect_timeout: float = 5.0
    read_timeout: float = 60.0
    attempts: int = 5
    pause: float = 1.0

    def resolve_revision(self, repo: str, revision: str) -> str:
        """The full commit of `revision`. DownloadError unless it is the pinned one, which may be abbreviated."""
        with self._errors(repo), self._client() as client:
            found = str(_json(client, f"/api/models/{repo}/revision/{revision}").get("sha", ""))
        if not found.startswith(revision):
            raise DownloadError(f"{repo}: the hub has commit {found or 'none'} where {revision} is pinned")
        return found

    def files(self, repo: str, commit: str) -> list[RemoteFile]:
        """Every file of a repository at a commit."""
        with self._errors(repo), self._client() as client:
            return [
                _remote_file(entry)
                for page in _pages(client, f"/api/models/{repo}/tree/{commit}?recursive=true")
                for entry in page
                if entry["type"] == "file"
            ]

    def download(self, repo: str, commit: str, file: RemoteFile, target: Path, advance: Advance) -> None:
        """Fetch `file` to `target`, continuing what an earlier call left in `target`.part; verified, then renamed."""
        part = target.with_name(target.name + ".part")
        route = f"/{repo}/resolve/{commit}/{quote(file.path)}"
        with self._errors(f"{repo}/{file.path}"), self._client() as client:
            self._fetch(client, route, part, file.size, advance)
        check_file(part, file.size, file.hash)
        part.replace(target)

    def _fetch(self, client: httpx.Client, route: str, part: Path, size: int, advance: Advance) -> None:
        """Append to `part` until it has `size` bytes; a dropped connection is taken up again where it broke."""
        attempt = 0
        while (have := part.stat().st_size if part.exists() else 0) != size or not part.exists():
            if have > size:
                part.unlink()
                continue
            try:
                _append(client, route, part, have, advance)
            except httpx.TransportError:
                if part.exists() and part.stat().st_size > have:
                    attempt = 0
                attempt += 1
                if attempt >= self.attempts:
                    raise
                time.sleep(self.pause * attempt)
            else:
                if part.stat().st_size < size:
                    raise DownloadError(f"{route}: the file has {part.stat().st_size:,} bytes, {size:,} are expected")

    def _client(self) -> httpx.Client:
        timeout = httpx.Timeout(self.read_timeout, connect=self.connect_timeout)
        token = os.environ.get("HF_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.url, timeout=timeout, follow_redirects=True, headers=headers)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise _status_error(what, error.response.status_code, self.url) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableHubError(f"{self.url} cannot be reached: {error or 'timed out'}") from error
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            raise DownloadError(
                f"{what}: download from {self.url} broke off: {error or type(error).__name__}",
                hint="run the same command again, it continues where it stopped",
            ) from error


def _append(client: httpx.Client, route: str, part: Path, have: int, advance: Advance) -> None:
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with client.stream("GET", route, headers=headers) as answer:
        answer.raise_for_status()
        resumed = have and answer.status_code == httpx.codes.PARTIAL_CONTENT
        with part.open("ab" if resumed else "wb") as stream:
            for chunk in answer.iter_raw():
                stream.write(chunk)
                advance(stream.tell())


def _json(client: httpx.Client, route: str) -> dict[str, Any]:
    answer = client.get(route)
    answer.raise_for_status()
    value: dict[str, Any] = answer.json()
    return value


def _pages(client: httpx.Client, route: str) -> Iterator[list[dict[str, Any]]]:
    following: str | None = route
    while following:
        answer = client.get(following)
        answer.raise_for_status()
        yield answer.json()
        following = answer.links.get("next", {}).get("url")


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs")
    stated = FileHash("sha256", lfs["oid"]) if lfs else FileHash("git", entry["oid"])
    return RemoteFile(entry["path"], int(lfs["size"] if lfs else entry["size"]), stated)


def _status_error(what: str, status: int, url: str) -> DownloadError:
    hints = {
        401: "the repository may need a token: set HF_TOKEN",
        403: "accept the model's terms on its page, then set HF_TOKEN",
        404: "the pinned file or revision is not there; the package index has the small models",
    }
    return DownloadError(f"{what}: {url} answered {status}", hint=hints.get(status, "try again later"))
