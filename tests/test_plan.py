"""A snapshot of the cluster to forwards and to reasons why not."""

import itertools
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import epok
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, slice_port, snapshot

EXCLUDE = "node.kubernetes.io/exclude-from-external-load-balancers"
ALLOW = "epok.getbetter.ro/allow-range"
LOCAL = ("-i", "eth0", "local")
NODE = node("n1", "10.0.0.11")
# One Service with everything that a mapping can mean.
PORTS = [
    port(25, 2025, "smtp"),
    port(53, 30053, "dns"), port(53, 30053, "dns-udp", "UDP"),
    port(123, 30123, "ntp", "UDP"),
    port(132, 30132, "diameter", "SCTP"),
    port(8000, 30000, "web0"), port(8001, 30001, "web1"), port(8002, 30002, "web2"), port(8003, 30300, "web3"),
    port(9000, 31000, "mix0"), port(9000, 31000, "mix0-udp", "UDP"), port(9001, 31001, "mix1"),
    port(7000, 32000, "split"), port(7000, 32001, "split-udp", "UDP"),
]  # fmt: skip


def planned(*objects: Object, argv: Sequence[str] = LOCAL, own: Sequence[str] = (), login_port: int = 0) -> epok.Plan:
    """The plan for a cluster of these objects, with one good node when they name none; `own` nodes are the host."""
    return planned_for(*objects, argv=argv, own=own, login_port=login_port)[0]


def planned_for(
    *objects: Object, argv: Sequence[str] = LOCAL, own: Sequence[str] = (), login_port: int = 0
) -> tuple[epok.Plan, list[epok.Service]]:
    """And the Services of epok's class."""
    nodes = [] if any(item["kind"] == "Node" for item in objects) else [NODE]
    options, reader = reader_of(*objects, *nodes, argv=argv)
    read = reader.with_endpoints(reader.snapshot(), bool(own))
    plan = epok.make_plan(read, options, frozenset(own), login_port)
    return plan, [each for each in read.services if each.balanced]


def reader_of(*objects: Object, argv: Sequence[str] = LOCAL) -> tuple[epok.Options, epok.Reader]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(snapshot(*objects), file)
        file.flush()
        options = epok.parse_options(["--snapshot", file.name, *argv], {})
        return options, epok.Reader(options, epok.Deadline(50))


def span(first: int, size: int) -> str:
    return f"{first}-{first + size}" if size else f"{first}"


def forwards(plan: epok.Plan) -> list[str]:
    """Like "tcp 8000-8010 mail 30000-30010", mail being the Service's name without namespace."""
    return sorted(
        f"{made.protocol} {span(made.first, size)} {made.service.removeprefix('default/')} {span(node_port, size)}"
        for made in plan.forwards
        for size in [made.last - made.first]
        for node_port in {target.port for target in made.targets}
    )


def every_port(plan: epok.Plan) -> list[tuple[str, int, str, int]]:
    """(protocol, external port, Service, NodePort) of each single external port."""
    return [
        (made.protocol, made.first + n, made.service, node_port + n)
        for made in plan.forwards
        for n in range(made.last - made.first + 1)
        for node_port in sorted({target.port for target in made.targets})
    ]


def addresses(plan: epok.Plan) -> list[str]:
    """Where all the forwards go; checks that it is the same for each."""
    found = [[str(target.address) for target in made.targets] for made in plan.forwards]
    assert all(each == found[0] for each in found)
    return found[0] if found else []


def reasons(plan: epok.Plan) -> list[str]:
    return [str(rejection) for rejection in plan.rejections]


def mapped(annotation: str, **kw: Any) -> epok.Plan:
    return planned(service("all", annotation, PORTS, **kw))


# ------------------------------------------------ annotations

GRAMMAR = {
    "25:2025": ["tcp 25 all 2025"],
    "26:2025": ["tcp 26 all 2025"],
    "1:2025, 65535:2025": ["tcp 1 all 2025", "tcp 65535 all 2025"],
    "26:smtp": ["tcp 26 all 2025"],
    "25": ["tcp 25 all 2025"],
    "25:2025:tcp": ["tcp 25 all 2025"],
    "25:2025/tcp": ["tcp 25 all 2025"],
    "25:2025/TCP": ["tcp 25 all 2025"],
    "25:smtp:Tcp": ["tcp 25 all 2025"],
    "25:tcp": ["tcp 25 all 2025"],
    "25/tcp": ["tcp 25 all 2025"],
    "53": ["tcp 53 all 30053", "udp 53 all 30053"],
    "5353:30053": ["tcp 5353 all 30053", "udp 5353 all 30053"],
    "5353:30053:udp": ["udp 5353 all 30053"],
    "5353:30053/tcp": ["tcp 5353 all 30053"],
    "53/udp": ["udp 53 all 30053"],
    "53:udp": ["udp 53 all 30053"],
    "53:dns": ["tcp 53 all 30053"],
    "53:dns-udp": ["udp 53 all 30053"],
    "53:dns-udp/udp": ["udp 53 all 30053"],
    "123:30123": ["udp 123 all 30123"],
    "124:ntp": ["udp 124 all 30123"],
    "132": ["sctp 132 all 30132"],
    "133:diameter/SCTP": ["sctp 133 all 30132"],
    "132:30132:sctp": ["sctp 132 all 30132"],
    "7000": ["tcp 7000 all 32000", "udp 7000 all 32001"],
    "7:32001": ["udp 7 all 32001"],
    "80-82:30000-30002": ["tcp 80-82 all 30000-30002"],
    "80-82:30000-30002/tcp": ["tcp 80-82 all 30000-30002"],
    "80-82:30000-30002:tcp": ["tcp 80-82 all 30000-30002"],
    "80-80:30000-30000": ["tcp 80 all 30000"],
    "80:30000-30000": ["tcp 80 all 30000"],
    "8000-8002": ["tcp 8000-8002 all 30000-30002"],
    "8000-8003": ["tcp 8000-8002 all 30000-30002", "tcp 8003 all 30300"],
    "8001-8002:tcp": ["tcp 8001-8002 all 30001-30002"],
    "9000-9001": ["tcp 9000-9001 all 31000-31001", "udp 9000 all 31000"],
    "90-91:31000-31001": ["tcp 90-91 all 31000-31001", "udp 90 all 31000"],
    "80:30000,81:30001": ["tcp 80-81 all 30000-30001"],
    "81:web1, 80:web0": ["tcp 80-81 all 30000-30001"],
    "80:30001,81:30000": ["tcp 80 all 30001", "tcp 81 all 30000"],
    "80:30000,82:30001": ["tcp 80 all 30000", "tcp 82 all 30001"],
    "80:30000,81:30000": ["tcp 80 all 30000", "tcp 81 all 30000"],
    "25:2025,25:2025": ["tcp 25 all 2025"],
    "25:2025,25:smtp/tcp,25": ["tcp 25 all 2025"],
    "53,53/udp,53:dns": ["tcp 53 all 30053", "udp 53 all 30053"],
    "80-82:30000-30002,81:web1": ["tcp 80-82 all 30000-30002"],
    "25 : 2025 / tcp": ["tcp 25 all 2025"],
    "\n  25:2025,\r\n\t80 - 82 : 30000 - 30002 : tcp\n": ["tcp 25 all 2025", "tcp 80-82 all 30000-30002"],
    ",,25:2025,,": ["tcp 25 all 2025"],
    "": [],
    " , ,\n": [],
}


@pytest.mark.parametrize("annotation", GRAMMAR, ids=ascii)
def test_what_an_annotation_means(annotation: str) -> None:
    plan = mapped(annotation)
    assert (forwards(plan), reasons(plan), plan.warnings) == (GRAMMAR[annotation], [], [])


MALFORMED = {  # what the reason says, and what somebody wrote
    "1 to 65535": [
        "0", "0:2025", "25:0", "65536:2025", "25:65536", "0-2:30000-30002", "65535-65536",
        "9" * 5_000, "25:" + "9" * 5_000, "1-" + "9" * 5_000],
    "tcp, udp": [
        "25/", "25:2025/", "25/icmp", "25:2025/6", "25:2025/tcp+udp", "25:2025/ tcp udp", "25/tcp/udp", "25/tcp:2025",
        "25:2025:tcp/udp/", "25:2025/tc\u212a", "25:2025/\uff54cp", "25:2025/tcp\x00", "25:2025/dccp"],
    "": [
        # characters
        "25:20\n25", "25:20\t25", "25:2025\x00", "\x0025:2025", "25:20\x0025", "25:2025\x1b[2J", "\x0b25:2025",
        "25:2025\x0c", "25:2025\x7f", "25:2025\u2028", "25:2025\u0085", "25:2025\xa0", "25:2025\u200b", "\ufeff25:2025",
        "\u0662\u0665:2025", "25:\u0662\u0660\u0662\u0665", "\uff12\uff15:2025", "2\u2075:2025", "25\uff1a2025",
        "25\u20132026", "80\u201382:30000-30002", '"25:2025"', "'25:2025'", "`25`", "25:2025\\", "\\25", '25:2025"',
        "$(reboot)", "-j ACCEPT", "25:2025 -j ACCEPT", "25 2025", "25;2025", "25=2025", "25->2025", "*:25",
        # words
        "x", "smtp", "smtp:2025", "tcp", "25:smtp_x", "25:smtp.", "25:smt p", "25:" + "x" * 10_000, "x" * 10_000,
        "\u00e9" * 10_000, ":" * 10_000, "-" * 10_000, "10.0.0.1:25:2025", "[::1]:25", "25:10.0.0.1", "http://25",
        # numbers
        "-25:2025", "25:-2025", "+25:2025", "2.5e1", "25.0:2025", "0x19:2025", "2_5:2025", "025:2025", "25:02025",
        "00025", "000025:2025", "0" * 5_000 + "25:2025",
        # ranges
        "82-80", "82-80:30002-30000", "82-80:30000-30002", "80-82:30002-30000", "80-81:30000-30002",
        "80-83:30000-30002", "80-82:30000", "80:30000-30002", "80-82:web0", "80-:30000", "-82", "80--82", "80-81-82",
        "80-82:30000-", "-",
        # parts
        "25:", "25::", "25::tcp", "25:/tcp", ":", ":2025", ":tcp", "/", "/tcp", "25:2025:", "25:2025:2025", "25:2025:x",
        "25::2025", "25:2025:icmp", "25:2025:tcp:udp", "25:2025:tcp/udp", "25:tcp/udp", "25:tcp:udp"],
}  # fmt: skip
MALFORMED_ITEMS = [(text, fragment) for fragment, texts in MALFORMED.items() for text in texts]


