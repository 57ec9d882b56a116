"""What a person sees: --status, --explain, --dry-run and --metrics-file, of real rules that real packets met."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import epok
from lab.gateway import OLDER_RULE
from lab.machine import stretched
from lab.network import CLIENT, HOST6, Lab, inputs_shown
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, slice_port, snapshot

LOCAL = ("-i", "eth0", "local")
MAIL = service("mail", "25:smtp", [port(25, 2025, "smtp")])
WEB = service("web", "80:30080", [port(80, 30080, "http")], families=("IPv4", "IPv6"))
DNS = service("dns", "53:30053", [port(53, 30053, "dns", protocol="UDP")])
once = pytest.mark.parametrize("lab", ["nft"], indirect=True)


def run(lab: Lab, *services: Object, args: tuple[str, ...] = LOCAL, env: dict[str, str] | None = None) -> str:
    return lab.epok(*args, snapshot=lab.cluster(*services), check=True, env=env).stderr


def status(lab: Lab, *services: Object, args: tuple[str, ...] = ("local",)) -> list[str]:
    """The lines of --status; without Services there is no cluster."""
    cluster = lab.cluster(*services) if services else None
    done = lab.epok("--status", *args, snapshot=cluster)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def told(lab: Lab, *args: str, cluster: Any = None) -> Any:
    """The one host of a document in JSON."""
    done = lab.epok(*args, "-o", "json", "local", snapshot=cluster)
    [host] = json.loads(done.stdout)["hosts"]
    return host


# ------------------------------------------------ --status


def test_the_table_tells_what_is_forwarded_and_how_many_came(lab: Lab) -> None:
    limited = service("limited", "8080:30443", [port(80, 30443)],
                      annotations={"epok.getbetter.ro/allow-range": "192.0.2.10/32"})  # fmt: skip
    kept = service("kept", "8000-8009:30000-30009", [port(n, n, f"p{n}") for n in range(30000, 30010)], policy="Local")
    pods = endpoint_slice("kept", [endpoint("node2", "10.244.2.5")], [slice_port(80)])
    run(lab, MAIL, WEB, DNS, limited, kept, pods)
    for _ in range(12):
        lab.ask(25)
    lab.ask(80, to=HOST6)
    lab.ask(53, "udp")
    lab.ask(8080)
    with pytest.raises(ConnectionRefusedError):
        lab.ask(8080, source=CLIENT[1])
    lab.ask(8003)
    before = lab.saved()
    lines = status(lab)
    title = rf"this host: iptables [0-9.]+ \({lab.backend}\); IPv4 hooks in place; IPv6 hooks in place"
    assert re.fullmatch(title, lines[0])
    assert [line.split() for line in lines[1:8]] == [
        ["PORT", "SERVICE", "NODEPORT", "NODES", "CLIENT", "CONNECTIONS", "ANSWERED", "ONLY"],
        ["tcp/25", "default/mail:smtp", "2025", "3", "hidden", "12", "12/12", "-"],
        ["udp/53", "default/dns:dns", "30053", "3", "hidden", "1", "1/1", "-"],
        ["tcp/80", "default/web:http", "30080", "3", "hidden", "0", "0/0", "-"],
        ["tcp/80", "IPv6", "default/web:http", "30080", "3", "hidden", "1", "1/1", "-"],
        ["tcp/8000-8009", "default/kept:p30000-p30009", "30000-30009", "1", "kept", "1", "1/1", "-"],
        ["tcp/8080", "default/limited:80", "30443", "3", "hidden", "1", "1/1", "192.0.2.10/32"],
    ]
    assert lines[8].startswith("not compared with the cluster: kubeconfig ")
    assert re.fullmatch(r"(\d+) of \1 checks passed", lines[-1])
    assert lab.saved() == before


@once
def test_the_table_is_aligned_and_fits_80_columns_when_its_content_does(lab: Lab) -> None:
    run(lab, MAIL, WEB, DNS)
    table = status(lab)[1:6]
    assert max(map(len, table)) <= 80
    starts = [table[0].index(word) for word in ("SERVICE", "CLIENT")]
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in table for start in starts)
    ends = [table[0].index(word) + len(word) for word in ("NODEPORT", "NODES", "CONNECTIONS")]
    assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in table[1:] for end in ends)
    assert not any("\033" in line or line.endswith(" ") for line in table)


@once
@pytest.mark.parametrize(("env", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)])
def test_there_is_colour_on_a_terminal_alone_and_never_with_no_color(
    lab: Lab, env: dict[str, str], colour: bool
) -> None:
    run(lab, MAIL)
    master, terminal = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    argv = [sys.executable, "-B", epok.__file__, "--status", "local"]
    subprocess.run(lab.host.command(argv), env={**clean, **env}, stdout=terminal, stderr=subprocess.DEVNULL, check=True)
    os.close(terminal)
    text = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "default/mail:smtp" in text
    assert ("\033[" in text) == colour


def test_json_tells_the_same_to_programs(lab: Lab) -> None:
    run(lab, MAIL, WEB)
    for _ in range(5):
        lab.ask(25)
    host = told(lab, "--status")
    [mail, *web] = host["forwards"]
    assert sum(place["connections"] for place in mail["nodes"]) == mail["connections"] == 5
    assert [place["address"] for place in mail["nodes"]] == ["10.0.0.11", "10.0.0.12", "10.0.0.13"]
    keys = ("protocol", "first", "last", "service", "port", "ipVersion", "clientAddressKept", "onlyFor", "reachedBy")
    assert [mail[key] for key in keys] == ["tcp", 25, 25, "default/mail", "smtp", 4, False, [], ["eth0"]]
    assert [(each["ipVersion"], each["connections"]) for each in web] == [(4, 0), (6, 0)]
    assert host["hooks"] == {"IPv4": "in place", "IPv6": "in place"}
    assert host["backend"].endswith(f"({lab.backend})")
    assert all(check["ok"] for check in host["checks"])
    assert (host["pending"], host["rejected"]) == ([], [])


def test_with_a_cluster_it_tells_what_is_wanted_and_not_there_and_what_is_rejected(lab: Lab) -> None:
    run(lab, MAIL, DNS)
    moved = service("mail", "25:smtp, 26:imap", [port(25, 30000, "smtp")])
    lines = status(lab, moved, WEB)
    start = lines.index("the next run would change:")
    assert lines[start + 1 : start + 7] == [
        "~ tcp/25 -> default/mail:smtp (NodePort 30000) on 3 nodes: NodePort 2025 before",
        "- udp/53 -> default/dns:dns (NodePort 30053) on 3 nodes",
        "+ tcp/80 -> default/web:http (NodePort 30080) on 3 nodes",
        "+ tcp/80 -> default/web:http (NodePort 30080) on 3 nodes over IPv6",
        'rejected: default/mail: "26:imap": no port named imap; the NodePorts of this Service are 30000 (smtp/tcp)',
        "compared with --snapshot standard input",
    ]


def test_misspelt_annotations_are_told(lab: Lab) -> None:
    note = service("note", "25:2025", [port(25, 2025)], annotations={"epok.getbetter.ro/external-port": "26"})
    inner = service("inner", "80:30080", [port(80, 30080)], annotations={"epok.getbetter.ro/intrenal": ""})
    run(lab, note, inner)
    lines = status(lab, note, inner)
    assert any(
        line.startswith("warning: default/note: ") and "epok.getbetter.ro/externalport " in line for line in lines
    )
    assert any(line.startswith("rejected: default/inner: ") and "epok.getbetter.ro/internal " in line for line in lines)


@pytest.mark.parametrize("ways", [
    ("-i", "eth0,eth2,lo"),
    ("-i", "eth+,eth2", "--external-interface", "eth2"),
    ("-i", "eth0,lo", "--external-interface", "eth0", "--addresses", "192.0.2.1,2001:db8:1::/64"),
])  # fmt: skip
def test_without_interfaces_it_compares_by_those_of_the_live_rules(lab: Lab, ways: tuple[str, ...]) -> None:
    inner = service("inner", "81:30443", [port(80, 30443)], annotations={"epok.getbetter.ro/internal": ""})
    run(lab, WEB, inner, args=(*ways, "local"))
    lines = status(lab, WEB, inner)
    assert "the next run would change:" not in lines
    [inner_line] = [line for line in lines if "default/inner" in line]
    assert bool(re.search(r" by \S+$", inner_line)) == ("--external-interface" in ways)


@once
def test_a_host_without_epok_is_told_so(lab: Lab) -> None:
    lines = status(lab)
    assert "IPv4 hooks not used; IPv6 hooks not used" in lines[0]
    assert lines[1] == "no forwards"


def test_a_missing_hook_is_told(lab: Lab) -> None:
    run(lab, MAIL)
    lab.host.run(["iptables", "-D", "FORWARD", "-j", "EPOK-FORWARD"], check=True)
    lab.host.run(["iptables", "-t", "nat", "-D", "PREROUTING", "1"], check=True)
    assert "IPv4 hooks missing in filter FORWARD, nat PREROUTING; IPv6 hooks not used" in status(lab)[0]


def test_counts_go_on_when_another_forward_changes_and_begin_anew_with_new_rules(lab: Lab) -> None:
    def counts() -> dict[str, int]:
        return {each["service"]: each["connections"] for each in told(lab, "--status")["forwards"]}

    run(lab, MAIL, DNS)
    lab.ask(25)
    run(lab, MAIL, service("ssh", "2222:30443", [port(22, 30443)]))
    lab.ask(25)
    assert counts() == {"default/mail": 2, "default/ssh": 0}
    run(lab, service("mail", "25:30000", [port(25, 30000)]))
    assert counts() == {"default/mail": 0}


@once
def test_a_cluster_that_does_not_answer_keeps_nobody_waiting(lab: Lab, tmp_path: Path) -> None:
    run(lab, MAIL)
    config = tmp_path / "config"
    config.write_text(json.dumps({
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "users": [{"name": "c", "user": {"token": "t"}}],
        "current-context": "c",
    }))  # fmt: skip
    done = lab.epok("--status", "--kubeconfig", str(config), "--timeout", str(stretched(3)), "local")
    assert done.returncode == 0
    assert "default/mail:smtp" in done.stdout
    assert "not compared with the cluster: http://127.0.0.1:1: " in done.stdout


# ------------------------------------------------ --explain


def explain(lab: Lab, *objects: Object, name: str = "default/mail", args: tuple[str, ...] = ()) -> list[str]:
    done = lab.epok("--explain", name, *args, "local", snapshot=snapshot(*objects) if objects else None)
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


def with_pods(*ready: str, name: str = "mail") -> Object:
    pods = [endpoint(f"node{n}", f"10.244.{n}.5", ready=f"node{n}" in ready) for n in (1, 2, 3)]
    return endpoint_slice(name, pods, [slice_port(25, "smtp")])


def test_a_service_that_works_is_told_from_its_annotation_to_its_counts(lab: Lab) -> None:
    run(lab, MAIL, WEB)
    for _ in range(7):
        lab.ask(25)
    before = lab.saved()
    lines = explain(lab, *lab.node_objects(), MAIL, WEB, with_pods("node1", "node3"))
    text = "\n".join(lines)
    assert "a mail server's" in lines.pop(5)
    assert lines[:8] == [
        "default/mail on this host",
        "  type NodePort, externalTrafficPolicy Cluster, sessionAffinity None",
        "  NodePorts: 2025 (smtp/tcp)",
        '  getbetter.ro/externalport: "25:smtp"',
        "  pods: 2 of 3 ready: 10.244.1.5, 10.244.3.5",
        "Mappings",
        "  25:smtp  tcp/25 -> NodePort 2025 (smtp)",
        "Nodes",
    ]
    assert "  tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes, by eth0: 7 new connections" in lines
    assert re.search(r"\n    chain EPOK-tcp-25-[0-9a-f]{6}\n", text)
    counts = re.findall(r"^    to (\S+) port 2025: (\d+)$", text, re.MULTILINE)
    assert [address for address, _ in counts] == ["10.0.0.11", "10.0.0.12", "10.0.0.13"]
    assert sum(int(count) for _, count in counts) == 7
    assert [line for line in lines if "port 2025 answers" in line] == [
        f"  ok      10.0.0.{n} port 2025 answers" for n in (11, 12, 13)
    ]
    assert "web" not in text
    assert lines[-1] == "Most likely: it works as far as can be seen from here: 7 connections are answered"
    assert lab.saved() == before


OLDER = service("older", "25:30000", [port(25, 30000)], created="2020-01-01T00:00:00Z")
BROKEN: dict[str, tuple[Object, str]] = {  # the Service, and how the last line goes on
    "not there": (WEB, "there is no Service default/mail; those with an annotation of epok's: default/web"),
    "no annotation": (
        service("mail", None, [port(25, 2025)]),
        "it has no annotation getbetter.ro/externalport: "
        "kubectl annotate service -n default mail getbetter.ro/externalport=",
    ),
    "misspelled": (
        service("mail", None, [port(25, 2025)], annotations={"getbetter.ro/external-port": "25"}),
        'it has no annotation getbetter.ro/externalport, only "getbetter.ro/external-port": kubectl annotate ',
    ),
    "empty": (service("mail", " , ", [port(25, 2025)]), "its annotation names no port"),
    "no such port": (service("mail", "25:imap", [port(25, 2025, "smtp")]), '"25:imap": no port named imap; '),
    "ClusterIP": (
        service("mail", "25", [port(25)], type="ClusterIP"),
        '"25": a Service of type ClusterIP has no NodePorts; make it NodePort',
    ),
    "nobody may": (
        service("mail", "25", [port(25, 2025)], annotations={"epok.getbetter.ro/allow-range": "home"}),
        'epok.getbetter.ro/allow-range: "home" is no CIDR',
    ),
    "taken": (
        service("mail", "25:2025", [port(25, 2025)]),
        '"25:2025": external port 25 (tcp) is taken by default/older',
    ),
}  # fmt: skip


@once
@pytest.mark.parametrize("case", BROKEN)
def test_the_last_line_says_what_is_wrong_with_a_service(lab: Lab, case: str) -> None:
    broken, ending = BROKEN[case]
    others = [OLDER] if case == "taken" else []
    run(lab, *others)
    lines = explain(lab, *lab.node_objects(), broken, *others, args=("-i", "eth0"))
    assert lines[-1].startswith(f"Most likely: {ending}")


def test_what_the_older_epok_left_is_told_and_is_never_the_cause(lab: Lab) -> None:
    lab.host.run(["iptables-restore", "--noflush"], f"*nat\n{OLDER_RULE}COMMIT\n")
    told = "this host has 1 rule of the older epok, which forward whatever the annotations say; once it is stopped, "
    run(lab, MAIL)
    lab.ask(25)
    lines = status(lab, MAIL, args=LOCAL)
    assert [line for line in lines if line.startswith(f"FAILED  {told}")]
    passed, checks = map(int, re.findall(r"\d+", lines[-1]))
    assert passed == checks - 1
    lines = explain(lab, *lab.node_objects(), MAIL)
    assert [line for line in lines if line.startswith(f"  FAILED  {told}")]
    assert lines[-1].startswith("Most likely: it works as far as can be seen from here: 1 connection is answered")
    assert "older" not in lab.epok("--clean", "--dry-run", "local").stderr


@once
def test_without_a_ready_pod_that_is_the_cause_unless_a_node_answers(lab: Lab) -> None:
    run(lab, MAIL)
    assert explain(lab, *lab.node_objects(), MAIL, with_pods())[-1].startswith("Most likely: no connection has come in")
    closed = service("mail", "25:2026", [port(25, 2026)])
    run(lab, closed)
    lines = explain(lab, *lab.node_objects(), closed, with_pods())
    assert "  pods: 0 of 3 ready" in lines
    assert lines[-1] == (
        "Most likely: no pod of it is ready: "
        "kubectl get endpointslices -n default -l kubernetes.io/service-name=mail"
    )  # fmt: skip


@once
def test_each_node_that_is_left_out_is_named_with_the_reason(lab: Lab) -> None:
    nodes = [
        node("excluded", "10.0.0.1", annotations={"epok.getbetter.ro/exclude": ""}),
        node("labelled", "10.0.0.2", labels={epok.STANDARD_EXCLUDE_LABEL: ""}),
        node("leaving", "10.0.0.3", taints=[{"key": epok.AUTOSCALER_TAINT}]),
        node("lost", "10.0.0.4", ready=False),
        node("nowhere"),
        node("podless", "10.0.0.5"),
        node("used", "10.0.0.11"),
    ]
    nodes[0]["status"]["addresses"][0]["address"] = "10.0.0.9"  # 10.0.0.1 is the host's own
    local = service("mail", "25:smtp", [port(25, 2025, "smtp")], policy="Local")
    pods = endpoint_slice("mail", [endpoint("used", "10.244.1.5")], [slice_port(25, "smtp")])
    lines = explain(lab, *nodes, local, pods, args=("-i", "eth0"))
    start = lines.index("Nodes") + 1
    assert [re.split("  +", line.strip(), maxsplit=2) for line in lines[start : start + 7]] == [
        ["excluded", "10.0.0.9", "left out: annotation epok.getbetter.ro/exclude"],
        ["labelled", "10.0.0.2", "left out: label node.kubernetes.io/exclude-from-external-load-balancers"],
        ["leaving", "10.0.0.3", "left out: taint ToBeDeletedByClusterAutoscaler"],
        ["lost", "10.0.0.4", "left out: not Ready"],
        ["nowhere", "no address", "left out: no usable InternalIP or ExternalIP of IPv4"],
        ["podless", "10.0.0.5", "left out: has no ready pod of the Service (externalTrafficPolicy Local)"],
        ["used", "10.0.0.11", "used"],
    ]
    many = [node(f"n{n}", f"10.0.0.{n}") for n in range(20, 24)]
    lines = explain(lab, *many, MAIL, args=("-i", "eth0", "--max-nodes", "3", "--timeout", str(stretched(5))))
    assert sum("left out: 3 others are used (--max-nodes)" in line for line in lines) == 1


@once
def test_a_host_that_is_a_node_is_told_to_go_to_the_pods(lab: Lab) -> None:
    own = node("node1", "10.0.0.1"), node("node2", "10.0.0.12")
    cluster = snapshot(*own, MAIL, with_pods("node2"))
    lab.epok(*LOCAL, snapshot=cluster, check=True)
    lines = explain(lab, *own, MAIL, with_pods("node2"))
    assert "  tcp/25 -> default/mail:smtp (port 25) on 1 pod, by eth0: 0 new connections" in lines
    reason = "left out: has no ready pod of the Service that the host, itself a node, may use"
    assert next(line for line in lines if line.startswith("  node1")).endswith(reason)
    assert next(line for line in lines if line.startswith("  node2")).endswith("  used")


def test_what_the_host_lacks_is_the_cause_until_epok_has_run(lab: Lab) -> None:
    objects = (*lab.node_objects(), MAIL)
    lines = explain(lab, *objects, args=("-i", "eth0"))
    assert lines[-1].startswith("Most likely: the next run would change it (+ tcp/25): run epok")
    run(lab, MAIL)
    assert explain(lab, *objects)[-1].startswith("Most likely: no connection has come in by eth0 yet: ")
    lab.ask(25)
    assert explain(lab, *objects)[-1].startswith("Most likely: it works as far as can be seen from here: ")
    lab.host.run(["iptables", "-D", "FORWARD", "-j", "EPOK-FORWARD"], check=True)
    assert explain(lab, *objects)[-1].startswith("Most likely: IPv4 hooks missing in filter FORWARD: run epok")


@once
def test_a_nodeport_that_does_not_answer_is_the_cause(lab: Lab) -> None:
    closed = service("mail", "25:2026", [port(25, 2026)])
    run(lab, closed)
    lines = explain(lab, *lab.node_objects(), closed)
    assert lines[-1].startswith("Most likely: 10.0.0.11 port 2026 does not answer this host: Connection refused; ")
    assert sum(line.startswith("  FAILED  10.0.0.1") for line in lines) == 3


@once
@pytest.mark.parametrize(("externalport", "policy", "warned"), [
    ("25:2025", "Cluster", True), ("465:2025", "Cluster", True), ("587:2025", "Cluster", True),
    ("25:2025", "Local", False), ("80:2025", "Cluster", False),
])  # fmt: skip
def test_a_mail_server_that_cannot_see_its_clients_is_told_of_open_relays(
    lab: Lab, externalport: str, policy: str, warned: bool
) -> None:
    mail = service("mail", externalport, [port(25, 2025, "smtp")], policy=policy)
    objects = (*lab.node_objects(), mail, with_pods("node1"))
    lab.epok(*LOCAL, snapshot=snapshot(*objects), check=True)
    lines = [line for line in explain(lab, *objects)[:-1] if "relays mail for everybody" in line]
    cure = """kubectl patch service -n default mail -p '{"spec": {"externalTrafficPolicy": "Local"}}'"""
    assert [line.endswith(cure) and line.startswith("  warning: ") for line in lines] == [True] * warned


@once
def test_without_a_cluster_the_host_s_part_is_told_and_the_exit_status_is_1(lab: Lab) -> None:
    run(lab, MAIL)
    done = lab.epok("--explain", "default/mail", "local")
    assert done.returncode == 1
    assert "not compared with the cluster: " in done.stdout.splitlines()[1]
    assert "tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes" in done.stdout


@once
def test_the_story_is_there_for_programs_too(lab: Lab) -> None:
    broken = service("mail", "25:smtp, 26:imap", [port(25, 2025, "smtp")])
    run(lab, broken)
    story = told(lab, "--explain", "default/mail", cluster=lab.cluster(broken))
    assert story["service"] == "default/mail"
    assert [(each["mapping"], each["stands"]) for each in story["mappings"]] == [("25:smtp", True), ("26:imap", False)]
    assert [(each["name"], each["used"]) for each in story["clusterNodes"]] == [(f"node{n}", True) for n in (1, 2, 3)]
    assert story["cause"].startswith('"26:imap": no port named imap')


# ------------------------------------------------ --dry-run


CHANGES: dict[str, tuple[Object, Object, str]] = {  # before, after, and what is said about it
    "nodes": (MAIL, service("mail", "25:smtp", [port(25, 2025, "smtp")], policy="Local"),
              "~ tcp/25 -> default/mail:smtp (NodePort 2025) on 1 node, client address kept: "
              "no longer 10.0.0.11, 10.0.0.12; client address kept now"),
    "NodePort": (MAIL, service("mail", "25:smtp", [port(25, 30000, "smtp")]),
                 "~ tcp/25 -> default/mail:smtp (NodePort 30000) on 3 nodes: NodePort 2025 before"),
    "clients": (MAIL, service("mail", "25:smtp", [port(25, 2025, "smtp")], loadBalancerSourceRanges=["10.0.0.0/8"]),
                "~ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes, for 10.0.0.0/8 only: now for 10.0.0.0/8"),
    "port": (service("mail", "25:2025", [port(25, 2025)]), MAIL,
             "~ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes: port 25 before"),
    "internal": (MAIL, service("mail", "25:smtp", [port(25, 2025, "smtp")],
                               annotations={"epok.getbetter.ro/internal": ""}),
                 "~ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes: no longer by eth0"),
    "affinity": (MAIL, service("mail", "25:smtp", [port(25, 2025, "smtp")], sessionAffinity="ClientIP"),
                 "~ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes: nodes picked in another way"),
    "owner": (service("dns", "25:2025", [port(25, 2025, "dns")]), MAIL,
              "- tcp/25 -> default/dns:dns (NodePort 2025) on 3 nodes\n"
              "+ tcp/25 -> default/mail:smtp (NodePort 2025) on 3 nodes"),
}  # fmt: skip


@once
@pytest.mark.parametrize("case", CHANGES)
def test_a_dry_run_says_what_changes_about_a_forward(lab: Lab, case: str) -> None:
    before, after, said = CHANGES[case]
    args = ("-i", "eth0,eth2", "--external-interface", "eth0", "local")
    run(lab, before, args=args)
    dry = lab.epok("--dry-run", *args, snapshot=lab.cluster(after, with_pods("node3")))
    assert dry.returncode == 3
    assert dry.stdout.partition("# iptables-restore --noflush --wait 5\n")[0] == said + "\n"
    run(lab, after, with_pods("node3"), args=args)
    assert lab.epok("--dry-run", *args, snapshot=lab.cluster(after, with_pods("node3"))).stdout == ""


def test_the_inputs_of_a_dry_run_in_json_are_those_of_the_text(lab: Lab) -> None:
    cluster = lab.cluster(MAIL, WEB)
    text = lab.epok("--dry-run", *LOCAL, snapshot=cluster).stdout
    document = told(lab, "--dry-run", "-i", "eth0", cluster=cluster)
    assert [(each["change"], each["service"], each["ipVersion"]) for each in document["changes"]] == [
        ("+", "default/mail", 4), ("+", "default/web", 4), ("+", "default/web", 6)
    ]  # fmt: skip
    assert [each["command"][0] for each in document["inputs"]] == ["iptables-restore", "ip6tables-restore"]
    assert document["inputs"][0]["input"] == inputs_shown(text)[0].partition("# ip6tables-restore")[0]
    for each in document["inputs"]:
        lab.host.run(each["command"], each["input"], check=True)
    assert told(lab, "--dry-run", "-i", "eth0", cluster=cluster)["inputs"] == []


# ------------------------------------------------ --metrics-file


def metrics(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Each metric's values by those of its labels."""
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for sample in (sample for family in families for sample in family.samples):
        found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def read(lab: Lab, name: str = "/run/epok.prom") -> dict[str, dict[tuple[str, ...], float]]:
    return metrics(lab.host.run(["cat", name], check=True).stdout)


