"""The lab itself, without epok: who reaches whom, that the backend is the one asked for, and what is left over."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab.machine import need, need_lab, until
from lab.network import CLIENT, CLIENT6, HOST, HOST6, INSIDE, INSIDE6, SBIN, Answer, Lab, processes_in, read_answer

TESTS = Path(__file__).resolve().parent
DNAT = {4: ("iptables-restore", "10.0.0.13:2025", HOST), 6: ("ip6tables-restore", "[2001:db8:2::13]:2025", HOST6)}
DEVICES = ("eth0", "eth1", "eth2", "node1", "node2", "node3")
OTHER = {"nft": "legacy", "legacy": "nft"}
TALLIES = """
import pytest
from conftest import faults
def test_of_many(tally):
    tally("runs", 3, 1)
@faults("host faults")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_of_one(number):
    assert number != 2
"""
# A child that leaves its parents and its session, as a daemon does.
HOLDING = """
import sys
from lab.network import Lab
with Lab(sys.argv[1]) as lab:
    lab.client.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])
    spaces = [lab.client, lab.inside, lab.host, *lab.nodes]
    print(*(f"/proc/{space.pid}/ns" for space in spaces), flush=True)
    sys.stdin.read()
"""


def machine() -> dict[str, object]:
    """Of this machine, all that a lab could spoil; other things may well change while a test runs."""
    save = [need(f"iptables-{backend}-save", "apt-get install iptables") for backend in OTHER]
    rules = "".join(subprocess.run([tool], capture_output=True, text=True).stdout for tool in save)
    mounts = [line.split()[3:5] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return {
        "rules": [line for line in rules.splitlines() if line.startswith("-")],
        "alternatives": {link.name: os.readlink(link) for link in Path("/etc/alternatives").glob("ip*tables*")},
        "mounts": [mount for mount in mounts if mount[1] in ("/run", "/proc", "/etc/alternatives")],
        "interfaces": [(number, name) for number, name in socket.if_nameindex() if name in DEVICES],
    }


def running(networks: set[str]) -> list[str]:
    """What lives in networks, also when the process that held them has gone."""
    return [process.words for process in processes_in(networks, "net")]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("version", "clients", "inside"), [(4, CLIENT, INSIDE), (6, CLIENT6, INSIDE6)])
def test_every_node_sees_the_address_that_asks(
    lab: Lab, protocol: str, version: int, clients: tuple[str, ...], inside: str
) -> None:
    for number, node in enumerate(lab.nodes, 11):
        to = f"10.0.0.{number}" if version == 4 else f"2001:db8:2::{number}"
        assert lab.ask(2025, protocol, to)[:2] == (node.name, clients[0])
        assert lab.ask(2025, protocol, to, source=clients[1])[:2] == (node.name, clients[1])
        assert lab.ask(2025, protocol, to, frm=lab.inside)[:2] == (node.name, inside)
        assert lab.ask(2025, protocol, to, frm=lab.host).name == node.name


def test_an_answer_tells_source_port_and_destination_port(lab: Lab) -> None:
    answer = lab.ask(30080, "udp", "10.0.0.12", sport=5353)
    assert answer == Answer("node2", CLIENT[0], 5353, 30080)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("to", [*CLIENT, *CLIENT6])
def test_nodes_and_inside_reach_the_client_through_the_host(lab: Lab, protocol: str, to: str) -> None:
    with lab.serve(lab.client, "client", [4000]):
        for asker in [*lab.nodes, lab.inside]:
            assert lab.ask(4000, protocol, to, frm=asker).name == "client"


def test_a_connection_echoes_until_it_is_closed(lab: Lab) -> None:
    with lab.connect(2025, to="10.0.0.11") as connection:
        assert read_answer(connection).name == "node1"
        for word in (b"one\n", b"two\n"):
            connection.sendall(word)
            assert connection.recv(100) == word


@pytest.mark.parametrize("to", [HOST, HOST6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_where_nobody_listens_refuses(lab: Lab, protocol: str, to: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.ask(25, protocol, to)


def test_a_port_is_free_again_when_its_echo_server_was_left(lab: Lab) -> None:
    for name in ("first", "second"):
        with lab.serve(lab.host, name, [26]):
            assert lab.ask(26).name == name
    with pytest.raises(ConnectionRefusedError):
        lab.ask(26)


@pytest.mark.parametrize("version", [4, 6])
def test_a_dnat_rule_written_by_hand_forwards(lab: Lab, version: int) -> None:
    restore, target, to = DNAT[version]
    rule = f"-A PREROUTING -i eth0 -p tcp --dport 25 -j DNAT --to-destination {target}"
    lab.host.run([restore, "--noflush"], f"*nat\n{rule}\nCOMMIT\n")
    assert lab.ask(25, to=to)[::3] == ("node3", 2025)


def test_rules_stay_within_the_backend(lab: Lab) -> None:
    lab.host.run(["iptables", "-A", "INPUT", "-s", "203.0.113.7", "-j", "DROP"])
    saves = {backend: lab.host.run([f"iptables-{backend}-save"]).stdout for backend in OTHER}
    assert "203.0.113.7" in saves[lab.backend]
    assert "203.0.113.7" not in saves[OTHER[lab.backend]]


@pytest.mark.parametrize(
    "tool", ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"]
)
@pytest.mark.parametrize("path", ["/usr/sbin", "/sbin"])
def test_plain_names_mean_the_backend_whatever_the_path(lab: Lab, tool: str, path: str) -> None:
    version = lab.host.run(["env", "-i", f"PATH={path}:/usr/bin", tool, "-V"]).stdout
    assert {"nft": "(nf_tables)", "legacy": "(legacy)"}[lab.backend] in version
    asked_for = subprocess.run([f"{SBIN}/iptables-{lab.backend}", "-V"], capture_output=True, text=True).stdout
    assert version.split()[1:] == asked_for.split()[1:]


def test_a_flush_leaves_no_rule_chain_or_policy(lab: Lab) -> None:
    empty = lab.saved(), lab.saved(6)
    for tool in ("iptables", "ip6tables"):
        lab.host.run([tool, "-P", "FORWARD", "DROP"])
        lab.host.run([tool, "-t", "nat", "-N", "DOCKER"])
        lab.host.run([tool, "-t", "nat", "-A", "OUTPUT", "-j", "DOCKER"])
    assert (lab.saved(), lab.saved(6)) != empty
    lab.flush()
    assert (lab.saved(), lab.saved(6)) == empty


@pytest.mark.parametrize("backend", OTHER)
def test_the_machine_is_left_alone(backend: str) -> None:
    need_lab(backend)
    before = machine()
    with Lab(backend) as lab:
        lab.host.run(["iptables", "-A", "INPUT", "-j", "ACCEPT"])
        assert machine() == before
    assert machine() == before


def test_two_labs_do_not_meet() -> None:
    need_lab("nft")
    need_lab("legacy")
    with Lab("nft") as one, Lab("legacy", nodes=1) as other, other.serve(other.host, "other", [26]):
        assert other.ask(26).name == "other"
        assert [answer.name for answer in (one.ask(2025, to="10.0.0.13"), other.ask(2025, to="10.0.0.11"))] == [
            "node3",
            "node1",
        ]
        with pytest.raises(ConnectionRefusedError):
            one.ask(26)


def test_children_die_with_the_lab_and_with_their_popen() -> None:
    need_lab("nft")
    with Lab(ports=()) as lab:
        network = {os.readlink(f"/proc/{lab.client.pid}/ns/net")}
        killed = lab.client.popen(["sleep", "1001"])
        lab.client.popen(["sleep", "1002"])
        until(lambda: "sleep 1001" in running(network), "the first sleeps")
        killed.kill()
        until(lambda: "sleep 1001" not in running(network), "the child goes with its Popen")
        until(lambda: "sleep 1002" in running(network), "the second sleeps")
    assert running(network) == []


@pytest.mark.parametrize("backend", OTHER)
def test_a_killed_test_run_leaves_nothing(backend: str) -> None:
    need_lab(backend)
    before = machine()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS
    )
    with holder:
        assert holder.stdout
        namespaces = {os.readlink(f"{space}/net") for space in holder.stdout.readline().split()}
        assert len(namespaces) == 6
        until(lambda: "sleep 1000" in running(namespaces), "the daemon sleeps")
        holder.send_signal(signal.SIGKILL)
    until(lambda: running(namespaces) == [], "all processes of the lab are gone")
    assert machine() == before
    assert not [name for name in namespaces if name in Path("/proc/self/mountinfo").read_text()]


def test_the_table_of_what_was_tried_counts_everything_once(tmp_path: Path) -> None:
    (tmp_path / "test_tallies.py").write_text(TALLIES)
    argv = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "conftest", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)})
    assert "runs: 3 times, 1 lost\nhost faults: 3 times, 1 lost\n" in done.stdout, done.stdout + done.stderr
