"""What else makes rules on a host: Docker, firewalld, ufw and kube-proxy themselves, Calico and the older epok by hand.

The first three are the distribution's packages, in a root file system of their own, which the user's cache keeps for a
month: none is installed on the machine. Each gets a layer over it that is gone with the neighbour, and runs in the
namespaces of the lab's host: its network and the lock of its iptables are what they share with epok.

    with Ufw(Ground(lab, folder)) as ufw:
        ufw.start()
        ufw.reload()
        ufw.stop()
"""

import base64
import hashlib
import http.client
import io
import json
import re
import shlex
import socket
import subprocess
import tarfile
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import urllib3

from lab.apiserver import ApiServer, asset
from lab.container import PATH, SMALL, distribution, scratch
from lab.gateway import OLDER_RULE
from lab.iptables import tables_in
from lab.machine import need, until
from lab.network import Lab, Made, pod
from lab.objects import endpoint, endpoint_slice, node, port, service, slice_port
from test_kube_proxy import OPTIONS

PACKAGES = [
    *SMALL,
    "--format=directory",
    "--include=docker.io,ufw,firewalld,iptables,nftables,dbus,busybox-static,procps,iproute2",
    '--aptopt=Apt::Install-Recommends "false"',
    *(f"--dpkgopt=path-exclude=/usr/share/{what}/*" for what in ("doc", "man", "locale")),
]
TOWN = "/run/town"
# Of the kernel's settings they can change those of their network alone, and control groups not at all.
BUILD = """
packages=$1 backend=$2 town=$3 root=$3/root
mkdir $town
mount -t tmpfs -o mode=755 tmpfs $town
mkdir $town/upper $town/work $root
mount -t overlay -o "lowerdir=$packages,upperdir=$town/upper,workdir=$town/work" overlay $root
mount --bind /proc $root/proc
mount --bind -o ro /proc/sys $root/proc/sys
mount -o remount,bind,ro $root/proc/sys
mount --bind /proc/sys/net $root/proc/sys/net
mount -t sysfs -o ro sysfs $root/sys
mount --rbind /sys/fs/cgroup $root/sys/fs/cgroup
for group in $(grep -o " $root/sys/fs/cgroup[^ ]*" /proc/self/mounts); do mount -o remount,bind,ro $group; done
mount -t tmpfs -o mode=755 tmpfs $root/dev
for device in null zero full random urandom; do
    : >$root/dev/$device
    mount --bind /dev/$device $root/dev/$device
done
mount -t tmpfs -o mode=755 tmpfs $root/run
mkdir $root/run/dbus
: >>/run/xtables.lock
: >$root/run/xtables.lock
mount --bind /run/xtables.lock $root/run/xtables.lock
for tool in iptables ip6tables; do
    for more in "" -save -restore; do ln -sfn /usr/sbin/$tool-$backend$more $root/etc/alternatives/$tool$more; done
done
"""
# No rule in any table of either backend, and what else neighbours leave.
RAZE = """
nft flush ruleset
for version in ip ip6; do
    for table in $(cat /proc/net/${version}_tables_names 2>/dev/null); do
        ${version}tables-legacy-save -t $table | sed -nE "s/^:(\\S+) (ACCEPT|DROP) .*/:\\1 ACCEPT/p; /^(\\*|COMMIT)/p" |
            ${version}tables-legacy-restore --wait 5
    done
done
ip link del docker0 2>/dev/null || true
sysctl -qw net.ipv4.ip_forward=1
if [ -e TOWN ]; then
    umount -l TOWN
    rmdir TOWN
fi
""".replace("TOWN", TOWN)
CONFIGURATION = "etc/firewalld/firewalld.conf"
SSH, TELNET = 22, 23  # ports of the host with a server on each; firewalls let clients in to the first


@cache
def packages() -> Path:
    """The root file system with the packages; it is made in a minute or two."""
    need("mmdebstrap", "apt-get install mmdebstrap")
    with scratch() as folder:
        return distribution("neighbours", PACKAGES, folder)