@pytest.mark.parametrize(("text", "fragment"), MALFORMED_ITEMS, ids=lambda text: ascii(text)[:40])
def test_a_malformed_mapping_is_rejected_with_a_reason_and_nothing_else_is(text: str, fragment: str) -> None:
    plan = planned(service("all", f"26:2025,{text},53/udp", PORTS), service("web", "80", [port(80, 30080)]))
    assert forwards(plan) == ["tcp 26 all 2025", "tcp 80 web 30080", "udp 53 all 30053"]
    assert [(each.service, each.mapping) for each in plan.rejections] == [("default/all", text)]
    line = str(plan.rejections[0])
    assert re.fullmatch("default/all: [ -~]{10,700}", line), "one line that a person can read"
    assert json.dumps(text[:100])[:-1] in line, "the mapping, escaped and cut"
    assert len(plan.rejections[0].reason) > 10
    assert fragment in plan.rejections[0].reason


@pytest.mark.parametrize(("text", "fragments"), [
    ("25:smpt", ["smpt", "smtp"]),
    ("25:SMTP", ["SMTP", "smtp"]),
    ("25:2026", ["2026", "2025"]),
    ("26", ["26", "2025"]),
    ("25/udp", ["udp", "2025"]),
    ("25:smtp/udp", ["udp", "2025"]),
    ("25:2025:sctp", ["sctp", "2025"]),
    ("123/tcp", ["tcp", "30123"]),
    ("7:32001/tcp", ["tcp", "32001"]),
    ("25:25", ["25", "2025"]),
    ("25:22", ["22", "2025"]),
    ("25:6443", ["6443", "2025"]),
    ("25:30080", ["30080", "2025"]),
    ("25:30099", ["30099", "2025"]),
    ("25:30025", ["30025", "2025"]),
    ("80-83:30000-30003", ["30003", "30000"]),
    ("8001-8004", ["8004", "30001"]),
    ("90-91:31000-31001/udp", ["31001", "udp"]),
    ("30000-32767:30000-32767", ["30003", "30000"]),
    ("1-65535:1-65535", ["NodePort 1;", "30000"]),
])  # fmt: skip
def test_a_target_is_a_node_port_of_that_very_service_or_nothing(text: str, fragments: list[str]) -> None:
    """30080 is another Service's, 30099 the health check's, 30025 a targetPort, 22 and 6443 the node's own."""
    ports = [*PORTS, port(10, 30010, "x", target=30025)]
    made = service("all", f"53,{text}", ports, healthCheckNodePort=30099)
    plan = planned(made, service("web", "80", [port(80, 30080)]))
    assert forwards(plan) == ["tcp 53 all 30053", "tcp 80 web 30080", "udp 53 all 30053"]
    assert [each.mapping for each in plan.rejections] == [text]
    for fragment in fragments:
        assert fragment in plan.rejections[0].reason


KEYS = ["getbetter.ro/externalport", "epok.getbetter.ro/externalport", "epok.getbetter.ro/externalports"]
PREFIXES = ["getbetter.ro", "epok.getbetter.ro"]


@pytest.mark.parametrize("key", [*KEYS, "getbetter.ro/externalports"])
def test_each_annotation_name_counts(key: str) -> None:
    assert forwards(mapped("", annotations={key: "25:2025"})) == ["tcp 25 all 2025"]


def test_annotation_names_are_joined() -> None:
    plan = mapped("", annotations=dict(zip(KEYS, ["25,nonsense", "25:2025, 26:smtp,nonsense", "53/udp"], strict=True)))
    assert forwards(plan) == ["tcp 25 all 2025", "tcp 26 all 2025", "udp 53 all 30053"]
    assert [each.mapping for each in plan.rejections] == ["nonsense"]


@pytest.mark.parametrize("key", ["externalport", "example.getbetter.ro/externalport", "getbetter.ro/ExternalPort"])
def test_other_annotations_mean_nothing(key: str) -> None:
    plan = planned(service("all", None, PORTS, annotations={key: "25:2025"}), service("bare", None, PORTS))
    assert (plan.forwards, plan.rejections, plan.warnings) == ([], [], [])


def test_a_name_or_port_of_several_ports_means_all_that_have_it() -> None:
    unnamed = [port(53, 30001), port(53, 30002, protocol="UDP")]
    assert forwards(planned(service("dns", "53,54:30002", unnamed))) == [
        "tcp 53 dns 30001",
        "udp 53 dns 30002",
        "udp 54 dns 30002",
    ]


# ------------------------------------------------ Services


@pytest.mark.parametrize(("kind", "made", "fragment"), [
    ("ClusterIP", service("mail", "25:2025", [port(25)], type="ClusterIP"), "ClusterIP"),
    ("ClusterIP that kept its NodePort", service("mail", "25:2025", [port(25, 2025)], type="ClusterIP"), "ClusterIP"),
    ("headless", service("mail", "25:2025", [port(25)], type="ClusterIP", clusterIP="None"), "ClusterIP"),
    ("without type", service("mail", "25:2025", [port(25)], type=""), "NodePort"),
    ("ExternalName", service("mail", "25:2025", type="ExternalName", externalName="example.org"), "ExternalName"),
    ("LoadBalancer without NodePorts", service("mail", "25:2025", [port(25)], type="LoadBalancer",
                                               allocateLoadBalancerNodePorts=False), "NodePort"),
    ("the same by port", service("mail", "25", [port(25)], type="LoadBalancer"), "NodePort"),
    ("the same by name", service("mail", "25:smtp", [port(25, name="smtp")], type="LoadBalancer"), "NodePort"),
    ("NodePort of NodePort 0", service("mail", "25", [{**port(25), "nodePort": 0}]), "NodePort"),
    ("no ports", service("mail", "25"), "NodePort"),
])  # fmt: skip
def test_a_service_without_node_ports_has_its_mappings_rejected(kind: str, made: Object, fragment: str) -> None:
    plan = planned(made, service("web", "80", [port(80, 30080)]))
    assert forwards(plan) == ["tcp 80 web 30080"]
    assert [(each.service, each.mapping) for each in plan.rejections] == [
        ("default/mail", made["metadata"]["annotations"][KEYS[0]])
    ]
    assert fragment in plan.rejections[0].reason


def test_a_load_balancer_with_node_ports_is_forwarded() -> None:
    assert forwards(mapped("25", type="LoadBalancer")) == ["tcp 25 all 2025"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_restriction_counts_with_either_prefix(prefix: str) -> None:
    plan = mapped("25", annotations={f"{prefix}/internal": "", f"{prefix}/allow-range": "192.0.2.0/24"})
    assert (plan.warnings, plan.unknown, plan.rejections) == ([], [], [])
    assert [(made.internal, [*map(str, made.sources or ())]) for made in plan.forwards] == [(True, ["192.0.2.0/24"])]


def test_two_restrictions_that_differ_let_nobody_in() -> None:
    given = {"getbetter.ro/allow-range": "192.0.2.0/24", "epok.getbetter.ro/allow-range": "198.51.100.0/24"}
    plan = mapped("25", annotations=given)
    assert not plan.forwards
    assert all(name in plan.rejections[0].reason for name in given)
    assert mapped("25", annotations=dict.fromkeys(given, "192.0.2.0/24")).forwards


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("name", "meant"), [
    ("external-port", "externalport"), ("ExternalPort", "externalport"), ("externlports", "externalports"),
    ("port", "externalport"), ("external", "externalport"), ("timeout", "externalport"),
])  # fmt: skip
def test_an_annotation_that_is_none_is_warned_about_with_the_one_that_is_meant(
    prefix: str, name: str, meant: str
) -> None:
    plan = mapped("25", annotations={f"{prefix}/{name}": ""})
    assert forwards(plan) == ["tcp 25 all 2025"]
    assert [each.service for each in plan.unknown] == ["default/all"]
    assert f'"{prefix}/{name}"' in plan.unknown[0].reason
    assert f" {prefix}/{meant} " in plan.unknown[0].reason


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("name", "meant"), [
    ("intrenal", "internal"), ("Internal", "internal"), ("internal-only", "internal"), ("private", "internal"),
    ("allow-ranges", "allow-range"), ("allowRange", "allow-range"), ("allow_range", "allow-range"),
    ("allowed", "allow-range"), ("source-ranges", "allow-range"), ("restrict", "allow-range"), ("", "allow-range"),
    ("internalport", "internal"), ("internal-ports", "internal"), ("externalport.internal", "internal"),
])  # fmt: skip
def test_a_restriction_that_may_be_misspelt_opens_nothing(prefix: str, name: str, meant: str) -> None:
    plan = mapped("25", annotations={f"{prefix}/{name}": "192.0.2.0/24"})
    assert not plan.forwards
    assert [each.mapping for each in plan.rejections] == [""]
    assert f'"{prefix}/{name}"' in plan.rejections[0].reason
    assert f" {prefix}/{meant} " in plan.rejections[0].reason


def test_a_service_that_takes_no_part_may_have_any_annotation() -> None:
    plan = planned(service("bare", None, PORTS, annotations={"epok.getbetter.ro/intrenal": ""}))
    assert (plan.warnings, plan.unknown, plan.rejections) == ([], [], [])


def test_more_unknown_annotations_than_anybody_needs_are_one_rejection() -> None:
    plan = mapped("25", annotations={f"getbetter.ro/externalport-{n}": "" for n in range(4000)})
    assert not plan.forwards
    assert not plan.unknown
    assert len(plan.rejections) == 1


