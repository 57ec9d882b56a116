"""Runs in a row while cluster, options and host change at random: nothing is left over, and the end is that of one run.

All that is drawn follows from the seed in the messages; EPOK_TEST_SEED is another one.
"""

import contextlib
import json
import os
import random
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Tally, often
from lab.changing import NOBODY, Changing, Choice
from lab.fake_api import FakeApi, answer, cut, failure, hanging_up, write_kubeconfig
from lab.machine import until
from lab.many_runs import AT_ONCE, Held, ManyRuns
from lab.network import (
    CHOOSE_BACKEND,
    EPOK,
    FORWARDING,
    HOST,
    HOST6,
    PROGRAM,
    TABLES,
    Lab,
    Made,
    Namespace,
    bare_environment,
)
from lab.objects import Object, port, service, snapshot
from lab.sshd import PLACE, USER, Sshd, make_key
from test_iptables import foreign
from test_ssh import SUDOERS, Operator

pytestmark = pytest.mark.proof
SEED = int(os.environ.get("EPOK_TEST_SEED", "20"))
RUNS, BIG_RUNS = 12, 1000
TOOLS = {4: "iptables", 6: "ip6tables"}
TO = {4: HOST, 6: HOST6}
METRICS = "/run/epok.prom"
WARNINGS = re.compile(  # that belong to what is changed here
    "not forwarded, |rejected: |no node is Ready|every node is excluded|kept these chains"
    "|connections that were open have|answers 403 to patch events"
)
MAIL = service("mail", "25:2025", [port(25, 2025)], families=("IPv4", "IPv6"))
Rules = dict[str, list[str]]
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def operator(lab: Lab, server: Sshd, tmp_path: Path) -> Operator:
    """Who runs epok on the client's machine, with tmp_path/home for a home."""
    home = tmp_path / "home"
    home.mkdir()
    key = make_key(tmp_path / "key", "ed25519")
    server.reset()
    server.sudoers(*SUDOERS)
    server.authorize(f"restrict {key.with_suffix('.pub').read_text().strip()}")
    return Operator(lab, server, {"ed25519": key}, home)


# ------------------------------------------------ what is epok's on a host


def own(saved: str) -> Rules:
    """What is epok's in iptables-save's text: by table and chain the rules in order, and all the hooks."""
    found: Rules = {}
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith((":EPOK ", ":EPOK-")):
            found.setdefault(f"{table} {line[1:].split()[0]}", [])
        elif line.startswith(("-A EPOK ", "-A EPOK-")):
            found[f"{table} {line.split()[1]}"].append(line)
        elif re.fullmatch(r"-A [A-Z]+ .*-j EPOK(-[A-Z]+)?", line):
            found.setdefault(f"{table} hooks", []).append(line)
    return {name: sorted(lines) if name.endswith("hooks") else lines for name, lines in found.items()}


def size(rules: Rules) -> tuple[int, int]:
    """How many chains, and how many rules."""
    return len(rules), sum(map(len, rules.values()))


class Clean:
    """Another host, whose rules are those of one run alone; the runs of one process, for they take less time."""

    def __init__(self, lab: Lab, place: Path) -> None:
        self.nodes = lab.node_objects()
        self.lab = Lab(backend=lab.backend)
        self.lab.host = lab.namespace("clean", FORWARDING + CHOOSE_BACKEND.replace("BACKEND", lab.backend))
        self.lab.host.wire("link add eth1 type bridge")
        self.lab.address(self.lab.host, "eth1", "10.0.0.1/24", "2001:db8:2::1/64")
        self.lab.host.wire("route add 10.244.0.0/16 dev eth1", "route add 2001:db8:244::/48 dev eth1")
        self.file = place / "cluster.json"
        self.process = ManyRuns(self.lab.host, EPOK, place / "clean.log")

    def rules(self, options: Choice, objects: list[Object], used: Container[int]) -> dict[int, Rules]:
        """What one run makes, by IP version; `used` are those for which there were chains of epok's already.

        Where there were none, a run without forwards leaves the host as it is, else it leaves the chains without any.
        """
        self.lab.flush()
        self.run(options, objects)
        first = {version: own(self.lab.saved(version)) for version in TOOLS}
        if all(first[version] or version not in used for version in TOOLS):
            return first
        self.run(Choice(), [*self.nodes, MAIL])
        self.run(options, objects)
        return {version: own(self.lab.saved(version)) if version in used else first[version] for version in TOOLS}

    def run(self, options: Choice, objects: list[Object]) -> None:
        self.file.write_text(json.dumps(snapshot(*objects)))
        held = self.process.run(*options.argv(), "--snapshot", str(self.file), "local")
        assert held.status == 0, self.process.log.read_text()[-2000:]


