"""epok and iptables-restore killed at random moments of swaps, and SSH connections cut at random bytes.

The forwards of before and of after have no answer in common, so that each answer tells which ones it met. Moments
are drawn anew in each run; EPOK_TEST_SEED, which a failure names, draws the same ones again.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Tally, often
from lab.authority import Authority
from lab.fake_api import TOKEN, FakeApi, write_kubeconfig
from lab.gateway import Gateway, secret_data
from lab.iptables import tables_in
from lab.load import Load
from lab.machine import BACKENDS, need, stretched, until
from lab.network import EPOK, HOST, PROGRAM, Lab, Namespace, bare_environment
from lab.objects import port, service, snapshot
from lab.relay import Relay
from lab.sshd import USER, Sshd, make_key
from test_ssh import SUDOERS
from test_stages import rules
from test_traffic import nodes_without, refused

pytestmark = pytest.mark.proof
once = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)
RECORD = False  # a wrapper around iptables-restore would read its input to the end
SEED = int(os.environ.get("EPOK_TEST_SEED") or random.randrange(1 << 32))
FORWARDS, SHIFT, FIRST = 64, 6, 10000
LOCKS = ("run/xtables.lock", "run/epok-gate/swap")  # legacy's, and the gate's
RESTORE_SECONDS = 0.03  # what one takes at most; of legacy a tenth, so that most moments come early
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TOLD = EPOK.read_text().partition("\nimport atexit\n")[0].count("\n") + 1  # a line of epok.py
STAGES = ((), (), ("--batch-size", "9000"), ("--batch-size", "2500"))
ONE_A_CHAIN = ("--batch-commands", "false")  # which takes seconds
# Directories of the machine become the host's own, except for the checkout, wherever that is.
PRIVATE = """
mkdir /run/checkout /run/home /run/temporary
mount --bind "$1" /run/checkout
for place in /tmp /var/tmp /dev/shm; do mount -t tmpfs -o mode=1777 tmpfs $place; done
[ -d "$1" ] || { mkdir -p "$1"; mount --bind /run/checkout "$1"; }
umount /run/checkout
"""
# What a gateway.py's host has in /home and so on is in /run too, with the inputs that the gate keeps; the checkout is
# not the host's.
KEPT = ("/run/dev", "/run/epok-gate", "*/epok-gate/*.gz", EPOK.parent)
PASSED_OVER = " -o ".join(f"-path {path} -prune" for path in KEPT)
LEFT = f"find /tmp /var/tmp /dev/shm/ /run {PASSED_OVER} -o -print"


class Set(NamedTuple):
    """A cluster, the host's ports, and who answers there on which NodePort."""

    cluster: str  # a file
    ports: set[int]
    node_port: int
    nodes: set[str]


