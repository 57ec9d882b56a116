"""epok and a real kube-apiserver: what it reads there with the role that cron/ ships, and the Events that it writes."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

import epok as program
from lab.apiserver import ADDRESS, PORT, ApiServer
from lab.fake_api import write_kubeconfig
from lab.machine import BACKENDS, need, stretched, until
from lab.manifests import CRON, account, manifests, one
from lab.network import CLIENT, EPOK, HOST, HOST6, Lab, Namespace, warnings_in
from lab.objects import Object, endpoint, endpoint_slice, port, service
from lab.sshd import Sshd, make_key

pytestmark = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)

ACCOUNT = "system:serviceaccount:kube-system:epok"
ROLE = one("ClusterRole", account())
SMTP = port(25, 2025, "smtp")
MAIL = service("mail", "25:2025", [SMTP])
WEB = service("web", "80:30080", [port(80, 30080)])
LOCAL_MAIL = service("mail", "25:2025", [SMTP], policy="Local")
NODES = {"node1", "node2", "node3"}
TRIES = 60  # one of three nodes is missed about once in ten thousand million times
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    made = ApiServer(lab.host, tmp_path_factory.mktemp("apiserver"))
    made.grant()
    made.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(manifests(file="publish.yaml")))
    return made


@pytest.fixture
def api(lab: Lab, server: ApiServer) -> ApiServer:
    """The server with the lab's nodes and nothing else."""
    server.clear()
    server.create(*lab.node_objects())
    return server


@pytest.fixture(scope="module")
def config(server: ApiServer) -> str:
    """The kubeconfig of the account that has the role of cron/."""
    return server.kubeconfig("epok", token=server.token())


def epok(lab: Lab, config: str, *args: str, **how: Any) -> Done:
    done = lab.epok("-i", "eth0", "--timeout", str(stretched(20)), "--kubeconfig", config, *args, "local", **how)
    assert all(re.match("(debug|info|warning|error): ", line) for line in done.stderr.splitlines()), done.stderr
    return done


def succeeds(lab: Lab, config: str, *args: str, **how: Any) -> Done:
    done = epok(lab, config, *args, **how)
    assert done.returncode == 0, done.stderr
    return done


def fails(lab: Lab, config: str, *says: str) -> None:
    """Exit status 1, one error that matches all of `says`, and the rules as they were."""
    before = lab.saved() + lab.saved(6)
    done = epok(lab, config)
    assert done.returncode == 1, done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for words in says:
        assert re.search(words, error), f"not in the error: {words}\n{error}"
    assert lab.saved() + lab.saved(6) == before


def account_without(server: ApiServer, resource: str) -> str:
    """The kubeconfig of an account whose role lacks all verbs on that resource."""
    name = f"no-{resource}"
    rules = [{**rule, "resources": [r for r in rule["resources"] if r != resource]} for rule in ROLE["rules"]]
    grant = {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}}
    grant["subjects"] = [{"kind": "ServiceAccount", "name": name, "namespace": "kube-system"}]
    made = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "kube-system"}},
        {**ROLE, "metadata": {"name": name}, "rules": [rule for rule in rules if rule["resources"]]},
        {"apiVersion": ROLE["apiVersion"], "kind": "ClusterRoleBinding", "metadata": {"name": name}, **grant},
    ]
    server.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(made))
    return server.kubeconfig(name, token=server.token(name))


def who(lab: Lab, number: int, **how: Any) -> set[str]:
    return {lab.ask(number, **how).name for _ in range(TRIES)}


def targets(lab: Lab, version: int = 4) -> set[str]:
    return set(re.findall(r"--to-destination (\S+)", lab.saved(version)))


# ---- who may take ports


@pytest.fixture
def policy(api: ApiServer) -> Iterator[Callable[..., None]]:
    """cron/policy.yaml, and what is refused by it: `denied(method, path, body)`."""
    file = str(CRON / "policy.yaml")
    for name in ("open", "closed"):
        api.kubectl("create", "namespace", name)
    api.kubectl("label", "namespace", "open", "epok.getbetter.ro/allowed=true")
    api.kubectl("apply", "-f", file)

    refusal = ": 403 .*lacks the label epok.getbetter.ro/allowed=true"

    def denied(*request: Any) -> None:
        with pytest.raises(AssertionError, match=refusal):
            api.request(*request)

    def enforced() -> bool:
        asked = plain("closed", {program.PORT_ANNOTATIONS[0]: "25"})
        try:
            api.request("POST", "/api/v1/namespaces/closed/services?dryRun=All", asked)
        except AssertionError as error:
            return bool(re.search(refusal, str(error)))
        return False

    until(enforced, "the policy is in force", 120)
    yield denied
    api.kubectl("delete", "-f", file)
    # the server goes on refusing for a moment, and the next test begins with such a Service
    until(lambda: not enforced(), "the policy is out of force", 120)
    api.kubectl("delete", "--wait=false", "namespace", "open", "closed")


def plain(namespace: str, annotations: dict[str, str], **spec: Any) -> Object:
    meta = {"name": "mail", "namespace": namespace, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 25}], **spec}}


