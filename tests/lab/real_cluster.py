"""A real cluster beside the lab's host: two nodes with kubelet, containerd and kube-proxy, a control plane, a registry.

    host eth1 10.0.0.1 (a bridge)  --  control   10.0.0.2: etcd, kube-apiserver, controllers, scheduler
                                   --  registry  10.0.0.3: docker-registry, on port 5000
                                   --  node1, node2  10.0.0.11, .12, with pods in 10.244.1.0/24, 10.244.2.0/24

The host is the gateway whose ports are forwarded, with sshd as an administrator has it, and no part of the cluster.
Machines are namespaces, so whatever happens to us they end with us; their cgroups and disks go with the next run then.

    with Store("overlay") as store, Cluster(store, folder) as cluster:
        cluster.push("10.0.0.3:5000/echo:1", dockerfile)
        cluster.server.kubectl("create", "deployment", "echo", "--image=10.0.0.3:5000/echo:1")
        cluster.machines["node1"].cut_power()
"""

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple, Self

import urllib3

from lab.apiserver import CLUSTER_ADDRESS, ApiServer, asset
from lab.container import CACHE, Store, output
from lab.gateway import Gateway
from lab.machine import need, stretched, until
from lab.network import CHOOSE_BACKEND, FORWARDING, QUICK, Lab, Namespace
from lab.objects import Object

CONTROL, REGISTRY = "10.0.0.2", "10.0.0.3:5000"
NODES = {"node1": "10.0.0.11", "node2": "10.0.0.12"}
PAUSE = f"{REGISTRY}/pause:1"
NAMESPACE = "epok"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
KUBELET_SYSCTLS = {"vm/overcommit_memory": 1, "kernel/panic": 10, "kernel/panic_on_oops": 1}
KUBELET_SYSCTLS |= {"kernel/keys/root_maxkeys": 1_000_000, "kernel/keys/root_maxbytes": 25_000_000}

# The disk outlives the machine, as disks do; overlays cannot lie on overlays, so containerd has a plain folder.
# The kubelet would write into these files of the kernel, which are the whole machine's. With SIGCHLD ignored the
# namespace's first process leaves no zombies.
BOOT = """
echo NAME >/proc/sys/kernel/hostname
mkdir -p DISK/etc/upper DISK/etc/work DISK/lib/upper DISK/lib/work DISK/containerd DISK/kubelet DISK/log
mount -t overlay -o lowerdir=/etc,upperdir=DISK/etc/upper,workdir=DISK/etc/work overlay /etc
mount -t overlay -o lowerdir=/var/lib,upperdir=DISK/lib/upper,workdir=DISK/lib/work overlay /var/lib
mkdir -p /var/lib/containerd /var/lib/kubelet
mount --bind /run/alternatives /etc/alternatives
mount --bind DISK/containerd /var/lib/containerd
mount --bind DISK/kubelet /var/lib/kubelet
mount --bind DISK/log /var/log
for setting in SYSCTLS; do
    file=/run/sysctl-$(echo "${setting%=*}" | tr / -)
    echo "${setting#*=}" >"$file"
    [ ! -e "/proc/sys/${setting%=*}" ] || mount --bind "$file" "/proc/sys/${setting%=*}"
done
trap '' CHLD
"""
CONTAINERD = f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true # not every root may lower it
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "/etc/containerd/certs.d"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""
HOSTS = f"""server = "http://{REGISTRY}"
[host."http://{REGISTRY}"]
  capabilities = ["pull", "resolve"]
"""
REGISTRY_CONFIG = """version: 0.1
storage: {filesystem: {rootdirectory: DISK}}
http: {addr: "ADDRESS"}
"""
PROXY = {
    "cluster-cidr": "10.244.0.0/16",
    # settings that a network namespace does not have of its own
    "conntrack-max-per-core": "0",
    "conntrack-min": "0",
    "conntrack-tcp-timeout-established": "0",
    "conntrack-tcp-timeout-close-wait": "0",
}
# The kubelet ends when containerd listens and is not ready yet, and systemd would start it again.
AGAIN = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "sh"]
NO_EVICTION = {f"{what}.available": "0%" for what in ("memory", "nodefs", "imagefs")} | {"nodefs.inodesFree": "0%"}


