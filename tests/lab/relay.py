"""A way to an SSH server through the client's own machine, that breaks after some number of bytes.

What it does then is up to the test; from the server nothing is asked, and nothing of what passes is understood.

    with Relay(lab.client, (HOST, 22)) as relay:
        relay.arm(4000, lambda: relay.break_off(reset=True))
        lab.client.run(["ssh", "-p", str(relay.port), "root@127.0.0.1"])
        assert relay.tripped.is_set()
"""

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from lab.network import Namespace

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Relay:
    """`port` of 127.0.0.1 in a namespace leads to `server`; `sent` counts the bytes to it since arm()."""

    def __init__(self, space: Namespace, server: tuple[str, int]) -> None:
        self.space, self.server = space, server
        with space.entered():
            self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self.listener.getsockname()[1]
        self.tripped = threading.Event()
        self.ended = False
        self.peers: dict[socket.socket, socket.socket] = {}
        self.clients: set[socket.socket] = set()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.arm(None)
        self.thread = threading.Thread(target=self.work, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = True
        self.thread.join()
        self.break_off(reset=True)
        self.listener.close()
        self.selector.close()

    def arm(self, limit: int | None, then: Callable[[], None] = lambda: None, shut: bool = False) -> None:
        """After `limit` bytes do `then`, once; `shut` before it: whoever comes is sent away until the next arm()."""
        self.limit, self.then, self.shut, self.sent = limit, then, shut, 0
        self.tripped.clear()

    def work(self) -> None:
        while not self.ended:
            for key, _ in self.selector.select(0.05):
                sock = key.fileobj
                if sock is self.listener:
                    self.accept()
                elif sock in self.peers and isinstance(sock, socket.socket):  # or it was closed with its peer
                    self.pass_on(sock)

    def accept(self) -> None:
        near = self.listener.accept()[0]
        if self.tripped.is_set() and self.shut:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            near.close()
            return
        with self.space.entered():
            far = socket.create_connection(self.server, timeout=60)
        self.clients.add(near)
        for sock, peer in ((near, far), (far, near)):
            sock.settimeout(60)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.peers[sock] = peer
            self.selector.register(sock, selectors.EVENT_READ)

    def pass_on(self, sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(65536)
            if sock in self.clients:
                data = self.counted(sock, data)
            if sock in self.peers:
                self.peers[sock].sendall(data)
        if not data and sock in self.peers:
            self.close(sock, reset=False)

    def counted(self, sock: socket.socket, data: bytes) -> bytes:
        """What may go on to the server; trips when that is all that may."""
        self.sent += len(data)
        if self.limit is None or self.sent < self.limit or self.tripped.is_set():
            return data
        data = data[: len(data) - (self.sent - self.limit)]
        with contextlib.suppress(OSError):
            self.peers[sock].sendall(data)
        self.then()
        self.tripped.set()
        return b""

    def break_off(self, reset: bool) -> None:
        """Ends all connections, by a reset or by their orderly end."""
        for sock in list(self.clients):
            self.close(sock, reset)

    def close(self, sock: socket.socket, reset: bool) -> None:
        for each in (sock, self.peers[sock]):
            del self.peers[each]
            self.clients.discard(each)
            self.selector.unregister(each)
            if reset:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            each.close()
