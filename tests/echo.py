"""The lab's echo server: echo.py NAME PROTOCOLS PORTS (both comma-separated), until standard input ends.

Every connection and every datagram is answered with one line, `NAME saw ADDRESS PORT on PORT`; a connection
then gets back whatever it sends, until it closes. All of IPv4 and IPv6 is listened on.
"""

import selectors
import socket
import sys
from functools import partial
from typing import Any

IPPROTO_SCTP = 132
KINDS = {"tcp": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0), "sctp": (socket.SOCK_STREAM, IPPROTO_SCTP)}

# With it a datagram tells to which of several addresses it came, and its answer leaves from that one.
IP_PKTINFO = 8
PKTINFO = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_PKTINFO),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}


def listen(family: socket.AddressFamily, protocol: str, port: int) -> socket.socket:
    """A socket on every address of the family. It never blocks: a client may be gone before it is accepted."""
    sock = socket.socket(family, *KINDS[protocol])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    sock.setblocking(False)
    if protocol == "udp":
        sock.setsockopt(*PKTINFO[family], 1)
    else:
        sock.listen(4096)
    return sock


def answer(name: str, sock: socket.socket, peer: tuple[Any, ...]) -> bytes:
    return f"{name} saw {peer[0]} {peer[1]} on {sock.getsockname()[1]}\n".encode()


def accept(name: str, poll: selectors.BaseSelector, listener: socket.socket) -> None:
    try:
        connection, peer = listener.accept()
        connection.setblocking(True)
        connection.sendall(answer(name, listener, peer))
    except OSError:  # gone already
        return
    poll.register(connection, selectors.EVENT_READ, partial(echo, poll))


def echo(poll: selectors.BaseSelector, connection: socket.socket) -> None:
    try:
        data = connection.recv(65536)
        connection.sendall(data)
    except OSError:
        data = b""
    if not data:
        poll.unregister(connection)
        connection.close()


def reply(name: str, sock: socket.socket) -> None:
    try:
        _, destination, _, peer = sock.recvmsg(65536, 64)
        sock.sendmsg([answer(name, sock, peer)], destination, 0, peer)
    except OSError:  # an ICMP error about an earlier reply
        return


def main(name: str, protocols: str, ports: str) -> None:
    poll = selectors.DefaultSelector()
    for protocol in protocols.split(","):
        for port in map(int, ports.split(",")):
            for family in (socket.AF_INET, socket.AF_INET6):
                serve = partial(reply, name) if protocol == "udp" else partial(accept, name, poll)
                poll.register(listen(family, protocol, port), selectors.EVENT_READ, serve)
    poll.register(sys.stdin, selectors.EVENT_READ, lambda _: sys.exit())
    print("ready", flush=True)
    while True:
        for key, _ in poll.select():
            key.data(key.fileobj)


if __name__ == "__main__":
    main(*sys.argv[1:])
