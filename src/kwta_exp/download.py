"""Download one file from a URL. It is used only if it has the SHA-256 that the user gave."""

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

MAX_URL_CHARACTERS = 2000
"""Servers accept about this many."""

MAX_BYTES = 4 * 2**30
"""A longer download is stopped and deleted."""

TIMEOUT_SECONDS = 60.0
"""The longest wait for the first response, and between two blocks of data."""

MAX_SECONDS = 3600.0
"""The longest time for the whole download."""

MAX_REDIRECTS = 10

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BLOCK = 2**20


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL rather than a path."""
    return "://" in text


def fetch(url: str, sha256: str | None, folder: Path) -> Path:
    """Download the file at ``url`` to ``folder``, unless it is there already.

    Without a checksum the file is downloaded but not read, and the error gives its checksum. If the download
    is incomplete, is too slow or has another checksum, no file is left behind.

    Raises:
        UserError: if the file cannot be downloaded within :data:`MAX_BYTES` and :data:`MAX_SECONDS`, has
            another checksum, or no checksum was given.
    """
    name = _checked_name(url)
    if sha256 is not None:
        kept = folder / f"{sha256[:16]}-{name}"
        if kept.is_file() and sha256_of_file(kept) == sha256:
            return kept
    with _temporary_in(folder, url) as temporary:
        try:
            log.info("fetching %s", url)
            found = _download_to(temporary, url)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"weights={_redacted(url)}: cannot be fetched ({_reason(error)})") from error
        if sha256 is None:
            fetched = temporary.replace(folder / f"unverified-{name}")
            raise UserError(
                "weights_sha256=null: a checkpoint from a URL is loaded only if its SHA-256 is given."
                f" The file now at {fetched} has SHA-256 {found}; if this is the file you expect,"
                f" add weights_sha256={found}"
            )
        if found != sha256:
            raise UserError(
                f"weights_sha256={sha256}: the file at {_redacted(url)} has SHA-256 {found}; it was deleted"
            )
        return temporary.replace(kept)


def _checked_name(url: str) -> str:
    """Check that ``url`` can be fetched, and return a file name made from its last part."""
    try:
        if len(url) > MAX_URL_CHARACTERS:
            raise ValueError(f"{len(url):,} characters; expected at most {MAX_URL_CHARACTERS:,}")
        if not url.isprintable() or " " in url:
            raise ValueError("contains spaces or control characters; expected them encoded, such as %20")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"expected a path, or a URL of {', '.join(SCHEMES)}")
        if "@" in parts.netloc:
            raise ValueError(
                "contains a user or password, which would end up in logs and records; expected none"
            )
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost"):
                raise ValueError("expected a file of this machine, file:///...")
        elif not parts.hostname or parts.port == 0:
            raise ValueError("expected a host and, if any, a port above 0")
    except ValueError as error:  # urlsplit() and .port raise some, too
        raise UserError(f"weights={_redacted(url)}: {error}") from error
    return as_name(urllib.parse.unquote(parts.path).rpartition("/")[2]) or "weights"


def _redacted(url: str) -> str:
    """``url`` for a message: without user and password, and cut if it is long."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    return (str(error) or type(error).__name__)[:300]


@contextlib.contextmanager
def _temporary_in(folder: Path, url: str) -> Iterator[Path]:
    """A temporary file in ``folder``. Unless it was renamed, it is deleted with every folder made for it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    temporary = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=PARTIAL)
        except OSError as error:
            raise UserError(
                f"paths.data: cannot keep {_redacted(url)} in {folder}: {error.strerror}"
            ) from error
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _download_to(path: Path, url: str) -> str:
    """Write the content of ``url`` to a file and return its hex SHA-256."""
    started, digest, size = time.monotonic(), hashlib.sha256(), 0
    with _opened(url) as (source, length), path.open("wb") as target:
        _check_size(length or 0)
        while block := source.read1(_BLOCK):
            size += len(block)
            _check_size(size)
            digest.update(block)
            target.write(block)
            if time.monotonic() - started > MAX_SECONDS:
                raise TimeoutError(f"not complete after {MAX_SECONDS:g} seconds and {size:,} bytes")
        if length is not None and size != length:
            raise ValueError(f"ended after {size:,} of {length:,} bytes")
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES:,} bytes")


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, int | None]]:
    """The content of ``url`` as a binary stream, and the length that the source declares."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file":
        path = Path(urllib.request.url2pathname(parts.path))
        length = regular_size(path)
        with path.open("rb") as file:
            yield file, length
    else:
        with _response(url) as response:
            yield response, response.length


def _response(url: str) -> Any:
    """The response to a request, once its headers have arrived.

    A thread waits for them: a server can send a byte a minute, and resolving a name can take for ever, so that
    the socket's own timeout does not limit the wait.
    """
    results: queue.Queue[Any] = queue.Queue(1)

    def request() -> None:
        try:
            results.put(_open_redirected(url))
        except BaseException as error:
            results.put(error)

    threading.Thread(target=request, daemon=True).start()
    try:
        result = results.get(timeout=TIMEOUT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {TIMEOUT_SECONDS:g} seconds") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _open_redirected(url: str) -> Any:
    """The response at the end of the redirects. A redirect's own body, which may be endless, is not read."""
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "HTTP", "HTTPS", "HTTPDefaultError"):
        opener.add_handler(getattr(urllib.request, f"{handler}Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    for _ in range(MAX_REDIRECTS):
        try:
            return opener.open(url, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            target = error.headers.get("Location") if error.code in _REDIRECTS else None
            if target is None:
                raise
            error.close()
            url = _redirected(url, target)
    raise ValueError(f"redirects more than {MAX_REDIRECTS} times")


def _redirected(url: str, target: str) -> str:
    """The URL of a redirect. Its scheme must be that of ``url``, or https."""
    found = urllib.parse.urljoin(url, target)
    old, new = (urllib.parse.urlsplit(each).scheme for each in (url, found))
    if new not in (old, "https"):
        raise ValueError(f"redirects from {old} to {_redacted(found)}, which is not followed")
    return found
