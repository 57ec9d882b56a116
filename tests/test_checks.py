"""What else on a host decides about a connection: each check beside what the kernel really does, nft and legacy."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import epok
from lab.machine import stretched
from lab.network import HOST, HOST6, Lab, warnings_in
from lab.objects import port, service

RECORD = False  # a host's `cat` is broken here, which recording needs
LOCAL = ("-i", "eth0", "local")
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")])
BOTH = service("mail", "25:2025", [port(25, 2025, "smtp")], families=("IPv4", "IPv6"))
DNS = service("dns", "53:30053", [port(53, 30053, "dns", "UDP")])
WELL, LOST, PERHAPS = "well", "lost", "perhaps"
Problems = list[tuple[str, bool]]
only_nft = pytest.mark.parametrize("lab", ["nft"], indirect=True)
only_legacy = pytest.mark.parametrize("lab", ["legacy"], indirect=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No table, backend or setting of one test is there in the next."""
    yield
    if "lab" in request.fixturenames:
        lab = request.getfixturevalue("lab")
        lab.host.run(["nft", "flush", "ruleset"])
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            lab.host.run(
                ["sh", "-c", f"{tool} -P FORWARD ACCEPT; {tool} -F; {tool} -X; {tool} -t nat -F; {tool} -t nat -X"]
            )
        put(lab, dict.fromkeys(("all", "eth0", "eth2"), "0"))


def put(lab: Lab, modes: dict[str, str]) -> None:
    """Modes of rp_filter, by interface."""
    lab.host.run(["sh", "-c", "; ".join(f"echo {m} >/proc/sys/net/ipv4/conf/{n}/rp_filter" for n, m in modes.items())])


def warnings(lab: Lab, *services: dict[str, Any], argv: Sequence[str] = LOCAL) -> list[str]:
    """What a plain run warns of; it never fails for it."""
    done = lab.epok(*argv, snapshot=lab.cluster(*(services or (MAIL,))))
    assert done.returncode == 0, done.stderr
    return warnings_in(done.stderr)


def status(lab: Lab, *services: dict[str, Any], argv: Sequence[str] = LOCAL) -> Problems:
    """The problems that --status finds, and whether it is sure of each."""
    done = lab.epok("--status", "-o", "json", *argv, snapshot=lab.cluster(*(services or (MAIL,))))
    assert done.returncode == 0, done.stderr
    [host] = json.loads(done.stdout)["hosts"]
    return [(check["problem"], check["sure"]) for check in host["checks"] if check["problem"]]


def explained(lab: Lab) -> str:
    return lab.epok("--explain", "default/mail", *LOCAL, snapshot=lab.cluster(MAIL), check=True).stdout


def reaches(lab: Lab, to: str = HOST, seconds: float = 0.25) -> bool:
    """A short time is for what should not."""
    with contextlib.suppress(OSError):
        return lab.ask(25, to=to, timeout=seconds).port == 2025
    return False


def iptables(lab: Lab, script: str, tool: str = "iptables") -> None:
    """Lines of iptables, with ";" between them."""
    for line in script.split(";"):
        lab.host.run([tool, *shlex.split(line)])


def native(lab: Lab, text: str) -> None:
    lab.host.run(["nft", "-f", "-"], text)


def wall(body: str, family: str = "inet", policy: str = "drop", more: str = "") -> str:
    head = f"type filter hook forward priority 5; policy {policy};"
    return f"table {family} wall {{\n{more}\nchain forward {{ {head}\n{body}\n}}\n}}"


FIREWALLD = """table inet firewalld {
chain filter_FORWARD_POLICIES { jump filter_FWD_public; return; }
chain filter_FWD_public { oifname "virbr9" reject with icmpx admin-prohibited; }
chain filter_FORWARD { type filter hook forward priority 10; policy accept;
ct state { established, related } accept
STATUS
iifname "lo" accept
ct state { invalid } drop
jump filter_FORWARD_POLICIES
reject with icmpx admin-prohibited
}
}"""
STRICT = FIREWALLD.replace("STATUS", "")
NOT_STRICT = FIREWALLD.replace("STATUS", "ct status dnat accept")


