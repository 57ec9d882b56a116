"""Rendered chains, walked as the kernel would walk them: every packet meets the leaf that a linear search finds."""

import dataclasses
import functools
import ipaddress
import itertools
import math
import random
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import epok

V4, V6 = epok.FAMILIES
address = functools.cache(ipaddress.ip_address)
NET = {4: "10.0.1.0", 6: "fd00::"}  # where nodes are
FAMILIES = pytest.mark.parametrize("family", epok.FAMILIES, ids=lambda family: family.tool)
NODES = [address(f"{net}{n}") for net in ("10.0.0.", "2001:db8:2::") for n in range(11, 17)]
SOURCES = ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.10/32", "0.0.0.0/0", "2001:db8::/32", "2001:db8:1::10/128", "::/0"]
INTERFACES = ["eth0", "eth1", "eth+", "eth0.+", "wg0", "lo"]
# Some of them are, hold or overlap the loopback network, where lo does not forward.
ADDRESSES = ["192.0.2.1/32", "192.0.2.0/24", "126.0.0.0/7", "127.0.0.0/8", "127.0.0.1/32", "0.0.0.0/0",
             "2001:db8:1::1/128", "::/127", "::1/128", "::/0"]  # fmt: skip
CLIENTS = {4: ["10.1.2.3", "10.2.0.1", "192.0.2.10"], 6: ["2001:db8:1::10", "2001:db8:f::1", "fd00::1"]}
OWN = {4: ["192.0.2.1", "192.0.2.77", "127.0.0.1", "126.0.0.1", "198.51.100.1"], 6: ["2001:db8:1::1", "::1", "fd00::2"]}


