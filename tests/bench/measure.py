"""What the benchmarks share: the clusters they forward, the meter for commands, and the figures they end with."""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from lab.meter import Used, metered
from lab.network import Lab
from lab.objects import node, port, service, snapshot

SIZES = [int(size) for size in os.environ.get("EPOK_BENCH", "10,2700,10000").split(",")]  # forwards
SMALL = "EPOK_BENCH" in os.environ  # as the README's test has it: whether it runs, not what it shows
RUNS, FEW = (1, 1) if SMALL else (7, 3)  # of what is measured; of what takes long


class Figure(NamedTuple):
    """A line of the table at the end; `goal` is the most that `value` may be, None where there is no budget."""

    what: str
    backend: str
    value: float
    unit: str
    goal: float | None = None


def nodes_of(count: int) -> list[dict[str, Any]]:
    """Nodes with the addresses 10.0.0.11 and on."""
    return [node(f"node{number}", f"10.0.0.{10 + number}") for number in range(1, count + 1)]


def cluster(forwards: int, changed: int = -1, nodes: int = 10) -> dict[str, Any]:
    """Nodes, and as many Services with one forward each; that of `changed` has another NodePort."""
    services = []
    for number in range(forwards):
        node_port = 30000 if number == changed else 20000 + number
        services.append(service(f"service-{number}", f"{10000 + number}:{node_port}", [port(80, node_port, "http")]))
    return snapshot(*nodes_of(nodes), *services)


def meter(lab: Lab, argv: Sequence[str]) -> Used:
    """What a command takes in the host's namespaces."""
    return metered(lab.host, argv)[1]


def restore(lab: Lab, text: str) -> float:
    """Seconds that iptables-restore takes for an input, as epok hands it over."""
    start = time.perf_counter()
    lab.host.run(["iptables-restore", "--noflush", "--wait", "5"], text, timeout=600)
    return time.perf_counter() - start


def middle(used: Sequence[Used]) -> Used:
    """The medians of time, and the highest peak of memory."""
    seconds, megabytes, cpu = zip(*used, strict=True)
    return Used(statistics.median(seconds), max(megabytes), statistics.median(cpu))