def assert_told(lab: Lab, words: str, *services: dict[str, Any], argv: Sequence[str] = LOCAL) -> str:
    """By a run, --status and --explain; the message."""
    [warning] = warnings(lab, *services, argv=argv)
    assert re.search(words, warning), warning
    assert (warning, True) in status(lab, *services, argv=argv)
    done = lab.epok("--status", *argv, snapshot=lab.cluster(*(services or (MAIL,))))
    assert f"\nFAILED  {warning}\n" in done.stdout
    if not services and argv == LOCAL:
        story = explained(lab)
        assert f"FAILED  {warning}\n" in story and f"Most likely: {warning}\n" in story
    return warning


def assert_mended(lab: Lab, warning: str, to: str = HOST) -> None:
    """By the command in the message, word for word, and another run."""
    lab.host.run(["sh", "-c", cure_in(warning)])
    # a rule that took the port has lost its clients now
    assert [told for told in warnings(lab, BOTH) if "rule that publishes tcp/25" not in told] == []
    assert [told for told, _ in status(lab, BOTH) if "rule that publishes tcp/25" not in told] == []
    assert reaches(lab, to, seconds=10)


def cure_in(warning: str) -> str:
    """The command that the message tells to run."""
    found = re.search(r"(?:: |or )((?:sysctl|nft|ip6?tables)\S* .*?)(?:, and epok's next run.*)?$", warning)
    assert found, warning
    return found[1]


# ---- each check with the real thing, and its cure


@only_nft
def test_a_host_that_does_not_forward_is_mended_by_what_the_message_says(lab: Lab) -> None:
    lab.host.run(["sysctl", "-w", "net.ipv4.ip_forward=0"])
    warning = assert_told(lab, "does not forward IPv4")
    assert not reaches(lab)
    assert_mended(lab, warning)


@only_nft
def test_strict_rp_filter_drops_what_comes_from_beyond_until_it_is_loose(lab: Lab) -> None:
    lab.host.wire("route del 198.18.0.0/24", "route add default via 198.51.100.10")
    try:
        put(lab, {"eth0": "1"})
        warning = assert_told(lab, "comes in by eth0 from beyond .* by eth2: sysctl")
        assert passed(lab, "198.18.0.7") == 0 and passed(lab, "192.0.2.10", seconds=10) > 0
        lab.host.run(["sh", "-c", warning.split(": ")[-1]])
        # answers still leave by eth2, which may be meant so
        assert not warnings(lab) and [sure for _, sure in status(lab)] == [False]
        assert passed(lab, "198.18.0.7", seconds=1) > 0
        put(lab, {"eth0": "0", "all": "1"})
        assert warnings(lab) == [warning]
    finally:
        lab.host.wire("route del default", "route add 198.18.0.0/24 via 192.0.2.10")


@only_nft
def test_strict_rp_filter_of_an_interface_with_a_dot_is_mended_too(lab: Lab) -> None:
    lab.host.wire(
        "link add vlan.5 type veth",
        "addr add 203.0.113.1/24 dev vlan.5",
        "link set vlan.5 up",
        "route add default via 198.51.100.10",
    )
    try:
        put(lab, {"vlan.5": "1"})
        argv = ("-i", "vlan.5", "local")
        warning = assert_told(lab, "comes in by vlan.5 from beyond", argv=argv)
        lab.host.run(["sh", "-c", warning.split(": ")[-1]])
        assert not warnings(lab, argv=argv) and all(not sure for _, sure in status(lab, argv=argv))
    finally:
        lab.host.wire("link del vlan.5", "route del default")


def passed(lab: Lab, source: str, seconds: float = 0.25) -> int:
    """How many packets of a connection from there get as far as FORWARD."""
    lab.host.run(["iptables", "-Z"])
    with contextlib.suppress(OSError):
        lab.ask(25, source=source, timeout=seconds)
    [line] = [line for line in lab.saved(counters=True).splitlines() if "-A EPOK-FORWARD" in line]
    return int(line[1:].split(":")[0])


