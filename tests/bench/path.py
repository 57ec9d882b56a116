"""Prints what packets pay for many forwards: TCP connect(), a UDP flow's first datagram, a stream. Must be run as root.

Two rule sets, of the same rules but for the search of the port: epok's own, a trie, and one chain with a rule a
forward, as kube-proxy and the older epok write them. Each size of both, with both backends, is in a lab of its own;
all labs take turns in random order, so that whatever else the machine does meets them alike. The port is drawn evenly
among the forwarded ones: half of a list is searched on average, and what a packet needs is rarely in the CPU's cache.
This process is client and server both, so that nothing waits for another process to wake up: without wires and waits
the time is that of the kernel's work, and the ratios are higher than any that a client would see.
"""

import contextlib
import itertools
import random
import re
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure as Picture

from bench.measure import SIZES, SMALL, Figure, nodes_of
from lab.echo import listen, reply
from lab.machine import BACKENDS
from lab.network import HOST, Lab
from lab.objects import port, service, snapshot

SEARCHES = ("trie", "linear")
FORWARDS = sorted({1, *SIZES}) if SMALL else [1, 100, 1000, 2700, 10000]  # ratios are to the first
GOALS = {2700: 1.10, 10000: 1.15}  # by forwards: the most that the trie's p50 of connect() may be, 1 with one forward
SHOWN = FORWARDS[1:][-2:]  # in the last table
TURNS, CALLS, WARM_UP = (2, 10, 2) if SMALL else (20, 120, 10)  # in each turn so many calls count, after the warm-up
STREAM_TURNS, STREAM_SECONDS = (1, 0.02) if SMALL else (20, 0.1)

FIRST, NODE_PORT = 10000, 30080  # the external ports begin with that one; all lead to the same NodePort
SOURCE_PORTS = itertools.cycle(range(20000, 60000))
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closed at once, and nothing is in TIME_WAIT
PATIENCE = struct.pack("ll", 60, 0)  # seconds; with settimeout() Python would poll within what is timed
CHUNK = bytes(1 << 20)
LINES = {("linear", "nft"): "C3o--", ("linear", "legacy"): "C1s--", ("trie", "nft"): "C0o-", ("trie", "legacy"): "C2s-"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "epok",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.4,
    "legend.frameon": False,
}
PICTURE = Path(__file__).resolve().parent / "bench.svg"


class RuleSet(NamedTuple):
    """What a lab's host has."""

    search: str
    backend: str
    forwards: int

    def one(self) -> "RuleSet":
        """What it is compared with."""
        return self._replace(forwards=FORWARDS[0])


class Bed(NamedTuple):
    """A lab, and what listens on its node."""

    lab: Lab
    tcp: socket.socket
    udp: socket.socket


Beds = Mapping[RuleSet, Bed]
Samples = dict[RuleSet, list[float]]


def measure_path(folder: Path) -> list[Figure]:
    """All of it, with tables on the way. Nothing goes into `folder`, which the other parts of the benchmark need."""
    rule_sets = itertools.starmap(RuleSet, itertools.product(SEARCHES, BACKENDS, FORWARDS))
    with contextlib.ExitStack() as stack:
        beds = {rules: stack.enter_context(make_bed(rules.backend)) for rules in rule_sets}
        load(beds)
        connects = take_turns(beds, TURNS, connects_of)
        show_times("TCP: connect()", connects)
        some = {rules: bed for rules, bed in beds.items() if rules.forwards in (FORWARDS[0], FORWARDS[-1])}
        streams = take_turns(some, STREAM_TURNS, stream)
        show_streams(streams)
        turn_to_udp(beds)
        datagrams = take_turns(beds, TURNS, first_datagrams)
        show_times("UDP: a flow's first datagram and its answer", datagrams)
    if not SMALL:
        draw({rules: p50(times) for rules, times in connects.items()}, PICTURE)
    return figures(connects, datagrams, streams)


# ------------------------------------------------ labs and their rules


@contextlib.contextmanager
def make_bed(backend: str) -> Iterator[Bed]:
    """A lab whose one node has the addresses of ten, and listens."""
    with Lab(backend, nodes=1, ports=()) as lab:
        lab.address(lab.nodes[0], "eth0", *(f"10.0.0.{10 + number}/24" for number in range(2, 11)))
        with lab.nodes[0].entered():
            tcp, udp = (listen(socket.AF_INET, protocol, NODE_PORT) for protocol in ("tcp", "udp"))
        with tcp, udp:
            for sock in (tcp, udp):
                sock.setblocking(True)
                be_patient(sock)
            yield Bed(lab, tcp, udp)


