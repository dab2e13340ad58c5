"""Weights from a URL: read only if their checksum is given and matches; no server can block a run for ever."""

import contextlib
import hashlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kwta_exp import download
from kwta_exp.download import fetch, is_url
from kwta_exp.errors import UserError

SHA256 = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def published(tmp_path: Path) -> str:
    """The URL of a file whose checksum is :data:`SHA256`."""
    path = tmp_path / "net work.pth"
    path.write_bytes(b"weights")
    return path.as_uri()


class _Handler(BaseHTTPRequestHandler):
    """Gives the answer that its path names."""

    def log_message(self, *args: object) -> None: ...

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the other side hung up
            ANSWERS[self.path.split("/")[1]](self)


def _send(handler: _Handler, content: bytes, length: object = None, code: int = 200, **headers: str) -> None:
    handler.send_response(code)
    for name, value in headers.items():
        handler.send_header(name, value)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(content)


def _endless(handler: _Handler) -> None:
    _send(handler, b"")
    while True:
        handler.wfile.write(b"\0" * 10_000)


def _drip(handler: _Handler) -> None:
    _send(handler, b"")
    for _ in range(1000):
        handler.wfile.write(b"\0")
        time.sleep(0.01)


def _stall(handler: _Handler) -> None:
    _send(handler, b"wei", 7)
    OVER.wait(20)


