"""Packets through a host that epok has set up: who answers, whom it saw, and who is left alone."""

import os
import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.network import CLIENT, CLIENT6, CROWD, CROWD6, HOST, HOST6, Answer, Lab, pod, read_answer
from lab.objects import endpoint, endpoint_slice, node, port, service, slice_port, snapshot

DUAL = ("IPv4", "IPv6")
NODES = {"node1", "node2", "node3"}
TRIES = 60  # one of three nodes is missed about once in ten thousand million times
SMTP = port(25, 2025, "smtp")
DNS = [port(53, 30053, "dns", "UDP"), port(53, 30053, "dns-tcp")]
DIAMETER = [port(3868, 30053, "diameter", "SCTP")]
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

# What kube-proxy adds to that for the Service mail, whose pods are on two nodes and listen on two ports.
KUBE_MAIL = """*nat
:KUBE-EXT-5WYPQVB6VJVMQAZL - [0:0]
:KUBE-SVC-5WYPQVB6VJVMQAZL - [0:0]
:KUBE-SEP-3RZ2IHCXUKLTSZEB - [0:0]
:KUBE-SEP-NPKLU6OQ2VKUZ7UT - [0:0]
-I KUBE-SERVICES -d {ip} -p tcp -m comment --comment "default/mail:smtp cluster IP" -m tcp --dport 25 \
 -j KUBE-SVC-5WYPQVB6VJVMQAZL
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/mail:smtp" -m tcp --dport 2025 -j KUBE-EXT-5WYPQVB6VJVMQAZL
-A KUBE-EXT-5WYPQVB6VJVMQAZL -m comment --comment "masquerade traffic for default/mail:smtp external destinations" \
 -j KUBE-MARK-MASQ
-A KUBE-EXT-5WYPQVB6VJVMQAZL -j KUBE-SVC-5WYPQVB6VJVMQAZL
-A KUBE-SVC-5WYPQVB6VJVMQAZL ! -s {pods} -d {ip} -p tcp -m comment --comment "default/mail:smtp cluster IP" \
 -m tcp --dport 25 -j KUBE-MARK-MASQ
-A KUBE-SVC-5WYPQVB6VJVMQAZL -m comment --comment "default/mail:smtp -> {target1}" \
 -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-3RZ2IHCXUKLTSZEB
-A KUBE-SVC-5WYPQVB6VJVMQAZL -m comment --comment "default/mail:smtp -> {target2}" -j KUBE-SEP-NPKLU6OQ2VKUZ7UT
-A KUBE-SEP-3RZ2IHCXUKLTSZEB -s {pod1} -m comment --comment "default/mail:smtp" -j KUBE-MARK-MASQ
-A KUBE-SEP-3RZ2IHCXUKLTSZEB -p tcp -m comment --comment "default/mail:smtp" -m tcp -j DNAT --to-destination {target1}
-A KUBE-SEP-NPKLU6OQ2VKUZ7UT -s {pod2} -m comment --comment "default/mail:smtp" -j KUBE-MARK-MASQ
-A KUBE-SEP-NPKLU6OQ2VKUZ7UT -p tcp -m comment --comment "default/mail:smtp" -m tcp -j DNAT --to-destination {target2}
COMMIT
*filter
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED \
 -j ACCEPT
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


@pytest.mark.parametrize(("to", "saw"), [(HOST, "10.0.0.1"), (HOST6, "2001:db8:2::1")])
def test_sctp_reaches_all_nodes_and_its_answers_come_back(lab: Lab, to: str, saw: str) -> None:
    diameter = service("diameter", "3868:30053", DIAMETER, families=DUAL)
    lab.host.run([BOTH[6 if ":" in to else 4][0], "-P", "FORWARD", "DROP"])
    forward(lab, mail(), diameter)
    assert who(lab, 3868, "sctp", to) == NODES
    answer = lab.ask(3868, "sctp", to)
    assert (answer.saw, answer.port) == (saw, 30053)
    assert refused(lab, 3869, "sctp", to)
    forward(lab, mail(), diameter, nodes=nodes_without(lab, "node1"))
    assert who(lab, 3868, "sctp", to) == {"node2", "node3"}
    forward(lab, mail())
    assert refused(lab, 3868, "sctp", to)


def test_a_service_of_ipv4_alone_is_not_there_by_ipv6(lab: Lab) -> None:
    forward(lab, mail(families=("IPv4",)))
    assert who(lab, 25) == NODES
    assert refused(lab, 25, to=HOST6)


def test_a_service_of_ipv6_alone_is_not_there_by_ipv4(lab: Lab) -> None:
    forward(lab, mail(families=("IPv6",)))
    assert who(lab, 25, to=HOST6) == NODES
    assert refused(lab, 25)


def nodes_of(lab: Lab, *versions: int) -> list[dict[str, Any]]:
    """The lab's nodes, with their addresses of these IP versions alone."""
    addresses = {4: "10.0.0.{}", 6: "2001:db8:2::{}"}
    return [
        node(space.name, *(addresses[version].format(number) for version in versions))
        for number, space in enumerate(lab.nodes, 11)
    ]