@only_nft
def test_an_interface_that_is_missing_is_told(lab: Lab) -> None:
    assert_told(lab, "no interface eth9: give -i", MAIL, argv=("-i", "eth9,eth0", "local"))


@pytest.mark.parametrize(
    "rule, to",
    [
        ("iptables -I FORWARD -i eth0 -j DROP", HOST),
        ("iptables -t nat -I PREROUTING -p tcp --dport 25 -j DNAT --to-destination 198.51.100.10:25", HOST),
        ("ip6tables -I FORWARD -i eth0 -d 2001:db8:2::/64 -j REJECT", HOST6),
        ("ip6tables -t nat -I PREROUTING -p tcp --dport 25 -j REDIRECT --to-ports 9", HOST6),
    ],
)
def test_a_rule_in_front_of_a_hook_is_told_and_the_cure_puts_epok_first(lab: Lab, rule: str, to: str) -> None:
    assert not warnings(lab, BOTH)
    lab.host.run(rule.split())
    warning = assert_told(lab, r"(takes|drops) tcp/25 from eth0 by -A (FORWARD|PREROUTING) ", BOTH)
    assert not reaches(lab, to)
    assert_mended(lab, warning, to)


@pytest.mark.parametrize("version, to", [("", HOST), ("6", HOST6)])
def test_the_other_backends_tables_are_told_with_what_opens_them(lab: Lab, version: str, to: str) -> None:
    other = f"ip{version}tables-{'legacy' if lab.backend == 'nft' else 'nft'}"
    iptables(lab, "-P FORWARD DROP;-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", other)
    warning = assert_told(lab, f"drops tcp/25 from eth0 by -P FORWARD DROP; let it pass: {other} ", BOTH)
    assert not reaches(lab, to)
    assert_mended(lab, warning, to)


def test_an_iptables_that_does_not_tell_its_backend_is_known_by_where_epoks_chains_are(
    lab: Lab, tmp_path: Path
) -> None:
    """From 1.8.3 to 1.8.7 iptables-save prints the same first line in both."""
    for tool in ("iptables-save", "ip6tables-save"):
        real = lab.host.run(["sh", "-c", f"command -v {tool}"]).stdout.strip()
        mute = "s/^(# Generated by .*-save v)[0-9.]+( .nf_tables.)?/\\11.8.7/"
        (tmp_path / tool).write_text(f'#!/bin/sh\n{real} "$@" | sed -E "{mute}"\n')
        (tmp_path / tool).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert not warnings(lab)
    other = f"iptables-{'legacy' if lab.backend == 'nft' else 'nft'}"
    iptables(lab, "-A INPUT -p tcp --dport 9 -j ACCEPT", other)
    iptables(lab, "-t raw -A PREROUTING -p tcp --dport 25 -j DROP")
    done = lab.epok("--status", "-o", "json", *LOCAL, snapshot=lab.cluster(MAIL), env=env)
    iptables(lab, "-t raw -F")
    [shown] = json.loads(done.stdout)["hosts"]
    assert shown["backend"] == f"iptables 1.8.7 ({lab.backend})"
    [problem] = [check["problem"] for check in shown["checks"] if check["problem"]]
    assert "let it pass: iptables -t raw -I PREROUTING" in problem


@pytest.mark.parametrize(
    "text", [wall(""), wall("reject", policy="accept"), wall("", "ip")], ids=["policy", "reject", "ip"]
)
def test_native_tables_are_told_with_what_opens_them(lab: Lab, text: str) -> None:
    native(lab, text)
    warning = assert_told(lab, r"drops tcp/25 from eth0 by nft table \w+ wall, chain forward, ", BOTH)
    assert not reaches(lab)
    assert_mended(lab, warning)


@only_legacy
def test_native_chains_in_a_table_filter_are_no_iptables_rules(lab: Lab) -> None:
    native(lab, wall("", "ip").replace("wall", "filter"))
    warning = assert_told(lab, "by nft table ip filter, chain forward, its policy")
    assert_mended(lab, warning)


