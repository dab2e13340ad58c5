"""Weights by URL: nothing is read that has no checksum or another one."""

import hashlib
import http.client
from pathlib import Path

import pytest

from kwta_exp.download import fetch, is_url
from kwta_exp.errors import UserError


@pytest.fixture
def published(tmp_path: Path) -> tuple[str, str]:
    """A URL and the checksum of what is there."""
    path = tmp_path / "net work.pth"
    path.write_bytes(b"weights")
    return path.as_uri(), hashlib.sha256(b"weights").hexdigest()


def test_a_file_with_the_right_checksum_is_fetched_once(published: tuple[str, str], tmp_path: Path) -> None:
    url, sha256 = published
    path = fetch(url, sha256, tmp_path / "kept")
    assert path.read_bytes() == b"weights"
    assert path.name.endswith("net work.pth")
    (tmp_path / "net work.pth").unlink()
    assert fetch(url, sha256, tmp_path / "kept") == path


def test_without_a_checksum_it_is_told_and_nothing_more(published: tuple[str, str], tmp_path: Path) -> None:
    url, sha256 = published
    with pytest.raises(UserError, match=rf"weights_sha256=null.*add weights_sha256={sha256}"):
        fetch(url, None, tmp_path / "kept")


def test_another_checksum_is_refused(published: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights_sha256=0{64}.*nothing of it was read"):
        fetch(published[0], "0" * 64, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["unverified-net work.pth"]


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be fetched"):
        fetch((tmp_path / "none.pth").as_uri(), "0" * 64, tmp_path)
    with pytest.raises(UserError, match=r"expected a path, or a URL of https, http, file"):
        fetch("ftp://example.org/a.pth", "0" * 64, tmp_path)
    assert is_url("https://example.org/a.pth")
    assert not is_url("C:/a.pth")


def test_a_cut_connection_and_a_bad_url_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("https://exa mple.org/net.pth", "0" * 64, tmp_path)

    def cut(*args: object, **kwargs: object) -> None:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr("urllib.request.urlopen", cut)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("https://example.org/net.pth", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []
