"""epok in a real cluster, as the README says: kubelet, controllers, containerd and a registry, and real minutes.

They pass once for all tests of this file, which are parts of one story: alone, most of them fail.
"""

import base64
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

import epok
from lab.apiserver import CLUSTER_ADDRESS
from lab.container import Store, scratch
from lab.gateway import OLDER_RULE
from lab.load import Load
from lab.machine import lacking, need, need_lab, stretched, until
from lab.network import CLIENT, ECHO, EPOK, HOST, Answer
from lab.objects import Object
from lab.readme import BALANCER, BLOCKS, BROKEN, CLUSTER, IN_CLUSTER, OLDER, README, UNINSTALL, UPGRADE, Reader
from lab.real_cluster import NAMESPACE, NODES, REGISTRY, Cluster, Run, Watch, hierarchies, remove_stale_cgroups
from lab.sshd import make_key

pytestmark = pytest.mark.long
IMAGE, ECHO_IMAGE = f"{REGISTRY}/epok:1.0.0", f"{REGISTRY}/echo:1"
SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/epok-ssh"
JOBS, CRONJOB = (f"/apis/batch/v1/namespaces/{NAMESPACE}/{name}" for name in ("jobs", "cronjobs/epok"))
ASK = f"""
import socket
answered = 0
for _ in range(10):
    try:
        answered += bool(socket.create_connection(("{HOST}", 8080), 3).recv(99))
    except OSError:
        pass
print(answered)
"""
SHOP = "/api/v1/namespaces/default/services/shop"
BASH = ("bash", "--norc", "--noprofile", "--noediting")
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted pod-security.kubernetes.io/warn=restricted"
# A namespace as strict as they come. With a quota of cpu, a LimitRange says what a pod has that says nothing.
STRICT = f"""
apiVersion: v1
kind: ResourceQuota
metadata: {{name: strict, namespace: {NAMESPACE}}}
spec: {{hard: {{pods: "4", requests.cpu: "1", requests.memory: 1Gi, limits.cpu: "8", limits.memory: 1Gi}}}}
---
apiVersion: v1
kind: LimitRange
metadata: {{name: strict, namespace: {NAMESPACE}}}
spec: {{limits: [{{type: Container, default: {{cpu: "2"}}}}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: strict, namespace: {NAMESPACE}}}
spec: {{podSelector: {{}}, policyTypes: [Ingress, Egress]}}
"""
# The registry's way out, so that epok's own 30 MB take more than the 58 s of a pod.
SLOW = ("rate", "2500kbit", "burst", "64kb", "latency", "400ms")
Figure = Callable[[str], None]
LIMITED = ("requests.cpu", "requests.memory", "limits.cpu", "limits.memory")
# The gateway answers nobody who wants to log in.
AWAY = """
table inet away {
    chain input { type filter hook input priority 0; tcp dport 22 drop; }
}
"""