def test_only_services_of_namespaces_with_the_label_may_have_epoks_annotations(
    api: ApiServer, policy: Callable[..., None]
) -> None:
    services, merge = "/api/v1/namespaces/{}/services", "application/merge-patch+json"
    closed, mail = services.format("closed"), services.format("closed") + "/mail"
    epoks = {"type": "LoadBalancer", "loadBalancerClass": "getbetter.ro/epok"}
    for name in program.SERVICE_ANNOTATIONS:
        policy("POST", closed, plain("closed", {"other": "", name: ""}))
    policy("POST", closed, plain("closed", {}, **epoks))
    api.request("POST", closed, plain("closed", {"other": "", "example.org/externalport": "25"}))
    for name in program.SERVICE_ANNOTATIONS:
        policy("PATCH", mail, {"metadata": {"annotations": {name: "25"}}}, merge)
    policy("PATCH", mail, {"spec": epoks}, merge)
    api.request("PATCH", mail, {"spec": {"sessionAffinity": "ClientIP"}}, merge)
    everything = dict.fromkeys(program.SERVICE_ANNOTATIONS, "25")
    api.request("POST", services.format("open"), plain("open", everything, **epoks))

    # one that has lost the label: nothing more comes, and what is there can go
    mail = services.format("open") + "/mail"
    keep = {"metadata": {"finalizers": ["example.org/keep"]}}
    api.request("PATCH", mail, keep, merge)
    api.kubectl("label", "namespace", "open", "epok.getbetter.ro/allowed-")
    change = {"spec": {"ports": [{"port": 26}]}}

    def lost() -> bool:
        try:
            return not api.request("PATCH", f"{mail}?dryRun=All", change, merge)
        except AssertionError:
            return True

    until(lost, "the label's end is known", 120)
    policy("PATCH", mail, change, merge)
    api.request("DELETE", mail)
    policy("PATCH", mail, change, merge)
    policy("PATCH", mail, {"metadata": {"annotations": {program.PORT_ANNOTATIONS[0]: "26"}}}, merge)
    api.request("PATCH", mail, {"metadata": {"finalizers": []}}, merge)
    assert api.kubectl("get", "services", "-n", "open", "-o", "name") == ""


# ---- reading


