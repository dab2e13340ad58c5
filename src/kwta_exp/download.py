"""Fetching one file from a URL, trusted by its checksum alone."""

import contextlib
import hashlib
import http.client
import logging
import os
import queue
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kwta_exp.errors import UserError
from kwta_exp.naming import as_name
from kwta_exp.received import regular_size
from kwta_exp.storage import PARTIAL, sha256_of_file

log = logging.getLogger(__name__)

SCHEMES = ("https", "http", "file")

LONGEST_URL = 2000
"""Characters; servers take no more than about so many."""

MOST_BYTES = 4 * 2**30
"""A longer response is cut, and nothing of it kept."""

SILENCE_SECONDS = 60.0
"""How long a server may send nothing, or take to begin its answer."""

MOST_SECONDS = 3600.0
"""How long it all may take."""

MOST_REDIRECTS = 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BLOCK = 2**20


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL rather than a path."""
    return "://" in text


def fetch(url: str, sha256: str | None, folder: Path) -> Path:
    """The file behind ``url``, kept in ``folder`` under its name and checksum.

    Without a checksum the file is fetched but not read, and the error gives its checksum. A download that is
    incomplete, too slow or has another checksum leaves no file behind.

    Raises:
        UserError: if the file cannot be had within :data:`MOST_BYTES` and :data:`MOST_SECONDS`, has another
            checksum, or none was given.
    """
    name = _checked_name(url)
    if sha256 is not None:
        kept = folder / f"{sha256[:16]}-{name}"
        if kept.is_file() and sha256_of_file(kept) == sha256:
            return kept
    with _temporary_in(folder, url) as temporary:
        try:
            log.info("fetching %s", url)
            found = _copy(url, temporary)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"weights={_shown(url)}: cannot be fetched ({_reason(error)})") from error
        if sha256 is None:
            fetched = temporary.replace(folder / f"unverified-{name}")
            raise UserError(
                "weights_sha256=null: a checkpoint from a URL is loaded only if its SHA-256 is given."
                f" The file now at {fetched} has SHA-256 {found}; if that is the one you mean,"
                f" add weights_sha256={found}"
            )
        if found != sha256:
            raise UserError(
                f"weights_sha256={sha256}: {_shown(url)} has SHA-256 {found}; nothing of it was read or kept"
            )
        return temporary.replace(kept)


def _checked_name(url: str) -> str:
    """A file name from the last part of a URL that is fit to be fetched."""
    try:
        if len(url) > LONGEST_URL:
            raise ValueError(f"{len(url):,} characters; expected {LONGEST_URL:,} at most")
        if not url.isprintable() or " " in url:
            raise ValueError("holds spaces or control characters; expected %20 and the like")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"expected a path, or a URL of {', '.join(SCHEMES)}")
        if "@" in parts.netloc:
            raise ValueError("holds a user or a password, which logs and records would keep; expected none")
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost"):
                raise ValueError("expected a file of this machine, file:///...")
        elif not parts.hostname or parts.port == 0:
            raise ValueError("expected a host, and a port above 0 if any")
    except ValueError as error:  # urlsplit's and its port's among them
        raise UserError(f"weights={_shown(url)}: {error}") from error
    return as_name(urllib.parse.unquote(parts.path).rpartition("/")[2]) or "weights"


def _shown(url: str) -> str:
    """``url`` as a message shows it: not its user and password, and no more than the beginning."""
    scheme, found, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    return (str(error) or type(error).__name__)[:300]


@contextlib.contextmanager
def _temporary_in(folder: Path, url: str) -> Iterator[Path]:
    """A new file that is gone at the end, unless it was renamed, and so is the folder if it was made for it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=PARTIAL)
        except OSError as error:
            raise UserError(f"paths.data: cannot keep {_shown(url)} in {folder}: {error.strerror}") from error
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _copy(url: str, to: Path) -> str:
    """Write what is behind ``url`` to a file, and say its hex SHA-256."""
    started, digest, size = time.monotonic(), hashlib.sha256(), 0
    with _opened(url) as (source, length), to.open("wb") as target:
        while size <= MOST_BYTES and (block := source.read1(_BLOCK)):
            size += len(block)
            digest.update(block)
            target.write(block)
            if time.monotonic() - started > MOST_SECONDS:
                raise TimeoutError(f"not done after {MOST_SECONDS:g} seconds, with {size:,} bytes")
        _require_size(size)
        if length is not None and size != length:
            raise ValueError(f"ended after {size:,} of {length:,} bytes")
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _require_size(size: int | None) -> None:
    if size is not None and size > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, int | None]]:
    """What is behind ``url``, to be read, and how many bytes it says that there are."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        length: int | None = regular_size(path)
        _require_size(length)
        with path.open("rb") as file:
            yield file, length
    else:
        with _answer(url) as response:
            length = response.length
            _require_size(length)
            yield response, length


def _answer(url: str) -> Any:
    """The response to a request, once its headers are there.

    A server can keep its reader waiting with a byte a minute, and so can a name that does not resolve, so
    another thread waits for them.
    """
    answers: queue.Queue[Any] = queue.Queue(1)

    def ask() -> None:
        try:
            answers.put(_followed(url))
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=SILENCE_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {SILENCE_SECONDS:g} seconds") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _followed(url: str) -> Any:
    """The response at the end of the redirects, whose own bodies, endless perhaps, are not read."""
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    for _ in range(MOST_REDIRECTS):
        try:
            return opener.open(url, timeout=SILENCE_SECONDS)
        except urllib.error.HTTPError as error:
            target = error.headers.get("Location") if error.code in _REDIRECTS else None
            if target is None:
                raise
            error.close()
            url = _redirected(url, target)
    raise ValueError(f"redirects more than {MOST_REDIRECTS} times")


def _redirected(url: str, target: str) -> str:
    """Where ``target`` leads from ``url``: from http to https, or within either."""
    found = urllib.parse.urljoin(url, target)
    old, new = (urllib.parse.urlsplit(each).scheme for each in (url, found))
    if new not in (old, "https"):
        raise ValueError(f"redirects from {old} to {_shown(found)}, which is not followed")
    return found
