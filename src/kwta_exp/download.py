"""Fetching one file from a URL, trusted by its checksum alone."""

import http.client
import logging
import urllib.parse
import urllib.request
from pathlib import Path

from kwta_exp.errors import UserError
from kwta_exp.storage import sha256_of_file, write_bytes

log = logging.getLogger(__name__)

SCHEMES = ("https", "http", "file")


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL rather than a path."""
    return "://" in text


def fetch(url: str, sha256: str | None, folder: Path) -> Path:
    """The file behind ``url``, kept in ``folder`` under its name and checksum.

    Without a checksum the file is fetched and its checksum told, and that is all: nothing reads a file
    that nobody vouched for.

    Raises:
        UserError: if the file cannot be had, has another checksum, or none was given.
    """
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in SCHEMES:
        raise UserError(f"weights={url}: expected a path, or a URL of {', '.join(SCHEMES)}")
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "weights"
    if sha256 is not None:
        kept = folder / f"{sha256[:16]}-{name}"
        if kept.is_file() and sha256_of_file(kept) == sha256:
            return kept
    fetched = folder / f"unverified-{name}"
    try:
        log.info("fetching %s", url)
        with urllib.request.urlopen(url, timeout=60) as response:
            write_bytes(fetched, response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"weights={url}: cannot be fetched ({error})") from error
    found = sha256_of_file(fetched)
    if sha256 is None:
        raise UserError(
            "weights_sha256=null: a checkpoint from the network is used on the word of its checksum alone."
            f" The file now at {fetched} has SHA-256 {found}; if that is the one you mean,"
            f" add weights_sha256={found}"
        )
    if found != sha256:
        raise UserError(f"weights_sha256={sha256}: {url} has SHA-256 {found}; nothing of it was read")
    return fetched.replace(kept)