class World:
    """The cluster, and who administers it and the gateway."""

    def __init__(self, store: Store, cluster: Cluster, folder: Path) -> None:
        self.store, self.cluster, self.server = store, cluster, cluster.server
        config = self.server.kubectl("config", "view", "--flatten", "--raw")
        kubectl = self.server.programs["kubectl"]
        self.desk = Reader(cluster.host, cluster.control, folder, kubectl, config)
        self.desk.tool("docker", docker(store, cluster))
        settings = self.desk.clone / "cron" / "epok.config"
        settings.write_text(settings.read_text().replace("registry.example/epok:1.0.0", IMAGE))
        self.kubectl = self.server.kubectl

    def install(self) -> None:
        self.desk.read(CLUSTER, 0)
        self.cluster.registry.run(["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *SLOW])
        self.desk.read(CLUSTER, 1)
        made = self.server.request("GET", CRONJOB)["metadata"]
        self.installed = next_minute(datetime.datetime.fromisoformat(made["creationTimestamp"]).timestamp())
        self.kubectl("label", "ns", NAMESPACE, *RESTRICTED.split())
        self.kubectl("apply", "-f", "-", input=STRICT)

    def deploy(
        self, name: str, ports: "dict[str, tuple[int, int]]", replicas: int = 2, policy: str = "Cluster"
    ) -> None:
        """A Deployment of echo servers, spread over the nodes, and its Service: NAME-PROTOCOL -> port, NodePort."""
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(echo(name, ports, replicas, policy)))

    def renew_secret(self, verb: str = "replace") -> None:
        """What setup-host gives now, by the README's line that replaces the Secret, or creates it."""
        self.desk.read(CLUSTER, 0)
        block = BLOCKS[UPGRADE if verb == "replace" else CLUSTER, 1]
        [line] = re.findall(f"(?m)^kubectl {verb} .*-f epok-ssh.yaml.*$", block)
        self.desk.shell(f"# where kubectl works\n. cron/epok.config\n{line}")

    def run_of(self, minute: float) -> Run:
        """The CronJob's run of that minute, when it has ended."""
        return self.watch.done(job_of(minute), minute - time.time() + 75)

    def login(self, minute: float) -> str:
        """Returns when the run of that minute is at work on the gateway: the address that it came from."""
        sleep_until(minute)
        found: set[str] = set()
        while not found:
            assert time.time() < minute + stretched(60), "no run logs in"
            found = self.cluster.gateway.logins()
        return found.pop()

    def succeeded(self) -> list[Run]:
        return [run for run in self.watch.runs() if run.phase == "Succeeded" and run.log]

    def run_now(self, name: str, *more: str) -> Run:
        """A run that does not wait for the minute, as a Job of that name, with more arguments."""
        self.start_now(name, *more)
        return self.watch.done(name)

    def start_now(self, name: str, *more: str) -> None:
        made = yaml.safe_load(
            self.kubectl(
                "create", "job", "-n", NAMESPACE, "--from=cronjob/epok", name, "--dry-run=client", "-o", "yaml"
            )
        )
        made["spec"]["template"]["spec"]["containers"][0]["args"] += more
        self.kubectl("create", "-f", "-", input=yaml.safe_dump(made))

    def suspend(self, suspended: bool) -> None:
        """When it is suspended no run is left that had begun before."""
        self.server.patch(CRONJOB, spec={"suspend": suspended})
        until(lambda: not (suspended and any(map(unfinished, jobs(self)))), "the last run has ended", 120)

    def ask(self, port: int, protocol: str = "tcp") -> "Answer | None":
        try:
            return self.cluster.ask(port, protocol)
        except OSError:
            return None

    def nodes_of(self, node_port: int) -> set[str]:
        """Those that the gateway forwards a NodePort to."""
        found = set(re.findall(rf"--to-destination ([\d.]+):{node_port}\b", self.cluster.saved()))
        return {name for name, address in NODES.items() if address in found}


def docker(store: Store, cluster: Cluster) -> str:
    """docker build, in the machine's own network, for pip, and docker push."""
    here = f"nsenter --net=/proc/{os.getpid()}/ns/net env TMPDIR={store.folder}"
    return f"""case $1 in
build) shift; exec {here} {shlex.join(store.command("build", *store.how()))} "$@" ;;
push) exec env TMPDIR={store.folder} {shlex.join(cluster.pusher())} "$2" ;;
*) exit 1 ;;
esac"""


def echo(name: str, ports: "dict[str, tuple[int, int]]", replicas: int, policy: str) -> list[Object]:
    """Port names end with their protocol; pods listen on the Service's ports."""
    numbers = sorted({port for port, _ in ports.values()})
    labels = {"app": name}
    container = {
        "name": "echo",
        "image": ECHO_IMAGE,
        "args": ["$(NODE)/$(POD)", "tcp,udp", ",".join(map(str, numbers))],
        "env": [
            {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for variable, path in (("NODE", "spec.nodeName"), ("POD", "metadata.name"))
        ],
        "stdin": True,
        "ports": [{"containerPort": port, "name": key, "protocol": protocol(key)} for key, (port, _) in ports.items()],
        "readinessProbe": {"tcpSocket": {"port": numbers[0]}, "periodSeconds": 1},
        # until kube-proxy everywhere has heard that the pod ends
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "10"]}}},
    }
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    pod = {
        "containers": [container],
        "terminationGracePeriodSeconds": 12,
        "topologySpreadConstraints": [{**spread, "labelSelector": {"matchLabels": labels}}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "selector": labels,
            "externalTrafficPolicy": policy,
            "ports": [
                {"name": key, "port": port, "targetPort": key, "nodePort": node_port, "protocol": protocol(key)}
                for key, (port, node_port) in ports.items()
            ],
        },
    }
    return [deployment, service]


def protocol(key: str) -> str:
    return key.rpartition("-")[2].upper()


def job_of(minute: float) -> str:
    return f"epok-{int(minute) // 60}"