class Machine(Namespace):
    """With a name of its own, and shared memory; the folder `disk` takes what it writes."""

    KINDS = (*Namespace.KINDS, "uts", "ipc")

    def __init__(self, name: str, disk: Path, backend: str = "nft") -> None:
        settings = " ".join(f"{setting}={value}" for setting, value in KUBELET_SYSCTLS.items())
        boot = BOOT.replace("NAME", name).replace("DISK", str(disk)).replace("SYSCTLS", settings)
        super().__init__(name, QUICK + FORWARDING + CHOOSE_BACKEND.replace("BACKEND", backend) + boot)


class Node:
    """A node of the cluster; its machine is another each time that it boots."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.cluster, self.number = cluster, number
        self.name, self.address = f"node{number}", f"10.0.0.{10 + number}"
        self.disk = cluster.store.folder / self.name
        self.cgroup = f"/{cluster.cgroup}/{self.name}"
        credentials = cluster.server.authority.issue(f"system:node:{self.name}", organisation="system:nodes")
        pem = cluster.server.write(f"{self.name}.pem", credentials)
        self.kubeconfig = cluster.server.kubeconfig(self.name, certificate=pem)

    def boot(self) -> None:
        make_cgroups(self.cgroup[1:])
        self.machine = Machine(self.name, self.disk, self.cluster.backend)
        self.cluster.stack.callback(self.machine.close)
        self.cluster.link(self.name, self.machine, (2, "10.0.0"), 10 + self.number)
        for other in NODES.keys() - {self.name}:
            self.machine.wire(f"route add 10.244.{other[-1]}.0/24 via {NODES[other]}")
        self.write("/etc/containerd/config.toml", CONTAINERD)
        self.write(f"/etc/containerd/certs.d/{REGISTRY}/hosts.toml", HOSTS)
        self.write("/etc/cni/net.d/pods.conflist", json.dumps(self.network()))
        self.write("/etc/kubernetes/kubelet.json", json.dumps(self.kubelet()))
        self.start("containerd", need("containerd", "apt-get install containerd"))
        config = f"--kubeconfig={self.kubeconfig}", f"--hostname-override={self.name}"
        until((self.machine.root / "run/containerd/containerd.sock").exists, f"containerd runs on {self.name}", 60)
        self.start(
            "kubelet",
            *AGAIN,
            asset("kubelet"),
            "--config=/etc/kubernetes/kubelet.json",
            *config,
            f"--node-ip={self.address}",
        )
        self.start_proxy("iptables")

    def start_proxy(self, mode: str) -> None:
        """kube-proxy, instead of one that runs already."""
        self.machine.run(["pkill", "-x", "kube-proxy"], check=False)
        admin = self.cluster.server.kubeconfig("admin", certificate=self.cluster.server.admin)
        options = PROXY | {"kubeconfig": admin, "hostname-override": self.name, "proxy-mode": mode}
        self.start("kube-proxy", asset("kube-proxy"), *(f"--{name}={value}" for name, value in options.items()))

    def write(self, path: str, text: str) -> None:
        file = self.machine.root / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def start(self, name: str, *argv: str) -> None:
        self.cluster.start(self.machine, f"{self.name}-{name}", *argv)

    def network(self) -> Object:
        ipam = {"type": "host-local", "ranges": [[{"subnet": f"10.244.{self.number}.0/24"}]]}
        ipam |= {"routes": [{"dst": "0.0.0.0/0"}]}
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{**bridge, "ipam": ipam}]}

    def kubelet(self) -> Object:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": False},
                "x509": {"clientCAFile": self.cluster.server.ca},
            },
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "volumePluginDir": "/var/lib/kubelet/plugins",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroup,
            "failCgroupV1": False,
            "failSwapOn": False,
            "resolvConf": "",
            "localStorageCapacityIsolation": False,
            "evictionHard": NO_EVICTION,
            "imageGCHighThresholdPercent": 100,
            "healthzPort": 0,
        }

    def cut_power(self) -> None:
        """All of its processes end at once, none of them says a word, and its cable is dead."""
        self.machine.holder.kill()
        self.machine.close()
        self.cluster.host.run(["ip", "link", "del", self.name], check=False)  # perhaps the kernel was faster
        remove_cgroups(self.cgroup[1:])

    def ready(self) -> bool:
        found = self.cluster.server.request("GET", "/api/v1/nodes")["items"]
        return any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for node in found
            if node["metadata"]["name"] == self.name
            for condition in node["status"]["conditions"]
        )


class Cluster(Lab):
    """Nodes that are Ready, and an image for their pods' sandboxes; `folder` takes logs and certificates."""

    def __init__(self, store: Store, folder: Path, backend: str = "nft") -> None:
        super().__init__(backend, nodes=0, ports=())
        self.store, self.folder = store, folder

    def make(self) -> None:
        super().make()
        self.cgroup = f"epok-{self.store.folder.name}"
        remove_stale_cgroups()
        self.stack.callback(lambda: remove_cgroups(self.cgroup))
        self.gateway = Gateway(self.host)
        private = CHOOSE_BACKEND.replace("BACKEND", self.backend)
        self.registry = self.namespace("registry", private)
        self.link("registry", self.registry, (2, "10.0.0"), 3)
        self.start_registry()
        self.control = self.namespace("control", private)
        self.link("control", self.control, (2, "10.0.0"), 2)
        flags = {"authorization_mode": "Node,RBAC", "enable_admission_plugins": "NodeRestriction"}
        flags |= {"advertise_address": CONTROL, "kubelet_preferred_address_types": "InternalIP"}
        self.server = ApiServer(self.control, self.folder, addresses=[CLUSTER_ADDRESS], address=CONTROL, **flags)
        self.start_controllers()
        self.push(PAUSE, 'FROM localhost/base\nENTRYPOINT ["sleep", "infinity"]\n')
        self.machines = {name: Node(self, number) for number, name in enumerate(NODES, 1)}
        for node in self.machines.values():
            self.route(f"10.244.{node.number}.0/24", via=(node.address, ""))
            node.boot()
        for node in self.machines.values():
            until(node.ready, f"{node.name} is Ready, see {self.folder}", 120)

    def start(self, space: Namespace, name: str, *argv: str) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.log").open("a") as log:
            return space.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start_registry(self) -> None:
        program = need("docker-registry", "apt-get install docker-registry")
        config, disk = self.folder / "registry.yml", self.store.folder / "registry"
        config.write_text(REGISTRY_CONFIG.replace("DISK", str(disk)).replace("ADDRESS", REGISTRY))
        self.start(self.registry, "registry", program, "serve", str(config))

    def start_controllers(self) -> None:
        admin = self.server.kubeconfig("admin", certificate=self.server.admin)
        common = f"--kubeconfig={admin}", "--leader-elect=false"
        keys = f"--service-account-private-key-file={self.server.flags['service-account-signing-key-file']}"
        root = f"--root-ca-file={self.server.ca}"
        self.start(self.control, "controllers", asset("kube-controller-manager"), *common, keys, root)
        self.start(self.control, "scheduler", asset("kube-scheduler"), *common)

    def push(self, name: str, dockerfile: str, *files: Path) -> None:
        """Builds an image of these files, and pushes it to the registry."""
        context = self.store.folder / "context"
        context.mkdir()
        (context / "Dockerfile").write_text(dockerfile)
        for file in files:
            shutil.copy(file, context)
        self.store.buildah("build", *self.store.how(), f"--tag={name}", str(context))
        output([*self.pusher(), name], self.store.folder)
        shutil.rmtree(context)

    def pusher(self) -> list[str]:
        """What pushes the image that is named next."""
        network = ["nsenter", f"--net=/proc/{self.registry.pid}/ns/net"]
        return [*network, *self.store.command("push", "--quiet", "--tls-verify=false")]