class Ground:
    """A lab's host for neighbours, one at a time; what several of them need is made when the first one asks for it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder

    @cached_property
    def server(self) -> ApiServer:
        """A cluster of this host and another node, with a Service of which epok knows nothing."""
        made, http = ApiServer(self.lab.host, self.folder), slice_port(30080, "http")
        made.create(node("k3s", "10.0.0.1", "2001:db8:2::1"), node("agent", "10.0.0.99", "2001:db8:2::99"))
        made.create(
            service("web", None, [port(80, KubeProxy.port, "http", target="http")], families=("IPv4", "IPv6")),
            *(
                endpoint_slice("web", [endpoint("agent", address)], [http], family=family, suffix=family.lower())
                for address, family in zip(pod(1), ("IPv4", "IPv6"), strict=True)
            ),
        )
        return made

    def raze(self) -> None:
        self.lab.host.run(["sh", "-ec", RAZE])
        self.lab.flush()


class Neighbour(Made):
    """Whoever else makes rules: it starts, reloads and stops as its administrator would have it."""

    opens: dict[int, str] = {}  # noqa: RUF012  ports of the host that lead somewhere while it runs, and who answers
    shuts: tuple[int, ...] = ()  # ports of the host that it lets nobody in to
    wipes = False  # whether all rules of iptables, whosever they are, go when it starts, reloads and stops

    def __init__(self, ground: Ground) -> None:
        super().__init__()
        self.ground, self.lab = ground, ground.lab

    def make(self) -> None:
        self.stack.callback(self.ground.raze)
        if self.shuts:
            self.stack.enter_context(self.lab.serve(self.lab.host, "host", (SSH, TELNET)))

    def start(self) -> None:
        raise NotImplementedError

    def reload(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class Packaged(Neighbour):
    """One of the distribution's packages."""

    other_backend = False  # whether its iptables is not the one that epok has

    def make(self) -> None:
        super().make()
        backend = {"nft": "legacy", "legacy": "nft"}[self.lab.backend] if self.other_backend else self.lab.backend
        self.lab.host.run(["sh", "-ec", BUILD, "sh", str(packages()), backend, TOWN])
        self.root = self.lab.host.root / TOWN[1:] / "root"

    def command(self, *argv: str) -> list[str]:
        return ["chroot", f"{TOWN}/root", "env", "-i", f"PATH={PATH}", *argv]

    def run(self, *argv: str) -> str:
        return self.lab.host.run(self.command(*argv)).stdout

    def daemon(self, name: str, *argv: str) -> "subprocess.Popen[str]":
        """Runs until `end`, or else until the neighbour is left; its process is known to /run/NAME.process."""
        script = f'echo $$ >/run/{name}.process; exec "$@" >/run/{name}.log 2>&1'
        started = self.lab.host.popen(self.command("sh", "-c", script, "sh", name, *argv), stdin=subprocess.DEVNULL)
        self.stack.callback(started.wait)
        self.stack.callback(started.kill)
        return started

    def log(self, name: str) -> str:
        return (self.root / "run" / f"{name}.log").read_text()[-3000:]

    def end(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.lab.host.run(["kill", (self.root / "run" / f"{name}.process").read_text().strip()])
        process.wait(300)


class Ufw(Packaged):
    """As it is installed: nobody may come in or through, but to port 22."""

    opens = {SSH: "host"}  # noqa: RUF012
    shuts = (TELNET,)

    def start(self) -> None:
        self.run("ufw", "allow", str(SSH))
        self.run("ufw", "--force", "enable")

    def reload(self) -> None:
        self.run("ufw", "reload")

    def stop(self) -> None:
        self.run("ufw", "disable")


class UfwElsewhere(Ufw):
    """With the backend of iptables that epok does not use."""

    other_backend = True


class Firewalld(Packaged):
    """As it is installed: the zone public, which lets clients in to ssh."""

    opens = {SSH: "host"}  # noqa: RUF012
    shuts = (TELNET,)
    wipes = True
    settings = {"FirewallBackend": "nftables"}  # noqa: RUF012

    def make(self) -> None:
        super().make()
        self.configure(**self.settings)
        self.daemon("dbus-daemon", "--system", "--nofork", "--nopidfile")
        until((self.root / "run/dbus/system_bus_socket").exists, "dbus-daemon", 60)

    def configure(self, **settings: str) -> None:
        file = self.root / CONFIGURATION
        lines = [line for line in file.read_text().splitlines() if line.split("=")[0] not in settings]
        file.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in settings.items()), ""]))

    def start(self) -> None:
        self.process = self.daemon("firewalld", "--nofork", "--nopid")
        until(self.ready, "firewalld is running", 60)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log("firewalld")
        asked = self.lab.host.run(self.command("firewall-cmd", "--state"), check=False)
        return asked.stdout == "running\n"

    def reload(self) -> None:
        self.run("firewall-cmd", "--reload")
        if "StrictForwardPorts=yes" in (self.root / CONFIGURATION).read_text():
            self.be_strict()

    def be_strict(self) -> None:
        """That setting leaves out one rule; what releases do that do not know it yet is done here."""
        listed = self.run("nft", "-a", "list", "chain", "inet", "firewalld", "filter_FORWARD")
        for handle in re.findall(r"ct status dnat accept # handle (\d+)", listed):
            self.run("nft", "delete", "rule", "inet", "firewalld", "filter_FORWARD", "handle", handle)

    def stop(self) -> None:
        self.end("firewalld", self.process)