@pytest.mark.parametrize(("annotations", "expected"), [
    ({}, False), ({"epok.getbetter.ro/internal": ""}, True), ({"epok.getbetter.ro/internal": "true"}, True),
    ({"epok.getbetter.ro/internal": "false"}, True), ({"getbetter.ro/internal": None}, True),
])  # fmt: skip
def test_internal_counts_when_present_whatever_its_value(annotations: Object, expected: bool) -> None:
    """Null too, as `internal:` is in YAML: the API server makes "" of it."""
    assert {made.internal for made in mapped("25,53", annotations=annotations).forwards} == {expected}


@pytest.mark.parametrize(("when", "policy", "expected"), [
    ("auto", "Cluster", True), ("auto", "Local", False), ("always", "Cluster", True), ("always", "Local", True),
    ("never", "Cluster", False), ("never", "Local", False),
])  # fmt: skip
def test_masquerade(when: str, policy: str, expected: bool) -> None:
    plan = planned(
        service("all", "25,53", PORTS, policy=policy),
        endpoint_slice("all", [endpoint("n1", "10.42.0.1")]),
        argv=(*LOCAL, "--masquerade", when),
    )
    assert {made.masquerade for made in plan.forwards} == {expected}


@pytest.mark.parametrize(("affinity", "expected"), [("None", False), ("ClientIP", True), (None, False)])
def test_session_affinity_is_kept(affinity: "str | None", expected: bool) -> None:
    assert {bool(made.known) for made in mapped("25,53", sessionAffinity=affinity).forwards} == {expected}


# ------------------------------------------------ who may use it

GOOD_RANGES = {
    "192.0.2.0/24": ["192.0.2.0/24"],
    " 192.0.2.0/24,\n2001:db8::/32 ": ["192.0.2.0/24", "2001:db8::/32"],
    "192.0.2.77/24": ["192.0.2.0/24"],
    "2001:db8::1/32": ["2001:db8::/32"],
    "192.0.2.77": ["192.0.2.77/32"],
    "2001:DB8:0::1": ["2001:db8::1/128"],
    "0.0.0.0/0": ["0.0.0.0/0"],
    "::/0,192.0.2.1/32": ["192.0.2.1/32", "::/0"],
    "192.0.2.0/255.255.255.0,10.9.8.7/255.0.0.0": ["10.0.0.0/8", "192.0.2.0/24"],
    "192.0.2.0/0.0.0.0": ["0.0.0.0/0"],
}


@pytest.mark.parametrize("text", GOOD_RANGES, ids=ascii)
def test_allowed_sources(text: str) -> None:
    for plan in (
        mapped("25,53", annotations={ALLOW: text}),
        mapped("25,53", loadBalancerSourceRanges=[part.strip() for part in text.split(",")]),
        mapped("25,53", annotations={ALLOW: text}, loadBalancerSourceRanges=["10.0.0.0/8"]),
    ):
        assert len(plan.forwards) == 3
        for made in plan.forwards:
            assert made.sources is not None
            assert sorted(map(str, made.sources)) == GOOD_RANGES[text]


@pytest.mark.parametrize("ranges", [None, []])
def test_without_ranges_everybody_may(ranges: "list[str] | None") -> None:
    assert [made.sources for made in mapped("25", loadBalancerSourceRanges=ranges).forwards] == [None]


BAD_RANGES = [
    "", " ", ",", "everybody", "192.0.2.0/24 198.51.100.0/24", "192.0.2.0/24;198.51.100.0/24", "192.0.2.0/33",
    "192.0.2.0/-1", "192.0.2/24", "192.0.2.0/24/24", "192.0.2.0/0.0.0.255", "192.0.2.0-192.0.2.9", "/0", "0/0",
    "::/129", "fe80::1%eth0", "2001:db8::1::/64", "!192.0.2.0/24", "192.0.2.0/24\n-j ACCEPT", "\u0661.0.0.0/8",
    "192.0.2.0/\u0662\u0664", "192.0.2.0/24\x00", "192.0.2.00/24", "192.0.2.0/24,nonsense", "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_RANGES, ids=lambda text: ascii(text)[:40])
def test_a_range_that_means_nothing_rejects_the_whole_service_and_leaves_its_ports_to_others(text: str) -> None:
    other = service("younger", "25", [port(25, 30025)], created="2025-01-01T00:00:00Z")
    annotated = service("all", "25,53", PORTS, annotations={ALLOW: text})
    both = service("all", "25,53", PORTS, annotations={ALLOW: text}, loadBalancerSourceRanges=["10.0.0.0/8"])
    listed = service("all", "25,53", PORTS, loadBalancerSourceRanges=[text])
    for made, source in ((annotated, "allow-range"), (both, "allow-range"), (listed, "loadBalancerSourceRanges")):
        plan = planned(made, other)
        assert forwards(plan) == ["tcp 25 younger 30025"]
        assert {(each.service, each.mapping) for each in plan.rejections} == {("default/all", "")}
        for line in reasons(plan):
            assert source in line
            assert re.fullmatch("[ -~]{20,700}", line)


# ------------------------------------------------ who wins a port

YEARS = ("2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z")


@pytest.mark.parametrize(("one", "two", "winner"), [
    (("a", "web", YEARS[1]), ("b", "web", YEARS[0]), "b/web"),
    (("z", "web", YEARS[0]), ("a", "web", YEARS[1]), "z/web"),
    (("b", "web", YEARS[0]), ("a", "web", YEARS[0]), "a/web"),
    (("a", "web2", YEARS[0]), ("a", "web1", YEARS[0]), "a/web1"),
    (("a", "web", None), ("b", "web", YEARS[1]), "b/web"),
    (("b", "web", None), ("a", "web", None), "a/web"),
    (("a", "web", "2024-01-01T00:00:01Z"), ("b", "web", "2024-01-01T00:00:00Z"), "b/web"),
])  # fmt: skip
def test_the_older_service_wins_then_the_name(one: Any, two: Any, winner: str) -> None:
    made = []
    for number, (namespace, name, created) in enumerate((one, two)):
        made.append(service(name, "80", [port(80, 30080 + number)], namespace=namespace, created=created))
        if created is None:
            del made[-1]["metadata"]["creationTimestamp"]
    loser = ({f"{one[0]}/{one[1]}", f"{two[0]}/{two[1]}"} - {winner}).pop()
    for order in (made, made[::-1]):
        plan = planned(*order)
        assert [each.service for each in plan.forwards] == [winner]
        assert [(each.service, each.mapping) for each in plan.rejections] == [(loser, "80")]
        assert winner in plan.rejections[0].reason


@pytest.mark.parametrize(("older", "younger", "expected", "lost"), [
    ("53/tcp", "53", ["tcp 53 a 30053", "udp 53 b 31053"], ["53"]),
    ("53/udp", "53/tcp", ["tcp 53 b 31053", "udp 53 a 30053"], []),
    ("53", "53", ["tcp 53 a 30053", "udp 53 a 30053"], ["53"]),
    ("81:30081", "80-82:31080-31082", ["tcp 80 b 31080", "tcp 81 a 30081", "tcp 82 b 31082"], ["81"]),
    ("81-82:30081-30082", "80-82:31080-31082", ["tcp 80 b 31080", "tcp 81-82 a 30081-30082"], ["81", "82"]),
    ("80-82:30080-30082", "81:31080", ["tcp 80-82 a 30080-30082"], ["81"]),
    ("80-81:30080-30081", "81-82:31081-31082", ["tcp 80-81 a 30080-30081", "tcp 82 b 31082"], ["81"]),
    ("nonsense,80:22", "80:31080", ["tcp 80 b 31080"], []),
])  # fmt: skip
def test_conflicts_are_settled_port_by_port_and_protocol_by_protocol(
    older: str, younger: str, expected: list[str], lost: list[str]
) -> None:
    plan = planned(dns_and_web("b", younger, 31000, YEARS[1]), dns_and_web("a", older, 30000, YEARS[0]))
    assert forwards(plan) == expected
    losses = [each.reason for each in plan.rejections if each.service == "default/b"]
    assert bool(losses) == bool(lost)
    assert all("default/a" in reason for reason in losses)
    assert re.findall(r"\b(?:53|8[0-2])\b", " ".join(losses)) == lost


def dns_and_web(name: str, annotation: str, base: int, created: str) -> Object:
    ports = [port(53, base + 53, "dns"), port(53, base + 53, "dns-udp", "UDP")]
    web = [port(n, base + n, f"web{n}") for n in (80, 81, 82)]
    return service(name, annotation, [*ports, *web], created=created)


def test_a_mapping_that_lost_one_of_its_protocols_is_told_which() -> None:
    plan = planned(dns_and_web("b", "53", 31000, YEARS[1]), dns_and_web("a", "53/tcp", 30000, YEARS[0]))
    assert ["tcp" in each.reason and "udp" not in each.reason for each in plan.rejections] == [True]


def many(name: str, annotation: str, base: int, step: int, created: str) -> Object:
    ports = [port(n, base + n, f"port-{n}") for n in range(1000, 2000, step)]
    return service(name, annotation, ports, created=created)


@pytest.mark.parametrize(("step", "younger"), [
    (1, "1000-1999"), (1, "1000-1999:30000-30999"), (2, "1000-1999"), (1, "smpt"), (1, "999"), (1, "25:port-999"),
    (1, "1000-2000"), (1, "1000/udp"),
])  # fmt: skip
def test_a_rejected_mapping_of_a_service_with_1000_ports_is_one_line_that_fits_into_an_event(
    step: int, younger: str
) -> None:
    """The API server takes no longer message than 1024 characters."""
    older = ",".join(str(n) for n in range(1000, 2000, step))
    plan = planned(many("b", younger, 29000, 1, YEARS[1]), many("a", older, 19000, step, YEARS[0]))
    assert len(plan.rejections) == 1
    assert len(str(plan.rejections[0])) <= 1024


def test_the_first_mapping_wins_inside_one_service() -> None:
    plan = mapped("80:30000, 80-81:30001-30002, 80:30053/udp, 80:30001")
    assert forwards(plan) == ["tcp 80 all 30000", "tcp 81 all 30002", "udp 80 all 30053"]
    assert [each.mapping for each in plan.rejections] == ["80-81:30001-30002", "80:30001"]
    assert all("default/all" in each.reason for each in plan.rejections)


@pytest.mark.parametrize(("argv", "annotation", "expected", "rejected"), [
    ("ssh -H a@h", "22:2025", [], 1),
    ("ssh -H a@h", "22:30053", ["udp 22 all 30053"], 1),
    ("ssh -H a@h", "22:30123", ["udp 22 all 30123"], 0),
    ("ssh -H a@h", "21-23:30000-30002", ["tcp 21 all 30000", "tcp 23 all 30002"], 1),
    ("--ports 22 ssh -H a@h", "22:2025", [], 1),
    ("ssh -H a@h:2222", "21:2025,2222:2025", ["tcp 21 all 2025"], 1),
    ("ssh -H a@h -p 2222 --ports 22-2222", "22:2025,2222:2025", ["tcp 22 all 2025"], 1),
    ("ssh -H a@h:2222,a@i -p 26", "24-26:30000-30002,2222:2025", ["tcp 24-25 all 30000-30001"], 2),
])  # fmt: skip
def test_the_port_that_epok_logs_in_by_is_never_taken(
    argv: str, annotation: str, expected: list[str], rejected: int
) -> None:
    plan = planned(service("all", annotation, PORTS), argv=["-i", "eth0", *argv.split()])
    assert forwards(plan) == expected
    assert len(plan.rejections) == rejected
    assert all("SSH" in each.reason for each in plan.rejections)


def test_of_a_host_behind_a_router_the_port_that_it_sees_is_not_taken_either() -> None:
    argv = ["-i", "eth0", "--ports", "1-65535", "ssh", "-H", "a@h:2222"]
    plan = planned(service("all", "22:2025,2022:2025,25:2025", PORTS), argv=argv, login_port=2022)
    assert forwards(plan) == ["tcp 22 all 2025", "tcp 25 all 2025"]
    assert reasons(plan) == [
        'default/all: "2022:2025": external port 2022 (tcp) is the host\'s own SSH port, kept for epok'
    ]


@pytest.mark.parametrize(("ports", "annotation", "expected", "refused"), [
    ("", "22:2025,22:30123,22:30132,25", ["sctp 22 all 30132", "tcp 25 all 2025", "udp 22 all 30123"], ["22 (tcp)"]),
    ("", "21-23:30000-30002", ["tcp 21 all 30000", "tcp 23 all 30002"], ["22 (tcp)"]),
    ("22", "22:2025,25", ["tcp 22 all 2025"], ["25 (tcp)"]),
    ("53/udp", "53", ["udp 53 all 30053"], ["53 (tcp)"]),
    ("53/UDP, 24 - 26 / tcp", "53,25", ["tcp 25 all 2025", "udp 53 all 30053"], ["53 (tcp)"]),
    ("8001-8002/tcp", "8000-8003", ["tcp 8001-8002 all 30001-30002"], ["8000, 8003 (tcp)"]),
    ("1-65535", "22:2025,65535:2025", ["tcp 22 all 2025", "tcp 65535 all 2025"], []),
])  # fmt: skip
def test_a_port_outside_of_those_that_services_may_take_is_rejected(
    ports: str, annotation: str, expected: list[str], refused: list[str]
) -> None:
    plan = planned(service("all", annotation, PORTS), argv=[*LOCAL, *(["--ports", ports] if ports else [])])
    assert forwards(plan) == expected
    assert re.findall(r"external port (\S.*) is not in --ports \(\S", " ".join(reasons(plan))) == refused


def test_that_a_port_is_taken_by_another_namespace_is_told_there_without_its_name() -> None:
    claims = [
        service("mail", "25", [port(25, 30025)], namespace="secret", created=YEARS[0]),
        service("mail", "25,25:30026", [port(25, 30025), port(26, 30026)], namespace="curious", created=YEARS[1]),
        service("web", "80:30080,80:30081", [port(80, 30080), port(81, 30081)], namespace="curious", created=YEARS[1]),
    ]
    plan = planned(*claims)
    assert sorted({each.reason.partition(" is ")[2] for each in plan.rejections}) == [
        "taken by curious/web", "taken by secret/mail"]  # fmt: skip
    told = {each.event("Rejected").message.partition(" is ")[2] for each in plan.rejections}
    assert told == {"taken by an older Service", "taken by another mapping of this Service"}
    assert "secret" not in repr([each.event("Rejected") for each in plan.rejections])


# ------------------------------------------------ how much


def webs_of(name: str, annotation: str, year: int, **annotations: str) -> Object:
    ports = [port(n, 30000 + n, f"p{n}") for n in range(80, 90, 2)]
    return service(name, annotation, ports, created=YEARS[year], annotations=annotations)


def test_older_services_get_the_rules_that_there_are_and_the_rest_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epok, "MAX_RULES", 40)
    networks = ",".join(f"10.0.{n}.0/24" for n in range(20))
    plan = planned(
        webs_of("z", "280:30080,282:30082,284:30084", 1),  # three rules each, and 8 are left
        webs_of("greedy", "180:30080, 182-182:30082", 1, **{ALLOW: networks}),  # 23 each: one fits
        webs_of("first", "80,82,84", 0),  # three each
    )
    assert forwards(plan) == [
        "tcp 180 greedy 30080", "tcp 280 z 30080", "tcp 282 z 30082",
        "tcp 80 first 30080", "tcp 82 first 30082", "tcp 84 first 30084"]  # fmt: skip
    assert [(each.service, each.mapping) for each in plan.rejections] == [
        ("default/greedy", "182-182:30082"), ("default/z", "284:30084")]  # fmt: skip
    why = "external port 182 (tcp) would take 23 rules, more than are left of 40 for IPv4"
    assert plan.rejections[0].reason == f"{why}, which older Services get first; ask for fewer ports or networks"


