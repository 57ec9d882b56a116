"""The lab's host as its administrator has it: the distribution's own sshd, PAM, sudo and syslog's socket.

What is written to PLACES and /dev stays in the namespace.

    gateway = Gateway(lab.host)
    key = secret_data(gateway.setup_host().stdout)["id_rsa"]
"""

import contextlib
import importlib.machinery
import importlib.util
import re
import socket
import subprocess
import threading
from types import ModuleType
from typing import Any

import yaml

from lab.manifests import CRON
from lab.network import Namespace
from lab.sshd import await_banner, penalties

PLACES = ("/etc", "/home", "/opt", "/var/lib", "/usr/local")  # overlays
# /dev as links, so that a socket made there is not one of the machine's.
PRIVATE = """
for place; do
    mkdir -p /run/gateway$place/upper /run/gateway$place/work
    options=lowerdir=$place,upperdir=/run/gateway$place/upper,workdir=/run/gateway$place/work
    mount -t overlay -o $options overlay $place
done
mount --bind /run/alternatives /etc/alternatives
mkdir /run/dev
mount --rbind /dev /run/dev
mount -t tmpfs -o mode=755 tmpfs /dev
ln -s /run/dev/* /dev/
rm -f /dev/log /etc/nologin
echo "127.0.0.1 $(cat /proc/sys/kernel/hostname)" >>/etc/hosts
ssh-keygen -A
"""
# A rule of the older epok in Rust, as it made them.
OLDER_RULE = (
    "-A PREROUTING -i eth0 -p tcp -m tcp --dport 25 -m state --state NEW -m comment --comment "
    '"service: default/mail; node: node1; epok_rule_id: 8d1f; epok_service_id: 71aa" '
    "-j DNAT --to-destination 10.0.0.11:2025\n"
)
Done = subprocess.CompletedProcess[str]


def load_gate() -> ModuleType:
    """cron/epok-gate, which has no .py in its name."""
    loader = importlib.machinery.SourceFileLoader("epok_gate", str(CRON / "epok-gate"))
    spec = importlib.util.spec_from_loader("epok_gate", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


gate = load_gate()


def must_pass(text: str, version: int = 4) -> None:
    """An input that epok made for itself: the gate lets it through. Rules to delete are taken to be on the host."""
    lines = text.encode("utf-8", "surrogateescape").decode("latin-1").split("\n")  # as the gate reads them
    deleted = {f"-A{line[2:]}" for line in lines if line.startswith("-D ")}
    low, high = (
        re.search(rf"-A {chain} -m connmark --mark (\w+)/", text) for chain in ("EPOK-FORWARD", "EPOK-POSTROUTING")
    )
    either = re.search(r"--set-xmark \w+/(\w+)", text)
    # an input that changes neither of them says only half of the mark, or nothing
    mark = int(either[1], 16) if either else (int(low[1], 16) if low else 1) | (int(high[1], 16) if high else 1 << 31)
    saved = gate.Saved()
    saved.others = deleted
    # chains that epok would not make are on the host, and nothing is added to them
    saved.chains |= {line[1:-8]: [0, {}, 0] for line in lines if line.startswith(":") and "-A" not in line}
    check(text, version, mark, saved)


def check(text: str, version: int, mark: int, saved: Any) -> None:
    """Raises gate.Refused. On the host is what was `saved`, but none of what the input brings."""
    nat = gate.Chains()
    gate.Input(text.encode("utf-8", "surrogateescape"), version, mark, lambda table: saved, nat)
    if excess := gate.grown((0, 0, 0, 0), nat.sizes()):
        raise gate.Refused(excess)


class Gateway:
    """Until its namespace ends."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.root = space.root
        space.run(["sh", "-ec", PRIVATE, "sh", *PLACES])
        self.lines: list[str] = []
        self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syslog.bind(str(self.root / "dev/log"))
        (self.root / "dev/log").chmod(0o666)
        threading.Thread(target=self.listen, daemon=True).start()
        self.start_sshd()

    def start_sshd(self) -> None:
        options = ["MaxStartups 100", *penalties().splitlines()]
        self.space.popen(["/usr/sbin/sshd", "-D", *(word for option in options for word in ("-o", option))])
        await_banner(self.space, 22)

    def restart_sshd(self) -> None:
        """As systemd does it: who is logged in stays so."""
        gone = "while ss -Hltn 'sport = :22' | grep -q .; do sleep 0.1; done"
        self.space.run(["sh", "-ec", f"pkill -f '^sshd: .*[[]listener]'; {gone}"])
        self.start_sshd()

    def logins(self) -> set[str]:
        """The addresses from which somebody has a connection to sshd."""
        found = self.space.run(["ss", "-Htn", "state", "established", "sport = :22"]).stdout
        return {line.split()[-1].rpartition(":")[0].strip("[]").removeprefix("::ffff:") for line in found.splitlines()}

    def listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.lines.append(self.syslog.recv(65536).decode("utf-8", "replace"))

    def logged(self, program: str) -> list[str]:
        """What a program told syslog."""
        return [line for line in self.lines if f" {program}[" in line or f" {program}: " in line]

    def setup_host(self, *args: str, check: bool = True, env: dict[str, str] | None = None) -> Done:
        """Runs cron/setup-host as root; the process that is done."""
        clean = {"PATH": "/usr/bin:/bin", **(env or {})}
        return self.space.run([str(CRON / "setup-host"), *args], check=check, env=clean)

    def state(self) -> dict[str, tuple[int, bytes]]:
        """Mode and content of every file that is not as on the machine."""
        upper = self.root / "run/gateway"
        files = [path for place in PLACES for path in (upper / place.strip("/") / "upper").rglob("*")]
        return {
            str(path.relative_to(upper)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in files
        }


def secret_data(text: str) -> dict[str, str]:
    """The data of the Secret that setup-host prints."""
    made = yaml.safe_load(text)
    assert made["kind"] == "Secret" and made["metadata"] == {"name": "epok-ssh"}
    data: dict[str, str] = made["stringData"]
    return data
