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
import time
from urllib.parse import urljoin, urlsplit

SECONDS = 30.0
"""For one image, redirects included."""
REDIRECTS = 3
PIECE = 1 << 16
MOVED = (301, 302, 303, 307, 308)


class Unfetchable(Exception):
    """Why nothing came from a URL, in a clause."""


def fetch(url: str, most_bytes: int) -> bytes:
    """The bytes at `url`, no more than `most_bytes`. Raises Unfetchable."""
    give_up = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        try:
            found = answer(url, most_bytes, give_up)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise Unfetchable(f"cannot be downloaded ({str(error)[:200] or type(error).__name__})") from None
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise Unfetchable(f"cannot be downloaded: more than {REDIRECTS} redirects")


def answer(url: str, most_bytes: int, give_up: float) -> bytes | str:
    """What is at `url`, or the URL that it redirects to."""
    connection = connected(url, give_up)
    try:
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", quoted(path), headers={"User-Agent": "grpo", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in MOVED and (place := response.getheader("Location")):
            return place
        if response.status != 200:
            raise Unfetchable(f"cannot be downloaded: the server answers {response.status}")
        data = bytearray()
        while piece := response.read1(PIECE):
            data += piece
            if len(data) > most_bytes:
                raise Unfetchable(f"has more than {most_bytes:,} bytes; scale it down")
            if time.monotonic() > give_up:
                raise Unfetchable(f"did not come within {SECONDS:g} s")
        if response.length:
            raise Unfetchable("cannot be downloaded: the connection ended early")
        return bytes(data)
    finally:
        connection.close()


def connected(url: str, give_up: float) -> http.client.HTTPConnection:
    """A connection to the host of `url`, by the address that was checked."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise Unfetchable("is no URL that can be read; correct it") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Unfetchable("is no URL of http or https; download it, and give its path")
    left = max(0.1, min(10.0, give_up - time.monotonic()))
    address = public_address(host, port)
    plain = socket.create_connection((address, port), left)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    try:
        connection.sock = secured(plain, host) if parts.scheme == "https" else plain
    except BaseException:
        plain.close()
        raise
    return connection


def secured(plain: socket.socket, host: str) -> socket.socket:
    """`plain` with TLS, the certificate being that of `host`."""
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def public_address(host: str, port: int) -> str:
    """An address of `host`. Raises Unfetchable where one of its addresses is not a public one."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(address):
            raise Unfetchable(f"is at {address}, an address of a private network; download it, and give its path")
    return found[0]


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's to ask: neither this machine's nor its networks'."""
    place = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(place, ipaddress.IPv6Address):
        inner = place.ipv4_mapped or place.sixtofour or (place.teredo[1] if place.teredo else None)
        if inner is not None and not inner.is_global:
            return False
    return place.is_global and not place.is_multicast


def quoted(path: str) -> str:
    """`path` as a request's line takes it: without blanks and letters beyond ASCII."""
    from urllib.parse import quote

    return quote(path, safe="/?&=%:@!$'()*+,;~-._[]")