def test_a_cluster_of_ipv6_alone_is_reached_by_ipv6_alone(lab: Lab) -> None:
    services = [
        mail(families=("IPv6",)),
        service("dns", "53:30053", DNS, families=("IPv6",)),
        service("diameter", "3868:30053", DIAMETER, families=("IPv6",)),
    ]
    forward(lab, *services, nodes=nodes_of(lab, 6))
    for number, protocol in ((25, "tcp"), (53, "tcp"), (53, "udp"), (3868, "sctp")):
        assert who(lab, number, protocol, HOST6) == NODES
        assert refused(lab, number, protocol, HOST)


@pytest.mark.parametrize(("version", "to", "other"), [(4, HOST, HOST6), (6, HOST6, HOST)])
def test_a_dual_stack_service_is_there_by_the_version_that_nodes_have(
    lab: Lab, version: int, to: str, other: str
) -> None:
    forward(lab, mail(), service("dns", "53:30053/udp", DNS, families=DUAL), nodes=nodes_of(lab, version))
    for number, protocol in ((25, "tcp"), (53, "udp")):
        assert who(lab, number, protocol, to) == NODES
        assert refused(lab, number, protocol, other)


def test_nodes_that_lack_a_version_do_not_get_its_connections(lab: Lab) -> None:
    one, two, three = nodes_of(lab, 4)[0], nodes_of(lab, 6)[1], nodes_of(lab, 4, 6)[2]
    forward(lab, mail(), nodes=[one, two, three])
    assert who(lab, 25) == {"node1", "node3"}
    assert who(lab, 25, to=HOST6) == {"node2", "node3"}


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


def met_by_all(lab: Lab, crowd: Iterable[Any]) -> dict[str, str]:
    """The name of the node that each client address meets."""
    return {source: lab.ask(25, to=HOST6 if ":" in source else HOST, source=source).name for source in map(str, crowd)}


@pytest.mark.parametrize("crowd", [CROWD, CROWD6])
def test_client_affinity_shares_clients_out_evenly_and_for_good(lab: Lab, crowd: Iterable[Any]) -> None:
    sticky = mail(sessionAffinity="ClientIP")
    forward(lab, sticky)
    met = met_by_all(lab, crowd)
    shares, even = Counter(met.values()), len(met) / len(NODES)
    assert shares.keys() == NODES
    assert all(0.75 * even <= count <= 1.25 * even for count in shares.values()), shares
    assert met_by_all(lab, crowd) == met
    for name in sorted(NODES):
        forward(lab, sticky, nodes=nodes_without(lab, name))
        assert set(met_by_all(lab, crowd).values()) == NODES - {name}
        forward(lab, sticky)
        assert met_by_all(lab, crowd) == met


@pytest.mark.parametrize("crowd", [CROWD, CROWD6])
def test_client_affinity_moves_only_the_clients_of_a_node_that_went(lab: Lab, crowd: Iterable[Any]) -> None:
    sticky = mail(sessionAffinity="ClientIP")
    forward(lab, sticky)
    met = met_by_all(lab, crowd)
    moved = {}
    for name in sorted(NODES):
        forward(lab, sticky, nodes=nodes_without(lab, name))
        now = met_by_all(lab, crowd)
        moved[name] = [source for source in met if met[source] != name and now[source] != met[source]]
    assert moved == {name: [] for name in NODES}


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


