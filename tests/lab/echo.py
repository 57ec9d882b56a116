"""The lab's echo server: echo.py NAME PROTOCOLS PORTS (both comma-separated), until standard input ends.

Every connection and every datagram is answered with one line, `NAME saw ADDRESS PORT on PORT`; a connection
then gets back whatever it sends, until it closes. All of IPv4 and IPv6 is listened on.

Where the kernel has no SCTP, its packets are made here: an INIT is answered with an INIT ACK whose cookie is
that line, and that is all.
"""

import itertools
import selectors
import socket
import struct
import sys
from functools import cache, partial
from typing import Any, NamedTuple

IPPROTO_SCTP = 132
INIT, INIT_ACK, STATE_COOKIE = 1, 2, 7
KINDS = {"tcp": (socket.SOCK_STREAM, 0), "udp": (socket.SOCK_DGRAM, 0), "sctp": (socket.SOCK_STREAM, IPPROTO_SCTP)}

# With it a datagram tells to which of several addresses it came, and its answer leaves from that one.
IP_PKTINFO = 8
PKTINFO = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_PKTINFO),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO),
}


class Sctp(NamedTuple):
    """An SCTP packet that is one INIT or INIT ACK (RFC 9260, 3.1 and 3.3)."""

    sport: int
    dport: int
    tag: int
    kind: int
    init_tag: int
    cookie: bytes = b""

    def packed(self) -> bytes:
        cookie = struct.pack("!HH", STATE_COOKIE, 4 + len(self.cookie)) + self.cookie if self.cookie else b""
        chunk = struct.pack("!BBHLLHHL", self.kind, 0, 20 + len(cookie), self.init_tag, 65536, 1, 1, 1) + cookie
        head, body = struct.pack("!HHL", self.sport, self.dport, self.tag), chunk + bytes(-len(chunk) % 4)
        return head + struct.pack("<L", crc32c(head + bytes(4) + body)) + body


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unpacked(data: bytes) -> Sctp | None:
    """What packed() made, if every bit has arrived as it was meant."""
    if len(data) < 32 or struct.pack("<L", crc32c(data[:8] + bytes(4) + data[12:])) != data[8:12]:
        return None
    sport, dport, tag = struct.unpack_from("!HHL", data)
    kind, _, length, init_tag = struct.unpack_from("!BBHL", data, 12)
    return Sctp(sport, dport, tag, kind, init_tag, data[36 : 12 + length])


@cache
def has_sctp() -> bool:
    """Whether this kernel speaks SCTP."""
    try:
        socket.socket(socket.AF_INET, *KINDS["sctp"]).close()
    except OSError:
        return False
    return True


def open_raw_sctp(family: socket.AddressFamily) -> socket.socket:
    """A socket for the SCTP packets of a kernel that does not know them."""
    return socket.socket(family, socket.SOCK_RAW, IPPROTO_SCTP)


def without_ip_header(data: bytes, family: int) -> bytes:
    """A raw socket's packet: IPv4's come with the IP header, whose first byte tells its length, IPv6's do not."""
    return data[(data[0] & 15) * 4 :] if family == socket.AF_INET else data


def listen_raw_sctp(family: socket.AddressFamily) -> socket.socket:
    sock = open_raw_sctp(family)
    sock.setblocking(False)
    sock.setsockopt(*PKTINFO[family], 1)
    return sock


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


def line(name: str, address: str, sport: int, port: int) -> bytes:
    return f"{name} saw {address} {sport} on {port}\n".encode()


def answer(name: str, sock: socket.socket, peer: tuple[Any, ...]) -> bytes:
    return line(name, peer[0], peer[1], sock.getsockname()[1])


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


def reply_raw_sctp(name: str, ports: list[int], sock: socket.socket) -> None:
    try:
        data, destination, _, peer = sock.recvmsg(65536, 64)
        init = unpacked(without_ip_header(data, sock.family))
        if init and init.kind == INIT and init.dport in ports:
            cookie = line(name, peer[0], init.sport, init.dport)
            ack = Sctp(init.dport, init.sport, init.init_tag, INIT_ACK, 1, cookie)
            sock.sendmsg([ack.packed()], destination, 0, peer)
    except OSError:  # an ICMP error about an earlier reply
        return


def main(name: str, protocols: str, ports: str) -> None:
    poll = selectors.DefaultSelector()
    numbers = [int(port) for port in ports.split(",")]
    for protocol, family in itertools.product(protocols.split(","), (socket.AF_INET, socket.AF_INET6)):
        if protocol == "sctp" and not has_sctp():
            serve = partial(reply_raw_sctp, name, numbers)
            poll.register(listen_raw_sctp(family), selectors.EVENT_READ, serve)
            continue
        for port in numbers:
            serve = partial(reply, name) if protocol == "udp" else partial(accept, name, poll)
            poll.register(listen(family, protocol, port), selectors.EVENT_READ, serve)
    poll.register(sys.stdin, selectors.EVENT_READ, lambda _: sys.exit())
    print("ready", flush=True)
    while True:
        for key, _ in poll.select():
            key.data(key.fileobj)


if __name__ == "__main__":
    main(*sys.argv[1:])
