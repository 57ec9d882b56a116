"""The peak of epok's own process, here and over SSH: where all is new, in sync, and with one change.

The cluster is a real kube-apiserver with 10,000 Services and 10 nodes; the host that is logged in to is this one.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measure import FEW, SMALL, Figure
from bench.runs import USUAL, Bed
from lab.meter import metered
from lab.network import EPOK, Lab
from lab.sshd import Sshd, make_key

SERVICES = 20 if SMALL else 10_000
FORWARDS = (10,) if SMALL else (10, 2700, 10_000)  # of these Services
# MB by forwards and way: all new, and in sync
GOALS = {
    (10, "local"): (60, 60),
    (2700, "local"): (None, 70),
    (10_000, "local"): (100, 90),
    (10_000, "ssh"): (128, 110),
}


def ways(bed: Bed, folder: Path) -> dict[str, Sequence[str]]:
    """How the rules come to the host: the last words of the command line."""
    server = Sshd(bed.lab.host)
    key = make_key(folder / "key", "ed25519")
    server.authorize(key.with_suffix(".pub").read_text().strip())
    return {"local": ["local"], "ssh": ["ssh", "--host=root@127.0.0.1", f"--key={key}", "--host-key=any"]}


def measure_way(bed: Bed, way: str, words: Sequence[str]) -> list[Figure]:
    options = ["-i", "eth0", "--kubeconfig", bed.config, "--timeout", "600", "-q", *words]

    def peak() -> float:
        return metered(bed.lab.host, [sys.executable, str(EPOK), *options], timeout=900)[1].megabytes

    bed.lab.flush()
    new, sync = peak(), max(peak() for _ in range(FEW))
    bed.change(True)
    change = peak()
    bed.change(False)
    print(f"{bed.forwards:8} {way:6}" + "".join(f" {each:9.1f} MB" for each in (new, sync, change)), flush=True)
    what = f"peak, {bed.forwards} of {SERVICES} Services forwarded, {way}, "
    goals = GOALS.get((bed.forwards, way), (None, None))
    return [
        Figure(f"{what}{name}", bed.backend, each, "MB", goal)
        for name, each, goal in zip(("all new", "in sync"), (new, sync), goals, strict=True)
    ]


def measure_memory(folder: Path) -> list[Figure]:
    print("forwards way      all new      in sync   one change")
    figures: list[Figure] = []
    with Lab("nft", nodes=0) as lab:
        bed = Bed(lab, folder)
        bed.have_nodes(USUAL)
        each = ways(bed, folder)
        for forwards in FORWARDS:
            bed.have_services(SERVICES, forwards)
            for way, words in each.items():
                figures += measure_way(bed, way, words)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        measure_memory(Path(name))