class Host:
    """The lab's host, which two sets of forwards take turns on, and what is on it when nothing runs.

    `seconds` is how long the last run took that nothing happened to.
    """

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        lab.host.run(["sh", "-ec", PRIVATE, "sh", str(EPOK.parent)])
        one = self.made("one", range(FORWARDS), 30080, without="node3")
        other = self.made("other", range(SHIFT, FORWARDS + SHIFT), 30443, without="node1")
        self.sets = (one, other)
        self.whole, self.met = {}, {}
        for each in (one, other, one):
            self.swap(each)
            self.whole[each.node_port], self.met[each.node_port] = rules(lab), reachable(lab)
        self.files, self.processes = self.all_files(), self.all_processes()

    def made(self, name: str, numbers: range, node_port: int, without: str) -> Set:
        ports = {FIRST + number for number in numbers}
        services = [service(f"web{number}", f"{number}:{node_port}", [port(80, node_port)]) for number in ports]
        cluster = self.folder / name
        nodes = {space.name for space in self.lab.nodes} - {without}
        cluster.write_text(json.dumps(snapshot(*nodes_without(self.lab, without), *services)))
        return Set(str(cluster), ports, node_port, nodes)

    @property
    def next(self) -> Set:
        return next(each for each in self.sets if each is not self.now)

    def start(self, to: Set, *options: str) -> "Run":
        argv = ["--snapshot", "-", "-i", "eth0", "--timeout", "60", *options, "local"]
        return Run(self.lab.host, argv, {"HOME": "/run/home"}, to.cluster)

    def swap(self, to: Set) -> str:
        """A run that nothing happens to; what it logs."""
        began = time.monotonic()
        run = self.start(to)
        assert run.end() == 0, run.log
        self.seconds, self.now = time.monotonic() - began, to
        return run.log

    def all_files(self) -> set[str]:
        return set(self.lab.host.run(LEFT.split(" ")).stdout.splitlines())

    def all_processes(self) -> set[int]:
        return {process.pid for process in self.lab.host.processes()}

    def ends(self) -> None:
        """Waits until no process of a run is left. What has its whole input may be at its end for a while."""
        until(lambda: self.all_processes() <= self.processes, "all processes of a run end", 30)

    def is_quiet(self) -> None:
        """Nothing of a run is left: no process, no file, no lock."""
        self.ends()
        assert self.all_files() <= self.files, self.all_files() - self.files
        for name in LOCKS:
            with contextlib.suppress(FileNotFoundError), (self.lab.host.root / name).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_whole(self) -> Set:
        """Which set is there, by its rules and by whom new connections meet: all of it, and nothing of the other."""
        by_rules = [each for each in self.sets if self.met[each.node_port] == reachable(self.lab)]
        assert len(by_rules) == 1, reachable(self.lab)
        [here], [gone] = by_rules, [each for each in self.sets if each is not by_rules[0]]
        for number in sorted(here.ports)[:: FORWARDS // 8]:
            answer = self.lab.ask(number)
            assert answer.port == here.node_port and answer.name in here.nodes, answer
        assert all(refused(self.lab, number) for number in sorted(gone.ports - here.ports)[::3])
        return here

    def is_repaired(self, to: Set) -> None:
        """Whether the host has what a run that nothing happened to would have made."""
        assert rules(self.lab) == self.whole[to.node_port]
        self.now = to


def reachable(lab: Lab) -> list[str]:
    """The rules that a packet can meet: those of built-in chains, and of the chains that they lead to."""
    found = []
    for table, chains in tables_in(lab.saved()).items():
        ahead, met = {chain for chain in chains if not chain.startswith("EPOK")}, set[str]()
        while ahead:
            met.add(chain := ahead.pop())
            targets = (re.search(r"-[gj] (EPOK\S*)", rule) for rule in chains[chain])
            ahead |= {target[1] for target in targets if target} - met
        found += [f"{table} {chain} {rule}" for chain in met for rule in chains[chain]]
    return sorted(found)


class Run:
    """epok as a process in a namespace, with a process group of its own."""

    def __init__(self, space: Namespace, argv: list[str], env: dict[str, str], text: str = os.devnull) -> None:
        command = ["setsid", "env", "--default-signal=INT,TERM,HUP,QUIT", *PROGRAM, *argv]
        with Path(text).open() as file:
            self.child = space.popen(command, stdin=file, stderr=subprocess.PIPE, env={**bare_environment(), **env})
        own = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children")  # of nsenter, which waits for it alone
        until(lambda: bool(own.read_text()), "nsenter starts it")
        self.pid = int(own.read_text())
        self.log = ""

    def kill(self, number: int, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def pause(self) -> None:
        """Stops it; nsenter then stops itself."""
        self.kill(signal.SIGSTOP)
        until(lambda: not self.alive() or ") T " in Path(f"/proc/{self.child.pid}/stat").read_text(), "it is stopped")

    def go_on(self) -> None:
        self.child.send_signal(signal.SIGCONT)
        self.kill(signal.SIGCONT)

    def restore(self, wait: bool = True) -> int:
        """The iptables-restore that it runs, or is to run; 0 when there is none."""
        while self.alive():
            with contextlib.suppress(OSError):
                for file in Path(f"/proc/{self.pid}/task").glob("*/children"):
                    for child in file.read_text().split():
                        if Path(f"/proc/{child}/comm").read_text().startswith("iptables-resto"):
                            return int(child)
            if not wait:
                break
            time.sleep(0.0002)
        return 0

    def alive(self) -> bool:
        return self.child.poll() is None

    def end(self) -> int:
        """Its exit status, or less than 0; what it logs is clean."""
        self.log = self.child.communicate(timeout=600)[1]
        if not python_starts(self.log):
            for line in self.log.splitlines():
                assert re.fullmatch(r"(info|warning|error): [ -~]+", line), self.log
        assert self.log.count("error: ") <= 1, self.log
        return int(self.child.returncode)


def python_starts(log: str) -> bool:
    """Whether Python was interrupted before epok.py could tell it how, in its first lines."""
    lines = [int(number) for number in re.findall(r'File ".*epok\.py", line (\d+)', log)]
    return log.endswith("KeyboardInterrupt\n") and "Exception ignored" not in log and max(lines, default=0) < TOLD


@contextlib.contextmanager
def served_first() -> Iterator[None]:
    """On a machine however busy, as far as it lets: a moment that is to be met is milliseconds long."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def trials(what: str, count: int, tally: Tally, trial: Callable[[random.Random], bool]) -> None:
    """Tries until so many trials hit: a kill that comes when all is over proves nothing. Asserts that none failed."""
    lost: list[str] = []
    hits = tries = 0
    while hits < count and tries < 10 * count and len(lost) < 3:
        rng = random.Random(f"{SEED} {what} {tries}")
        tries += 1
        try:
            hits += trial(rng)
        except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            hits += 1
            lost.append(f"EPOK_TEST_SEED={SEED}, trial {tries}: {error!r}")
    tally(what, hits, len(lost))
    assert not lost, "\n".join(lost)
    assert hits == count, f"{tries} tries hit {hits} times"


@pytest.fixture(scope="module")
def host(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(lab, tmp_path_factory.mktemp("clusters"))


@pytest.fixture
def settled(host: Host) -> Host:
    """As after `flushed`: with one of the sets."""
    host.swap(host.sets[0])
    return host


@contextlib.contextmanager
def clients(host: Host, tally: Tally) -> Iterator[None]:
    """Within, clients connect all the time, and none of them fails."""
    one, other = host.sets
    both = {number: [one.node_port, other.node_port] for number in sorted(one.ports & other.ports)}
    with Load(host.lab.client, HOST, both, rate=300 / stretched(1), held=sorted(host.now.ports)[::8]) as load:
        yield
    tally("connections made meanwhile", load.result.attempted, load.result.failed)
    assert load.result.failed == 0, load.result
    assert load.result.answered == load.result.attempted > 0


def ends_in_sync(host: Host) -> None:
    assert "in sync" in host.swap(host.now)


def killed(status: int, number: int) -> bool:
    """Whether a run did not come to its end by itself; asserts that it ended as that signal ends it."""
    # at once, or in one line; by SIGTERM and SIGINT alike
    assert status in ((0, -number) if number == signal.SIGKILL else (0, 1, -number)), status
    return status != 0


# ------------------------------------------------ on the host


def test_epok_killed_at_any_moment_leaves_the_whole_old_or_new_forwards(settled: Host, tally: Tally) -> None:
    host = settled
    restoring = 0

    def trial(rng: random.Random) -> bool:
        nonlocal restoring
        to, number = host.next, rng.choice(SIGNALS)
        run = host.start(to, *rng.choice((*STAGES, ONE_A_CHAIN)))
        with served_first():
            if rng.random() < 0.5:
                run.restore()
                time.sleep(rng.random() ** 4 * RESTORE_SECONDS)
            else:
                time.sleep(rng.random() * host.seconds)
            at = run.restore(wait=False)
            run.kill(number, group=rng.random() < 0.3)
        hit = killed(run.end(), number)
        restoring += bool(hit and at)
        host.is_quiet()
        host.is_whole()
        host.swap(to)
        host.is_repaired(to)
        return hit

    with clients(host, tally):
        trials("epok killed", often(10, big=200), tally, trial)
    tally("epok killed while iptables-restore ran", restoring, 0)
    ends_in_sync(host)


def test_an_iptables_restore_that_is_killed_is_made_good_in_the_same_run(settled: Host, tally: Tally) -> None:
    host = settled

    def trial(rng: random.Random) -> bool:
        to, number = host.next, rng.choice(SIGNALS)
        run = host.start(to, *rng.choice(STAGES))
        with served_first():
            restore = run.restore()
            time.sleep(rng.random() ** 4 * RESTORE_SECONDS)
            run.kill(signal.SIGSTOP)  # so that it cannot make it good yet
            with contextlib.suppress(ProcessLookupError):
                if restore:
                    os.kill(restore, number)
        try:
            run.pause()
            until(lambda: restore not in host.all_processes(), "iptables-restore ends")
            host.is_whole()
        finally:
            run.go_on()
        assert run.end() == 0, run.log
        host.is_quiet()
        host.is_repaired(to)
        return f"exit status -{number:d}" in run.log

    with clients(host, tally):
        trials("iptables-restore killed", often(5, big=200), tally, trial)
    ends_in_sync(host)


@once
def test_an_interrupted_run_leaves_no_key_of_the_cluster_behind(settled: Host, tally: Tally, tmp_path: Path) -> None:
    """ssl reads them from files only, and a process that a signal quits leaves its memory in one."""
    host, authority = settled, Authority()
    (tmp_path / "server").write_bytes(authority.issue("api", "127.0.0.1"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server")
    data = {
        name: base64.b64encode(pem).decode() for name, pem in (("ca", authority.pem), ("me", authority.issue("me")))
    }
    user = {"token": TOKEN, "client-certificate-data": data["me"], "client-key-data": data["me"]}
    home = host.lab.host.root / "run/home"

    def trial(rng: random.Random) -> bool:
        number = next(numbers)
        env = {"HOME": "/run/home", "TMPDIR": "/run/temporary"}
        apis[-1].requests.clear()
        run = Run(host.lab.host, ["-i", "eth0", "--kubeconfig", "/run/home/config", "local"], env)
        until(lambda: bool(apis[-1].requests) or not run.alive(), "it has logged in", 60)
        time.sleep(rng.random() / 10)
        run.kill(number)
        status = run.end()
        assert status >= 0, f"signal {-status} ended it, and not epok"
        host.is_quiet()
        host.is_whole()
        assert not [*files.iterdir()]
        return status != 0

    numbers = itertools.cycle((signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGINT))
    apis: list[FakeApi] = []
    files = host.lab.host.root / "run/temporary"
    for each in host.sets:
        with FakeApi(host.lab.host, *json.loads(Path(each.cluster).read_text())["items"], tls=tls) as api:
            apis.append(api)
            write_kubeconfig(home / "config", api.url, user=user, cluster={"certificate-authority-data": data["ca"]})
            host.files.add("/run/home/config")
            trials("epok interrupted while it had keys", often(4, big=50), tally, trial)


# ------------------------------------------------ over SSH


class Remote:
    """Somebody on the client's machine who has keys for the host, and a relay on the way there.

    `bytes` is about what a swap sends.
    """

    def __init__(self, host: Host, relay: Relay, users: tuple[str, ...], key: Path, host_key: str, home: Path) -> None:
        self.host, self.relay, self.users, self.home = host, relay, users, home
        (home / "temporary").mkdir()
        (home / "known_hosts").write_text(f"[127.0.0.1]:{relay.port} {host_key}\n")
        self.options = ["--port", str(relay.port), "--key", str(key), "--known-hosts", str(home / "known_hosts")]
        host.processes = host.all_processes()
        for user in users:
            to = host.next
            run = self.start(to, user)
            assert run.end() == 0, run.log
            host.is_repaired(to)
        self.bytes = relay.sent // len(users)
        host.ends()
        host.files = host.all_files()
        self.files = set(home.rglob("*"))

    def start(self, to: Set, user: str, *options: str) -> Run:
        argv = ["--snapshot", "-", "-i", "eth0", "--timeout", "60", *options]
        env = {"HOME": str(self.home), "TMPDIR": str(self.home / "temporary")}
        command = [*argv, "ssh", "--host", f"{user}@127.0.0.1", *self.options]
        return Run(self.host.lab.client, command, env, to.cluster)

    def is_clean(self) -> None:
        """Nothing of a run is left on either side."""
        self.host.is_quiet()
        assert set(self.home.rglob("*")) == self.files

    def cut(self, rng: random.Random) -> bool:
        """One trial: the connection ends at a random byte, and epok makes it good when there is a way again."""
        to, reset = self.host.next, rng.random() < 0.7
        self.relay.arm(rng.randrange(1, self.bytes), lambda: self.relay.break_off(reset), shut=True)
        run = self.start(to, rng.choice(self.users), *rng.choice(STAGES))
        until(lambda: self.relay.tripped.is_set() or not run.alive(), "the connection is cut", 60)
        hit = self.relay.tripped.is_set()
        self.is_clean()
        self.host.is_whole()
        self.relay.arm(None)
        assert run.end() == 0, run.log
        self.host.is_repaired(to)
        return hit

    def kill(self, rng: random.Random) -> bool:
        """One trial: epok ends when it has sent some number of bytes, and the next run makes it good."""
        to, number = self.host.next, rng.choice(SIGNALS)
        self.relay.arm(rng.randrange(1, self.bytes), lambda: run.kill(number), shut=True)
        run = self.start(to, rng.choice(self.users), *rng.choice(STAGES))
        hit = killed(run.end(), number)
        self.is_clean()
        self.host.is_whole()
        self.relay.arm(None)
        assert self.start(to, rng.choice(self.users)).end() == 0
        self.host.is_repaired(to)
        return hit

    def tries(self, how: str, tally: Tally) -> None:
        with clients(self.host, tally):
            trials(f"connection cut{how}", often(4, big=200), tally, self.cut)
            trials(f"epok killed{how}", often(2, big=50), tally, self.kill)
        ends_in_sync(self.host)


def test_a_connection_cut_at_any_byte_leaves_the_whole_old_or_new_forwards(
    settled: Host, tally: Tally, tmp_path: Path
) -> None:
    need("sshd", "apt-get install openssh-server")
    server, key = Sshd(settled.lab.host), make_key(tmp_path / "key", "ed25519")
    server.authorize(f"restrict {key.with_suffix('.pub').read_text()}")
    server.sudoers(*SUDOERS)
    with Relay(settled.lab.client, (HOST, 22)) as relay:
        home = tmp_path / "home"
        home.mkdir()
        Remote(settled, relay, ("root", USER), key, server.host_key(), home).tries(", over SSH", tally)


def test_a_connection_cut_at_any_byte_leaves_them_whole_behind_the_gate_too(
    lab: Lab, tally: Tally, tmp_path: Path
) -> None:
    need("visudo", "apt-get install sudo")
    need("sshd", "apt-get install openssh-server")
    with Lab(backend=lab.backend) as other:  # whose sshd and users are those of the distribution
        host = Host(other, tmp_path)
        secret = secret_data(Gateway(other.host).setup_host("--address", HOST).stdout)
        key, home = tmp_path / "key", tmp_path / "home"
        key.write_text(secret["id_rsa"])
        key.chmod(0o600)
        home.mkdir()
        host_key = secret["known_hosts"].splitlines()[0].partition(" ")[2]
        with Relay(other.client, (HOST, 22)) as relay:
            user = secret["ssh_host"].partition("@")[0]
            Remote(host, relay, (user,), key, host_key, home).tries(", over SSH with epok-gate", tally)
