"""A reward server: rewards in a process of their own, over HTTP, with a token and bounds.

    POST /v1/score   {"rewards": [name], "images": [image], "prompts": [record], "thinking": [text]}
                     image: {"png": base64}, or {"float32": base64, "size": [H, W]} for the exact values
                     -> {"records": {name: [{"name", "segment", "values": [number or null]}]}}
    GET  /v1/rewards -> {"protocol": 1, "rewards": [name]}

JSON and PNG, never pickle. Null is a missing value. One request is one call of the reward, so that what else the server is
asked never changes a value. Scoring runs one request at a time; others wait, and are refused when it takes too long.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch

from unigrpo.prompts.records import parse_record
from unigrpo.rewards.pictures import decode_png
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.rewards.transport import is_loopback, strict_loads
from unigrpo.types import PromptRecord

LOG = logging.getLogger("unigrpo.rewards.server")
PROTOCOL = 1
MIN_TOKEN = 16
CHUNK = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """What a request may be.

    Args:
        body: bytes. images: per request. pixels: per image, by its header, before it is decoded.
        read_s: seconds for a request to arrive. wait_s: seconds it may wait for its turn.
        connections: at once.
    """

    body: int = 256 << 20
    images: int = 256
    pixels: int = 4 << 20
    read_s: float = 30.0
    wait_s: float = 300.0
    connections: int = 32


class Refused(Exception):
    """A request that gets an error status. The message goes to the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Serves rewards on a host and port until shut down.

    Args:
        address: host, port; port 0 takes a free one (`server_address` tells which).
        rewards: name -> function.
        token: needed on every request; None only on loopback.
        bounds: see `Bounds`.
    Raises: ValueError for another machine's reach without a token, or a short one.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], rewards: Mapping[str, RewardFunction], *, token: str | None = None,
                 bounds: Bounds | None = None) -> None:
        if token is None and not is_loopback(address[0]):
            raise ValueError(f"a reward server on {address[0]} needs a token: anybody who reaches it could use it; put one in "
                             "the environment variable that --token-env names, or serve on 127.0.0.1")
        if token is not None and len(token) < MIN_TOKEN:
            raise ValueError(f"the token has {len(token)} characters; take at least {MIN_TOKEN}, such as 32 from "
                             "`python -c 'import secrets; print(secrets.token_hex())'`")
        self.rewards = dict(rewards)
        self.bounds = bounds or Bounds()
        self.open = token is None
        self._token = None if token is None else hashlib.sha256(token.encode()).digest()
        self.turn = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.bounds.connections)
        super().__init__(address, Handler)

    def admits(self, header: str | None) -> bool:
        """Whether an Authorization header carries the token; the time it takes says nothing about how."""
        if self._token is None:
            return True
        given = (header or "").removeprefix("Bearer ").strip()
        return hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "replace")).digest(), self._token)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread per connection, but no more than the bound: others are closed at once."""
        if not self._slots.acquire(blocking=False):
            LOG.warning("more than %d connections: one was closed", self.bounds.connections)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Gives its place back whatever happens."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is not worth a traceback."""
        LOG.info("a connection from %s broke", client_address[0])


class Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: RewardServer
    server_version, sys_version = "unigrpo", ""
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """The arrival of a whole request is bounded, each read of it and their sum."""
        super().setup()
        self.connection.settimeout(self.server.bounds.read_s)
        self.deadline = time.monotonic() + self.server.bounds.read_s
        self._alarm = threading.Timer(self.server.bounds.read_s, self._hang_up)
        self._alarm.daemon = True
        self._alarm.start()

    def finish(self) -> None:
        """Ends the clock with the connection."""
        self._alarm.cancel()
        super().finish()

    def do_GET(self) -> None:
        self._answer(self._list)

    def do_POST(self) -> None:
        self._answer(self._score)

    def _hang_up(self) -> None:
        """Close on a request that has not arrived in time."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, respond: Any) -> None:
        """Check who asks, respond, and turn every failure into a status."""
        self.close_connection = True
        try:
            self._check_client()
            status, answer = 200, respond()
        except Refused as error:
            status, answer = error.status, {"error": str(error)}
        except OSError:
            raise  # the connection broke
        except Exception as error:
            LOG.exception("a reward failed")
            status, answer = 500, {"error": f"the reward failed: {type(error).__name__}"}
        self._alarm.cancel()
        data = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _check_client(self) -> None:
        """The token; without one, that no web page talks to us under a name of its own."""
        if not self.server.admits(self.headers.get("Authorization")):
            raise Refused(401, "a token is needed")
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0].strip("[]")
        if self.server.open and not is_loopback(host):
            raise Refused(403, "without a token this server answers to 127.0.0.1 and localhost only")

    def _list(self) -> dict[str, Any]:
        """GET /v1/rewards."""
        if self.path != "/v1/rewards":
            raise Refused(404, "paths are GET /v1/rewards and POST /v1/score")
        return {"protocol": PROTOCOL, "rewards": sorted(self.server.rewards)}

    def _score(self) -> dict[str, Any]:
        """POST /v1/score."""
        if self.path != "/v1/score":
            raise Refused(404, "paths are GET /v1/rewards and POST /v1/score")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type application/json wanted")
        names, images, prompts, thinking = read_request(self._body(), self.server.rewards, self.server.bounds)
        self._alarm.cancel()
        if not self.server.turn.acquire(timeout=self.server.bounds.wait_s):
            raise Refused(503, "the server is busy")
        try:
            with torch.no_grad():
                found = {name: self.server.rewards[name](images, prompts, thinking) for name in names}
        finally:
            self.server.turn.release()
        return {"records": {name: [{"name": record.name, "segment": record.segment, "values": plain(record.value)}
                                   for record in records] for name, records in found.items()}}

    def _body(self) -> bytes:
        """The request's body, within its bounds of size and time."""
        length = self.headers.get("Content-Length") or ""
        if not (length.isascii() and length.isdigit() and len(length) < 20) or self.headers.get("Transfer-Encoding"):
            raise Refused(411, "Content-Length wanted")
        size = int(length)
        if size > self.server.bounds.body:
            raise Refused(413, f"at most {self.server.bounds.body} bytes wanted, got {size}")
        parts = []
        while size:
            part = self.rfile.read1(min(size, CHUNK))
            if not part or time.monotonic() > self.deadline:
                raise Refused(408, f"the request did not arrive within {self.server.bounds.read_s:g} s")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """Method, path and status; no header."""
        LOG.info("%s %s", self.address_string(), format % args)