def _drip_headers(handler: _Handler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(1000):
        handler.wfile.write(b"X")
        time.sleep(0.01)


def _endless_redirect(handler: _Handler) -> None:
    _send(handler, b"", None, 302, Location="/right/net.pth")
    while True:
        handler.wfile.write(b"\0" * 10_000)


ANSWERS: dict[str, Callable[[_Handler], object]] = {
    "right": lambda handler: _send(handler, b"weights", 7),
    "unannounced": lambda handler: _send(handler, b"weights"),
    "endless": _endless,
    "large": lambda handler: _send(handler, b"", 10**12),
    "drip": _drip,
    "stall": _stall,
    "headers": _drip_headers,
    "short": lambda handler: _send(handler, b"wei", 7),
    "missing": lambda handler: _send(handler, b"", 0, 404),
    "garbage": lambda handler: handler.wfile.write(b"\x1b[31mgarbage\r\n\r\n"),
    "nothing": lambda handler: None,
    "reason": lambda handler: handler.wfile.write(b"HTTP/1.0 500 " + b"\x1b[2J" * 1000 + b"\r\n\r\n"),
    "to-file": lambda handler: _send(handler, b"", 0, 302, Location="file:///etc/passwd"),
    "to-ftp": lambda handler: _send(handler, b"", 0, 302, Location="ftp://127.0.0.1/x"),
    "to-right-endless": _endless_redirect,
    "to-right": lambda handler: _send(handler, b"", 0, 302, Location="/right/net.pth"),
    "round": lambda handler: _send(handler, b"", 0, 302, Location="/round/" + os.urandom(4).hex()),
    "nowhere": lambda handler: _send(handler, b"", 0, 302, Location="http://["),
}
OVER = threading.Event()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a local server that gives all of :data:`ANSWERS`."""
    OVER.clear()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}"
    OVER.set()
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def test_a_file_with_the_right_checksum_is_fetched_once(published: str, tmp_path: Path) -> None:
    path = fetch(published, SHA256, tmp_path / "kept")
    assert path.read_bytes() == b"weights"
    assert path.name == f"{SHA256[:16]}-net_work.pth"
    assert list((tmp_path / "kept").iterdir()) == [path]
    (tmp_path / "net work.pth").unlink()
    assert fetch(published, SHA256, tmp_path / "kept") == path


@pytest.mark.parametrize("answer", ["right", "unannounced", "to-right", "to-right-endless"])
def test_a_file_from_a_server_is_fetched(answer: str, server: str, tmp_path: Path) -> None:
    assert fetch(f"{server}/{answer}/net.pth", SHA256, tmp_path).read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == [f"{SHA256[:16]}-net.pth"]


def test_without_a_checksum_the_error_gives_it_and_the_file_is_not_read(published: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"weights_sha256=null.*add weights_sha256={SHA256}"):
        fetch(published, None, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["unverified-net_work.pth"]


def test_a_file_with_another_checksum_is_deleted(published: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights_sha256=0{64}.*it was deleted"):
        fetch(published, "0" * 64, tmp_path / "data" / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["net work.pth"]


REFUSED = {
    "endless": "longer than 100,000 bytes",
    "large": "longer than 100,000 bytes",
    "short": "ended after 3 of 7 bytes",
    "missing": "HTTP Error 404",
    "garbage": r"\x1b[31mgarbage",
    "nothing": "Remote end closed connection",
    "reason": r"HTTP Error 500: \x1b[2J",
    "to-file": "redirects from http to file:///etc/passwd, which is not followed",
    "to-ftp": "redirects from http to ftp://127.0.0.1/x, which is not followed",
    "round": "redirects more than 10 times",
    "nowhere": "Invalid IPv6 URL",
}


@pytest.mark.parametrize("sha256", [None, SHA256], ids=["unverified", "verified"])
@pytest.mark.parametrize("answer", REFUSED)
def test_a_failed_download_is_one_message_and_leaves_no_file(
    answer: str, sha256: str | None, server: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^weights=http://127.*: cannot be fetched \(") as caught:
        fetch(f"{server}/{answer}/net.pth", sha256, tmp_path / "data" / "weights")
    assert REFUSED[answer] in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "limit", "said"),
    [
        ("drip", "MAX_SECONDS", "not complete after 0.5 seconds"),
        ("headers", "TIMEOUT_SECONDS", "no answer within 0.5 seconds"),
        ("stall", "TIMEOUT_SECONDS", r"timed out|no answer within 0\.5 seconds"),
    ],
)
def test_a_slow_server_times_out(
    answer: str, limit: str, said: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, limit, 0.5)
    with pytest.raises(UserError, match=rf"cannot be fetched \(({said})"):
        fetch(f"{server}/{answer}/net.pth", SHA256, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_port_is_one_message(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"cannot be fetched .*refused"):
            fetch(f"http://127.0.0.1:{unused.getsockname()[1]}/net.pth", SHA256, tmp_path)


@pytest.mark.parametrize(
    ("url", "target", "found"),
    [
        ("http://example.org/a/b", "c", "http://example.org/a/c"),
        ("http://example.org/a", "https://example.com/b", "https://example.com/b"),
        ("https://example.org/a", "//example.com/b", "https://example.com/b"),
        ("https://example.org/a", "http://example.org/a", None),
        ("https://example.org/a", "file:///etc/passwd", None),
        ("http://example.org/a", "data:text/plain,x", None),
    ],
)
def test_a_redirect_to_a_weaker_scheme_is_refused(url: str, target: str, found: str | None) -> None:
    if found is not None:
        assert download._redirected(url, target) == found
        return
    with pytest.raises(ValueError, match=r"redirects from https? to .*, which is not followed"):
        download._redirected(url, target)


MALFORMED = {
    "http://[": "Invalid IPv6 URL",
    "http://": "expected a host",
    "https:///net.pth": "expected a host",
    "http://example.org:99999/": "Port out of range",
    "http://example.org:x/": "Port could not be cast",
    "http://example.org:0/": "a port above 0",
    "http://exa mple.org/net.pth": "spaces or control characters",
    "http://example.org/a\r\nHost: b": "spaces or control characters",
    "http://example.org/\x1b[31m": "spaces or control characters",
    "http://example.org/\u202egnp": "spaces or control characters",
    "http://" + "a" * 10_000: "10,007 characters; expected at most 2,000",
    "ftp://example.org/a.pth": "expected a path, or a URL of https, http, file",
    "data://text/plain,x": "expected a path, or a URL",
    "://": "expected a path, or a URL",
    "file://example.org/net.pth": "expected a file of this machine",
    "http://user:secret@example.org/net.pth": "contains a user or password",
    "file:///dev/zero": "cannot be fetched (a device, not a file)",
    "file:///": "cannot be fetched (a folder, not a file)",
    "file:///nowhere/net.pth": "cannot be fetched (no such file)",
    "file:///a%00b": "cannot be fetched (embedded null byte)",
    "http://a..b/net.pth": "cannot be fetched",
    "http://127.0.0.1:9/\u00fc": "cannot be fetched",
}


@pytest.mark.parametrize("url", MALFORMED, ids=lambda url: ascii(url)[:40])
def test_a_malformed_url_is_one_message(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^weights=") as caught:
        fetch(url, SHA256, tmp_path / "data")
    message = str(caught.value)
    assert MALFORMED[url] in message
    assert "secret" not in message
    assert len(message) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", "weights"),
        ("/", "weights"),
        ("/net.safetensors?download=true", "net.safetensors"),
        ("/..", "weights"),
        ("/a/..%2f..%2fetc%2fpasswd", "passwd"),
        ("/%2e%2e", "weights"),
        ("/a%00b%0a.pth", "a_b_.pth"),
        ("/" + "x" * 500 + ".safetensors", "x" * 88 + ".safetensors"),
    ],
)
def test_the_file_name_from_a_url_stays_in_the_folder(path: str, name: str) -> None:
    assert download._checked_name(f"https://example.org{path}") == name


def test_a_pipe_is_not_fetched(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="a named pipe, not a file"):
        fetch((tmp_path / "pipe").as_uri(), None, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_message(published: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^paths\.data: cannot keep file:///.*Not a directory"):
        fetch(published, SHA256, tmp_path / "file" / "weights")


def test_an_interrupted_download_leaves_no_file(
    published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(published, SHA256, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_broken_connection_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: object, **kwargs: object) -> None:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", cut)
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("https://example.org/net.pth", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_urls_are_told_from_paths() -> None:
    assert is_url("https://example.org/a.pth")
    assert not is_url("C:/a.pth")
