"""Swaps in stages, while clients connect all the time: what --batch-size and --batch-commands false promise."""

import contextlib
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest

from lab.load import Load
from lab.machine import stretched
from lab.network import HOST, Lab, inputs_shown
from lab.objects import port, service, snapshot
from test_traffic import NODES, nodes_without, refused

NODE_PORT = 30080
LIMIT = 4096
OPEN = 20  # connections that stay open
RATE = 2000  # new connections a second, where the machine is not busy: else they wait so long that SYNs are sent again
# epok is killed when it hands over one input more than so many, and that one takes no effect.
STOP = """
mkdir /run/stopped
mv /run/alternatives/iptables-restore /run/stopped/
cat >/run/alternatives/iptables-restore <<EOF
#!/bin/sh
[ "\\$*" = "--noflush --wait 5" ] || exec /run/stopped/iptables-restore "\\$@"
echo >>/run/stopped/inputs
[ "\\$(wc -l </run/stopped/inputs)" -le NUMBER ] || { kill -KILL "\\$PPID"; exit 1; }
exec /run/stopped/iptables-restore "\\$@"
EOF
chmod 755 /run/alternatives/iptables-restore
"""
GO_ON = """
mv /run/stopped/iptables-restore /run/alternatives/
rm -r /run/stopped
"""


class State(NamedTuple):
    """A cluster, and the ports at which the host forwards to it."""

    cluster: dict[str, Any]
    ports: set[int]


def state(lab: Lab, numbers: Iterable[int], without: str = "") -> State:
    """A forward for each number, to all nodes but one."""
    ports = {10000 + number for number in numbers}
    services = [service(f"web{number}", f"{number}:{NODE_PORT}", [port(80, NODE_PORT)]) for number in sorted(ports)]
    return State(snapshot(*nodes_without(lab, without), *services), ports)


def changed(lab: Lab, count: int) -> tuple[State, State]:
    """As many forwards, and the same but for some that go and some that come, and that none goes to node3."""
    some = count // 10
    return state(lab, range(count)), state(lab, range(some, count + some), without="node3")


def run(
    lab: Lab, to: State, *options: str, seconds: int = 600, check: bool = True
) -> "subprocess.CompletedProcess[str]":
    """Run epok, however long it takes: a machine may be slow."""
    argv = ["-q", "-i", "eth0", "--timeout", str(seconds), *options, "local"]
    return lab.epok(*argv, snapshot=to.cluster, check=check, timeout=seconds + 60)


def rules(lab: Lab) -> list[str]:
    """What is on the host, in whatever order it came there."""
    return sorted(lab.saved().splitlines())


def in_one(lab: Lab, old: State, new: State) -> list[str]:
    """The host's rules after swaps in one input each; it is left with the old forwards."""
    run(lab, new)
    fresh = rules(lab)
    run(lab, old)
    run(lab, new)
    assert rules(lab) == fresh
    run(lab, old)
    return fresh


@contextlib.contextmanager
def sent(lab: Lab) -> Iterator[list[str]]:
    """The inputs that epok handed to iptables-restore within, in no order."""
    before = Counter(lab.inputs())
    texts: list[str] = []
    yield texts
    texts += [text for _, text in (Counter(lab.inputs()) - before).elements()]


def planned(lab: Lab, to: State, *options: str) -> list[str]:
    """The inputs that a run would hand over, one after the other."""
    return inputs_shown(run(lab, to, *options, "--dry-run", check=False).stdout)


def flip_of(texts: list[str]) -> str:
    """The one input that turns the traffic over."""
    (flip,) = [text for text in texts if re.search("(?m)^-A EPOK ", text)]
    return flip


# ---- under load


