"""Images at URLs: refused unless asked for, and then from public addresses alone, within limits of size and time."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo import image_urls
from grpo.errors import UserError
from grpo.image_urls import Unfetchable, fetch, is_public, public_address
from grpo.images import read_image
from tests.helpers.pictures import file_of, noise

PICTURE = file_of(noise(8, 6))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *values: Any) -> None:
        pass

    def do_GET(self) -> None:
        what, _, rest = self.path[1:].partition("/")
        if what == "to":
            self.answer(302, b"", Location="/" + rest if not rest.startswith("http") else rest.replace("~", "/"))
        elif what == "to-a-file":
            self.answer(302, b"", Location="file:///etc/hostname")
        elif what == "nowhere":
            self.answer(302, b"", Location="http://[")
        elif what == "loop":
            self.answer(302, b"", Location="/loop")
        elif what == "large":
            self.answer(200, bytes(4000))
        elif what == "short":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"only this")
            self.close_connection = True
        elif what == "slow":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif what == "a b.png?x=ä" or what.startswith("a%20b"):
            self.answer(200, PICTURE)
        else:
            self.answer(404, b"no")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on the loopback address, which counts as a public one by the name "localhost" alone."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    checked = public_address

    def address(host: str, port: int, give_up: float) -> str:
        return "127.0.0.1" if host == "localhost" else checked(host, port, give_up)

    monkeypatch.setattr(image_urls, "public_address", address)
    yield f"http://localhost:{found.server_address[1]}"
    found.shutdown()
    found.server_close()


def why(url: str, most: int = 3000) -> str:
    with pytest.raises(Unfetchable) as caught:
        fetch(url, most)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_comes_from_a_url_where_that_is_asked_for(server: str) -> None:
    wanted = read_image(PICTURE, "here")
    for url in (f"{server}/a b.png?x=ä", f"{server}/to/a b.png", f"{server}/to/to/to/a%20b"):
        for value in (url, {"path": url, "bytes": None}):
            assert read_image(value, "row 1", urls=True) == wanted
    with pytest.raises(UserError, match=r"row 1: its image http.* is a URL, and .* or set model\.image_urls = true"):
        read_image(f"{server}/a%20b", "row 1")
    with pytest.raises(UserError, match="row 1: its image http.*/nothing cannot be downloaded: the server answers 404"):
        read_image(f"{server}/nothing", "row 1", urls=True)
    assert read_image(PICTURE, "row 1", urls=True) == wanted


def test_what_a_server_may_do_ends_within_limits(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "more than 3,000 bytes" in why(f"{server}/large")
    assert "more than 3 redirects" in why(f"{server}/loop")
    assert "cannot be downloaded" in why(f"{server}/short")
    monkeypatch.setattr(image_urls, "SECONDS", 0.4)
    started = time.monotonic()
    assert "did not come within 0.4 s" in why(f"{server}/slow")
    assert time.monotonic() - started < 2


def test_a_redirect_that_is_no_url_is_a_sentence(server: str) -> None:
    assert "cannot be downloaded" in why(f"{server}/nowhere")


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port at which `answer` has one connection to itself."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError), listening.accept()[0] as link:
                answer(link)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(5)
        assert not thread.is_alive()


DRIPPING = {
    "status": (b"", b"H"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n", b"x"),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "size of a chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
    "trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X: x\r\n"),
    "redirect": (b"HTTP/1.1 302 Found\r\nLocation: /", b"x"),
}


@pytest.mark.parametrize("part", [*DRIPPING, "TLS"])
def test_a_server_that_keeps_dripping_has_no_more_time(server: str, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    first, drop = DRIPPING.get(part, (b"\x16\x03\x03\x40\x00", b"\x02"))

    def drip(link: socket.socket) -> None:
        link.recv(4096)
        link.sendall(first)
        for _ in range(400):
            link.sendall(drop)
            time.sleep(0.01)

    monkeypatch.setattr(image_urls, "SECONDS", 0.4)
    with answering(drip) as port:
        started = time.monotonic()
        assert why(f"http{'s' if part == 'TLS' else ''}://localhost:{port}/") == "did not come within 0.4 s"
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_name_server_that_keeps_silent_has_no_more_time(
    server: str, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    look_up, ended = socket.getaddrinfo, threading.Event()

    def silent(host: Any, *more: Any, **named: Any) -> Any:
        return ended.wait(30) if host == "example.org" else look_up(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(image_urls, "SECONDS", 0.4)
    redirects = "/to" * (before - 1) + "/to/http:~~example.org~a" if before else None
    started = time.monotonic()
    assert why(f"{server}{redirects}" if redirects else "http://example.org/a") == "did not come within 0.4 s"
    assert time.monotonic() - started < 2
    ended.set()


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_a_name_that_has_no_address_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(*values: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", raising)
    assert why("http://example.org/a").startswith("cannot be downloaded (")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https_checks_the_name_and_sends_it_without_its_usual_port(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    asked: list[bytes] = []

    def answer(link: socket.socket) -> None:
        with context.wrap_socket(link, server_side=True) as private:
            asked.append(private.recv(4096))
            private.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    connect = socket.create_connection
    monkeypatch.setattr(image_urls, "public_address", lambda host, port, give_up: "127.0.0.1")
    for url, host in (("https://localhost/a", b"localhost"), ("https://localhost:8443/a", b"localhost:8443")):
        with answering(answer) as port:
            monkeypatch.setattr(socket, "create_connection", lambda to, *more, at=port: connect((to[0], at), *more))
            assert fetch(url, 10) == b"ok"
        assert b"\r\nHost: " + host + b"\r\n" in asked[-1]
    with answering(answer) as port:
        monkeypatch.setattr(socket, "create_connection", lambda to, *more, at=port: connect((to[0], at), *more))
        assert "certificate" in why("https://example.org/a")


def test_no_url_and_no_redirect_leads_into_a_private_network(server: str) -> None:
    port = server.rpartition(":")[2]
    inside = [f"127.0.0.1:{port}", f"[::1]:{port}", "169.254.169.254", "10.0.0.8", "192.168.1.1", "[fd00::1]"]
    inside += ["0.0.0.0", "[::ffff:127.0.0.1]", "2130706433", "127.1"]
    for host in inside:
        for url in (f"http://{host}/a%20b", f"{server}/to/http:~~{host}~a%20b"):
            said = why(url)
            assert "an address of a private network" in said or "cannot be downloaded" in said, (url, said)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://a/b.png", "gopher://x/", "s3://a/b", "http:///x", "https://"]
)
def test_other_schemes_are_refused(url: str) -> None:
    assert "is no URL of http or https" in why(url)
    with pytest.raises(UserError):
        read_image(url, "row 1", urls=True)


def test_a_redirect_to_a_file_is_refused(server: str) -> None:
    assert "is no URL of http or https" in why(f"{server}/to-a-file")


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_an_address_is_public_only_where_it_is_global(address: Any) -> None:
    if is_public(str(address)):
        assert address.is_global and not address.is_multicast and not address.is_loopback and not address.is_private


HIDING = ("::{}", "::ffff:{}", "::ffff:0:{}", "64:ff9b::{}", "64:ff9b:1::{}", "fe80::5efe:{}")
"""The forms in which an IPv6 address has one of IPv4 in its last bits, which a network may take it for."""


@given(st.ip_addresses(v=4), st.sampled_from(HIDING))
def test_no_address_of_ipv4_hides_in_one_of_ipv6(address: ipaddress.IPv4Address, form: str) -> None:
    assert not is_public(str(ipaddress.ip_address(form.format(address))))
    moved = ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))
    assert not is_public(str(moved)) or is_public(str(address))


@given(st.one_of(*(st.ip_addresses(network=net) for net in ("fec0::/10", "fc00::/7", "fe80::/10", "ff00::/8", "::/8"))))
def test_addresses_of_a_site_are_not_public(address: ipaddress.IPv6Address) -> None:
    assert not is_public(str(address)) and not is_public(f"{address}%1")


def test_what_is_public_and_what_only_looks_so() -> None:
    assert is_public("93.184.216.34") and is_public("2606:4700::1111")
    assert not is_public("168.63.129.16") and not is_public("2002:a83f:8110::")


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.1.2.3")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: entries)
    with pytest.raises(Unfetchable, match=r"10\.1\.2\.3, an address of a private network"):
        public_address("example.org", 80, time.monotonic() + 5)
