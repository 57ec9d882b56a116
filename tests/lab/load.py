"""Connections that clients make all the time, and what became of each: load.py ADDRESS RATE LIMIT, in the lab's client.

The first line of standard input says, as JSON, which ports are asked and which NodePorts may answer there, and the
ports of connections that stay open. From then on RATE connections a second are made to ports drawn at random. One
counts as answered when the line of an echo server has come from a node, on a NodePort that may answer, and no packet
of its making was lost on the way: its SYN went out once. Then it is reset, so that no port is kept waiting. Those
that stay open send a word again and again and must get it back.

"ready" is printed when the first are through, and when standard input ends, the sums as a line of JSON.

    with Load(lab.client, HOST, {25: [2025]}, rate=2000) as load:
        lab.epok("-i", "eth0", "local", snapshot=lab.cluster())
    print(load.result.rate, load.result.failures)
"""

import errno
import json
import random
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from lab.network import Namespace  # which the child, run without a path, does not find

SLOW = 0.9  # a lost SYN is sent again after a second
BURST = 64  # are opened at most before answers are read again
FIRST = 20  # connections, and the load is ready
PAUSE = 0.05  # seconds between two words of a connection that stays open
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
TOTAL_RETRANS = 100  # where struct tcp_info has it
ANSWER = re.compile(rb"(\S+) saw \S+ \d+ on (\d+)\n")
KINDS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ETIMEDOUT: "timed out",
}
FAILURES = ("refused", "reset", "closed", "timed out", "SYN lost", "wrong answer", "open connection broken")


class Result(NamedTuple):
    """What became of the connections; each attempt was either answered or is one of the failures.

    `seconds` is how long new ones were made, `slow` how many took more than SLOW, `slowest` the seconds of the longest
    that was answered, `nodes` who answered how many, and `echoes` the words that came back to the connection that got
    fewest.
    """

    attempted: int
    answered: int
    failures: dict[str, int]
    slow: int
    slowest: float
    seconds: float
    nodes: dict[str, int]
    echoes: int

    @property
    def rate(self) -> float:
        """Answered connections a second."""
        return self.answered / self.seconds

    @property
    def failed(self) -> int:
        return sum(self.failures.values())


