"""epok beside others who make rules on the same host: it works, they are untouched, whoever comes, reloads or goes.

Each neighbour starts, reloads and stops twice, once alone and once with epok there: what it has on the host must be the
same both times.
"""

import itertools
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from conftest import Tally, often
from lab.machine import BACKENDS
from lab.neighbours import (
    CONFIGURATION,
    Calico,
    CalicoAtTheEnd,
    Docker,
    Firewalld,
    FirewalldOfIptables,
    Ground,
    KubeProxy,
    Neighbour,
    OlderEpok,
    Ufw,
    UfwElsewhere,
)
from lab.network import HOST, HOST6, Lab, read_answer
from lab.objects import port, service
from test_checks import cure_in, warnings
from test_iptables import foreign, in_sync

pytestmark = pytest.mark.proof
LOCAL = ("-i", "eth0", "local")
DUAL = ("IPv4", "IPv6")
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")], families=DUAL)
DNS = service("dns", "53:30053", [port(53, 30053, "dns", "UDP")], families=DUAL)
WAYS = ((25, "tcp", HOST), (25, "tcp", HOST6), (53, "udp", HOST), (53, "udp", HOST6))
KINDS = {
    "Docker": Docker,
    "kube-proxy": KubeProxy,
    "firewalld": Firewalld,
    "firewalld with iptables": FirewalldOfIptables,
    "ufw": Ufw,
    "Calico": Calico,
    "Calico at the end": CalicoAtTheEnd,
    "the older epok": OlderEpok,
}
MOMENTS = ("start", "reload", "stop")
OF_IPTABLES = re.compile("ip6? (nat|filter|mangle|raw|security)")
# those that take long at it, and do it in many steps
AT_ONCE = KINDS if often(0, big=1) else {name: KINDS[name] for name in ("firewalld with iptables", "ufw")}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
one_lab = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)


@pytest.fixture(scope="module")
def ground(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(lab, tmp_path_factory.mktemp("neighbours"))


@pytest.fixture(autouse=True)
def as_new(ground: Ground) -> None:
    ground.raze()


# ---- what is looked at


def state(lab: Lab, without_epok: bool = True) -> list[str]:
    """All rules of the host but epok's, each chain's in their order, without counters; no table that does nothing."""
    found = []
    for tool in ("iptables", "ip6tables"):
        saved = lab.host.run([f"{tool}-save"]).stdout
        for table, text in re.findall(r"(?ms)^\*(\w+)\n(.*?)^COMMIT", saved):
            lines = [
                re.sub(r" \[\d+:\d+\]$", "", line) for line in (foreign(text) if without_epok else text.splitlines())
            ]
            lines = [line for line in lines if not re.fullmatch(r":[A-Z]+ ACCEPT", line)]
            found += [f"{tool} {table} {line}" for line in sorted(lines, key=in_its_chain)]
    listed = re.sub(r"counter packets \d+ bytes \d+", "counter", lab.host.run(["nft", "list", "ruleset"]).stdout)
    native = re.findall(r"(?ms)^table (\w+ \S+) \{.*?^\}", listed)
    assert native or "table" not in listed
    blocks = re.findall(r"(?ms)^table \w+ \S+ \{.*?^\}", listed)
    return found + [block for name, block in zip(native, blocks, strict=True) if not OF_IPTABLES.fullmatch(name)]


def in_its_chain(line: str) -> list[str]:
    """Sorts chains. kube-proxy's Services are in any order, another one after each start."""
    return ["-A", *line.split(" ", 1)[1:]] if line.startswith("-A KUBE-SERVICES ") else line.split()[:2]


@cache
def alone(ground: Ground, kind: type[Neighbour]) -> dict[str, list[str]]:
    """What is on a host without epok when the neighbour has started, reloaded and stopped."""
    found = {}
    with kind(ground) as other:
        for moment in MOMENTS:
            getattr(other, moment)()
            found[moment] = state(ground.lab, without_epok=False)
    assert found["start"], "a neighbour without a rule"
    return found


def unlike(found: list[str], wanted: list[str]) -> list[str]:
    """How two states differ, in words."""
    if found == wanted:
        return []
    differ = [f"gone: {line}" for line in wanted if line not in found] + [
        f"new: {line}" for line in found if line not in wanted
    ]
    return differ or [f"order: {one} / {other}" for one, other in zip(found, wanted, strict=True) if one != other]


def answers(lab: Lab, number: int, protocol: str, to: str, timeout: float = 10) -> str:
    """Who answers, or the error that a client gets."""
    try:
        return lab.ask(number, protocol, to, timeout=timeout).name
    except OSError as error:
        return type(error).__name__


def not_forwarded(lab: Lab, timeout: float = 10) -> list[str]:
    """Of the forwards, those whose clients get no node; a short timeout is for those that should not."""
    said = {
        f"{protocol}/{number} of {to}": answers(lab, number, protocol, to, timeout) for number, protocol, to in WAYS
    }
    return [f"{way}: {name}" for way, name in said.items() if not name.startswith("node")]


def not_as_usual(other: Neighbour) -> list[str]:
    """What clients of the neighbour itself meet that they should not."""
    said = {number: answers(other.lab, number, "tcp", HOST) for number in other.opens}
    wrong = [f"port {number}: {name}" for number, name in said.items() if name != other.opens[number]]
    shut = {number: answers(other.lab, number, "tcp", HOST, 0.25) for number in other.shuts}
    return wrong + [f"port {number}: {name}" for number, name in shut.items() if not name.endswith("Error")]


def run(lab: Lab) -> str:
    """A good run that warns of nothing but of the older epok; what else it logged."""
    done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL, DNS))
    log = re.sub("warning: this host has 2 rules of the older epok, .*\n", "", done.stderr)
    assert done.returncode == 0 and "warning: " not in log, done.stderr
    return log


