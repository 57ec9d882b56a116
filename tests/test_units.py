"""The systemd units: what systemd-analyze says of them, and epok as systemd runs it.

The machine's own systemd, if it has one, is not asked. One runs as PID 1 of namespaces inside the lab's host, and has
no units but ours, so User=, LoadCredential=, SystemCallFilter= and all the others are real. It sees the machine's
files, to read, under a private /etc, /opt, /dev, /tmp and the lab's /run. It needs a control group of its own, the one
thing that is not in a namespace; what a killed run leaves of that, the next one removes.
"""

import base64
import datetime
import itertools
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.authority import Authority
from lab.fake_api import FakeApi, write_kubeconfig
from lab.iptables import LOCK, held_lock
from lab.machine import lacking, need, stretched, until
from lab.network import EPOK, HOST6, TABLES, Lab
from lab.objects import port, service

UNITS = EPOK.parent / "cron"
SERVICE, TIMER = UNITS / "epok.service", UNITS / "epok.timer"
SYSTEMD = Path("/lib/systemd/systemd")
FAMILIES = ("IPv4", "IPv6")
RECORD = False  # what records could not write in the sandbox
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")], families=FAMILIES)
DNS = service("dns", "53:30053", [port(53, 30053, "dns", "UDP")], families=FAMILIES)


def values(unit: Path, name: str) -> list[str]:
    return re.findall(rf"(?m)^{name}=(.*)$", unit.read_text())


# ---- what systemd-analyze says

# It leaves a file in /run. And it looks for the program of a service, while this machine may not have epok in /opt.
ANALYZE = """
mount -t tmpfs tmpfs /run
if [ ! -x "$0" ]; then
    mount -t tmpfs tmpfs /opt
    mkdir -p "$(dirname "$0")"
    ln -s /bin/true "$0"
fi
exec systemd-analyze "$@"
"""


def analyze(*args: object) -> "subprocess.CompletedProcess[str]":
    need("systemd-analyze", "apt-get install systemd")
    if os.geteuid():
        lacking("a private /run needs root: run the tests with sudo")
    program = values(SERVICE, "ExecStart")[0].split()[0]
    argv = ["unshare", "--mount", "sh", "-ec", ANALYZE, program, *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "SYSTEMD_COLORS": "0"})


def verified(*units: Path) -> str:
    """What is wrong with them."""
    done = analyze("verify", "--man=no", *units)
    return f"{done.stdout}{done.stderr}" + (f"exit status {done.returncode}" if done.returncode else "")


def test_the_units_are_clean() -> None:
    assert verified(SERVICE, TIMER) == ""


@pytest.mark.parametrize(
    ("right", "wrong"), [("ProtectHome=", "ProtectHouse="), ("oneshot", "oneshoot"), (".venv/", "venv/")]
)
def test_a_unit_that_is_not_clean_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    copy = tmp_path / SERVICE.name
    copy.write_text(SERVICE.read_text().replace(right, wrong))
    assert verified(copy)


def exposure(unit: Path) -> "subprocess.CompletedProcess[str]":
    return analyze("security", "--offline=true", "--threshold=20", unit)


def test_the_service_is_exposed_by_2_of_10_at_most() -> None:
    done = exposure(SERVICE)
    assert done.returncode == 0, done.stdout


def test_a_service_without_a_sandbox_is_exposed_by_more(tmp_path: Path) -> None:
    bare = tmp_path / SERVICE.name
    sandbox = "Protect|Private|Restrict|SystemCall|Capability|DynamicUser|User|NoNew|Lock|Memory"
    bare.write_text(re.sub(rf"(?m)^(?:{sandbox}).*\n", "", SERVICE.read_text()))
    done = exposure(bare)
    assert done.returncode == 1 and "Overall exposure level" in done.stdout