@pytest.mark.parametrize(("to", "saw"), [(HOST, CLIENT), (HOST6, CLIENT6)])
def test_policy_local_keeps_the_clients_address_on_the_nodes_that_have_a_pod(
    lab: Lab, to: str, saw: tuple[str, str]
) -> None:
    pods = [endpoint("node1", pod(1)[0]), endpoint("node3", pod(3)[0])]
    services = [
        mail(policy="Local"),
        service("dns", "53:30053", DNS, policy="Local", families=DUAL),
        service("diameter", "3868:30053", DIAMETER, policy="Local", families=DUAL),
    ]
    forward(lab, *services, *(endpoint_slice(item["metadata"]["name"], pods) for item in services))
    for number, protocol in ((25, "tcp"), (53, "tcp"), (53, "udp"), (3868, "sctp")):
        for source in saw:
            answers = [lab.ask(number, protocol, to, source=source) for _ in range(TRIES)]
            assert {answer[:2] for answer in answers} == {("node1", source), ("node3", source)}


def test_policy_local_prefers_ready_pods_to_those_that_end_but_still_serve(lab: Lab) -> None:
    pods = [
        endpoint("node1", pod(1)[0], terminating=True),
        endpoint("node2", pod(2)[0]),
        endpoint("node3", pod(3)[0], ready=False),
    ]
    forward(lab, mail(policy="Local"), endpoint_slice("mail", pods))
    assert who(lab, 25) == who(lab, 25, to=HOST6) == {"node2"}


def test_policy_local_goes_to_pods_that_end_but_still_serve_when_no_other_is_left(lab: Lab) -> None:
    pods = [
        endpoint("node1", pod(1)[0], terminating=True),
        endpoint("node2", pod(2)[0], ready=False, terminating=True),
        endpoint("node3", pod(3)[0], ready=False),
    ]
    forward(lab, mail(policy="Local"), endpoint_slice("mail", pods))
    assert who(lab, 25) == who(lab, 25, to=HOST6) == {"node1"}
    assert (lab.ask(25).saw, lab.ask(25, to=HOST6).saw) == (CLIENT[0], CLIENT6[0])


def test_policy_local_without_any_pod_forwards_nothing_and_says_so(lab: Lab) -> None:
    web = service("web", "80:30080", [port(80, 30080)], families=DUAL)
    forward(lab, mail(policy="Local"), web, endpoint_slice("mail", [endpoint("node2", pod(2)[0])]))
    assert who(lab, 25) == who(lab, 25, to=HOST6) == {"node2"}
    gone = [endpoint("node2", pod(2)[0], ready=False, terminating=True)]
    done = forward(lab, mail(policy="Local"), web, endpoint_slice("mail", gone))
    assert [line for line in done.stderr.splitlines() if line.startswith("warning: default/mail: not forwarded")]
    for to in (HOST, HOST6):
        assert refused(lab, 25, to=to)
        assert who(lab, 80, to=to) == NODES
    forward(lab, mail(policy="Local"), web, endpoint_slice("mail", [endpoint("node1", pod(1)[0])]))
    assert who(lab, 25) == who(lab, 25, to=HOST6) == {"node1"}


def test_a_node_that_is_excluded_gets_nothing(lab: Lab) -> None:
    forward(lab, mail(), nodes=nodes_without(lab, "node2"))
    assert who(lab, 25) == {"node1", "node3"}
    assert who(lab, 25, to=HOST6) == {"node1", "node3"}


def test_a_host_that_is_a_node_itself_forwards_to_the_endpoints(lab: Lab) -> None:
    pods = [endpoint("k3s", "10.0.0.12"), endpoint("k3s", "10.0.0.13")]
    slices = endpoint_slice("mail", pods, [slice_port(30080, "smtp")])
    forward(lab, mail(families=("IPv4",)), slices, nodes=[node("k3s", "10.0.0.1")])
    assert {lab.ask(25)[::3] for _ in range(TRIES)} == {("node2", 30080), ("node3", 30080)}


# ---- a host that is a node itself, k3s, and has the pod of the lab's node1; another node, agent, has node2's

K3S = [node("k3s", "10.0.0.1", "2001:db8:2::1"), node("agent", "10.0.0.12", "2001:db8:2::12")]
PODS = {("node1", 30001), ("node2", 30002)}