@given(st.data())
def test_what_all_services_may_ask_for_is_used_up_by_the_older_ones_however_pages_come(data: st.DataObject) -> None:
    days = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    made = [
        service(f"s{number}", f"{100 + number}:{20000 + number}", [port(80, 20000 + number)],
                created=f"2026-01-0{day}T00:00:00Z", annotations={"getbetter.ro/notes": "x" * 1000 * (number % 4)})
        for number, day in enumerate(days)
    ]  # fmt: skip
    read = epok.needed(epok.SERVICES, made)
    most = data.draw(st.integers(0, sum(each.size for each in read)))
    share = data.draw(st.integers(0, 5000))
    kept: list[epok.Service] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epok, "MAX_ASKED", most)
        patch.setattr(epok, "MAX_SHARE", share)
        for each in data.draw(st.permutations(read)):
            kept = epok.within_limit([*kept, each], whole="default/s0")
    modest = sorted((each for each in read if each.size <= share), key=lambda each: (each.created, each.key))
    sums = itertools.accumulate(each.size for each in modest)
    asking = {each.key for each, used in zip(modest, sums, strict=True) if used <= most}
    assert {each.key for each in kept} == {each.key for each in read}
    assert {each.key for each in kept if not each.beyond} == asking
    before = {each.key: each for each in read}
    for each in kept:
        if each.beyond and each.key != "default/s0":
            assert not (each.annotations or each.ports or each.source_ranges)
        else:
            assert each == before[each.key]


def aged(name: str, number: int, day: int, ports: Sequence[Object] = (), **kw: Any) -> Object:
    its = [port(80, 20000 + number), *ports]
    return service(name, f"{number}:{20000 + number}", its, created=f"2026-01-0{day}T00:00:00Z", **kw)


def test_a_service_that_there_is_no_room_for_is_rejected_and_the_older_ones_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = aged("zebra", 1, 1), aged("ape", 2, 2)
    size = epok.needed(epok.SERVICES, [old])[0].size
    assert planned(new, old).warnings == []
    monkeypatch.setattr(epok, "MAX_ASKED", size)
    plan = planned(new, old)
    assert forwards(plan) == ["tcp 1 zebra 20001"]
    [why] = reasons(plan)
    assert re.fullmatch(r"default/ape: finds no room left in the \d+ MiB of memory for what all Services .*", why)
    [warning] = plan.warnings
    assert "1 Service finds no room left" in warning and warning.endswith(
        "fewer ports or networks: default/zebra (1 KiB)"
    )