def test_firewalld_drops_with_strict_forward_ports_alone(lab: Lab) -> None:
    native(lab, STRICT)
    assert_told(lab, "chain filter_FORWARD, handle .*; StrictForwardPorts=no in /etc/firewalld/firewalld.conf")
    assert not reaches(lab)
    native(lab, "delete table inet firewalld\n" + NOT_STRICT)
    assert reaches(lab, seconds=10)
    assert not warnings(lab) and not status(lab)


@only_nft
@pytest.mark.parametrize("protocol, address, told", [
    ("tcp", "0.0.0.0", True), ("tcp", "192.0.2.1", True), ("udp", "0.0.0.0", True), ("tcp", "::", True),
    ("tcp", "127.0.0.1", False), ("udp", "127.0.0.1", False), ("tcp", "::1", False), ("tcp", "::ffff:127.0.0.1", False),
    ("tcp", "10.0.0.1", False), ("tcp", "2001:db8:1::1", False),
])  # fmt: skip
def test_a_program_that_a_forward_hides_is_told(lab: Lab, protocol: str, address: str, told: bool) -> None:
    """Not one that clients who come in by the interface could not, or would not, have reached."""
    code = (
        "import socket as s, sys; v6 = ':' in sys.argv[2]; "
        "k = s.socket(s.AF_INET6 if v6 else s.AF_INET, s.SOCK_STREAM if sys.argv[1] == 'tcp' else s.SOCK_DGRAM); "
        "k.bind((sys.argv[2], int(sys.argv[3]))); sys.argv[1] == 'tcp' and k.listen(); print('up', flush=True); input()"
    )
    number, wanted = ("25", MAIL) if protocol == "tcp" else ("53", DNS)
    argv = ["/usr/bin/env", "python3", "-c", code, protocol, address, number]
    with lab.host.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout and program.stdout.readline() == "up\n"
        if told:
            where = "" if address in ("0.0.0.0", "::") else f" at {address}"
            warning = assert_told(lab, rf"listens on {protocol}/{number}{where}, and clients get default/", wanted)
            command = re.search(r"\((ss .*) names it\)", warning)
            assert command and f":{number}" in lab.host.run(["sh", "-c", command[1]]).stdout
        else:
            assert not warnings(lab, wanted) and not status(lab, wanted)
        program.kill()
    assert not warnings(lab, wanted) and not status(lab, wanted)


@only_nft
def test_a_node_that_does_not_answer_is_explained(lab: Lab) -> None:
    assert not warnings(lab)
    refuse = "iptables-nft -I INPUT -p tcp --dport 2025 -j REJECT --reject-with tcp-reset"
    lab.nodes[1].run(refuse.split())
    try:
        story = explained(lab)
    finally:
        lab.nodes[1].run(["iptables-nft", "-F", "INPUT"])
    assert "FAILED  10.0.0.12 port 2025 does not answer this host: Connection refused" in story
    assert "Most likely: 10.0.0.12 port 2025 does not answer" in story
    assert story.count("FAILED") == 1 and explained(lab).count("FAILED") == 0


# ---- epok's verdict beside the kernel's