# ------------------------------------------------ the host, and who lays hands on it


class Hand:
    """Somebody who changes the host's rules between two runs: `rules` are those of theirs that are there."""

    def __init__(self, lab: Lab, rng: random.Random) -> None:
        self.lab, self.rng = lab, rng
        self.rules: list[tuple[int, str, str]] = []  # IP version, table, "CHAIN rule"
        self.made = 0

    def iptables(self, version: int, *words: str) -> None:
        self.lab.host.run([TOOLS[version], "-w", *words])

    def do_something(self) -> None:
        steps = [self.add_rule, self.add_rule, self.add_chain, self.remove_any_rule, self.hold, self.empty_chain]
        steps += [self.delete_rule, self.stray_rule, self.delete_hook, self.double_hook, self.empty_table, self.drain]
        self.rng.choice(steps)()

    def version_and_table(self) -> tuple[int, str]:
        return self.rng.choice((4, 6)), self.rng.choice(TABLES)

    def add_rule(self) -> None:
        version, table = self.version_and_table()
        chain = self.rng.choice({"nat": ("PREROUTING", "POSTROUTING", "OUTPUT"), "filter": ("FORWARD", "INPUT")}[table])
        self.insert(version, table, chain, "-p tcp -m tcp --dport 9 -j RETURN")

    def insert(self, version: int, table: str, chain: str, rule: str) -> None:
        """Before or after what is there, with a comment that no other has."""
        self.made += 1
        text = rule.replace(" -j ", f' -m comment --comment "by hand {self.made}" -j ')
        self.iptables(version, "-t", table, self.rng.choice(("-I", "-A")), chain, *shlex.split(text))
        self.rules.append((version, table, f"{chain} {text}"))

    def add_chain(self) -> None:
        version, table = self.version_and_table()
        name = f"HAND-{self.made}"
        self.iptables(version, "-t", table, "-N", name)
        self.insert(version, table, name, "-p udp -m udp --dport 9 -j ACCEPT")

    def remove_any_rule(self) -> None:
        if self.rules:
            self.remove_rule(self.rng.randrange(len(self.rules)))

    def remove_rule(self, index: int) -> None:
        version, table, rule = self.rules.pop(index)
        self.iptables(version, "-t", table, "-D", *shlex.split(rule))

    def hold(self) -> None:
        """A rule of theirs refers to a chain of epok's, which cannot be deleted then."""
        if found := self.chain():
            version, chain = found
            name = f"HAND-{self.made}"
            self.iptables(version, "-t", "nat", "-N", name)
            self.insert(version, "nat", name, f"-p tcp -m tcp --dport 9 -j {chain}")

    def held(self, version: int) -> dict[str, list[str]]:
        """The chains that are kept for their sake: empty, if nothing else is in them."""
        targets = [rule.split()[-1] for its, table, rule in self.rules if (its, table) == (version, "nat")]
        return {f"nat {chain}": [] for chain in targets if chain.startswith("EPOK")}

    def chain(self) -> tuple[int, str] | None:
        """One of epok's chains of table nat."""
        version = self.rng.choice((4, 6))
        chains = [name.split()[1] for name in own(self.lab.saved(version)) if re.match(r"nat EPOK-[a-z]", name)]
        return (version, self.rng.choice(sorted(chains))) if chains else None

    def empty_chain(self) -> None:
        if found := self.chain():
            self.iptables(found[0], "-t", "nat", "-F", found[1])

    def delete_rule(self) -> None:
        if (found := self.chain()) and own(self.lab.saved(found[0]))[f"nat {found[1]}"]:
            self.iptables(found[0], "-t", "nat", "-D", found[1], "1")

    def stray_rule(self) -> None:
        if found := self.chain():
            self.iptables(found[0], "-t", "nat", "-I", found[1], "-j", "ACCEPT")

    def hook(self) -> tuple[int, str, list[str]] | None:
        """One of epok's hooks that is there: IP version, table, and its words."""
        version, table = self.version_and_table()
        there = own(self.lab.saved(version)).get(f"{table} hooks", [])
        return (version, table, self.rng.choice(there).split()[1:]) if there else None

    def delete_hook(self) -> None:
        if found := self.hook():
            self.iptables(found[0], "-t", found[1], "-D", *found[2])

    def double_hook(self) -> None:
        if found := self.hook():
            self.iptables(found[0], "-t", found[1], "-A", *found[2])

    def empty_table(self) -> None:
        version = self.rng.choice((4, 6))
        self.iptables(version, "-t", "nat", "-F")
        self.rules = [rule for rule in self.rules if rule[:2] != (version, "nat")]

    def drain(self) -> None:
        """All of FORWARD, as a firewall does that is loaded again."""
        version = self.rng.choice((4, 6))
        self.iptables(version, "-F", "FORWARD")
        self.rules = [r for r in self.rules if r[:2] != (version, "filter") or not r[2].startswith("FORWARD ")]

    def let_go(self) -> None:
        """No rule of theirs refers to a chain of epok's any more."""
        for index in reversed([n for n, (_, _, rule) in enumerate(self.rules) if " -j EPOK" in rule]):
            self.remove_rule(index)

    def there(self) -> Counter[str]:
        """Their rules as iptables-save has them."""
        return Counter(f"-A {rule}" for _, _, rule in self.rules)


