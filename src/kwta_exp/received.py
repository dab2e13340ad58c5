"""Files that anybody may have made, looked at before they are read: what they are, and how large inside."""

import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path

MOST_EXPANDED = 2**32
"""Bytes that an archive may always expand to."""

MOST_EXPANSION = 100
"""A larger archive may expand to this multiple of its own size: images compress up to ten times."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_size(path: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to; nothing is opened.

    Anything else cannot be read to its end: a pipe waits for a writer, a device may go on for ever.

    Raises:
        ValueError: saying what is there instead.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        there = "a link to what is not there" if path.is_symlink() else "no such file"
        raise ValueError(there) from error
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, not a file")
    return found.st_size


def require_plain(path: Path) -> None:
    """Refuse what is no regular file, and an archive that would fill the memory.

    A zip archive, such as ``.npz`` and torch files are, is refused if its members together are larger than
    :data:`MOST_EXPANDED` and than :data:`MOST_EXPANSION` times the file, or are packed in a way that bounds
    nothing. Readers take no more of a member than the archive says that it holds.

    Raises:
        ValueError: saying why.
        OSError: if it cannot be read.
    """
    size = regular_size(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                _refuse_bomb(archive.infolist(), size)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(str(error)) from error


def _refuse_bomb(members: Sequence[zipfile.ZipInfo], size: int) -> None:
    if {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ValueError("packed by another method than deflate")
    expanded = sum(member.file_size for member in members)
    if expanded > max(MOST_EXPANDED, MOST_EXPANSION * size):
        raise ValueError(
            f"{size:,} bytes that expand to {expanded:,}; expected {MOST_EXPANDED:,} or"
            f" {MOST_EXPANSION} times the file at most"
        )
