"""Files over http and https within bounds of size, of silence and of time as a whole.

A socket's timeout bounds one silence only: a server that sends a byte now and then, in the headers or in the body,
would hold its reader for ever, and one that never ends would fill the memory. Every byte of a reply, of its headers and
of its redirections passes `_BoundedReader`, which knows both limits.
"""

import http.client
import io
import socket
import time
import urllib.request


MAX_BYTES = 2**27
MAX_SILENCE = 30  # seconds
MAX_SECONDS = 60


def download(url: str) -> bytes:
    """Fetch what an http or https `url` names: at most `MAX_BYTES`, within `MAX_SECONDS`, uncompressed.

    Redirections lead to http and https only. Raises `ValueError` with the reason for whatever else a server does.
    """
    bounds, body = _Bounds(), bytearray()
    opener = urllib.request.OpenerDirector()  # not `build_opener`, which also reads ftp and file URLs
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPRedirectHandler(),
        _BoundedHandler(bounds),
    ):
        opener.add_handler(handler)
    try:
        with opener.open(url) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise ValueError(f"the reply is compressed ({encoding}), which was not asked for")
            while chunk := response.read(2**20):
                body += chunk
            if response.length:  # `read` with a size says nothing about an early end
                raise http.client.IncompleteRead(body, response.length)
    except Exception as error:  # urllib passes on whatever http.client, ssl and codecs raise
        reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{url} cannot be fetched ({reason}). Check the address and the connection.") from error
    return bytes(body)


class _Bounds:
    """What is left of the bytes and seconds of one download."""

    def __init__(self):
        self.bytes_left, self.end = MAX_BYTES, time.monotonic() + MAX_SECONDS

    def timeout(self) -> float:
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError(f"it takes more than {MAX_SECONDS} seconds")
        return min(seconds, MAX_SILENCE)

    def count(self, num_bytes: int) -> None:
        self.bytes_left -= num_bytes
        if self.bytes_left < 0:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes")


class _BoundedReader(io.RawIOBase):
    """The bytes of `raw`, the reading end of `sock`, within `bounds`."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, bounds: _Bounds):
        self.raw, self.sock, self.bounds = raw, sock, bounds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.sock.settimeout(self.bounds.timeout())
        num_bytes = self.raw.readinto(buffer)
        self.bounds.count(num_bytes)
        return num_bytes

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Bounded:
    """A connection of `http.client` within `bounds`."""

    def __init__(self, *args, bounds: _Bounds, **kwargs):
        super().__init__(*args, **kwargs)
        self.bounds = bounds

    def connect(self) -> None:
        self.timeout = self.bounds.timeout()
        super().connect()

    def response_class(self, sock: socket.socket, *args, **kwargs) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, *args, **kwargs)
        response.fp = io.BufferedReader(_BoundedReader(response.fp.detach(), sock, self.bounds))
        return response


class _BoundedHTTP(_Bounded, http.client.HTTPConnection):
    pass


class _BoundedHTTPS(_Bounded, http.client.HTTPSConnection):
    pass


class _BoundedHandler(urllib.request.HTTPHandler):
    """Opens http and https within `bounds`."""

    def __init__(self, bounds: _Bounds):
        super().__init__()
        self.bounds = bounds

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedHTTP, request, bounds=self.bounds)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedHTTPS, request, bounds=self.bounds)

    https_request = urllib.request.HTTPHandler.http_request