DOCKER = (
    "-P FORWARD DROP;-N USER;-N DOCKER-FORWARD;-N DOCKER;-N STAGE-1;-N STAGE-2;"
    "-A STAGE-1 -i docker0 ! -o docker0 -j STAGE-2;-A STAGE-1 -j RETURN;"
    "-A STAGE-2 -o docker0 -j DROP;-A STAGE-2 -j RETURN;"
    "-A DOCKER -d 172.17.0.2 ! -i docker0 -o docker0 -p tcp --dport 80 -j ACCEPT;"
    "-A DOCKER ! -i docker0 -o docker0 -j DROP;"
    "-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT;"
    "-A DOCKER-FORWARD -j STAGE-1;-A DOCKER-FORWARD -o docker0 -j DOCKER;"
    "-A DOCKER-FORWARD -i docker0 ! -o docker0 -j ACCEPT;-I FORWARD -j DOCKER-FORWARD;-I FORWARD -j USER"
)
NAT = "-t nat -I PREROUTING"
AHEAD = {
    "Docker": (WELL, DOCKER),
    "kube-proxy": (WELL, "-N KUBE;-A KUBE -m conntrack --ctstate INVALID -j DROP;-I FORWARD -j KUBE"),
    "kube-proxy's nat": (WELL, f"-t nat -N K;-t nat -A K -d 10.96.0.1 -p tcp -j DNAT --to 10.0.0.9;{NAT} -j K"),
    "reject": (LOST, "-I FORWARD -j REJECT"),
    "new from there to there": (LOST, "-I FORWARD -i eth+ -o eth1 -m conntrack --ctstate NEW -j DROP"),
    "another interface": (WELL, "-I FORWARD -i eth2 -j DROP"),
    "the NodePort among others": (LOST, "-I FORWARD -d 10.0.0.0/24 -p tcp -m multiport --dports 25,2000:2030 -j DROP"),
    "the external port": (WELL, "-I FORWARD -p tcp --dport 25 -j DROP"),
    "all but the NodePort": (WELL, "-I FORWARD -p tcp ! --dport 2025 -o eth1 -j DROP"),
    "not translated": (WELL, "-I FORWARD -m conntrack ! --ctstate DNAT,ESTABLISHED -j DROP"),
    "a comment of rules": (WELL, '-I FORWARD -m comment --comment "! -j DROP" -i eth2 -j DROP'),
    "after a chain that ends": (LOST, "-N W;-A W -p udp -j ACCEPT;-I FORWARD -j DROP;-I FORWARD -j W"),
    "after a chain that accepts": (WELL, "-N W;-A W -j ACCEPT;-I FORWARD -j DROP;-I FORWARD -j W"),
    "return to a policy": (LOST, "-P FORWARD DROP;-I FORWARD -j RETURN"),
    "a way of no return": (LOST, "-N W;-A W -p udp -j ACCEPT;-P FORWARD DROP;-I FORWARD -g W"),
    "epok's mark": (WELL, "-I FORWARD -j DROP;-I FORWARD -m connmark --mark 0x10000000/0x10000000 -j ACCEPT"),
    "all but a source": (PERHAPS, "-N W;-A W -s 192.0.2.0/24 -j RETURN;-A W -j DROP;-I FORWARD -j W"),
    "a source": (PERHAPS, "-I FORWARD -j DROP;-I FORWARD -s 192.0.2.0/24 -j ACCEPT"),
    "one node": (PERHAPS, "-I FORWARD -d 10.0.0.11 -j DROP"),
    "nat accepts": (LOST, f"{NAT} -p tcp -j ACCEPT"),
    "nat returns": (LOST, f"{NAT} -p tcp --dport 25 -j RETURN"),
    "nat for the address": (LOST, f"{NAT} -d 192.0.2.1 -p tcp --dport 25 -j DNAT --to 10.0.0.9"),
    "nat for another address": (WELL, f"{NAT} -d 10.0.0.1 -p tcp --dport 25 -j DNAT --to 10.0.0.9"),
    "nat for another protocol": (WELL, f"{NAT} -p udp -j DNAT --to 10.0.0.9"),
    "nat of what is local": (LOST, f"{NAT} -m addrtype --dst-type LOCAL -j DNAT --to 10.0.0.9"),
}  # fmt: skip
BACK = "ct state established,related accept\n"
SETS = 'set ifs { type ifname; elements = { "eth0", "eth2" } }\nchain w { udp dport 1 accept; }'
NATIVE = {
    "firewalld": (WELL, NOT_STRICT),
    "firewalld, strict": (LOST, STRICT),
    "interfaces": (WELL, wall(BACK + 'iifname "eth0" oifname { "eth1", "eth2" } accept')),
    "a pattern of interfaces": (WELL, wall(BACK + 'iifname "eth*" accept')),
    "other interfaces": (LOST, wall(BACK + 'iifname { "eth1", "eth2" } accept')),
    "a named set": (PERHAPS, wall(BACK + "iifname @ifs accept", more=SETS)),
    "networks": (WELL, wall(BACK + "ip daddr 10.0.0.0/24 accept")),
    "ranges": (WELL, wall(BACK + "ip daddr 10.0.0.2-10.0.0.99 tcp dport { 25, 2000-2030 } accept")),
    "NodePort": (WELL, wall(BACK + "tcp dport 2025 accept")),
    "external port": (LOST, wall(BACK + "tcp dport 25 accept")),
    "all but one port": (WELL, wall(BACK + "th dport != 25 accept")),
    "a commented port": (WELL, wall(BACK + 'tcp dport { 2025 comment "mail", 1 } accept')),
    "another version": (LOST, wall(BACK + "ip6 daddr ::/0 accept\nmeta nfproto ipv6 accept")),
    "other protocols": (LOST, wall(BACK + "icmp type echo-request accept\nip protocol udp accept")),
    "another protocol": (LOST, wall(BACK + "meta l4proto { udp, sctp } accept")),
    "a log with a limit": (LOST, wall(BACK + 'limit rate 5/minute log prefix "no "')),
    "return": (LOST, wall(BACK + "return\naccept")),
    "goto": (LOST, wall(BACK + "goto w\naccept", more=SETS)),
    "jump": (WELL, wall(BACK + "jump w\naccept", more=SETS)),
    "translated": (WELL, wall(BACK + "ct status dnat accept")),
    "translated alone": (PERHAPS, wall(BACK + "ct status == dnat accept")),
    "new": (WELL, wall(BACK + "ct state new accept")),
    "epok's mark": (WELL, wall("ct mark and 0x10000000 == 0x10000000 accept")),
    "another mark": (PERHAPS, wall(BACK + "ct mark 0x30000000 accept")),
    "high ports": (PERHAPS, wall(BACK + "tcp dport > 1024 accept")),
    "a source": (PERHAPS, wall(BACK + "ip saddr 192.0.2.0/24 accept")),
    "a map": (PERHAPS, wall("ct state vmap { established : accept, new : accept }")),
    "another hook": (WELL, wall("").replace("hook forward", "hook input")),
}  # fmt: skip


