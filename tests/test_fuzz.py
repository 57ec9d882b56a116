"""Whatever a cluster, a host's rules or a command line look like: no traceback, no doubt acted on, one swap at most.

Hypothesis makes them, real iptables judges what epok sends: the lab's, through the process of driver.py. A failure
prints its example, shrunk, and what to put on top of the test to have it again.
"""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

import epok
from conftest import Tally, often
from lab.driver import METRICS, SNAPSHOT, Done, Driver
from lab.gateway import gate, must_pass
from lab.iptables import Chains, chains_in
from lab.network import TABLES, Lab
from lab.objects import Object, node, snapshot
from lab.strategies import Command, argvs, files
from test_iptables import EVERY_FORM, EVERY_OPTION, FOREIGN, MAIL
from test_plan import planned
from test_transaction import BUILT_IN, OLDER, WRONG_HOOKS, after, is_foreign, refers

pytestmark = pytest.mark.proof
RECORD = False  # the driver keeps what was sent
ROUNDS = often(1, big=50)  # Hypothesis remembers all examples of a round; 100,000 in all, with both backends


def fuzz(times: int) -> settings:
    return settings(max_examples=times, print_blob=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def driver(lab: Lab) -> Iterator[Driver]:
    with Driver(lab.host) as made:
        yield made


class Tried(Counter[str]):
    """How often something was tried, what came of it, and how often it was lost."""

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        try:
            yield
        except UnsatisfiedAssumption:
            raise
        except BaseException:
            self.update(["tried", "lost"])
            raise
        self["tried"] += 1

    def at_least(self, what: str, one_in: int) -> None:
        """That the examples are not all of a kind: this came of one in so many."""
        assert self[what] * one_in >= self["tried"], f"{what}: {self[what]} of {self['tried']} only; {dict(self)}"


def try_all(what: str, tally: Tally, tried: Tried, example: Callable[[], None]) -> None:
    """Runs a test of Hypothesis's for so many rounds; what comes of its examples it notes itself."""
    try:
        for _ in range(ROUNDS):
            example()
    finally:
        print(what, dict(tried))  # which pytest shows when a test fails
        tally(what, tried["tried"], tried["lost"])


# ------------------------------------------------ what must be true of each run

Saved = Mapping[tuple[int, str], str]  # by IP version and table


def saved(driver: Driver) -> Saved:
    """What iptables-save prints, without times and counters."""
    texts = {(version, table): driver.saved(version, table) for version in (4, 6) for table in TABLES}
    return {which: re.sub(r"(?m)^#.*\n| \[\d+:\d+\]$", "", text) for which, text in texts.items()}


def must_be_well_formed(done: Done) -> None:
    """Log lines and nothing else, and what was asked for is text of printable characters."""
    assert done.status in (0, 1, 2, 3), done.err
    assert re.fullmatch(r"(?:(?:debug|info|warning|error): [ -~]+\n)*", done.err), done.err
    told = re.split("(?m)^# ip6?tables-restore ", done.out)[0]  # inputs are shown as they are
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", told), told


def must_be_accepted(done: Done) -> None:
    """The kernel takes each input, and so does the gate."""
    for argv, text, status, said in done.calls:
        if argv[0] == "conntrack":
            assert gate.COMMAND.fullmatch(" ".join(argv)), argv
        else:
            assert (status, said) == (0, ""), (argv, text)
            must_pass(text, 6 if argv[0].startswith("ip6") else 4)


def foreign(table: str, chains: Chains) -> Chains:
    return {
        chain: [rule for rule in rules if is_foreign(table, chain, rule)]
        for chain, rules in chains.items()
        if not epok.owned(chain)
    }


def must_leave_alone(before: Saved, now: Saved, but: str = "\n") -> None:
    """Chains, policies and rules that are not epok's are as they were, in their order, but those that have a text."""
    for version, table in before:
        had, has = (foreign(table, chains_in(texts[version, table])) for texts in (before, now))
        assert has == {chain: [rule for rule in rules if but not in rule] for chain, rules in had.items()}
        policies = [re.findall(r"(?m)^:.* [A-Z]+$", texts[version, table]) for texts in (before, now)]
        assert policies[0] == policies[1]


def must_be_in_sync(done: Done, argv: Sequence[str]) -> None:
    assert done.status == 0, done.err
    assert not done.calls
    assert "-q" in argv or "in sync" in done.err


def rules_of_epok(texts: Saved) -> Iterator[str]:
    for text in texts.values():
        yield from re.findall(r"(?m)^-A EPOK.*", text)


# ------------------------------------------------ any snapshot


def printed(tables: Mapping[str, Chains], policy: str = "ACCEPT", counters: str = "") -> str:
    """As iptables-restore reads it; `counters` stand before each rule."""
    text = ""
    for table, chains in tables.items():
        lines = [f":{chain} {policy if chain in BUILT_IN[table] else '-'} [7:420]" for chain in chains]
        lines += [f"{counters}-A {chain} {rule}".strip() for chain, rules in chains.items() for rule in rules]
        text += "\n".join([f"*{table}", *lines, "COMMIT", ""])
    return text


def empty_tables() -> dict[str, Chains]:
    return {table: {chain: list[str]() for chain in BUILT_IN[table]} for table in TABLES}


def with_rules_of(tables: dict[str, Chains], wanted: epok.Tables) -> dict[str, Chains]:
    """Puts epok's chains and hooks into a table that has none."""
    for name, table in wanted.items():
        tables[name] |= {chain: list(rules) for chain, rules in table.chains.items()}
        for chain, hooks in table.hooks.items():
            tables[name][chain][:0] = hooks
    return tables


NODES = [node(f"node{number}", f"10.0.0.{10 + number}", f"2001:db8:2::{10 + number}") for number in (1, 2, 3)]
Job = tuple[list[Object], tuple[str, ...]]  # Services and a command line


def wanted_of(job: Job) -> epok.Wanted:
    """The rules that a run makes."""
    objects, argv = job
    if "--clean" in argv:
        return {4: epok.NOTHING, 6: epok.NOTHING}
    options = epok.parse_options(["--snapshot", "-", *argv], {})
    return epok.rendered(planned(*objects, *NODES, argv=argv), options)


LOCAL = ("-i", "eth0", "local")


def host_with_neighbours() -> str:
    """Docker, kube-proxy, and an older ruleset of epok's."""
    tables = {table: chains_in(f"{printed({table: empty_tables()[table]})}{FOREIGN[table]}") for table in TABLES}
    return printed(with_rules_of(tables, wanted_of(([MAIL], LOCAL))[4]))


def changes_nothing(argv: Sequence[str]) -> bool:
    return any(word.split("=")[0] in ("--dry-run", "--status", "--explain") for word in argv)


def test_any_snapshot_and_options_end_with_the_host_right_or_as_it_was(driver: Driver, tally: Tally) -> None:
    neighbours, tried = host_with_neighbours(), Tried()

    @fuzz(often(250, big=400))
    @given(files(), argvs())
    def example(file: bytes, command: Command) -> None:
        with tried.one():
            argv, environ = command
            assert not driver.load(4, neighbours)
            assert not driver.load(6, printed(empty_tables()))
            before = saved(driver)
            done = driver.run(argv, file, environ)
            now = saved(driver)
            must_be_well_formed(done)
            must_be_accepted(done)
            must_leave_alone(before, now)
            tried[f"exit status {done.status}"] += 1
            if done.status or changes_nothing(argv):
                assert now == before
                assert not done.calls
                return
            tried["a swap"] += bool(done.restored)
            tried["forwards"] += "-j DNAT" in "".join(rules_of_epok(now))
            must_be_in_sync(driver.run(argv, file, environ), argv)
            assert saved(driver) == now

    try_all("any snapshot", tally, tried, example)
    tried.at_least("forwards", 8)
    tried.at_least("a swap", 4)
    tried.at_least("exit status 1", 30)


# ------------------------------------------------ any host

JOBS: dict[str, Job] = {
    "nothing": ([], LOCAL),
    "one": ([MAIL], LOCAL),
    "every form": (EVERY_FORM, EVERY_OPTION),
    "in stages": (EVERY_FORM, (*LOCAL, "--batch-size", "600")),
    "one run a chain": (EVERY_FORM, (*LOCAL, "--batch-commands", "false")),
    "counted": (EVERY_FORM, (*LOCAL, "--metrics-file", METRICS)),
    "other options": ([MAIL], ("-i", "eth+,lo", "--mark", "0x3", "--masquerade", "never", "local")),
    "cleaning": ([], ("--clean", "local")),
}
WANTED = {name: wanted_of(job) for name, job in JOBS.items()}
FOREIGN_CHAINS = ("EPOKX", "EPOK_", "epok-foo", "DOCKER", "F#%*é", "x" * 28)
NOT_EPOKS = ('EPOK-a"b', "EPOK-'", "EPOK-\\")  # no input could delete them, nor can one add rules to all of them
STRANGE_CHAINS = ("EPOK-", "EPOK--x", "EPOK-nat", "EPOK-*%n", "EPOK-é", "EPOK-tcp-25-25-000000", "EPOK-" + "x" * 23)
RULES = (
    "-j ACCEPT", "-j RETURN", "-j DROP", "", "-i EPOK -j ACCEPT", "! -i lo -j RETURN",
    "-p tcp -m tcp --dport 22 -j ACCEPT", "-p udp -m multiport --dports 53,5353 -j RETURN",
    "-m connmark --mark 0x10000000/0x10000000 -j ACCEPT", "-m addrtype --dst-type LOCAL -j RETURN",
    "-m mark ! --mark 0x1 -j RETURN", "-m statistic --mode random --probability 0.5 -j RETURN",
    '-j LOG --log-prefix "-j EPOK"', '-j LOG --log-prefix "-g EPOK-FORWARD "', "-m limit --limit 5/min -j RETURN",
    "-p tcp -m tcp --dport 0:65535 -j RETURN", "-m conntrack --ctstate NEW -j RETURN",
)  # fmt: skip
COMMENTS = (
    "plain", "once was -j EPOK here", "-j", "-g EPOK", "it's -j EPOK", 'an open " quote -g EPOK', "a \\ \" b", "COMMIT",
    "*nat", ":EPOK - [0:0]", "incompatible", "# Generated by", "form\x0cfeed -j EPOK", "\x85:EPOK-gone - [0:0]",
    "\u2028-A PREROUTING -j EPOK\u2028", "\x1cCOMMIT\x1c*filter", "epok_rule_of no id", "\t -j EPOK", "é" * 120, "\\",
    "\x1b[31mred",
)  # fmt: skip


def commented(rule: str, comment: str) -> str:
    """The rule with a comment, as iptables-save would print it."""
    words = comment.replace("\\", "\\\\").replace('"', '\\"')
    return f'-m comment --comment "{words}" {rule}'.strip()


class Damage:
    """A host's tables, and what can happen to them; numbers choose what it happens to."""

    def __init__(self, version: int, wanted: epok.Tables) -> None:
        self.version = version
        self.tables = with_rules_of(empty_tables(), wanted)

    def do(self, how: str, table: str, first: int, second: int, comment: str) -> None:
        self.name, self.chains, self.comment = table, self.tables[table], comment
        getattr(self, how)(first, second)

    def any_rule(self, number: int) -> tuple[list[str], int] | None:
        """One of the rules that are epok's: the chain's rules and where it is."""
        known = [
            (rules, n)
            for chain, rules in self.chains.items()
            for n, rule in enumerate(rules)
            if epok.owned(chain) or not is_foreign(self.name, chain, rule)
        ]
        return known[number % len(known)] if known else None

    def own_chain(self, number: int) -> str | None:
        own = [chain for chain in self.chains if epok.owned(chain)]
        return own[number % len(own)] if own else None

    def rule(self, number: int) -> str:
        plain = RULES[number % len(RULES)]
        return commented(plain, self.comment) if self.comment else plain

    def lose_a_rule(self, first: int, second: int) -> None:
        if found := self.any_rule(first):
            del found[0][found[1]]

    def double_a_rule(self, first: int, second: int) -> None:
        if found := self.any_rule(first):
            found[0].insert(second % (len(found[0]) + 1), found[0][found[1]])

    def move_a_rule(self, first: int, second: int) -> None:
        if found := self.any_rule(first):
            rule = found[0].pop(found[1])
            found[0].insert(second % (len(found[0]) + 1), rule)

    def carry_a_rule_away(self, first: int, second: int) -> None:
        if (found := self.any_rule(first)) and (chain := self.own_chain(second)):
            self.chains[chain].append(found[0].pop(found[1]))

    def comment_a_rule(self, first: int, second: int) -> None:
        if found := self.any_rule(first):
            found[0][found[1]] = commented(found[0][found[1]], self.comment)

    def empty_a_chain(self, first: int, second: int) -> None:
        if chain := self.own_chain(first):
            self.chains[chain].clear()

    def lose_a_chain(self, first: int, second: int) -> None:
        if chain := self.own_chain(first):
            del self.chains[chain]
            for rules in self.chains.values():
                rules[:] = [rule for rule in rules if chain not in refers(rule)]

    def add_a_rule_to_a_chain(self, first: int, second: int) -> None:
        if chain := self.own_chain(first):
            self.chains[chain].insert(second % (len(self.chains[chain]) + 1), self.rule(second))

    def add_a_strange_chain(self, first: int, second: int) -> None:
        chain = STRANGE_CHAINS[first % len(STRANGE_CHAINS)]
        self.chains.setdefault(chain, []).append(self.rule(second))

    def add_a_chain_that_no_input_can_have(self, first: int, second: int) -> None:
        self.chains[NOT_EPOKS[first % len(NOT_EPOKS)]] = []

    def add_a_wrong_hook(self, first: int, second: int) -> None:
        known = ("-j EPOK", "-g EPOK", "-i eth0 -j EPOK", "-m addrtype --dst-type LOCAL -g EPOK", *WRONG_HOOKS)
        hook = known[first % len(known)]
        for chain in refers(hook):
            self.chains.setdefault(chain, [])
        rules = self.chains[BUILT_IN[self.name][second % len(BUILT_IN[self.name])]]
        rules.insert(first % (len(rules) + 1), commented(hook, self.comment) if self.comment else hook)

    def add_a_foreign_rule(self, first: int, second: int) -> None:
        known = [chain for chain in self.chains if not epok.owned(chain)]
        rules = self.chains[known[first % len(known)]]
        rules.insert(second % (len(rules) + 1), self.rule(second))

    def add_a_foreign_chain(self, first: int, second: int) -> None:
        chain = FOREIGN_CHAINS[first % len(FOREIGN_CHAINS)]
        self.chains.setdefault(chain, []).append(self.rule(second))
        self.chains[BUILT_IN[self.name][second % len(BUILT_IN[self.name])]].append(f"-j {chain}")

    def hold_a_chain(self, first: int, second: int) -> None:
        """Nothing leads to HOLDER: what epok's chains do may not be allowed where somebody's chain is met."""
        if chain := self.own_chain(first):
            self.chains.setdefault("HOLDER", []).append(f"{'-j' if second % 2 else '-p udp -g'} {chain}")

    def add_an_older_rule(self, first: int, second: int) -> None:
        if self.name == "nat" and self.version == 4:
            rules = self.chains["PREROUTING"]
            rules.insert(first % (len(rules) + 1), OLDER[second % len(OLDER)])


DAMAGES = [name for name in vars(Damage) if re.match("lose|double|move|carry|comment_|empty|add|hold", name)]
COMMENT_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\x00\n")


@st.composite
def hosts(draw: st.DrawFn) -> tuple[int, str]:
    """An IP version, and what iptables-restore reads to make a host that epok and others left their marks on."""
    version = draw(st.sampled_from([4, 6]))
    made = Damage(version, WANTED[draw(st.sampled_from([*WANTED]))][version])
    comments = st.one_of(st.just(""), st.sampled_from(COMMENTS), st.text(COMMENT_CHARACTERS, max_size=60))
    numbers = st.integers(0, 999)
    steps = st.tuples(st.sampled_from(DAMAGES), st.sampled_from(["nat", "nat", "filter"]), numbers, numbers, comments)
    for step in draw(st.lists(steps, max_size=8)):
        made.do(*step)
    return version, printed(made.tables, *draw(st.sampled_from([("ACCEPT", ""), ("DROP", ""), ("ACCEPT", "[9:540] ")])))


def file_of(job: Job) -> bytes:
    return json.dumps(snapshot(*job[0], *NODES)).encode()


def must_become(wanted: epok.Tables, before: Mapping[str, Chains], now: Mapping[str, Chains]) -> None:
    """The tables of one IP version have epok's chains, those that others hold, one of each hook, and all the rest."""
    if wanted["nat"].chains.get(epok.ROOT) == [] and not any(map(epok.owned, itertools.chain(*before.values()))):
        assert now == before, "a host that epok never had"
        return
    for name, chains in now.items():
        others = [rule for chain, rules in chains.items() if not epok.owned(chain) for rule in rules]
        held = {chain for rule in others for chain in refers(rule) if epok.owned(chain)}
        made = wanted[name].chains
        ours = {chain for hooks in wanted[name].hooks.values() for hook in hooks for chain in refers(hook)}
        own = {chain: rules for chain, rules in chains.items() if epok.owned(chain)}
        assert own == {**dict.fromkeys(held - ours, []), **made}
        for chain in BUILT_IN[name]:
            expected = after(before[name][chain], wanted[name].hooks.get(chain, []))
            assert chains[chain] == without_older(expected, wanted), chain


def without_older(rules: list[str], wanted: epok.Tables) -> list[str]:
    """Less what --clean removes of the older epok."""
    return rules if wanted is not epok.NOTHING else [rule for rule in rules if "epok_rule_id" not in rule]


def test_any_host_is_right_after_one_swap_and_keeps_what_is_not_epoks(driver: Driver, tally: Tally) -> None:
    tried = Tried()

    @fuzz(often(250, big=400))
    @given(hosts(), st.sampled_from([*JOBS]))
    def example(host: tuple[int, str], job: str) -> None:
        with tried.one():
            version, text = host
            argv, wanted, other = [f"--snapshot={SNAPSHOT}", *JOBS[job][1]], WANTED[job], 10 - version
            said = driver.load(version, text)
            tried["refused"] += bool(said)
            assume(not said)
            assert not driver.load(other, printed(with_rules_of(empty_tables(), wanted[other])))
            before = saved(driver)
            look = driver.run(["--status", "local"], file_of(JOBS[job]), {"EPOK_SNAPSHOT": SNAPSHOT})
            must_be_well_formed(look)
            assert look.status == 0 and not look.calls, look.err
            done = driver.run(argv, file_of(JOBS[job]))
            must_be_well_formed(done)
            must_be_accepted(done)
            assert done.status == 0, done.err
            now = saved(driver)
            tables, found = ({t: chains_in(texts[version, t]) for t in TABLES} for texts in (before, now))
            must_become(wanted[version], tables, found)
            must_leave_alone(before, now, *(["epok_rule_id"] if job == "cleaning" else []))
            assert all(now[other, table] == before[other, table] for table in TABLES)
            assert len(done.restored) <= 1 or "batch" in " ".join(argv)
            tried["a swap"] += bool(done.restored)
            must_be_in_sync(driver.run(argv, file_of(JOBS[job])), argv)
            assert saved(driver) == now

    try_all("any host", tally, tried, example)
    tried.at_least("a swap", 2)
    assert tried["refused"] < tried["tried"], dict(tried)


# ------------------------------------------------ any text

WHOLE = {name: re.compile(rf"^\*{name}$.*?^COMMIT$", re.MULTILINE | re.DOTALL) for name in TABLES}
JUNK = st.one_of(
    st.sampled_from([
        "\n", "COMMIT\n", "*nat\n", "*filter\n", ":EPOK - [0:0]\n", "-A EPOK -j RETURN\n", "-A ", "[1:2] ", '"', "\\",
        "\r", "# Generated by x\n", "\x00", "-A EPOK\n", "-A EPOK -g EPOK\n", "[9]", ":\n", "-A  \n",
        "-A PREROUTING -j EPOK\n", "--dport 1 -g ", "[9:9]-A EPOK x\n", "-s a -g \n", "EPOK", "\udcff",
        "[99999999999999999999:0] ",
    ]),
    st.text(max_size=10),
)  # fmt: skip


@st.composite
def texts(draw: st.DrawFn, name: str) -> str:
    """What iptables-save -t might print of a table if it broke, or were another program."""
    tables = with_rules_of(empty_tables(), WANTED[draw(st.sampled_from([*WANTED]))][draw(st.sampled_from([4, 6]))])
    table = printed({name: tables[name]}, "ACCEPT", draw(st.sampled_from(["", "[1:60] "])))
    text = f"# Generated by iptables-save v1.8.9 (nf_tables)\n{table}# Completed\n"
    places = st.integers(0, 9999)
    kinds = st.sampled_from(["cut", "lose", "add", "double"])
    for kind, first, length, junk in draw(st.lists(st.tuples(kinds, places, st.integers(0, 200), JUNK), max_size=6)):
        first %= len(text) + 1
        part = text[first : first + length]
        middle = {"cut": "", "lose": "", "add": junk + part, "double": part + part}[kind]
        text = text[:first] + middle + ("" if kind == "cut" else text[first + length :])
    return text


@fuzz(often(700, big=20_000))
@given(st.data(), st.sampled_from(TABLES))
def test_any_text_is_a_whole_table_or_none(data: st.DataObject, name: str) -> None:
    text = data.draw(texts(name))
    table = epok.Saved(name).read(text.split("\n")).whole
    assert table is None or WHOLE[name].search(text)
    if table:
        both = {**epok.NOTHING, name: table}
        [live.text for live in epok.forwards_in(both, 4).values()]
        epok.changes_between({4: both}, {4: WANTED["one"][4]})


def test_a_table_that_is_not_whole_is_not_acted_on(driver: Driver, tally: Tally) -> None:
    tried = Tried()
    argv = [f"--snapshot={SNAPSHOT}", *LOCAL]
    each = list(itertools.product(("iptables", "ip6tables"), TABLES))

    @fuzz(often(100, big=200))
    @given(st.tuples(*(texts(name) for _, name in each)), st.sampled_from(["", "--status", "--dry-run", "--clean"]))
    def example(drawn: tuple[str, ...], mode: str) -> None:
        with tried.one():
            pairs = list(zip(each, drawn, strict=True))
            fakes = {f"{tool}-save {c}-t {name}": (0, text, "") for (tool, name), text in pairs for c in ("", "-c ")}
            for tool in ("iptables", "ip6tables"):
                fakes[f"{tool}-save"] = (0, "".join(text for (its, _), text in pairs if its == tool), "")
            done = driver.run([*filter(None, [mode]), *argv], file_of(JOBS["every form"]), fakes=fakes)
            must_be_well_formed(done)
            whole = all(WHOLE[name].search(text) for (_, name), text in pairs)
            tried["whole" if whole else "doubt"] += 1
            assert whole or (done.status == 1 and not done.calls), done.err

    try_all("any text of iptables-save", tally, tried, example)
    tried.at_least("doubt", 5)
    tried.at_least("whole", 50)