def test_the_timer_elapses_every_minute() -> None:
    [calendar] = values(TIMER, "OnCalendar")
    done = analyze("calendar", "--iterations=4", "--base-time=2026-12-31 23:57:30 UTC", calendar)
    times = [
        datetime.datetime.fromisoformat(text) for text in re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", done.stdout)
    ]
    steps = {(after - before).total_seconds() for before, after in itertools.pairwise(sorted(set(times)))}
    assert steps == {60.0}, done.stdout


@pytest.mark.parametrize(("name", "most"), [("OnBootSec", 30), ("AccuracySec", 1)])
def test_the_timer_is_soon_and_exact(name: str, most: int) -> None:
    [span] = values(TIMER, name)
    microseconds = re.search(r"[μu]s: (\d+)", analyze("timespan", span).stdout)
    assert microseconds and 0 < int(microseconds[1]) <= most * 1_000_000


def test_a_run_that_hangs_is_over_before_the_next_but_not_before_epok_gives_up() -> None:
    [seconds] = values(SERVICE, "TimeoutStartSec")
    assert 50 < int(seconds) < 60


# ---- epok as systemd runs it

# In a control group of its own, then in a namespace where that is the root of all groups. A tmpfs lies between, for a
# file system cannot be mounted on itself, and some machines have this one there.
JOIN = """
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$GROUP"
echo 0 >"/sys/fs/cgroup/$GROUP/cgroup.procs"
echo $$ >/run/unshare.pid
exec unshare --cgroup --pid --fork --kill-child --mount-proc --uts --ipc sh -ec "$BOOT"
"""
# / is shared because LoadCredential= works by propagation. epok and its Python are bound to where the unit looks for
# them, for the checkout and Python may be in a home directory. All else of the machine is to read.
BOOT = """
mount --make-rshared /
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
rm -rf /run/etc && cp -a /etc /run/etc
mount --bind /run/etc /etc
mkdir -p /etc/epok /run/opt/python /run/opt/epok/.venv/bin /run/opt/epok/.venv/lib
mount --bind "$BASE" /run/opt/python
mount --bind "$VENV/lib" /run/opt/epok/.venv/lib
cp "$EPOK" /run/opt/epok/epok.py
echo "home = /opt/python/bin" >/run/opt/epok/.venv/pyvenv.cfg
ln -sf "/opt/python/bin/$PYTHON" /run/opt/epok/.venv/bin/python
mount --rbind /run/opt /opt
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
mkdir -p /run/dev
mount -t tmpfs -o mode=755 tmpfs /run/dev
mkdir /run/dev/shm /run/dev/pts
ln -s pts/ptmx /run/dev/ptmx
for device in null zero full random urandom tty console; do touch /run/dev/$device; done
for device in null zero full random urandom tty; do mount --bind /dev/$device /run/dev/$device; done
mount --bind /dev/null /run/dev/console
mount --rbind /run/dev /dev
mount --bind /proc/sys /proc/sys
for place in / /sys /proc/sys; do mount -o remount,bind,ro $place; done
exec env -i container=lab SYSTEMD_UNIT_PATH=/run/units SYSTEMD_GENERATOR_PATH=/run/none \
    /lib/systemd/systemd --system --show-status=no --log-target=null
"""
SYSTEMCTL = """
unshare=/proc/$(cat /run/unshare.pid)/ns
exec nsenter --mount="$unshare/mnt" --pid="$unshare/pid_for_children" systemctl "$@"
"""
REMOVE_GROUPS = """
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for group in /sys/fs/cgroup/epok-test-*; do
    if grep -q "^populated 0" "$group/cgroup.events" 2>/dev/null; then find "$group" -depth -type d -exec rmdir {} +; fi
done
test ! -e "/sys/fs/cgroup/$GROUP"
"""
# What systemd wants of any system; the rest of it would be a whole boot.
TARGETS = ("sysinit", "basic", "shutdown", "network-online", "timers", "default")
# Only that tests may start it often, where its log goes, and where a Python bound to /opt/python finds its library.
DROP_IN = """[Unit]
StartLimitIntervalSec=0
[Service]
StandardError=append:/run/epok.log
Environment=LD_LIBRARY_PATH=/opt/python/lib
"""


