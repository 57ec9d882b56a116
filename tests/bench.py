"""Prints what a run costs: wall time, peak memory and size of the swap. Must be run as root.

Times are medians of several runs in the lab, the cluster read from a file; iptables-save alone stands beside them.
Then the cluster is a real kube-apiserver, and beside each run stands what a shell script would begin with: kubectl
piped into jq, and iptables-save.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apiserver import ApiServer
from conftest import BACKENDS
from lab import EPOK, Lab
from objects import node, port, service, snapshot

RUNS = 7
SIZES = [int(size) for size in os.environ.get("EPOK_BENCH", "10,2700").split(",")]  # forwards
NODES = [node(f"node{number}", f"10.0.0.{10 + number}") for number in range(1, 11)]


def cluster(forwards: int, changed: int = -1) -> dict[str, Any]:
    """Ten nodes, and as many Services with one forward each; that of `changed` has another NodePort."""
    services = []
    for number in range(forwards):
        node_port = 29999 if number == changed else 20000 + number
        services.append(service(f"service-{number}", f"{10000 + number}:{node_port}", [port(80, node_port, "http")]))
    return snapshot(*NODES, *services)


# A process of its own: the peak memory of a child is never less than its parent's when it was forked.
METER = """import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_maxrss / 1024, used.ru_utime + used.ru_stime)
sys.exit(status)"""


def measure(lab: Lab, argv: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of a command in the host's namespaces."""
    seconds, megabytes, _ = meter(lab, argv)
    return seconds, megabytes


def meter(lab: Lab, argv: Sequence[str]) -> tuple[float, float, float]:
    """The same, and seconds of CPU."""
    seconds, megabytes, cpu = lab.host.run([sys.executable, "-ISc", METER, *argv]).stdout.split()
    return float(seconds), float(megabytes), float(cpu)


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


JQ = """[.items[] | select(.kind == "Service" and .metadata.annotations["getbetter.ro/externalport"]) |
  [.metadata.namespace, .metadata.name, .metadata.annotations["getbetter.ro/externalport"], .spec.ports]],
  [.items[] | select(.kind == "Node") | .status.addresses]"""
SCRIPT = """kubectl=$1 config=$2 jq=$3
$kubectl --kubeconfig "$config" get services,nodes -A -o json | jq "$jq"
for table in nat filter; do iptables-save -t $table; ip6tables-save -t $table; done"""


def beside_kubectl(lab: Lab, forwards: int, folder: Path) -> None:
    """A run with nothing to change, of the account that has the role of cron/, and the script, in turn."""
    server = ApiServer(lab.host, folder)
    server.create(*cluster(forwards)["items"])
    server.grant()
    config = server.kubeconfig("epok", token=server.token())
    epok = [sys.executable, str(EPOK), "-i", "eth0", "--kubeconfig", config, "local"]
    script = ["sh", "-ec", SCRIPT, "sh", server.programs["kubectl"], config, JQ]
    measure(lab, epok)
    server.forget()
    measure(lab, epok)
    requests = len(server.asked())
    own, its = zip(*((measure(lab, epok), measure(lab, script)) for _ in range(RUNS)), strict=True)
    seconds = [statistics.median(second for second, _ in side) for side in (own, its)]
    memory = max(megabytes for _, megabytes in own)
    print(
        f"{lab.backend:7} {forwards:6} {seconds[0]:8.2f} s {memory:6.0f} MB {requests:8} {seconds[1]:18.2f} s"
        f" {seconds[0] / seconds[1]:8.2f}",
        flush=True,
    )


def main() -> None:
    print("backend forwards first run   in sync    peak  iptables-save one change  its input")
    with tempfile.TemporaryDirectory() as folder:
        for backend in BACKENDS:
            with Lab(backend, nodes=0) as lab:
                for forwards in SIZES:
                    run(lab, forwards, Path(folder))
    print("backend forwards    in sync    peak requests   kubectl, jq, save    ratio")
    for backend, forwards in itertools.product(BACKENDS, SIZES):
        with Lab(backend, nodes=0) as lab, tempfile.TemporaryDirectory() as folder:
            beside_kubectl(lab, forwards, Path(folder))


if __name__ == "__main__":
    main()
