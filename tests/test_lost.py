"""Where a connection is lost, on hosts as people have them: what is said, the cure as printed, then the connection.

Each host is the lab's, changed by a few commands; a client really tries before and after. Beside them healthy hosts.
"""

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from lab.network import CLIENT, HOST, Answer, Lab, warnings_in
from lab.objects import Object, endpoint, endpoint_slice, port, service, slice_port, snapshot
from lab.objects import node as node_object

RECORD = False  # some hosts here have another PATH
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")])
DNS = service("dns", "53:30053", [port(53, 30053, "dns", "UDP")])
KEPT = service("mail", "25:2025", [port(25, 2025, "smtp")], policy="Local")
BOTH_WAYS = ("-i", "eth0,eth2", "local")
LOCAL = ("-i", "eth0", "local")
BEYOND, CROWD = "203.0.113.5", "198.18.0.7"  # clients of no network of the host: of inside, and of the client
only_nft = pytest.mark.parametrize("lab", ["nft"], indirect=True)

NATIVE = "nft -f - <<END\ntable inet wall {{\nchain c {{\ntype {} hook {} priority {};\n{}\n}}\n}}\nEND"
TWO_UPLINKS = """ip route del 198.18.0.0/24; ip route add default via 192.0.2.10
ip route add default via 198.51.100.10 table 2; ip route add 10.0.0.0/24 dev eth1 table 2
"""
MARKS = """iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark
iptables -t mangle -A PREROUTING -i eth2 -m mark --mark 0 -j MARK --set-mark 2
iptables -t mangle -A PREROUTING -j CONNMARK --save-mark
ip rule add fwmark 2 lookup 2
"""
VPN = "ip route del 198.18.0.0/24; ip route add default via 192.0.2.10; "
VPN += "ip route add 0.0.0.0/1 via 198.51.100.10; ip route add 128.0.0.0/1 via 198.51.100.10"
SYNPROXY = """iptables -t raw -A PREROUTING -p tcp --dport 25 --syn -j CT --notrack
iptables -A INPUT -p tcp --dport 25 -m conntrack --ctstate INVALID,UNTRACKED -j SYNPROXY --sack-perm --mss 1460
"""


class Host(NamedTuple):
    """What is done to a host, what is said of it, whether that is sure, and how a client tries."""

    setup: str
    says: str
    sure: bool = True
    argv: Sequence[str] = LOCAL
    source: str = CLIENT[0]
    wanted: Object = MAIL
    backends: str = "nft legacy"


def drops(by: str) -> str:
    return f"this host drops tcp/25 from eth0 by {by}"