def next_minute(moment: float = 0) -> float:
    """The next after now, or that moment."""
    return ((moment or time.time()) // 60 + 1) * 60


def sleep_until(moment: float) -> None:
    time.sleep(max(0, moment - time.time()))


def answering(world: World, port: int, protocol: str = "tcp") -> set[str]:
    """The nodes whose pods answered a number of connections to the gateway, of which none failed."""
    return {world.cluster.ask(port, protocol).name.split("/")[0] for _ in range(20)}


def ready_pods(world: World) -> set[str]:
    """The nodes with a ready endpoint of the Service mail."""
    slices = world.server.request("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices")["items"]
    ends = [end for one in slices if one["metadata"]["name"].startswith("mail-") for end in one["endpoints"] or ()]
    return {end["nodeName"] for end in ends if end["conditions"]["ready"]}


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def events(world: World, name: str) -> str:
    """What the cluster says about a Job and its pods."""
    return world.kubectl("describe", "pods", "-n", NAMESPACE, "-l", f"job-name={name}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    need_lab("nft")
    for tool, package in (
        ("containerd", "containerd"),
        ("runc", "runc"),
        ("docker-registry", "docker-registry"),
        ("buildah", "buildah"),
        ("mmdebstrap", "mmdebstrap"),
        ("envsubst", "gettext-base"),
        ("sudo", "sudo"),
        ("sshd", "openssh-server"),
    ):
        need(tool, f"apt-get install {package}")
    if not Path("/usr/lib/cni/bridge").exists():
        lacking("CNI's bridge is missing: apt-get install containernetworking-plugins")
    folder = tmp_path_factory.mktemp("cluster")
    with Store("overlay") as store, Cluster(store, folder) as cluster:
        cluster.push(
            ECHO_IMAGE, 'FROM localhost/base\nCOPY echo.py /\nENTRYPOINT ["python3", "-I", "/echo.py"]\n', ECHO
        )
        made = World(store, cluster, folder)
        made.deploy("mail", {"smtp-tcp": (25, 2025), "dns-tcp": (53, 30053), "dns-udp": (53, 30053)})
        made.deploy("web", {"http-tcp": (80, 30080)}, policy="Local")
        until(lambda: settled(made), "the pods have the images below epok's", 180, 0.3)
        with Watch(cluster) as made.watch:
            made.install()
            yield made


# ------------------------------------------------ what a killed test run leaves

HOLD = """import sys, time
from lab.container import scratch
from lab.real_cluster import Machine, hierarchies, make_cgroups
with scratch() as folder:
    name = f"epok-{folder.name}"
    make_cgroups(f"{name}/node/pod")
    machine = Machine("node", folder / "node")
    place = hierarchies()[0] / name / "node" / "pod" / "cgroup.procs"
    machine.popen(["sh", "-c", f"echo 0 >{place}; exec setsid sleep 1000"])
    while not place.read_text():
        time.sleep(0.1)
    print(name, flush=True)
    time.sleep(1000)
"""


def test_a_killed_run_leaves_no_process_and_the_next_one_removes_its_cgroups() -> None:
    if os.geteuid():
        lacking("machines are namespaces, which need root: run the tests with sudo")
    argv = [sys.executable, "-B", "-c", HOLD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) as other:
        assert other.stdout
        name = other.stdout.readline().strip()
        assert name
        other.kill()
    left = [hierarchy / name for hierarchy in hierarchies()]
    assert all(place.exists() for place in left)
    processes = [file for place in left for file in place.rglob("cgroup.procs")]
    until(lambda: not any(file.read_text() for file in processes), "the end of all its processes", 30, 0.3)
    assert name.removeprefix("epok-") not in Path("/proc/self/mounts").read_text()
    with scratch():
        remove_stale_cgroups()
    assert not any(place.exists() for place in left)


# ------------------------------------------------ the README's first way


def test_the_first_run_comes_when_a_node_has_the_image_however_long_that_takes(world: World, figure: Figure) -> None:
    """Longer than any pod lives: the kubelet goes on with it."""
    until(lambda: bool(world.succeeded()), "the first run", 600, 0.3)
    first = world.succeeded()[0]
    assert first.minute > world.installed
    pulled = world.kubectl("get", "events", "-n", NAMESPACE)
    [took] = re.findall(r"pulled image \S+epok:1\.0\.0\S* in ((?:\d+m)?[\d.]+s)", pulled)[:1]
    figure(f"an image that is pulled for {took}: its first run came {seconds(first.begun - world.installed)} late")
    world.cluster.registry.run(["tc", "qdisc", "del", "dev", "eth0", "root"])


def test_what_kubectl_annotates_is_reached_in_the_minute_after(world: World) -> None:
    assert world.ask(25) is None
    minute = next_minute()
    world.kubectl("annotate", "service", "mail", "getbetter.ro/externalport=25:smtp-tcp,53:30053")
    run = world.run_of(minute)
    assert run.phase == "Succeeded", run
    for protocol in ("tcp", "udp"):
        assert answering(world, 53, protocol) == set(NODES)
    assert answering(world, 25) == set(NODES)
    assert "now forwarding tcp/25 to default/mail:smtp-tcp (NodePort 2025) on 2 nodes" in run.log
    head, row, *log = world.desk.read(CLUSTER, 2).splitlines()
    [line] = [line for line in log if "tcp/25" in line]
    assert row.startswith("epok   * * * * *   <none>     False ")
    # as the README shows them, but for what is another one's here
    line = line.replace("10.0.0.1", "192.0.2.1").replace("smtp-tcp", "smtp").replace("2025", "30025")
    assert f"\n{head}\n" in README and f"\n{line.replace('2 nodes', '3 nodes')}\n" in README
    described = world.kubectl("describe", "service", "mail")
    assert re.search(r"Normal +ExternalPortForwarded .* epok +.*: now forwarding tcp/25 to default/mail", described)


def test_the_key_is_nowhere_but_in_the_secret(world: World) -> None:
    key_is_nowhere_else(world)


def key_is_nowhere_else(world: World) -> None:
    """Than where the Secret has it."""
    stored = world.server.request("GET", SECRET)
    key = stored["data"].pop("id_rsa")
    assert "annotations" not in stored["metadata"] and stored["metadata"]["managedFields"]
    for line in base64.b64decode(key).decode().splitlines():
        assert line not in json.dumps(stored)
    assert key not in json.dumps(stored)
    assert not (world.desk.clone / "epok-ssh.yaml").exists()


def test_status_and_explain_tell_the_same_in_the_cluster(world: World) -> None:
    """By Jobs that are none of the CronJob's, which would delete them with its own."""
    shown = world.desk.read(BROKEN, 1)
    assert re.search(r"tcp/25 +default/mail:smtp-tcp +2025 +2  hidden +[1-9]", shown), shown
    assert "\ndefault/mail on epok@10.0.0.1\n" in shown
    assert "Most likely: it works as far as can be seen from here" in shown
    owners = {job["metadata"]["name"]: job["metadata"].get("ownerReferences") for job in jobs(world)}
    assert owners.pop("look") is None and owners and all(owners.values())


def jobs(world: World) -> list[Object]:
    found: list[Object] = world.server.request("GET", JOBS)["items"]
    return found


def unfinished(job: Object) -> bool:
    return not {"Complete", "Failed"} & {condition["type"] for condition in job["status"].get("conditions", ())}


def test_kustomize_as_edited_gives_what_is_there(world: World) -> None:
    file = world.desk.clone / "cron" / "kustomization.yaml"
    file.write_text(file.read_text().replace("registry.example/epok:1.0.0", IMAGE))
    assert world.desk.read(CLUSTER, 4).count(" unchanged\n") == 4


def test_a_key_of_ones_own_and_a_secret_made_by_hand_do_as_well(world: World) -> None:
    key = make_key(world.desk.home / ".ssh" / "epok", "ed25519")
    shown = world.cluster.gateway.setup_host("--public-key", f"{key}.pub").stdout
    (world.desk.home / ".ssh" / "epok_known_hosts").write_text(shown)
    world.kubectl("delete", "secret", "-n", NAMESPACE, "epok-ssh")
    settings = world.desk.clone / "cron" / "epok.config"
    settings.write_text(settings.read_text().replace("epok@192.0.2.1", "epok@10.0.0.1"))
    world.desk.read(CLUSTER, 3)
    assert "in sync" in world.run_now("own-key").log


def test_all_this_was_in_a_namespace_for_restricted_pods_with_a_quota(world: World) -> None:
    labels = world.kubectl("get", "ns", NAMESPACE, "-o", "jsonpath={.metadata.labels}")
    assert '"pod-security.kubernetes.io/enforce":"restricted"' in labels
    quota = world.server.request("GET", f"/api/v1/namespaces/{NAMESPACE}/resourcequotas/strict")["status"]
    assert quota["used"].keys() == quota["hard"].keys() == {"pods", *LIMITED}
    assert "FailedCreate" not in world.kubectl("get", "events", "-n", NAMESPACE)


def test_a_pod_needs_the_api_server_and_ssh_alone(world: World) -> None:
    """What a NetworkPolicy must let through, by what the node's kernel saw of the last run that ended."""
    ended = [pod for uid, pod in world.watch.pods.items() if uid in world.watch.logs]
    pod = max(ended, key=lambda pod: pod["metadata"]["creationTimestamp"])
    machine = world.cluster.machines[pod["spec"]["nodeName"]].machine
    flows = machine.run(["conntrack", "-L", "-s", pod["status"]["podIP"]]).stdout
    assert set(re.findall(r"^(\w+) .*? dst=(\S+) sport=\d+ dport=(\d+) src=", flows, re.MULTILINE)) == {
        ("tcp", CLUSTER_ADDRESS, "443"),
        ("tcp", "10.0.0.1", "22"),
    }


# ------------------------------------------------ as a load balancer


def test_a_chart_that_waits_for_its_load_balancer_is_ready_and_reached_end_to_end(world: World, figure: Figure) -> None:
    settings = world.desk.clone / "cron" / "epok.config"
    text = settings.read_text().replace("EPOK_INTERFACES=eth0", "EPOK_INTERFACES=eth0,eth1")
    settings.write_text(text.replace("EPOK_PUBLISH=none", f"EPOK_PUBLISH={HOST}"))
    world.desk.read(BALANCER, 0)
    deployment, service = echo("shop", {"http-tcp": (8080, 30081)}, 2, "Cluster")
    service["spec"] |= {"type": "LoadBalancer", "loadBalancerClass": epok.BALANCER_CLASS}
    world.kubectl("apply", "-f", "-", input=yaml.safe_dump_all([deployment, service]))
    begun = time.time()
    wait = "--for=jsonpath={.status.loadBalancer.ingress}", "--timeout=180s"
    world.kubectl("wait", *wait, "service/shop")
    figure(f"from kubectl apply to EXTERNAL-IP: {seconds(time.time() - begun)}, applied at second {begun % 60:.0f}")
    world.kubectl("rollout", "status", "deployment/shop", "--timeout=60s")
    head, row = world.kubectl("get", "service", "shop").splitlines()
    assert row.split()[1:2] + row.split()[3:5] == ["LoadBalancer", HOST, "8080:30081/TCP"]
    assert f"\n{' '.join(head.split())}\n" in re.sub(" +", " ", README)
    assert answering(world, 8080) == set(NODES)
    assert "cannot" not in world.run_now("published").log


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_pods_reach_a_published_address_through_the_host_whatever_kube_proxy_does(world: World, mode: str) -> None:
    """It would take what has another ipMode."""
    world.suspend(True)
    for node in world.cluster.machines.values():
        world.cluster.host.run(["bridge", "link", "set", "dev", node.name, "hairpin", "on"])
        node.start_proxy(mode)
    until(lambda: through_the_host(world) == (10, 10), "all goes through the host", 60, 0.3)
    [ingress] = world.server.request("GET", SHOP)["status"]["loadBalancer"]["ingress"]
    status = {"status": {"loadBalancer": {"ingress": [ingress | {"ipMode": "VIP"}]}}}
    world.server.request("PATCH", f"{SHOP}/status", status, "application/merge-patch+json")
    until(lambda: through_the_host(world) == (10, 0), "kube-proxy takes it", 60, 0.3)
    assert f"default/shop: EXTERNAL-IP {HOST} (tcp/8080)" in world.run_now(f"mended-{mode}").log
    until(lambda: through_the_host(world) == (10, 10), "all goes through the host again", 60, 0.3)
    for node in world.cluster.machines.values():
        node.start_proxy("iptables")
    world.suspend(False)


def through_the_host(world: World) -> tuple[int, int]:
    """How many of ten connections of a pod to the published address are answered, and were the gateway's."""
    before = counted(world)
    answered = world.kubectl("exec", "deploy/shop", "--", "python3", "-I", "-c", ASK)
    return int(answered), counted(world) - before


def counted(world: World) -> int:
    """New connections that the gateway has forwarded to the Service shop."""
    saved = world.cluster.host.run(["iptables-save", "-c", "-t", "nat"]).stdout
    return sum(map(int, re.findall(r"(?m)^\[(\d+):\d+\] .*default/shop http-tcp", saved)))


# ------------------------------------------------ the gateway and the way to it


def test_a_restart_of_sshd_in_the_middle_of_a_run_does_not_stop_it(world: World) -> None:
    minute = next_minute()
    world.login(minute)
    world.cluster.gateway.restart_sshd()
    assert world.run_of(minute).phase == "Succeeded"


def test_a_changed_host_key_stops_runs_until_it_is_renewed_as_the_readme_says(world: World) -> None:
    world.cluster.host.run(["sh", "-c", "rm /etc/ssh/ssh_host_*; ssh-keygen -A"])
    world.cluster.gateway.restart_sshd()
    failed = world.run_now("host-key")
    assert failed.phase == "Failed" and "its host key" in failed.log, failed.log
    assert failed.log.endswith(f"{epok.RENEW}\n"), failed.log
    assert answering(world, 25) == set(NODES)
    world.renew_secret()
    assert "in sync" in world.run_now("host-key-again").log


def test_a_renewed_key_is_refused_until_the_secret_has_it(world: World) -> None:
    world.cluster.host.run(["sh", "-c", "rm /etc/epok/id_ed25519*"])
    world.cluster.gateway.setup_host()
    failed = world.run_now("key")
    assert failed.phase == "Failed" and "is refused" in failed.log, failed.log
    assert failed.log.endswith(f"{epok.RENEW}\n"), failed.log
    old = world.server.request("GET", SECRET)["data"]["id_rsa"]
    applied = {"kubectl.kubernetes.io/last-applied-configuration": old}
    world.server.patch(SECRET, metadata={"annotations": applied})
    world.desk.read(UPGRADE, 0)
    world.desk.read(UPGRADE, 1)
    assert world.server.request("GET", SECRET)["data"]["id_rsa"] != old
    key_is_nowhere_else(world)
    assert "in sync" in world.run_now("key-again").log


def test_a_run_without_its_secret_goes_on_when_it_is_made_again(world: World) -> None:
    world.kubectl("delete", "secret", "-n", NAMESPACE, "epok-ssh")
    world.start_now("secret")
    until(lambda: "Warning" in events(world, "secret"), "the kubelet misses the Secret", 30, 0.3)
    world.renew_secret("create")
    assert "in sync" in world.watch.done("secret").log


# ------------------------------------------------ dead nodes


@pytest.mark.parametrize("moment", ["in the middle of a run", "between two runs"])
def test_a_dead_node_costs_one_run_at_most_and_gets_no_connection_once_it_is_not_ready(
    world: World, moment: str, figure: Figure
) -> None:
    """Until then the scheduler may still choose it for a run."""
    minute = next_minute()
    midst = moment == "in the middle of a run"
    address = world.login(minute) if midst else NODES[world.run_of(minute).node]
    [dead] = [node for node in world.cluster.machines.values() if node.address == address]
    [alive] = NODES.keys() - {dead.name}
    dead.cut_power()
    cut = time.time()
    until(lambda: not dead.ready(), "the dead node is NotReady", 120, 0.3)
    noticed = time.time()
    first = next_minute()
    assert world.run_of(first).node == alive
    assert world.nodes_of(2025) == world.nodes_of(30053) == {alive}
    gone = time.time()
    assert answering(world, 25) == {alive}
    ran = {run.minute for run in world.succeeded()}
    minutes = [int(first - 60 * ago) for ago in (1, 0) if first - 60 * ago > cut]
    lost = [minute for minute in minutes if minute not in ran]
    assert len(lost) <= 1 and first not in lost
    if midst:
        an_uninstall_goes_no_further_than_the_dead_nodes_pod(world)
    figure(
        f"power cut {moment}, at second {cut % 60:.0f}: NotReady {seconds(noticed - cut)} later, out of the forwards "
        f"{seconds(gone - cut)} later; minutes without a run: {len(lost)}"
    )
    dead.boot()
    until(dead.ready, "the node is back", 120)
    until(lambda: ready_pods(world) == set(NODES), "its pod is back", 60, 0.3)
    assert world.run_now(f"back-{int(cut)}").phase == "Succeeded"
    assert world.nodes_of(2025) == set(NODES)


def an_uninstall_goes_no_further_than_the_dead_nodes_pod(world: World) -> None:
    """And says how to end it by force."""
    before = installed(world)
    quick = BLOCKS[UNINSTALL, 0].replace("--timeout=2m ||", "--timeout=5s ||")
    status, lines = world.desk.paste(quick, *BASH)
    assert status == 1 and installed(world) == before, lines
    [force] = re.findall("kubectl delete pods [^;]*", said(lines))
    status, lines = world.desk.paste(f"# where kubectl works\n. cron/epok.config\n{force}", *BASH)
    assert status == 0, lines
    until(lambda: not jobs(world), "the Job of the dead node's pod ends", 60)
    world.suspend(False)


def installed(world: World) -> set[str]:
    """What there is of epok's in the cluster, but for Jobs and pods."""
    kinds = "ns,cronjob,secret,sa,clusterrole,clusterrolebinding"
    listed = world.kubectl("get", kinds, "-A", "--ignore-not-found", "-o", "name").splitlines()
    found = {name for name in listed if re.search(r"/epok(-ssh)?$", name)}
    assert len(found) == 6
    return found


def said(lines: list[str]) -> str:
    """The one line of the uninstall block's own."""
    [line] = [line for line in lines if "epok is not uninstalled: " in line]
    assert line.endswith("; then paste this again"), line
    return line


def noticed(world: World, status: int, lines: list[str]) -> None:
    """The uninstall block saw the job fail, before its patience ended, and no run comes until it is pasted again."""
    assert status == 1 and "kubectl logs -n epok job/clean" in said(lines)
    assert "job.batch/clean condition met" in lines, lines
    assert world.server.request("GET", CRONJOB)["spec"]["suspend"] is True


# ------------------------------------------------ the API server


def test_without_an_api_server_forwards_stay_and_with_it_runs_come_again(world: World, figure: Figure) -> None:
    """The cluster's own controllers take up to a minute to find it again."""
    assert answering(world, 25) == set(NODES)
    before = world.cluster.saved()
    world.server.kill()
    away, served = time.time(), []
    while time.time() < away + 90:
        served.append(answering(world, 25))
        time.sleep(5)
    after = world.cluster.saved()
    world.server.start()
    assert after == before and served == [set(NODES)] * len(served)
    until(lambda: all(node.ready() for node in world.cluster.machines.values()), "the nodes are Ready again", 120, 0.3)
    back = time.time()
    until(lambda: any(run.begun > back and run.minute for run in world.succeeded()), "a run", 180, 0.3)
    figure(
        f"API server away for 90 s: the first run came {seconds(time.time() - back)} after the nodes were Ready again"
    )
    until(lambda: ready_pods(world) == set(NODES), "all pods are ready again", 120, 0.3)
    until(lambda: world.nodes_of(2025) == set(NODES), "a run that knows it", 120, 0.3)


# ------------------------------------------------ on a node


def test_local_on_a_node_goes_by_the_systemd_units_command_line(world: World) -> None:
    """Beside the CronJob on the gateway and a real kube-proxy: straight to the ready pods."""
    world.kubectl("annotate", "service", "web", "getbetter.ro/externalport=80:http-tcp")
    node = world.cluster.machines["node1"]
    unit = (EPOK.parent / "cron" / "epok.service").read_text()
    [command] = re.findall(r"(?m)^ExecStart=(.*)$", unit)
    command = command.replace("/opt/epok/.venv/bin/python", sys.executable).replace("/opt/epok", str(EPOK.parent))
    config = world.server.kubeconfig("admin", certificate=world.server.admin)
    env = {"PATH": os.environ["PATH"], "EPOK_INTERFACES": "eth0", "KUBECONFIG": config}
    done = node.machine.run(command.split(), env=env)
    assert "now forwarding tcp/25" in done.stderr and "now forwarding tcp/80" in done.stderr, done.stderr
    mail = {world.cluster.ask(25, to=node.address).name.split("/")[0] for _ in range(40)}
    assert mail == set(NODES)
    local = {world.cluster.ask(80, to=node.address)[:2] for _ in range(20)}
    assert {(name.split("/")[0], saw) for name, saw in local} == {("node1", CLIENT[0])}
    assert "in sync" in node.machine.run(command.split(), env=env).stderr
    assert world.run_now("beside").phase == "Succeeded"
    assert {world.cluster.ask(80).saw for _ in range(20)} == {CLIENT[0]}
    node.machine.run([*command.split()[:-1], "--clean", "local"], env=env)
    world.kubectl("annotate", "service", "web", "getbetter.ro/externalport-")


# ------------------------------------------------ the end


def test_while_the_gateway_is_unreachable_runs_and_an_uninstall_fail_and_leave_what_another_try_needs(
    world: World,
) -> None:
    """For two minutes. Meanwhile pods come and go, and no connection is lost."""
    minute = next_minute()
    sleep_until(minute - 5)
    world.cluster.host.run(["nft", "-f", "-"], AWAY)
    before, there = world.cluster.saved(), installed(world)
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(without_the_gateway, world, minute)
        with Load(world.cluster.client, HOST, {25: [25]}, rate=50) as load:
            come_and_go(world)
        run, status, lines = trying.result()
    assert load.result.failed == 0, load.result
    log = world.watch.done("clean").log
    noticed(world, status, lines)
    assert run.phase == "Failed"
    for each in (run.log, log):
        assert re.search(r"(?m)^error: epok@10\.0\.0\.1: .*; is the address right", each), each
    assert world.cluster.saved() == before and installed(world) == there
    world.cluster.host.run(["nft", "delete", "table", "inet", "away"])


def without_the_gateway(world: World, minute: float) -> tuple[Run, int, list[str]]:
    """A run of the CronJob, and then an uninstall that is pasted at the begin of the next minute."""
    run = world.run_of(minute)
    sleep_until(minute + 60)
    return run, *world.desk.paste(BLOCKS[UNINSTALL, 0], *BASH)


def test_an_uninstall_pasted_into_another_shell_fails_as_well_where_epok_may_not_log_in(world: World) -> None:
    there = installed(world)
    port = world.server.request("GET", SECRET)["data"]["ssh_port"]
    world.server.patch(SECRET, stringData={"ssh_port": "1"})
    world.kubectl("set", "env", "-n", NAMESPACE, "cronjob/epok", "EPOK_TIMEOUT=5")
    status, lines = world.desk.paste(BLOCKS[UNINSTALL, 0], "dash")
    noticed(world, status, lines)
    assert installed(world) == there and world.ask(25) is not None
    world.server.patch(SECRET, data={"ssh_port": port})
    world.kubectl("set", "env", "-n", NAMESPACE, "cronjob/epok", "EPOK_TIMEOUT-")


def come_and_go(world: World) -> None:
    """Rolling update, a pod deleted, a node drained."""
    world.kubectl("rollout", "restart", "deployment/mail")
    until(lambda: settled(world), "the rolling update is through", 180, 0.3)
    pod = world.kubectl("get", "pods", "-l", "app=mail", "-o", "name").split()[0]
    world.kubectl("delete", pod)
    until(lambda: settled(world), "another pod is there", 120, 0.3)
    world.kubectl("drain", "node2", "--ignore-daemonsets", "--pod-selector=app=mail", "--timeout=50s")
    until(lambda: settled(world), "all pods are on the other node", 120, 0.3)
    world.kubectl("uncordon", "node2")


def settled(world: World) -> bool:
    """Whether the Deployment mail has its pods, all of them new and ready."""
    found = world.server.request("GET", "/apis/apps/v1/namespaces/default/deployments/mail")
    status, wanted = found["status"], found["spec"]["replicas"]
    counts = [status.get(f"{what}Replicas", 0) for what in ("updated", "ready", "available")]
    seen = status["observedGeneration"] == found["metadata"]["generation"]
    return seen and [status.get("replicas"), *counts] == [wanted] * 4


def test_no_pods_are_no_answer_until_there_are_some_again(world: World) -> None:
    world.kubectl("scale", "deployment/mail", "--replicas=0")
    until(lambda: world.ask(25) is None, "the last pod is gone", 60, 0.3)
    world.kubectl("scale", "deployment/mail", "--replicas=2")
    until(lambda: world.ask(25) is not None, "a pod is there again", 60, 0.3)


def test_the_uninstall_that_is_pasted_again_leaves_nothing(world: World) -> None:
    world.suspend(False)
    sleep_until(next_minute())
    world.desk.read(UNINSTALL, 0)
    assert world.ask(25) is None and "EPOK" not in world.cluster.saved() + world.cluster.saved(6)
    assert world.server.request("GET", SHOP)["status"]["loadBalancer"] == {}
    everywhere = world.kubectl("get", "ns,cronjob,job,pod,secret,sa,clusterrole,clusterrolebinding", "-A", "-o", "name")
    assert "epok" not in everywhere
    world.desk.read(UNINSTALL, 1)
    assert "epok" not in world.cluster.host.run(["cat", "/etc/passwd"]).stdout


def test_coming_from_the_older_epok(world: World) -> None:
    host = world.cluster.host
    host.run(["useradd", "--create-home", "epok"])
    sudoers = "%epok ALL=(ALL) NOPASSWD: /usr/sbin/iptables, /usr/sbin/iptables-save"
    host.run(["sh", "-c", "cat >/etc/sudoers.d/epok"], sudoers)
    host.run(["iptables-restore", "-n"], f"*nat\n{OLDER_RULE}COMMIT\n")
    world.kubectl("create", "ns", NAMESPACE)
    world.kubectl("create", "secret", "-n", NAMESPACE, "generic", "epok-ssh", "--from-literal=ssh_host=10.0.0.1")
    world.kubectl("create", "deployment", "-n", NAMESPACE, "epok", f"--image={ECHO_IMAGE}")
    world.desk.read(OLDER, 0)
    world.desk.read(OLDER, 1)
    assert world.kubectl("get", "deployments", "-n", NAMESPACE, "-o", "name") == ""
    log = world.run_now("older").log
    both = world.cluster.saved()
    assert "now forwarding tcp/25" in log and both.count("epok_rule_id") == 1
    _, _, command = BLOCKS[OLDER, 2].partition("\n")
    assert f"as root on the host: {' '.join(command.split())}\n" in log
    world.suspend(True)
    world.desk.read(OLDER, 2)
    assert "epok_rule_id" not in world.cluster.saved()
    assert answering(world, 25) == set(NODES)


def test_every_block_of_the_readme_for_a_cluster_was_run(world: World) -> None:
    """By the tests above; alone, this one fails."""
    assert world.desk.ran >= IN_CLUSTER


def test_runs_stay_small(world: World, figure: Figure) -> None:
    """An idle one lists Services and nodes, and EndpointSlices where they are needed; pods have 192 MiB."""
    runs = [run for run in world.succeeded() if run.minute and run.begun]
    idle = [run for run in runs if "in sync" in run.log]
    for what, found in (
        ("container's start after the minute, s", [run.begun - run.minute for run in runs]),
        ("length of a run, s", [run.ended - run.begun for run in runs]),
        ("peak of a pod's cgroup, MB", [run.peak / 1e6 for run in runs]),
        ("API requests of an idle run", [len(run.requests) for run in idle]),
    ):
        figure(f"{what}: {statistics.median(found):.1f} (median), {max(found):.1f} (worst) of {len(found)}")
    assert statistics.median(len(run.requests) for run in idle) <= 3
    assert max(run.peak for run in runs) < 128e6
