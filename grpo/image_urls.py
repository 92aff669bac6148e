"""The file at a URL, for rows whose images are named so: asked for by `model.image_urls`, off by default.

A data set is a stranger's, so what it names is fetched with care: http and https alone, from public addresses alone (a
name is resolved once, and the address that was checked is the one connected to), at most `REDIRECTS` redirects, each
checked alike, a limited size and time, no cookies, keys or proxies. What comes is read as any other file of an image.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

SECONDS = 30.0
"""For one image, redirects included."""
REDIRECTS = 3
PIECE = 1 << 16
MOVED = (301, 302, 303, 307, 308)
IN_USE = ipaddress.IPv6Network("2000::/3")
"""IPv6 addresses that anybody may hold. Others hide IPv4 ones (::/8, 64:ff9b::/96) or belong to a site (fec0::/10)."""
OF_HOSTS = frozenset({"168.63.129.16"})
"""Global by their number, and answered by the machine's own host: Azure's."""


class Unfetchable(Exception):
    """Why nothing came from a URL, in a clause."""


def fetch(url: str, most_bytes: int) -> bytes:
    """The bytes at `url`, no more than `most_bytes`. Raises Unfetchable."""
    give_up = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        try:
            found = answer(url, most_bytes, give_up)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            check_time(give_up)
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise Unfetchable(f"cannot be downloaded ({why})") from None
    raise Unfetchable(f"cannot be downloaded: more than {REDIRECTS} redirects")


def check_time(give_up: float) -> None:
    """Raise Unfetchable from `give_up` on, a time of `time.monotonic`."""
    if time.monotonic() >= give_up:
        raise Unfetchable(f"did not come within {SECONDS:g} s")


def answer(url: str, most_bytes: int, give_up: float) -> bytes | str:
    """What is at `url`, or the URL that it redirects to."""
    host, port, path, secure = parts_of(url)
    check_time(give_up)
    address = public_address(host, port, give_up)
    with socket.create_connection((address, port), max(0.1, min(10.0, give_up - time.monotonic()))) as plain:
        if not secure:
            return exchanged(plain, http.client.HTTPConnection(host, port), path, most_bytes, give_up)
        with secured(plain, host) as private, ending_at(private, give_up):
            private.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.default_port = 443  # left out of the Host header, which some addresses are signed with
            return exchanged(private, connection, path, most_bytes, give_up)


def parts_of(url: str) -> tuple[str, int, str, bool]:
    """Host, port and path of `url`, and whether it is of https. Raises Unfetchable."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise Unfetchable("is no URL that can be read; correct it") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Unfetchable("is no URL of http or https; download it, and give its path")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, port, path, parts.scheme == "https"


@contextmanager
def ending_at(link: socket.socket, give_up: float) -> Iterator[None]:
    """Within it `link` is shut down at `give_up`: a server that sends a byte now and then passes every timeout, in a
    header as in a body."""

    def end() -> None:
        try:
            socket.socket.shutdown(link, socket.SHUT_RDWR)  # not TLS's own, which takes its state from under a reader
        except OSError:
            pass  # it has ended

    timer = threading.Timer(max(0.0, give_up - time.monotonic()), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exchanged(
    link: socket.socket, connection: http.client.HTTPConnection, path: str, most_bytes: int, give_up: float
) -> bytes | str:
    """A request's answer over `link`, or the URL that it redirects to."""
    connection.sock = link
    with ending_at(link, give_up):
        connection.request("GET", quoted(path), headers={"User-Agent": "grpo", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in MOVED and (place := response.getheader("Location")):
            return place
        if response.status != 200:
            check_time(give_up)
            raise Unfetchable(f"cannot be downloaded: the server answers {response.status}")
        data = bytearray()
        while piece := response.read1(PIECE):
            data += piece
            if len(data) > most_bytes:
                raise Unfetchable(f"has more than {most_bytes:,} bytes; scale it down")
        check_time(give_up)  # an end that was made here looks like the server's
        if response.length:
            raise Unfetchable("cannot be downloaded: the connection ended early")
        return bytes(data)


def secured(plain: socket.socket, host: str) -> ssl.SSLSocket:
    """`plain` with TLS, the certificate being that of `host`; the handshake is still to be made."""
    context = ssl.create_default_context()
    return context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


def public_address(host: str, port: int, give_up: float) -> str:
    """An address of `host`, found by `give_up`. Raises Unfetchable where one of its addresses is not a public one."""
    found = looked_up(host, port, give_up)
    for address in found:
        if not is_public(address):
            raise Unfetchable(f"is at {address}, an address of a private network; download it, and give its path")
    return found[0]


def looked_up(host: str, port: int, give_up: float) -> list[str]:
    """The addresses of `host`. Raises TimeoutError at `give_up`: the system's look-up takes no limit, so it has a
    thread of its own, which is left to end when a name server's silence does."""
    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result([str(entry[4][0]) for entry in entries])
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=look_up, daemon=True).start()
    return found.result(max(0.0, give_up - time.monotonic()))


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's to ask: neither this machine's nor its networks'."""
    place = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(place, ipaddress.IPv6Address):
        if place not in IN_USE or place.sixtofour is not None and not is_public(str(place.sixtofour)):
            return False
    return place.is_global and not place.is_multicast and str(place) not in OF_HOSTS


def quoted(path: str) -> str:
    """`path` as a request's line takes it: without blanks and letters beyond ASCII."""
    from urllib.parse import quote

    return quote(path, safe="/?&=%:@!$'()*+,;~-._[]")