METRICS = (*LOCAL, "--metrics-file", "/run/epok.prom")


def test_the_metrics_tell_what_a_run_did(lab: Lab) -> None:
    bad = service("bad", "443:htps", [port(443, 30443, "https")])
    run(lab, MAIL, WEB, bad, args=METRICS)
    first = read(lab)
    assert first["epok_success"] == {("this host",): 1}
    assert first["epok_forwards"] == {("this host",): 2}
    assert first["epok_nodes"] == {("this host", "4"): 3, ("this host", "6"): 3}
    assert first["epok_rejections"] == {(): 1}
    assert first["epok_changes"] == {("this host", sign): n for sign, n in
                                     (("added", 3), ("removed", 0), ("changed", 0))}  # fmt: skip
    steps = {("this host", "read"), ("this host", "swap"), ("", "cluster"), ("", "plan"), ("", "ruleset")}
    assert first["epok_step_duration_seconds"].keys() == steps
    assert max(first["epok_step_duration_seconds"].values()) <= first["epok_duration_seconds"][()]
    for _ in range(3):
        lab.ask(25)
    run(lab, MAIL, WEB, args=METRICS)
    then = read(lab)
    counted = {key[1:]: value for key, value in then["epok_connections_total"].items()}
    assert counted == {
        ("4", "tcp", "25", "default/mail"): 3,
        ("4", "tcp", "80", "default/web"): 0,
        ("6", "tcp", "80", "default/web"): 0,
    }
    success = then["epok_last_success_timestamp_seconds"][("this host",)]
    assert first["epok_last_success_timestamp_seconds"][("this host",)] < success <= time.time()
    assert set(then["epok_changes"].values()) == {0}
    [file] = (lab.host.root / "run").glob("epok.prom*")
    assert file.stat().st_mode & 0o777 == 0o644, "for node_exporter, which is another user"