HOSTS = {
    "raw, notrack": Host("iptables -t raw -A PREROUTING -p udp --dport 53 -j CT --notrack",
                         "does not track udp/53 from eth0 by -A PREROUTING .* --notrack; let", wanted=DNS),
    "raw, drop": Host("iptables -t raw -A PREROUTING -p tcp --dport 25 -j DROP", drops("-A PREROUTING -p tcp")),
    "SYNPROXY": Host(SYNPROXY, "does not track tcp/25 from eth0 by .* CT --notrack; let"),
    "mangle, some clients": Host("iptables -t mangle -A PREROUTING -s 192.0.0.0/8 -j DROP",
                                 "perhaps drops tcp/25 from eth0 by -A PREROUTING -s 192.0.0.0/8 ", False),
    "mangle FORWARD": Host("iptables -t mangle -A FORWARD -m conntrack --ctstate NEW -j DROP",
                           drops("-A FORWARD .*; let it pass: iptables -t mangle -I FORWARD -m connmark ")),
    "mangle POSTROUTING": Host("iptables -t mangle -A POSTROUTING -o eth1 -p tcp --dport 2025 -j DROP",
                               drops("-A POSTROUTING .*; let it pass: iptables -t mangle -I POSTROUTING -m connmark ")),
    "raw of the other backend": Host("OTHER -t raw -A PREROUTING -i eth0 -p tcp --dport 25 -j DROP",
                                     drops("-A PREROUTING .*; let it pass: iptables-(nft|legacy) -t raw -I ")),
    "native prerouting": Host(NATIVE.format("filter", "prerouting", -200, "tcp dport 25 drop"),
                              drops("nft table inet wall, chain c, handle")),
    "native prerouting, translated": Host(NATIVE.format("filter", "prerouting", 0, "tcp dport 2025 drop"),
                                          drops("nft table inet wall, chain c, handle")),
    "native postrouting, of an odd name": Host(
        NATIVE.replace("wall", "MATCH").format("filter", "postrouting", 0, "tcp dport 2025 ct state new drop"),
        drops("nft table inet MATCH, chain c, handle")),
    "native nat, made later": Host(
        NATIVE.format("nat", "prerouting", "dstnat", "tcp dport 25 dnat ip to 10.0.0.12:30080"),
        "this host takes tcp/25 from eth0 by nft table inet wall, chain c", backends="nft"),
    "native nat beside legacy": Host(
        NATIVE.format("nat", "prerouting", "dstnat", "tcp dport 25 dnat ip to 10.0.0.12:30080"),
        "this host perhaps takes tcp/25 from eth0 by nft table inet wall, chain c", False, backends="legacy"),
    "native nat, earlier priority": Host(
        NATIVE.format("nat", "prerouting", -110, "iif eth0 fib daddr type local tcp dport 25 redirect to :9"),
        "this host takes tcp/25 from eth0 by nft table inet wall, chain c"),
    "accepted before it is masqueraded": Host(
        "iptables -t nat -I POSTROUTING -d 10.0.0.0/24 -j ACCEPT",
        "shows nodes the clients of tcp/25 from eth0 by -A POSTROUTING -d 10.0.0.0/24 -j ACCEPT; delete"),
    "a VPN's, for some clients": Host(
        "iptables -t nat -I POSTROUTING -s 192.0.0.0/16 -d 10.0.0.0/24 -j ACCEPT",
        "perhaps shows nodes the clients of tcp/25 from eth0 by -A POSTROUTING -s 192.0.0.0/16 ", False),
    "marks copied to packets": Host(
        TWO_UPLINKS + MARKS, "gives packets epok's bits of connection marks, .* by -A PREROUTING -j CONNMARK --restore",
        argv=BOTH_WAYS, source=BEYOND),
    "marks overwritten": Host(
        "iptables -P FORWARD DROP; iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark",
        "overwrites epok's bits of connection marks by -A POSTROUTING -j CONNMARK --save-mark "),
    "one interface does not forward": Host("sysctl -w net.ipv4.conf.eth0.forwarding=0",
                                           "does not forward IPv4 that comes in by eth0: sysctl"),
    "answers are not forwarded": Host("sysctl -w net.ipv4.conf.eth1.forwarding=0",
                                      "does not forward IPv4 that comes in by eth1: sysctl"),
    "OpenVPN's routes": Host(VPN, "sends answers to clients beyond the networks of eth0 by eth2: ip route", False,
                             source=CROWD),
    "routes by address": Host(TWO_UPLINKS + "ip rule add from 198.51.100.1 lookup 2",
                              "sends answers to clients beyond the networks of eth2 by eth0: ip rule", False,
                              argv=BOTH_WAYS, source=BEYOND),
}  # fmt: skip


HEALTHY = Host("", "")


@pytest.fixture(autouse=True)
def as_before(lab: Lab) -> Iterator[None]:
    """No table, route, rule or setting of one host is there on the next."""
    yield
    lab.host.run(["sh", "-c", UNDO.replace("OTHER", other(lab))])


UNDO = """nft flush ruleset
for t in iptables-legacy ip6tables-legacy; do
    $t -P FORWARD ACCEPT
    for n in $(cat /proc/net/ip_tables_names); do $t -t $n -F; $t -t $n -X; done
done
while ip rule del fwmark 2 2>/dev/null || ip rule del fwmark 0x40000000/0x40000000 2>/dev/null; do :; done
ip rule del from 198.51.100.1 2>/dev/null
for table in 2 7001; do ip route flush table $table 2>/dev/null; done
for n in default 0.0.0.0/1 128.0.0.0/1; do ip route del $n 2>/dev/null; done
ip route replace 198.18.0.0/24 via 192.0.2.10
sysctl -qw net.ipv4.ip_forward=0 net.ipv4.ip_forward=1
for n in all eth0 eth1 eth2; do echo 0 >/proc/sys/net/ipv4/conf/$n/rp_filter; done
"""


def other(lab: Lab) -> str:
    return f"iptables-{'legacy' if lab.backend == 'nft' else 'nft'}"