def pod_slices(name: str, port_name: str, protocol: str = "TCP", pods: Iterable[int] = (1, 2)) -> list[dict[str, Any]]:
    """A slice for each pod and IP version: the host's own pod listens on 30001, the other one on 30002."""
    return [
        endpoint_slice(
            name,
            [endpoint("k3s" if number == 1 else "agent", address)],
            [slice_port(30000 + number, port_name, protocol)],
            family=family,
            suffix=f"{number}-{family.lower()}",
        )
        for number in pods
        for family, address in zip(DUAL, pod(number), strict=True)
    ]


def forward_on_node(lab: Lab, *objects: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    return forward(lab, *objects, options="-i eth0,lo", nodes=K3S)


def pods_at(lab: Lab, *asked: Any, **how: Any) -> set[tuple[str, int]]:
    """All who answer there, and on what port."""
    return {lab.ask(*asked, **how)[::3] for _ in range(TRIES)}


TAKEN = "the host is taken for node k3s (10.0.0.1), so forwards go to pods"


def test_each_run_says_that_the_host_is_taken_for_a_node(lab: Lab) -> None:
    assert f"info: {TAKEN}\n" in forward_on_node(lab, mail(), *pod_slices("mail", "smtp")).stderr
    log = forward_on_node(lab, mail(), *pod_slices("mail", "smtp")).stderr
    assert log == f"info: in sync, 1 forward, nothing changed; {TAKEN}\n"
    assert "taken" not in forward(lab, mail()).stderr


def test_an_address_that_many_machines_have_makes_no_host_a_node(lab: Lab) -> None:
    bridges = {"docker0": "172.17.0.1", "virbr0": "192.168.122.1", "cni0": "10.42.0.1", "br-0123456789ab": "172.18.0.1"}
    for name, address in bridges.items():
        lab.host.wire(f"link add {name} type bridge", f"addr add {address}/24 dev {name}", f"link set {name} up")
    odd = [node(f"n{n}", address) for n, address in enumerate((*bridges.values(), "127.0.0.1"))]
    try:
        first, second = (forward(lab, mail(), nodes=[*lab.node_objects(), *odd]).stderr for _ in range(2))
    finally:
        for name in bridges:
            lab.host.wire(f"link del {name}")
    assert "(NodePort 2025) on 7 nodes\n" in first and "taken" not in first + second
    addresses = "10.42.0.1, 172.17.0.1, 172.18.0.1, 192.168.122.1"
    for log in (first, second):
        [warning] = [line for line in log.splitlines() if line.startswith("warning: ")]
        assert warning.startswith(f"warning: this host has the address {addresses} itself, which a node reports")


def test_a_host_that_is_taken_for_a_node_but_has_no_route_to_its_pods_is_left_as_it_was(lab: Lab) -> None:
    """A broken node that reports the gateway's own address, in a cluster of which the gateway knows no network."""
    forward(lab, mail())
    lab.host.wire(f"route add default via {CLIENT[0]}")
    before = lab.saved()
    far = endpoint_slice(
        "mail", [endpoint("bad", "10.99.1.5"), endpoint("node2", "10.0.0.12")], [slice_port(1, "smtp")]
    )
    cluster = snapshot(*lab.node_objects(), node("bad", HOST), mail(families=("IPv4",)), far)
    try:
        done = lab.epok("-i", "eth0", "local", snapshot=cluster)
        shown = [
            lab.epok(what, "-i", "eth0", "local", snapshot=cluster) for what in ("--status", "--explain=default/mail")
        ]
    finally:
        lab.host.wire(f"route del default via {CLIENT[0]}")
    told = (
        f"this host has the address {HOST}, which node bad reports, but no route to its pods, like 10.99.1.5: if it is"
    )
    assert done.returncode == 1 and done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1
    assert lab.saved() == before
    for each in shown:
        assert each.returncode == 0, each.stderr
        assert f"the host is taken for node bad ({HOST}), so forwards go to pods\n" in each.stdout
        assert f"FAILED  {told}" in each.stdout
    assert f"Most likely: {told}" not in shown[0].stdout


@pytest.mark.parametrize("to", [HOST, HOST6])
@pytest.mark.parametrize(("number", "protocol"), [(25, "tcp"), (53, "udp"), (3868, "sctp")])
def test_a_host_that_is_a_node_forwards_a_named_port_to_whatever_number_each_pod_listens_on(
    lab: Lab, number: int, protocol: str, to: str
) -> None:
    named = [
        service("mail", "25:smtp", [port(25, 2025, "smtp", target="in")], families=DUAL),
        service("dns", "53:dns", [port(53, 30053, "dns", "UDP", target="in")], families=DUAL),
        service("diameter", "3868:diameter", [port(3868, 30053, "diameter", "SCTP", target="in")], families=DUAL),
    ]
    slices = [
        *pod_slices("mail", "smtp"),
        *pod_slices("dns", "dns", "UDP"),
        *pod_slices("diameter", "diameter", "SCTP"),
    ]
    forward_on_node(lab, *named, *slices)
    assert pods_at(lab, number, protocol, to) == PODS
    assert lab.ask(number, protocol, to).saw == ("2001:db8:2::1" if ":" in to else "10.0.0.1")
    assert pods_at(lab, number, protocol, to, frm=lab.host) == PODS


@pytest.mark.parametrize(("to", "client"), [(HOST, CLIENT[0]), (HOST6, CLIENT6[0])])
def test_a_host_that_is_a_node_forwards_policy_local_to_its_own_pods(lab: Lab, to: str, client: str) -> None:
    dns = service("dns", "53:dns", [port(53, 30053, "dns", "UDP")], policy="Local", families=DUAL)
    forward_on_node(lab, mail(policy="Local"), dns, *pod_slices("mail", "smtp"), *pod_slices("dns", "dns", "UDP"))
    for number, protocol in ((25, "tcp"), (53, "udp")):
        assert pods_at(lab, number, protocol, to) == {("node1", 30001)}
        assert lab.ask(number, protocol, to).saw == client
        assert pods_at(lab, number, protocol, to, frm=lab.host) == {("node1", 30001)}
    done = forward_on_node(lab, mail(policy="Local"), *pod_slices("mail", "smtp", pods=[2]))
    assert "warning: default/mail: not forwarded" in done.stderr
    assert refused(lab, 25, to=to)


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_host_that_is_a_node_forwards_to_a_pod_in_its_own_network(lab: Lab, to: str) -> None:
    slices = [
        endpoint_slice("mail", [endpoint("k3s", address)], [slice_port(8025, "smtp")], family=family, suffix=family)
        for family, address in zip(DUAL, ("10.0.0.1", "2001:db8:2::1"), strict=True)
    ]
    with lab.serve(lab.host, "host", [8025]):
        forward_on_node(lab, mail(), *slices)
        for asker in (lab.client, lab.host):
            assert pods_at(lab, 25, to=to, frm=asker) == {("host", 8025)}


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_on_a_host_that_is_a_node_udp_clients_that_keep_their_port_leave_a_pod_that_went(lab: Lab, to: str) -> None:
    dns = service("dns", "53:dns", [port(53, 30053, "dns", "UDP")], families=DUAL)
    forward_on_node(lab, dns, *pod_slices("dns", "dns", "UDP"))
    sports = range(5000, 5000 + TRIES)
    assert {flow(lab, sport, to=to)[::3] for sport in sports} == PODS
    forward_on_node(lab, dns, *pod_slices("dns", "dns", "UDP", pods=[1]))
    assert {flow(lab, sport, to=to)[::3] for sport in sports} == {("node1", 30001)}


def kube_mail(version: int) -> str:
    """KUBE_MAIL with the addresses of an IP version."""
    ip, pods = {4: ("10.96.0.10", "10.244.0.0/16"), 6: ("2001:db8:96::a", "2001:db8:244::/48")}[version]
    words = {"ip": ip, "pods": pods}
    for number in (1, 2):
        address = pod(number)[version == 6]
        host = f"[{address}]" if version == 6 else address
        words |= {f"pod{number}": address, f"target{number}": f"{host}:{30000 + number}"}
    return KUBE_MAIL.format(**words)


def kube_proxy_starts(lab: Lab) -> None:
    """It puts its hooks in front of all that is there."""
    foreign = re.sub(r"(?m)^-A (PREROUTING|OUTPUT|POSTROUTING|FORWARD) -m comment", r"-I \1 -m comment", FOREIGN)
    for version, (tool, _) in BOTH.items():
        lab.host.run([f"{tool}-restore", "--noflush"], foreign)
        lab.host.run([f"{tool}-restore", "--noflush"], kube_mail(version))


def first_hook(lab: Lab, version: int) -> str:
    lines = lab.saved(version).splitlines()
    return next(line for line in lines if line.startswith("-A PREROUTING")).split()[-1]


@pytest.mark.parametrize("first", ["KUBE-SERVICES", "EPOK"])
def test_node_ports_of_kube_proxy_and_forwards_work_side_by_side(lab: Lab, first: str) -> None:
    objects = [mail(), *pod_slices("mail", "smtp")]
    if first == "KUBE-SERVICES":
        forward_on_node(lab, *objects)
        kube_proxy_starts(lab)
        assert "nothing changed" in forward_on_node(lab, *objects).stderr
    else:
        kube_proxy_starts(lab)
        forward_on_node(lab, *objects)
    for version, (_, to) in BOTH.items():
        assert first_hook(lab, version) == first
        for asker in (lab.client, lab.host):
            assert pods_at(lab, 25, to=to, frm=asker) == PODS
            assert pods_at(lab, 2025, to=to, frm=asker) == PODS


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


def flow(lab: Lab, sport: int = 5353, port: int = 53, to: str = HOST, **how: Any) -> Answer:
    """One question of a UDP client that keeps its source port."""
    return lab.ask(port, "udp", to, sport=sport, **how)


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_that_keeps_its_port_leaves_a_node_that_went(lab: Lab, to: str) -> None:
    dns = service("dns", "53:30053", DNS, families=DUAL)
    forward(lab, dns)
    name = flow(lab, to=to).name
    assert {flow(lab, to=to).name for _ in range(TRIES)} == {name}
    forward(lab, dns, nodes=nodes_without(lab, name))
    assert flow(lab, to=to).name in NODES - {name}


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_that_keeps_its_port_follows_the_port_to_another_service(lab: Lab, to: str) -> None:
    forward(lab, service("old", "53:30053", DNS, families=DUAL))
    assert flow(lab, to=to).port == 30053
    forward(lab, service("new", "53:30080", [port(53, 30080, protocol="UDP")], families=DUAL))
    assert flow(lab, to=to).port == 30080


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
def test_a_run_that_was_killed_before_it_ended_udp_flows_is_finished_by_the_next(
    lab: Lab, tmp_path: Path, to: str
) -> None:
    (tmp_path / "conntrack").write_text("#!/bin/sh\nkill -KILL $PPID\n")
    (tmp_path / "conntrack").chmod(0o755)
    dns = service("dns", "53:30053", DNS, families=DUAL)
    game = service("game", "5060:30001", [port(5060, 30001, "game", "UDP")], families=DUAL)
    forward(lab, dns, game)
    name = flow(lab, to=to).name
    assert flow(lab, port=5060, to=to).name in NODES
    cluster = snapshot(*nodes_without(lab, name), dns)
    killed = lab.epok("-i", "eth0", "local", snapshot=cluster, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert flow(lab, to=to).name == name, "the client is still where it was"
    assert "in sync, 2 forwards, nothing changed" in forward(lab, dns, nodes=nodes_without(lab, name)).stderr
    assert flow(lab, to=to).name in NODES - {name}
    assert refused(lab, 5060, "udp", to=to, sport=5353), "of the forward that went as well"


def test_of_a_large_udp_range_only_flows_that_exist_and_are_stale_are_ended(lab: Lab) -> None:
    ports = [port(8000 + number, 30000 + number, f"p{number}", "UDP") for number in range(800)]
    game = service("game", "8000-8799:30000-30799", ports)
    forward(lab, game)
    let_udp_flows_live(lab)
    for number in (8000, 8400, 8799):
        for sport in range(5000, 5000 + TRIES):
            with lab.connect(number, "udp", sport=sport) as client:
                client.send(b"who?")
    assert len(before := tracked(lab, "--orig-dst", HOST)) == 3 * TRIES
    log = forward(lab, game, options="-v -i eth0", nodes=nodes_without(lab, "node3")).stderr
    ended = re.findall(
        r"conntrack -D -p udp --orig-dst \S+ --orig-port-dst (\d+) --reply-src (\S+): exit status 0\n", log
    )
    assert sorted(ended) == [(number, "10.0.0.13") for number in ("8000", "8400", "8799")]
    assert log.count("conntrack -L -p udp: exit status 0\n") == 1 and "ipv6: exit" not in log
    assert tracked(lab, "--orig-dst", HOST) == [line for line in before if " src=10.0.0.13 " not in line]
    assert "conntrack -D" not in forward(lab, game, options="-v -i eth0", nodes=nodes_without(lab, "node3")).stderr


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_a_udp_client_meets_nobody_any_more_when_the_forward_went(lab: Lab, to: str) -> None:
    forward(lab, service("dns", "53:30053", DNS, families=DUAL))
    assert flow(lab, to=to).name in NODES
    forward(lab)
    assert refused(lab, 53, "udp", to=to, sport=5353)


def tracked(lab: Lab, *match: str) -> list[str]:
    """The UDP flows that the host knows, each with its id, but without the seconds that it has left."""
    found = lab.host.run(["conntrack", "-L", "-p", "udp", "-o", "id", *match]).stdout.splitlines()
    return [re.sub(r"^udp\s+17 \d+ | use=\d+", "", line) for line in found]


def let_udp_flows_live(lab: Lab) -> None:
    """However slow the machine is, none shall end by itself."""
    lab.host.run(["sh", "-c", "echo 3600 >/proc/sys/net/netfilter/nf_conntrack_udp_timeout"])


def test_udp_flows_of_others_to_the_same_port_elsewhere_stay(lab: Lab) -> None:
    forward(lab, mail())  # without any forward the kernel may track nothing
    let_udp_flows_live(lab)
    with lab.serve(lab.nodes[2], "own-dns", [53]):
        assert flow(lab, to="10.0.0.13").name == "own-dns"
        with lab.serve(lab.host, "host", [53]):
            assert flow(lab, to="127.0.0.1", frm=lab.host).name == "host"
        before = [tracked(lab, "--orig-dst", to, "--orig-port-dst", "53") for to in ("10.0.0.13", "127.0.0.1")]
        forward(lab, service("dns", "53:30053", DNS), options="-i eth0,lo")
        forward(lab, service("dns", "53:30053", DNS), nodes=nodes_without(lab, "node3"))
        forward(lab)
        assert [len(flows) for flows in before] == [1, 1]
        after = [tracked(lab, "--orig-dst", to, "--orig-port-dst", "53") for to in ("10.0.0.13", "127.0.0.1")]
        assert after == before


@pytest.mark.parametrize("version", BOTH)
def test_other_udp_flows_of_the_same_client_stay_whatever_happens_to_a_forward(lab: Lab, version: int) -> None:
    to, family, sports = BOTH[version][1], {4: "ipv4", 6: "ipv6"}[version], range(5000, 5000 + TRIES)
    dns = service("dns", "53:30053", DNS, policy="Local", families=DUAL)
    game = service("game", "5060:30001", [port(5060, 30001, "game", "UDP")], families=DUAL)
    on_two = endpoint_slice("dns", [endpoint("node1", pod(1)[0]), endpoint("node2", pod(2)[0])])
    on_one = endpoint_slice("dns", [endpoint("node2", pod(2)[0])])

    def others() -> list[list[str]]:
        return [sorted(tracked(lab, "-f", family, "--orig-port-dst", number)) for number in ("123", "5060", "30053")]

    forward(lab, game)
    let_udp_flows_live(lab)
    with lab.serve(lab.host, "host", [123, 30053]):
        assert {flow(lab, sport, number, to).name for number in (123, 30053) for sport in sports} == {"host"}
        assert {flow(lab, sport, 5060, to).name for sport in sports} == NODES
        before = others()
        assert [len(flows) for flows in before] == [TRIES, TRIES, TRIES]
        for objects, names in (([dns, on_two], {"node1", "node2"}), ([dns, on_one], {"node2"})):
            forward(lab, game, *objects)
            assert {flow(lab, sport, to=to).name for sport in sports} == names
            assert others() == before
        forward(lab, game)
        assert refused(lab, 53, "udp", to=to, sport=sports[0])
        assert others() == before


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
