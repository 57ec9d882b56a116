"""A client, a host machine and a cluster's nodes, as network namespaces of this machine. Needs root.

    client eth0  192.0.2.10, .11   --  eth0 192.0.2.1    \\
           lo    198.18.0.0/24                           host  eth1 10.0.0.1  --  eth0 10.0.0.11.. node1..
    inside eth0  198.51.100.10     --  eth2 198.51.100.1 /      (a bridge)         lo   10.244.1.5.. its pod

and the same in IPv6: 2001:db8:1:: to the client, 2001:db8:2:: to the nodes, 2001:db8:3:: to inside,
2001:db8:18::/120 for the crowd that the client is, 2001:db8:244:1::5 and so on for the pods. Every
namespace lives as long as the process that holds it, and that one as long as ours: a killed test run leaves
nothing behind, and the machine's own network, mounts and iptables are never touched.

    with Lab(backend="legacy") as lab:
        lab.epok("-i", "eth0", "local", snapshot=lab.cluster(service("mail", "25:2025", [port(25, 2025)])))
        print(lab.ask(25).name)
"""

import contextlib
import ctypes
import errno
import ipaddress
import itertools
import json
import os
import py_compile
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lab.echo import INIT, INIT_ACK, KINDS, Sctp, has_sctp, open_raw_sctp, unpacked, without_ip_header
from lab.machine import stretched
from lab.objects import node, snapshot

EPOK = Path(__file__).resolve().parents[2] / "epok.py"
# epok as a process, in the checkout; compiled beforehand, or a quarter of each run is the compiler
PROGRAM = ("env", "-C", str(EPOK.parent), sys.executable, str(py_compile.compile(str(EPOK), doraise=True)))
# The folder of iptables-nft, iptables-legacy-save and the rest: test_versions.py has others than the machine's.
SBIN = os.environ.get("EPOK_TEST_IPTABLES", "/usr/sbin")
ECHO = Path(__file__).resolve().parent / "echo.py"
HOST, HOST6 = "192.0.2.1", "2001:db8:1::1"
CLIENT, CLIENT6 = ("192.0.2.10", "192.0.2.11"), ("2001:db8:1::10", "2001:db8:1::11")
CROWD, CROWD6 = ipaddress.ip_network("198.18.0.0/24"), ipaddress.ip_network("2001:db8:18::/120")
INSIDE, INSIDE6 = "198.51.100.10", "2001:db8:3::10"
NODE_PORTS = (2025, *range(30000, 30010), 30053, 30080, 30443)
TABLES = ("nat", "filter")

CLONE_NEWNET = 0x40000000
FILES = {"mount": "mnt", "pid": "pid_for_children"}  # of /proc/PID/ns, for what a process starts, where not as its kind
SCTP_PORTS = itertools.cycle(range(20000, 60000))

# No waiting for addresses to become valid, and every closed UDP port says so, not the first six alone.
QUICK = """
echo 0 >/proc/sys/net/ipv4/icmp_ratelimit
echo 0 >/proc/sys/net/ipv6/icmp/ratelimit
for what in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$what/accept_dad
    echo 0 >/proc/sys/net/ipv6/conf/$what/accept_ra
    echo 0 >/proc/sys/net/ipv6/conf/$what/disable_ipv6
done
"""
FORWARDING = """
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
"""
# /run is private because legacy's lock file is one for all network namespaces. The alternatives are what the
# plain names in /usr/sbin point to, so that they mean the backend whatever PATH a process has.
CHOOSE_BACKEND = f"""
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p -m 755 /run/lock /run/sshd
cp -a /etc/alternatives /run/alternatives
for plain in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
    ln -sfn "{SBIN}/$(echo "$plain" | sed "s/tables/tables-BACKEND/")" "/run/alternatives/$plain"
done
mount --bind /run/alternatives /etc/alternatives
"""
# What is swapped in as epok does it is also kept in a file, for conftest.py to look at.
RECORD_INPUTS = """
mkdir -m 1777 /run/inputs /run/real
for plain in iptables-restore ip6tables-restore; do
    mv /run/alternatives/$plain /run/real/$plain
    cat >/run/alternatives/$plain <<EOF
#!/bin/sh
[ "\\$*" = "--noflush --wait 5" ] || exec /run/real/$plain "\\$@"
file=\\$(mktemp /run/inputs/$plain.XXXXXX)
cat >"\\$file"
exec /run/real/$plain "\\$@" <"\\$file"
EOF
    chmod 755 /run/alternatives/$plain
done
"""
PLAIN_TABLES = """*nat
:PREROUTING ACCEPT
:INPUT ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
COMMIT
*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
COMMIT
"""