# ------------------------------------------------ what is left beside rules


def listing(*places: Path) -> set[Path]:
    """All files, but not what the lab notes down, and what was asked for."""
    found = {path for place in places for path in place.rglob("*")}
    return {
        path for path in found if "inputs" not in path.parts and path.name not in ("xtables.lock", Path(METRICS).name)
    }


def nft_objects(space: Namespace) -> Counter[str]:
    """How many tables, chains, rules and sets nft knows, whoever made them."""
    listed = json.loads(space.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]
    return Counter(kind for item in listed for kind in item)


# ------------------------------------------------ many runs in a row


class Way(NamedTuple):
    """How epok is run: from where, and the words for its cluster and its executor."""

    space: Namespace
    words: list[str]
    executor: list[str]
    env: dict[str, str]


class Soak(Made):
    """The lab's host, and all that happens to it."""

    def __init__(self, lab: Lab, operator: Operator, rng: random.Random) -> None:
        super().__init__()
        self.lab, self.operator, self.rng = lab, operator, rng
        self.place = operator.home.parent
        self.cluster, self.options, self.hand = Changing(rng), Choice(), Hand(lab, rng)
        self.there = False  # whether forwards are, which --clean takes away
        self.asked = self.unanswered = 0
        self.former: dict[tuple[int, str], None] = {}

    def make(self) -> None:
        self.clean = Clean(self.lab, self.place)
        self.stack.enter_context(self.clean.process)
        self.apis = {space.name: self.stack.enter_context(FakeApi(space)) for space in (self.lab.host, self.lab.client)}
        self.lab.host.run(["mkdir", "/run/tmp", "/run/home"])
        (self.operator.home / "tmp").mkdir()
        self.ways = [self.local(), self.local(), self.over_ssh("root"), self.over_ssh(USER)]
        self.apis_or_stdin = [
            way._replace(words=["--kubeconfig", self.kubeconfig(way.space)]) if number % 2 else way
            for number, way in enumerate(self.ways)
        ]
        self.files, self.running = self.all_files(), self.all_processes()

    def local(self) -> Way:
        return Way(self.lab.host, ["--snapshot", "-"], ["local"], {"HOME": "/run/home", "TMPDIR": "/run/tmp"})

    def over_ssh(self, user: str) -> Way:
        executor = ["ssh", "--host", f"{user}@{HOST}", "--key", str(self.operator.keys["ed25519"])]
        home = str(self.operator.home)
        return Way(self.lab.client, ["--snapshot", "-"], executor, {"HOME": home, "TMPDIR": f"{home}/tmp"})

    def kubeconfig(self, space: Namespace) -> str:
        return write_kubeconfig(self.place / f"{space.name}.config", self.apis[space.name].url)

    def all_files(self) -> set[Path]:
        return listing(self.lab.host.root / "run", self.operator.home)

    def all_processes(self) -> dict[str, Counter[str]]:
        spaces = (self.lab.host, self.lab.client)
        return {space.name: Counter(process.name for process in space.processes()) for space in spaces}

    def saved(self) -> str:
        return self.lab.saved(4) + self.lab.saved(6)

    # ---- one run

    def start(self, way: Way, *args: str) -> "subprocess.Popen[str]":
        """epok with the cluster and the options of now."""
        objects = list(self.cluster.objects())
        self.apis[way.space.name].objects = objects
        argv = [*PROGRAM, *self.options.argv()]
        argv += [*(word for word in way.words if "--clean" not in args), *args, *way.executor]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        child = way.space.popen(argv, env={**bare_environment(), **way.env}, **pipes)
        way.space.children.remove(child)  # or they are a thousand in the end
        assert child.stdin
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(snapshot(*objects)))
            child.stdin.close()
        child.stdin = None
        return child

    def run(self, way: Way, *args: str) -> Done:
        with self.start(way, *args) as child:
            out, log = child.communicate(timeout=600)
        return Done(child.args, child.returncode, out, log)

    def look(self, way: Way) -> Iterator[str]:
        """What only looks changes nothing."""
        before = self.saved()
        words = self.rng.choice(
            (["--status"], ["--dry-run"], ["--explain", "default/app1"], ["--status", "-o", "json"])
        )
        done = self.run(way, *words)
        if done.returncode not in (0, 3 if words == ["--dry-run"] else 0):
            yield f"{words}: exit {done.returncode}: {done.stderr}"
        if self.saved() != before:
            yield f"{words} changed the host"

    def kill(self, way: Way) -> None:
        """A run is killed when some of its inputs have been sent, or is over."""
        inputs = self.lab.host.root / "run" / "inputs"
        enough = len(os.listdir(inputs)) + self.rng.randrange(1, 4)
        with self.start(way) as child:
            until(lambda: child.poll() is not None or len(os.listdir(inputs)) >= enough, "the run's inputs", 120)
            child.kill()
            child.communicate()
        self.settle()
        self.there = True

    def settle(self) -> None:
        """What a run has started has ended."""
        until(lambda: self.all_processes() == self.running, f"{self.all_processes()} again {self.running}", 60)

    # ---- between two runs

    def step(self) -> list[str]:
        """Changes, one run, and all that is wrong then."""
        way = self.rng.choice(self.apis_or_stdin)
        access = self.access()
        stale = self.disturb(way)
        wrong = [] if self.rng.random() < 0.75 else list(self.look(way))
        if stale or any(access[number] != now for number, now in self.access().items() if number in access):
            self.lab.host.run(["conntrack", "-F"])
        before = {version: self.lab.saved(version) for version in TOOLS}
        self.there = self.rng.random() > 0.08
        more = [["--metrics-file", METRICS], []][self.rng.random() < 0.7 or way.executor != ["local"]]
        done = self.run(way, *(more if self.there else ["--clean"]))
        wrong += [f"exit {done.returncode}"] if done.returncode else []
        wrong += [
            line for line in done.stderr.splitlines() if re.match("error|warning", line) and not WARNINGS.search(line)
        ]
        wrong += [*self.wrong_rules(before), *self.leftovers(), *self.wrong_answers()]
        if self.there and self.rng.random() < 0.2:
            wrong += self.not_in_sync(way)
        return [f"{problem}\n{way.executor} {self.options}\n{done.stderr}" for problem in wrong]

    def disturb(self, way: Way) -> bool:
        """Changes of cluster, options and host. Whether UDP flows may go on that would not be made any more.

        epok ends those to a node that is no target any more by the rules that it finds: not where these were changed
        by somebody else, or by a run that was killed then, nor those of clients that lose access.
        """
        for _ in range(self.rng.choice((0, 1, 1, 2, 3))):
            self.former |= dict.fromkeys(self.cluster.asked())
            self.cluster.change()
        stale = False
        if self.rng.random() < 0.4:
            self.options, stale = self.options.changed(self.rng), True
        if self.rng.random() < 0.5:
            self.hand.do_something()
            stale = True
        if self.rng.random() < 0.15:
            self.kill(way)
            stale = True
        return stale or not self.there

    def access(self) -> dict[int, tuple[str, bool]]:
        """Who may use each UDP port."""
        apps = [app for app in self.cluster.apps if "udp" in app.protocols]
        return {number: (app.sources, app.internal) for app in apps for number in app.externals}

    # ---- what is wrong after a run

    def wrong_rules(self, before: dict[int, str]) -> Iterator[str]:
        """epok's are those of one run on a clean host, and all others as they were."""
        used = [version for version, text in before.items() if own(text)]
        wanted = self.clean.rules(self.options, self.cluster.objects(), used) if self.there else {4: {}, 6: {}}
        others: list[str] = []
        for version, tool in TOOLS.items():
            text = self.lab.saved(version)
            made = own(text)
            expected = {**{name: [] for name in self.hand.held(version) if name in made}, **wanted[version]}
            if made != expected:
                yield f"{tool}: {size(made)} chains and rules, not {size(expected)}: {differing(made, expected)}"
            if foreign(text) != foreign(before[version]):
                yield f"{tool}: others' rules were {foreign(before[version])} and are {foreign(text)}"
            others += [line for line in foreign(text) if line.startswith("-A ")]
        if Counter(others) != self.hand.there():
            yield f"others' rules are {others}, not {self.hand.there()}"

    def leftovers(self) -> Iterator[str]:
        """No file, no process, no lock."""
        try:
            self.settle()
        except AssertionError as error:
            yield str(error)
        if files := self.all_files() ^ self.files:
            yield f"files came or went: {files}"
        if self.lab.host.run(["flock", "--nonblock", "/run/xtables.lock", "true"], check=False).returncode:
            yield "the lock of iptables is still held"

    def wrong_answers(self) -> Iterator[str]:
        """Ports that are forwarded, and that are no more, by TCP and UDP; UDP also from ports that asked before."""
        now, gone = self.cluster.asked(), [*self.former]
        udp = [(number, protocol) for number, protocol in (*now, *gone) if protocol == "udp"]
        for number, protocol in [self.rng.choice(ports) for ports in (now, now, now, gone, udp, udp, udp) if ports]:
            version = self.rng.choice((4, 6))
            sport = self.rng.choice((0, 5353, 5353, 5354)) if protocol == "udp" else 0
            self.asked += 1
            if problem := self.ask(number, protocol, version, sport):
                self.unanswered += 1
                yield f"{protocol} port {number}, IPv{version}, from port {sport or 'any'}: {problem}"

    def ask(self, number: int, protocol: str, version: int, sport: int) -> str:
        """What is wrong with the answer."""
        wanted = self.cluster.meets(self.options, number, protocol, version) if self.there else NOBODY
        try:
            met = self.lab.ask(number, protocol, TO[version], sport=sport, timeout=10)
        except ConnectionRefusedError:
            return f"refused, not {wanted}" if wanted.names else ""
        except OSError as error:
            return f"{error}, not {wanted}"
        return "" if met.name in wanted.names and met.port == wanted.node_port else f"{met}, not {wanted}"

    def not_in_sync(self, way: Way) -> Iterator[str]:
        before = self.saved()
        done = self.run(way)
        if "in sync" not in done.stderr or self.saved() != before:
            yield f"a second run: {done.stderr}"

    def at_the_end(self) -> Iterator[str]:
        """The rules are those of one run on this host, emptied; and --clean leaves what is not epok's."""
        self.hand.let_go()
        self.there = True
        self.run(self.ways[0])
        many = {version: self.lab.saved(version) for version in TOOLS}
        done = self.run(self.ways[0], "--clean")
        if own(self.saved()) or [foreign(text) for text in many.values()] != [
            foreign(self.lab.saved(v)) for v in TOOLS
        ]:
            yield f"--clean at the end of EPOK_TEST_SEED={SEED} left {self.saved()}\n{done.stderr}"
        self.lab.flush()
        done = self.run(self.ways[0])
        for version, text in many.items():
            once = own(self.lab.saved(version))
            if once and once != own(text):
                yield f"the end of EPOK_TEST_SEED={SEED}: {differing(own(text), once)}\n{done.stderr}"