def clean(lab: Lab) -> None:
    lab.epok("--clean", "local", check=True)
    assert not re.search("EPOK|epok_rule_id", lab.saved(4) + lab.saved(6))


def without_older(rules: list[str]) -> list[str]:
    """--clean also removes what the older epok made."""
    return [line for line in rules if "epok_rule_id" not in line]


def ended(sock: socket.socket) -> list[str]:
    try:
        sock.sendall(b"still there?")
        return [] if sock.recv(100) == b"still there?" else ["a connection was closed"]
    except OSError as error:
        return [f"a connection: {error}"]


# ---- whoever comes first


@every_kind
def test_a_neighbour_and_epok_live_side_by_side(ground: Ground, kind: type[Neighbour], tally: Tally) -> None:
    """epok is there first, goes, and comes again when the neighbour is there first."""
    lab, wanted = ground.lab, alone(ground, kind)
    with kind(ground) as other:
        run(lab)
        live(other, "start", wanted["start"], tally)
        assert not other.wipes or in_sync(run(lab))  # the others' run before was
        clean(lab)
        assert not unlike(state(lab, without_epok=False), without_older(wanted["start"]))
        if kind is OlderEpok:
            other.start()
        assert not not_as_usual(other)
        run(lab)
        assert not unlike(state(lab), wanted["start"]) + not_forwarded(lab) + not_as_usual(other)
        for moment in ["reload"] * often(1, big=20) + ["stop"]:
            live(other, moment, wanted[moment], tally)
        clean(lab)
        assert not unlike(state(lab, without_epok=False), without_older(wanted["stop"]))


def live(other: Neighbour, moment: str, wanted: list[str], tally: Tally) -> None:
    """The neighbour starts, reloads or stops beside epok, and what that took away is there after epok's next run."""
    lab = other.lab
    with lab.connect(25, timeout=10) as sock:
        read_answer(sock)
        getattr(other, moment)()
        wrong, without = unlike(state(lab), wanted), not_forwarded(lab)
        # of a network without any rule for connections the kernel forgets all that it knew of them
        forgotten = other.wipes and moment == "stop"
        wrong += [] if forgotten else ended(sock)
        log = run(lab)
        wrong += [] if forgotten else ended(sock)
    wrong += unlike(state(lab), wanted) + not_forwarded(lab) + ([] if moment == "stop" else not_as_usual(other))
    wrong += [] if len(without) == len(WAYS) * other.wipes else [f"forwards lost before the next run: {without}"]
    wrong += [] if in_sync(log) != other.wipes else [f"the next run said: {log}"]
    tally(f"a neighbour's {moment} beside epok", 1, bool(wrong))
    assert not wrong


def test_epoks_rules_come_before_the_older_ones(ground: Ground) -> None:
    with OlderEpok(ground) as other:
        other.start()
        run(ground.lab)
        other.reload()
        assert {ground.lab.ask(25).name for _ in range(60)} == {"node1", "node2", "node3"}


# ---- whoever is at it at the same time


