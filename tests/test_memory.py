"""The most memory that a run takes, whatever tenants write and a host prints: of a real kube-apiserver, 16 nodes."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.apiserver import ApiServer
from lab.machine import need_lab, stretched
from lab.meter import metered
from lab.network import EPOK, Lab, bare_environment
from lab.objects import Object, node, port, service

MOST = 128  # MB, of the 192 MiB that the CronJob's pod has
NODES = [node(f"node{n}", f"10.0.0.{10 + n}", f"2001:db8:2::{10 + n}") for n in range(1, 17)]
WEB = service("web", "80:30080", [port(80, 30080)])


def wide(number: int) -> Object:
    """1,000 external ports, tcp and udp, IPv4 and IPv6."""
    target, first = 30001 + number, 1000 * (number + 1)
    text = ",".join(f"{first + n}:{target}" for n in range(1000))
    ports = [port(80, target, "t"), port(80, target, "u", "UDP")]
    return service(f"wide{number}", text, ports, families=("IPv4", "IPv6"))


def annotated(number: int, name: str, text: str) -> Object:
    """As much annotation as the API lets pass."""
    mapping = f"{10000 + number}:{20000 + number}"
    return service(f"s{number}", mapping, [port(80, 20000 + number)], annotations={name: text[:262_000]})


def heavy(number: int) -> Object:
    """1.4 MB, as much as etcd takes."""
    long = ".".join(letter * 60 for letter in "abcd")
    labels = {f"{long}/{'e' * 50}{n:06}": "v" * 60 for n in range(3700)}
    return service(f"s{number}", f"{10000 + number}:{20000 + number}", [port(80, 20000 + number)], selector=labels)


def ranged(number: int) -> Object:
    mapping, its = f"{10000 + number}:{20000 + number}", networks(number % 10).split(",")
    ports = [port(80, 20000 + number)]
    return service(f"s{number}", mapping, ports, type="LoadBalancer", loadBalancerSourceRanges=its)


def ported(number: int) -> Object:
    """Of a type that takes no NodePorts, of which there are not so many."""
    ports = [port(1 + n, name=f"port-{n}") for n in range(2_000)]
    made = service(f"s{number}", f"{10000 + number}", ports, type="ClusterIP")
    del made["spec"]["clusterIP"]
    return made


def networks(number: int) -> str:
    return ",".join(f"1{number}.{n // 256}.{n % 256}.0/24" for n in range(18_000))


TENANTS: dict[str, Callable[[], list[Object]]] = {
    "3 Services with 1,000 ports": lambda: [wide(n) for n in range(3)],
    "300 with 256 KiB of an annotation": lambda: [annotated(n, "example.org/notes", "x" * 262_000) for n in range(300)],
    "100 of 1.4 MB": lambda: [heavy(n) for n in range(100)],
    "10 with 18,000 networks": lambda: [annotated(n, "getbetter.ro/allow-range", networks(n)) for n in range(10)],
}
# What 200 Services have, which together is more than all may ask for.
GREEDY: dict[str, Callable[[int], Object]] = {
    "256 KiB of networks": lambda n: annotated(n, "getbetter.ro/allow-range", networks(n % 10)),
    "18,000 source ranges": ranged,
    "2,000 ports": ported,
}
OTHERS = "/api/v1/namespaces/default/services?fieldSelector=metadata.name!=kubernetes,metadata.name!=web"
# What iptables-save prints 250 MB of.
ENDLESS = {
    "the same rule": "-A INPUT -j ACCEPT",
    "somebody's rules": r'-A KUBE-SEP-& -s 10.244.1.5\/32 -m comment --comment "default\/web-&" -j KUBE-MARK-MASQ',
    "chains of epok's": ":EPOK-& - [0:0]",
    "rules of epok's": r"-A EPOK-tcp-1 -s 10.&.0.0\/32 -p tcp -j RETURN",
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """With iptables-legacy, which takes and prints that many rules sooner."""
    need_lab("legacy")
    with Lab("legacy", nodes=0) as made:
        yield made


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    made = ApiServer(lab.host, tmp_path_factory.mktemp("apiserver"))
    made.grant()
    made.create(*NODES, WEB)
    return made


def run(lab: Lab, server: ApiServer, path: str = "") -> tuple[int, str, str]:
    """Exit status, log and peak of a run that is ended when it takes too much, for epok alone: not what it starts."""
    options = ["-i", "eth0", "--timeout", str(stretched(58)), "-q"]
    options += ["--kubeconfig", server.kubeconfig("epok", token=server.token()), "local"]
    env = bare_environment()
    env["PATH"] = f"{path}:{env['PATH']}"
    done, used = metered(lab.host, [sys.executable, str(EPOK), *options], most=MOST, check=False, env=env)
    return done.returncode, done.stderr, f"peak: {used.megabytes:.0f} MB"


@pytest.mark.parametrize("make", TENANTS.values(), ids=TENANTS)
def test_tenants_do_not_fill_the_memory_nor_keep_others_out(
    lab: Lab, server: ApiServer, make: Callable[[], list[Object]], figure: Callable[[str], None]
) -> None:
    lab.flush()
    server.request("DELETE", "/api/v1/namespaces/default/services?fieldSelector=metadata.name!=kubernetes")
    server.create(WEB, *(made := make()))
    for kind in ("all new", "in sync"):
        status, log, peak = run(lab, server)
        assert status == 0, log[-2000:]
        figure(f"{len(made)} Services, {kind}: {peak}")
    saved = lab.saved()
    assert all(f'--comment "default/{each["metadata"]["name"]} ' in saved for each in (WEB, *made))


@pytest.mark.parametrize("line", ENDLESS.values(), ids=ENDLESS)
def test_a_host_that_prints_250_mb_does_not_fill_the_memory(
    lab: Lab, server: ApiServer, tmp_path: Path, line: str, figure: Callable[[str], None]
) -> None:
    tool = tmp_path / "iptables-save"
    tool.write_text(f"#!/bin/sh\necho \"*$2\"; seq 1 99999999 | sed 's/.*/{line}/' | head -c 250000000\n")
    tool.chmod(0o755)
    status, log, peak = run(lab, server, str(tmp_path))
    assert status == 1, log[-2000:]
    assert re.match("error: this host: iptables-save: more than 64 MiB, or 700,000 lines", log)
    figure(f"250 MB printed: {peak}")


def test_tables_full_of_others_rules_do_not_fill_the_memory(
    lab: Lab, server: ApiServer, figure: Callable[[str], None]
) -> None:
    """As many in each as epok looks at."""
    lab.flush()
    server.request("DELETE", OTHERS)
    tables = ("raw", "mangle", "nat", "filter", "security")
    lines = {4: [f"-A MINE -s 10.0.{n >> 8}.{n & 255} -j RETURN\n" for n in range(59_000)]}
    lines[6] = [f"-A MINE -s 2001:db8::{n:x} -j RETURN\n" for n in range(59_000)]
    try:
        for version, tool in ((4, "iptables"), (6, "ip6tables")):
            text = "".join(f"*{table}\n:MINE - [0:0]\n{''.join(lines[version])}COMMIT\n" for table in tables)
            lab.host.run([f"{tool}-legacy-restore"], text)
        for kind in ("all new", "in sync"):
            status, log, peak = run(lab, server)
            assert status == 0, log[-2000:]
            figure(f"{len(lines) * len(tables) * 59_000:,} rules of others, {kind}: {peak}")
        assert '--comment "default/web ' in lab.saved()
    finally:
        for tool in ("iptables", "ip6tables"):
            lab.host.run([f"{tool}-legacy-restore"], "".join(f"*{table}\nCOMMIT\n" for table in tables))


@pytest.mark.parametrize("make", GREEDY.values(), ids=GREEDY)
def test_what_all_services_ask_for_has_a_limit_that_the_older_ones_use_up_first(
    lab: Lab, server: ApiServer, make: Callable[[int], Object], figure: Callable[[str], None]
) -> None:
    lab.flush()
    server.request("DELETE", OTHERS)
    server.create(*map(make, range(200)))
    status, log, peak = run(lab, server)
    figure(f"200 Services that ask for too much: {peak}")
    assert status == 0, log[-2000:]
    assert '--comment "default/web ' in lab.saved()
    assert "MiB of memory for what all Services ask for, the older ones first" in log