def differing(made: Rules, wanted: Rules) -> str:
    """The first few chains that are not the same."""
    names = sorted(name for name in made.keys() | wanted.keys() if made.get(name) != wanted.get(name))
    return "; ".join(f"{name}: {made.get(name)}, not {wanted.get(name)}" for name in names[:3])


def test_runs_in_a_row_leave_what_one_run_leaves(lab: Lab, operator: Operator, tally: Tally) -> None:
    runs = often(RUNS, BIG_RUNS)
    at_first = nft_objects(lab.host)
    lost, wrong = 0, []
    with Soak(lab, operator, random.Random(SEED)) as soak:
        for number in range(runs):
            problems = soak.step()
            lost += bool(problems)
            wrong += [f"EPOK_TEST_SEED={SEED}, run {number}: {problem}" for problem in problems]
            if lost > 5:
                break
        wrong += soak.at_the_end()
    tally("runs in a row", number + 1, lost)
    tally("connections", soak.asked, soak.unanswered)
    assert not wrong, "\n\n".join(wrong[:3])
    lab.flush()
    assert nft_objects(lab.host) == at_first


# ------------------------------------------------ what one process holds


once = pytest.mark.parametrize("lab", ["nft"], indirect=True)
local = pytest.mark.parametrize("worker", ["local"], indirect=True)
over_ssh = pytest.mark.parametrize("worker", ["ssh"], indirect=True)
EXECUTORS = ("local", "ssh")
FEW = 14  # files, threads or children; less than the tries that fail
MEMORY = 32 << 20  # bytes, a fraction of what a thousand snapshots take, or as many pages as there are tries
MANY = 200  # Services that nobody forwards: what is kept of them would be seen
KINDS = 7  # of runs
STATUSES = [0, 0, 3, 0, 0, 1, 0]
FAULTS = (
    answer(503),
    hanging_up,
    cut,
    failure(410, "Expired", "The provided continue parameter is too old"),
)


