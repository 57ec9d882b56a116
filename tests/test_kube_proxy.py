"""A host that is itself a node, with a real kube-proxy beside epok: external ports go to pods, NodePorts still work."""

import re
from collections.abc import Iterator

import pytest

from lab.apiserver import ApiServer, asset
from lab.machine import until
from lab.network import CLIENT, HOST, HOST6, Answer, Lab, pod
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, slice_port

DUAL = ("IPv4", "IPv6")
HERE, THERE = "k3s", "agent"  # the host, and another node of the cluster
TRIES = 60  # one of three pods is missed about once in ten thousand million times
OPTIONS = {
    "proxy-mode": "iptables",
    "hostname-override": HERE,
    "cluster-cidr": "10.244.0.0/16,2001:db8:244::/48",
    # the rest keeps its hands off settings that a network namespace does not have of its own
    "conntrack-max-per-core": "0",
    "conntrack-min": "0",
    "conntrack-tcp-timeout-established": "0",
    "conntrack-tcp-timeout-close-wait": "0",
}


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """A cluster of the host and another node; the pods of the lab's node1 count as the host's."""
    made = ApiServer(lab.host, tmp_path_factory.mktemp("apiserver"))
    made.create(node(HERE, "10.0.0.1", "2001:db8:2::1"), node(THERE, "10.0.0.99", "2001:db8:2::99"))
    return made


@pytest.fixture(params=["kube-proxy first", "epok first"])
def mail(lab: Lab, server: ApiServer, request: pytest.FixtureRequest) -> Iterator[ApiServer]:
    """The Service mail, with three pods, and kube-proxy, whose hooks stand behind or before epok's."""
    server.create(*service_and_pods("mail", "25:2025", 2025))
    if request.param == "epok first":
        epok(lab, server)
    with lab.host.popen([asset("kube-proxy"), *options(server)]) as proxy:
        try:
            until(lambda: reached(lab, "mail"), "kube-proxy has the Service mail")
            epok(lab, server)
            yield server
        finally:
            proxy.kill()
    for path in ("/api/v1/namespaces/default/services", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"):
        server.request("DELETE", f"{path}?fieldSelector=metadata.name!=kubernetes")


def options(server: ApiServer) -> list[str]:
    config = server.kubeconfig("admin", certificate=server.admin)
    return [f"--{name}={value}" for name, value in (OPTIONS | {"kubeconfig": config}).items()]


def service_and_pods(name: str, externalport: str, node_port: int, policy: str = "Cluster") -> list[Object]:
    """A Service whose port is named in its pods, which listen on other numbers on the other node."""
    made = service(name, externalport, [port(25, node_port, "smtp", target="smtp")], policy=policy, families=DUAL)
    slices = [
        endpoint_slice(
            name,
            [endpoint(HERE if number == 1 else THERE, pod(number)[family == "IPv6"])],
            [slice_port(30080 if number == 1 else 30443, "smtp")],
            family=family,
            suffix=f"{number}-{family.lower()}",
        )
        for number in (1, 2, 3)
        for family in DUAL
    ]
    return [made, *slices]


def epok(lab: Lab, server: ApiServer) -> None:
    config = server.kubeconfig("admin", certificate=server.admin)
    done = lab.epok("-i", "eth0", "--kubeconfig", config, "local")
    assert done.returncode == 0, done.stderr


def answers(lab: Lab, number: int, to: str = HOST) -> set[Answer]:
    return {lab.ask(number, to=to)._replace(sport=0) for _ in range(TRIES)}


def kube_rules(lab: Lab) -> list[str]:
    return [line for line in (lab.saved(4) + lab.saved(6)).splitlines() if "KUBE-" in line]


def reached(lab: Lab, name: str) -> bool:
    """Whether kube-proxy has all three pods of a Service, which it may hear of one after the other."""
    found = [re.findall(f"default/{name}:smtp.* -j DNAT", lab.saved(version)) for version in (4, 6)]
    return [len(rules) for rules in found] == [3, 3]


ALL = {("node1", 30080), ("node2", 30443), ("node3", 30443)}


@pytest.mark.parametrize("to", [HOST, HOST6])
def test_the_external_port_and_the_node_port_reach_all_pods(lab: Lab, mail: ApiServer, to: str) -> None:
    for number in (25, 2025):
        assert {(answer.name, answer.port) for answer in answers(lab, number, to)} == ALL
    assert {answer.saw for answer in answers(lab, 25, to)} == {"10.0.0.1" if to == HOST else "2001:db8:2::1"}


def test_policy_local_meets_the_pods_of_this_node_who_see_the_client(lab: Lab, mail: ApiServer) -> None:
    mail.patch("/api/v1/namespaces/default/services/mail", spec={"externalTrafficPolicy": "Local"})
    until(lambda: "KUBE-SVL-" in lab.saved(), "kube-proxy has heard of the policy")
    epok(lab, mail)
    for number in (25, 2025):
        assert answers(lab, number) == {Answer("node1", CLIENT[0], 0, 30080)}


def test_kube_proxys_rules_stay_as_they_are(lab: Lab, mail: ApiServer) -> None:
    before = kube_rules(lab)
    assert len(before) > 50
    mail.create(*service_and_pods("more", "26:2026", 2026))
    until(lambda: reached(lab, "more"), "kube-proxy has the Service more")
    with_more = kube_rules(lab)
    epok(lab, mail)
    assert {(answer.name, answer.port) for answer in answers(lab, 26)} == ALL
    assert kube_rules(lab) == with_more
    assert lab.epok("--clean", "local").returncode == 0
    assert kube_rules(lab) == with_more
    assert not re.search("EPOK", lab.saved(4) + lab.saved(6))
    assert {(answer.name, answer.port) for answer in answers(lab, 2026)} == ALL