def networks(texts: Sequence[str]) -> tuple[epok.Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


@functools.cache
def default_options() -> epok.Options:
    return epok.parse_options(["-i", "eth0", "local"], {})


def options(*interfaces: str, external: str = "", addresses: Sequence[str] = (), **changes: Any) -> epok.Options:
    changes = {"external_interface": external, "addresses": networks(addresses), **changes}
    return dataclasses.replace(default_options(), interfaces=interfaces or ("eth0",), **changes)


def targets(count: int = 3, port: int = 30000, net: str = "10.0.1.0") -> tuple[epok.Target, ...]:
    """So many nodes, one after the other from an address on."""
    return tuple(epok.Target(address(net) + n, port) for n in range(count))


def forward(first: int, last: int = 0, **changes: Any) -> epok.Forward:
    fields: dict[str, Any] = {
        "protocol": "tcp", "service": "default/mail", "port": "smtp", "targets": targets(),
        "masquerade": True, "internal": False, "sources": None, "direct": False, "known": (),
    }  # fmt: skip
    return epok.Forward(first=first, last=last or first, **{**fields, **changes})


def spread(count: int, nodes: int = 10, seed: int = 1, net: str = "10.0.1.0") -> list[epok.Forward]:
    """Forwards of single ports, anywhere."""
    ports = sorted(random.Random(seed).sample(range(1, 65536), count))
    return [forward(p, targets=targets(nodes, 30000, net), service=f"default/service-{p}") for p in ports]


PORTS = (
    st.integers(1, 65535) | st.integers(1, 40) | st.sampled_from([k * 1024 + d for k in range(1, 64) for d in (-1, 0)])
)


@st.composite
def plans(draw: st.DrawFn) -> list[epok.Forward]:
    """Single ports and ranges, of which no two of a protocol overlap, as make_plan() leaves them."""
    forwards = []
    for protocol in epok.PROTOCOLS:
        ends = sorted(draw(st.sets(PORTS, max_size=16)))
        while ends:
            first = ends.pop(0)
            last = ends.pop(0) if ends and draw(st.integers(0, 3)) == 0 else first
            nodes = draw(st.lists(st.sampled_from(NODES), unique=True, max_size=5))
            port = draw(st.integers(1, 65535 - (last - first)))
            sources = draw(st.none() | st.lists(st.sampled_from(SOURCES), min_size=1, max_size=3, unique=True))
            forwards.append(
                forward(
                    first,
                    last,
                    protocol=protocol,
                    targets=tuple(epok.Target(a, port) for a in nodes),
                    service=draw(st.sampled_from(["default/mail", "kube-system/dns.udp"])),
                    masquerade=draw(st.booleans()),
                    internal=draw(st.booleans()),
                    known=tuple(nodes) if draw(st.booleans()) else (),
                    direct=draw(st.booleans()),
                    sources=None if sources is None else networks(sources),
                )  # fmt: skip
            )
    return forwards


@st.composite
def settings_of_a_host(draw: st.DrawFn) -> epok.Options:
    interfaces = draw(st.lists(st.sampled_from(INTERFACES), min_size=1, max_size=4, unique=True))
    return options(
        *interfaces,
        external=draw(st.sampled_from(["", *interfaces])),
        addresses=draw(st.lists(st.sampled_from(ADDRESSES), max_size=3, unique=True)),
        mark=epok.Mark(*draw(st.sampled_from([(1 << 28, 1 << 29), (1, 1 << 31)]))),
    )


class Rule(NamedTuple):
    """A rule's conditions as (negated, option, value), whether it is a goto, its target and the target's options."""

    conditions: list[tuple[bool, str, str]]
    goto: bool
    target: str
    rest: list[str]


@functools.cache
def read(text: str) -> Rule:
    """Fails at every word that no form of the design has."""
    words, conditions, negated = shlex.split(text), [], False
    while words:
        word = words.pop(0)
        if word in ("-j", "-g"):
            return Rule(conditions, word == "-g", words[0], words[1:])
        if word == "!":
            negated = True
            continue
        known = {"-i", "-o", "-p", "-s", "-d", "-m", "--dport", "--comment", "--mode", "--probability", "--dst-type"}
        assert word in {*known, "--mark"}, text
        if word != "-m":
            conditions.append((negated, word, words[0]))
        words, negated = words[1:], False
    raise AssertionError(f"no target: {text}")


class Packet(NamedTuple):
    """What opens a connection to one of the host's own addresses; with `lo` the host itself sent it."""

    interface: str
    protocol: str
    source: str
    destination: str
    port: int


def covers(pattern: str, interface: str) -> bool:
    return interface.startswith(pattern[:-1]) if pattern.endswith("+") else interface == pattern


@functools.cache
def contains(network: str, host: str) -> bool:
    """Also for a mask that is not one of leading bits, like 0.0.0.5/0.0.0.63."""
    start, _, mask = network.partition("/")
    bits = ipaddress.ip_network(f"{start}/{mask}").netmask if mask.isdecimal() else address(mask)
    return int(address(host)) & int(bits) == int(address(start))


def holds(packet: Packet, option: str, value: str) -> bool:
    local = packet.interface == "lo"
    if option in ("-i", "-o"):  # in OUTPUT there is no -i, in PREROUTING no -o
        return (option == "-o") == local and covers(value, packet.interface)
    if option == "--dport":
        first, _, last = value.partition(":")
        return int(first) <= packet.port <= int(last or first)
    if option in ("-s", "-d"):
        return contains(value, packet.source if option == "-s" else packet.destination)
    return packet.protocol == value if option == "-p" else True


def fits(rule: Rule, packet: Packet) -> bool:
    return all(holds(packet, option, value) != negated for negated, option, value in rule.conditions)


def walk(nat: epok.Table, packet: Packet) -> list[str]:
    """The chains that the packet passes, the last one is its leaf; empty when it falls through."""
    hooks = nat.hooks.get("OUTPUT" if packet.interface == "lo" else "PREROUTING", [])
    path = [hook.target for hook in map(read, hooks)]
    while path:
        assert len(path) < 20, "chains in a circle"
        rule = next((rule for rule in map(read, nat.chains[path[-1]]) if fits(rule, packet)), None)
        if rule is None or rule.target == "RETURN":
            return []
        if rule.target == "CONNMARK":
            return path
        assert rule.goto, "a jump would go on with the next interface's rule"
        path.append(rule.target)
    return path


def outcome(nat: epok.Table, packet: Packet) -> tuple[str, list[str]] | None:
    """The mark that a packet's connection gets, and where it may go."""
    path = walk(nat, packet)
    if not path:
        return None
    mark, *nodes = map(read, nat.chains[path[-1]])
    assert all(node.target == "DNAT" for node in nodes)
    return mark.rest[1], [place(node.rest[1], packet.port) for node in nodes if fits(node, packet)]


def place(destination: str, port: int) -> str:
    """The address and port that --to-destination means for an external port."""
    address, _, ports = destination.rpartition(":")
    first, _, base = ports.partition("/")
    return f"{address}:{int(first.split('-')[0]) + port - int(base)}" if base else destination


def search(forwards: Sequence[epok.Forward], opts: epok.Options, packet: Packet) -> epok.Forward | None:
    """The one that a packet shall meet, by looking at one after the other."""
    here, client = address(packet.destination), address(packet.source)
    looped = packet.interface == "lo" and here.is_loopback
    ways = [i for i in opts.interfaces if (i == "lo" if packet.interface == "lo" else covers(i, packet.interface))]
    if looped or not ways or (opts.addresses and not any(here in network for network in opts.addresses)):
        return None
    for one in forwards:
        if one.protocol == packet.protocol and one.first <= packet.port <= one.last:
            stranger = one.sources is not None and not any(client in network for network in one.sources)
            shut = stranger or (one.internal and opts.external_interface in ways)
            return None if shut or not places(one, packet) else one
    return None


def places(one: epok.Forward, packet: Packet) -> list[str]:
    """The addresses and ports that a forward has for a packet."""
    version = address(packet.destination).version
    form = "[{}]:{}" if version == 6 else "{}:{}"
    return [
        form.format(t.address, t.port + packet.port - one.first) for t in one.targets if t.address.version == version
    ]


def check(nat: epok.Table, forwards: Sequence[epok.Forward], opts: epok.Options, packet: Packet) -> None:
    """The rules do with the packet what search() says."""
    seen, one = outcome(nat, packet), search(forwards, opts, packet)
    if one is None or seen is None:
        assert seen is one, packet
        return
    meant, both = places(one, packet), opts.mark.forwarded | opts.mark.masquerade
    assert seen[0] == f"{both if one.masquerade else opts.mark.forwarded:#x}/{both:#x}", packet
    if one.known:
        assert len(seen[1]) == 1 and seen[1][0] in meant, packet
    else:
        assert seen[1] == meant, packet


def edges(forwards: Sequence[epok.Forward]) -> list[int]:
    near = {end + step for one in forwards for end in (one.first, one.last) for step in (-1, 0, 1)}
    return sorted(port for port in near | {0, 65535} if 0 <= port <= 65535)


@FAMILIES
@given(forwards=plans(), opts=settings_of_a_host(), data=st.data())
def test_every_packet_meets_the_leaf_that_a_linear_search_finds(
    family: epok.Family, forwards: list[epok.Forward], opts: epok.Options, data: st.DataObject
) -> None:
    nat = epok.render(forwards, family, opts)["nat"]
    if "lo" not in opts.interfaces:
        assert nat.hooks["OUTPUT"] == []
    packets = st.builds(
        Packet,
        st.sampled_from(["eth0", "eth1", "eth0.7", "eth", "wg0", "wg01", "lo", "docker0"]),
        st.sampled_from(epok.PROTOCOLS),
        st.sampled_from(CLIENTS[family.version]),
        st.sampled_from(OWN[family.version]),
        st.sampled_from(edges(forwards)) | st.integers(0, 65535),
    )
    for packet in data.draw(st.lists(packets, min_size=10, max_size=40)):
        check(nat, forwards, opts, packet)


@pytest.mark.parametrize(
    "forwards",
    [
        [forward(1)],
        [forward(1, 65535, targets=targets(2, 1))],
        [forward(1), forward(65535)],
        [forward(8000, 8010), forward(8011), forward(8012, 8191), forward(8192)],
        [forward(8191, 8192), forward(16383, 16384), forward(24000, 41000)],
        [forward(port) for port in range(1, 1025)],
        spread(900, nodes=1),
    ],
    ids=["lowest", "all in one", "lowest and highest", "neighbours", "across blocks", "a full block", "anywhere"],
)  # fmt: skip
def test_each_of_all_65536_ports_is_forwarded_or_falls_through(forwards: list[epok.Forward]) -> None:
    nat = epok.render(forwards, V4, options())["nat"]
    own = {port: one for one in forwards for port in range(one.first, one.last + 1)}
    for port in range(65536):
        packet = Packet("eth0", "tcp", CLIENTS[4][0], OWN[4][0], port)
        check(nat, [own[port]] if port in own else [], options(), packet)


def jumps(table: epok.Table, chain: str) -> Iterator[str]:
    rules = table.chains[chain] if chain in table.chains else table.hooks[chain]
    return (rule.target for rule in map(read, rules) if rule.target.startswith("EPOK"))


@FAMILIES
@given(forwards=plans(), opts=settings_of_a_host())
def test_rules_lead_to_every_chain_and_to_no_other(
    family: epok.Family, forwards: list[epok.Forward], opts: epok.Options
) -> None:
    for table in epok.render(forwards, family, opts).values():
        todo, reached = list(table.hooks), set[str]()
        while todo:
            found = set(jumps(table, todo.pop())) - reached
            reached |= found
            todo += found
        assert reached == set(table.chains)
        assert all(len(name) <= 28 and re.fullmatch(r"EPOK(-[A-Za-z0-9-]+)?", name) for name in table.chains)


@FAMILIES
@given(forwards=plans(), opts=settings_of_a_host())
def test_no_rule_can_end_early_or_vanish_from_iptables_save(
    family: epok.Family, forwards: list[epok.Forward], opts: epok.Options
) -> None:
    for table in epok.render(forwards, family, opts).values():
        for rule in itertools.chain(*table.chains.values(), *table.hooks.values()):
            bare = re.sub(r' --comment "[A-Za-z0-9_.:/ -]+ [A-Za-z0-9_.:/ -]+" ', " ", rule)
            assert re.fullmatch(r"[!A-Za-z0-9_.:/@+\[\] -]+", bare), rule
            assert not re.search(r"-[io] \+( |$)|/0( |$)|--dport 0:|  ", bare), rule


@pytest.mark.parametrize("bad", ['"', "'", "\\", "\n", "\r", "\0", "\x1b", "$", ";", "`", "é", "\u0663", "\u2028"])
@pytest.mark.parametrize("where", ["service", "port"])
def test_a_name_that_cannot_stand_in_a_comment_stops_the_run(where: str, bad: str) -> None:
    with pytest.raises(epok.Fatal):
        epok.render([forward(25, **{where: f"default/mail{bad}"})], V4, options())


def test_names_as_long_as_they_may_be_leave_a_comment_that_iptables_keeps_whole() -> None:
    long = forward(25, 26, service=f"{'n' * 63}/{'s' * 63}", port=f"{'a' * 63}-{'b' * 63}", direct=True)
    nat = epok.render([long], V4, options())["nat"]
    [comment] = re.findall('--comment "(.*?)"', "\n".join(itertools.chain(*nat.chains.values())))
    assert len(comment) <= 255
    assert [live.service for live in epok.forwards_in({"nat": nat}, 4).values()] == [long.service]


HOSTILE = {
    "a huge port": '-p tcp -m tcp --dport %s -m comment --comment "default/mail smtp" -g X' % ("9" * 5000),
    "a range without end": '-p udp -m udp --dport 1:9999999999 -m comment --comment "default/mail smtp" -g X',
    "a path": '-p tcp -m tcp --dport 25 -m comment --comment "default/../../x?y smtp" -g X',
    "a selector": '-p tcp -m tcp --dport 25 -m comment --comment "default/mail,metadata.name=x smtp" -g X',
    "no UTF-8": '-p tcp -m tcp --dport 25 -m comment --comment "default/m\udcff smtp" -g X',
}


@pytest.mark.parametrize("rule", HOSTILE.values(), ids=HOSTILE)
def test_what_a_host_says_that_epok_never_wrote_is_no_forward(rule: str) -> None:
    assert not epok.forwards_in({"nat": epok.Table({"EPOK": [rule], "X": []})}, 4)


def test_a_rule_without_words_in_a_leaf_is_no_trouble() -> None:
    nat = epok.render([forward(25, sources=networks(["192.0.2.0/24"]))], V4, options())["nat"]
    chains = {name: ["", *rules] if name.startswith("EPOK-tcp-") else rules for name, rules in nat.chains.items()}
    [live] = epok.forwards_in({"nat": epok.Table(chains)}, 4).values()
    assert "for 192.0.2.0/24 only" in live.text


@pytest.mark.parametrize("count", [999, 1001, 15_000])
def test_however_many_networks_a_client_meets_few_chains_and_is_let_in_if_it_is_in_one_of_them(count: int) -> None:
    """The kernel takes no more than 16 chains in a row, those of ports included; networks may be within others."""
    draw = random.Random(count)
    first = [draw.choice([7, 1 << 24 | draw.getrandbits(20), draw.getrandbits(32)]) for _ in range(count)]
    some = [ipaddress.ip_network((number, draw.choice([20, 24, 32])), strict=False) for number in first]
    some.append(ipaddress.ip_network("1.0.0.0/9"))
    nat = epok.render([forward(25, sources=some)], V4, options())["nat"]
    [live] = epok.forwards_in({"nat": nat}, 4).values()
    guards = {name: list(map(epok.GUARD.fullmatch, rules)) for name, rules in nat.chains.items()}

    def lets_in(address: int, chain: str, depth: int = 0) -> bool:
        assert depth < 4
        if None in guards[chain]:
            return True
        client = ipaddress.ip_address(address)
        jumps = (match.groups() for match in guards[chain] if match)
        fitting = (target for source, target in jumps if client in ipaddress.ip_network(source))
        target = next(fitting, None)
        return bool(target) and lets_in(address, target, depth + 1)

    assert max(len(rules) for rules in nat.chains.values()) <= epok.CHAIN_SOURCES
    assert {ipaddress.ip_network(text) for text in live.sources} <= set(some)
    for address in (*first[:40], *(number + 300 for number in first[:40]), *(draw.getrandbits(32) for _ in range(20))):
        expected = any(ipaddress.ip_address(address % 2**32) in network for network in some)
        assert lets_in(address % 2**32, live.chain) == expected


@FAMILIES
@given(forwards=plans(), opts=settings_of_a_host(), seed=st.integers(0, 999))
def test_the_order_of_forwards_and_of_their_rendering_does_not_matter(
    family: epok.Family, forwards: list[epok.Forward], opts: epok.Options, seed: int
) -> None:
    rendered = epok.render(forwards, family, opts)
    shuffled = random.Random(seed).sample(forwards, len(forwards))
    assert epok.render(forwards, family, opts) == rendered
    assert epok.render(shuffled, family, opts) == rendered


CHANGES = {
    "comes": lambda one, port: [one, forward(port, targets=one.targets, service="default/a-new-service")],
    "goes": lambda one, port: [],
    "has another NodePort": lambda one, port: [dataclasses.replace(one, targets=targets(10, 31999))],
}


@pytest.mark.parametrize("layout", ["anywhere", "in a row", "in a row, IPv6"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_forward_of_2700_changes_its_path_alone_and_takes_less_than_6_kb(
    layout: str, change: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    family, net = (V6, "2001:db8:2::11") if "IPv6" in layout else (V4, "10.0.1.0")
    before = spread(2700, net=net)
    if layout != "anywhere":
        before = [dataclasses.replace(one, first=10000 + n, last=10000 + n) for n, one in enumerate(before)]
    old = epok.render(before, family, options())
    free = [12700] if layout != "anywhere" else sorted(set(range(1, 65536)) - {one.first for one in before})
    sizes, counts = [], []
    for n in random.Random(2).sample(range(2700), 5):
        port = random.Random(n).choice(free)
        changed = CHANGES[change](before[n], port)
        if "IPv6" in layout and change.startswith("has"):
            changed = [dataclasses.replace(before[n], targets=targets(10, 31999, net))]
        new = epok.render([*before[:n], *changed, *before[n + 1 :]], family, options())
        packet = Packet(
            "eth0",
            "tcp",
            CLIENTS[family.version][0],
            OWN[family.version][0],
            port if len(changed) > 1 else before[n].first,
        )
        sent = set(new["nat"].chains) - set(old["nat"].chains)
        gone = set(old["nat"].chains) - set(new["nat"].chains)
        if changed:
            assert sent == set(walk(new["nat"], packet)) - {epok.ROOT}
        if len(changed) < 2:
            assert gone == set(walk(old["nat"], packet)) - {epok.ROOT}
        assert len(sent) <= 8 and len(gone) <= 8
        sizes.append(len("".join(epok.restore_inputs(new, old, 10**9))))
        counts.append(len(sent))
    with capsys.disabled():
        print(
            f"\n  2,700 forwards {layout}, one {change}: {min(sizes)} to {max(sizes)} bytes, {max(counts)} new chains"
        )
    assert max(sizes) <= 6000


@FAMILIES
def test_no_port_takes_more_than_a_few_dozen_rules(family: epok.Family) -> None:
    net = NET[family.version]
    for forwards in (spread(10000, 1, net=net), [forward(p, targets=targets(1, net=net)) for p in range(1, 10001)]):
        nat = epok.render(forwards, family, options())["nat"]
        worst = 0
        for one in forwards:
            packet = Packet("eth0", "tcp", CLIENTS[family.version][0], OWN[family.version][0], one.first)
            worst = max(worst, sum(len(nat.chains[chain]) for chain in walk(nat, packet)))
        assert worst <= 45


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 100, 255, 1000])
def test_each_node_is_as_likely_as_the_others(count: int) -> None:
    rules = epok.render([forward(25, targets=targets(count))], V4, options())["nat"].chains
    leaf = next(rules for name, rules in rules.items() if name.startswith("EPOK-tcp-25-") and len(rules) == count + 1)
    chances = [re.findall(r" -m statistic --mode random --probability (0\.\d{11}) ", rule) for rule in leaf[1:]]
    assert [len(found) for found in chances] == [1] * (count - 1) + [0]
    left, shares = 1.0, []
    for found in chances:
        chance = float(found[0]) if found else 1.0
        shares.append(left * chance)
        left *= 1 - chance
    assert all(math.isclose(share, 1 / count, rel_tol=1e-5) for share in shares)


@FAMILIES
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 100])
def test_with_client_affinity_every_address_has_one_node_and_the_nodes_as_many_addresses(
    family: epok.Family, count: int
) -> None:
    nodes = targets(count, net=NET[family.version])
    before = homes(nodes, family)
    loads = [before.count(node) for node in set(before)]
    assert len(loads) == count and max(loads) <= min(loads) + 1
    if count > 1:
        gone, after = homes(nodes[:1], family)[0], homes(nodes[1:], family)
        after *= len(before) // len(after)
        moved = [old for old, new in zip(before, after, strict=True) if old not in (new, gone)]
        assert len(moved) <= len(before) / 4, "few clients of the nodes that stay are sent elsewhere"