class Worker(NamedTuple):
    """A process that runs epok for one host and one cluster, with the words for both."""

    process: ManyRuns
    api: FakeApi
    server: Sshd
    words: list[str]

    def run(self, *args: str) -> Held:
        return self.process.run(*args, *self.words)

    @property
    def log(self) -> str:
        return self.process.log.read_text()[-2000:]


@pytest.fixture
def worker(request: pytest.FixtureRequest, lab: Lab, operator: Operator) -> Iterator[Worker]:
    place, server, on_host = operator.home.parent, operator.server, request.param == "local"
    space = lab.host if on_host else lab.client
    login = ["--host", f"root@{HOST}", "--key", str(operator.keys["ed25519"]), "--host-key", server.host_key()]
    with FakeApi(space) as api, ManyRuns(space, EPOK, place / "worker.log") as process:
        config = write_kubeconfig(place / "worker.config", api.url)
        words = ["--kubeconfig", config, "--timeout", "600", "-i", "eth0", request.param, *([] if on_host else login)]
        yield Worker(process, api, server, words)


def large_cluster(lab: Lab, *services: Object) -> list[Object]:
    others = [service(f"other{n}", None, [port(80, 30000 + n)], namespace="others") for n in range(MANY)]
    return [*lab.node_objects(), *others, *services]


