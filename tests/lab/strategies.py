"""Clusters, snapshot files and command lines as they should be, as they should not, and as nobody would write them.

Strategies of Hypothesis: `clusters()` makes what kubectl would print, `files()` what may be in a file, `argvs()`
what may stand on a command line.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import yaml
from hypothesis import strategies as st

from lab.driver import METRICS, SNAPSHOT
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, slice_port, snapshot

ALLOW = "epok.getbetter.ro/allow-range"
INTERNAL = "epok.getbetter.ro/internal"
DIGITS = 314159265358979  # stands for a number of thousands of digits, which Python does not like to print

# ------------------------------------------------ a cluster

NAMES = st.sampled_from(["mail", "web", "a.b-c", "1", "x" * 63])
BASES = st.sampled_from([1, 20, 25, 53, 80, 1023, 8000, 8190, 65530])
PROTOCOLS = ["TCP", "UDP", "SCTP"]
FAMILIES = st.sampled_from([["IPv4"], ["IPv4"], ["IPv6"], ["IPv4", "IPv6"], ["IPv6", "IPv4"], []])
TYPES = ["NodePort", "LoadBalancer", "ClusterIP", "ExternalName"]
NETWORKS = [
    "192.0.2.0/24", "198.51.100.7", "0.0.0.0/0", "2001:db8::/32", "::/0", "2001:db8::1/128", "::ffff:1.2.3.4/128",
]  # fmt: skip
BAD_NETWORKS = ["", "192.0.2.0/33", "all", "fe80::1%eth0", "\u0661.0.2.1", "1.2.3", "192.0.2.1/24 ; x", "\x00"]
PIECES = [
    "25", "20-23", "0", "65536", "1-65535", "smtp", "tcp", "SCTP", ":", "/", "-", ",", " ", "\n", "\x00", "\u0662", '"',
    "\\",
]  # fmt: skip
ADDRESSES = [
    "10.0.0.11", "10.0.0.12", "10.0.0.13", "203.0.113.9", "2001:db8:2::11", "2001:db8:2::12", "2001:db8::ffff:1",
    "10.0.0.1", "2001:db8:2::1",  # the host's own
    "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "169.254.1.1", "fe80::1", "fe80::1%eth0", "::1", "::",
    "ff02::1", "::ffff:10.0.0.1", "64:ff9b::1", "10.0.0.011", "node1.example.org", "", "\u0661\u0660.0.0.1",
]  # fmt: skip
GOOD_ADDRESSES = 7
OWN_ADDRESSES = ADDRESSES[GOOD_ADDRESSES:][:2]
MARKS: Sequence[dict[str, Any]] = (
    {"ready": False},
    {"labels": {"epok_exclude": ""}},
    {"labels": {"node.kubernetes.io/exclude-from-external-load-balancers": ""}},
    {"annotations": {"epok.getbetter.ro/exclude": "true"}},
    {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
    {"unschedulable": True},
)


def seldom(draw: st.DrawFn, times: int) -> bool:
    """Once in so many times."""
    return draw(st.integers(0, times - 1)) == times - 1


@st.composite
def services(draw: st.DrawFn, name: str, number: int, strange: bool) -> Object:
    """A Service with a run of ports, some of them asked for, and when it is strange in ways that cannot stand."""
    first, count = draw(BASES), draw(st.integers(1, 6))
    base = 30000 + 100 * number + draw(st.integers(0, 3))
    kind = "UDP" if seldom(draw, 5) else draw(st.sampled_from(PROTOCOLS)) if seldom(draw, 5) else "TCP"
    ports = [port(first + n, base + n, f"p{n}", kind) for n in range(min(count, 65536 - first))]
    if seldom(draw, 4):
        ports.append(port(first, base, "twin", "UDP" if kind == "TCP" else "TCP"))
    for one in ports if strange and seldom(draw, 4) else ():
        one.pop(draw(st.sampled_from(["name", "nodePort", "protocol"])), None)
    annotations = {ALLOW: draw(networks(strange))} if seldom(draw, 4) else {}
    annotations |= {INTERNAL: ""} if seldom(draw, 5) else {}
    if seldom(draw, 10):
        annotations["epok.getbetter.ro/externalports"] = draw(mappings(ports, strange))
    spec: Object = {"loadBalancerSourceRanges": draw(st.lists(st.sampled_from(NETWORKS)))} if seldom(draw, 6) else {}
    spec |= {"loadBalancerClass": "getbetter.ro/epok"} if seldom(draw, 4) else {}
    return service(
        name,
        None if strange and seldom(draw, 6) else draw(mappings(ports, strange)),
        ports,
        annotations=annotations,
        type=draw(st.sampled_from(TYPES if strange else TYPES[:2])),
        policy="Local" if seldom(draw, 6) else "Cluster",
        families=draw(FAMILIES),
        created=draw(st.sampled_from(["2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z", ""])),
        sessionAffinity="ClientIP" if seldom(draw, 4) else "None",
        **spec,
    )


@st.composite
def mappings(draw: st.DrawFn, ports: Sequence[Object], strange: bool) -> str:
    """An annotation that asks for some of these ports; a strange one also for others, or it is no such thing."""
    if strange and seldom(draw, 4):
        return draw(st.one_of(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text(max_size=20)))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        one = draw(st.sampled_from(ports))
        number, node_port, name = one["port"], one.get("nodePort", 0), one.get("name", "")
        external = draw(st.sampled_from([number, 1024, 2222, 65535, *([0, 65536] if strange else [])]))
        size = draw(st.integers(0, len(ports) if strange else len(ports) - 1 - ports.index(one)))
        targets = [node_port, name, *([node_port + 50, "x"] if strange else [])]
        forms = [f"{external}:{target}" for target in targets if target]
        forms += [f"{number}", f"{number}-{number + size}"]
        if external + size <= 65535 and node_port:
            forms.append(f"{external}-{external + size}:{node_port}-{node_port + size}")
        ends = ["", "", f"/{one.get('protocol', 'TCP').lower()}", *(["/tcp", ":udp", "/", ":x"] if strange else [])]
        made.append(draw(st.sampled_from(forms)) + draw(st.sampled_from(ends)))
    return draw(st.sampled_from([", ", ",", " ,\n"])).join(made)


@st.composite
def networks(draw: st.DrawFn, strange: bool) -> str:
    known = [*NETWORKS, *(BAD_NETWORKS if strange else [])]
    return ", ".join(draw(st.lists(st.sampled_from(known), min_size=not strange, max_size=4)))


@st.composite
def nodes(draw: st.DrawFn, number: int, strange: bool) -> Object:
    """A Node; a strange one may have addresses that nothing can be sent to."""
    known = ADDRESSES if strange else OWN_ADDRESSES if seldom(draw, 8) else ADDRESSES[:GOOD_ADDRESSES]
    marks = draw(st.sampled_from(MARKS)) if seldom(draw, 5) else {}
    made = node(f"n{number}", *draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)), **marks)
    if strange and seldom(draw, 3):
        made["status"]["addresses"][0]["type"] = draw(st.sampled_from(["ExternalIP", "Hostname", "InternalDNS"]))
    return made


@st.composite
def slices(draw: st.DrawFn, name: str, number: int) -> Object:
    """An EndpointSlice of a Service: pods on some of the nodes, and the ports that they listen on."""
    pods = [
        endpoint(f"n{on}", draw(st.sampled_from([f"10.42.{on}.{n}", f"2001:db8:42::{on}", ADDRESSES[-1 - n]])), **how)
        for n in range(draw(st.integers(0, 3)))
        for on in [draw(st.integers(0, 2))]
        for how in [draw(st.sampled_from([{}, {}, {"ready": False}, {"terminating": True}]))]
    ]
    listening = [
        slice_port(8000 + n, f"p{n}", draw(st.sampled_from(PROTOCOLS))) for n in range(draw(st.integers(0, 3)))
    ]
    return endpoint_slice(name, pods, listening, suffix=f"s{number}")


@st.composite
def clusters(draw: st.DrawFn) -> Object:
    """What kubectl prints of a cluster that may well be."""
    strange = draw(st.sampled_from(["", "", "", "", "Services", "nodes", "nodes", "Services and nodes"]))
    names = draw(st.lists(NAMES, max_size=3, min_size="Services" not in strange, unique=True))
    made = [draw(services(name, number, "Services" in strange)) for number, name in enumerate(names)]
    count = draw(st.integers(0 if "nodes" in strange and seldom(draw, 4) else 1, 3))
    made += [draw(nodes(number, "nodes" in strange)) for number in range(count)]
    if not seldom(draw, 4):
        made += [draw(slices(name, number)) for number, name in enumerate(names or ["mail"])]
    return snapshot(*made)


# ------------------------------------------------ a file

ODD: Sequence[Any] = (
    None, True, False, 0, -1, 1, 65535, 65536, 10**30, DIGITS, 1.5, float("inf"), float("nan"), "", " ", "\n", "True",
    "x" * 1000, "\x00\x1b[31m", "\ud800", "\u202e\u2028é", "a b", 'a"b', "a\\b", "-j", "../..", "25:30000", "%n%s",
    [], {}, [[]], [None], [""], {"a": None}, {"": {}}, [0], ["10.0.0.11"], "List", "Service", "NodeList",
)  # fmt: skip
JUNK = st.sampled_from([
    "!!int ''", "!!bool x", "!!binary x", "!!set {a}", "!!omap [a: b]", "&a [*a]", "? [a]", ": ", "- ", "- -", "\n",
    "\n- ", "'", '"', "{", "[", "}", "<<: ", "=", "0x_", "1:2:3", "|\n", "%YAML 9\n", "---\n", "...", "#", "\t", "~",
    "\x85", "\ufeff",
])  # fmt: skip
KEYS: Sequence[Any] = (
    "",
    "kind",
    "items",
    "metadata",
    "name",
    "getbetter.ro/externalport",
    "é\x00",
    1,
    None,
    True,
    1.5,
)
CHANGES = ("gone", "other", "other", "twice", "moved", "renamed")
Place = tuple[Any, Any]  # what holds a value, and where


def places(tree: Any) -> list[Place]:
    """All values of a tree but the tree itself."""
    found: list[Place] = []
    todo = [tree]
    while todo:
        holder = todo.pop()
        inner = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        found += [(holder, key) for key, _ in inner]
        todo += [value for _, value in inner]
    return found


def changed(tree: Any, change: str, first: int, second: int) -> None:
    """Does something to one of the values of a tree."""
    known = places(tree)
    if not known:
        return
    holder, key = known[first % len(known)]
    if change == "gone":
        del holder[key]
    elif change == "other":
        holder[key] = copy.deepcopy(ODD[second % len(ODD)])
    elif change == "twice" and isinstance(holder, list):
        holder.insert(second % (len(holder) + 1), copy.deepcopy(holder[key]))
    elif change == "moved":
        other, place = known[second % len(known)]
        other[place] = copy.deepcopy(holder[key])
    elif change == "renamed" and isinstance(holder, dict):
        holder[KEYS[second % len(KEYS)]] = holder.pop(key)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A snapshot, in more than half of the files a cluster that may well be."""
    tree = draw(clusters())
    if seldom(draw, 4):
        numbers = st.integers(0, 9999)
        for each in draw(st.lists(st.tuples(st.sampled_from(CHANGES), numbers, numbers), min_size=1, max_size=4)):
            changed(tree, *each)
    form = draw(st.sampled_from(["json"] * 20 + ["yaml", "documents", "mess", "cut", "bytes"]))
    if form in ("json", "cut", "bytes"):
        text = json.dumps(tree).replace(f"{DIGITS}", "9" * 4300).encode()
    else:
        documents = tree.get("items") if form == "documents" else [tree]
        dumped = yaml.safe_dump_all(documents if isinstance(documents, list) else [tree], default_flow_style=None)
        text = dumped.replace(f"{DIGITS}", f"0x{'f' * 5000}").encode("utf-8", "surrogatepass")
    if form in ("json", "yaml", "documents"):
        return text
    place = draw(st.integers(0, len(text)))
    added = draw(st.binary(max_size=20)) if form == "bytes" else draw(JUNK).encode() if form == "mess" else b""
    return text[:place] + added + (b"" if form == "cut" else text[place:])