def homes(nodes: Sequence[epok.Target], family: epok.Family) -> list[str]:
    """For each value that the low bits of a client's address can have, where it is sent, whatever its first bit is."""
    one = forward(25, targets=tuple(nodes), known=tuple(node.address for node in nodes))
    nat = epok.render([one], family, options())["nat"]
    leaf = [read(rule) for rules in nat.chains.values() for rule in rules if "DNAT" in rule]
    if len(nodes) == 1:
        return [leaf[0].rest[1]]
    parts = [value.split("/") for rule in leaf for _, option, value in rule.conditions if option == "-s"]
    count, first = len(leaf) // 2, 1 << address(parts[0][0]).max_prefixlen - 1
    assert [int(address(low)) for low, _ in parts] == [bit + low for low in range(count) for bit in (0, first)]
    assert {int(address(mask)) for _, mask in parts} == {first + count - 1} and count.bit_count() == 1
    assert [rule.rest[1] for rule in leaf[::2]] == [rule.rest[1] for rule in leaf[1::2]]
    return [rule.rest[1] for rule in leaf[::2]]


@FAMILIES
@pytest.mark.parametrize(
    ("sources", "chains"), [(None, 3), (["0.0.0.0/0", "::/0"], 3), (SOURCES[:3] + SOURCES[4:6], 4)]
)
def test_a_leaf_has_one_rule_for_each_node_and_a_gate_one_for_each_source(
    family: epok.Family, sources: list[str] | None, chains: int
) -> None:
    net = NET[family.version]
    one = forward(25, targets=targets(7, net=net), sources=None if sources is None else networks(sources))
    nat = epok.render([one], family, options())["nat"]
    named = {name: rules for name, rules in nat.chains.items() if name not in (epok.ROOT, epok.POSTROUTING)}
    assert len(named) == chains - 1
    leaves = [rules for rules in named.values() if "CONNMARK" in rules[0]]
    assert [len(rules) for rules in leaves] == [8]
    gates = [rules for rules in named.values() if rules[0].startswith("-s ")]
    own = [n for n in one.sources or () if n.version == family.version]
    assert [len(rules) for rules in gates] == ([len(own)] if chains == 4 else [])