def load(beds: Beds) -> None:
    """The tries by running epok, the lists made of what epok wrote."""
    for rules, bed in beds.items():
        bed.lab.flush()
        if rules.search == "trie":
            bed.lab.epok("-i", "eth0", "local", snapshot=cluster(rules.forwards), check=True, timeout=600)
    for rules, bed in beds.items():
        if rules.search == "linear":
            text = linear(beds[rules._replace(search="trie")].lab.saved())
            assert text.count("--dport") == rules.forwards, "epok's rules look different now"
            bed.lab.host.run(["iptables-restore"], text, timeout=600)


def cluster(forwards: int) -> dict[str, Any]:
    """Ten nodes, and a Service for each forward."""
    ports = [port(80, NODE_PORT, "http")]
    services = (service(f"service-{number}", f"{FIRST + number}:{NODE_PORT}", ports) for number in range(forwards))
    return snapshot(*nodes_of(10), *services)


def linear(saved: str) -> str:
    """The same as epok wrote, but the search: EPOK, where PREROUTING jumps to, has a rule a forward."""
    leaf = re.compile(r'(?m)^-A EPOK\S* (-p \w+) (-m \w+ --dport \d+) (-m comment --comment ".+") -g (\S+)$')
    found = sorted(leaf.findall(saved), key=lambda rule: rule[1])
    rules = "".join(f"-A EPOK {protocol} {comment} {ports} -j {chain}\n" for protocol, ports, comment, chain in found)
    others = re.sub(r"(?m)^(-A .* -g \S+|:EPOK-\w+-\d+-\d+-\S+ .*)\n", "", saved)
    return others.replace("COMMIT\n", f"{rules}COMMIT\n", 1)


def turn_to_udp(beds: Beds) -> None:
    """The same rules for the other protocol."""
    for bed in beds.values():
        text = re.sub(r"(-p |-m |EPOK-)tcp\b", r"\1udp", bed.lab.saved())
        bed.lab.host.run(["iptables-restore"], text, timeout=600)


# ------------------------------------------------ what is timed


def take_turns(beds: Beds, turns: int, measure: Callable[[Bed, int], list[float]]) -> Samples:
    """What is measured in each lab, with its number of forwards."""
    samples: Samples = {rules: [] for rules in beds}
    for _ in range(turns):
        for rules in random.sample(list(beds), len(beds)):
            samples[rules] += measure(beds[rules], rules.forwards)
            beds[rules].lab.host.run(["conntrack", "-F"])
    return samples


def connects_of(bed: Bed, forwards: int) -> list[float]:
    """The microseconds of each connect() of one turn."""
    with bed.lab.client.entered():
        return [connect(bed.tcp, forwards) for _ in range(WARM_UP + CALLS)][WARM_UP:]


def connect(listener: socket.socket, forwards: int) -> float:
    with open_socket(socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        to = (HOST, FIRST + random.randrange(forwards))
        start = time.perf_counter_ns()
        sock.connect(to)
        end = time.perf_counter_ns()
        listener.accept()[0].close()
    return (end - start) / 1000


def first_datagrams(bed: Bed, forwards: int) -> list[float]:
    """The microseconds to each answer of one turn."""
    with bed.lab.client.entered():
        return [first_datagram(bed.udp, forwards) for _ in range(WARM_UP + CALLS)][WARM_UP:]


def first_datagram(server: socket.socket, forwards: int) -> float:
    with open_socket(socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, FIRST + random.randrange(forwards)))
        start = time.perf_counter_ns()
        sock.send(b"who?")
        reply("node1", server)
        sock.recv(200)
        end = time.perf_counter_ns()
    return (end - start) / 1000


def open_socket(kind: int) -> socket.socket:
    sock = be_patient(socket.socket(socket.AF_INET, kind))
    sock.bind(("", next(SOURCE_PORTS)))
    return sock