@pytest.mark.parametrize("kind", AT_ONCE.values(), ids=AT_ONCE)
def test_a_neighbour_reloads_in_the_middle_of_runs(ground: Ground, kind: type[Neighbour], tally: Tally) -> None:
    lab, wanted = ground.lab, alone(ground, kind)
    with kind(ground) as other, ThreadPoolExecutor(1) as pool:
        other.start()
        for _ in range(often(1, big=50)):
            reload, wrong = pool.submit(other.reload), list[str]()
            for services in itertools.cycle(((MAIL, DNS), (MAIL,))):
                done = lab.epok(*LOCAL, snapshot=lab.cluster(*services))
                wrong += [] if done.returncode in (0, 1) and "Traceback" not in done.stderr else [done.stderr]
                if reload.done():
                    break
            reload.result()
            run(lab)
            differ = unlike(state(lab), wanted["reload"])
            # firewalld puts its rules in by number, and epok's hook may have come before them meanwhile
            wrong += [each for each in differ if not (kind.wipes and each.startswith("order: "))]
            wrong += not_forwarded(lab) + not_as_usual(other)
            tally("a neighbour's reload in the middle of epok's runs", 1, bool(wrong))
            assert not wrong


# ---- what a neighbour does not let pass is told, with what helps


def mend(lab: Lab, told: list[str]) -> None:
    """By the commands in the messages, word for word."""
    for command in {cure_in(problem) for problem in told}:
        lab.host.run(["sh", "-c", command])


@one_lab
def test_a_strict_firewalld_is_told_and_what_the_message_says_opens_it(ground: Ground) -> None:
    lab = ground.lab
    with Firewalld(ground) as other:
        other.start()
        other.configure(StrictForwardPorts="yes")
        other.reload()
        told = warnings(lab, MAIL, DNS)
        assert told and all(" by nft table inet firewalld, chain filter_F" in warning for warning in told)
        assert len(not_forwarded(lab, 0.25)) == len(WAYS)
        cure = re.compile(r"(\w+)=(\w+) in /(\S+) lets it pass, after (.+)$")
        [(name, value, *rest)] = {match for warning in told for match in cure.findall(warning)}
        assert rest == [CONFIGURATION, "firewall-cmd --reload"]
        other.configure(**{name: value})
        other.reload()
        run(lab)
        assert not not_forwarded(lab) + not_as_usual(other)


@one_lab
def test_a_rule_in_docker_user_is_told_whenever_docker_put_it_in_front(ground: Ground) -> None:
    lab, wanted, rule = ground.lab, alone(ground, Docker), "DOCKER-USER -i eth0 -j DROP"
    with Docker(ground) as other:
        run(lab)
        other.start()
        lab.host.run(["iptables", "-I", *rule.split()])
        told = warnings(lab, MAIL, DNS)
        assert told and all(f" by -A {rule}; " in warning for warning in told)
        assert len(not_forwarded(lab, 0.25)) == len([to for _, _, to in WAYS if to == HOST])
        mend(lab, told)
        run(lab)
        assert not not_forwarded(lab)
        other.reload()
        assert warnings(lab, MAIL, DNS) == told
        lab.host.run(["iptables", "-D", *rule.split()])
        run(lab)
        assert not unlike(state(lab), wanted["reload"]) + not_forwarded(lab) + not_as_usual(other)


def test_a_ufw_of_the_other_backend_is_told_and_what_the_message_says_opens_it_for_good(ground: Ground) -> None:
    """Each backend has a FORWARD of its own, and a connection must pass both."""
    lab = ground.lab
    with UfwElsewhere(ground) as other:
        other.start()
        told, tool = warnings(lab, MAIL, DNS), {"nft": "legacy", "legacy": "nft"}[lab.backend]
        assert told and all(f"tables-{tool} -I FORWARD " in warning for warning in told)
        assert len(not_forwarded(lab, 0.25)) == len(WAYS)
        mend(lab, told)
        run(lab)
        other.reload()
        run(lab)
        assert not not_forwarded(lab) + not_as_usual(other)


@pytest.mark.parametrize("kind", [Calico, CalicoAtTheEnd])
def test_calicos_policy_for_what_is_forwarded_counts_while_felix_is_in_front(
    ground: Ground, kind: type[Calico]
) -> None:
    """Nobody can tell from the rules alone what their packet marks will be, so epok does not warn."""
    lab, first = ground.lab, kind is CalicoAtTheEnd
    with kind(ground) as other:
        run(lab)
        other.start()
        other.deny_forwarding()
        if not first:
            assert len(not_forwarded(lab, 0.25)) == len(WAYS)
            for tool in ("iptables", "ip6tables"):
                lab.host.run([tool, "-D", "FORWARD", "-j", "EPOK-FORWARD"])
        run(lab)
        assert not not_forwarded(lab)
        other.reload()
        run(lab)
        assert len(not_forwarded(lab, 10 if first else 0.25)) == (0 if first else len(WAYS))