class FirewalldOfIptables(Firewalld):
    settings = {"FirewallBackend": "iptables"}  # noqa: RUF012


class DockerSocket(http.client.HTTPConnection):
    """Docker's API, by the socket that its own command uses."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=300)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class Docker(Packaged):
    """With one container, whose port 443 is published as the host's 8443, and which comes again with the daemon."""

    opens = {8443: "docker"}  # noqa: RUF012
    # Control groups are the machine's: runc runs as for a user who has none.
    runtime = """#!/usr/bin/python3
import json, os, sys
if "--bundle" in sys.argv:
    name = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"
    with open(name) as file:
        config = json.load(file)
    for what in ("cgroupsPath", "resources"):
        config["linux"].pop(what, None)
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] not in ("cgroup", "mqueue")]
    with open(name, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc", "--rootless=true", *sys.argv[1:]])
"""
    options = (
        "--storage-driver=vfs",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        "--add-runtime=ungrouped=/usr/local/bin/ungrouped",
        "--default-runtime=ungrouped",
        "--ipv6",
        "--fixed-cidr-v6=fd00:17::/64",
        "--experimental",
        "--ip6tables",
    )
    answer = "docker saw - 0 on 443"
    web = {  # noqa: RUF012
        "Image": "busybox",
        "Cmd": ["/busybox", "nc", "-ll", "-p", "443", "-e", "/busybox", "echo", answer],
        "StopSignal": "KILL",
        "ExposedPorts": {"443/tcp": {}},
        "HostConfig": {"PortBindings": {"443/tcp": [{"HostPort": "8443"}]}, "RestartPolicy": {"Name": "always"}},
    }

    def make(self) -> None:
        super().make()
        runtime = self.root / "usr/local/bin/ungrouped"
        runtime.write_text(self.runtime)
        runtime.chmod(0o755)

    def start(self) -> None:
        # where Docker is who makes the host forward, it also makes FORWARD's policy DROP
        self.lab.host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
        self.start_daemon()
        image = io.BytesIO()
        with tarfile.open(fileobj=image, mode="w") as archive:
            archive.add(self.root / "bin/busybox", "busybox")
        self.request("POST", "/images/create?fromSrc=-&repo=busybox", image.getvalue(), "application/x-tar")
        self.request("POST", "/containers/create?name=web", json.dumps(self.web).encode())
        self.request("POST", "/containers/web/start")
        until(self.ready, "the container answers", 60)

    def start_daemon(self) -> None:
        self.process = self.daemon("dockerd", *self.options)
        until(self.listening, "dockerd", 60)

    def listening(self) -> bool:
        assert self.process.poll() is None, self.log("dockerd")
        try:
            return self.request("GET", "/_ping") == b"OK"
        except OSError:
            return False

    def ready(self) -> bool:
        """The container itself, whatever the rules are."""
        state = json.loads(self.request("GET", "/containers/web/json"))
        [network] = state["NetworkSettings"]["Networks"].values()
        try:
            return (
                bool(network["IPAddress"]) and self.lab.ask(443, to=network["IPAddress"], frm=self.lab.host).port == 443
            )
        except OSError:
            return False

    def request(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        socket = DockerSocket(self.root / "run/docker.sock")
        try:
            socket.request(method, path, body, {"Content-Type": kind})
            answer = socket.getresponse()
            said = answer.read()
        finally:
            socket.close()
        assert answer.status < 300, f"{path}: {answer.status} {said.decode()}\n{self.log('dockerd')}"
        return said

    def reload(self) -> None:
        """Only a daemon that starts makes its rules again."""
        self.stop()
        self.start_daemon()
        until(self.ready, "the container answers again", 60)

    def stop(self) -> None:
        self.end("dockerd", self.process)


class KubeProxy(Neighbour):
    port = 32000
    opens = {port: "node1"}  # noqa: RUF012

    def start(self) -> None:
        config = self.ground.server.kubeconfig("admin", certificate=self.ground.server.admin)
        options = [f"--{name}={value}" for name, value in (OPTIONS | {"kubeconfig": config}).items()]
        with (self.ground.folder / "kube-proxy.log").open("w") as log:
            self.process = self.lab.host.popen([asset("kube-proxy"), *options], stdout=log, stderr=log)
        self.stack.callback(self.process.wait)
        self.stack.callback(self.process.kill)
        until(self.synced, f"kube-proxy has made its rules, see {log.name}", 60)

    def synced(self) -> bool:
        """Also when they were there before it started."""
        assert self.process.poll() is None, (self.ground.folder / "kube-proxy.log").read_text()[-3000:]
        try:
            with self.lab.host.entered():
                said = urllib3.request("GET", "http://127.0.0.1:10249/metrics", retries=False).data.decode()
        except urllib3.exceptions.HTTPError:
            return False
        done = re.findall(
            r'(?m)^kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family="IPv(.)"} [1-9]', said
        )
        return sorted(done) == ["4", "6"] and all(f"--dport {self.port} " in self.lab.saved(n) for n in (4, 6))

    def reload(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        """Its rules stay."""
        self.process.kill()
        self.process.wait()


class Calico(Neighbour):
    """Felix is in no package, so these are rules of the shape that its documentation and its users' listings show.

    A workload, cali1, and a host endpoint with a policy for what comes in. Without the sets of addresses, which take
    ipset. A comment is a digest of the rule, and Felix knows its own by that.
    """

    opens = {SSH: "host"}  # noqa: RUF012
    shuts = (TELNET,)
    mode = "-I"
    hooks = """
raw PREROUTING -j cali-PREROUTING
raw OUTPUT -j cali-OUTPUT
mangle PREROUTING -j cali-PREROUTING
mangle POSTROUTING -j cali-POSTROUTING
nat PREROUTING -j cali-PREROUTING
nat OUTPUT -j cali-OUTPUT
nat POSTROUTING -j cali-POSTROUTING
filter INPUT -j cali-INPUT
filter FORWARD -j cali-FORWARD
filter OUTPUT -j cali-OUTPUT
"""
    # whatever the mode is, these go to the end
    last = """
filter FORWARD -m comment --comment "Policy explicitly accepted packet." -m mark --mark 0x10000/0x10000 -j ACCEPT
filter FORWARD -j MARK --set-xmark 0x10000/0x10000
"""
    chains = """
raw cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
raw cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
raw cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
raw cali-PREROUTING -i cali+ -j MARK --set-xmark 0x40000/0x40000
raw cali-PREROUTING -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
raw cali-PREROUTING -m mark --mark 0x0/0x40000 -j cali-from-host-endpoint
raw cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
raw cali-rpf-skip
raw cali-from-host-endpoint
mangle cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
mangle cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
mangle cali-PREROUTING -j cali-from-host-endpoint
mangle cali-PREROUTING -m comment --comment "Host endpoint policy accepted" -m mark --mark 0x10000/0x10000 -j ACCEPT
mangle cali-POSTROUTING -m mark --mark 0x10000/0x10000 -j RETURN
mangle cali-POSTROUTING -j MARK --set-xmark 0x0/0xf0000
mangle cali-POSTROUTING -m conntrack --ctstate DNAT -j cali-to-host-endpoint
mangle cali-from-host-endpoint
mangle cali-to-host-endpoint
nat cali-PREROUTING -j cali-fip-dnat
nat cali-OUTPUT -j cali-fip-dnat
nat cali-POSTROUTING -j cali-fip-snat
nat cali-POSTROUTING -j cali-nat-outgoing
nat cali-fip-dnat
nat cali-fip-snat
nat cali-nat-outgoing -s 10.245.0.0/16 ! -d 10.245.0.0/16 -j MASQUERADE --random-fully
filter cali-INPUT -i cali+ -g cali-wl-to-host
filter cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
filter cali-INPUT -j MARK --set-xmark 0x0/0xf0000
filter cali-INPUT -j cali-from-host-endpoint
filter cali-INPUT -m comment --comment "Host endpoint policy accepted" -m mark --mark 0x10000/0x10000 -j ACCEPT
filter cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
filter cali-FORWARD -m mark --mark 0x0/0x10000 -j cali-from-hep-forward
filter cali-FORWARD -i cali+ -j cali-from-wl-dispatch
filter cali-FORWARD -o cali+ -j cali-to-wl-dispatch
filter cali-FORWARD -j cali-to-hep-forward
filter cali-FORWARD -j cali-cidr-block
filter cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
filter cali-OUTPUT -o cali+ -j RETURN
filter cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
filter cali-wl-to-host -j cali-from-wl-dispatch
filter cali-wl-to-host -m comment --comment "Configured DefaultEndpointToHostAction" -j ACCEPT
filter cali-from-host-endpoint -i eth0 -g cali-fh-eth0
filter cali-fh-eth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter cali-fh-eth0 -m conntrack --ctstate INVALID -j DROP
filter cali-fh-eth0 -j cali-failsafe-in
filter cali-fh-eth0 -j MARK --set-xmark 0x0/0x30000
filter cali-fh-eth0 -m comment --comment "Start of policies" -j MARK --set-xmark 0x0/0x20000
filter cali-fh-eth0 -p icmp -j ACCEPT
filter cali-fh-eth0 -m comment --comment "Drop if no policies passed packet" -m mark --mark 0x0/0x20000 -j DROP
filter cali-failsafe-in -p tcp -m multiport --dports 22 -j ACCEPT
filter cali-failsafe-in -p udp -m multiport --dports 68 -j ACCEPT
filter cali-failsafe-in -p tcp -m multiport --dports 179,2379,2380,5473,6443,6666,6667 -j ACCEPT
filter cali-from-hep-forward
filter cali-to-hep-forward
filter cali-cidr-block
filter cali-from-wl-dispatch -i cali1 -g cali-fw-cali1
filter cali-from-wl-dispatch -m comment --comment "Unknown interface" -j DROP
filter cali-to-wl-dispatch -o cali1 -g cali-tw-cali1
filter cali-to-wl-dispatch -m comment --comment "Unknown interface" -j DROP
filter cali-fw-cali1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter cali-fw-cali1 -m conntrack --ctstate INVALID -j DROP
filter cali-fw-cali1 -j MARK --set-xmark 0x0/0x30000
filter cali-fw-cali1 -m comment --comment "Drop if no profiles matched" -j DROP
filter cali-tw-cali1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter cali-tw-cali1 -m comment --comment "Drop if no profiles matched" -j DROP
"""
    # a host endpoint's policy with applyOnForward that nothing passes
    forward_policy = """
filter cali-from-hep-forward -i eth0 -g cali-fhfw-eth0
filter cali-fhfw-eth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter cali-fhfw-eth0 -j MARK --set-xmark 0x0/0x30000
filter cali-fhfw-eth0 -m comment --comment "Drop if no policies passed packet" -m mark --mark 0x0/0x20000 -j DROP
"""

    def start(self) -> None:
        self.apply()

    def reload(self) -> None:
        """Felix looks at the chains from time to time: its rules go back to the place that its mode says."""
        saved = {tool: self.lab.host.run([f"{tool}-save"]).stdout for tool in ("iptables", "ip6tables")}
        for tool, text in saved.items():
            self.restore(tool, [(table, f"-D{rule[2:]}") for table, rule in self.hooked(text)])
        self.apply()

    def stop(self) -> None:
        """Its rules stay."""

    def deny_forwarding(self) -> None:
        self.chains += self.forward_policy.lstrip()
        self.apply()

    def apply(self) -> None:
        """All chains as they should be, and the hooks where they are missing."""
        in_ipv6 = self.chains.replace("10.245.0.0/16", "fd00:245::/64").replace("-p icmp ", "-p ipv6-icmp ")
        for tool, chains in (("iptables", self.chains), ("ip6tables", in_ipv6)):
            rules = self.commented(chains, "-A")
            names = sorted({(table, rule.split()[1]) for table, rule in rules})
            there = self.hooked(self.lab.host.run([f"{tool}-save"]).stdout)
            hooks = [] if there else self.commented(self.hooks, self.mode) + self.commented(self.last, "-A")
            lines = [(table, f":{name} - [0:0]") for table, name in names]
            self.restore(tool, lines + [rule for rule in rules if len(rule[1].split()) > 2] + hooks)

    def hooked(self, saved: str) -> list[tuple[str, str]]:
        """Its rules in the chains that are not its own."""
        return [
            (table, f"-A {chain} {rule}")
            for table, chains in tables_in(saved).items()
            for chain in chains
            if chain.isupper()
            for rule in chains[chain]
            if "cali:" in rule
        ]

    def commented(self, rules: str, command: str) -> list[tuple[str, str]]:
        """Lines of the class as (table, words of iptables-restore)."""
        found = []
        for line in rules.strip().splitlines():
            table, chain, rule = [*line.split(" ", 2), ""][:3]
            digest = base64.urlsafe_b64encode(hashlib.sha256(line.encode()).digest()).decode()[:16]
            comment = f'-m comment --comment "cali:{digest}" ' if rule else ""
            found.append((table, f"{command} {chain} {comment}{rule}"))
        return found

    def restore(self, tool: str, lines: list[tuple[str, str]]) -> None:
        tables = dict.fromkeys(table for table, _ in lines)
        text = "".join(
            f"*{table}\n" + "".join(f"{line}\n" for of, line in lines if of == table) + "COMMIT\n" for table in tables
        )
        # in other words than epok's, of whose inputs the lab keeps a record
        self.lab.host.run([f"{tool}-restore", "--noflush", "--wait", "5", "--verbose"], text)


class CalicoAtTheEnd(Calico):
    """ChainInsertMode=Append."""

    mode = "-A"


class OlderEpok(Neighbour):
    """The one in Rust: a rule for each node in PREROUTING itself; these have no successor."""

    opens = {26: "node1"}  # noqa: RUF012
    rule = OLDER_RULE.replace("--dport 25 ", "--dport 26 ").strip()

    def start(self) -> None:
        """It forwards port 25 too."""
        for rule in (OLDER_RULE.strip(), self.rule):
            self.lab.host.run(["iptables", "-t", "nat", *shlex.split(rule)])

    def reload(self) -> None:
        """Its rules are deleted and made again."""
        for rule in (OLDER_RULE.strip(), self.rule):
            self.lab.host.run(["iptables", "-t", "nat", *shlex.split(f"-D{rule[2:]}")])
        self.start()

    def stop(self) -> None:
        """Its rules stay."""