@pytest.mark.parametrize("count", [300, 2700])
def test_no_connection_fails_while_a_swap_goes_in_stages(lab: Lab, count: int) -> None:
    old, new = changed(lab, count)
    whole = in_one(lab, old, new)
    stay = dict.fromkeys(old.ports & new.ports, [NODE_PORT])
    with (
        sent(lab) as texts,
        Load(lab.client, HOST, stay, rate=RATE / stretched(1), held=sorted(old.ports)[:: count // OPEN]) as load,
    ):
        run(lab, new, "--batch-size", str(LIMIT))
    assert load.result.failed == 0, load.result
    assert load.result.answered == load.result.attempted
    assert load.result.echoes > 0
    assert rules(lab) == whole
    assert max(map(len, texts)) <= LIMIT
    assert [line.partition(" -g ")[0] for line in flip_of(texts).splitlines()] == [
        "*nat",
        ":EPOK - [0:0]",
        "-A EPOK -i eth0 -p tcp",
        "COMMIT",
    ]
    assert {lab.ask(number).name for number in sorted(new.ports)[:300]} == NODES - {"node3"}
    assert all(refused(lab, number) for number in old.ports - new.ports)


def test_a_swap_of_one_run_a_chain_ends_where_one_in_a_single_run_does(lab: Lab) -> None:
    old, new = changed(lab, 50)
    whole = in_one(lab, old, new)
    stay = dict.fromkeys(old.ports & new.ports, [NODE_PORT])
    with (
        sent(lab) as texts,
        Load(lab.client, HOST, stay, rate=RATE / stretched(1), held=sorted(old.ports)[:OPEN]) as load,
    ):
        run(lab, new, "--batch-commands", "false")
    assert load.result.failed == 0, load.result
    assert rules(lab) == whole
    assert flip_of(texts)
    assert {len(re.findall("(?m)^(?::|-X )", text)) for text in texts} == {1}


def test_a_run_in_stages_is_what_a_dry_run_shows(lab: Lab) -> None:
    old, new = changed(lab, 50)
    run(lab, old)
    plan = planned(lab, new, "--batch-size", "1500")
    with sent(lab) as texts:
        run(lab, new, "--batch-size", "1500")
    assert sorted(texts) == sorted(plan)
    assert len(plan) > 10
    assert planned(lab, new, "--batch-size", "1500") == []


# ---- killed half-way

# How many inputs take effect, of so many, with the flip at this place.
STOPS: dict[str, Callable[[int, int], int]] = {
    "while new chains go ahead": lambda flip, count: flip // 2,
    "before the flip": lambda flip, count: flip,
    "after the flip": lambda flip, count: flip + 1,
    "while old chains are emptied": lambda flip, count: flip + 2,
    "while old chains are deleted": lambda flip, count: count - 1,
}
STAGES = ("--batch-size", "1500")


@contextlib.contextmanager
def stopped_after(lab: Lab, number: int) -> Iterator[None]:
    """Within, epok is killed as soon as that many inputs have taken effect."""
    lab.host.run(["sh", "-ec", STOP.replace("NUMBER", str(number))])
    try:
        yield
    finally:
        lab.host.run(["sh", "-ec", GO_ON])


def kill(lab: Lab, to: State, stop: str) -> bool:
    """Start a swap in stages and kill it there; whether that was after the flip."""
    plan = planned(lab, to, *STAGES)
    flip = plan.index(flip_of(plan))
    number = STOPS[stop](flip, len(plan))
    assert 1 < number < len(plan)
    with stopped_after(lab, number), sent(lab) as texts:
        assert run(lab, to, *STAGES, check=False).returncode == -9
    assert sorted(texts) == sorted(plan[:number])
    return number > flip


def forwards_exactly(lab: Lab, here: State, other: State, names: set[str]) -> bool:
    """Whether all forwards of one state are there, to those nodes, and none that only the other has."""
    met = {lab.ask(number).name for number in here.ports}
    return met == names and all(refused(lab, number) for number in other.ports - here.ports)


@pytest.mark.parametrize("stop", STOPS)
def test_a_killed_run_leaves_all_old_or_all_new_forwards_and_the_next_ends_its_work(lab: Lab, stop: str) -> None:
    old, new = changed(lab, 60)
    whole = in_one(lab, old, new)
    if kill(lab, new, stop):
        assert forwards_exactly(lab, new, old, NODES - {"node3"})
    else:
        assert forwards_exactly(lab, old, new, NODES)
    assert rules(lab) != whole
    run(lab, new, *STAGES)
    assert rules(lab) == whole


@pytest.mark.parametrize("stop", STOPS)
def test_what_a_killed_run_left_goes_when_the_forwards_are_to_be_the_old_ones_again(lab: Lab, stop: str) -> None:
    old, new = changed(lab, 60)
    run(lab, old)
    before = rules(lab)
    kill(lab, new, stop)
    run(lab, old)
    assert rules(lab) == before
    assert forwards_exactly(lab, old, new, NODES)


def test_a_run_goes_on_where_a_killed_one_was_stopped(lab: Lab) -> None:
    old, new = changed(lab, 60)
    run(lab, old)
    plan = planned(lab, new, *STAGES)
    kill(lab, new, "while new chains go ahead")
    assert planned(lab, new, *STAGES) == plan[STOPS["while new chains go ahead"](plan.index(flip_of(plan)), 0) :]


# ---- that the load would notice


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("-i eth0 --syn -m statistic --mode nth --every 10 --packet 0 -j DROP", "SYN lost"),
        ("-i eth0 --syn -j DROP", "timed out"),
        ("-i eth0 --syn -j REJECT --reject-with tcp-reset", "refused"),
        ("-i eth0 --tcp-flags SYN,ACK ACK -j REJECT --reject-with tcp-reset", "reset"),
    ],
)
def test_the_load_tells_how_a_connection_failed(lab: Lab, rule: str, kind: str) -> None:
    run(lab, state(lab, range(10)))
    lab.host.run(["iptables", "-I", "FORWARD", "-p", "tcp", *rule.split()])
    limit = 0.1 if kind == "timed out" else 10
    with Load(lab.client, HOST, {10000: [NODE_PORT]}, rate=200, limit=limit) as load:
        pass
    failures = load.result.failures
    assert failures.pop(kind) > 0
    assert not any(failures.values())
    assert (load.result.answered > 0) == (kind == "SYN lost")


def test_the_load_tells_a_wrong_answer(lab: Lab) -> None:
    run(lab, state(lab, range(10)))
    with Load(lab.client, HOST, {10000: [NODE_PORT], 10001: [2025]}, rate=200) as load:
        pass
    assert load.result.failures["wrong answer"] == load.result.failed == load.result.attempted - load.result.answered
    assert load.result.failed > 0


@pytest.mark.parametrize("target", ["DROP", "REJECT --reject-with tcp-reset"])
def test_the_load_tells_that_an_open_connection_broke(lab: Lab, target: str) -> None:
    run(lab, state(lab, range(10)))
    with Load(lab.client, HOST, {10000: [NODE_PORT]}, rate=200, held=[10001, 10002], limit=1) as load:
        rule = f"-i eth0 -p tcp --tcp-flags PSH PSH -j {target}"  # of the load's, only they send anything
        lab.host.run(["iptables", "-I", "FORWARD", *rule.split()])
    assert load.result.failures["open connection broken"] == 2