def test_the_role_is_no_larger_than_what_epok_asks_for(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("mail", "25:2025, 26:nope", [SMTP], policy="Local"), WEB)
    api.create(endpoint_slice("mail", [endpoint("node1", "10.244.1.5")]))
    succeeds(lab, config)
    api.patch("/api/v1/namespaces/default/services/web", metadata={"annotations": {"getbetter.ro/externalport": None}})
    succeeds(lab, config)
    granted = {(verb, name) for rule in ROLE["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    assert {asked[:2] for asked in api.asked()} == granted


def test_1200_services_of_every_kind_are_read_in_pages(lab: Lab, api: ApiServer, config: str) -> None:
    ports = [(n, 3000 + n) for n in range(300)]
    api.create(
        *(service(f"node-port-{n}", f"{n + 2001}:{node_port}", [port(80, node_port)]) for n, node_port in ports[:200]),
        *(
            service(f"balanced-{n}", f"{n + 2001}:web", [port(80, node_port, "web")], type="LoadBalancer")
            for n, node_port in ports[200:]
        ),
        *(service(f"cluster-ip-{n}", None, [port(80)], type="ClusterIP") for n in range(300)),
        *(service(f"named-{n}", None, type="ExternalName", externalName="example.org") for n in range(300)),
        *(service(f"not-annotated-{n}", None, [port(80)]) for n in range(297)),
        service("cluster-ip", "1001:80", [port(80)], type="ClusterIP"),
        service("headless", "1002", [port(1002)], type="ClusterIP", clusterIP="None"),
        service("named", "1003:80", [port(80)], type="ExternalName", externalName="example.org"),
    )
    done = succeeds(lab, config)
    assert targets(lab) == {f"10.0.0.{number}:{node_port}" for number in (11, 12, 13) for _, node_port in ports}
    warned = {line.partition(":")[0] for line in warnings_in(done.stderr.replace("rejected: ", ""))}
    assert warned == {"default/cluster-ip", "default/headless", "default/named"}
    pages = [asked.uri for asked in api.asked() if asked.resource == "services"]
    assert len(pages) == 3
    assert all(uri.startswith("/api/v1/services?limit=500") for uri in pages)


def test_every_field_of_a_real_service_counts(lab: Lab, api: ApiServer, config: str) -> None:
    dual = ("IPv4", "IPv6")
    api.create(
        service("dual", "81:30001", [port(81, 30001)], families=dual),
        service("six", "82:30002", [port(82, 30002)], families=("IPv6",)),
        service("sticky", "83:30003", [port(83, 30003)], sessionAffinity="ClientIP"),
        service("dns", "53:30053", [port(53, 30053, "dns", "UDP"), port(53, 30053, "dns-tcp")]),
        service("range", "8004-8005:30004-30005", [port(n, 30000 + n, f"p{n}") for n in (4, 5)]),
        service("some", "86:30006", [port(86, 30006)], type="LoadBalancer", loadBalancerSourceRanges=["192.0.2.11/32"]),
    )
    done = succeeds(lab, config)
    assert not warnings_in(done.stderr)
    assert who(lab, 81) == who(lab, 81, to=HOST6) == who(lab, 82, to=HOST6) == NODES
    assert len(who(lab, 83)) == 1
    assert lab.ask(53).port == lab.ask(53, "udp").port == 30053
    assert [lab.ask(8004).port, lab.ask(8005).port] == [30004, 30005]
    assert lab.ask(86, source=CLIENT[1]).port == 30006
    for refused in ({"port": 82}, {"port": 83, "to": HOST6}, {"port": 86, "source": CLIENT[0]}):
        with pytest.raises(ConnectionRefusedError):
            lab.ask(**refused)


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_what_kubectl_prints_serves_as_well(lab: Lab, api: ApiServer, config: str, output: str) -> None:
    api.create(LOCAL_MAIL, WEB, endpoint_slice("mail", [endpoint("node2", "10.244.1.5")]))
    succeeds(lab, config)
    before = lab.saved()
    printed = api.kubectl("get", "services,nodes,endpointslices", "-A", "-o", output)
    done = lab.host.run(
        ["env", "-C", str(EPOK.parent), ".venv/bin/python", str(EPOK), "-i", "eth0", "--snapshot", "-", "local"],
        printed,
    )
    assert "in sync, 2 forwards" in done.stderr
    assert lab.saved() == before


def test_local_asks_for_the_endpoints_of_its_own_services_and_keeps_the_client(
    lab: Lab, api: ApiServer, config: str
) -> None:
    api.create(MAIL, WEB)
    succeeds(lab, config)
    assert "endpointslices" not in {asked.resource for asked in api.asked()}
    api.patch("/api/v1/namespaces/default/services/mail", spec={"externalTrafficPolicy": "Local"})
    api.create(endpoint_slice("mail", [endpoint("node2", "10.244.1.5"), endpoint("node3", "10.244.2.5", ready=False)]))
    succeeds(lab, config)
    [uri] = [asked.uri for asked in api.asked() if asked.resource == "endpointslices"]
    assert "labelSelector=kubernetes.io/service-name%20in%20%28mail%29" in uri
    assert {lab.ask(25)[:2] for _ in range(TRIES)} == {("node2", CLIENT[0])}
    assert {lab.ask(80).saw for _ in range(TRIES)} == {"10.0.0.1"}


def test_local_without_any_endpoint_goes_away_with_a_warning(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(LOCAL_MAIL, WEB, endpoint_slice("mail", [endpoint("node2", "10.244.1.5")]))
    succeeds(lab, config)
    assert lab.ask(25).name == "node2"
    api.patch(
        "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/mail-abcde",
        endpoints=[endpoint("node2", "10.244.1.5", ready=False) | {"conditions": {"ready": False, "serving": False}}],
    )
    [warning] = warnings_in(succeeds(lab, config).stderr)
    assert re.search("default/mail.*endpoint", warning)
    assert who(lab, 80) == NODES
    with pytest.raises(ConnectionRefusedError):
        lab.ask(25)


# ---- who may


@pytest.mark.parametrize("resource, group", [("services", ""), ("nodes", ""), ("endpointslices", "discovery.k8s.io")])
def test_a_role_without_a_verb_is_told_which_and_leaves_the_rules_alone(
    lab: Lab, api: ApiServer, config: str, resource: str, group: str
) -> None:
    api.create(WEB)
    succeeds(lab, config)
    api.create(LOCAL_MAIL)
    fails(lab, account_without(api, resource), "403", r"\blist\b", rf"\b{resource}\b", rf'"{group}"', f"no-{resource}")


def test_an_expired_token_leaves_the_rules_alone(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(WEB)
    succeeds(lab, config)
    api.create(MAIL)
    fails(lab, api.kubeconfig("expired", token=api.expired(api.token())), "401", "token")


def as_pod(lab: Lab, api: ApiServer, account: str, *args: str) -> Done:
    """epok with the account of a pod."""
    mounted = lab.host.root / "run/secrets/kubernetes.io/serviceaccount"
    mounted.mkdir(parents=True, exist_ok=True)
    (mounted / "token").write_text(api.token(account))
    (mounted / "ca.crt").write_bytes(api.authority.pem)
    pod = {"KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT), "HOME": "/nowhere"}
    return lab.epok("-i", "eth0", *args, "local", env=pod)


def test_a_pod_needs_no_kubeconfig(lab: Lab, api: ApiServer) -> None:
    api.create(MAIL)
    done = as_pod(lab, api, "epok")
    assert done.returncode == 0, done.stderr
    assert who(lab, 25) == NODES
    assert api.asked()


def test_a_client_certificate_serves_as_well_as_a_token(lab: Lab, api: ApiServer) -> None:
    api.create(MAIL)
    succeeds(lab, api.kubeconfig("certificate", certificate=api.admin))
    assert who(lab, 25) == NODES


def test_certificates_inside_a_kubeconfig_leave_no_files(lab: Lab, api: ApiServer, tmp_path: Path) -> None:
    api.create(MAIL)
    config = api.kubectl("config", "view", "--raw", "--flatten")
    (tmp_path / "config").write_text(config)
    (tmp_path / "tmp").mkdir()
    succeeds(lab, str(tmp_path / "config"), env={"TMPDIR": str(tmp_path / "tmp")})
    assert "client-key-data" in config
    assert not os.listdir(tmp_path / "tmp")


def test_a_context_chooses_the_user(lab: Lab, api: ApiServer, config: str, tmp_path: Path) -> None:
    api.create(MAIL)
    merged = json.loads(Path(config).read_text())
    stranger = {"name": "stranger", "user": {"token": "nobody"}}
    named = {"name": "strange", "context": {"cluster": "cluster-one", "user": "stranger"}}
    merged |= {"users": [*merged["users"], stranger], "contexts": [*merged["contexts"], named]}
    (tmp_path / "config").write_text(json.dumps({**merged, "current-context": "strange"}))
    fails(lab, str(tmp_path / "config"), "401")
    succeeds(lab, str(tmp_path / "config"), "--context", "one")
    assert who(lab, 25) == NODES


# ---- a server that goes away


class Relay:
    """Passes connections on to the server, until a client asks again after a long answer: for the next page.

    That request never arrives: its connection is closed, and `gone` is called while all others wait.
    """

    def __init__(self, space: Namespace, gone: Callable[[], object]) -> None:
        self.gone, self.space = gone, space
        self.used, self.lock = False, threading.Lock()
        with space.entered():
            self.listener = socket.create_server((ADDRESS, 0))
        self.url = f"https://{ADDRESS}:{self.listener.getsockname()[1]}"
        in_background(self.accept)

    def accept(self) -> None:
        while True:
            in_background(self.pass_on, self.listener.accept()[0])

    def pass_on(self, client: socket.socket) -> None:
        with client, self.space.entered(), socket.create_connection((ADDRESS, PORT)) as server:
            answered: list[int] = []
            in_background(self.answer, server, client, answered)
            while data := client.recv(65536):
                with self.lock:
                    if sum(answered) > 100_000 and not self.used:
                        self.used = True
                        client.shutdown(socket.SHUT_RDWR)
                        self.gone()
                        return
                server.sendall(data)

    @staticmethod
    def answer(server: socket.socket, client: socket.socket, answered: list[int]) -> None:
        try:
            while data := server.recv(65536):
                answered.append(len(data))
                client.sendall(data)
        finally:
            client.shutdown(socket.SHUT_RDWR)


def in_background(work: Callable[..., object], *args: object) -> None:
    def run() -> None:
        with contextlib.suppress(OSError):  # one of the sides is gone, as they shall be
            work(*args)

    threading.Thread(target=run, daemon=True).start()


@pytest.fixture
def many(lab: Lab, api: ApiServer) -> ApiServer:
    """More Services than a page has; the last one alone is forwarded."""
    api.create(*(service(f"a{n}", None, [port(80)]) for n in range(600)), service("z", "25:2025", [SMTP]))
    return api


def through(relay: Relay, api: ApiServer) -> str:
    """A kubeconfig of epok's account, by way of the relay."""
    authority = {"certificate-authority": api.ca}
    return write_kubeconfig(api.folder / "relay", relay.url, user={"token": api.token()}, cluster=authority)


def test_a_server_that_goes_away_between_two_pages_and_comes_back_is_read_whole(lab: Lab, many: ApiServer) -> None:
    def restart() -> None:
        many.kill()
        many.start()

    relay = Relay(lab.host, restart)
    done = succeeds(lab, through(relay, many))
    assert relay.used
    assert "trying again" in done.stderr
    assert targets(lab) == {f"10.0.0.{number}:2025" for number in (11, 12, 13)}


def test_a_server_that_goes_away_between_two_pages_leaves_the_rules_alone(
    lab: Lab, many: ApiServer, config: str
) -> None:
    many.create(WEB)
    succeeds(lab, config)
    many.patch("/api/v1/namespaces/default/services/web", metadata={"annotations": {"getbetter.ro/externalport": None}})
    relay = Relay(lab.host, many.kill)
    try:
        fails(lab, through(relay, many), re.escape(relay.url))
        assert relay.used
    finally:
        many.start()
    assert who(lab, 80) == NODES


# ---- Events


def events(api: ApiServer, namespace: str = "default") -> list[tuple[str, str, str, int]]:
    """Service, type, reason and count of each that is epok's; the server itself writes some too."""
    items = api.request("GET", f"/api/v1/namespaces/{namespace}/events")["items"]
    items = [item for item in items if item["source"] == {"component": "epok"}]
    return sorted((item["involvedObject"]["name"], item["type"], item["reason"], item["count"]) for item in items)


def test_kubectl_describe_tells_a_services_story(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("mail", "25:2025, 443:htps", [SMTP]))
    succeeds(lab, config)
    succeeds(lab, config)
    told = api.kubectl("describe", "service", "mail").partition("Events:")[2]
    assert re.search(r"Normal +ExternalPortForwarded .* epok .*tcp/25 .*NodePort 2025\) on 3 nodes", told)
    assert re.search(r"Warning +ExternalPortRejected .*x2 over .* epok .*443:htps.*no port named htps", told)


def test_a_misspelt_annotation_is_told_by_an_event(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("mail", "25:2025", [SMTP], annotations={"getbetter.ro/external-ports": "26"}))
    api.create(service("inner", "80:30080", [port(80, 30080)], annotations={"getbetter.ro/intrenal": ""}))
    log = succeeds(lab, config).stderr
    assert 'default/mail: epok knows no annotation "getbetter.ro/external-ports"' in log
    assert 'rejected: default/inner: epok knows no annotation "getbetter.ro/intrenal"' in log
    assert targets(lab) == {f"10.0.0.{number}:2025" for number in (11, 12, 13)}
    told = {(name, reason) for name, _, reason, _ in events(api)}
    assert {("mail", "UnknownAnnotation"), ("inner", "ExternalPortRejected")} <= told
    assert "is getbetter.ro/internal meant?" in api.kubectl("describe", "service", "inner")


def test_a_rejection_that_stays_counts_up_one_event(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("mail", "25:smpt", [SMTP]))
    for count in (1, 2, 3):
        succeeds(lab, config)
        assert events(api) == [("mail", "Warning", "ExternalPortRejected", count)]
    api.patch("/api/v1/namespaces/default/services/mail", metadata={"annotations": {"getbetter.ro/externalport": "x"}})
    succeeds(lab, config)
    assert events(api) == [("mail", "Warning", "ExternalPortRejected", count) for count in (1, 3)]


def test_a_forward_that_comes_and_goes_is_told_once_each_time(lab: Lab, api: ApiServer, config: str) -> None:
    forwarded, removed = "ExternalPortForwarded", "ExternalPortRemoved"
    path, name = "/api/v1/namespaces/default/services/mail", "getbetter.ro/externalport"
    api.create(service("mail", "25:2025", [SMTP], families=("IPv4", "IPv6")))
    for _ in range(2):
        succeeds(lab, config)
        assert events(api) == [("mail", "Normal", forwarded, 1)]
    api.request("DELETE", "/api/v1/nodes/node3")
    succeeds(lab, config)
    assert events(api) == [("mail", "Normal", forwarded, 1)]
    api.patch(path, metadata={"annotations": {name: None}})
    for _ in range(2):
        succeeds(lab, config)
        assert events(api) == [("mail", "Normal", forwarded, 1), ("mail", "Normal", removed, 1)]


def test_a_port_that_another_service_takes_over_is_told_to_both(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(MAIL)
    succeeds(lab, config)
    api.patch(
        "/api/v1/namespaces/default/services/mail", metadata={"annotations": {"getbetter.ro/externalport": "26:2025"}}
    )
    api.create(service("new", "25:30000", [port(25, 30000)]))
    succeeds(lab, config)
    assert events(api) == [
        ("mail", "Normal", "ExternalPortForwarded", 1),
        ("mail", "Normal", "ExternalPortForwarded", 1),
        ("mail", "Normal", "ExternalPortRemoved", 1),
        ("new", "Normal", "ExternalPortForwarded", 1),
    ]


def test_a_service_that_is_deleted_is_no_event_and_no_trouble(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(MAIL)
    succeeds(lab, config)
    api.request("DELETE", "/api/v1/namespaces/default/services/mail")
    assert not warnings_in(succeeds(lab, config).stderr)
    assert [reason for _, _, reason, _ in events(api)] == ["ExternalPortForwarded"]


def test_many_rejections_of_a_service_are_a_handful_of_events(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("greedy", ",".join(f"{n}:nope" for n in range(1, 500)), [SMTP]))
    succeeds(lab, config)
    assert events(api) == [("greedy", "Warning", "ExternalPortRejected", 1)] * 11


def test_without_the_permission_events_are_one_warning(lab: Lab, api: ApiServer) -> None:
    api.create(MAIL, service("web", "80:nope", [port(80, 30080)]))
    done = succeeds(lab, account_without(api, "events"))
    rejected, warning = warnings_in(done.stderr)
    assert "default/web" in rejected
    assert re.search(r"403.*\bpatch\b.*\bevents\b", warning)
    assert who(lab, 25) == NODES
    assert not events(api)


def test_a_namespace_that_takes_no_events_silences_no_other(lab: Lab, api: ApiServer, config: str) -> None:
    api.kubectl("create", "namespace", "shut")
    api.create(service("first", "80:nope", [port(80)], namespace="shut"), service("second", "81:nope", [port(81)]))
    here_alone = account_without(api, "events")
    account = "--serviceaccount=kube-system:no-events"
    api.kubectl("create", "rolebinding", "here-alone", "-n", "default", "--clusterrole=epok", account)
    *_, warning = warnings_in(succeeds(lab, here_alone).stderr)
    assert re.search(r"403.*\bevents\b.*namespace shut$", warning)
    assert events(api) == [("second", "Warning", "ExternalPortRejected", 1)]
    api.kubectl("delete", "namespace", "shut", "--wait=false")
    assert all("rejected: " in warning for warning in warnings_in(succeeds(lab, config).stderr))
    assert events(api) == [("second", "Warning", "ExternalPortRejected", 2)]
    api.request("DELETE", "/api/v1/namespaces/shut/services/first")


@pytest.fixture(scope="module")
def key(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With which root logs in to the host."""
    need("sshd", "apt-get install openssh-server")
    sshd, made = Sshd(lab.host), make_key(tmp_path_factory.mktemp("ssh") / "key", "ed25519")
    sshd.authorize(made.with_suffix(".pub").read_text())
    return made


def test_a_host_that_cannot_be_reached_keeps_no_events_from_the_others(
    lab: Lab, api: ApiServer, config: str, key: Path
) -> None:
    api.create(service("mail", "25:2025, 26:nope", [SMTP]))
    logins = f"root@{ADDRESS},root@198.51.100.77"
    args = ("--timeout", str(stretched(8)), "ssh", "--host", logins, "--key", str(key), "--host-key", "any")
    done = lab.epok("-i", "eth0", "--kubeconfig", config, *args)
    assert done.returncode == 1, done.stderr
    assert re.search("error: .*198.51.100.77", done.stderr)
    assert [(reason, count) for _, _, reason, count in events(api)] == [
        ("ExternalPortForwarded", 1),
        ("ExternalPortRejected", 1),
    ]
    assert f"root@{ADDRESS}: now forwarding tcp/25 " in api.kubectl("describe", "service", "mail")


def test_runs_that_change_nothing_write_no_events(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(service("mail", "25:2025, 26:nope", [SMTP]))
    assert epok(lab, config, "--dry-run").returncode == 3
    assert not events(api)


# ---- EXTERNAL-IP

SERVICE = "/api/v1/namespaces/default/services/mail"
PUBLISH = ("--publish", "203.0.113.5")
HTTPS = port(443, 30443, "https")
DUAL = ("IPv4", "IPv6")
NOBODY = "getbetter.ro/NotForwarded"
WAITING = """#!/bin/sh
touch /run/waiting
while [ ! -e /run/go ]; do sleep 0.02; done
exec /run/alternatives/held "$@"
"""


def balancer(*ports: Object, externalport: "str | None" = None, name: str = "mail", **spec: Any) -> Object:
    """A Service of epok's own class."""
    kind = {"type": "LoadBalancer", "loadBalancerClass": program.BALANCER_CLASS, **spec}
    return service(name, externalport, ports or [SMTP], **kind)


def written(api: ApiServer, path: str = SERVICE) -> list[Object]:
    """The addresses in a Service's status, but for ipMode, which Kubernetes before 1.30 has not."""
    found = api.request("GET", path)["status"]["loadBalancer"].get("ingress", [])
    for each in found:
        assert each.pop("ipMode", "Proxy") == "Proxy"
    return found


def entry(name: str, *numbers: int, **errors: str) -> Object:
    """As it stands there; `errors` are those of ports, as p443."""
    ports = [{"port": number, "protocol": "TCP"} for number in numbers]
    ports += [{"port": int(key[1:]), "protocol": "TCP", "error": error} for key, error in errors.items()]
    return {"ip" if name[-1].isdigit() else "hostname": name, "ports": ports}


def patched(api: ApiServer) -> int:
    return sum(asked.verb == "patch" and asked.uri.endswith("/status") for asked in api.asked())


def test_a_service_of_epoks_class_has_an_external_ip_when_it_is_forwarded(
    lab: Lab, api: ApiServer, config: str, figure: Callable[[str], None]
) -> None:
    api.create(service("a", "443:30080", [port(80, 30080)]))  # of two from the same second it has the first name
    api.create(balancer(SMTP, HTTPS, families=DUAL))
    publish = ("--publish", "203.0.113.5,2001:db8::5")
    assert "<pending>" in api.kubectl("get", "service", "mail")
    api.forget()
    done = succeeds(lab, config, *publish)
    changed = len(api.asked())
    assert who(lab, 25) == who(lab, 25, to=HOST6) == NODES
    assert written(api) == [entry(ip, 25, p443="getbetter.ro/PortTaken") for ip in ("203.0.113.5", "2001:db8::5")]
    assert "info: default/mail: EXTERNAL-IP 203.0.113.5 (tcp/25, tcp/443 getbetter.ro/PortTaken), 2001" in done.stderr
    assert "2001:db8::5,203.0.113.5" in api.kubectl("get", "service", "mail")
    api.kubectl("wait", "--for=jsonpath={.status.loadBalancer.ingress}", "service/mail", "--timeout=5s")
    kind = "application/merge-patch+json"
    status = {"status": {"loadBalancer": api.request("GET", SERVICE)["status"]["loadBalancer"]}}
    api.request("PATCH", f"{SERVICE}/status?fieldValidation=Strict", status, kind)
    api.forget()
    assert "in sync" in succeeds(lab, config, *publish).stderr
    idle = len(api.asked()) - 2  # the Event about the port that is taken counts up
    assert patched(api) == 0
    figure(f"API requests with --publish, of a run in sync: {idle}; of one with a new Service: {changed}")


def test_addresses_change_and_a_host_name_serves_as_well(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(balancer(SMTP, HTTPS, families=DUAL), balancer(port(80, 30080), name="four", externalport="443:80/udp"))
    steps: dict[str, list[str]] = {
        "auto": [HOST, HOST6],
        "gw.example.org": ["gw.example.org"],
        "203.0.113.5, 203.0.113.4": ["203.0.113.5", "203.0.113.4"],
        "2001:db8::5": ["2001:db8::5"],
        "none": ["2001:db8::5"],
    }
    for text, names in steps.items():
        succeeds(lab, config, "--publish", text)
        assert [each.get("ip") or each["hostname"] for each in written(api)] == names
    assert written(api, SERVICE.replace("mail", "four")) == []
    lab.host.wire("addr add 192.0.2.99/24 dev eth0")
    try:
        succeeds(lab, config, "--publish", "auto")
        assert [each["ip"] for each in written(api)] == [HOST, "192.0.2.99", HOST6]
        succeeds(lab, config, "--publish", "auto", "--addresses", "192.0.2.99")
        assert written(api) == [entry("192.0.2.99", 25, 443)]
    finally:
        lab.host.wire("addr del 192.0.2.99/24 dev eth0")


def test_nothing_is_written_to_services_of_other_classes_and_nothing_without_publish(
    lab: Lab, api: ApiServer, config: str
) -> None:
    api.create(
        balancer(name="theirs", externalport="25:smtp", loadBalancerClass="example.org/lb"),
        balancer(port(80, 30080), name="nobodys", externalport="80", loadBalancerClass=None),
        balancer(port(443, 30000), name="quiet", loadBalancerClass=None),
    )
    succeeds(lab, config, *PUBLISH)
    assert who(lab, 25) == who(lab, 80) == NODES
    api.create(balancer(HTTPS))
    succeeds(lab, config)
    assert who(lab, 443) == NODES
    assert patched(api) == 0


def test_when_no_port_can_be_forwarded_any_more_there_is_no_address(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(balancer(SMTP, HTTPS))
    succeeds(lab, config, *PUBLISH)
    for text, expected in (
        ("25", [entry("203.0.113.5", 25, p443=NOBODY)]),
        ("2525:smtp", [entry("203.0.113.5", p25="getbetter.ro/OtherPort", p443=NOBODY)]),
        ("25:nope", []),
    ):
        api.patch(SERVICE, metadata={"annotations": {"getbetter.ro/externalport": text}})
        succeeds(lab, config, *PUBLISH)
        assert written(api) == expected
    api.patch(SERVICE, metadata={"annotations": {"getbetter.ro/externalport": None}})
    succeeds(lab, config, *PUBLISH)
    assert written(api) == [entry("203.0.113.5", 25, 443)]
    api.patch(SERVICE, spec={"type": "NodePort", "loadBalancerClass": None, "allocateLoadBalancerNodePorts": None})
    succeeds(lab, config, *PUBLISH)
    assert written(api) == []


def test_without_node_ports_a_service_is_rejected_with_the_line_that_mends_it(
    lab: Lab, api: ApiServer, config: str
) -> None:
    api.create(balancer(port(80), allocateLoadBalancerNodePorts=False))
    done = succeeds(lab, config, *PUBLISH)
    [mend] = re.findall("(?m)^warning: rejected: .* has no NodePort; .*: kubectl (patch service .*)$", done.stderr)
    assert written(api) == []
    api.kubectl(*shlex.split(mend))
    succeeds(lab, config, *PUBLISH)
    assert written(api) == [entry("203.0.113.5", 80)]


def test_without_the_role_one_warning_says_how_to_get_it(lab: Lab, api: ApiServer) -> None:
    api.create(balancer(), balancer(HTTPS, name="web"))
    small = account_without(api, "nothing")
    done = succeeds(lab, small, *PUBLISH)
    [warning] = warnings_in(done.stderr)
    assert re.search(r"403 to patch services/status .*cron/publish\.yaml", warning), warning
    assert who(lab, 25) == NODES and written(api) == []
    for line in warning.partition("publish.yaml: ")[2].partition("; no new EXTERNAL-IP")[0].split(" && "):
        api.kubectl(*shlex.split(line.partition("kubectl ")[2]))
    succeeds(lab, small, *PUBLISH)
    assert written(api) == [entry("203.0.113.5", 25)]


@pytest.mark.parametrize("meanwhile", ["changes", "is of another class", "is deleted", "is another one"])
def test_a_service_that_meanwhile(lab: Lab, api: ApiServer, config: str, meanwhile: str) -> None:
    """While the host's rules are swapped in, epok knows an old version of it."""
    api.create(balancer())
    theirs = [{"ip": "203.0.113.77", "ipMode": "VIP", "ports": [{"port": 1, "protocol": "TCP"}]}]
    restore = lab.host.root / "run/alternatives/iptables-restore"
    restore.rename(restore.with_name("held"))
    restore.write_text(WAITING)
    restore.chmod(0o755)
    try:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(succeeds, lab, config, *PUBLISH)
            until((lab.host.root / "run/waiting").exists, "the swap begins", 60)
            if meanwhile in ("is deleted", "is another one"):
                api.request("DELETE", SERVICE)
            if meanwhile == "is of another class":
                api.patch(SERVICE, spec={"type": "NodePort", "loadBalancerClass": None})
                api.patch(SERVICE, spec={"type": "LoadBalancer", "loadBalancerClass": "example.org/lb"})
            elif meanwhile == "is another one":
                api.create(balancer())
            if meanwhile in ("is of another class", "changes"):
                kind = "application/merge-patch+json"
                api.request("PATCH", f"{SERVICE}/status", {"status": {"loadBalancer": {"ingress": theirs}}}, kind)
            (lab.host.root / "run/go").touch()
            done = running.result()
    finally:
        restore.with_name("held").rename(restore)
        lab.host.run(["rm", "-f", "/run/go", "/run/waiting"])
    assert not warnings_in(done.stderr)
    expected = {"changes": [entry("203.0.113.5", 25)], "is of another class": theirs, "is another one": []}
    if meanwhile != "is deleted":
        found = api.request("GET", SERVICE)["status"]["loadBalancer"].get("ingress", [])
        assert [each["ip"] for each in found] == [each["ip"] for each in expected[meanwhile]]
    succeeds(lab, config, *PUBLISH)
    if meanwhile in ("changes", "is another one"):
        assert written(api) == [entry("203.0.113.5", 25)]


def test_dry_run_shows_what_would_be_written_status_and_explain_what_is(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(balancer(SMTP, HTTPS, externalport="25"), WEB)
    line = f"default/mail: EXTERNAL-IP 203.0.113.5 (tcp/25, tcp/443 {NOBODY})\n"
    dry = epok(lab, config, *PUBLISH, "--dry-run")
    assert dry.returncode == 3 and f"~ {line}" in dry.stdout
    assert patched(api) == 0
    document = json.loads(epok(lab, config, *PUBLISH, "--dry-run", "-o", "json").stdout)["hosts"][0]
    assert [(each["service"], len(each["after"])) for each in document["published"]] == [("default/mail", 1)]
    assert "default/mail: EXTERNAL-IP none\n" in succeeds(lab, config, "--status").stdout
    assert "it has no EXTERNAL-IP" in succeeds(lab, config, "--explain", "default/mail").stdout
    succeeds(lab, config, *PUBLISH)
    assert epok(lab, config, *PUBLISH, "--dry-run").stdout == ""
    assert line in succeeds(lab, config, "--status").stdout
    shown = succeeds(lab, config, "--status", "-o", "json").stdout
    assert json.loads(shown)["hosts"][0]["published"]["default/mail"][0]["ip"] == "203.0.113.5"
    told = succeeds(lab, config, "--explain", "default/mail").stdout
    assert "type LoadBalancer of class getbetter.ro/epok" in told and f"  EXTERNAL-IP: {line[26:]}" in told
    assert "EXTERNAL-IP" not in succeeds(lab, config, "--explain", "default/web").stdout


def test_clean_takes_addresses_away(lab: Lab, api: ApiServer, config: str) -> None:
    api.create(balancer(), balancer(HTTPS, name="theirs", externalport="443", loadBalancerClass="example.org/lb"))
    status = {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}}}
    their_path = SERVICE.replace("mail", "theirs")
    api.request("PATCH", f"{their_path}/status", status, "application/merge-patch+json")
    succeeds(lab, config, *PUBLISH)
    dry = epok(lab, config, "--clean", "--dry-run")
    assert dry.returncode == 3 and "~ default/mail: EXTERNAL-IP none\n" in dry.stdout
    small = account_without(api, "secrets")
    [warning] = warnings_in(succeeds(lab, small, "--clean").stderr)
    assert "cron/publish.yaml" in warning and warning.endswith("; Services may still have addresses")
    failed = as_pod(lab, api, "no-secrets", "--clean")  # where an uninstall stops there
    assert failed.returncode == 1 and re.search("(?m)^error: .*; the rules are gone, but Services .*$", failed.stderr)
    assert written(api) == [entry("203.0.113.5", 25)]
    api.create(WEB)
    succeeds(lab, config, *PUBLISH)
    assert "EPOK" in lab.saved()
    assert as_pod(lab, api, "epok", "--clean").returncode == 0
    assert "EPOK" not in lab.saved()
    assert written(api) == []
    assert api.request("GET", their_path)["status"]["loadBalancer"]["ingress"][0]["ip"] == "203.0.113.9"


def test_a_host_that_failed_keeps_what_was_written(lab: Lab, api: ApiServer, config: str, key: Path) -> None:
    api.create(balancer(SMTP, HTTPS))
    there = {"status": {"loadBalancer": {"ingress": [{**entry("198.51.100.77", 25), "ipMode": "Proxy"}]}}}
    api.request("PATCH", f"{SERVICE}/status", there, "application/merge-patch+json")
    for hosts, status, expected in (
        (f"root@{ADDRESS},root@198.51.100.77", 1, [entry(HOST, 25, 443), entry("198.51.100.77", 25)]),
        (f"root@{ADDRESS}", 0, [entry(HOST, 25, 443)]),
    ):
        args = ("--timeout", str(stretched(8)), "ssh", "--host", hosts, "--key", str(key), "--host-key", "any")
        done = lab.epok("-i", "eth0", "--publish", "auto", "--kubeconfig", config, *args)
        assert done.returncode == status, done.stderr
        assert written(api) == expected