def be_patient(sock: socket.socket) -> socket.socket:
    """With settimeout() Python would poll within what is timed."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PATIENCE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, PATIENCE)
    return sock


def stream(bed: Bed, forwards: int) -> list[float]:
    """Gbit/s of one connection, through the last forward."""
    with ThreadPoolExecutor(1) as pool, bed.lab.connect(FIRST + forwards - 1) as out, bed.tcp.accept()[0] as end:
        start = time.perf_counter()
        received = pool.submit(drain, end)
        out.sendall(CHUNK)  # however late this process is back
        while time.perf_counter() - start < STREAM_SECONDS:
            out.sendall(CHUNK)
        out.shutdown(socket.SHUT_WR)
        return [received.result() * 8 / 1e9 / (time.perf_counter() - start)]


def drain(sock: socket.socket) -> int:
    """How many bytes come until the end."""
    buffer = bytearray(len(CHUNK))
    return sum(iter(lambda: sock.recv_into(buffer), 0))


# ------------------------------------------------ what is shown


def p50(times: list[float]) -> float:
    return statistics.median(times)


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def ratio(samples: Samples, rules: RuleSet, of: Callable[[list[float]], float] = p50) -> float:
    """To that of one forward."""
    return of(samples[rules]) / of(samples[rules.one()])


def show_times(what: str, samples: Samples) -> None:
    count = len(next(iter(samples.values())))
    print(f"{what}, microseconds of {count} with each rule set; ratios to one forward")
    print("search  backend forwards       p50       p99  p50 ratio  p99 ratio")
    for rules, times in samples.items():
        ratios = f"{ratio(samples, rules):10.2f} {ratio(samples, rules, p99):10.2f}"
        print(f"{rules.search:7} {rules.backend:7} {rules.forwards:8} {p50(times):9.1f} {p99(times):9.1f} {ratios}")


def show_streams(samples: Samples) -> None:
    print(f"A TCP stream, the median of {STREAM_TURNS}; ratios to one forward")
    print("search  backend forwards    Gbit/s     ratio")
    for rules, speeds in samples.items():
        speed = f"{p50(speeds):9.2f} {ratio(samples, rules):9.2f}"
        print(f"{rules.search:7} {rules.backend:7} {rules.forwards:8} {speed}", flush=True)


def figures(connects: Samples, datagrams: Samples, streams: Samples) -> list[Figure]:
    """The ratios to one forward."""
    made = []
    for backend, forwards in itertools.product(BACKENDS, SHOWN):
        trie, linear = (RuleSet(search, backend, forwards) for search in SEARCHES)
        to_one = f"{forwards:,} forwards to 1"
        made += [
            Figure(f"TCP connect, p50, {to_one}", backend, ratio(connects, trie), "times", GOALS.get(forwards)),
            Figure(f"TCP connect, p50, {to_one}, linear rules", backend, ratio(connects, linear), "times"),
            Figure(f"TCP connect, p99, {to_one}", backend, ratio(connects, trie, p99), "times"),
            Figure(f"UDP first datagram, p50, {to_one}", backend, ratio(datagrams, trie), "times"),
            Figure(f"UDP first datagram, p99, {to_one}", backend, ratio(datagrams, trie, p99), "times"),
        ]
        if trie in streams:
            made.append(Figure(f"TCP stream, Gbit/s, {to_one}", backend, ratio(streams, trie), "times"))
    return made


def draw(points: Mapping[RuleSet, float], file: Path) -> None:
    """A picture of microseconds by the number of forwards; the same points make the same bytes."""
    with matplotlib.rc_context(STYLE):
        picture = Picture(figsize=(7, 4), layout="constrained")
        axes = picture.subplots()
        for (search, backend), look in LINES.items():
            line = [(rules.forwards, points[rules]) for rules in points if rules[:2] == (search, backend)]
            what = "epok" if search == "trie" else "a rule a forward, in a row"
            axes.plot(*zip(*line, strict=True), look, label=f"{what}: {backend}")
        axes.set(xscale="log", ylim=(0, None), xlabel="forwards", ylabel="TCP connect(), p50, microseconds")
        axes.set_xticks(FORWARDS, [f"{forwards:,}" for forwards in FORWARDS])
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.legend()
        picture.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for figure in measure_path(Path(name)):
            print(f"{figure.what:60} {figure.backend:7} {figure.value:6.2f} {figure.unit}")