def sh(lab: Lab, script: str) -> None:
    lab.host.run(["sh", "-ec", script.replace("OTHER", other(lab))])


@pytest.fixture(scope="module", autouse=True)
def somebody_beyond(lab: Lab) -> None:
    """A client behind eth2, of a network that the host does not know."""
    lab.inside.wire(f"addr add {BEYOND}/32 dev lo")


def tries(lab: Lab, host: Host, seconds: float) -> Answer | None:
    """Who answers a client of the host."""
    number, protocol = (53, "udp") if host.wanted is DNS else (25, "tcp")
    inside = host.source == BEYOND
    frm, to = (lab.inside, "198.51.100.1") if inside else (lab.client, HOST)
    with contextlib.suppress(OSError):
        return lab.ask(number, protocol, to, host.source, frm=frm, timeout=seconds)
    return None


def works(answer: Answer | None) -> bool:
    """A node answers at the NodePort, and saw the host as its client."""
    return bool(answer and answer.port in (2025, 30053) and answer.saw == "10.0.0.1")


def run(lab: Lab, host: Host) -> list[str]:
    done = lab.epok(*host.argv, snapshot=lab.cluster(host.wanted), check=True)
    return warnings_in(done.stderr)


def problems(lab: Lab, host: Host) -> dict[str, bool]:
    done = lab.epok("--status", "-o", "json", *host.argv, snapshot=lab.cluster(host.wanted), check=True)
    checks = json.loads(done.stdout)["hosts"][0]["checks"]
    return {check["problem"]: check["sure"] for check in checks if check["problem"]}


def cure_in(problem: str) -> str:
    found = re.search(r"(?:: |or )((?:sysctl|nft|ip6?(?:tables)?)\S* .*?)(?:, and epok's next run.*)?$", problem)
    assert found, problem
    return found[1]


@pytest.mark.parametrize("name", HOSTS)
def test_what_is_lost_is_told_and_the_cure_brings_the_connection(lab: Lab, name: str) -> None:
    host = HOSTS[name]
    if lab.backend not in host.backends:
        return
    assert not run(lab, host)
    sh(lab, host.setup)
    assert not works(tries(lab, host, 0.3))
    found = problems(lab, host)
    assert [sure for problem, sure in found.items() if re.search(host.says, problem)] == [host.sure], found
    assert len(found) == 1 or (name == "marks copied to packets" and len(found) == 2), found
    lab.host.run(["conntrack", "-F"])
    for problem in found:
        sh(lab, cure_in(problem))
    assert not run(lab, host) and not problems(lab, host)
    assert works(tries(lab, host, 10)), found


# ---- who is in the way of whom