def warnings_in(log: str) -> list[str]:
    """What a run warned of, without what it left undone since the machine was too busy."""
    found = re.findall(r"(?m)^warning: (.*)$", log)
    late = r"no answer within the time for (looking|Events)|gave up after \d+ tr.*; no Events in namespace"
    return [text for text in found if not re.search(late, text)]


def bare_environment() -> dict[str, str]:
    """Ours, without what epok would take for options, a cluster to be in, or an agent with keys.

    On a busy machine epok has more time than by default, and so more for looking.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("EPOK_", "KUBE", "SSH_"))}
    usual, now = 50, stretched(50)
    return {**ours, "EPOK_TIMEOUT": str(now)} if now > usual else ours


class Process(NamedTuple):
    """One that is alive, with its id on this machine, and the words that it was started with."""

    pid: int
    name: str
    words: str


def processes_in(spaces: Container[str], kind: str = "pid") -> list[Process]:
    """Those of namespaces, which are named as the links in /proc/PID/ns; what is dead and not reaped is left out."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.readlink(place / "ns" / kind) not in spaces:
                continue
            name, _, rest = (place / "stat").read_text(errors="replace").partition(" (")[2].rpartition(") ")
            words = (place / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
            if not rest.startswith("Z"):
                found.append(Process(int(place.name), name, words))
    return found


class Answer(NamedTuple):
    """What an echo server said: who it is, and from what address and port it saw the question come."""

    name: str
    saw: str
    sport: int
    port: int


class Namespace:
    """A network, mount and PID namespace. Whatever runs in it dies with it."""

    KINDS = ("net", "mount", "pid")

    def __init__(self, name: str, setup: str = "") -> None:
        """Run the shell script `setup` inside, and be ready when it is through."""
        self.name = name
        self.children: list[subprocess.Popen[str]] = []
        # The signal is for when the thread that made the lab ends in whatever way; --kill-child passes it on.
        alone = ["setpriv", "--pdeathsig", "KILL", "unshare", *(f"--{kind}" for kind in self.KINDS)]
        alone += ["--fork", "--kill-child", "--mount-proc"]
        hold = ["sh", "-ec", f"{setup}\necho held\nexec cat"]
        self.holder = subprocess.Popen([*alone, *hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.holder.pid
        assert self.holder.stdout
        if self.holder.stdout.readline() != "held\n":
            self.close()
            raise RuntimeError(f"namespace {name} could not be made; it needs root, and the reason is above")

    def command(self, argv: Sequence[str]) -> list[str]:
        """The argv that runs `argv` in here, in the directory /."""
        spaces = [f"--{kind}=/proc/{self.pid}/ns/{FILES.get(kind, kind)}" for kind in self.KINDS]
        # nsenter stays as the parent: who kills that must not leave the child
        return ["nsenter", *spaces, "setpriv", "--pdeathsig", "KILL", *argv]

    def processes(self) -> list[Process]:
        """All that run in here."""
        return processes_in([os.readlink(f"/proc/{self.pid}/ns/{FILES['pid']}")])

    def popen(self, argv: Sequence[str], **kw: Any) -> "subprocess.Popen[str]":
        child = subprocess.Popen(self.command(argv), **{"text": True, **kw})
        self.children.append(child)
        return child

    @property
    def root(self) -> Path:
        """Its root directory, as it is seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def run(
        self,
        argv: Sequence[str],
        input: str = "",
        check: bool = True,
        env: dict[str, str] | None = None,
        timeout: float = 300,
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(self.command(argv), input=input, capture_output=True, text=True, env=env, timeout=timeout)
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def wire(self, *lines: str) -> None:
        """Run `ip` lines in this network, but with the machine's process ids, by which ip finds other namespaces."""
        argv = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "-batch", "-"]
        subprocess.run(argv, input="\n".join(lines), text=True, check=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within, the calling thread opens its sockets in this network; they stay there when it has left."""
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.pid}/ns/net") as inside:
            setns(inside.fileno())
            try:
                yield
            finally:
                setns(before.fileno())

    def close(self) -> None:
        """End everything in here. PID 1 is a cat: the kernel lets it go when all the others are dead and reaped."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self.holder.communicate(timeout=2)  # whose nsenter was killed is for the machine's init to reap
        self.holder.kill()
        for process in (self.holder, *self.children):
            with contextlib.suppress(BrokenPipeError):
                process.__exit__(None, None, None)


def setns(descriptor: int) -> None:
    """Move the calling thread to a network namespace (os.setns is Python 3.12's)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns: " + os.strerror(ctypes.get_errno()))


def pod(number: int) -> tuple[str, str]:
    """The addresses of the pod on node1, node2 and so on."""
    return f"10.244.{number}.5", f"2001:db8:244:{number}::5"


class Made:
    """What `make` makes, in a with statement; what it put on `stack` ends with that, and when not all could be made."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()

    def make(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        with self.stack:
            self.make()
            self.stack = self.stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()


class Lab(Made):
    """All the namespaces, wired, with an echo server on `ports` of each node."""

    def __init__(
        self, backend: str = "nft", nodes: int = 3, ports: Iterable[int] = NODE_PORTS, record: bool = False
    ) -> None:
        super().__init__()
        self.backend = backend
        self.record = record
        self.node_count = nodes
        self.ports = tuple(ports)

    def make(self) -> None:
        self.client = self.namespace("client")
        self.inside = self.namespace("inside")
        choose = CHOOSE_BACKEND.replace("BACKEND", self.backend)
        self.host = self.namespace("host", FORWARDING + choose + (RECORD_INPUTS if self.record else ""))
        self.nodes = [self.namespace(f"node{number}") for number in range(1, self.node_count + 1)]
        self.host.wire("link set lo up", "link add eth1 type bridge forward_delay 0 mcast_snooping 0")
        self.address(self.host, "eth1", "10.0.0.1/24", "2001:db8:2::1/64")
        self.link("eth0", self.client, (1, "192.0.2"), 10, 11)
        self.link("eth2", self.inside, (3, "198.51.100"), 10)
        self.crowd()
        for number, space in enumerate(self.nodes, 1):
            self.link(space.name, space, (2, "10.0.0"), 10 + number)
            self.address(space, "lo", *pod(number))
            self.route(*pod(number), via=(f"10.0.0.{10 + number}", f"2001:db8:2::{10 + number}"))
        servers = [self.start_server(space, space.name, self.ports, tuple(KINDS)) for space in self.nodes if self.ports]
        for server in servers:
            await_banner(server)

    def namespace(self, name: str, setup: str = "") -> Namespace:
        space = Namespace(name, QUICK + setup)
        self.stack.callback(space.close)
        return space

    def link(self, device: str, peer: Namespace, network: tuple[int, str], *numbers: int) -> None:
        """A veth pair from the host's `device` to eth0 of `peer`; made inside, it never shows on the machine."""
        third, prefix = network
        self.host.wire(f"link add {device} type veth peer name eth0 netns {peer.pid}")
        if device.startswith("eth"):
            self.address(self.host, device, f"{prefix}.1/24", f"2001:db8:{third}::1/64")
        else:
            self.host.wire(f"link set {device} master eth1 up")
        peer.wire("link set lo up")
        self.address(
            peer,
            "eth0",
            *(f"{prefix}.{number}/24" for number in numbers),
            *(f"2001:db8:{third}::{number}/64" for number in reversed(numbers)),
        )
        peer.wire(f"route add default via {prefix}.1", f"route add default via 2001:db8:{third}::1")

    def address(self, space: Namespace, device: str, *addresses: str) -> None:
        nodad = {True: " nodad", False: ""}
        space.wire(
            f"link set {device} up",
            *(f"addr add {address} dev {device}{nodad[':' in address]}" for address in addresses),
        )

    def route(self, *networks: Any, via: tuple[str, str]) -> None:
        self.host.wire(*(f"route add {network} via {via[':' in str(network)]}" for network in networks))

    def crowd(self) -> None:
        """Let the client have all addresses of CROWD and CROWD6."""
        self.client.wire(f"route add local {CROWD} dev lo", f"route add local {CROWD6} dev lo")
        self.client.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind"])
        self.route(CROWD, CROWD6, via=(CLIENT[0], CLIENT6[0]))

    def serve(
        self, namespace: Namespace, name: str, ports: Iterable[int], protocols: Sequence[str] = ("tcp", "udp")
    ) -> "subprocess.Popen[str]":
        """An echo server that is listening when this returns; `with lab.serve(...):` also ends it."""
        return await_banner(self.start_server(namespace, name, ports, protocols))

    def start_server(
        self, namespace: Namespace, name: str, ports: Iterable[int], protocols: Sequence[str]
    ) -> "subprocess.Popen[str]":
        argv = [sys.executable, "-I", str(ECHO), name, ",".join(protocols), ",".join(map(str, ports))]
        return namespace.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def connect(
        self,
        port: int,
        protocol: str = "tcp",
        to: str = HOST,
        source: str | None = None,
        sport: int = 0,
        frm: Namespace | None = None,
        timeout: float = 10,
    ) -> socket.socket:
        """A connected socket from the client, or from the namespace `frm`. Raises what connect() raises."""
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        with (frm or self.client).entered():
            sock = socket.socket(family, *KINDS[protocol])
        try:
            sock.settimeout(timeout)
            if source or sport:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source or ("::" if ":" in to else "0.0.0.0"), sport))
            sock.connect((to, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(
        self,
        port: int,
        protocol: str = "tcp",
        to: str = HOST,
        source: str | None = None,
        sport: int = 0,
        frm: Namespace | None = None,
        timeout: float = 10,
    ) -> Answer:
        """Who answers there. Raises ConnectionRefusedError or TimeoutError when nobody does."""
        if protocol == "sctp" and not has_sctp():
            return self.ask_raw_sctp(port, to, source, sport or next(SCTP_PORTS), frm or self.client, timeout)
        with self.connect(port, protocol, to, source, sport, frm, timeout) as sock:
            if protocol == "udp":
                sock.send(b"who?")
            return read_answer(sock)

    def ask_raw_sctp(
        self, port: int, to: str, source: str | None, sport: int, frm: Namespace, timeout: float
    ) -> Answer:
        """The beginning of an association with what echo.py is where the kernel has no SCTP."""
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        with frm.entered():
            sock = open_raw_sctp(family)
        with sock:
            sock.settimeout(timeout)
            if source:
                sock.bind((source, 0))
            sock.connect((to, 0))
            sock.send(Sctp(sport, port, 0, INIT, sport).packed())
            try:
                while True:
                    ack = unpacked(without_ip_header(sock.recv(65536), family))
                    if ack and (ack.sport, ack.dport, ack.tag, ack.kind) == (port, sport, sport, INIT_ACK):
                        return parse_answer(ack.cookie)
            except OSError as error:
                if error.errno in (errno.ENOPROTOOPT, errno.EPROTO):  # how a kernel without SCTP refuses it
                    raise ConnectionRefusedError(f"no SCTP port {port} at {to}") from error
                raise

    def epok(
        self,
        *args: str,
        snapshot: "dict[str, Any] | list[Any] | None" = None,
        env: dict[str, str] | None = None,
        check: bool = False,
        timeout: float = 300,
        through: Sequence[str] = (),
    ) -> "subprocess.CompletedProcess[str]":
        """Run epok on the host, in the checkout, by what is before its words; a snapshot goes in by standard input."""
        text = "" if snapshot is None else json.dumps(snapshot)
        source = [] if snapshot is None else ["--snapshot", "-"]
        argv = [*through, *PROGRAM, *source, *args]
        environ = {**bare_environment(), **(env or {})}
        return self.host.run(argv, input=text, check=check, env=environ, timeout=timeout)

    def cluster(self, *objects: dict[str, Any]) -> dict[str, Any]:
        """A snapshot of the lab's nodes with these Services (and EndpointSlices)."""
        return snapshot(*self.node_objects(), *objects)

    def node_objects(self) -> list[dict[str, Any]]:
        return [
            node(space.name, f"10.0.0.{10 + number}", f"2001:db8:2::{10 + number}")
            for number, space in enumerate(self.nodes, 1)
        ]

    def saved(self, version: int = 4, counters: bool = False) -> str:
        """What iptables-save (6: ip6tables-save) prints of nat and filter, without its dated comments."""
        save = ["iptables-save" if version == 4 else "ip6tables-save", *(["-c"] if counters else [])]
        text = "".join(self.host.run([*save, "-t", table]).stdout for table in TABLES)
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
        return text if counters else re.sub(r"(?m)^(:.*) \[\d+:\d+\]$", r"\1 [0:0]", text)

    def inputs(self) -> list[tuple[str, str]]:
        """With `record`, what iptables-restore and ip6tables-restore were given by epok: the tool and the text."""
        files = (self.host.root / "run" / "inputs").iterdir()
        return [(file.name.split(".")[0], file.read_text("latin-1")) for file in files]

    def flush(self) -> None:
        """Empty tables that accept everything, and no connection tracked: a host as new."""
        for tool in ("iptables-restore", "ip6tables-restore"):
            self.host.run([tool, "--wait", "5"], PLAIN_TABLES)
        self.host.run(["conntrack", "-F"])


def inputs_shown(printed: str) -> list[str]:
    """The inputs of iptables-restore that a dry run prints, one after the other."""
    return re.split(r"(?m)^# iptables-restore .*\n", printed)[1:]


def await_banner(server: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
    assert server.stdout
    if server.stdout.readline() != "ready\n":
        server.send_signal(signal.SIGKILL)
        raise RuntimeError(f"no echo server: {' '.join(map(str, server.args))}")  # type: ignore[arg-type]
    return server


def read_answer(sock: socket.socket) -> Answer:
    """The one line that an echo server answers with; nothing follows it before something is sent."""
    line = sock.recv(200)
    if not line:
        raise ConnectionResetError("closed without an answer")
    return parse_answer(line)


def parse_answer(line: bytes) -> Answer:
    name, _, saw, sport, _, port = line.decode().split()
    return Answer(name, saw, int(sport), int(port))
