"""uninstall.py [TIMES]: how often something stays when epok is uninstalled around the begin of a minute.

In a real cluster, with the README's blocks: installed, forwarding, and uninstalled at tenths of a second before and
after the minute in which a run starts. What stays would be a rule on the gateway or an object in the cluster. Needs
root, what tests/setup all installs, and two minutes for each.
"""

import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the packages `bench` and `lab`

from lab.container import Store
from lab.network import ECHO
from lab.readme import UNINSTALL
from lab.real_cluster import NAMESPACE, Cluster, Watch
from test_real_cluster import ECHO_IMAGE, World, next_minute, sleep_until

KINDS = "ns,cronjob,job,pod,secret,sa,clusterrole,clusterrolebinding"


def left(world: World) -> list[str]:
    """What is still there after a success: chains on the gateway, objects in the cluster."""
    chains = re.findall(r"(?m)^:(EPOK\S*)", world.cluster.saved() + world.cluster.saved(6))
    there = world.kubectl("get", KINDS, "-A", "-o", "name").split()
    return chains + [name for name in there if "epok" in name]


def uninstalled(world: World, offset: float) -> str:
    """Installs, waits for the first run, uninstalls that long after a minute's begin: what came of it."""
    world.desk.read("In the cluster, every minute, over SSH", 0)
    world.desk.read("In the cluster, every minute, over SSH", 1)
    while "EPOK-tcp-25" not in world.cluster.saved():
        time.sleep(1)
    sleep_until(next_minute(time.time() + 2) + offset)
    begun = time.time()
    try:
        world.desk.read(UNINSTALL, 0)
    except AssertionError as error:
        ours = world.kubectl("get", "cronjob,secret", "-n", NAMESPACE, "-o", "name").split()
        return f"failed, {len(ours)} objects kept: {str(error).splitlines()[-1]}"
    return f"{len(left(world))} left after {time.time() - begun:.0f} s"


def main(times: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Store("overlay") as store, Cluster(store, Path(folder)) as cluster:
        cluster.push(
            ECHO_IMAGE, 'FROM localhost/base\nCOPY echo.py /\nENTRYPOINT ["python3", "-I", "/echo.py"]\n', ECHO
        )
        world = World(store, cluster, Path(folder))
        world.deploy("mail", {"smtp-tcp": (25, 2025)})
        world.kubectl("annotate", "service", "mail", "getbetter.ro/externalport=25")
        with Watch(cluster) as world.watch:
            for number in range(times):
                offset = round(number / 10 - (times - 1) // 2 / 10, 1)
                print(f"{offset:+.1f} s: {uninstalled(world, offset)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 21)