class Run(NamedTuple):
    """How a start of the service ended: success, exit-code, timeout and so on; epok's exit status, and its log."""

    result: str
    status: int
    log: str


class Machine:
    """A host that systemd has booted, with epok's units in it."""

    def __init__(self, lab: Lab, group: str) -> None:
        self.lab = lab
        target = "[Unit]\nDescription={0}\nDefaultDependencies=no\n"
        for name in TARGETS:
            self.write(f"/run/units/{name}.target", target.format(name))
        for unit in (SERVICE, TIMER):
            self.write(f"/run/units/{unit.name}", unit.read_text())
        environment = {
            **os.environ,
            "BOOT": BOOT,
            "GROUP": group,
            "BASE": sys.base_prefix,
            "PYTHON": f"python{sys.version_info[0]}.{sys.version_info[1]}",
            "VENV": sys.prefix,
            "EPOK": str(EPOK),
        }
        join = ["unshare", "--mount", "sh", "-ec", JOIN]
        self.systemd = lab.host.popen(join, env=environment, stdin=subprocess.DEVNULL)
        until(self.is_up, "systemd has booted in a namespace")

    def is_up(self) -> bool:
        if self.systemd.poll() is not None:
            lacking("systemd cannot be booted in a namespace here; why is in the output above")
        return self.systemctl("is-active", "default.target").stdout == "active\n"

    def systemctl(self, *args: str) -> "subprocess.CompletedProcess[str]":
        """In there: systemd answers nobody whose process id it cannot see."""
        return self.lab.host.run(["sh", "-c", SYSTEMCTL, "systemctl", *args], check=False)

    def write(self, path: str, text: str, mode: str = "644") -> None:
        script = 'mkdir -p "$(dirname "$0")"; rm -f "$0"; cat >"$0"; chmod "$1" "$0"'
        self.lab.host.run(["sh", "-ec", script, path, mode], text)

    def edit(self, *lines: str) -> None:
        """Lines for the service, as `systemctl edit` adds them."""
        self.write("/run/units/epok.service.d/override.conf", DROP_IN + "\n".join(lines) + "\n")
        assert self.systemctl("daemon-reload").returncode == 0

    def configure(self, **settings: str) -> None:
        self.write("/run/etc/epok/epok.env", "".join(f"{name}={value}\n" for name, value in settings.items()))

    def start(self) -> Run:
        self.write("/run/epok.log", "")
        self.systemctl("start", "epok.service")
        result, status = self.state("Result"), int(self.state("ExecMainStatus"))
        return Run(result, status, self.log())

    def state(self, name: str, unit: str = "epok.service") -> str:
        return self.systemctl("show", "--value", f"--property={name}", unit).stdout.strip()

    def log(self) -> str:
        return self.lab.host.run(["cat", "/run/epok.log"]).stdout


@pytest.fixture(scope="module")
def booted(lab: Lab) -> Iterator[Machine]:
    if not SYSTEMD.exists():
        lacking(f"{SYSTEMD} is missing: apt-get install systemd")
    need("systemctl", "apt-get install systemd")
    group = f"epok-test-{lab.backend}-{os.getpid()}"
    remove_groups(group)
    machine = Machine(lab, group)
    try:
        yield machine
    finally:
        machine.systemd.kill()
        machine.systemd.wait()
        until(lambda: remove_groups(group), "systemd and its control group are gone")


def remove_groups(group: str) -> bool:
    """Removes those of this run and of killed ones that have no process; whether `group` is gone."""
    argv = ["unshare", "--mount", "sh", "-c", REMOVE_GROUPS]
    return subprocess.run(argv, env={**os.environ, "GROUP": group}).returncode == 0


