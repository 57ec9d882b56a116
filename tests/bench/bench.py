"""bench.py [PART...]: prints what epok costs, beside what people use instead, and a table at the end. Needs root.

    path     connecting, UDP and a stream through 1 to 10,000 forwards, beside rules in a row; draws bench.svg
    runs     a run of epok by forwards and nodes and by step, beside kubectl and jq, a script, an iptables a rule
    memory   the peak of epok's own process, here and over SSH
    nodes    what --max-nodes saves
    stages   a swap at once and in stages
    swaps    whether connections fail while epok swaps again and again

Without a name all of them, which takes more than half an hour. EPOK_BENCH=10 shows in minutes whether they run. Figures
of one part are measured side by side, real iptables and a real kube-apiserver in the lab's network namespaces.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the packages `bench` and `lab`

from bench.measure import Figure
from bench.memory import measure_memory
from bench.nodes import measure_nodes
from bench.path import measure_path
from bench.runs import measure_runs
from bench.swaps import measure_stages, measure_swaps

PARTS: dict[str, Callable[[Path], list[Figure]]] = {
    "path": measure_path,
    "runs": measure_runs,
    "memory": measure_memory,
    "nodes": measure_nodes,
    "stages": measure_stages,
    "swaps": measure_swaps,
}


def shown(figure: Figure) -> str:
    digits = 0 if figure.value >= 100 or figure.value == int(figure.value) else 2
    value = f"{figure.value:10.{digits}f}"
    line = f"{figure.what:70} {figure.backend:7}{value} {figure.unit:6}"
    if figure.goal is None:
        return line.rstrip()
    return f"{line} at most {figure.goal:g}" + ("" if figure.value <= figure.goal else ": MISSED")


def main(names: list[str]) -> None:
    if unknown := set(names) - PARTS.keys():
        raise SystemExit(f"bench.py: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    figures = []
    for name in names or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n# {name}", flush=True)
            figures += PARTS[name](Path(folder))
    print("\n# all figures")
    for figure in figures:
        print(shown(figure))


if __name__ == "__main__":
    main(sys.argv[1:])