def one_of_each(worker: Worker, lab: Lab, number: int) -> list[Held]:
    """Runs that change something, look, fail and clean."""
    dns = service("dns", f"{1000 + number % 50}:30053", [port(53, 30053, protocol="UDP")])
    worker.api.objects = large_cluster(lab, MAIL, dns, service("broken", "70000", [port(80, 31000)]))
    looks = (["--dry-run", "--mark", "0xc000000"], ["--status"], ["--explain", "default/mail"])
    held = [worker.run(*words) for words in ([], [], *looks)]
    # a cluster that cannot be read ends a run before the host is asked for anything, and the connection with it
    if "local" in worker.words:
        worker.api.misbehave("nodes", answer(403))
    else:
        worker.server.misbehave("echo you must be root >&2; exit 1")
    held.append(worker.run())
    worker.api.faults.clear()
    worker.server.reset()
    held.append(worker.run("--clean"))
    return held


@once
@pytest.mark.parametrize("worker", EXECUTORS, indirect=True)
def test_a_process_holds_no_more_after_many_runs_than_after_a_few(lab: Lab, worker: Worker, tally: Tally) -> None:
    rounds = often(1, 1000 // KINDS + 1)
    before = one_of_each(worker, lab, 0)[-1]
    each = [one_of_each(worker, lab, number) for number in range(1, rounds + 1)]
    lost = [held for round_ in each for held in round_ if held.beside_memory() != before.beside_memory()]
    tally("runs in one process", rounds * KINDS, len(lost))
    assert [[held.status for held in round_] for round_ in each] == [STATUSES] * rounds, worker.log
    assert not lost, f"{lost[0]} after {before}"
    after = each[-1][-1]
    # when paramiko's last objects go is not for us to say
    assert after.objects - before.objects < (KINDS if "local" in worker.words else 300) + rounds, (before, after)
    assert after.resident - before.resident < MEMORY, (before, after)


@once
@local
def test_a_run_holds_no_more_after_many_failures_of_the_api_than_after_a_few(
    lab: Lab, worker: Worker, tally: Tally
) -> None:
    times = often(20, 200)
    worker.api.objects = large_cluster(lab, MAIL)
    worker.api.page_size = MANY // 2
    for number, fault in enumerate(FAULTS):  # and every fifth request is answered
        worker.api.misbehave("services", fault, at=range(2 + number, times * 5 // 4 + 2, 5))
    check_tries(worker, times, tally)


@once
@over_ssh
def test_a_run_holds_no_more_after_many_lost_connections_than_after_a_few(
    lab: Lab, worker: Worker, tally: Tally
) -> None:
    times = often(20, 200)
    worker.api.objects = large_cluster(lab, MAIL)
    enough = f"[ $(wc -l <{PLACE}/commands) -le {times} ]"
    worker.server.misbehave(f'{enough} && kill -9 $PPID; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    check_tries(worker, times, tally)


def check_tries(worker: Worker, times: int, tally: Tally) -> None:
    """A run that fails so often and then succeeds: what it holds does not grow from try to try."""
    worker.process.tell(AT_ONCE)
    *tries, last = worker.process.tries(*worker.words)
    many = [held for held in tries if any(count > FEW for count in held.counts())]
    growth = tries[-1].resident - tries[times // 4].resident
    tally("failures in one run", len(tries), len(many))
    assert last.status == 0 and len(tries) >= times, worker.log
    assert not many, many[0]
    assert growth < MEMORY, f"{growth} bytes more after {len(tries)} tries"
    assert "socket" not in last.files and last.threads == ["MainThread"] and not last.children, last