@pytest.fixture(scope="module")
def api(booted: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeApi]:
    """On the host itself, as k3s is, with a kubeconfig where k3s has it, which only root may read."""
    folder = tmp_path_factory.mktemp("api")
    authority = Authority()
    (folder / "server").write_bytes(authority.issue("server", "127.0.0.1"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server")
    with FakeApi(booted.lab.host, tls=context) as made:
        trusted = {"certificate-authority-data": base64.b64encode(authority.pem).decode()}
        kubeconfig = write_kubeconfig(folder / "config", made.url, cluster=trusted)
        booted.write("/run/etc/rancher/k3s/k3s.yaml", Path(kubeconfig).read_text(), "600")
        yield made


@pytest.fixture
def machine(booted: Machine, api: FakeApi, flushed: None) -> Machine:
    """Set up as the README says, with a link to the cluster's own kubeconfig."""
    api.objects = booted.lab.cluster(MAIL, DNS)["items"]
    booted.lab.host.run(["ln", "-sfn", "/etc/rancher/k3s/k3s.yaml", "/run/etc/epok/kubeconfig"])
    booted.configure(EPOK_INTERFACES="eth0", EPOK_LOG_LEVEL="debug")
    booted.edit()
    return booted


only_legacy = pytest.mark.parametrize("lab", ["legacy"], indirect=True)  # nft has no lock
only_nft = pytest.mark.parametrize("lab", ["nft"], indirect=True)  # the timer knows no backend
CLEAN = ("ExecStart=", f"ExecStart={values(SERVICE, 'ExecStart')[0]} --clean")


def problems(log: str) -> list[str]:
    """Warnings and errors. The fake API has no Events, and says so."""
    lines = [line for line in log.splitlines() if not line.startswith(("debug:", "info:"))]
    return [line for line in lines if "patch events" not in line]


def test_the_service_makes_the_host_right_and_then_leaves_it_alone(machine: Machine) -> None:
    lab, first = machine.lab, machine.start()
    assert first[:2] == ("success", 0), first.log
    assert "now forwarding tcp/25 to default/mail:smtp (NodePort 2025) on 3 nodes\n" in first.log
    assert problems(first.log) == []
    assert (lab.ask(25).port, lab.ask(25, to=HOST6).port, lab.ask(53, "udp").port) == (2025, 2025, 30053)
    rules, second = lab.saved(), machine.start()
    assert second[:2] == ("success", 0) and re.search(r"in sync, .*, nothing changed\n", second.log)
    assert lab.saved() == rules


def test_udp_flows_are_ended_in_the_sandbox(machine: Machine, api: FakeApi) -> None:
    machine.start()
    api.objects = machine.lab.cluster(service("dns", "53:30000", [port(53, 30000, "dns", "UDP")]))["items"]
    assert machine.lab.ask(53, "udp", sport=5353).port == 30053
    log = machine.start().log
    assert "conntrack -D -p udp --orig-dst 192.0.2.1 --orig-port-dst 53 " in log and problems(log) == []
    assert machine.lab.ask(53, "udp", sport=5353).port == 30000


def test_clean_works_in_the_sandbox(machine: Machine) -> None:
    before = machine.lab.saved()
    machine.start()
    assert "EPOK" in machine.lab.saved()
    machine.edit(*CLEAN)
    assert machine.start()[:2] == ("success", 0)
    assert machine.lab.saved() == before
    with pytest.raises(ConnectionRefusedError):
        machine.lab.ask(25)


CHAIN = "nft -j list chain inet mine wall"


@pytest.mark.parametrize("what", ["--status", "--explain default/mail"])
def test_all_that_matters_is_seen_in_the_sandbox(machine: Machine, what: str) -> None:
    machine.start()
    machine.lab.ask(25)
    # a table of somebody else's, which is read chain by chain
    wall = "{ type filter hook forward priority 10; }"
    machine.lab.host.run(["nft", f"add table inet mine; add chain inet mine wall {wall}"])
    machine.edit(CLEAN[0], CLEAN[1].replace("--clean", what), "StandardOutput=append:/run/epok.log")
    try:
        run = machine.start()
    finally:
        machine.lab.host.run(["nft", "delete table inet mine"])
    assert run[:2] == ("success", 0), run.log
    commands = ("iptables-save -c -t nat", "ip netconf", "ip route get 10.0.0.11", "ss -Hltun", CHAIN)
    assert [name for name in commands if f"{name}: exit status 0\n" not in run.log] == [], run.log
    shown = [line for line in run.log.splitlines() if not line.startswith("debug:")]
    bad = [line.strip() for line in shown if "does not tell" in line or "FAILED" in line]
    # legacy's other tables are root's to list
    listing = "iptables-save: Failed to list table names in /proc/net/ip_tables_names: Permission denied; root may"
    blind = [f"maybe   this host does not tell all that matters: {listing}"]
    assert bad == (blind if machine.lab.backend == "legacy" else []), run.log
    if "--status" in what:
        assert [line.split()[-2] for line in shown if line.startswith("tcp/25 ")] == ["1", "0"], run.log
    else:
        assert sum("port 2025 answers" in line for line in shown) == 6, run.log


# As the unit says: a directory that a group may write, for the user may be another one after the next boot.
METRICS = "/run/metrics/epok.prom"
MAY_WRITE = ("ReadWritePaths=/run/metrics", "SupplementaryGroups=users")


def test_metrics_are_written_where_a_drop_in_allows_it(machine: Machine) -> None:
    machine.configure(EPOK_INTERFACES="eth0", EPOK_METRICS_FILE=METRICS)
    machine.lab.host.run(["sh", "-ec", "rm -rf /run/metrics; mkdir -m 775 /run/metrics; chgrp users /run/metrics"])
    first = machine.start()
    assert first[:2] == ("success", 0)
    [warning] = problems(first.log)
    assert warning.startswith(f"warning: --metrics-file {METRICS}: ") and "nothing else depends on it" in warning
    machine.edit(*MAY_WRITE)
    assert problems(machine.start().log) == []
    machine.lab.ask(25)
    machine.lab.host.run(["chown", "61000", METRICS])  # as if it were of the last boot
    assert problems(machine.start().log) == []
    text = machine.lab.host.run(["setpriv", "--reuid", "65534", "--clear-groups", "cat", METRICS]).stdout
    assert re.search(r'^epok_connections_total\{host="this host",ip_version="4",.*port="25".*\} 1$', text, re.M), text
    assert machine.lab.host.run(["ls", "/run/metrics"]).stdout == "epok.prom\n"


@pytest.mark.parametrize("missing", ["CAP_NET_ADMIN", "CAP_NET_ADMIN CAP_NET_RAW"])
def test_without_its_capabilities_it_is_one_line_and_no_rule(machine: Machine, missing: str) -> None:
    machine.edit(f"AmbientCapabilities=~{missing}", f"CapabilityBoundingSet=~{missing}")
    before, run = machine.lab.saved(), machine.start()
    assert run[:2] == ("exit-code", 1)
    [error] = [line for line in problems(run.log) if not line.startswith("warning:")]
    assert error.startswith("error: this host: ") and "sudo" in error
    assert machine.lab.saved() == before


@only_legacy
def test_legacy_needs_the_raw_socket(machine: Machine) -> None:
    machine.edit("AmbientCapabilities=~CAP_NET_RAW", "CapabilityBoundingSet=~CAP_NET_RAW")
    run = machine.start()
    [error] = problems(run.log)
    assert run[:2] == ("exit-code", 1) and error.startswith("error: this host: iptables-save ")


def test_iptables_has_run_as_root_before_and_loaded_what_it_needs(machine: Machine) -> None:
    """Not that modprobe works: this kernel may have everything built in."""
    lines = [
        line.replace("sh -c", "sh -xec").replace("2>&1", "2>/run/trace") for line in values(SERVICE, "ExecStartPre")
    ]
    machine.edit("ExecStartPre=", *(f"ExecStartPre={line}" for line in lines))
    assert machine.start()[:2] == ("success", 0)
    trace = machine.lab.host.run(["cat", "/run/trace"]).stdout
    commands = [f"+ {tool}-save -t {table}" for tool in ("iptables", "ip6tables") for table in TABLES]
    assert [line for line in trace.splitlines() if "tables" in line] == commands


def test_a_kubeconfig_that_is_missing_fails_before_epok_runs(machine: Machine) -> None:
    machine.lab.host.run(["rm", "/run/etc/epok/kubeconfig"])
    run = machine.start()
    assert run.result != "success" and run.log == ""


# It says what epok may do, as epok would find it.
PROBE = """
import json, os, socket, sys

def tried(action, *args, **kw):
    try:
        action(*args, **kw)
        return "done"
    except OSError as error:
        return os.strerror(error.errno)

def written(folder):
    return tried(open, os.path.join(folder, "probe"), "x")

status = dict(line.rstrip().split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
kubeconfig = os.environ["KUBECONFIG"]
print(json.dumps({
    "uid": os.getuid(), "groups": os.getgroups(), "gid": os.getgid(),
    **{name: int(status[name], 16) for name in ("CapEff", "CapAmb", "CapBnd")},
    "NoNewPrivs": status["NoNewPrivs"], "Seccomp": status["Seccomp"],
    "kubeconfig": [oct(os.stat(kubeconfig).st_mode), os.stat(kubeconfig).st_uid, kubeconfig],
    "write": {folder: written(folder) for folder in ("/run/open", "/opt/epok", "/etc")},
    "temporary": [os.listdir("/tmp"), written("/tmp")],
    "read": {path: tried(open, path) for path in ("/etc/shadow", "/etc/rancher/k3s/k3s.yaml", "/run/xtables.lock")},
    "home": tried(os.listdir, "/root"),
    "others": sorted(name for name in os.listdir("/proc") if name.isdigit() and int(name) == 1),
    "sysctl": tried(open, "/proc/sys/net/ipv4/ip_forward", "r+"),
    "packet": tried(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
    "chown": tried(os.chown, "/tmp/probe", os.getuid(), os.getgid()),
    "nice": tried(os.setpriority, os.PRIO_PROCESS, 0, 5),
}), file=sys.stderr)
"""


def test_the_sandbox_is_real(machine: Machine) -> None:
    """So that the others prove something: what the unit forbids is forbidden in here."""
    machine.write("/run/probe.py", PROBE)
    machine.lab.host.run(["mkdir", "-p", "-m", "777", "/run/open"])
    python = values(SERVICE, "ExecStart")[0].split()[0]
    machine.edit("ExecStart=", f"ExecStart={python} -I /run/probe.py")
    run = machine.start()
    assert run.result == "success", run.log
    said: dict[str, Any] = json.loads(run.log)
    assert 61184 <= said["uid"] <= 65519 and said["groups"] in ([], [said["gid"]])
    assert said["CapEff"] == said["CapAmb"] == said["CapBnd"] == 1 << 12 | 1 << 13
    assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
    mode, owner, path = said["kubeconfig"]
    assert path == "/run/credentials/epok.service/kubeconfig"
    # with newer ones it is root's, and has an access list for the user, whose mask stands where the group's mode does
    assert (mode, owner) in (("0o100400", said["uid"]), ("0o100440", 0))
    assert said["write"]["/run/open"] == "Read-only file system" and "done" not in said["write"].values()
    assert said["temporary"] == [[], "done"]
    denied = "Permission denied"
    assert said["read"] == {"/etc/shadow": denied, "/etc/rancher/k3s/k3s.yaml": denied, LOCK: "done"}
    assert (said["home"], said["others"], said["sysctl"]) == (denied, [], "Read-only file system")
    assert said["packet"] == "Address family not supported by protocol"
    assert (said["chown"], said["nice"]) == ("Operation not permitted", "Operation not permitted")


# ---- legacy's lock


def lock_state(lab: Lab) -> list[str]:
    return lab.host.run(["stat", "--format", "%i %U %G %a", LOCK]).stdout.split()


def test_a_host_as_booted_has_no_lock_yet_and_gets_one_that_is_closed(machine: Machine) -> None:
    machine.lab.host.run(["rm", "-f", LOCK])
    assert machine.start()[:2] == ("success", 0)
    assert machine.lab.ask(25)
    assert lock_state(machine.lab)[1:] == ["root", "root", "640"]


def test_the_lock_stays_the_one_that_all_use_and_closed_to_others(machine: Machine) -> None:
    machine.lab.host.run(["sh", "-c", f"umask 077; echo kept >>{LOCK}"])
    before = lock_state(machine.lab)
    machine.start()
    assert lock_state(machine.lab)[0] == before[0]
    assert machine.lab.host.run(["tail", "-n", "1", LOCK]).stdout == "kept\n"
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    refused = machine.lab.host.run([*nobody, "flock", LOCK, "true"], check=False)
    assert refused.returncode and "Permission denied" in refused.stderr


@only_legacy
def test_legacy_needs_the_lines_that_open_the_lock(machine: Machine) -> None:
    machine.lab.host.run(["chmod", "600", LOCK])
    machine.edit("ExecStartPre=")
    run = machine.start()
    assert run[:2] == ("exit-code", 1) and LOCK in run.log
    with pytest.raises(ConnectionRefusedError):
        machine.lab.ask(25)


@only_nft
def test_nft_needs_none_of_them(machine: Machine) -> None:
    machine.lab.host.run(["rm", "-f", LOCK])
    machine.edit("ExecStartPre=", "ExecStopPost=")
    assert machine.start()[:2] == ("success", 0)
    assert machine.lab.host.run(["test", "-e", LOCK], check=False).returncode


@only_legacy
def test_a_lock_that_another_holds_for_a_while_is_waited_for(machine: Machine) -> None:
    with held_lock(machine.lab.host, 2):
        before = datetime.datetime.now()
        assert machine.start()[:2] == ("success", 0)
        assert datetime.datetime.now() - before > datetime.timedelta(seconds=1)
    assert machine.lab.ask(25)


@only_legacy
def test_a_lock_that_another_never_gives_back_is_not_ignored(machine: Machine) -> None:
    machine.configure(EPOK_INTERFACES="eth0", EPOK_TIMEOUT=str(stretched(3)))
    before = machine.lab.saved()
    with held_lock(machine.lab.host, 1000):
        run = machine.start()
    assert run[:2] == ("exit-code", 1)
    assert run.log.count("error:") == 1 and "iptables-restore" in run.log
    assert machine.lab.saved() == before


# ---- the timer

DATE = "%Y-%m-%d %H:%M:%S %Z"


@only_nft
def test_the_timer_runs_epok_soon_after_boot_and_then_each_minute(machine: Machine) -> None:
    machine.write("/run/epok.log", "")
    assert machine.systemctl("start", "epok.timer").returncode == 0
    try:
        until(lambda: "now forwarding tcp/25" in machine.log(), "the timer has run epok")
        assert machine.lab.ask(25)
        until(lambda: machine.state("ActiveState") == "inactive", "epok is done")
        next_run = datetime.datetime.strptime(machine.state("NextElapseUSecRealtime", "epok.timer")[4:], DATE)
        assert abs(next_run - datetime.datetime.now()) <= datetime.timedelta(minutes=1) and next_run.second == 0
    finally:
        machine.systemctl("stop", "epok.timer")