PUBLISHES = {
    "Docker": """iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
        iptables -t nat -A DOCKER -i docker0 -j RETURN
        iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 25 -j DNAT --to-destination 10.0.0.12:30080""",
    "CNI": """iptables -t nat -N MARKED; iptables -t nat -N CNI-DN; iptables -t nat -N CNI-HOSTPORT-DNAT
        iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
        iptables -t nat -A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 80,25 -j CNI-DN
        iptables -t nat -A MARKED -j MARK --set-xmark 0x2000/0x2000
        iptables -t nat -A CNI-DN -s 10.244.0.0/24 -p tcp -m tcp --dport 25 -j MARKED
        iptables -t nat -A CNI-DN -p tcp -m tcp --dport 25 -j DNAT --to-destination 10.0.0.12:30080""",
    "native": NATIVE.format("nat", "prerouting", "dstnat", "tcp dport 25 dnat ip to 10.0.0.12:30080"),
    "native, behind": NATIVE.format("nat", "prerouting", -90, "tcp dport 25 dnat ip to 10.0.0.12:30080"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHES)
def test_a_rule_whose_clients_epok_takes_is_told_before_and_after(lab: Lab, name: str) -> None:
    if name == "native" and lab.backend == "legacy":
        return  # nobody can tell which of the two the kernel comes to first
    sh(lab, "nft flush ruleset")  # with the chain that the lab made, which was there before
    sh(lab, PUBLISHES[name])
    assert lab.ask(25, timeout=10).port == 30080
    dry = lab.epok("--dry-run", *LOCAL, snapshot=lab.cluster(MAIL))
    says = "this host has a rule that publishes tcp/25, .*, and clients get default/mail instead: "
    assert re.match(says, *warnings_in(dry.stderr)) and dry.returncode == 3
    for _ in range(2):
        assert re.match(says, *run(lab, HOSTS["raw, drop"]))
    assert lab.ask(25, timeout=10).port == 2025
    assert list(problems(lab, HOSTS["raw, drop"])) == warnings_in(dry.stderr)


@only_nft
def test_a_port_of_a_bridge_lets_nothing_in_and_its_bridge_does(lab: Lab) -> None:
    sh(lab, "sysctl -w net.bridge.bridge-nf-call-iptables=0; ip route add default via 10.0.0.11")
    wrong, right = (Host("", "", argv=("-i", name, "local")) for name in ("node1", "eth1"))

    def reaches() -> bool:
        """A client on the bridge, who may be sent to itself."""
        with contextlib.suppress(OSError):
            return lab.ask(25, to="10.0.0.1", frm=lab.nodes[0], timeout=1).port == 2025
        return False

    assert not run(lab, wrong) and not reaches()
    [(problem, sure)] = problems(lab, wrong).items()
    assert re.search("no address at node1, .*: give -i eth1, ", problem) and not sure
    story = explained(lab, wrong)
    assert story[-1].startswith("Most likely: no connection has come in by node1 yet") and problem in story[-1]
    assert not run(lab, right) and not problems(lab, right) and reaches()


@only_nft
def test_strict_rp_filter_and_openvpn_are_cured_one_after_the_other(lab: Lab) -> None:
    host = HOSTS["OpenVPN's routes"]
    assert not run(lab, host)
    sh(lab, VPN + "; echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter")
    for words in ("drops what comes in by eth0 from beyond .* way back is by eth2: sysctl", host.says):
        assert not works(tries(lab, host, 0.3))
        [problem] = problems(lab, host)
        assert re.search(words, problem)
        sh(lab, cure_in(problem))
    assert not problems(lab, host) and works(tries(lab, host, 10))


@only_nft
def test_a_host_forwards_by_interface_whatever_ip_forward_says(lab: Lab) -> None:
    """As systemd-networkd leaves it, from 256 on."""
    sh(lab, "sysctl -w net.ipv4.ip_forward=0 net.ipv4.conf.eth0.forwarding=1 net.ipv4.conf.eth1.forwarding=1")
    host = HOSTS["raw, drop"]
    assert not run(lab, host) and not problems(lab, host) and works(tries(lab, host, 10))


@only_nft
def test_routes_are_asked_for_one_by_one(lab: Lab) -> None:
    """A table of 500,000 takes ip route 11 seconds."""
    done = lab.epok("-v", "--explain", "default/mail", *LOCAL, snapshot=lab.cluster(MAIL))
    asked = set(re.findall(r"this host: (ip (?:-6 )?route.*?): exit", done.stderr))
    assert asked and all(" get " in command for command in asked)


# ---- hosts on which all is well


def table(name: str, *chains: str, family: str = "inet") -> str:
    return f"nft -f - <<END\ntable {family} {name} {{\n" + "\n".join(chains) + "\n}\nEND"


def chain(name: str, head: str, *rules: str) -> str:
    return f"chain {name} {{\n{head}\n" + "\n".join(rules) + "\n}"


ON = "type {} hook {} priority {}; policy {};"
NEIGHBOURS = {
    "Docker": """iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -N DOCKER
        iptables -A FORWARD -j DOCKER-USER
        iptables -A FORWARD -o docker0 -j DOCKER; iptables -A DOCKER ! -i docker0 -o docker0 -j DROP
        iptables -t raw -A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
        iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
        iptables -t nat -A DOCKER ! -i docker0 -p tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
        iptables -t nat -I POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE""",
    "fail2ban in raw": "".join(f"iptables -t raw -I PREROUTING -s 203.0.113.{n} -j DROP\n" for n in range(70, 75)),
    "fail2ban in INPUT": "iptables -N f2b; iptables -A f2b -j DROP; iptables -I INPUT -p tcp --dport 25 -j f2b",
    "Tailscale": """iptables -N ts-forward; iptables -I FORWARD -j ts-forward
        iptables -A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
        iptables -A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
        iptables -A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP; iptables -A ts-forward -o tailscale0 -j ACCEPT
        iptables -t nat -N ts-post; iptables -t nat -I POSTROUTING -j ts-post
        iptables -t nat -A ts-post -m mark --mark 0x40000/0xff0000 -j MASQUERADE
        ip rule add fwmark 0x80000/0xff0000 lookup 2""",
    "wg-quick": """iptables -t raw -A PREROUTING ! -i wg0 -d 10.6.0.2/32 -m addrtype ! --src-type LOCAL -j DROP
        iptables -t mangle -A POSTROUTING -p udp -m mark --mark 0xca6c -j CONNMARK --save-mark
        iptables -t mangle -A PREROUTING -p udp -j CONNMARK --restore-mark""",
    "libvirt": """iptables -N FWI; iptables -I FORWARD -j FWI; iptables -A FWI -o virbr0 -j REJECT
        iptables -t nat -I POSTROUTING -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN
        iptables -t nat -A POSTROUTING -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE
        iptables -t mangle -A POSTROUTING -o virbr0 -p udp --dport 68 -j CHECKSUM --checksum-fill""",
    "ufw": """iptables -P FORWARD DROP; iptables -N ufw-before; iptables -N ufw-user; iptables -A FORWARD -j ufw-before
        iptables -A ufw-before -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables -A ufw-before -j ufw-user
        iptables -A INPUT -p tcp --dport 25 -j DROP""",
    "miniupnpd": """iptables -t nat -N UPNP; iptables -t nat -A PREROUTING -i eth0 -j UPNP
        iptables -t nat -A UPNP -p udp --dport 40000 -j DNAT --to-destination 10.0.0.12:40000""",
    "uplinks with masks": """iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark --mask 0xff
        iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark --mask 0xff; ip rule add fwmark 2/0xff lookup 2""",
    "clamping": "iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu",
    "invalid": """iptables -t mangle -A PREROUTING -m conntrack --ctstate INVALID -j DROP
        iptables -I FORWARD -m conntrack --ctstate INVALID -j DROP""",
    "no spoofing": """iptables -t raw -A PREROUTING -i eth2 -s 10.0.0.0/24 -j DROP
        iptables -t raw -A PREROUTING -m rpfilter --invert -j DROP""",
    "a flood": """iptables -t mangle -A PREROUTING -p tcp --syn -m hashlimit --hashlimit-above 9000/sec \\
        --hashlimit-name flood -j DROP""",
    "a redirected port": "iptables -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 80",
    "a DMZ": "iptables -t nat -A PREROUTING -i eth0 -j DNAT --to-destination 10.0.0.12",
    "strict, and the way back": "ip route add default via 192.0.2.10; echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter",
    "NetworkManager": table("nm-shared", chain("f", ON.format("filter", "forward", 0, "accept"),
        'ip daddr 10.42.0.0/24 oifname "wlan0" ct state { established, related } accept',
        'ip saddr 10.42.0.0/24 iifname "wlan0" accept', 'iifname "wlan0" reject', 'oifname "wlan0" reject'),
        chain("n", ON.format("nat", "postrouting", 100, "accept"),
        "ip saddr 10.42.0.0/24 ip daddr != 10.42.0.0/24 masquerade"), family="ip"),
    "Incus": table("incus", chain("fwd.br", ON.format("filter", "forward", 0, "accept"), 'oifname "incusbr0" accept'),
        chain("pstrt", ON.format("nat", "postrouting", 100, "accept"), "ip saddr 10.9.0.0/24 masquerade")),
    "fw4": table("fw4", chain("forward_wan", "", 'ct status dnat accept comment "!fw4: Accept port forwards"'),
        chain("forward", ON.format("filter", "forward", 0, "drop"), "ct state established,related accept",
        'iifname "eth0" jump forward_wan'), chain("raw_prerouting", ON.format("filter", "prerouting", -300, "accept")),
        chain("dstnat_lan", "", "tcp dport 25 redirect to :9"),
        chain("dstnat", ON.format("nat", "prerouting", -100, "accept"), 'iifname "br-lan" jump dstnat_lan')),
    "Mullvad": table("mullvad", chain("prerouting", ON.format("filter", "prerouting", -199, "accept"),
        'iifname != "wg0-mullvad" ct mark 0x00000f41 meta mark set 0x6d6f6c65')),
    "kube-proxy": table("kube-proxy", "map nodeports { type inet_proto . inet_service : verdict; }",
        chain("nat-prerouting", ON.format("nat", "prerouting", -100, "accept"),
        "fib daddr type local meta l4proto . th dport vmap @nodeports"), family="ip"),
    "CrowdSec": table("crowdsec", "set bad { type ipv4_addr; elements = { 203.0.113.9 } }",
        chain("forward", ON.format("filter", "forward", -10, "accept"), "ip saddr @bad drop"), family="ip"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_on_a_healthy_host_nothing_is_said_to_be_sure(lab: Lab, name: str) -> None:
    if lab.backend == "legacy" and "table" in NEIGHBOURS[name]:
        return  # as with nft
    assert not run(lab, HEALTHY)
    sh(lab, NEIGHBOURS[name])
    assert works(tries(lab, HEALTHY, 10))
    found = problems(lab, HEALTHY)
    assert True not in found.values(), found
    assert len(found) == (name == "wg-quick"), found  # its rule for udp is one for some


# ---- how far packets came


def explained(lab: Lab, host: Host = HEALTHY, name: str = "default/mail") -> list[str]:
    done = lab.epok("--explain", name, *host.argv, snapshot=lab.cluster(host.wanted), check=True)
    return done.stdout.splitlines()


def test_the_last_line_says_how_far_packets_came(lab: Lab) -> None:
    host = HEALTHY
    assert not run(lab, host)
    lines = explained(lab)
    assert lines[-1].startswith("Most likely: no connection has come in by eth0 yet: try it from another machine, ")
    assert lines[-1].endswith("if tcpdump -ni eth0 tcp port 25 shows nothing on this host, it is lost before it")
    # met, and lost where no check looks
    sh(lab, "iptables -N W; iptables -A W -m mark ! --mark 7 -j DROP; iptables -I FORWARD -j W")
    assert not tries(lab, host, 0.3)
    lines = explained(lab)
    assert re.match("Most likely: [0-9]+ connections? met its rules, and none has left this host again", lines[-1])
    assert_traced(lab, lines, "drop")
    sh(lab, "iptables -D FORWARD -j W; conntrack -F")
    # tracked, unanswered
    for node in lab.nodes:
        node.run(["iptables-nft", "-A", "INPUT", "-p", "tcp", "--dport", "2025", "-m", "recent", "--set", "-j", "DROP"])
    try:
        assert not tries(lab, host, 0.3)
        lines = explained(lab)
    finally:
        for node in lab.nodes:
            node.run(["iptables-nft", "-F", "INPUT"])
    assert "    tracked now: 0 answered, 1 waiting for that" in lines
    assert lines[-1].startswith("Most likely: 10.0.0.11 port 2025 does not answer this host")
    # answered
    assert works(tries(lab, host, 10))
    lines = explained(lab)
    assert re.match("Most likely: it works .*: [0-9]+ connections? (is|are) answered", lines[-1])
    shown = lab.epok("--status", *LOCAL, snapshot=lab.cluster(MAIL)).stdout
    assert re.search(r"CONNECTIONS  ANSWERED\ntcp/25 .* hidden +[0-9]+  [12]/[12]\n", shown)


def assert_traced(lab: Lab, lines: list[str], what: str) -> None:
    """By the commands that are printed, and ended by the other."""
    begin, end = (re.search(rf"^{words}.*?: (.*)$", "\n".join(lines), re.M) for words in ("To see", "To end"))
    assert begin and end
    first, _, watch = begin[1].partition(" && ")
    before = lab.host.run(["nft", "list", "ruleset"]).stdout
    sh(lab, first)
    if lab.backend == "nft":
        with lab.host.popen(shlex.split(watch), stdout=-1) as monitor:
            assert monitor.stdout
            lab.host.run(["sleep", "0.3"])
            tries(lab, HEALTHY, 0.3)
            for line in monitor.stdout:
                if "verdict drop" in line:
                    break
            monitor.kill()
    sh(lab, end[1])
    assert "trace" not in lab.host.run(["nft", "list", "ruleset"]).stdout.lower() or "trace" in before


def test_answers_that_do_not_find_back_are_told_with_policy_local(lab: Lab) -> None:
    pods = endpoint_slice("mail", [endpoint("node1", "10.244.1.5")], [slice_port(25, "smtp")])
    lab.epok(*LOCAL, snapshot=lab.cluster(KEPT, pods), check=True)
    lab.nodes[0].wire("route del default", "route add blackhole default")
    try:
        assert not tries(lab, HEALTHY, 0.3)
        done = lab.epok("--explain", "default/mail", *LOCAL, snapshot=lab.cluster(KEPT, pods), check=True)
    finally:
        lab.nodes[0].wire("route del default", "route add default via 10.0.0.1")
    last = done.stdout.splitlines()[-1]
    assert re.match("Most likely: .* 1 waits for an answer after it left this host: nodes have to route back", last)


@only_nft
def test_connections_of_another_interface_do_not_count_for_a_new_one(lab: Lab) -> None:
    host = HEALTHY
    assert not run(lab, host) and works(tries(lab, host, 10))
    other = Host("", "", argv=("-i", "eth2", "local"))
    assert not run(lab, other)
    last = explained(lab, other)[-1]
    assert last.startswith(
        "Most likely: no connection has come in by eth2 since the rules of EPOK last changed (1 before)"
    )


# ---- BusyBox

BUSYBOX = """#!/bin/sh
case "$*" in
*-br*) echo "ip: unrecognized option: b
BusyBox v1.36.1 () multi-call binary.

Usage: ip [OPTIONS] address|route|link|tunnel|neigh|rule [ARGS]" >&2; exit 1 ;;
*netconf*) echo 'ip: invalid argument 'netconf' to 'ip'
BusyBox v1.36.1 () multi-call binary.' >&2; exit 1 ;;
esac
exec /usr/sbin/ip "$@"
"""


@only_nft
def test_a_host_with_busybox_is_told_in_one_line_and_known_for_a_node(lab: Lab) -> None:
    make = "mkdir -p /run/busybox; cd /run/busybox; tee ip >/dev/null; chmod +x ip; "
    make += "for t in ss conntrack; do printf '#!/bin/sh\\nexit 127\\n' >$t; chmod +x $t; done"
    lab.host.run(["sh", "-c", make], BUSYBOX)
    env = {"PATH": "/run/busybox:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = lab.epok(*LOCAL, snapshot=lab.cluster(MAIL), env=env, check=True)
    [line] = warnings_in(done.stderr)
    assert "ip -br addr: it is BusyBox's; so " in line and "apt-get install iproute2" in line
    assert works(tries(lab, HEALTHY, 10))
    node = snapshot(node_object("here", "192.0.2.1"), MAIL, endpoint_slice(
        "mail", [endpoint("here", "10.244.1.5")], [slice_port(2025, "smtp")]))  # fmt: skip
    done = lab.epok(*LOCAL, snapshot=node, env=env, check=True)
    assert "10.244.1.5" in lab.saved() and lab.ask(25, timeout=10).saw
    # and where nothing tells, what a node has is kept
    lab.host.run(["sh", "-c", "printf '#!/bin/sh\\nexit 1\\n' >/run/busybox/ip"])
    before = lab.saved()
    done = lab.epok(*LOCAL, snapshot=node, env=env)
    assert done.returncode == 1 and "it does not tell whether it is one" in done.stderr
    assert lab.saved() == before


# ---- the bridge gets another name here, so this comes last


@only_nft
def test_a_node_on_a_bridge_reaches_itself_once_its_port_says_hairpin(lab: Lab) -> None:
    lab.host.wire("link set eth1 down", "link set eth1 name vmbr0", "link set vmbr0 up")
    sh(lab, "sysctl -w net.bridge.bridge-nf-call-iptables=1")
    host = Host("", "", argv=("-i", "vmbr0", "local"))
    alone = snapshot(lab.node_objects()[0], MAIL)
    lab.epok(*host.argv, snapshot=alone, check=True)

    def reaches_itself(seconds: float) -> bool:
        with contextlib.suppress(OSError):
            return lab.ask(25, to="10.0.0.1", frm=lab.nodes[0], timeout=seconds).name == "node1"
        return False

    assert not reaches_itself(0.5)
    [(problem, sure)] = problems(lab, host).items()
    command = re.search("(bridge link set dev )PORT (hairpin on)$", problem)
    assert command and not sure
    sh(lab, f"{command[1]}node1 {command[2]}")
    assert reaches_itself(10)