@pytest.mark.parametrize("hog", [
    {"loadBalancerSourceRanges": [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32" for n in range(150_000)]},
    {"annotations": {"getbetter.ro/notes": "x" * (1 << 21)}},
    {"ports": [port(1 + n, name=f"port-{n}") for n in range(8000)]},
], ids=["source ranges", "annotations", "ports"])  # fmt: skip
def test_services_that_ask_for_more_than_one_may_take_no_room_from_younger_ones(hog: dict[str, Any]) -> None:
    hogs = [aged(f"hog{number}", number, 1, **hog) for number in range(1, 10)]
    plan = planned(*hogs, aged("web", 80, 2))
    assert forwards(plan) == ["tcp 80 web 20080"]
    assert len(plan.rejections) == 9 and not plan.warnings
    why = "asks for more than fits into 2 MiB of memory; ask for fewer ports or networks"
    assert all(each.reason == why for each in plan.rejections)


def test_what_is_there_twice_is_no_difference_when_there_is_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [aged(f"s{number}", number, 1) for number in range(1, 4)]
    monkeypatch.setattr(epok, "MAX_ASKED", sum(each.size for each in epok.needed(epok.SERVICES, made)))
    assert len(forwards(planned(*made))) == 3
    assert forwards(planned(*made, *made)) == forwards(planned(*made))


def test_what_the_service_that_is_explained_asks_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epok, "MAX_ASKED", 0)
    _, reader = reader_of(NODE, aged("web", 1, 1), aged("ape", 2, 2), service("bare", None, [port(80, 20080)]))
    read = {each.key: each for each in reader.snapshot("default/web").services}
    assert read["default/web"].beyond and read["default/web"].annotations and read["default/web"].ports
    assert read["default/ape"].beyond and not read["default/ape"].annotations
    # one that asks for nothing cannot ask for too much
    read = {each.key: each for each in reader.snapshot("default/bare").services}
    assert not read["default/bare"].beyond and read["default/bare"].ports


def test_endpoints_that_were_read_for_one_host_stay_for_another() -> None:
    local = service("loc", "26:2026", [port(26, 2026)], policy="Local")
    web = service("web", "25:2025", [port(25, 2025)])
    slices = [endpoint_slice(name, [endpoint("n1", "10.1.0.1")], [slice_port(25)]) for name in ("loc", "web")]
    _, reader = reader_of(NODE, local, web, *slices)
    read = reader.with_endpoints(reader.snapshot(), on_node=True)
    again = reader.with_endpoints(read, on_node=False)
    assert set(read.endpoints) == set(again.endpoints) == {"default/loc", "default/web"}


def test_a_mapping_that_there_are_no_rules_for_is_not_told_to_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epok, "MAX_RULES", 3)
    argv = ["-i", "eth0", "--explain", "default/web", "local"]
    plan = planned(webs_of("web", "80,82", 0), argv=argv)
    assert [claim.mapping for claim in plan.claims] == ["80"]
    assert [each.mapping for each in plan.rejections] == ["82"]


@pytest.mark.parametrize("more", [
    {}, {"policy": "Local"}, {"sessionAffinity": "ClientIP"}, {"families": ("IPv4", "IPv6")},
    {"annotations": {ALLOW: "192.0.2.0/24,198.51.100.0/24,2001:db8::/32"}, "families": ("IPv4", "IPv6")},
    {"annotations": {ALLOW: "2001:db8::/32"}},
], ids=repr)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 17])
def test_the_rules_that_are_counted_are_those_that_are_made(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], count: int
) -> None:
    nodes = [node(f"n{n}", f"10.0.0.{n}", f"2001:db8::{n}") for n in range(1, count + 1)]
    pods = endpoint_slice("all", [endpoint(f"n{n}", f"10.42.{n}.5") for n in range(1, count + 1)])
    cluster = [service("all", "25,53,8000-8002", PORTS, **more), pods, *nodes]

    def rejections(most: int) -> int:
        monkeypatch.setattr(epok, "MAX_RULES", most)
        return len(planned(*cluster).rejections)

    options, made = epok.parse_options(LOCAL, {}), 0
    for family in epok.FAMILIES:
        chains = epok.render(planned(*cluster).forwards, family, options)["nat"].chains
        rules = [rule for name, chain in chains.items() if re.match("EPOK-(tcp|udp)", name) for rule in chain]
        # what leads to a smaller chain of ports has no comment
        made = max(made, sum("--comment" in rule or "--dport" not in rule for rule in rules))
    assert rejections(made) == 0
    assert rejections(made - 1) == bool(made)


# ------------------------------------------------ nodes


def marked(name: str, number: int, *marks: str) -> Object:
    """A node with the address 10.0.0.NUMBER and these marks."""
    made = node(
        name,
        f"10.0.0.{number}",
        ready="notready" not in marks,
        labels={label: "" for label in ("epok_exclude", EXCLUDE) if label in marks},
        annotations={"epok.getbetter.ro/exclude": ""} if "annotation" in marks else {},
        taints=[{"key": mark, "effect": "NoSchedule"} for mark in marks if mark.startswith(("ToBe", "node-role"))],
        **({"unschedulable": True} if "cordoned" in marks else {}),
    )
    if "unknown" in marks:
        made["status"]["conditions"][1]["status"] = "Unknown"
    if "no status" in marks:
        made["status"].pop("conditions")
    return made


AUTOSCALER = "ToBeDeletedByClusterAutoscaler"


@pytest.mark.parametrize(("nodes", "chosen", "warning"), [
    ([[], []], [0, 1], ""),
    ([[], ["annotation"]], [0], ""),
    ([[], ["epok_exclude"]], [0], ""),
    ([[], [AUTOSCALER]], [0], ""),
    ([[], [EXCLUDE]], [0], ""),
    ([[], ["notready"]], [0], ""),
    ([[], ["unknown"]], [0], ""),
    ([[], ["no status"]], [0], ""),
    ([["cordoned"], []], [0, 1], ""),
    ([["node-role.kubernetes.io/control-plane"], []], [0, 1], ""),
    ([["cordoned"], ["notready"]], [0], ""),
    # Ready ones with the standard label, when there are no others
    ([[EXCLUDE]], [0], EXCLUDE),
    ([[EXCLUDE], [EXCLUDE], ["notready"]], [0, 1], EXCLUDE),
    ([[EXCLUDE], ["annotation"]], [0], EXCLUDE),
    # nobody Ready: without the label, else with it
    ([["notready"], ["notready", EXCLUDE]], [0], "Ready"),
    ([["notready"], ["unknown"], ["no status"]], [0, 1, 2], "Ready"),
    ([["notready", EXCLUDE], ["notready", EXCLUDE]], [0, 1], "Ready"),
    ([["notready"], ["annotation"]], [0], "Ready"),
    # epok's own marks and the taint always count
    ([["annotation"]], [], "exclude"),
    ([["epok_exclude"], ["annotation"], [AUTOSCALER], ["epok_exclude", "notready", EXCLUDE]], [], "exclude"),
])  # fmt: skip
def test_which_nodes_are_forwarded_to(nodes: list[list[str]], chosen: list[int], warning: str) -> None:
    made = [marked(f"n{number}", number, *marks) for number, marks in enumerate(nodes)]
    plan = planned(service("all", "25,53", PORTS), *made)
    assert addresses(plan) == [f"10.0.0.{number}" for number in chosen]
    assert bool(plan.forwards) == bool(chosen)
    assert reasons(plan) == []
    assert len(plan.warnings) == bool(warning)
    assert warning in "".join(plan.warnings)


DUAL = ("IPv4", "IPv6")


@pytest.mark.parametrize(("families", "listed", "chosen"), [
    (("IPv4",), ["Internal 10.0.0.1"], ["10.0.0.1"]),
    (("IPv4",), ["External 198.51.100.1"], ["198.51.100.1"]),
    (("IPv4",), ["External 198.51.100.1", "Internal 10.0.0.1"], ["10.0.0.1"]),
    (("IPv4",), ["Internal 2001:db8::1", "External 198.51.100.1"], ["198.51.100.1"]),
    (("IPv4",), ["Hostname 10.0.0.9", "InternalDNS 10.0.0.8", "Internal 10.0.0.1"], ["10.0.0.1"]),
    (("IPv4",), ["Internal 10.0.0.2", "Internal 10.0.0.1"], ["10.0.0.2"]),
    (("IPv4",), ["Internal 10.0.0.1", "Internal 2001:db8::1"], ["10.0.0.1"]),
    (("IPv6",), ["Internal 10.0.0.1", "Internal 2001:db8::1"], ["2001:db8::1"]),
    (("IPv6",), ["Internal 10.0.0.1", "External 2001:DB8:0::1"], ["2001:db8::1"]),
    (DUAL, ["Internal 10.0.0.1", "Internal 2001:db8::1"], ["10.0.0.1", "2001:db8::1"]),
    (DUAL[::-1], ["Internal 2001:db8::1", "Internal 10.0.0.1"], ["10.0.0.1", "2001:db8::1"]),
    (DUAL, ["Internal 10.0.0.1"], ["10.0.0.1"]),
    # nothing can be sent there, so the next one counts
    *[(DUAL, [f"Internal {bad}", "External 198.51.100.1"], ["198.51.100.1"]) for bad in (
        "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.0.0.1;reboot", "10.0.0", "010.0.0.1", "10.0.0.1/24",
        "node1.example.org", "", "::", "::1", "ff02::1", "fe80::1", "fe80::1%eth0", "2001:db8::1%eth0",
        "::ffff:10.0.0.1", "\u0661.0.0.1")],
])  # fmt: skip
def test_which_address_of_a_node_is_taken(families: Sequence[str], listed: list[str], chosen: list[str]) -> None:
    made = node("n1")
    made["status"]["addresses"] = [
        {"type": kind + "IP" * kind.endswith("ternal"), "address": address} for kind, _, address in
        (entry.partition(" ") for entry in listed)]  # fmt: skip
    assert addresses(planned(service("all", "25,53", PORTS, families=families), made)) == chosen


def test_a_node_without_an_address_of_the_family_is_left_out_and_a_service_without_any_is_told() -> None:
    nodes = [node("n1", "10.0.0.1"), node("n2", "10.0.0.2", "2001:db8::2"), node("n3")]
    four = service("four", "44", [port(44, 30044)])
    six = service("six", "66:30066", [port(66, 30066)], families=["IPv6"])
    plan = planned(four, six, *nodes)
    assert [str(target.address) for made in plan.forwards for target in made.targets] == [
        "10.0.0.1",
        "10.0.0.2",
        "2001:db8::2",
    ]
    assert plan.warnings == []
    plan = planned(four, six, nodes[0])
    assert forwards(plan) == ["tcp 44 four 30044"]
    assert len(plan.warnings) == 1
    assert "default/six" in plan.warnings[0]


def test_targets_are_sorted_as_addresses_and_each_is_named_once() -> None:
    nodes = [node("a", "10.0.0.10"), node("b", "10.0.0.9"), node("c", "10.0.0.9"), node("d", "9.9.9.9")]
    assert addresses(mapped("25")) == ["10.0.0.11"]
    assert addresses(planned(service("all", "25", PORTS), *nodes)) == ["9.9.9.9", "10.0.0.9", "10.0.0.10"]


def leaving(node_name: str, *pods: str) -> Object:
    """A pod that is being stopped and still answers."""
    return endpoint(node_name, *pods) | {"conditions": {"ready": False, "serving": True, "terminating": True}}


