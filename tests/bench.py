"""Prints what a run costs: wall time, peak memory and size of the swap. Must be run as root.

Times are medians of several runs in the lab, the cluster read from a file; iptables-save alone stands beside them.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import EPOK, Lab
from objects import node, port, service, snapshot

RUNS = 7
NODES = [node(f"node{number}", f"10.0.0.{10 + number}") for number in range(1, 11)]


def cluster(forwards: int, changed: int = -1) -> dict[str, Any]:
    """Ten nodes, and as many Services with one forward each; that of `changed` has another NodePort."""
    services = []
    for number in range(forwards):
        node_port = 29999 if number == changed else 20000 + number
        services.append(service(f"service-{number}", f"{10000 + number}:{node_port}", [port(80, node_port, "http")]))
    return snapshot(*NODES, *services)


def measure(lab: Lab, argv: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a command in the host's namespaces."""
    start = time.perf_counter()
    child = subprocess.Popen(lab.host.command(argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"exit status {child.returncode}: {argv}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def median(lab: Lab, argv: Sequence[str]) -> tuple[float, float]:
    seconds, megabytes = zip(*(measure(lab, argv) for _ in range(RUNS)), strict=True)
    return statistics.median(seconds), max(megabytes)


def run(lab: Lab, forwards: int, folder: Path) -> None:
    names = [folder / f"{forwards}-{what}.json" for what in ("before", "after")]
    for name, content in zip(names, (cluster(forwards), cluster(forwards, changed=forwards // 2)), strict=True):
        name.write_text(json.dumps(content))
    epok = [[sys.executable, str(EPOK), "-i", "eth0", "--snapshot", str(name), "local"] for name in names]
    lab.flush()
    first, _ = measure(lab, epok[0])
    sync, memory = median(lab, epok[0])
    save, _ = median(lab, ["iptables-save", "-t", "nat"])
    dry = lab.host.run([*epok[1][:-1], "--dry-run", "local"], check=False).stdout
    size = len(dry[dry.index("*nat") :])
    changed, _ = measure(lab, epok[1])
    print(
        f"{lab.backend:7} {forwards:6} {first:8.2f} s {sync:8.2f} s {memory:6.0f} MB {save:9.3f} s"
        f" {changed:9.2f} s {size:8} bytes",
        flush=True,
    )


def main() -> None:
    print("backend forwards first run   in sync    peak  iptables-save one change  its input")
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("nft", "legacy"):
            with Lab(backend, nodes=0) as lab:
                for forwards in (10, 2700):
                    run(lab, forwards, Path(folder))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"(the benchmark itself: {own:.0f} MB; a figure below that would be its own)")


if __name__ == "__main__":
    main()