@once
def test_a_failed_run_says_so_and_keeps_the_time_of_the_last_success(lab: Lab) -> None:
    run(lab, MAIL, args=METRICS)
    before = read(lab)["epok_last_success_timestamp_seconds"]
    assert lab.epok(*METRICS, "--kubeconfig", "/nowhere").returncode == 1
    after = read(lab)
    assert after["epok_success"] == {("this host",): 0}
    assert after["epok_last_success_timestamp_seconds"] == before
    assert "epok_forwards" not in after


@once
@pytest.mark.parametrize("name", ["/nowhere/epok.prom", "/run", "/proc/epok.prom", "/dev/null"])
def test_metrics_that_cannot_be_written_are_a_warning_and_no_failure(lab: Lab, name: str) -> None:
    done = lab.epok(*LOCAL, "--metrics-file", name, snapshot=lab.cluster(MAIL))
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert line.startswith(f"warning: --metrics-file {name}: ")
    assert lab.ask(25)


@once
def test_a_reader_never_finds_half_a_file(lab: Lab) -> None:
    lab.host.run(["sh", "-c", "umask 077; echo old >/run/epok.prom"], check=True)
    file = lab.host.root / "run" / "epok.prom"
    run(lab, MAIL, args=METRICS)
    assert file.stat().st_mode & 0o777 == 0o644
    with file.open() as old:
        run(lab, MAIL, WEB, args=METRICS)
        assert metrics(old.read())["epok_forwards"] == {("this host",): 1}
    assert metrics(file.read_text())["epok_forwards"] == {("this host",): 2}