@pytest.mark.parametrize("verdict, rules", AHEAD.values(), ids=AHEAD)
def test_what_is_said_of_rules_in_front_is_what_the_kernel_does(lab: Lab, verdict: str, rules: str) -> None:
    forwarding(lab)
    iptables(lab, rules)
    assert_truth(lab, verdict)


@only_nft
@pytest.mark.parametrize("verdict, rules", NATIVE.values(), ids=NATIVE)
def test_what_is_said_of_native_chains_is_what_the_kernel_does(lab: Lab, verdict: str, rules: str) -> None:
    forwarding(lab)
    native(lab, rules)
    assert_truth(lab, verdict)


def forwarding(lab: Lab, saved: dict[str, str] = {}) -> None:  # noqa: B006
    """As after a run; the first one's rules are kept, since that is quicker."""
    if lab.backend not in saved:
        assert not warnings(lab)
        saved[lab.backend] = lab.saved()
    lab.host.run(["iptables-restore"], saved[lab.backend])


def assert_truth(lab: Lab, verdict: str) -> None:
    found = status(lab)
    assert [sure for _, sure in found] == {WELL: [], LOST: [True], PERHAPS: [False]}[verdict], found
    if verdict == PERHAPS:
        assert "this host perhaps " in found[0][0]
    else:
        assert reaches(lab, seconds=10 if verdict == WELL else 0.25) == (verdict == WELL)
    if verdict != WELL:
        assert len(warnings(lab)) == (verdict == LOST)


# ---- what cannot be seen