ONE, TWO = endpoint("n1", "10.42.0.1"), endpoint("n2", "10.42.0.2")
TWO_NOT_READY = endpoint("n2", "10.42.0.2", ready=False)
LIVE: dict[str, tuple[list[list[Object]], list[int]]] = {  # EndpointSlices, and the nodes that are forwarded to
    "one": ([[ONE]], [1]),
    "two pods on a node": ([[ONE, endpoint("n1", "10.42.0.3")]], [1]),
    "one not ready": ([[ONE, TWO_NOT_READY]], [1]),
    "two slices": ([[ONE], [endpoint("n3", "10.42.0.3")]], [1, 3]),
    "conditions unknown": ([[{"addresses": ["10.42.0.1"], "nodeName": "n1"}]], [1]),
    "readiness unknown": ([[{"addresses": ["10.42.0.1"], "nodeName": "n1", "conditions": {"ready": None}}]], [1]),
    "node unknown": ([[{"addresses": ["10.42.0.1"], "conditions": {"ready": True}}, TWO]], [2]),
    "one ready, one leaving": ([[leaving("n1", "10.42.0.1"), TWO]], [2]),
    "one leaving, none ready": ([[leaving("n1", "10.42.0.1"), TWO_NOT_READY]], [1]),
    "all leaving": ([[leaving("n1", "10.42.0.1")], [leaving("n2", "10.42.0.2")]], [1, 2]),
    "none ready": ([[TWO_NOT_READY]], []),
    "on a node that is not Ready": ([[endpoint("n4", "10.42.0.4")]], []),
    "on a node that is gone": ([[endpoint("n5", "10.42.0.5")]], []),
    "none": ([[]], []),
}  # fmt: skip


@pytest.mark.parametrize("case", LIVE)
def test_policy_local_goes_to_the_nodes_with_a_ready_endpoint_else_one_that_still_serves(case: str) -> None:
    slices, chosen = LIVE[case]
    nodes = [node(f"n{number}", f"10.0.0.{number}", ready=number != 4) for number in (1, 2, 3, 4)]
    made = [endpoint_slice("mail", each, suffix=f"s{number}") for number, each in enumerate(slices)]
    others = [endpoint_slice("other", [TWO]), endpoint_slice("mail", [TWO], namespace="elsewhere")]
    plan = planned(
        service("mail", "25,587", [port(25, 2025, "smtp"), port(587, 2587, "submission")], policy="Local"),
        *made,
        *others,
        *nodes,
    )
    assert addresses(plan) == [f"10.0.0.{number}" for number in chosen]
    assert bool(plan.forwards) == bool(chosen)
    assert plan.rejections == []
    assert ["default/mail" in line and "endpoint" in line for line in plan.warnings] == [True] * (not chosen)


# ------------------------------------------------ a host that is a node itself

HTTP, METRICS = slice_port(8080, "http"), slice_port(9090, "metrics")
WEB = [port(80, 30080, "http", target="http"), port(81, 30081, "metrics")]
Slices = list[tuple[list[Object], list[Object]]]
PODS: dict[str, tuple[str, Slices, str]] = {  # externalTrafficPolicy, slices, and the targets of port 80 on node n1
    "all pods of all nodes": ("Cluster", [([ONE, TWO], [METRICS, HTTP])], "10.42.0.1:8080 10.42.0.2:8080"),
    "Local: those on this node": ("Local", [([ONE, TWO], [HTTP])], "10.42.0.1:8080"),
    "Local: none on this node": ("Local", [([TWO], [HTTP])], ""),
    "a port of each pod's own": (
        "Cluster",
        [([ONE], [HTTP]), ([TWO], [slice_port(8081, "http")])],
        "10.42.0.1:8080 10.42.0.2:8081",
    ),
    "one not ready": ("Cluster", [([ONE, TWO_NOT_READY], [HTTP])], "10.42.0.1:8080"),
    "one leaving": ("Cluster", [([ONE, leaving("n2", "10.42.0.2")], [HTTP])], "10.42.0.1:8080"),
    "all leaving": ("Cluster", [([leaving("n2", "10.42.0.2")], [HTTP])], "10.42.0.2:8080"),
    "none": ("Cluster", [([], [HTTP])], ""),
    "none ready": ("Cluster", [([TWO_NOT_READY], [HTTP])], ""),
    "pods that lack the port": ("Cluster", [([ONE], [METRICS])], ""),
    "a port of the name in another protocol": ("Cluster", [([ONE], [slice_port(8080, "http", "UDP")])], ""),
}


@pytest.mark.parametrize("case", PODS)
@pytest.mark.parametrize("marks", [[], ["notready", "annotation", EXCLUDE]], ids=["", "excluded"])
def test_a_host_that_is_a_node_forwards_to_pods(case: str, marks: list[str]) -> None:
    policy, slices, targets = PODS[case]
    made = [endpoint_slice("web", *each, suffix=f"s{number}") for number, each in enumerate(slices)]
    plan = planned(
        service("web", "80,82:30081/udp,83:22", WEB, policy=policy),
        *made,
        marked("n1", 1, *marks),
        marked("n2", 2),
        endpoint_slice("other", [endpoint("n1", "10.42.0.9")], [HTTP]),
        own=["n1"],
    )
    assert " ".join(f"{to.address}:{to.port}" for each in plan.forwards for to in each.targets) == targets
    assert [(each.protocol, each.first, each.last) for each in plan.forwards] == [("tcp", 80, 80)] * bool(targets)
    assert [each.mapping for each in plan.rejections] == ["82:30081/udp", "83:22"]
    assert ["default/web" in line for line in plan.warnings] == [True] * (not targets)


def test_a_host_that_is_a_node_forwards_each_family_to_pods_of_that_family() -> None:
    slices = [
        endpoint_slice("web", [ONE], [HTTP]),
        endpoint_slice("web", [endpoint("n2", "2001:db8::2")], [HTTP], family="IPv6", suffix="six"),
    ]
    for families, expected in (("IPv4", "10.42.0.1"), ("IPv6", "2001:db8::2"), ("IPv4 IPv6", "10.42.0.1 2001:db8::2")):
        plan = planned(service("web", "80", WEB, families=families.split()), *slices, own=["n1"])
        assert addresses(plan) == expected.split()


def test_a_host_that_is_a_node_needs_endpoint_slices() -> None:
    with pytest.raises(epok.Fatal, match="EndpointSlices"):
        planned(service("web", "80", WEB), own=["n1"])


def test_neighbouring_ports_of_pods_are_one_range_where_the_pods_ports_are_neighbours() -> None:
    ports = [port(8000 + n, 30000 + 7 * n, f"p{n}") for n in range(4)]
    listening = [slice_port(number, f"p{n}") for n, number in enumerate((9000, 9001, 9002, 9100))]
    plan = planned(service("web", "8000-8003", ports), endpoint_slice("web", [ONE, TWO], listening), own=["n1"])
    assert forwards(plan) == ["tcp 8000-8002 web 9000-9002", "tcp 8003 web 9100"]


# ------------------------------------------------ what is true of every cluster

PIECES = st.sampled_from([
    "20", "22", "25", "53", "20-23", "0", "65536", "30000", "30000-30003", "30100", "30201", "p0", "p3", "tcp", "udp",
    ":", "/", "-", ",", " ", "\n", "\x00", "\u0662", '"', "\\",
])  # fmt: skip
MAPPINGS = st.builds(
    "{}{}{}".format,
    st.one_of(st.integers(19, 27), st.sampled_from(["20-21", "21-24", "22-25", "1-65535"])),
    st.sampled_from(["", ":22", ":p0", ":p2", ":30000-30001", ":30100-30103",
                     *(f":{30000 + 100 * service + n}" for service in range(3) for n in range(5))]),
    st.sampled_from(["", "/tcp", ":udp", "/sctp"]))  # fmt: skip
ANNOTATIONS = st.one_of(
    st.lists(MAPPINGS, max_size=8).map(", ".join),
    st.lists(PIECES, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=())))  # fmt: skip
RANGES = st.one_of(st.none(), st.sampled_from(["192.0.2.0/24", "::/0", ""]), st.text(max_size=20))
MARK = st.sampled_from(["notready", "cordoned", "annotation", "epok_exclude", EXCLUDE, AUTOSCALER])


@st.composite
def clusters(draw: st.DrawFn) -> list[Object]:
    """Three Services that want the same ports, and three nodes."""
    made = []
    for number, name in enumerate("abc"):
        base = 30000 + 100 * number
        ports = [port(20 + n, base + n, f"p{n}") for n in range(4)] + [port(20, base, "p0-udp", "UDP")]
        ranges = draw(RANGES)
        made.append(service(
            name, draw(ANNOTATIONS), ports, annotations={} if ranges is None else {ALLOW: ranges},
            created=draw(st.sampled_from(["", *YEARS])), policy=draw(st.sampled_from(["Cluster", "Local"])),
            families=draw(st.sampled_from([("IPv4",), DUAL]))))  # fmt: skip
    made += [marked(f"n{number}", number, *draw(st.lists(MARK, max_size=2))) for number in (1, 2, 3)]
    return [*made, endpoint_slice("a", [ONE]), endpoint_slice("c", [TWO])]


@given(clusters())
def test_no_external_port_belongs_to_two_and_every_target_is_the_services_own(cluster: list[Object]) -> None:
    plan = planned(*cluster, argv=["-i", "eth0", "ssh", "-H", "root@h"])
    ports = every_port(plan)
    assert len({(protocol, external) for protocol, external, _, _ in ports}) == len(ports)
    own = {
        (f"default/{item['metadata']['name']}", each["protocol"].lower(), each["nodePort"])
        for item in cluster
        if item["kind"] == "Service"
        for each in item["spec"]["ports"]
    }
    assert {(name, protocol, node_port) for protocol, _, name, node_port in ports} <= own
    assert ("tcp", 22) not in {(protocol, external) for protocol, external, _, _ in ports}
    assert all(made.targets for made in plan.forwards)


