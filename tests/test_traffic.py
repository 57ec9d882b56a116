"""Packets through a host that epok has set up: who answers, whom it saw, and who is left alone."""

import re
import socket
import subprocess
from typing import Any

import pytest
from lab import CLIENT, CLIENT6, HOST, HOST6, Answer, Lab, read_answer
from objects import endpoint, endpoint_slice, node, port, service, slice_port, snapshot

DUAL = ("IPv4", "IPv6")
NODES = {"node1", "node2", "node3"}
TRIES = 60  # one of three nodes is missed about once in ten thousand million times
SMTP = port(25, 2025, "smtp")
DNS = [port(53, 30053, "dns", "UDP"), port(53, 30053, "dns-tcp")]
BOTH = {4: ("iptables", HOST), 6: ("ip6tables", HOST6)}

# What Docker and kube-proxy leave on a host, shortened.
FOREIGN = """*nat
:DOCKER - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
"""


def mail(**changes: Any) -> dict[str, Any]:
    """The Service of most tests: external port 25, NodePort 2025."""
    return service("mail", "25:2025", [SMTP], **{"families": DUAL, **changes})


def forward(
    lab: Lab, *objects: dict[str, Any], options: str = "-i eth0", nodes: list[dict[str, Any]] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run epok for these Services (and EndpointSlices); the host must be right afterwards."""
    cluster = lab.cluster(*objects) if nodes is None else snapshot(*nodes, *objects)
    done = lab.epok(*options.split(), "local", snapshot=cluster)
    assert done.returncode == 0, done.stderr
    return done


def who(lab: Lab, port: int, *asked: Any, **how: Any) -> set[str]:
    """The names of all who answer there."""
    return {lab.ask(port, *asked, **how).name for _ in range(TRIES)}


def refused(lab: Lab, port: int, *asked: Any, **how: Any) -> bool:
    """Whether the host itself answers that nobody listens there, as if there were no epok."""
    try:
        lab.ask(port, *asked, **how)
    except ConnectionRefusedError:
        return True
    return False


def nodes_without(lab: Lab, name: str) -> list[dict[str, Any]]:
    """The lab's nodes, one of them excluded."""
    found = lab.node_objects()
    for item in found:
        if item["metadata"]["name"] == name:
            item["metadata"]["annotations"]["epok.getbetter.ro/exclude"] = ""
    return found


def echoes(connection: socket.socket, word: bytes = b"still there?\n") -> bool:
    connection.sendall(word)
    return connection.recv(100) == word


def counted(lab: Lab, table: str = "nat") -> list[str]:
    """The rules of a table with their counters."""
    text = lab.host.run(["iptables-save", "-c", "-t", table]).stdout
    return [line for line in text.splitlines() if line.startswith("[")]


# ---- reaching the nodes


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_forwarded_port_reaches_all_nodes(lab: Lab, to: str) -> None:
    forward(lab, mail())
    assert who(lab, 25, to=to) == NODES


@pytest.mark.parametrize("to", [HOST, HOST6])
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_a_mapping_without_protocol_forwards_tcp_and_udp(lab: Lab, protocol: str, to: str) -> None:
    forward(lab, service("dns", "53:30053", DNS, families=DUAL))
    assert who(lab, 53, protocol, to=to) == NODES


def test_a_mapping_of_one_protocol_leaves_the_other(lab: Lab) -> None:
    forward(lab, service("dns", "53:30053/udp", DNS))
    assert who(lab, 53, "udp") == NODES
    assert refused(lab, 53, "tcp")


def test_a_service_of_ipv4_alone_is_not_there_by_ipv6(lab: Lab) -> None:
    forward(lab, mail(families=("IPv4",)))
    assert who(lab, 25) == NODES
    assert refused(lab, 25, to=HOST6)


def test_a_range_of_ports_is_shifted_port_by_port(lab: Lab) -> None:
    pods = [port(8000 + number, 30000 + number, f"p{number}") for number in range(10)]
    forward(lab, service("game", "8000-8009:30000-30009", pods, families=DUAL))
    for to in (HOST, HOST6):
        assert [lab.ask(8000 + number, to=to).port for number in range(10)] == list(range(30000, 30010))
    assert refused(lab, 7999)
    assert refused(lab, 8010)
    assert who(lab, 8005) == NODES


def test_client_affinity_always_meets_the_same_node(lab: Lab) -> None:
    forward(lab, mail(sessionAffinity="ClientIP"))
    for to, sources in ((HOST, CLIENT), (HOST6, CLIENT6)):
        for source in sources:
            assert len(who(lab, 25, to=to, source=source)) == 1


@pytest.mark.parametrize("version", BOTH)
def test_replies_come_back_though_the_policy_of_forward_is_drop(lab: Lab, version: int) -> None:
    tool, to = BOTH[version]
    lab.host.run([tool, "-P", "FORWARD", "DROP"])
    forward(lab, mail(), service("dns", "53:30053", DNS, families=DUAL))
    assert who(lab, 25, to=to) == NODES
    assert who(lab, 53, "udp", to=to) == NODES


@pytest.mark.parametrize("version", BOTH)
def test_a_policy_of_drop_still_holds_for_all_other_traffic(lab: Lab, version: int) -> None:
    tool, _ = BOTH[version]
    lab.host.run([tool, "-P", "FORWARD", "DROP"])
    forward(lab, mail())
    with pytest.raises(TimeoutError):
        lab.ask(2025, to="10.0.0.11" if version == 4 else "2001:db8:2::11", timeout=0.3)


# ---- leaving everything else alone


@pytest.mark.parametrize("to", ["10.0.0.13", "2001:db8:2::13"])
def test_transit_traffic_to_somebody_elses_port_is_not_taken(lab: Lab, to: str) -> None:
    forward(lab, mail())
    with lab.serve(lab.nodes[2], "own-mail", [25]):
        assert {lab.ask(25, to=to)[::3] for _ in range(TRIES)} == {("own-mail", 25)}
        assert lab.ask(25, to=to).saw in (CLIENT[0], CLIENT6[0])
        assert who(lab, 25) == NODES


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_other_ports_of_the_host_stay_its_own(lab: Lab, protocol: str) -> None:
    with lab.serve(lab.host, "host", [26, 2025]):
        forward(lab, mail())
        for to in (HOST, HOST6):
            assert lab.ask(26, protocol, to).name == "host"
            assert lab.ask(2025, protocol, to).name == "host"


def test_a_forwarded_port_hides_the_hosts_own_until_it_goes(lab: Lab) -> None:
    with lab.serve(lab.host, "host", [25]):
        forward(lab, mail())
        assert who(lab, 25) == NODES
        forward(lab)
        assert who(lab, 25) == {"host"}


# ---- who sees whom


@pytest.mark.parametrize(
    ("masquerade", "policy", "saw"),
    [
        ("auto", "Cluster", ("10.0.0.1", "2001:db8:2::1")),
        ("auto", "Local", (CLIENT[0], CLIENT6[0])),
        ("always", "Cluster", ("10.0.0.1", "2001:db8:2::1")),
        ("always", "Local", ("10.0.0.1", "2001:db8:2::1")),
        ("never", "Cluster", (CLIENT[0], CLIENT6[0])),
        ("never", "Local", (CLIENT[0], CLIENT6[0])),
    ],
)
def test_masquerade_decides_whom_the_node_sees(lab: Lab, masquerade: str, policy: str, saw: tuple[str, str]) -> None:
    slices = endpoint_slice("mail", [endpoint(name, "10.244.1.5") for name in sorted(NODES)])
    forward(lab, mail(policy=policy), slices, options=f"-i eth0 --masquerade {masquerade}")
    assert (lab.ask(25).saw, lab.ask(25, to=HOST6).saw) == saw


def test_other_connections_keep_their_source(lab: Lab) -> None:
    forward(lab, mail(), options="-i eth0 --masquerade always")
    assert lab.ask(2025, to="10.0.0.12").saw == CLIENT[0]
    assert lab.ask(2025, to="2001:db8:2::12").saw == CLIENT6[0]


def test_policy_local_goes_to_nodes_with_a_ready_endpoint_alone(lab: Lab) -> None:
    pods = [
        endpoint("node1", "10.244.1.5", ready=False),
        endpoint("node2", "10.244.2.5"),
        endpoint("node3", "10.244.3.5"),
    ]
    forward(lab, mail(policy="Local"), endpoint_slice("mail", pods))
    assert who(lab, 25) == {"node2", "node3"}


def test_a_node_that_is_excluded_gets_nothing(lab: Lab) -> None:
    forward(lab, mail(), nodes=nodes_without(lab, "node2"))
    assert who(lab, 25) == {"node1", "node3"}
    assert who(lab, 25, to=HOST6) == {"node1", "node3"}


def test_a_host_that_is_a_node_itself_forwards_to_the_endpoints(lab: Lab) -> None:
    pods = [endpoint("k3s", "10.0.0.12"), endpoint("k3s", "10.0.0.13")]
    slices = endpoint_slice("mail", pods, [slice_port(30080, "smtp")])
    forward(lab, mail(families=("IPv4",)), slices, nodes=[node("k3s", "10.0.0.1")])
    assert {lab.ask(25)[::3] for _ in range(TRIES)} == {("node2", 30080), ("node3", 30080)}


# ---- from where, and to what


def test_an_interface_that_is_not_named_forwards_nothing(lab: Lab) -> None:
    forward(lab, mail(), options="-i eth2")
    assert refused(lab, 25)
    assert who(lab, 25, to="198.51.100.1", frm=lab.inside) == NODES


@pytest.mark.parametrize("interfaces", ["eth0,eth2", "eth+"])
def test_several_interfaces_and_wildcards_forward(lab: Lab, interfaces: str) -> None:
    forward(lab, mail(), options=f"-i {interfaces}")
    assert who(lab, 25) == NODES
    assert who(lab, 25, to=HOST6) == NODES
    assert who(lab, 25, to="198.51.100.1", frm=lab.inside) == NODES


@pytest.mark.parametrize("to", [HOST, "10.0.0.1", HOST6, "2001:db8:2::1"])
def test_the_host_reaches_its_own_addresses_with_lo_alone(lab: Lab, to: str) -> None:
    forward(lab, mail())
    assert refused(lab, 25, to=to, frm=lab.host)
    forward(lab, mail(), options="-i eth0,lo")
    assert who(lab, 25, to=to, frm=lab.host) == NODES
    assert who(lab, 25, to=to) == NODES
    forward(lab, mail())
    assert refused(lab, 25, to=to, frm=lab.host)


@pytest.mark.parametrize("to", ["127.0.0.1", "::1"])
def test_loopback_addresses_stay_the_hosts_own(lab: Lab, to: str) -> None:
    forward(lab, mail(), options="-i eth0,lo")
    assert refused(lab, 25, to=to, frm=lab.host)
    with lab.serve(lab.host, "host", [25]):
        assert who(lab, 25, to=to, frm=lab.host) == {"host"}


def test_lo_alone_forwards_nothing_from_outside(lab: Lab) -> None:
    forward(lab, mail(), options="-i lo")
    assert who(lab, 25, frm=lab.host) == NODES
    assert refused(lab, 25)


def test_without_addresses_all_of_the_hosts_forward(lab: Lab) -> None:
    forward(lab, mail())
    for to in (HOST, "10.0.0.1", "198.51.100.1", HOST6, "2001:db8:3::1"):
        assert who(lab, 25, to=to) == NODES


@pytest.mark.parametrize("addresses", ["192.0.2.1,2001:db8:1::1", "192.0.2.0/24,2001:db8:1::/64"])
def test_only_the_addresses_that_are_asked_for_forward(lab: Lab, addresses: str) -> None:
    forward(lab, mail(), options=f"-i eth0 --addresses {addresses}")
    for to in (HOST, HOST6):
        assert who(lab, 25, to=to) == NODES
    for to in ("10.0.0.1", "198.51.100.1", "2001:db8:2::1"):
        assert refused(lab, 25, to=to)


@pytest.mark.parametrize("interfaces", ["eth0,eth2", "eth0,eth+", "eth+,eth0"])
@pytest.mark.parametrize("to", [("198.51.100.1", HOST), ("2001:db8:3::1", HOST6)])
def test_internal_services_are_not_there_through_the_external_interface(
    lab: Lab, interfaces: str, to: tuple[str, str]
) -> None:
    inner = service(
        "inner", "80:30080", [port(80, 30080)], families=DUAL, annotations={"epok.getbetter.ro/internal": ""}
    )
    options = f"-i {interfaces} --external-interface eth0"
    forward(lab, mail(), inner, options=options)
    assert who(lab, 80, to=to[0], frm=lab.inside) == NODES
    assert refused(lab, 80, to=to[1])
    assert who(lab, 25, to=to[1]) == NODES
    forward(lab, inner, options=options)  # without any other Service that the interface leads to
    assert who(lab, 80, to=to[0], frm=lab.inside) == NODES
    assert refused(lab, 80, to=to[1])


def allowed_by_annotation(*ranges: str) -> dict[str, Any]:
    return mail(annotations={"epok.getbetter.ro/allow-range": ", ".join(ranges)})


def allowed_by_spec(*ranges: str) -> dict[str, Any]:
    return mail(type="LoadBalancer", loadBalancerSourceRanges=list(ranges))


@pytest.mark.parametrize("allowed", [allowed_by_annotation, allowed_by_spec])
@pytest.mark.parametrize(("to", "sources"), [(HOST, CLIENT), (HOST6, CLIENT6)])
def test_sources_that_are_not_allowed_find_no_epok(lab: Lab, allowed: Any, to: str, sources: tuple[str, str]) -> None:
    forward(lab, allowed("192.0.2.10/32", "2001:db8:1::10/128"))
    assert who(lab, 25, to=to, source=sources[0]) == NODES
    assert refused(lab, 25, to=to, source=sources[1])
    with lab.serve(lab.host, "host", [25]):
        assert who(lab, 25, to=to, source=sources[1]) == {"host"}
        assert who(lab, 25, to=to, source=sources[0]) == NODES


def test_ranges_of_one_family_shut_the_other_out(lab: Lab) -> None:
    forward(lab, allowed_by_annotation("192.0.2.0/24"))
    assert who(lab, 25) == NODES
    assert refused(lab, 25, to=HOST6)


def test_a_range_of_everybody_lets_everybody_in(lab: Lab) -> None:
    forward(lab, allowed_by_annotation("0.0.0.0/0", "::/0"))
    assert who(lab, 25) == NODES
    assert who(lab, 25, to=HOST6, source=CLIENT6[1]) == NODES


def test_a_range_that_means_nothing_opens_nothing(lab: Lab) -> None:
    forward(lab, allowed_by_annotation("192.0.2.0/24", "192.0.2.300"))
    assert refused(lab, 25)


# ---- one run after the other


def test_a_second_run_changes_nothing_and_keeps_the_counters(lab: Lab) -> None:
    forward(lab, mail())
    assert who(lab, 25) == NODES
    before = counted(lab)
    assert [line for line in before if re.match(rf"\[{TRIES}:\d+\] -A EPOK ", line)]
    second = forward(lab, mail())
    assert counted(lab) == before
    assert len(second.stderr.splitlines()) == 1
    assert "nothing changed" in second.stderr


def test_a_forward_that_comes_keeps_the_counters_of_the_others(lab: Lab) -> None:
    forward(lab, mail())
    assert who(lab, 25) == NODES
    leaf = [line for line in counted(lab) if re.search(r"-A EPOK-tcp-25-\w{6} ", line)]
    forward(lab, mail(), service("dns", "53:30053", DNS))
    assert len(leaf) == 1 + len(NODES)
    assert not set(leaf) - set(counted(lab))
    assert who(lab, 25) == who(lab, 53) == NODES


def test_a_service_whose_annotation_goes_is_not_reachable_any_more(lab: Lab) -> None:
    web = service("web", "80:30080", [port(80, 30080)])
    forward(lab, mail(), web)
    assert who(lab, 80) == NODES
    forward(lab, mail(), service("web", None, [port(80, 30080)]))
    assert refused(lab, 80)
    assert who(lab, 25) == NODES


@pytest.mark.parametrize("how", ["--batch-size 2000", "--batch-commands false"])
def test_a_swap_in_stages_ends_where_one_in_a_single_run_does(lab: Lab, how: str) -> None:
    services = [service(f"web{number}", f"{8000 + 7 * number}:30080", [port(80, 30080)]) for number in range(40)]
    forward(lab, mail(), *services)
    whole = lab.saved()
    lab.flush()
    forward(lab, mail(), *services[::2], options=f"-i eth0 {how}")
    assert refused(lab, 8007)
    forward(lab, mail(), *services, options=f"-i eth0 {how}")
    assert who(lab, 8007) == who(lab, 25) == NODES
    assert sorted(lab.saved().splitlines()) == sorted(whole.splitlines())
    forward(lab, mail(), options=f"-i eth0 {how}")
    assert refused(lab, 8007)
    assert who(lab, 25) == NODES


@pytest.mark.parametrize("version", BOTH)
def test_an_open_connection_outlives_every_run(lab: Lab, version: int) -> None:
    tool, to = BOTH[version]
    lab.host.run([tool, "-P", "FORWARD", "DROP"])
    forward(lab, mail())
    with lab.connect(25, to=to) as connection:
        name = read_answer(connection).name
        assert echoes(connection)
        forward(lab, mail(), nodes=nodes_without(lab, name))
        assert echoes(connection, b"after the node was excluded\n")
        assert who(lab, 25, to=to) == NODES - {name}
        forward(lab)
        assert echoes(connection, b"after all forwards went\n")
        assert refused(lab, 25, to=to)
        forward(lab, mail())
        assert echoes(connection, b"and when they are back\n")


def flow(lab: Lab, sport: int = 5353, port: int = 53, to: str = HOST) -> Answer:
    """One question of a UDP client that keeps its source port."""
    return lab.ask(port, "udp", to, sport=sport)


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_that_keeps_its_port_leaves_a_node_that_went(lab: Lab, to: str) -> None:
    dns = service("dns", "53:30053", DNS, families=DUAL)
    forward(lab, dns)
    name = flow(lab, to=to).name
    assert {flow(lab, to=to).name for _ in range(TRIES)} == {name}
    forward(lab, dns, nodes=nodes_without(lab, name))
    assert flow(lab, to=to).name in NODES - {name}


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_that_keeps_its_port_keeps_a_node_that_stays(lab: Lab, to: str) -> None:
    dns = service("dns", "53:30053", DNS, families=DUAL)
    forward(lab, dns)
    names = {sport: flow(lab, sport, to=to).name for sport in range(5000, 5000 + TRIES)}
    forward(lab, dns, nodes=nodes_without(lab, "node1"))
    kept = {sport: name for sport, name in names.items() if name != "node1"}
    assert {sport: flow(lab, sport, to=to).name for sport in kept} == kept


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_of_the_hosts_own_port_meets_a_node_when_it_is_forwarded(lab: Lab, to: str) -> None:
    forward(lab, mail())  # without any forward the kernel may track nothing
    with lab.serve(lab.host, "host", [53]):
        assert flow(lab, to=to).name == "host"
        forward(lab, service("dns", "53:30053", DNS, families=DUAL))
        assert flow(lab, to=to).name in NODES


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_that_met_nobody_meets_a_node_when_the_port_is_forwarded(lab: Lab, to: str) -> None:
    forward(lab, mail())
    assert refused(lab, 53, "udp", to=to, sport=5353)
    forward(lab, mail(), service("dns", "53:30053", DNS, families=DUAL))
    assert flow(lab, to=to).name in NODES


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_udp_clients_of_every_port_of_a_range_leave_a_node_that_went(lab: Lab, to: str) -> None:
    ports = [port(8000 + number, 30000 + number, f"p{number}", "UDP") for number in range(10)]
    game = service("game", "8000-8009:30000-30009", ports, families=DUAL)
    forward(lab, game)
    assert {flow(lab, port=8000 + number, to=to).name for number in range(10)} <= NODES
    forward(lab, game, nodes=nodes_without(lab, "node3"))
    assert {flow(lab, port=8000 + number, to=to).name for number in range(10)} <= NODES - {"node3"}
    forward(lab)
    assert all(refused(lab, 8000 + number, "udp", to=to, sport=5353) for number in range(10))


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_meets_nobody_any_more_when_the_forward_went(lab: Lab, to: str) -> None:
    forward(lab, service("dns", "53:30053", DNS, families=DUAL))
    assert flow(lab, to=to).name in NODES
    forward(lab)
    assert refused(lab, 53, "udp", to=to, sport=5353)


def tracked(lab: Lab, *match: str) -> list[str]:
    found = lab.host.run(["conntrack", "-L", "-p", "udp", *match]).stdout.splitlines()
    return [re.sub(r"^udp\s+17 \d+ ", "", line) for line in found]


def test_udp_flows_of_others_to_the_same_port_elsewhere_stay(lab: Lab) -> None:
    forward(lab, mail())  # without any forward the kernel may track nothing
    with lab.serve(lab.nodes[2], "own-dns", [53]):
        assert flow(lab, to="10.0.0.13").name == "own-dns"
        before = tracked(lab, "--orig-dst", "10.0.0.13", "--orig-port-dst", "53")
        forward(lab, service("dns", "53:30053", DNS))
        forward(lab, service("dns", "53:30053", DNS), nodes=nodes_without(lab, "node3"))
        forward(lab)
        assert len(before) == 1
        assert tracked(lab, "--orig-dst", "10.0.0.13", "--orig-port-dst", "53") == before


# ---- nothing is left


@pytest.mark.parametrize("options", ["-i eth0", "-i eth0,lo", "-i eth+,eth0,lo --external-interface eth0"])
def test_clean_leaves_the_hosts_rules_as_they_were(lab: Lab, options: str) -> None:
    for tool in ("iptables-restore", "ip6tables-restore"):
        lab.host.run([tool, "--noflush"], FOREIGN)
    before = lab.saved(), lab.saved(6)
    internal = service(
        "inner", "80:30080", [port(80, 30080)], families=DUAL, annotations={"epok.getbetter.ro/internal": ""}
    )
    forward(lab, mail(), internal, service("dns", "53:30053", DNS, families=DUAL), options=options)
    assert who(lab, 25) == who(lab, 25, to=HOST6) == NODES
    assert (lab.saved(), lab.saved(6)) != before
    done = lab.epok("--clean", "local")
    assert done.returncode == 0, done.stderr
    assert (lab.saved(), lab.saved(6)) == before
    assert refused(lab, 25)


def test_clean_again_finds_nothing(lab: Lab) -> None:
    forward(lab, mail())
    for _ in range(2):
        done = lab.epok("--clean", "local")
        assert done.returncode == 0, done.stderr
    assert "EPOK" not in lab.saved() + lab.saved(6)


def test_foreign_rules_that_come_between_two_runs_stay(lab: Lab) -> None:
    forward(lab, mail())
    for tool in ("iptables-restore", "ip6tables-restore"):
        lab.host.run([tool, "--noflush"], FOREIGN)
    foreign = [line for line in (lab.saved() + lab.saved(6)).splitlines() if "EPOK" not in line]
    forward(lab, mail(), service("dns", "53:30053", DNS, families=DUAL), nodes=nodes_without(lab, "node1"))
    assert [line for line in (lab.saved() + lab.saved(6)).splitlines() if "EPOK" not in line] == foreign
    assert who(lab, 25) == who(lab, 53, "udp") == {"node2", "node3"}


def test_nobody_is_forwarded_before_the_first_run(lab: Lab) -> None:
    for space in (lab.client, lab.inside, lab.host):
        for to in (HOST, HOST6):
            assert refused(lab, 25, to=to, frm=space)
