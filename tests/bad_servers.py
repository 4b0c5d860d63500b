"""HTTP servers that misbehave on a free port of this machine: for what a tracker or a reward must survive."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

WAYS = ("refuses", "hangs", "drips", "answers 500", "answers rubbish", "hangs up")


@contextlib.contextmanager
def bad_server(way: str) -> Iterator[str]:
    """The URL of a server that fails in one of WAYS, until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if way == "refuses":
        listener.close()
        yield url
        return
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if way == "hangs up":
                return
            connection.recv(1 << 16)
            if way == "hangs":
                over.wait(600)
            elif way == "drips":
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 100000:
                    connection.send(bytes([byte]))
                    if over.wait(0.2):
                        return
            else:
                status, body = ("500 Error", b"{}") if way == "answers 500" else ("200 OK", b"<html>\x00rubbish")
                connection.sendall(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                                   "Connection: close\r\n\r\n".encode() + body)

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield url
    finally:
        over.set()
        listener.close()