@given(clusters(), st.randoms(use_true_random=False))
def test_the_order_of_the_snapshot_means_nothing(cluster: list[Object], chance: random.Random) -> None:
    before = planned(*cluster)
    chance.shuffle(cluster)
    after = planned(*cluster)
    assert after == before
    assert after.forwards == sorted(after.forwards, key=lambda made: (made.first, made.protocol))


@given(clusters())
def test_every_reason_and_warning_is_one_line_and_names_its_service(cluster: list[Object]) -> None:
    plan = planned(*cluster)
    for each in plan.rejections:
        assert re.fullmatch("default/[abc]: [ -~]{10,900}", str(each))
    for line in plan.warnings:
        assert re.fullmatch("[ -~]{10,900}", line)


@given(ANNOTATIONS, RANGES)
def test_any_text_in_an_annotation_leaves_other_services_alone(text: str, ranges: "str | None") -> None:
    nasty = service("nasty", text, PORTS, annotations={} if ranges is None else {ALLOW: ranges}, created=YEARS[1])
    plan = planned(
        nasty,
        service("web", "80", [port(80, 30080)]),
        service("mail", "24-27:31024-31027", [port(n, 31000 + n, f"p{n}") for n in (24, 25, 26, 27)]),
    )
    assert set(forwards(plan)) >= {"tcp 24-27 mail 31024-31027", "tcp 80 web 30080"}
    assert {each.service for each in plan.rejections} <= {"default/nasty"}


def test_ports_times_networks_that_would_be_too_many_rules_reject_the_service_alone() -> None:
    ports = [port(n, 20000 + n, f"p{n}") for n in range(1, 2001, 2)]
    ranges = ",".join(f"10.{n >> 8}.{n & 255}.0/24" for n in range(8000))
    asked = ",".join(f"{n}:{20000 + n}" for n in range(1, 2001, 2))
    greedy = service("greedy", asked, ports, annotations={"epok.getbetter.ro/allow-range": ranges})
    plan = planned(greedy, service("web", "8080:30080", [port(80, 30080)]))
    assert forwards(plan) == ["tcp 8080 web 30080"]
    [reason] = reasons(plan)
    assert re.fullmatch("default/greedy: 1000 external ports for 8000 networks .*", reason)


def test_a_pod_that_two_slices_name_has_the_ports_of_both() -> None:
    slices = [
        endpoint_slice("web", [endpoint("k3s", "10.244.1.5")], [slice_port(number, name)], suffix=name)
        for name, number in (("http", 8080), ("https", 8443))
    ]
    both = service("web", "80:http, 443:https", [port(80, 30080, "http"), port(443, 30443, "https")])
    plan = planned(both, *slices, own=["k3s"])
    assert not plan.warnings
    assert sorted(str(target.port) for made in plan.forwards for target in made.targets) == ["8080", "8443"]


# ------------------------------------------------ more nodes than --max-nodes

MANY = [node(f"n{number}", f"10.0.0.{number}", f"2001:db8:2::{number}") for number in range(1, 101)]
FEW = [*LOCAL, "--max-nodes", "8"]


def nodes_by_service(nodes: Sequence[Object], *services: Object) -> dict[str, set[str]]:
    plan = planned(*nodes, *services, argv=FEW)
    return {made.service: {str(target.address) for target in made.targets} for made in plan.forwards}


def webs(count: int, **changes: Any) -> list[Object]:
    return [service(f"web{n}", f"{1000 + n}:30080", [port(80, 30080)], **changes) for n in range(count)]


def unready(nodes: Sequence[Object], *gone: int) -> list[Object]:
    return [node(f"n{n}", f"10.0.0.{n}", ready=n not in gone) for n in range(1, len(nodes) + 1)]


def test_a_service_goes_to_at_most_so_many_nodes_of_each_ip_version() -> None:
    plan = planned(*MANY, *webs(20, families=["IPv4", "IPv6"]), argv=FEW)
    for made in plan.forwards:
        assert [target.address.version for target in made.targets] == [4] * 8 + [6] * 8
        hosts = [str(target.address).replace("::", ".").split(".")[-1] for target in made.targets]
        assert hosts[:8] != [] and set(hosts[:8]) == set(hosts[8:]), "the same nodes in both"


@pytest.mark.parametrize("count", [1, 7, 8])
def test_while_there_are_no_more_nodes_than_that_a_service_goes_to_all(count: int) -> None:
    assert all(len(found) == count for found in nodes_by_service(MANY[:count], *webs(20)).values())


def test_the_nodes_have_about_equally_many_services() -> None:
    found = nodes_by_service(MANY, *webs(2000))
    counts = Counter(itertools.chain.from_iterable(found.values()))
    assert len(counts) == 100 and sum(counts.values()) == 2000 * 8
    assert max(counts.values()) < 160 * 1.4 and min(counts.values()) > 160 * 0.6


@pytest.mark.parametrize("gone", [MANY[:41] + MANY[42:], unready(MANY, 42)], ids=["deleted", "not ready"])
def test_a_node_that_is_lost_moves_only_the_services_that_it_had(gone: list[Object]) -> None:
    lost = "10.0.0.42"
    before, after = (nodes_by_service(nodes, *webs(500)) for nodes in (MANY, gone))
    assert any(lost in found for found in before.values())
    for name, found in before.items():
        assert len(after[name]) == 8
        assert found - after[name] == found & {lost}


@pytest.mark.parametrize("families", [["IPv4"], ["IPv4", "IPv6"]])
def test_the_order_of_nodes_and_services_does_not_matter(families: list[str]) -> None:
    cluster = [*MANY, *webs(30, families=families)]
    plans = [planned(*random.Random(seed).sample(cluster, len(cluster)), argv=FEW) for seed in range(2)]
    assert plans[0].forwards == plans[1].forwards


def clients(*gone: int) -> dict[str, list[str]]:
    """For each Service with affinity, where a client with these low bits of its address goes, with any first bit."""
    options = epok.parse_options(FEW, {})
    plan = planned(*unready(MANY, *gone), *webs(30, sessionAffinity="ClientIP"), argv=FEW)
    nat = epok.render(plan.forwards, epok.FAMILIES[0], options)["nat"]
    leaves = {name: rules for name, rules in nat.chains.items() if "CONNMARK" in rules[0] and "EPOK-tcp" in name}
    return {name[:13]: [rule.split()[-1] for rule in rules[1::2]] for name, rules in leaves.items()}


@pytest.mark.parametrize("gone", [[], [42], [42, 17, 3], list(range(1, 61))], ids=len)
def test_with_affinity_a_client_is_with_its_own_node_whenever_that_is_there(gone: list[int]) -> None:
    lost = {f"10.0.0.{n}:30080" for n in gone}
    own, now = clients(), clients(*gone)
    assert all(sorted(Counter(homes).values()) == [8] * 8 for homes in own.values())
    assert own.keys() == now.keys()
    for name, homes in own.items():
        assert not lost & set(now[name])
        assert all(new == old for old, new in zip(homes, now[name], strict=True) if old not in lost)


@pytest.mark.parametrize("order", [1, -1])
def test_policy_local_goes_to_a_pods_node_also_when_another_node_has_the_same_address(order: int) -> None:
    nodes = [node(name, "10.0.0.5") for name in ("a", "b")][::order]
    plan = planned(*nodes, *webs(1, policy="Local"), endpoint_slice("web0", [endpoint("a", "10.42.0.1")]))
    assert addresses(plan) == ["10.0.0.5"]


def test_two_nodes_of_one_address_count_as_one_whatever_their_order() -> None:
    cluster = [*MANY, node("twin", "10.0.0.5"), *webs(60)]
    plans = [planned(*random.Random(seed).sample(cluster, len(cluster)), argv=FEW) for seed in range(3)]
    assert plans[0].forwards == plans[1].forwards == plans[2].forwards


def test_nodes_that_their_label_keeps_out_have_no_clients_to_move() -> None:
    nodes = [node(f"n{n}", f"10.0.0.{n}", labels={EXCLUDE: ""} if n <= 3 else {}) for n in range(1, 9)]
    made = planned(*nodes, *webs(1, sessionAffinity="ClientIP")).forwards[0]
    assert [str(address) for address in made.known] == [f"10.0.0.{n}" for n in range(4, 9)]


def test_policy_local_goes_to_at_most_so_many_of_the_nodes_that_have_a_pod() -> None:
    pods = [endpoint(f"n{n}", f"10.42.{n}.5", ready=n % 3 != 0) for n in range(1, 61)]
    plan = planned(*MANY, *webs(1, policy="Local"), endpoint_slice("web0", pods), argv=FEW)
    chosen = [int(address.split(".")[-1]) for address in addresses(plan)]
    assert len(chosen) == 8 and all(n <= 60 and n % 3 for n in chosen)


def test_a_host_that_is_a_node_forwards_to_all_pods_however_many() -> None:
    pods = [endpoint(f"n{n}", f"10.42.{n}.5") for n in range(1, 61)]
    slices = endpoint_slice("web0", pods, [slice_port(8080)])
    assert len(addresses(planned(*MANY, *webs(1), slices, argv=FEW, own=["n1"]))) == 60


# ------------------------------------------------ of epok's own class, and their status

BOTH = ("203.0.113.5", "2001:db8::5")
PAIR = [port(25, 2025, "smtp"), port(443, 30443, "https")]


def balancer(
    name: str = "mail", externalport: "str | None" = None, ports: Sequence[Object] = PAIR, **kw: Any
) -> Object:
    kind = {"type": "LoadBalancer", "loadBalancerClass": epok.BALANCER_CLASS, **kw}
    return service(name, externalport, ports, **kind)


def statuses(*objects: Object, names: Sequence[str] = BOTH[:1], **how: Any) -> dict[str, list[str]]:
    """What is to be written, by Service, as people are shown it."""
    plan, services = planned_for(*objects, **how)
    by_service = epok.grouped(plan.forwards)
    return {
        each.key.removeprefix("default/"): [
            str(entry) for entry in epok.ingress_of(each, by_service.get(each.key, ()), plan, names)
        ]
        for each in services
    }


