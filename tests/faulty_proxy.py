"""A proxy before an emulated bucket that answers some requests wrongly, the same ones each time.

The service behind it gets a request only when all of it has arrived, as at a real bucket.
"""

from collections.abc import Callable, Iterator
import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
import urllib.parse

# Kinds of faults besides an HTTP status such as 503.
RESET = "reset"  # the connection is closed without an answer
LOST = "lost"  # the service does what was asked, but the connection is closed without an answer
STALL = "stall"  # no answer, and the connection stays open
CUT = "cut"  # half of the body, then the connection is closed
SHORT = "short"  # half of the body, as if it were all of it
UPLOAD = "upload"  # the body of the request is not read

Fault = int | str | None
Plan = Callable[[str, str, int], Fault]


def seeded(seed: int, share: float, *faults: int | str) -> Plan:
    """Returns a plan in which a share of all requests fails, but none four times in a row.

    Which ones depends on the seed, the request and how often it has come, not on their order.
    """

    def plan(method: str, path: str, count: int) -> Fault:
        draw = random.Random(f"{seed} {method} {path} {count}")
        return draw.choice(faults) if draw.random() < share and count % 4 < 3 else None

    return plan


def always(fault: int | str, method: str = "", part: str = "") -> Plan:
    """Returns a plan in which all requests fail whose method and path match."""
    return lambda m, path, _: fault if m.startswith(method) and part in path else None


def first(times: int, fault: int | str, method: str = "", part: str = "") -> Plan:
    """Returns a plan in which the first requests fail whose method and path match."""
    return lambda m, path, n: fault if n < times and m.startswith(method) and part in path else None


class Proxy:
    """A proxy that is running.

    Attributes:
      url: where it listens.
      plan: returns the fault of a request, from its method, its path and the number of equal
        requests before it.
      requests: (method, path, fault) of all requests under this plan.
      bucket: URL of a folder of a bucket for the test to use.
    """

    bucket = ""

    def __init__(self, url: str):
        self.url = url
        self.plan: Plan = lambda *_: None
        self.requests: list[tuple[str, str, Fault]] = []
        self.stopped = threading.Event()
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def use(self, plan: Plan) -> None:
        """Begins another plan, with new counts."""
        with self._lock:
            self.plan, self._counts = plan, {}
            self.requests.clear()

    def fault(self, method: str, path: str) -> Fault:
        """Counts a request and returns its fault."""
        with self._lock:
            count = self._counts.get((method, path), 0)
            self._counts[method, path] = count + 1
            fault = self.plan(method, urllib.parse.unquote(path), count)
            self.requests.append((method, path, fault))
        return fault


@contextlib.contextmanager
def running(target: str) -> Iterator[Proxy]:
    """Yields a proxy before the service at a URL, which runs until the end of the block."""
    port = urllib.parse.urlsplit(target).port
    assert port is not None

    class Handler(_Handler):
        service = port

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Handler.proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer is sent at once
    proxy: Proxy
    service: int

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            return super().handle_one_request()
        self.close_connection = True

    def _handle(self) -> None:
        fault = self.proxy.fault(self.command, self.path)
        if fault == UPLOAD and int(self.headers.get("Content-Length") or 0):
            return self._stall()
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()
        body = self._body()
        if body is None:
            self.close_connection = True
        elif fault == STALL:
            self._stall()
        elif fault == RESET:
            self._reset()
        elif isinstance(fault, int):
            self._answer(fault, [("Content-Type", "text/plain")], b"a fault of the proxy")
        else:
            status, headers, content = self._forward(body)
            if fault == LOST:
                self._reset()
            elif fault == SHORT and status in (200, 206):
                self._answer(status, headers, content[: len(content) // 2])
            elif fault == CUT and len(content) > 1:
                self._answer(status, headers, content, sent=len(content) // 2)
                self._reset()
            else:
                self._answer(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def log_message(self, *_: object) -> None:
        """Prints nothing."""

    def _body(self) -> bytes | None:
        """Returns the body of the request; None if the client went away before its end."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        return body if len(body) == size else None

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.service, timeout=60)
        headers = {
            key: value
            for key, value in self.headers.items()
            if key.lower() not in ("transfer-encoding", "content-length", "expect", "connection")
        }
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), content

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, sent: int | None = None
    ) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for key, value in headers:
            if self.command == "HEAD" and key.lower() == "content-length":
                length = value
            elif key.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        self.wfile.flush()

    def _stall(self) -> None:
        self.close_connection = True
        self.proxy.stopped.wait(60)

    def _reset(self) -> None:
        """Closes the connection so that the client is told at once."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