def read_request(body: bytes, rewards: Mapping[str, RewardFunction],
                 bounds: Bounds) -> tuple[list[str], Images, list[PromptRecord], list[str]]:
    """A request's names, images (B, H, W, 3) float32, prompts and thinking. Raises Refused (400) saying what is wrong."""
    try:
        data = strict_loads(body.decode("utf-8"))
        if not isinstance(data, dict) or set(data) != {"rewards", "images", "prompts", "thinking"}:
            raise ValueError("the keys rewards, images, prompts and thinking wanted")
        if not all(isinstance(value, list) for value in data.values()):
            raise ValueError("four lists wanted")
        names, thinking = data["rewards"], data["thinking"]
        if not names or not all(isinstance(name, str) and name in rewards for name in names) or len(set(names)) < len(names):
            raise ValueError(f"different names out of {', '.join(sorted(rewards))} wanted")
        size = len(data["images"])
        if not 1 <= size <= bounds.images or not size == len(data["prompts"]) == len(thinking):
            raise ValueError(f"1 to {bounds.images} images wanted, and a prompt and a thinking for each")
        if not all(isinstance(text, str) for text in thinking):
            raise ValueError("thinking must be texts")
        images = [read_image(item, bounds.pixels) for item in data["images"]]
        if len({image.shape for image in images}) > 1:
            raise ValueError("images of one size wanted")
        prompts = [parse_record(json.dumps(item), f"prompt {number}") for number, item in enumerate(data["prompts"])]
    except ValueError as error:
        raise Refused(400, str(error)[:500]) from error
    return names, np.stack(images), prompts, thinking


def read_image(item: Any, max_pixels: int) -> np.ndarray:
    """One image of a request -> (H, W, 3) float32 in [0, 1]. Raises ValueError."""
    if not isinstance(item, dict):
        raise ValueError("an image is {png} or {float32, size}")
    try:
        if set(item) == {"png"} and isinstance(item["png"], str):
            picture = decode_png(base64.b64decode(item["png"], validate=True), max_pixels=max_pixels)
            return picture.astype(np.float32) / np.float32(255)
        if set(item) == {"float32", "size"} and isinstance(item["float32"], str):
            height, width = item["size"]
            if type(height) is not int or type(width) is not int or min(height, width) < 1 or height * width > max_pixels:
                raise ValueError(f"an image of 1 to {max_pixels} pixels wanted")
            data = base64.b64decode(item["float32"], validate=True)
            if len(data) != height * width * 3 * 4:
                raise ValueError("height * width * 3 float32 wanted")
            image = np.frombuffer(data, dtype="<f4").reshape(height, width, 3).astype(np.float32)
            if not np.isfinite(image).all():
                raise ValueError("a finite image wanted")
            return image
    except (binascii.Error, TypeError) as error:
        raise ValueError("an image is {png} or {float32, size}") from error
    raise ValueError("an image is {png} or {float32, size}")


def plain(values: torch.Tensor) -> list[float | None]:
    """(B,) as JSON numbers; NaN is null. Infinite values are the reward's fault. Raises ValueError for them."""
    numbers = [float(value) for value in values]
    if any(math.isinf(number) for number in numbers):
        raise ValueError("a reward must be finite, or NaN where it is missing")
    return [None if math.isnan(number) else number for number in numbers]