# ------------------------------------------------ a command line

VALUES: dict[str, tuple[Sequence[str], Sequence[str]]] = {  # of options: good ones, and those that make no sense
    "--interfaces": (["eth0", "eth0,lo", "eth+", "lo", "lo,eth0,eth+", "no-such.0@x"], ["", "a b", "+", "-x"]),
    "--external-interface": (["eth0"], ["eth9", "eth0,eth1"]),
    "--addresses": (["192.0.2.1", "192.0.2.1,2001:db8:1::1", "0.0.0.0/0,::/0", "10.0.0.0/8", "127.0.0.1"], ["x", ","]),
    "--masquerade": (["always", "never", "auto"], ["maybe"]),
    "--publish": (["192.0.2.1", "auto", "gw.example.org", "none"], ["", "a,b"]),
    "--mark": (["0x3", "0x80000001", "5"], ["0", "0x7", "1e3", "0x300000000"]),
    "--max-nodes": (["1", "2", "999999999999"], ["0", "-1", "\u0663"]),
    "--batch-size": (["1", "300", "2000", "999999999999"], ["0", "1k"]),
    "--batch-commands": (["false", "true", "TRUE"], ["no"]),
    "--metrics-file": ([METRICS], ["/run/no/such", "/dev/null/x"]),
    "--timeout": (["50", "300.5"], ["0", "-1", "1e9"]),
}  # fmt: skip
MODES = [[]] * 30 + [
    ["--dry-run"],
    ["--dry-run", "-o", "json"],
    ["--clean"],
    ["--status"],
    ["--status", "-o", "json"],
    ["--explain", "default/mail"],
    ["--explain", "default/web", "-o", "json"],
    ["-v"],
    ["-q"],
]
TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8)
Command = tuple[list[str], dict[str, str]]


@st.composite
def argvs(draw: st.DrawFn) -> Command:
    """The words of a command line and the environment, with a snapshot."""
    chosen = {"--interfaces": "eth0", "--snapshot": SNAPSHOT}
    for option in draw(st.lists(st.sampled_from([*VALUES]), max_size=4, unique=True)):
        good, bad = VALUES[option]
        chosen[option] = draw(st.sampled_from(bad if seldom(draw, 40) else good))
        if seldom(draw, 40) and option != "--metrics-file":  # which names what is written
            chosen[option] = draw(TEXT)
    if chosen.get("--external-interface") == "eth0" and not seldom(draw, 10):
        chosen["--interfaces"] = draw(st.sampled_from(["eth0", "eth0,lo", "lo,eth0,eth+"]))
    words, environ = [*draw(st.sampled_from(MODES))], {}
    for option, value in chosen.items():
        if seldom(draw, 6):
            environ["EPOK" + option[1:].upper().replace("-", "_")] = value
        else:
            words += [f"{option}={value}"]
    return [*words, "local"], environ
