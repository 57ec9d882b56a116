"""What a run costs: in sync and with one change, by forwards and nodes, by step, and beside what people write instead.

The cluster is a real kube-apiserver with etcd, read by the account that has the role of cron/. One change is another
NodePort of one Service. Times are medians; those of a first run have up to 5 seconds for Events in them. What takes
long, like a script with 100,000 rules, is run less often.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.measure import FEW, RUNS, SIZES, SMALL, Figure, cluster, meter, middle, nodes_of, restore
from lab.apiserver import ApiServer
from lab.machine import BACKENDS
from lab.meter import Used
from lab.network import EPOK, Lab, inputs_shown
from lab.objects import Object

STEPS = Path(__file__).resolve().parent / "steps.py"
RIVAL = Path(__file__).resolve().parent / "rival.sh"
USUAL, BUDGET = 10, 2700  # nodes and forwards that the budget is for
NODES = (USUAL,) if SMALL else (3, USUAL, 100)
IMPORT = [sys.executable, "-c", "import kubernetes.config, kubernetes.client"]
# What a script would begin with, whatever it did then.
READ = """$1 --kubeconfig "$2" get services,nodes -A -o json | jq '[.items[] |
  select(.kind == "Service" and .metadata.annotations["getbetter.ro/externalport"]) |
  [.metadata.namespace, .metadata.name, .metadata.annotations["getbetter.ro/externalport"], .spec.ports]],
  [.items[] | select(.kind == "Node") | .status.addresses]'
for table in nat filter; do iptables-save -t $table; ip6tables-save -t $table; done"""
# As the older epok: a rule for each forward and node, and an iptables for each rule.
ONE_BY_ONE = """number=0
while [ $number -lt "$2" ]; do
    number=$((number + 1))
    iptables -w 5 -t nat "$1" PREROUTING -i eth0 -p tcp -m tcp --dport 9999 -m comment --comment epok_rule_id \\
        -j DNAT --to-destination 10.0.0.$((10 + number)):2025
done"""


class Bed:
    """A host, and a cluster that grows."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.backend = lab, lab.backend
        self.server = ApiServer(lab.host, folder)
        self.server.grant()
        self.config = self.server.kubeconfig("epok", token=self.server.token())
        self.options = ["-i", "eth0", "--kubeconfig", self.config, "--timeout", "600", "-q", "local"]
        self.epok = [sys.executable, str(EPOK), *self.options]
        self.services = self.forwards = self.nodes = 0

    def have_services(self, count: int, forwards: int) -> None:
        """So many Services, the first of them with an annotation."""
        made = [item for item in cluster(count)["items"] if item["kind"] == "Service"]
        for item in made[self.services :]:
            if int(item["metadata"]["name"].split("-")[1]) >= forwards:
                del item["metadata"]["annotations"]
        self.server.create(*made[self.services :])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.patch, made[self.forwards : min(self.services, forwards)]))
        self.services, self.forwards = max(count, self.services), forwards

    def have_nodes(self, count: int) -> None:
        for number in range(count, self.nodes):
            self.server.request("DELETE", f"/api/v1/nodes/node{number + 1}")
        self.server.create(*nodes_of(count)[self.nodes :])
        self.nodes = count

    def patch(self, made: Object) -> None:
        """Gives the Service of that name its annotations and ports."""
        name, annotations = made["metadata"]["name"], made["metadata"]["annotations"]
        fields = {"metadata": {"annotations": annotations}, "spec": {"ports": made["spec"]["ports"]}}
        self.server.patch(f"/api/v1/namespaces/default/services/{name}", **fields)

    def change(self, to: bool) -> None:
        """Gives the Service in the middle the other NodePort, or its own again."""
        number = self.forwards // 2
        self.patch(cluster(number + 1, changed=number if to else -1)["items"][-1])

    def run(self) -> Used:
        return meter(self.lab, self.epok)

    def rival(self) -> list[str]:
        return [str(RIVAL), self.server.programs["kubectl"], self.config, "eth0"]

    def read(self) -> list[str]:
        return ["sh", "-ec", READ, "sh", self.server.programs["kubectl"], self.config]


def in_turn(lab: Lab, runs: int, *commands: Sequence[str]) -> list[Used]:
    """Medians of several commands, run one after the other each time."""
    each = [[meter(lab, argv) for argv in commands] for _ in range(runs)]
    return [middle(used) for used in zip(*each, strict=True)]


def show(bed: Bed, *columns: Used, what: str = "") -> None:
    cells = (f" {used.seconds:7.2f} s {used.cpu:7.2f} s {used.megabytes:5.0f} MB" for used in columns)
    print(f"{bed.backend:7} {bed.forwards:8} {bed.nodes:5}" + "".join(cells), what, flush=True)


def by_size(bed: Bed, runs: int) -> list[Figure]:
    """The first run, one in sync and one with a change."""
    bed.lab.flush()
    first = bed.run()
    sync = middle([bed.run() for _ in range(runs)])
    changed = []
    for turn in range(runs):
        bed.change(turn % 2 == 0)
        changed.append(bed.run())
    bed.change(False)
    bed.run()
    show(bed, first, sync, middle(changed))
    what = f"one change among {bed.forwards} forwards, {bed.nodes} nodes, beside in sync"
    ratio = middle(changed).seconds / sync.seconds
    return [Figure(what, bed.backend, ratio, "times", 1.4 if (bed.forwards, bed.nodes) == (10_000, USUAL) else None)]