def test_without_a_mapping_each_port_of_epoks_class_is_forwarded_by_its_own_number() -> None:
    plan = planned(balancer(ports=PORTS), service("plain", None, PORTS, type="LoadBalancer"))
    own = [(each["port"], each["nodePort"]) for each in PORTS]
    assert sorted((external, node_port) for _, external, _, node_port in every_port(plan)) == sorted(own)
    assert not plan.rejections


@pytest.mark.parametrize(("text", "found"), [
    ("25", ["tcp 25 mail 2025"]),
    ("26:https", ["tcp 26 mail 30443"]),
    ("", []),
    ("nope", []),
])  # fmt: skip
def test_with_a_mapping_epoks_class_has_what_it_says_and_no_more(text: str, found: list[str]) -> None:
    assert forwards(planned(balancer(externalport=text))) == found


@pytest.mark.parametrize("name", ["external-port", "externalprot", "intrenal", "allowrange", "x"])
def test_a_misspelt_annotation_opens_no_port_of_epoks_class(name: str) -> None:
    """A mapping narrows it down, so one misspelt is a restriction too."""
    misspelt = {f"getbetter.ro/{name}": "25"}
    plan = planned(balancer(annotations=misspelt))
    assert not plan.forwards
    assert re.search("epok knows no annotation .* meant[?] It is not forwarded until", reasons(plan)[0])
    assert len(planned(balancer(externalport="25", annotations={"getbetter.ro/external-port": "1"})).forwards) == 1


def test_a_service_of_another_class_has_no_status() -> None:
    others = [
        balancer("theirs", "25", loadBalancerClass="example.org/lb"),
        balancer("nobodys", "443", type="NodePort"),
    ]
    assert statuses(*others) == {}


ERRORS = {
    "all": (None, [], "tcp/25, tcp/443"),
    "one taken": (None, [service("a", "443:30080", [port(80, 30080)])], "tcp/25, tcp/443 getbetter.ro/PortTaken"),
    "one not asked for": ("25", [], "tcp/25, tcp/443 getbetter.ro/NotForwarded"),
    "one elsewhere": ("25,8443:https", [], "tcp/25, tcp/443 getbetter.ro/OtherPort"),
    "crossed": ("25:https,443:smtp", [], "tcp/25 getbetter.ro/OtherPort, tcp/443 getbetter.ro/OtherPort"),
    "taken from itself": ("25:https,25:smtp,443", [], "tcp/25 getbetter.ro/PortTaken, tcp/443"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_port_that_is_not_forwarded_by_its_own_number_has_an_error(case: str) -> None:
    text, others, expected = ERRORS[case]
    assert statuses(balancer(externalport=text), *others)["mail"] == [f"203.0.113.5 ({expected})"]


def test_ports_that_no_service_may_take_have_an_error() -> None:
    ports = [port(22, 30022, "ssh"), PAIR[1]]
    found = statuses(balancer(ports=ports), argv=["-i", "eth0", "ssh", "-H", "root@h"])
    assert found == {"mail": ["203.0.113.5 (tcp/22 getbetter.ro/PortReserved, tcp/443)"]}
    found = statuses(balancer(), argv=[*LOCAL, "--ports", "443"])
    assert found == {"mail": ["203.0.113.5 (tcp/25 getbetter.ro/PortNotAllowed, tcp/443)"]}


@given(clusters(), st.lists(st.sampled_from(["", "class", "class without a mapping"]), min_size=3, max_size=3))
def test_what_is_written_is_what_is_forwarded(cluster: list[Object], kinds: list[str]) -> None:
    for made, kind in zip(cluster, kinds, strict=False):
        if kind:
            made["spec"] |= {"type": "LoadBalancer", "loadBalancerClass": epok.BALANCER_CLASS}
        if kind == "class without a mapping":
            del made["metadata"]["annotations"]["getbetter.ro/externalport"]
    cluster.append(node("n9", "10.0.0.19", "2001:db8::19"))
    plan, services = planned_for(*cluster)
    assert [each.key[-1] for each in services] == [name for name, kind in zip("abc", kinds, strict=True) if kind]
    for each in services:
        its = [made for made in plan.forwards if made.service == each.key]
        entries = epok.ingress_of(each, its, plan, BOTH)
        there = {entry.ip: {(p.protocol.lower(), p.port) for p in entry.ports if not p.error} for entry in entries}
        for name, version in zip(BOTH, (4, 6), strict=True):
            reached = {
                (made.protocol, made.first + n, target.port + n)
                for made in its
                for n in range(made.last - made.first + 1)
                for target in made.targets
                if target.address.version == version
            }
            own = {(p.protocol, p.port) for p in each.ports if (p.protocol, p.port, p.node_port) in reached}
            assert there.get(name, set()) == own
            assert (name in there) == bool(reached)
        for entry in entries:
            assert [(p.port, p.protocol) for p in entry.ports] == [(p.port, p.protocol.upper()) for p in each.ports]
            assert all(re.fullmatch("(getbetter.ro/[A-Z][A-Za-z]+)?", p.error) for p in entry.ports)


def facts(**interfaces: str) -> epok.Facts:
    found = {name: [epok.ipaddress.ip_address(text) for text in texts.split()] for name, texts in interfaces.items()}
    return epok.Facts(found, {})


LEFT, RIGHT = facts(eth0="192.0.2.1 2001:db8::1", eth1="10.0.0.1"), facts(eth0="192.0.2.2", cni0="10.42.0.1")
NAMES = {
    "auto": ("auto", "-i eth0", [["192.0.2.1", "2001:db8::1"], ["192.0.2.2"]]),
    "auto of a pattern": ("auto", "-i eth+", [["10.0.0.1", "192.0.2.1", "2001:db8::1"], ["192.0.2.2"]]),
    "auto within": ("auto", "-i eth0 --addresses 2001:db8::/32", [["2001:db8::1"], []]),
    "auto by no such interface": ("auto", "-i wan0", [[], []]),
    "each its own": ("192.0.2.2,192.0.2.1", "-i eth0", [["192.0.2.1"], ["192.0.2.2"]]),
    "a router's": ("203.0.113.5", "-i eth0", [["203.0.113.5"], ["203.0.113.5"]]),
    "a name": ("gw.example.org", "-i eth0", [["gw.example.org"], ["gw.example.org"]]),
}


class Publisher(epok.Publisher):
    """One for hosts that all have the same plan."""

    plan: epok.Plan

    def add(self, facts: epok.Facts, plan: "epok.Plan | None" = None) -> list[epok.Publication]:
        return super().add(facts, plan or self.plan)


def publisher(publish: str, words: str, *objects: Object, before: Sequence[str] = ()) -> Publisher:
    """For two hosts, and Services that have these addresses already."""
    argv = ["--publish", publish, *words.split(), "ssh", "--host", "root@left,root@right"]
    for made in objects:
        made["status"]["loadBalancer"]["ingress"] = [{"ip": ip, "ipMode": "Proxy"} for ip in before]
    plan, services = planned_for(*objects, node("n1", "10.0.0.11", "2001:db8:2::11"), argv=argv)
    source: Any = None
    made = Publisher(epok.parse_options(argv, {}), source, services)
    made.plan = plan
    return made


def after(found: Sequence[epok.Publication]) -> list[str]:
    [one] = found
    return [entry.name for entry in one.after]


@pytest.mark.parametrize("case", NAMES)
def test_of_two_hosts_the_one_that_is_right_alone_has_its_addresses_written(case: str) -> None:
    publish, words, names = NAMES[case]
    made = balancer(families=DUAL)
    everything = sorted({*names[0], *names[1]}, key=lambda name: (":" in name, name))
    for order in ([0, 1], [1, 0]):
        both = publisher(publish, words, made, before=["198.51.100.9"])
        first, second = ((LEFT, RIGHT)[n] for n in order)
        one, two = both.add(first), both.add(second)
        kept = after(one) if one else ["198.51.100.9"]
        assert sorted(kept) == sorted([*names[order[0]], "198.51.100.9"]), "the other may have failed"
        assert sorted(after(two)) == sorted(everything)


def test_when_both_are_right_it_does_not_matter_which_was_first() -> None:
    made = balancer(families=DUAL)
    orders = [(LEFT, RIGHT), (RIGHT, LEFT)]
    for publish in ("auto", "192.0.2.2,192.0.2.1"):
        found = []
        for order in orders:
            both = publisher(publish, "-i eth0", made)
            found.append([after(both.add(each)) for each in order][-1])
        assert found[0] == found[1]


def test_an_internal_service_has_no_address_of_the_external_interface() -> None:
    words = "-i eth0,eth1 --external-interface eth0"
    internal = balancer(annotations={"epok.getbetter.ro/internal": ""})
    assert after(publisher("auto", words, internal).add(LEFT)) == ["10.0.0.1"]
    assert after(publisher("auto", words, balancer()).add(LEFT)) == ["10.0.0.1", "192.0.2.1"]


def test_a_host_that_does_not_tell_its_addresses_keeps_what_was_written() -> None:
    both = publisher("auto", "-i eth0", balancer(), before=["192.0.2.2", "198.51.100.9"])
    assert both.add(facts()) == []
    assert after(both.add(LEFT)) == ["192.0.2.1", "192.0.2.2", "198.51.100.9"]


def test_what_kubernetes_before_1_30_keeps_is_what_was_written() -> None:
    """It knows no ipMode."""
    one = publisher("192.0.2.1", "-i eth0", balancer())
    [first] = one.add(LEFT)
    kept = epok.msgspec.to_builtins(first.after)
    del kept[0]["ipMode"]
    made = balancer()
    again = publisher("192.0.2.1", "-i eth0", made)
    made["status"]["loadBalancer"]["ingress"] = kept
    plan, services = planned_for(made)
    source: Any = None
    again = epok.Publisher(again.options, source, services)
    assert again.add(LEFT, plan) == []