UNSEEN = {
    "nft": ("nothing takes or drops", "nft -j list chains: "),
    "ss": ("no program of the host listens", "ss -Hltun: "),
    "ip netconf": ("rp_filter lets clients in", "ip netconf: "),
    "ip route": ("rp_filter lets clients in", "ip route get "),
    "ip -br": ("there is an interface", ""),
}


@only_nft
@pytest.mark.parametrize("command", UNSEEN)
def test_what_a_host_does_not_tell_is_not_said_to_be_well(lab: Lab, command: str) -> None:
    tool, _, word = command.partition(" ")
    what, reason = UNSEEN[command]
    script = f'#!/bin/sh\ncase "$*" in *"{word}"*) echo no >&2; exit 1;; *) exec /run/seen/{tool} "$@";; esac\n'
    links = f"mkdir -p /run/seen /run/blind; ln -sf $(command -v {tool}) /run/seen"
    lab.host.run(["sh", "-c", f"{links}; tee /run/blind/{tool} >/dev/null; chmod +x /run/blind/{tool}"], script)
    path = {"PATH": "/run/blind:/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        cluster = lab.cluster(MAIL)
        done = lab.epok(*LOCAL, snapshot=cluster, env=path)
        assert done.returncode == 0 and lab.ask(25), done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith("warning")] == [
            line for line in done.stderr.splitlines() if "ip -br addr" in line
        ]
        shown = lab.epok("--explain", "default/mail", *LOCAL, snapshot=cluster, env=path)
    finally:
        lab.host.run(["rm", "-r", "/run/blind"])
    assert shown.returncode == 0 and "FAILED" not in shown.stdout, shown.stdout
    assert f"ok      {what}" not in shown.stdout
    assert f"maybe   this host does not tell all that matters: {reason}" in shown.stdout or not reason


def test_a_healthy_host_passes_every_check(lab: Lab) -> None:
    assert not warnings(lab)
    lines = explained(lab).splitlines()
    assert [line for line in lines if line.startswith(("  FAILED", "  maybe"))] == [
        line for line in lines if "looks like a mail server's" in line and "  maybe" in line
    ]
    assert all(any(line.startswith(f"  ok      {what}") for line in lines) for what, _ in UNSEEN.values())


@only_nft
def test_checks_that_do_not_end_do_not_keep_the_rules_from_the_host(lab: Lab) -> None:
    script = "mkdir -p /run/blind; printf '#!/bin/sh\\nexec sleep 1000\\n' >/run/blind/ss; chmod +x /run/blind/ss"
    lab.host.run(["sh", "-c", script])
    try:
        path = {"PATH": "/run/blind:/usr/sbin:/usr/bin:/sbin:/bin"}
        done = lab.epok("--timeout", str(stretched(4)), *LOCAL, snapshot=lab.cluster(MAIL), env=path)
    finally:
        lab.host.run(["rm", "-r", "/run/blind"])
    assert done.returncode == 0 and lab.ask(25), done.stderr
    assert done.stderr.count("warning: ") == 1 and "was not checked" in done.stderr


# ---- whatever a host prints


class Fake(epok.LocalHost):
    """A host whose commands print what they are told to."""

    def __init__(self, out: str, status: int = 0) -> None:
        self.out, self.status = out, status

    def run(
        self, argv: Sequence[str], text: str, deadline: epok.Deadline, take: epok.Take | None = None
    ) -> epok.Result:
        return epok.Result(self.status, self.out, "")


class Visited(epok.Visit):
    """Such a host, with tables of iptables-legacy and nothing else of its own."""

    facts: Any = epok.Facts({}, {})
    found: Any = {4: {name: epok.Table(beside=True) for name in ("nat", "filter")}, 6: None}

    def __init__(self, out: str, status: int) -> None:
        options = epok.parse_options(["-i", "eth0", "local"], {})
        super().__init__(Fake(out, status), options, epok.Deadline(9))

    def arrive(self) -> Any:
        pass


