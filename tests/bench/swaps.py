"""Swaps while clients connect all the time: whether any connection fails, and what stages cost.

The cluster is read from a file, each forward goes to a NodePort of its own on ten nodes, and an echo server answers
there. A client makes connections to all forwards (see load.py) while epok runs again and again: each time one forward
goes to another NodePort, and every tenth time a node goes or comes back too, which changes all forwards.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bench.measure import SMALL, Figure, cluster
from lab.load import Load, Result
from lab.machine import BACKENDS
from lab.network import EPOK, HOST, Lab, await_banner, inputs_shown

NODES = 10
SWAPS, EVERY, SIZES = (3, 3, (10,)) if SMALL else (100, 10, (300, 2700))
RATE = 2100  # a little more than the 2,000 connections a second that are promised, for what the ends take
HELD = 20  # connections that stay open all the time
STAGE = 4096
WAYS = {"at once": 10**9, "as by default": 1677722, "in stages": STAGE}  # by --batch-size
DESCRIPTORS = 65536  # an echo server listens on every NodePort

States = Mapping[tuple[bool, bool], Path]


def write_states(folder: Path, forwards: int) -> States:
    """The cluster, by whether one forward goes elsewhere and whether a node is excluded."""
    states = {}
    for changed, excluded in itertools.product((False, True), repeat=2):
        made = cluster(forwards, changed=forwards // 2 if changed else -1, nodes=NODES)
        if excluded:
            made["items"][NODES - 1]["metadata"]["annotations"]["epok.getbetter.ro/exclude"] = ""
        states[changed, excluded] = folder / f"{forwards}-{changed}-{excluded}.json"
        states[changed, excluded].write_text(json.dumps(made))
    return states


def ports_of(forwards: int) -> dict[int, list[int]]:
    """The host's ports, and the NodePorts that they may lead to in any of the states."""
    ports = {10000 + number: [20000 + number] for number in range(forwards)}
    ports[10000 + forwards // 2].append(30000)
    return ports


def epok(lab: Lab, state: Path, *options: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, str(EPOK), "-i", "eth0", "--snapshot", str(state), *options, "local"]
    return lab.host.run(argv, check=check, timeout=1200)


def swap(lab: Lab, state: Path, *options: str) -> float:
    """Seconds that a run takes which must change something."""
    start = time.perf_counter()
    done = epok(lab, state, *options)
    seconds = time.perf_counter() - start
    if "nothing changed" in done.stderr:
        raise RuntimeError(f"{state.name} was there already")
    return seconds


def serve(lab: Lab, ports: Mapping[int, list[int]]) -> None:
    """An echo server on all NodePorts of each node."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, most), most))
    numbers = sorted(number for may in ports.values() for number in may)
    for server in [lab.start_server(space, space.name, numbers, ("tcp",)) for space in lab.nodes]:
        await_banner(server)


def under_load(lab: Lab, forwards: int, states: States) -> tuple[Result, list[float]]:
    """What became of the connections, and the seconds of each swap."""
    ports = ports_of(forwards)
    serve(lab, ports)
    epok(lab, states[False, False])
    with Load(lab.client, HOST, ports, RATE, held=list(itertools.islice(itertools.cycle(ports), HELD))) as load:
        seconds = [swap(lab, states[turn % 2 == 1, turn // EVERY % 2 == 1]) for turn in range(1, SWAPS + 1)]
    return load.result, seconds


def measure_swaps(folder: Path) -> list[Figure]:
    forwards = SIZES[-1]
    states = write_states(folder, forwards)
    print(f"swaps of {forwards} forwards on {NODES} nodes, {HELD} connections stay open")
    print("backend swaps connections  a second failed slowest one forward all forwards")
    figures = []
    for backend in BACKENDS:
        with Lab(backend, nodes=NODES, ports=()) as lab:
            result, seconds = under_load(lab, forwards, states)
        small = [second for turn, second in enumerate(seconds, 1) if turn % EVERY]
        each = f"{statistics.median(small):9.2f} s {statistics.median(seconds[EVERY - 1 :: EVERY]):10.2f} s"
        made = f"{result.attempted:11,} {result.rate:9,.0f} {result.failed:6} {result.slowest:5.2f} s"
        print(f"{backend:7} {SWAPS:5} {made} {each}", flush=True)
        for kind in [kind for kind, count in result.failures.items() if count]:
            print(f"{backend:7} {kind}: {result.failures[kind]}", flush=True)
        figures += [
            Figure(f"failed connections in {SWAPS} swaps", backend, result.failed, "", 0),
            Figure("connections a second meanwhile", backend, result.rate, ""),
        ]
    return figures


class Way(NamedTuple):
    """What a swap took, and the sizes of its inputs: how many, the largest, and the one that turns the traffic over."""

    seconds: float
    inputs: int
    largest: int
    flip: int


def measure_way(lab: Lab, states: States, size: int) -> Way:
    """A swap of all forwards, there and back again; in many stages it is made but once."""
    old, new = states[False, False], states[False, True]
    options = ["--batch-size", str(size), "--timeout", "900"]
    texts = inputs_shown(epok(lab, new, "--dry-run", *options, check=False).stdout)
    seconds = []
    for _ in range(1 if size == STAGE else 3):
        seconds.append(swap(lab, new, *options))
        swap(lab, old, "--timeout", "900")
    flip = next(len(text) for text in texts if "\n-A EPOK " in text)
    return Way(statistics.median(seconds), len(texts), max(map(len, texts)), flip)


def measure_ways(lab: Lab, forwards: int, states: States) -> list[Figure]:
    epok(lab, states[False, False])
    figures = []
    for name, size in WAYS.items():
        way = measure_way(lab, states, size)
        sizes = f"{way.inputs:6} {way.largest:9,} {way.flip:9,}"
        print(f"{lab.backend:7} {forwards:8} {name:15} {way.seconds:7.2f} s {sizes}", flush=True)
        figures.append(Figure(f"all of {forwards} forwards changed {name}", lab.backend, way.seconds, "s"))
    return [
        *figures,
        Figure("inputs of that", lab.backend, way.inputs, ""),
        Figure("the largest of them", lab.backend, way.largest, "bytes", STAGE),
        Figure("the flip", lab.backend, way.flip, "bytes"),
    ]


def measure_stages(folder: Path) -> list[Figure]:
    print(f"swaps of all forwards on {NODES} nodes, nobody connects; in stages is --batch-size {STAGE}")
    print("backend forwards way                  took inputs   largest  its flip")
    figures = []
    for backend, forwards in itertools.product(BACKENDS, SIZES):
        with Lab(backend, nodes=0) as lab:
            figures += measure_ways(lab, forwards, write_states(folder, forwards))
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        for figure in measure_swaps(Path(made)) + measure_stages(Path(made)):
            print(*figure)