class Load:
    """A load on `address`, which is there when the with statement is entered; `result` when it is left.

    `ports` are the host's ports and the NodePorts that may answer at each; `held` are ports of connections that stay
    open all the time. What takes more than `limit` seconds has failed.
    """

    result: Result

    def __init__(
        self,
        client: "Namespace",
        address: str,
        ports: Mapping[int, Collection[int]],
        rate: float = 2000,
        held: Sequence[int] = (),
        limit: float = 5,
    ) -> None:
        self.argv = [sys.executable, "-I", __file__, address, str(rate), str(limit)]
        self.client = client
        self.job = {"ports": {port: list(may) for port, may in ports.items()}, "held": held}

    def __enter__(self) -> Self:
        self.child = self.client.popen(self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.child.stdin
        self.child.stdin.write(json.dumps(self.job) + "\n")
        self.child.stdin.flush()
        if self.line() != "ready\n":
            self.child.kill()
            raise RuntimeError("the load could not begin; the reason is above")
        return self

    def line(self) -> str:
        assert self.child.stdout
        return self.child.stdout.readline()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.child.stdin
        with self.child:
            self.child.stdin.close()
            line = self.line()
        if line:
            self.result = Result(**json.loads(line))
        elif kind is None:
            raise RuntimeError("the load ended early; the reason is above")


# ------------------------------------------------ the child


class Attempt(NamedTuple):
    """A connection that has no answer yet."""

    sock: socket.socket
    port: int
    began: float


class Held:
    """A connection that stays open; `word` is what it has sent and not yet got back."""

    def __init__(self, address: str, port: int) -> None:
        self.sock = socket.create_connection((address, port), timeout=60)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        if not ANSWER.fullmatch(self.sock.recv(200)):
            raise ConnectionError(f"port {port} does not answer as an echo server")
        self.sock.setblocking(False)
        self.word = self.heard = b""
        self.sent = 0.0
        self.echoes = 0

    def say(self, now: float) -> None:
        """Raises OSError."""
        self.word, self.heard, self.sent = b"word %d\n" % self.echoes, b"", now
        self.sock.sendall(self.word)

    def hear(self) -> bool:
        """Whether what came back is right so far. Raises OSError."""
        data = self.sock.recv(200)
        self.heard += data
        if self.heard == self.word:
            self.word = b""
            self.echoes += 1
            return True
        return bool(data) and self.word.startswith(self.heard)


class Client:
    """Makes the connections, all of them in one thread."""

    def __init__(
        self, address: str, rate: float, limit: float, ports: Mapping[int, Collection[int]], held: Sequence[int]
    ) -> None:
        self.address, self.rate, self.limit, self.ports = address, rate, limit, ports
        self.draw = list(ports)
        self.epoll = select.epoll()
        self.pending: dict[int, Attempt] = {}  # by descriptor, the oldest first
        self.attempted = self.answered = self.slow = 0
        self.slowest = 0.0
        self.failures = Counter(dict.fromkeys(FAILURES, 0))
        self.nodes: Counter[str] = Counter()
        self.all_held = [Held(address, port) for port in held]
        self.held = {each.sock.fileno(): each for each in self.all_held}
        for descriptor in (sys.stdin.fileno(), *self.held):
            self.epoll.register(descriptor, select.EPOLLIN)
        self.began, self.ended = time.monotonic(), 0.0

    def run(self) -> Result:
        ready = False
        while not self.done():
            now = time.monotonic()
            due = 0 if self.ended else int((now - self.began) * self.rate) - self.attempted
            for _ in range(min(due, BURST)):
                self.open(now)
            self.speak(now)
            events = self.epoll.poll(0 if due > BURST else 0.001)
            for descriptor, _ in events:
                self.handle(descriptor)
            if not events:  # not before everything that has come is read, so that a slow client blames nobody else
                self.expire(now)
            if not ready and self.attempted - len(self.pending) >= FIRST:
                ready = True
                print("ready", flush=True)
        return self.sums()

    def done(self) -> bool:
        """Whether it is the end, nothing is awaited, and what is open has still answered after it."""
        waiting = self.pending or any(each.word or each.sent < self.ended for each in self.held.values())
        return bool(self.ended and not waiting)

    def open(self, now: float) -> None:
        self.attempted += 1
        port = random.choice(self.draw)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        failed = sock.connect_ex((self.address, port))
        if failed not in (0, errno.EINPROGRESS):
            self.fail(failed)
            return
        self.pending[sock.fileno()] = Attempt(sock, port, now)
        self.epoll.register(sock.fileno(), select.EPOLLIN)

    def handle(self, descriptor: int) -> None:
        if descriptor in self.pending:
            self.finish(self.pending.pop(descriptor))
        elif descriptor in self.held:
            self.listen(self.held[descriptor])
        else:  # standard input: enough
            self.epoll.unregister(descriptor)
            self.ended = time.monotonic()

    def finish(self, attempt: Attempt) -> None:
        """Counts a connection that has an answer or an error."""
        sock, port, began = attempt
        try:
            answer = sock.recv(200)
            took = time.monotonic() - began
            self.slow += took > SLOW
            if took > SLOW and sent_again(sock):
                self.failures["SYN lost"] += 1
            elif not answer:
                self.failures["closed"] += 1
            elif (match := ANSWER.fullmatch(answer)) and int(match[2]) in self.ports[port]:
                self.answered += 1
                self.slowest = max(self.slowest, took)
                self.nodes[match[1].decode()] += 1
            else:
                self.failures["wrong answer"] += 1
        except OSError as error:
            self.fail(error.errno)
        sock.close()

    def fail(self, code: int | None) -> None:
        self.failures[KINDS.get(code or 0) or errno.errorcode.get(code or 0, "unknown")] += 1

    def expire(self, now: float) -> None:
        """Gives up those that have waited too long."""
        while self.pending and (oldest := next(iter(self.pending.values()))).began < now - self.limit:
            del self.pending[oldest.sock.fileno()]
            oldest.sock.close()
            self.failures["timed out"] += 1
        for each in [each for each in self.held.values() if each.word and each.sent < now - self.limit]:
            self.give_up(each)

    def speak(self, now: float) -> None:
        """Lets open connections send their next word, the last one after the end."""
        for each in list(self.held.values()):
            if not each.word and now - each.sent > PAUSE and (not self.ended or each.sent < self.ended):
                try:
                    each.say(now)
                except OSError:
                    self.give_up(each)

    def listen(self, each: Held) -> None:
        try:
            right = each.hear()
        except OSError:
            right = False
        if not right:
            self.give_up(each)

    def give_up(self, each: Held) -> None:
        del self.held[each.sock.fileno()]
        each.sock.close()
        self.failures["open connection broken"] += 1

    def sums(self) -> Result:
        echoes = min((each.echoes for each in self.all_held), default=0)
        seconds = self.ended - self.began
        return Result(
            self.attempted, self.answered, self.failures, self.slow, self.slowest, seconds, self.nodes, echoes
        )


def sent_again(sock: socket.socket) -> int:
    """How many packets of a connection this side had to send again."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, TOTAL_RETRANS)[0])


def main(address: str, rate: str, limit: str) -> None:
    job: dict[str, Any] = json.loads(sys.stdin.readline())
    ports = {int(port): frozenset(may) for port, may in job["ports"].items()}
    client = Client(address, float(rate), float(limit), ports, job["held"])
    print(json.dumps(client.run()._asdict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