@pytest.mark.parametrize(
    ("first", "last", "destination"),
    [(25, 25, "10.0.1.0:30000"), (8000, 8010, "10.0.1.0:30000-30010/8000"), (1, 65535, "10.0.1.0:1-65535/1")],
)
def test_a_range_is_one_leaf_with_a_shifted_range(first: int, last: int, destination: str) -> None:
    port = int(destination.split(":")[1].split("-")[0])
    nat = epok.render([forward(first, last, targets=targets(1, port))], V4, options())["nat"]
    assert [rule for rules in nat.chains.values() for rule in rules if "DNAT" in rule] == [
        f"-p tcp -j DNAT --to-destination {destination}"
    ]


@FAMILIES
@pytest.mark.parametrize(
    ("names", "external", "addresses", "starts"),
    [
        (["eth0"], "", [], ["-i eth0 {}"]),
        (["eth0"], "eth0", [], ["-i eth0 {}"]),
        (["eth+", "eth0"], "eth0", [], ["-i eth0 {}", "-i eth0 -j RETURN", "-i eth+ {}"]),
        (["lo"], "", [], ["! -d LOOPBACK -o lo {}"]),
        (["lo", "eth0"], "lo", [], ["! -d LOOPBACK -o lo {}", "-o lo -j RETURN", "-i eth0 {}"]),
        (["eth0"], "", ["OWN"], ["-d OWN -i eth0 {}"]),
        (["eth0"], "", ["OTHER FAMILY"], []),
        (["eth0", "lo"], "", ["ALL"], ["-i eth0 {}", "! -d LOOPBACK -o lo {}"]),
        (["eth0", "lo"], "", ["LOOPBACK"], ["-d LOOPBACK -i eth0 {}"]),
        (["lo"], "", ["AROUND"], ["-d BESIDE -o lo {}"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else value,
)
def test_epok_begins_with_one_rule_for_each_way_in(
    family: epok.Family, names: list[str], external: str, addresses: list[str], starts: list[str]
) -> None:
    words = {
        4: {"LOOPBACK": "127.0.0.0/8", "OWN": "192.0.2.1/32", "OTHER FAMILY": "2001:db8::/64", "ALL": "0.0.0.0/0",
            "AROUND": "126.0.0.0/7", "BESIDE": "126.0.0.0/8"},
        6: {"LOOPBACK": "::1/128", "OWN": "2001:db8::1/128", "OTHER FAMILY": "192.0.2.0/24", "ALL": "::/0",
            "AROUND": "::/127", "BESIDE": "::/128"},
    }[family.version]  # fmt: skip
    net = NET[family.version]
    opts = options(*names, external=external, addresses=[words[name] for name in addresses])
    nat = epok.render([forward(25, targets=targets(net=net))], family, opts)["nat"]
    meant = [re.sub("[A-Z]{3,}( [A-Z]+)?", lambda found: words.get(found[0], found[0]), start) for start in starts]
    seen = [re.sub(r"-p tcp -g EPOK-tcp-25-25-[0-9a-f]{6}$", "{}", rule) for rule in nat.chains[epok.ROOT]]
    assert seen == meant


@FAMILIES
def test_without_forwards_of_the_family_the_hooks_and_an_empty_epok_remain(family: epok.Family) -> None:
    other = targets(net="fd00::" if family is V4 else "10.0.1.0")
    tables = epok.render([forward(25, targets=other)], family, options("eth0", "lo"))
    assert tables == epok.render([], family, options("eth0", "lo"))
    assert tables["nat"].chains == {epok.ROOT: [], epok.POSTROUTING: tables["nat"].chains[epok.POSTROUTING]}
    assert all(tables["nat"].hooks.values())


@pytest.mark.parametrize("mark", ["0x30000000", "0x3", "0x80000001"])
def test_the_mark_is_in_the_leaves_and_in_both_constant_chains(mark: str) -> None:
    low, high = epok.to_mark(mark)
    tables = epok.render([forward(25), forward(26, masquerade=False)], V4, options(mark=epok.to_mark(mark)))
    rules = [rule for table in tables.values() for chain in table.chains.values() for rule in chain]
    assert [rule for rule in rules if "mark" in rule.lower()] == [
        f"-m connmark --mark {low:#x}/{low:#x} -j ACCEPT",
        f"-j CONNMARK --set-xmark {low | high:#x}/{low | high:#x}",
        f"-j CONNMARK --set-xmark {low:#x}/{low | high:#x}",
        f"-m connmark --mark {high:#x}/{high:#x} -j MASQUERADE --random-fully",
    ]
