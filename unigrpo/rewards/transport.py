"""One HTTP request with a deadline: for the judge and for the client of the reward server.

No redirects (they would carry a key to another host), no proxies from the environment, and nothing of an answer's body or
of a header in an error: services echo keys.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
CHUNK = 1 << 16


class TransportError(Exception):
    """A request without a usable answer. `kind` is a word for the count; `retry` says if asking again can help."""

    def __init__(self, kind: str, message: str, *, retry: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry, self.retry_after = kind, retry, retry_after


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. The secret is read from the environment for each request and never kept.

    Args:
        url: http or https, without user, password or fragment.
        key_env: environment variable with the bearer token; None sends none.
        plain_http: allow a token over http to another machine: for networks whose every machine you trust.
    """

    url: str
    key_env: str | None = None
    plain_http: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or parts.fragment:
            shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
            raise ValueError(f"a URL http(s)://host[:port]/path without user and password wanted, got {shown!r}")
        if self.key_env is not None:
            if not re.fullmatch(r"[A-Za-z_]\w{0,127}", self.key_env):
                raise ValueError("key_env is the name of an environment variable, not the key itself")
            if not os.environ.get(self.key_env, "").strip():
                raise ValueError(f"the environment variable {self.key_env} is empty; put the key for {parts.hostname} there")
            if parts.scheme == "http" and not is_loopback(parts.hostname) and not self.plain_http:
                raise ValueError(f"the key would go to {parts.hostname} unencrypted; use https, a tunnel to 127.0.0.1, or "
                                 "plain_http: true where you trust the network")

    def headers(self) -> dict[str, str]:
        """With the secret: for one request, never for a log."""
        if self.key_env is None:
            return {}
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isprintable() or not key.isascii():
            raise TransportError("no key", f"the environment variable {self.key_env} holds no usable key", retry=False)
        return {"Authorization": f"Bearer {key}"}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def request_json(endpoint: Endpoint, method: str, path: str, payload: Mapping[str, Any] | None, *, timeout: float,
                 max_bytes: int) -> Any:
    """One request and its JSON answer.

    Args:
        path: appended to the endpoint's own.
        timeout: seconds for everything from the connection to the last byte; a server that drips does not extend it.
        max_bytes: of the answer.
    Returns: the decoded JSON.
    Raises: TransportError: timeout, connection, http_<status>, too_large or not_json.
    """
    parts = urlsplit(endpoint.url)
    assert parts.hostname is not None
    body = None if payload is None else json.dumps(payload, allow_nan=False).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close", **endpoint.headers()}
    target = parts.path.rstrip("/") + path + (f"?{parts.query}" if parts.query else "")
    connection = (http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=ssl.create_default_context())
                  if parts.scheme == "https" else http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout))
    expired = threading.Event()
    opened: list[socket.socket] = []  # http.client forgets its socket once the answer's headers are read

    def cut() -> None:
        expired.set()
        for sock in opened:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # ends a read that another thread is in, which close() does not

    # The socket's timeout bounds each read; only a clock of our own bounds their sum.
    timer = threading.Timer(timeout, cut)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        opened.append(connection.sock)
        if expired.is_set():
            raise TimeoutError
        connection.request(method, target, body=body, headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _status_error(response)
        data = response.read(max_bytes + 1)
        # A connection that was cut off can look like one that ended.
        if expired.is_set() or ((response.length or 0) > 0 and len(data) <= max_bytes):
            raise TransportError("timeout" if expired.is_set() else "connection", "the answer was cut off")
        if len(data) > max_bytes:
            raise TransportError("too_large", f"the answer is longer than {max_bytes} bytes")
        return _strict_json(data)
    except TransportError:
        raise
    except (OSError, http.client.HTTPException) as error:
        late = expired.is_set() or isinstance(error, TimeoutError)
        raise TransportError("timeout" if late else "connection",
                             f"no answer from {parts.hostname} within {timeout:g} s" if late else
                             f"no connection to {parts.hostname}: {type(error).__name__}") from None
    finally:
        timer.cancel()
        connection.close()


def _status_error(response: http.client.HTTPResponse) -> TransportError:
    """An error of the status alone; the body may hold anything."""
    status, after = response.status, response.getheader("Retry-After") or ""
    hint = {401: ": the key is refused", 403: ": the key is refused", 404: ": no such path or model",
            413: ": the request is too large"}.get(status, "")
    return TransportError(f"http_{status}", f"HTTP {status}{hint}", retry=status in TRANSIENT,
                          retry_after=float(after) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", after) else 0.0)


def _strict_json(data: bytes) -> Any:
    """JSON without NaN, infinities and repeated keys."""
    try:
        return strict_loads(data.decode("utf-8"))
    except ValueError:
        raise TransportError("not_json", "the answer is no JSON") from None


def strict_loads(text: str) -> Any:
    """json.loads that refuses what JSON does not have. Raises ValueError."""
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def no_repeat(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is repeated")
        return found

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=no_repeat)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


class RateLimit:
    """At most so many starts a minute over all threads, evenly spaced; 0 is no limit."""

    def __init__(self, per_minute: float) -> None:
        if not (per_minute >= 0):
            raise ValueError(f"requests_per_minute must be at least 0, got {per_minute}")
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may start."""
        if not self.interval:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self.interval
        time.sleep(max(0.0, start - now))