def hierarchies() -> list[Path]:
    """Where cgroups are made: version 1 has many places, version 2 one, and there may be both."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted({Path(place) for _, place, kind, *_ in mounts if kind in ("cgroup", "cgroup2")})


def make_cgroups(name: str) -> None:
    for hierarchy in hierarchies():
        (hierarchy / name).mkdir(parents=True, exist_ok=True)


def remove_stale_cgroups() -> None:
    """Those of test runs that were killed: the folder that they are named after is gone, or will be in a moment."""
    for hierarchy in hierarchies():
        for made in hierarchy.glob("epok-images-*"):
            if not (CACHE / made.name.removeprefix("epok-")).exists():
                remove_cgroups(made.name)


def remove_cgroups(name: str) -> None:
    """With all below, as soon as the last process is gone."""
    for hierarchy in hierarchies():
        until(lambda top=hierarchy / name: removed(top), f"the end of all in {hierarchy / name}", 30, 0.3)


def removed(top: Path) -> bool:
    with contextlib.suppress(OSError):
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)
    return not top.exists()


class Run(NamedTuple):
    """A pod of epok's. Times are seconds since 1970; `begun` and `ended` are its container's, 0 when it had none."""

    job: str
    node: str
    phase: str
    begun: float
    ended: float
    peak: int  # bytes of its cgroup, with the sandbox
    requests: tuple[str, ...]
    log: str

    @property
    def minute(self) -> float:
        """That for which the CronJob made it; others have none."""
        number = self.job.removeprefix("epok-")
        return int(number) * 60.0 if number.isdecimal() else 0


class Watch:
    """Remembers all pods of epok's, in a with statement: from the API, and from the nodes' cgroups."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pods: dict[str, Object] = {}
        self.logs: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self.seen: dict[str, tuple[float, float]] = {}  # containers
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=look) for look in (self.ask, self.measure)]

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def ask(self) -> None:
        request = self.cluster.server.request
        while not self.stop.wait(0.2):
            with contextlib.suppress(AssertionError, urllib3.exceptions.HTTPError):
                for pod in request("GET", f"{PODS}?labelSelector=job-name")["items"]:
                    uid = pod["metadata"]["uid"]
                    self.pods[uid] = pod
                    if pod["status"]["phase"] in ("Succeeded", "Failed") and uid not in self.logs:
                        self.logs[uid] = request("GET", f"{PODS}/{pod['metadata']['name']}/log").decode()

    def measure(self) -> None:
        [memory] = [one for one in hierarchies() if one.name == "memory"] or hierarchies()[:1]
        name = "memory.max_usage_in_bytes" if memory.name == "memory" else "memory.peak"
        while not self.stop.wait(0.04):
            now = time.time()
            for pod in memory.glob(f"{self.cluster.cgroup}/*/kubepods/burstable/pod*"):
                with contextlib.suppress(OSError):
                    self.peaks[pod.name.removeprefix("pod")] = int((pod / name).read_text())
                    for container in filter(Path.is_dir, pod.iterdir()):
                        self.seen[container.name] = self.seen.get(container.name, (now, now))[0], now

    def runs(self) -> list[Run]:
        """All until now, in the order in which they were made."""
        asked = self.asked()
        pods = sorted(self.pods.values(), key=lambda pod: pod["metadata"]["creationTimestamp"])
        return [self.run(pod, tuple(asked.get(pod["metadata"]["uid"], ()))) for pod in pods]

    def run(self, pod: Object, requests: tuple[str, ...] = ()) -> Run:
        uid, [status] = pod["metadata"]["uid"], pod["status"].get("containerStatuses") or [{}]
        begun, ended = self.seen.get(status.get("containerID", "").rpartition("/")[2], (0.0, 0.0))
        job, node = pod["metadata"]["labels"]["job-name"], pod["spec"].get("nodeName", "")
        return Run(
            job, node, pod["status"]["phase"], begun, ended, self.peaks.get(uid, 0), requests, self.logs.get(uid, "")
        )

    def asked(self) -> dict[str, list[str]]:
        """What each pod asked the API for."""
        found: dict[str, list[str]] = {}
        with open(self.cluster.server.flags["audit-log-path"]) as log:
            for entry in map(json.loads, log):
                uids = entry["user"].get("extra", {}).get("authentication.kubernetes.io/pod-uid", [""])
                found.setdefault(uids[0], []).append(f"{entry['verb']} {entry['requestURI']}")
        return found

    def done(self, job: str, seconds: float = 90) -> Run:
        """The last pod of that Job, when its end and its log are known; without what it asked for."""
        deadline = time.monotonic() + stretched(seconds)
        while True:
            for pod in list(self.pods.values()):
                if pod["metadata"]["labels"]["job-name"] == job and pod["metadata"]["uid"] in self.logs:
                    return self.run(pod)
            assert time.monotonic() < deadline, f"no end of job {job}: {self.pods.values()}"
            time.sleep(0.1)
