"""What --max-nodes is for: 2,700 forwards on 100 nodes, by how many of the nodes a Service may have.

More nodes make more rules, which cost time to load and to read, and memory of the kernel; fewer leave a Service with
fewer nodes when some are lost. The cluster is read from a file.
"""

import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from bench.measure import RUNS, SMALL, Figure, cluster, meter, restore
from lab.machine import BACKENDS
from lab.network import EPOK, Lab, inputs_shown

FORWARDS, NODES = (10, 100) if SMALL else (2700, 100)
MOST = (16,) if SMALL else (4, 8, 16, 32, 100)
IN_THE_END = (16, 100)  # the default, and all


def kernel_megabytes() -> float:
    """What rules are kept in: nft's in slabs, legacy's in pages that are mapped, its counters for each CPU.

    The kernel frees old rules after the command that deleted them, so this waits until the number stays.
    """
    before, now = -10.0, 0.0
    while abs(now - before) > 0.5:
        time.sleep(0.5)
        fields = dict(re.findall(r"(\w+): +(\d+) kB", Path("/proc/meminfo").read_text()))
        before, now = now, sum(int(fields[name]) for name in ("Slab", "VmallocUsed", "Percpu")) / 1000
    return now


def write_cluster(folder: Path, lost: int) -> Path:
    """Without the first `lost` of the nodes."""
    made = cluster(FORWARDS, nodes=NODES)
    file = folder / f"{lost}.json"
    file.write_text(json.dumps({**made, "items": made["items"][lost:]}))
    return file


def share(lab: Lab) -> float:
    """By how much the node with most forwards has more than the average."""
    counts = Counter(re.findall(r"--to-destination ([0-9.]+):", lab.saved()))
    return max(counts.values()) / statistics.mean([*counts.values(), *[0] * (NODES - len(counts))])


def measure_most(lab: Lab, most: int, files: list[Path]) -> list[Figure]:
    lab.flush()
    argv = ["-q", "-i", "eth0", "--timeout", "900", "--max-nodes", str(most), "--batch-size", "1000000000", "local"]
    epok = [[sys.executable, str(EPOK), "--snapshot", str(file), *argv] for file in files]
    before = kernel_megabytes()
    [text] = inputs_shown(lab.host.run([*epok[0], "--dry-run"], check=False, timeout=900).stdout)
    load = restore(lab, text)
    memory = kernel_megabytes() - before
    save = statistics.median(meter(lab, ["iptables-save", "-t", "nat"]).seconds for _ in range(RUNS))
    sync = [meter(lab, epok[0]) for _ in range(3)]
    balance = share(lab)
    lost = meter(lab, epok[1]).seconds
    seconds = statistics.median(used.seconds for used in sync)
    print(
        f"{lab.backend:7} {most:9} {text.count(' DNAT '):8,} {load:8.2f} s {memory:9.0f} MB {save:6.2f} s"
        f" {seconds:8.2f} s {lost:9.2f} s {max(used.megabytes for used in sync):5.0f} MB {balance:9.2f}",
        flush=True,
    )
    if most not in IN_THE_END:
        return []
    what = f"{FORWARDS} forwards on {NODES} nodes, {most} for each: "
    return [
        Figure(f"{what}iptables-restore", lab.backend, load, "s"),
        Figure(f"{what}memory of the kernel", lab.backend, memory, "MB"),
        Figure(f"{what}in sync", lab.backend, seconds, "s"),
        Figure(f"{what}a node lost", lab.backend, lost, "s"),
    ]


def measure_nodes(folder: Path) -> list[Figure]:
    print("backend max-nodes    rules    restore kernel memory   save    in sync node lost  peak most/mean")
    figures = []
    files = [write_cluster(folder, lost) for lost in (0, 1)]
    for backend in BACKENDS:
        with Lab(backend, nodes=0) as lab:
            for most in MOST:
                figures += measure_most(lab, most, files)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        measure_nodes(Path(made))