@once
@pytest.mark.parametrize(("made", "why"), [("ln -s /run/secret", "a link"), ("mkfifo", "no regular file")])
def test_who_owns_the_folder_of_the_metrics_gets_no_file_of_roots_and_holds_no_run_up(
    lab: Lab, made: str, why: str
) -> None:
    folder = "rm -rf /run/theirs; install -d -o 65534 /run/theirs; echo secret >/run/secret; chmod 600 /run/secret"
    theirs = "/run/theirs/epok.prom"
    lab.host.run(["sh", "-ec", f"{folder}; setpriv --reuid 65534 --clear-groups {made} {theirs}"], check=True)
    log = run(lab, MAIL, args=(*LOCAL, "--timeout", str(stretched(5)), "--metrics-file", theirs))
    [line] = [line for line in log.splitlines() if line.startswith("warning: ")]
    assert line == f"warning: --metrics-file {theirs}: it is {why}; nothing else depends on it"
    assert lab.host.run(["sh", "-c", "cat /run/secret; stat -c %a /run/secret; ls /run/theirs"]).stdout == (
        "secret\n600\nepok.prom\n"
    )


@once
def test_links_that_come_while_the_metrics_are_written_are_not_followed(lab: Lab) -> None:
    """As fast as a user of the host can put them there."""
    lab.host.run(["sh", "-ec", "install -d -o 65534 /run/race; echo secret >/run/secret; chmod 600 /run/secret"])
    plant = "while :; do for f in epok.prom.*; do ln -sf /run/secret $f; ln -sf /run/secret epok.prom; done; done"
    racing = lab.host.popen(["setpriv", "--reuid", "65534", "--clear-groups", "sh", "-c", f"cd /run/race; {plant}"])
    try:
        for _ in range(5):
            run(lab, MAIL, args=(*LOCAL, "--metrics-file", "/run/race/epok.prom"))
    finally:
        racing.kill()
        racing.wait()
    assert lab.host.run(["sh", "-c", "cat /run/secret; stat -c %a /run/secret"]).stdout == "secret\n600\n"


@once
def test_looking_writes_no_metrics(lab: Lab) -> None:
    for args in (("--status", "local"), ("--explain", "default/mail", "local"), ("--dry-run", *LOCAL)):
        lab.epok(*args, "--metrics-file", "/run/none.prom", snapshot=lab.cluster(MAIL))
    assert not (lab.host.root / "run" / "none.prom").exists()
