"""The lab's host as its administrator has it: the distribution's own sshd, PAM, sudo and syslog's socket.

What is written to /etc, /var/lib, /usr/local and /dev stays in the namespace: they are overlays.

    gateway = Gateway(lab.host)
    secret = gateway.setup_host()
    key = gateway.key_of(secret)
"""

import contextlib
import importlib.machinery
import importlib.util
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from lab import EPOK, HOST, Namespace

CRON = EPOK.parent / "cron"
# /dev as links, so that a socket made there is not one of the machine's.
PRIVATE = """
for place in etc home opt var/lib usr/local; do
    mkdir -p /run/gateway/$place/upper /run/gateway/$place/work
    options=lowerdir=/$place,upperdir=/run/gateway/$place/upper,workdir=/run/gateway/$place/work
    mount -t overlay -o $options overlay /$place
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
PLACES = ("/etc", "/home", "/opt", "/var/lib", "/usr/local")


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
    deleted = {f"-A{line[2:]}" for line in text.split("\n") if line.startswith("-D ")}
    low, high = (
        re.search(rf"-A {chain} -m connmark --mark (\w+)/", text) for chain in ("EPOK-FORWARD", "EPOK-POSTROUTING")
    )
    either = re.search(r"--set-xmark \w+/(\w+)", text)
    # an input that changes neither of them says only half of the mark, or nothing
    mark = int(either[1], 16) if either else (int(low[1], 16) if low else 1) | (int(high[1], 16) if high else 1 << 31)
    gate.check(text, version, mark, lambda table: deleted)


class Gateway:
    """Until its namespace ends."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        self.root = Path(f"/proc/{space.pid}/root")
        space.run(["sh", "-ec", PRIVATE])
        self.lines: list[str] = []
        self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syslog.bind(str(self.root / "dev/log"))
        (self.root / "dev/log").chmod(0o666)
        threading.Thread(target=self.listen, daemon=True).start()
        space.popen(["/usr/sbin/sshd", "-D", "-o", "MaxStartups=100", *no_penalties()])
        self.await_banner()

    def listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.lines.append(self.syslog.recv(65536).decode("utf-8", "replace"))

    def logged(self, program: str) -> list[str]:
        """What a program told syslog."""
        return [line for line in self.lines if f" {program}[" in line or f" {program}: " in line]

    def await_banner(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(ConnectionRefusedError), self.space.entered():
                with socket.create_connection((HOST, 22), 10) as sock:
                    assert sock.recv(4) == b"SSH-"
                return
            assert time.monotonic() < deadline, "no sshd"
            time.sleep(0.01)

    def setup_host(self, *args: str, check: bool = True, env: dict[str, str] | None = None) -> Any:
        """Runs cron/setup-host as root; the process that is done."""
        argv = [
            "env",
            "-i",
            "PATH=/usr/bin:/bin",
            *(f"{k}={v}" for k, v in (env or {}).items()),
            str(CRON / "setup-host"),
            *args,
        ]
        return self.space.run(argv, check=check)

    def state(self) -> dict[str, tuple[int, bytes]]:
        """Mode and content of every file that is not as on the machine."""
        upper = self.root / "run/gateway"
        files = [path for place in PLACES for path in (upper / place.strip("/") / "upper").rglob("*")]
        return {
            str(path.relative_to(upper)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in files
        }


def no_penalties() -> list[str]:
    """Newer servers shut out for a while who failed to log in; the tests do so all the time."""
    says = subprocess.run(["sshd", "-T", "-o", "PerSourcePenalties=no"], capture_output=True, text=True)
    return [] if "PerSourcePenalties" in says.stderr else ["-o", "PerSourcePenalties=no"]


def secret_data(text: str) -> dict[str, str]:
    """The data of the Secret that setup-host prints."""
    made = yaml.safe_load(text)
    assert made["kind"] == "Secret" and made["metadata"] == {"name": "epok-ssh"}
    data: dict[str, str] = made["stringData"]
    return data