def beside(bed: Bed) -> list[Figure]:
    """In sync beside what a script would begin with, and beside the import of the client alone, in turn."""
    runs = RUNS if bed.forwards <= BUDGET else 1
    epok, read, imported = in_turn(bed.lab, runs, bed.epok, bed.read(), IMPORT)
    show(bed, epok, read, imported, what="in sync: epok; kubectl, jq, saves; import kubernetes")
    figures = []
    if bed.forwards == BUDGET or SMALL:
        what = f"in sync, {bed.forwards} forwards, beside kubectl, jq, saves"
        goal = {"nft": 0.5, "legacy": 0.6}[bed.backend]
        figures.append(Figure(what, bed.backend, epok.seconds / read.seconds, "times", None if SMALL else goal))
    if bed.forwards == 10:
        what = "in sync, 10 forwards, beside the import of kubernetes"
        figures.append(Figure(what, bed.backend, epok.seconds / imported.seconds, "times", 1.1))
    return figures


def one_change(bed: Bed) -> list[Figure]:
    """The input that changes one forward, and what iptables-restore takes for it."""
    seconds, size = [], 0
    for turn in range(RUNS):
        bed.change(turn % 2 == 0)
        [text] = inputs_shown(bed.lab.host.run([*bed.epok, "--dry-run"], check=False, timeout=600).stdout)
        seconds.append(restore(bed.lab, text))
        size = max(size, len(text))
    bed.change(False)
    bed.run()
    goals = {"nft": 0.1, "legacy": 0.2}
    return [
        Figure(f"one of {bed.forwards} forwards changed: input", bed.backend, size / 1000, "kB", 6),
        Figure("its iptables-restore", bed.backend, statistics.median(seconds), "s", goals[bed.backend]),
    ]


def by_step(bed: Bed) -> None:
    """When each step of a run in sync begins and what it takes."""
    steps: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(RUNS):
        argv = [sys.executable, str(STEPS), str(EPOK), str(time.monotonic()), *bed.options]
        totals: dict[str, tuple[float, float, float]] = {}
        for step, start, seconds, cpu in json.loads(bed.lab.host.run(argv).stdout):
            before = totals.get(step, (start, 0.0, 0.0))
            totals[step] = (min(start, before[0]), before[1] + seconds, before[2] + cpu)
        for step, total in totals.items():
            steps.setdefault(step, []).append(total)
    print(f"{bed.backend}, {bed.forwards} forwards, in sync, ms           begins    takes      CPU")
    middles = {
        step: [statistics.median(column) for column in zip(*found, strict=True)] for step, found in steps.items()
    }
    for step, figures in sorted(middles.items(), key=lambda item: item[1][0]):
        print(f"    {step:32}" + "".join(f"{1000 * figure:9.1f}" for figure in figures))
    sys.stdout.flush()


def rivals(bed: Bed) -> None:
    """What the script and one iptables a rule take, with rules of their own in place of epok's."""
    bed.lab.flush()
    first = meter(bed.lab, bed.rival())
    runs = FEW if bed.forwards <= BUDGET else 1
    sync, read = in_turn(bed.lab, runs, bed.rival(), bed.read())
    changed, single = [], []
    for turn in range(runs):
        bed.change(turn % 2 == 0)
        changed.append(meter(bed.lab, bed.rival()))
        # one change takes the old rules away and appends the new ones
        single.append([meter(bed.lab, ["sh", "-ec", ONE_BY_ONE, "sh", do, str(bed.nodes)]) for do in ("-A", "-D")])
    bed.change(False)
    show(bed, first, sync, middle(changed), what="rival.sh")
    show(bed, read, what="kubectl, jq, saves")
    seconds = statistics.median(sum(used.seconds for used in pair) for pair in single)
    print(f"{bed.backend:7} {bed.forwards:8} {bed.nodes:5} one change, an iptables a rule: {seconds:.2f} s", flush=True)
    bed.lab.flush()


def at_size(bed: Bed, nodes: int) -> list[Figure]:
    bed.have_nodes(nodes)
    figures = by_size(bed, RUNS if nodes == USUAL else FEW)
    if nodes != USUAL:
        return figures
    figures += beside(bed)
    by_step(bed)
    if bed.forwards == BUDGET or SMALL:
        figures += one_change(bed)
    rivals(bed)
    return figures


def measure_runs(folder: Path) -> list[Figure]:
    figures: list[Figure] = []
    heads = ("first run", "in sync", "one change")
    print("backend forwards nodes" + "".join(f" {head + ': wall, CPU, peak':>27}" for head in heads))
    for backend in BACKENDS:
        (folder / backend).mkdir()
        with Lab(backend, nodes=0) as lab:
            bed = Bed(lab, folder / backend)
            for size in SIZES:
                bed.have_services(size, size)
                for nodes in NODES:
                    figures += at_size(bed, nodes)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure_runs(Path(name))