PACKETS = [
    epok.Packet(4, "eth0", lambda: "eth1", "tcp", 25, epok.ipaddress.ip_address("10.0.0.11"), False, 0x10000000),
    epok.Packet(6, "eth0", str, "udp", 53, epok.ipaddress.ip_address("2001:db8::1"), True),
]
KNOWN = """match left right op == in set elem val prefix addr len range payload ip daddr tcp dport ct state meta iifname
l4proto jump goto target f drop accept limit xt eth0 @s 10.0.0.0 new key field protocol expr chain rule nftables hook
forward name table family inet policy & mark"""
WORDS = st.sampled_from(KNOWN.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)
LEFTS = [
    {kind: {key: value, "protocol": layer}}
    for kind, key in (("meta", "key"), ("ct", "key"), ("payload", "field"))
    for value in ("iifname", "l4proto", "state", "status", "daddr", "dport", "protocol")
    for layer in ("ip", "tcp", "th")
]
OPERATORS = st.sampled_from(["==", "!=", "in", "<"])
MATCH = st.fixed_dictionaries({"left": st.sampled_from(LEFTS) | JSON, "op": OPERATORS | JSON, "right": JSON}) | JSON
EXPRESSIONS = st.lists(st.dictionaries(st.just("match"), MATCH) | st.dictionaries(WORDS, JSON, max_size=2), max_size=3)
RULE = st.fixed_dictionaries({"rule": st.fixed_dictionaries({"expr": EXPRESSIONS | JSON})})
BASE = {
    "hook": st.just("forward"),
    "family": st.just("inet"),
    "table": WORDS | JSON,
    "name": WORDS | JSON,
    "policy": JSON,
}
LISTED = st.lists(RULE | st.fixed_dictionaries({"chain": st.fixed_dictionaries(BASE)}) | JSON, max_size=4)
PRINTED = """-A FORWARD -P W - ! -i -p tcp -d --dport --dports 25 25: x:1 99999999 ² 10.0.0.0/99 -m connmark --mark
--comment " ' -j -g W RETURN DROP EPOK-FORWARD :FORWARD :W : *filter COMMIT [ ] %lo default dev eth0
tcp [::1]:1 *:25 0.0.0.0%lo:9 :::7 via nexthop inet rp_filter strict all"""
LINES = st.lists(st.sampled_from([*PRINTED.split(), "\n", "\n-A"]) | st.text(max_size=4), max_size=60).map(" ".join)


@given(LINES)
def test_no_text_of_ip_ss_or_iptables_breaks_a_check(text: str) -> None:
    for line in text.splitlines():
        epok.to_listener(line)
    epok.Saved("filter").read(text.split("\n"))
    saved = "*filter\n:FORWARD ACCEPT [0:0]\n:W - [0:0]\n" + text
    for packet in PACKETS:
        rules = epok.iptables_rules(epok.Saved("filter").read(saved.split("\n")).others)
        epok.Walk(rules, packet).decision("FORWARD")


@given(LISTED.map(lambda listed: json.dumps({"nftables": listed})) | st.text() | LINES, st.integers(0, 1))
def test_nothing_that_nft_prints_breaks_a_check(text: str, status: int) -> None:
    visit = Visited(text, status)
    for packet in PACKETS:
        rules = epok.nft_rules(visit, epok.BaseChain(0, "inet", "wall", "f", "drop", "forward", "filter"))
        _, sure = epok.Walk(rules, packet).decision("f")
        assert not (status and sure), "a chain that was not read may do anything"
    visit.look_around()
    for each in epok.firewalls(visit):
        epok.Walk(each.rules, PACKETS[0]).decision(each.chain)


@settings(max_examples=20)
@given(st.integers(2, 400), st.booleans())
def test_chains_without_end_come_to_one(count: int, circle: bool) -> None:
    """Each of them jumps to the next one three times."""
    chains = {
        f"W{n}": [f"-A W{n} -s 192.0.2.{m} -j W{(n + 1) % count if circle else n + 1}" for m in range(3)]
        for n in range(count)
    }
    ended = threading.Event()
    epok.Background(lambda: epok.Walk(epok.iptables_rules(chains), PACKETS[0]).decision("W0") and ended.set())
    assert ended.wait(300)
