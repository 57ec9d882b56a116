"""cron/epok-gate, cron/sudoers and cron/setup-host on the lab's host, with a real sshd, PAM and sudo."""

import contextlib
import fcntl
import gzip
import itertools
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import epok
from bench.measure import cluster
from lab.gateway import OLDER_RULE, Done, Gateway, check, gate, secret_data
from lab.machine import BACKENDS, need, stretched, until
from lab.manifests import CRON
from lab.network import EPOK, HOST, HOST6, PROGRAM, Lab, bare_environment
from lab.objects import endpoint, endpoint_slice, port, service, slice_port
from lab.sshd import make_key

pytestmark = pytest.mark.long
once = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)
REFUSED = 126
RECORD = False  # thieves send what the gate would not let through
SWAP = "sudo -n iptables-restore --noflush --wait 5"
SWAP6 = "sudo -n ip6tables-restore --noflush --wait 5"
MAIL = service("mail", "25:2025", [port(25, 2025)])
WEB = service("web", "80:30080", [port(80, 30080)], families=("IPv4", "IPv6"))
DNS = service("dns", "53:30053", [port(53, 30053, protocol="UDP")], families=("IPv4", "IPv6"))
RANGE = service("range", "8000-8009:30000-30009", [port(number, number) for number in range(30000, 30010)])
ALLOWED = {"epok.getbetter.ro/allow-range": "192.0.2.0/24, 2001:db8::/32"}
MANY = {"getbetter.ro/allow-range": ",".join([*(f"10.{n >> 8}.{n & 255}.0/24" for n in range(2500)), "192.0.2.0/24"])}
FIREWALL = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:MINE - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -j MINE
COMMIT
*nat
:MINE - [0:0]
-A PREROUTING -p tcp -m tcp --dport 9999 -m comment --comment "-j EPOK" -j MINE
-A MINE -j ACCEPT
COMMIT
"""


class Answer(NamedTuple):
    status: int
    out: str
    err: str


class Client:
    """Whoever has the key, on the client's machine."""

    def __init__(self, lab: Lab, gateway: Gateway, secret: dict[str, str], folder: Path) -> None:
        self.lab, self.gateway, self.folder = lab, gateway, folder
        self.key, self.known_hosts = folder / "id_rsa", folder / "known_hosts"
        self.key.write_text(secret["id_rsa"])
        self.key.chmod(0o600)
        self.known_hosts.write_text(secret["known_hosts"])
        self.login = secret["ssh_host"]

    def ssh(self, *words: str, data: bytes = b"", level: str = "ERROR") -> Answer:
        """What a command leaves: `words` are options of ssh, then the command."""
        done = subprocess.run(self.argv(*words, level=level), input=data, capture_output=True, timeout=300)
        return Answer(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1"))

    def argv(self, *words: str, level: str = "ERROR") -> list[str]:
        files = [f"-oUserKnownHostsFile={self.known_hosts}", "-oGlobalKnownHostsFile=none", f"-i{self.key}"]
        options = ["-F", "none", "-oBatchMode=yes", "-oIdentitiesOnly=yes", f"-oLogLevel={level}", *files]
        return self.lab.client.command(["ssh", *options, self.login, *words])

    def epok(
        self, *args: str, services: Any = (MAIL,), interfaces: str = "eth0", env: "dict[str, str] | None" = None
    ) -> Answer:
        argv = [*PROGRAM, "--snapshot", "-", "-i", interfaces, "ssh"]
        argv += ["--host", self.login, "--key", str(self.key), "--known-hosts", str(self.known_hosts), *args]
        text = json.dumps(self.lab.cluster(*services))
        done = self.lab.client.run(argv, text, check=False, env={**bare_environment(), **(env or {})})
        return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def gateway(lab: Lab) -> Gateway:
    need("visudo", "apt-get install sudo")
    need("sshd", "apt-get install openssh-server")
    return Gateway(lab.host)


@pytest.fixture(scope="module")
def client(lab: Lab, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Who has the key that setup-host made."""
    secret = secret_data(gateway.setup_host("--address", HOST).stdout)
    return Client(lab, gateway, secret, tmp_path_factory.mktemp("client"))


def everything(lab: Lab) -> str:
    """All tables of both families, without counters and dates."""
    tools = "iptables-save; ip6tables-save; nft list ruleset 2>/dev/null || true"
    return re.sub(
        r"\[\d+:\d+\]|counter packets \d+ bytes \d+|(?m:^#.*\n)", "", lab.host.run(["sh", "-c", tools]).stdout
    )


def restore(lab: Lab, text: str) -> None:
    lab.host.run(["iptables-restore", "-n"], text)


# ------------------------------------------------ what epok does gets through


ROUNDS: dict[str, tuple[tuple[str, ...], tuple[Any, ...], str]] = {
    "one port": ((), (MAIL,), "eth0"),
    "IPv6, UDP, a range": ((), (MAIL, WEB, DNS, RANGE), "eth0"),
    "one chain at a time": (("--batch-commands", "false"), (MAIL, WEB), "eth0"),
    "in stages": (("--batch-size", "500"), (WEB, DNS, RANGE), "eth0,eth2"),
    "the host's own connections": (("--addresses", f"{HOST}/32,10.0.0.0/8,{HOST6}"), (MAIL, WEB), "eth0,lo"),
    "its own connections to all addresses": ((), (MAIL, WEB), "eth+,lo"),
    "clients by address": (
        (),
        (
            service("mail", "25:2025", [port(25, 2025)], sessionAffinity="ClientIP", annotations=ALLOWED),
            service("web", "80:30080", [port(80, 30080)], families=("IPv4", "IPv6"), sessionAffinity="ClientIP"),
        ),
        "eth0",
    ),
    "more clients than go into a chain": (
        (),
        (service("mail", "25:2025", [port(25, 2025)], annotations=MANY), WEB),
        "eth0",
    ),
    "an external interface": (
        ("--external-interface", "eth0"),
        (service("mail", "25:2025", [port(25, 2025)], annotations={"epok.getbetter.ro/internal": ""}), WEB),
        "eth0,eth+,lo",
    ),
    "policy Local": (
        (),
        (
            service("mail", "25:2025", [port(25, 2025)], policy="Local"),
            endpoint_slice("mail", [endpoint("node1", "10.244.1.5")], [slice_port(25)]),
        ),
        "eth0",
    ),
    "always masquerade": (("--masquerade", "always"), (MAIL,), "eth0"),
    "no forward": ((), (service("plain", None, [port(25, 2025)]),), "eth0"),
}


def test_whatever_epok_does_gets_through(lab: Lab, client: Client) -> None:
    for name, (args, services, interfaces) in ROUNDS.items():
        done = client.epok(*args, services=services, interfaces=interfaces)
        assert done.status == 0, f"{name}: {done.err}"
        again = client.epok(*args, services=services, interfaces=interfaces)
        assert again.status == 0 and "in sync" in again.err, f"{name}: {again.err}"
        if MAIL in services:
            assert lab.ask(25).name in ("node1", "node2", "node3")
    restore(lab, FIREWALL)
    clean = client.epok("--clean")
    assert clean.status == 0 and "EPOK" not in re.sub("-j EPOK. -j MINE", "", lab.saved()), clean.err
    assert lab.saved().count("MINE") == FIREWALL.count("MINE")
    restore(lab, "*filter\n-F\n-X MINE\n:FORWARD ACCEPT [0:0]\nCOMMIT\n*nat\n-F\n-X MINE\nCOMMIT\n")


def test_it_tells_the_port_that_epok_logs_in_by(client: Client) -> None:
    answer = client.ssh("printenv SSH_CONNECTION")
    assert answer.status == 0 and re.fullmatch(rf"\S+ \d+ {HOST} 22\n", answer.out), answer


def test_udp_clients_of_before_are_sent_the_new_way(lab: Lab, client: Client) -> None:
    assert client.epok(services=(DNS,)).status == 0
    other = service("dns", "53:30080", [port(53, 30080, protocol="UDP")], families=("IPv4", "IPv6"))
    ports = []
    for services in ((DNS,), (other,)):
        done = client.epok(services=services)
        assert done.status == 0 and "warning" not in done.err, done.err
        ports += [lab.ask(53, "udp", sport=4053).port, lab.ask(53, "udp", to=HOST6, sport=4053).port]
    assert ports == [30053, 30053, 30080, 30080]
    assert not [line for line in client.gateway.logged("epok-gate") if "conntrack" in line]


def test_rules_that_jump_to_epok_from_elsewhere_and_those_of_the_older_epok_go(lab: Lab, client: Client) -> None:
    assert client.epok().status == 0
    odd = """-A PREROUTING -i eth7 -m comment --comment "somebody's \\"own\\" try" -j EPOK\n"""
    restore(lab, f"*nat\n{odd}{OLDER_RULE}COMMIT\n")
    done = client.epok()
    assert done.status == 0 and "eth7" not in lab.saved() and "epok_rule_id" in lab.saved(), done.err
    done = client.epok("--clean")
    assert done.status == 0 and lab.saved().count("\n-A") == 0, done.err + lab.saved()


def test_the_gate_knows_the_rules_of_the_older_epok_by_what_epok_knows_them_by() -> None:
    assert gate.OLDER_COMMENT.pattern == epok.OLDER_COMMENT.pattern


def test_chains_of_others_with_epoks_prefix_and_odd_names_go(lab: Lab, client: Client) -> None:
    names = ("EPOK-a+b", "EPOK-", "EPOK-a:b", "EPOK-a=b")
    restore(lab, "*nat\n" + "".join(f":{name} - [0:0]\n" for name in names) + "COMMIT\n")
    assert client.epok().status == 0
    assert not [name for name in names if f":{name} " in lab.saved()]


def test_a_foreign_rule_is_not_deleted_even_if_its_comment_speaks_of_epok(lab: Lab, client: Client) -> None:
    restore(lab, FIREWALL)
    lines = [line.replace("-A", "-D", 1) for line in lab.saved().splitlines() if line.startswith("-A PREROUTING")]
    assert len(lines) == 1 and "EPOK" in lines[0]
    refused(client, SWAP, f"*nat\n{lines[0]}\nCOMMIT\n".encode())


# ------------------------------------------------ what anybody else tries does not


GOOD = """*filter
:EPOK-FORWARD - [0:0]
-A EPOK-FORWARD -m connmark --mark 0x10000000/0x10000000 -j ACCEPT
-I FORWARD -j EPOK-FORWARD
COMMIT
*nat
:EPOK-tcp-25-e3dfdc - [0:0]
:EPOK-tcp-25-25-04be77 - [0:0]
:EPOK - [0:0]
-A EPOK-tcp-25-e3dfdc -j CONNMARK --set-xmark 0x30000000/0x30000000
-A EPOK-tcp-25-e3dfdc -p tcp -j DNAT --to-destination 10.0.0.11:2025
-A EPOK-tcp-25-25-04be77 -p tcp -m tcp --dport 25 -m comment --comment "default/mail 25" -g EPOK-tcp-25-e3dfdc
-A EPOK -i eth0 -p tcp -g EPOK-tcp-25-25-04be77
-I PREROUTING -m addrtype --dst-type LOCAL -j EPOK
COMMIT
"""
UNDO = """*filter
-D FORWARD -j EPOK-FORWARD
:EPOK-FORWARD - [0:0]
-X EPOK-FORWARD
COMMIT
*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j EPOK
:EPOK - [0:0]
:EPOK-tcp-25-25-04be77 - [0:0]
:EPOK-tcp-25-e3dfdc - [0:0]
-X EPOK
-X EPOK-tcp-25-25-04be77
-X EPOK-tcp-25-e3dfdc
COMMIT
"""
COMMENTED = '-A EPOK-tcp-25-e3dfdc -p tcp -m tcp --dport 25 -m comment --comment "{}" -g EPOK-tcp-25-e3dfdc'


def nat(*lines: str) -> str:
    chains = "".join(f":{chain} - [0:0]\n" for chain in ("EPOK", "EPOK-POSTROUTING", "EPOK-tcp-25-e3dfdc"))
    return f"*nat\n{chains}" + "".join(f"{line}\n" for line in lines) + "COMMIT\n"


def filters(*lines: str) -> str:
    return "*filter\n:EPOK-FORWARD - [0:0]\n" + "".join(f"{line}\n" for line in lines) + "COMMIT\n"


COMMANDS = {
    "no command": "",
    "a shell": "sh",
    "another command": "id",
    "a command behind ;": "iptables-save -t nat; id",
    "a command behind &&": "iptables-save -t nat && id",
    "a pipe": "iptables-save -t nat | sh",
    "a command behind a line break": "iptables-save -t nat\nid",
    "a line break": "iptables-save -t nat\n",
    "a substitution": "iptables-save -t $(id)",
    "backquotes": "iptables-save -t `id`",
    "a redirection": "iptables-save -t nat >/etc/cron.d/mine",
    "quotes": "iptables-save -t 'nat'",
    "two blanks": "iptables-save  -t nat",
    "save -f": "sudo -n iptables-save -f /etc/cron.d/mine -t nat",
    "save to a file at its end": "iptables-save -t nat -f /etc/cron.d/mine",
    "save with a program to load modules": "iptables-save -t nat -M /tmp/mine",
    "another table": "iptables-save -t mangle",
    "restore that flushes": "sudo -n iptables-restore --wait 5",
    "restore with a program to load modules": "sudo -n iptables-restore --noflush --wait 5 --modprobe=/tmp/mine",
    "restore from a file": "sudo -n iptables-restore --noflush --wait 5 /etc/shadow",
    "iptables": "sudo -n iptables -F",
    "nft": "sudo -n nft flush ruleset",
    "sudo as somebody else": "sudo -n -u nobody iptables-save -t nat",
    "sudo twice": "sudo -n sudo -n iptables-save -t nat",
    "an interactive sudo": "sudo iptables-save -t nat",
    "by its path": "/usr/sbin/iptables-save -t nat",
    "another file": "cat /etc/shadow",
    "one file more": "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding /etc/shadow",
    "ip with more to do": "ip -br addr add 10.9.9.9/32 dev lo",
    "all flows": "conntrack -D",
    "flows by name": "conntrack -D -p udp --orig-dst de.de --orig-port-dst 53 --reply-src 10.0.0.11",
    "flows of others": "conntrack -D -p udp --orig-dst 8.8.8.8 --orig-port-dst 53 --reply-src 8.8.8.8",
    "flows with more options": "conntrack -D -p udp --orig-dst 1.2.3.4 --orig-port-dst 53 --reply-src 1.2.3.4 -z",
    "digits that are not ASCII": "conntrack -D -p udp --orig-dst 1.2.3.4 --orig-port-dst \u0665 --reply-src 1.2.3.4",
    "counts to a file": "sudo -n iptables-save -c -t nat -f /etc/cron.d/mine",
    "counts of another table": "iptables-save -c -t filter",
    "counts of all tables": "iptables-save -c",
    "legacy's rules to a file": "sudo -n iptables-legacy-save -f /etc/cron.d/mine",
    "the same for IPv6": "sudo -n ip6tables-legacy-save --file=/etc/cron.d/mine",
    "legacy's rules with a program to load modules": "sudo -n iptables-legacy-save -M /tmp/mine",
    "one table of legacy's, which makes it": "iptables-legacy-save -t security",
    "nft's rules to a file": "sudo -n iptables-nft-save -f /etc/cron.d/mine",
    "legacy's iptables": "sudo -n iptables-legacy -F",
    "legacy's restore": "sudo -n iptables-legacy-restore --noflush --wait 5",
    "nft with a command more": "sudo -n nft -j list chain ip nat EPOK; flush ruleset",
    "nft with a command more in a name": "sudo -n nft -j list chain ip nat EPOK;flush",
    "nft with a command more in a line": "sudo -n nft -j list chain ip nat EPOK\nflush ruleset",
    "nft with another verb": "sudo -n nft -j flush chain ip nat EPOK",
    "nft that lists and resets": "sudo -n nft -j reset rules",
    "nft with all there is": "sudo -n nft -j list ruleset",
    "nft with a set": "nft -j list set ip nat secrets",
    "nft with chains of a family": "nft -j list chains ip",
    "nft with a chain in other families": "nft -j list chain arp filter INPUT",
    "nft without a family": "nft -j list chain nat EPOK",
    "nft without -j": "nft list chains",
    "nft with a file": "sudo -n nft -j -f /etc/shadow",
    "nft with a file after it": "sudo -n nft -j list chains -f /etc/shadow",
    "nft with a place to include from": "sudo -n nft -j -I /tmp list chains",
    "nft that asks": "sudo -n nft -j -i",
    "nft with a brace": "nft -j list chain ip nat {",
    "nft with a chain's body": "sudo -n nft -j list chain ip nat EPOK{policy_drop}",
    "nft with quotes": 'nft -j list chain ip nat "EPOK"',
    "nft with an apostrophe": "nft -j list chain ip nat 'EPOK'",
    "nft with a comment": "nft -j list chain ip nat EPOK#",
    "nft with a variable": "nft -j list chain ip nat $EPOK",
    "nft with a star": "nft -j list chain ip nat EPOK*",
    "nft with a set's name": "nft -j list chain ip nat @EPOK",
    "nft with a tab": "nft -j list chain ip nat\tEPOK",
    "nft with a line break at the end": "nft -j list chain ip nat EPOK\n",
    "nft with a name that begins like an option": "nft -j list chain ip -f EPOK",
    "nft with a path": "nft -j list chain ip /etc/shadow EPOK",
    "nft with a path in a name": "nft -j list chain ip nat a/b",
    "nft with a number": "nft -j list chain ip nat 7",
    "nft with a name that is not ASCII": "nft -j list chain ip nat \u00e9",
    "nft with a name that is too long": f"nft -j list chain ip nat {'a' * 129}",
    "nft with a third name": "nft -j list chain ip nat EPOK handle",
    "ss that ends connections": "sudo -n ss -K",
    "ss that ends those that it lists": "sudo -n ss -HltunK",
    "ss that names programs": "sudo -n ss -Hltunp",
    "ss with a filter from a file": "sudo -n ss -Hltun -F /etc/shadow",
    "ss that writes a file": "sudo -n ss -Hltun -D /etc/cron.d/mine",
    "ss in another namespace": "sudo -n ss -Hltun -N mine",
    "ss with connections": "ss -Htun",
    "a route added": "sudo -n ip route add default via 192.0.2.10",
    "a route deleted": "sudo -n ip route del default",
    "routes flushed": "sudo -n ip route flush",
    "all routes": "ip route show table all",
    "one device's netconf": "ip netconf show dev eth0",
    "commands from a file": "sudo -n ip -batch /etc/shadow",
    "a command in a namespace": "sudo -n ip netns exec mine id",
    "netconf with -force": "ip -force netconf",
    "nc that listens": "nc -l 4444",
    "nc that listens, in epok's words": "nc -nvz -w 2 -l 10.0.0.11 4444",
    "nc that runs a program": "nc -nvz -w 2 -e /bin/sh 10.0.0.11 2025",
    "nc that sends": "nc -nv -w 2 10.0.0.11 2025",
    "nc that waits longer": "nc -nvz -w 20 10.0.0.11 2025",
    "nc that waits for ever": "nc -nvz 10.0.0.11 2025",
    "nc that looks names up": "nc -vz -w 2 10.0.0.11 2025",
    "nc with a name": "nc -nvz -w 2 node1 2025",
    "nc with a name of hexadecimal digits": "nc -nvz -w 2 abc.de 2025",
    "nc with a number for an address": "nc -nvz -w 2 2130706433 22",
    "nc with a short address": "nc -nvz -w 2 127.1 22",
    "nc with an octal address": "nc -nvz -w 2 0177.0.0.1 22",
    "nc with an octal byte": "nc -nvz -w 2 10.0.0.011 2025",
    "nc with the loopback": "nc -nvz -w 2 127.0.0.1 22",
    "nc with another address of the loopback": "nc -nvz -w 2 127.9.9.9 22",
    "nc with the loopback of IPv6": "nc -nvz -w 2 ::1 22",
    "nc with the loopback in long": "nc -nvz -w 2 0:0:0:0:0:0:0:1 22",
    "nc with the loopback mapped": "nc -nvz -w 2 ::ffff:127.0.0.1 22",
    "nc with the loopback mapped, in hexadecimal": "nc -nvz -w 2 ::ffff:7f00:1 22",
    "nc with the loopback as it was once": "nc -nvz -w 2 ::127.0.0.1 22",
    "nc with no address": "nc -nvz -w 2 0.0.0.0 22",
    "nc with no address of IPv6": "nc -nvz -w 2 :: 22",
    "nc with a multicast address": "nc -nvz -w 2 224.0.0.1 22",
    "nc with a multicast address of IPv6": "nc -nvz -w 2 ff02::1 22",
    "nc with an address of the link": "nc -nvz -w 2 169.254.169.254 80",
    "nc with an address of a link": "nc -nvz -w 2 fe80::1%eth0 22",
    "nc with broadcast": "nc -nvz -w 2 255.255.255.255 22",
    "nc with the host's own address": f"nc -nvz -w 2 {HOST} 22",
    "nc with another of its addresses": "nc -nvz -w 2 10.0.0.1 22",
    "nc with its address of IPv6": f"nc -nvz -w 2 {HOST6} 22",
    "nc with its address of IPv6, otherwise": "nc -nvz -w 2 2001:db8:1:0:0:0:0:1 22",
    "nc with its address of IPv6, with zeros": "nc -nvz -w 2 2001:0db8:0001::0001 22",
    "nc with a service's name": "nc -nvz -w 2 10.0.0.11 ssh",
    "nc with all ports": "nc -nvz -w 2 10.0.0.11 1-65535",
    "nc with two ports": "nc -nvz -w 2 10.0.0.11 22 23",
    "nc with an option behind": "nc -nvz -w 2 10.0.0.11 2025 -X",
    "nc by a proxy": "nc -nvz -w 2 -x 10.0.0.12:3128 10.0.0.11 2025",
    "nc with a socket": "nc -nvz -w 2 -U /run/docker.sock",
    "sftp-server": "/usr/lib/openssh/sftp-server",
    "scp": "scp -f /etc/passwd",
    "rsync": "rsync --server --sender . /etc",
    "the gate itself": "sudo -n /usr/local/sbin/epok-gate 0x3",
    "setup-host": "sudo -n /usr/local/sbin/setup-host",
}
ACCEPT = "-A EPOK-FORWARD -m connmark --mark 0x10000000/0x10000000 -j ACCEPT"
DNAT = "-A EPOK-tcp-25-e3dfdc -p tcp -j DNAT --to-destination"
INPUTS = {
    "nothing at all": "",
    "a table without end": "*nat\n:EPOK - [0:0]\n",
    "a last line without end": GOOD[:-1],
    "another table": "*mangle\nCOMMIT\n",
    "table raw": "*raw\n-A PREROUTING -j DROP\nCOMMIT\n",
    "a table in a table": "*nat\n*filter\nCOMMIT\nCOMMIT\n",
    "a line before the table": ":EPOK - [0:0]\n*nat\nCOMMIT\n",
    "a line behind COMMIT": GOOD + "-F\n",
    "a comment line": "# hello\n" + GOOD,
    "an empty line": GOOD + "\n",
    "a flushed chain": nat("-F PREROUTING"),
    "all chains flushed": nat("-F"),
    "a policy": filters(":INPUT DROP [0:0]"),
    "a policy by -P": filters("-P INPUT DROP"),
    "a counter": nat(":EPOK - [1:1]"),
    "another chain": nat(":MINE - [0:0]"),
    "a chain that only begins like epok's": nat(":EPOKS - [0:0]"),
    "a chain that is too long": nat(f":EPOK-{'a' * 24} - [0:0]"),
    "another chain deleted": nat("-X DOCKER"),
    "all chains deleted": nat("-X"),
    "a chain renamed": nat("-E EPOK MINE"),
    "a rule of another chain": filters("-A INPUT -j ACCEPT"),
    "a rule of FORWARD": filters("-I FORWARD -j ACCEPT"),
    "a hook elsewhere": filters("-I INPUT -j EPOK-FORWARD"),
    "a hook at a number": nat("-I PREROUTING 1 -m addrtype --dst-type LOCAL -j EPOK"),
    "a hook for all packets": nat("-I PREROUTING -j EPOK"),
    "a hook of the other table": filters("-I FORWARD -m addrtype --dst-type LOCAL -j EPOK"),
    "a hook appended": nat("-A PREROUTING -m addrtype --dst-type LOCAL -j EPOK"),
    "somebody's rule deleted": filters("-D INPUT -j MINE"),
    "a rule deleted that is not there": nat("-D PREROUTING -i eth9 -j EPOK"),
    "a rule deleted by number": filters("-D INPUT 1"),
    "a rule replaced": filters("-R INPUT 1 -j ACCEPT"),
    "a rule for all packets that are forwarded": filters("-A EPOK-FORWARD -j ACCEPT"),
    "another mark": filters("-A EPOK-FORWARD -m connmark --mark 0x1/0x1 -j ACCEPT"),
    "no mark at all": filters("-A EPOK-FORWARD -m connmark --mark 0x0/0x0 -j ACCEPT"),
    "masquerading more": nat("-A EPOK-POSTROUTING -j MASQUERADE"),
    "another connection mark": nat("-A EPOK-tcp-25-e3dfdc -j CONNMARK --set-xmark 0x1/0x1"),
    "another mask": nat("-A EPOK-tcp-25-e3dfdc -j CONNMARK --set-xmark 0x30000000/0xffffffff"),
    "dropped packets": nat("-A EPOK-tcp-25-e3dfdc -j DROP"),
    "a log": nat('-A EPOK-tcp-25-e3dfdc -j LOG --log-prefix "x"'),
    "a jump to another chain": nat("-A EPOK -i eth0 -p tcp -g DOCKER"),
    "a jump without an interface": nat("-A EPOK -p tcp -g EPOK-tcp-25-e3dfdc"),
    "every interface": nat("-A EPOK -i + -p tcp -g EPOK-tcp-25-e3dfdc"),
    "an interface that is an option": nat("-A EPOK -i -M -p tcp -g EPOK-tcp-25-e3dfdc"),
    "a target in EPOK itself": nat("-A EPOK -i eth0 -p tcp -j DNAT --to-destination 10.0.0.11:2025"),
    "a program to load modules": nat(f"{DNAT} 10.0.0.11:2025 -M /tmp/mine"),
    "the same, in front": nat("-M /tmp/mine -A EPOK -i eth0 -j RETURN"),
    "--modprobe": nat(f"{DNAT} 10.0.0.11:2025 --modprobe=/tmp/mine"),
    "the beginning of --modprobe": nat(f"{DNAT} 10.0.0.11:2025 --modp /tmp/mine"),
    "another table in a rule": nat("-A EPOK -i eth0 -j RETURN -t filter"),
    "a match with a file": nat("-A EPOK-tcp-25-e3dfdc -m bpf --object-pinned /etc/shadow -j RETURN"),
    "a match by path": nat("-A EPOK-tcp-25-e3dfdc -m ../../../tmp/mine -j RETURN"),
    "a name to look up": nat(f"{DNAT} evil.example:25"),
    "a name of hexadecimal digits": nat('-A EPOK-tcp-25-e3dfdc -s abc.de/32 -m comment --comment "a/b c" -g '
                                        "EPOK-tcp-25-e3dfdc"),
    "a hook twice": filters("-I FORWARD -j EPOK-FORWARD", "-I FORWARD -j EPOK-FORWARD"),
    "a table twice": "*filter\n-I FORWARD -j EPOK-FORWARD\nCOMMIT\n" * 2,
    "a rule more in a chain that is there": nat(DNAT.replace("e3dfdc", "aaaaaa") + " 10.0.0.11:2025"),
    "a rule twice that all packets meet": filters(*[ACCEPT] * 2),
    "connections of the host to itself": nat("-A EPOK -d 127.0.0.1/32 -o lo -p tcp -g EPOK-tcp-25-e3dfdc"),
    "the same among others": nat("-A EPOK -d 0.0.0.0/1 -o lo -p tcp -g EPOK-tcp-25-e3dfdc",
                                 "-A EPOK -d 64.0.0.0/2 -o lo -p tcp -g EPOK-tcp-25-e3dfdc"),
    "an address of the link": nat(f"{DNAT} 169.254.169.254:80"),
    "an address of this network": nat(f"{DNAT} 0.1.2.3:80"),
    "an address of the loopback": nat(f"{DNAT} 127.0.0.1:10248"),
    "no address": nat(f"{DNAT} 0.0.0.0:25"),
    "an address that is none": nat(f"{DNAT} 999.0.0.1:25"),
    "a range of addresses": nat(f"{DNAT} 10.0.0.1-10.0.0.9:25"),
    "a multicast address": nat(f"{DNAT} 224.0.0.1:25"),
    "persistent targets": nat(f"{DNAT} 10.0.0.11:2025 --persistent"),
    "a quote in a comment": nat(COMMENTED.format('a" -j DROP -m comment --comment "b')),
    "a backslash in a comment": nat(COMMENTED.format("a\\")),
    "a line break in a comment": nat(COMMENTED.format("a\n-A INPUT -j DROP\n")),
    "CR in a comment": nat(COMMENTED.format("a\r")),
    "NUL in a comment": nat(COMMENTED.format("a\0b")),
    "a tab in a comment": nat(COMMENTED.format("a\tb")),
    "a letter that is not ASCII": nat(COMMENTED.format("\u00e9")),
    "a long comment": nat(COMMENTED.format("a" * 256)),
    "CR at the end": GOOD.replace("\n", "\r\n"),
    "NUL at the end": GOOD + "\0\n",
    "NUL in a chain": nat(":EPOK\0 - [0:0]"),
    "a chain that nft cannot read": nat(":EPOK-a;b - [0:0]"),
    "the metadata of a cloud": nat(f"{DNAT} 168.63.129.16:80"),
    "the same line twice": nat(*["-A EPOK -i eth0 -p tcp -g EPOK-tcp-25-e3dfdc"] * 2),
    "a rule for each connection 4,097 times": nat(*(f"-A EPOK -i e{n} -j RETURN" for n in range(4097))),
    "a form feed as a line break": nat(":EPOK - [0:0]\f-F INPUT"),
    "a line separator of Unicode": nat(":EPOK - [0:0]\x85-F INPUT"),
    "a blank at the end": nat("-X EPOK "),
    "IPv6 in IPv4": nat(f"{DNAT} [2001:db8::1]:25"),
    "64 MB": GOOD + "-X EPOK\n" * (8 << 20),
    "64 MB in one line": "*nat\n:EPOK - [0:0]\n-A EPOK -s " + ":" * (64 << 20),
    "colons without end": "*nat\n-A EPOK -d " + ":" * (1 << 20) + " -i eth0\nCOMMIT\n",
}  # fmt: skip
INPUTS6 = {
    "the loopback": nat(f"{DNAT} [::1]:25"),
    "connections of the host to itself": nat("-A EPOK -d ::1/128 -o lo -p tcp -g EPOK-tcp-25-e3dfdc"),
    "the loopback in long": nat(f"{DNAT} [0:0:0:0:0:0:0:1]:25"),
    "the loopback of IPv4": nat(f"{DNAT} [::ffff:127.0.0.1]:25"),
    "IPv4 in IPv6": nat(f"{DNAT} 10.0.0.11:25"),
    "a link's own address": nat(f"{DNAT} [fe80::1]:25"),
}


def refused(client: Client, command: str, data: bytes = b"") -> None:
    """It changes nothing, it is told to who asked and to syslog, each in one line, and it is quick."""
    gateway, before = client.gateway, everything(client.lab)
    logged = len(gateway.logged("epok-gate"))
    answer = client.ssh(*([command] if command else []), data=data)
    assert answer.status == REFUSED, answer
    assert answer.out == "" and re.fullmatch(r"epok-gate: refused: [ -~]{1,300}\n", answer.err), answer
    assert everything(client.lab) == before
    until(lambda: len(gateway.logged("epok-gate")) > logged, "the refusal is in the log")
    [line] = gateway.logged("epok-gate")[logged:]
    assert line.startswith("<36>") and answer.err.strip().removeprefix("epok-gate: ") in line, line  # auth.warning


@once
def test_the_inputs_below_are_refused_for_what_they_add(lab: Lab, client: Client) -> None:
    restore(lab, FIREWALL)
    before = everything(lab)
    for text in (GOOD, UNDO):
        assert client.ssh(SWAP, data=text.encode()) == Answer(0, "", ""), text
    assert everything(lab) == before
    assert client.ssh(SWAP, data=nat(COMMENTED.format("a" * 255), "-X EPOK").encode()).status != REFUSED


@once
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_is_not_one_of_epoks_is_refused(client: Client, command: str) -> None:
    refused(client, command)


@once
@pytest.mark.parametrize("text", INPUTS.values(), ids=INPUTS)
def test_an_input_that_epok_would_not_send_is_refused(lab: Lab, client: Client, text: str) -> None:
    restore(lab, FIREWALL)
    refused(client, SWAP, text.encode("utf-8"))


@once
@pytest.mark.parametrize("text", INPUTS6.values(), ids=INPUTS6)
def test_an_input_for_ipv6_that_epok_would_not_send_is_refused(client: Client, text: str) -> None:
    refused(client, SWAP6, text.encode())


# What each line of may be, and all of it may not.
TOO_MUCH = {
    "chains": "*nat\n" + "".join(f":EPOK-tcp-1-{n:06x} - [0:0]\n" for n in range(12_001)) + "COMMIT\n",
    "chains to delete": "*nat\n" + "".join(f"-X EPOK-tcp-1-{n:06x}\n" for n in range(12_001)) + "COMMIT\n",
    "rules in a chain": nat(*(f"{DNAT} 10.0.0.11:{n}" for n in range(1, 8202))),
    "a chain in parts": nat(f"{DNAT} 10.0.0.11:1", "-A EPOK -i eth0 -j RETURN", f"{DNAT} 10.0.0.11:2"),
    "a circle": nat(*("-A {} -s 10.0.0.1/32 -m comment --comment \"a/b c\" -g {}".format(*pair) for pair in (
        ("EPOK-tcp-25-e3dfdc", "EPOK-tcp-25-e3dfdc"),)), "-A EPOK -i eth0 -p tcp -g EPOK-tcp-25-e3dfdc"),
    "a chain with }": nat(":EPOK-a}# - [0:0]"),
    "epok's chain of the other table": nat(":EPOK-FORWARD - [0:0]"),
    **{f"metadata at {address}": nat(f"{DNAT} {address}:80") for address in gate.METADATA if "." in address},
}  # fmt: skip


@pytest.mark.parametrize("text", TOO_MUCH.values(), ids=TOO_MUCH)
def test_an_input_of_more_than_epok_needs_is_refused(text: str) -> None:
    with pytest.raises(gate.Refused):
        check(text, 4, gate.MARK, gate.Saved())


def long_way(chains: int) -> str:
    """A chain that leads to the next, and so on; each has 8,000 clients."""
    names = [f"EPOK-tcp-25-{number:06x}" for number in range(chains)]
    rules = "".join(
        f'-A {name} -s 10.0.{n >> 8}.{n & 255}/32 -m comment --comment "a/b c" -g {to}\n'
        for name, to in itertools.pairwise(names)
        for n in range(8000)
    )
    return f"*nat\n{''.join(f':{name} - [0:0]' + chr(10) for name in names)}{rules}COMMIT\n"


def test_what_piles_up_over_several_inputs_is_refused_too() -> None:
    saved, nat_chains = gate.Saved(), gate.Chains()
    gate.Input(long_way(10).encode(), 4, gate.MARK, lambda table: saved, nat_chains)
    assert not gate.grown((0, 0, 0, 0), nat_chains.sizes())
    before = nat_chains.sizes()
    entry = "*nat\n:EPOK - [0:0]\n-A EPOK -i eth0 -p tcp -g EPOK-tcp-25-000000\nCOMMIT\n"
    gate.Input(entry.encode(), 4, gate.MARK, lambda table: saved, nat_chains)
    assert "one connection meets" in gate.grown(before, nat_chains.sizes())
    for more in ((200_001, 0, 0, 0), (10, 450_001, 0, 0), (10, 10, 60_000_001, 0)):
        assert gate.grown((10, 10, 10, 0), more)
    assert not gate.grown((300_000, 800_000, 0, 90_000), (299_999, 800_000, 0, 90_000))  # it may become less


def tables_of(folder: Path, made: dict[str, Any]) -> epok.Tables:
    file = folder / "cluster.json"
    file.write_text(json.dumps(made))
    options = epok.parse_options(["-i", "eth0,lo", "--snapshot", str(file), "local"], {})
    tables: epok.Tables = epok.Planner(options, epok.Deadline(600)).wanted(epok.Facts({}, {}))[4]
    return tables


class Host:
    """What the gate knows of one, while it lets inputs through."""

    def __init__(self, nat_table: epok.Table) -> None:
        self.saved, self.nat = gate.Saved(), gate.Chains()
        for chain, rules in nat_table.chains.items():
            self.nat[chain] = [0, {}, 0]
            for rule in rules:
                self.nat.add(chain, f"{chain} {rule}")

    def swap(self, wanted: epok.Tables, found: epok.Tables) -> None:
        for text in epok.restore_inputs(wanted, found, 1677722):
            before = self.nat.sizes()
            gate.Input(text.encode(), 4, gate.MARK, lambda table: self.saved, self.nat)
            assert not gate.grown(before, self.nat.sizes())


def test_ten_thousand_forwards_on_sixteen_nodes_get_through(tmp_path: Path, figure: Any) -> None:
    made = cluster(10_000, nodes=16)
    all_nodes = tables_of(tmp_path, made)
    made["items"][15]["metadata"]["annotations"]["epok.getbetter.ro/exclude"] = ""
    one_less = tables_of(tmp_path, made)
    host = Host(epok.Table())
    host.swap(all_nodes, epok.NOTHING)
    host.swap(one_less, all_nodes)
    assert host.nat.sizes()[1] == sum(map(len, one_less["nat"].chains.values()))
    figure(f"10,000 forwards on 16 nodes: {', '.join(map(str, host.nat.sizes()))} chains, rules, bytes, rules on a way")
    host.swap(epok.NOTHING, one_less)
    assert host.nat.sizes() == (0, 0, 0, 0)


@pytest.mark.parametrize("used", [True, False], ids=["which are used", "which nothing leads to"])
def test_epok_takes_away_more_rules_than_it_ever_makes(tmp_path: Path, used: bool) -> None:
    targets = [f"-p tcp -j DNAT --to-destination 10.0.0.11:{number}" for number in range(1, 8001)]
    names = [f"EPOK-tcp-{number}-aaaaaa" for number in range(50)]
    jumps = [f"-p tcp -m tcp --dport {number} -g {name}" for number, name in enumerate(names)]
    chains = {**dict.fromkeys(names, targets), "EPOK-tcp-0-49-bbbbbb": jumps}
    chains["EPOK"] = ["-i eth0 -p tcp -g EPOK-tcp-0-49-bbbbbb"] if used else []
    found = {"filter": epok.Table(), "nat": epok.Table(chains)}
    made = cluster(2000, nodes=5)
    wanted = tables_of(tmp_path, made)
    host = Host(found["nat"])
    host.swap(wanted, found)
    assert host.nat.sizes()[1] == sum(map(len, wanted["nat"].chains.values()))


@once
def test_the_key_opens_no_tunnel_no_terminal_and_no_subsystem(lab: Lab, client: Client) -> None:
    assert client.ssh("-W", f"{HOST}:22").status == 255
    logged = len(client.gateway.logged("epok-gate"))
    assert client.ssh("-s", "sftp").status == REFUSED
    until(lambda: len(client.gateway.logged("epok-gate")) > logged, "the refusal is in the log")
    answer = client.ssh("-tt", "tty", level="INFO")
    assert answer.status in (REFUSED, 255) and "PTY allocation request failed" in answer.err, answer
    read = "iptables-save -t nat"
    for remote in (["-R", "4999:127.0.0.1:22"], ["-oExitOnForwardFailure=yes", "-R", "/tmp/socket:127.0.0.1:22"]):
        answer = client.ssh("-oExitOnForwardFailure=yes", *remote, read)
        assert answer.status == 255 and "forwarding failed" in answer.err, answer
    answer = client.ssh("-oSetEnv=LD_PRELOAD=/tmp/mine.so", "-oSetEnv=PATH=/tmp", "-A", read)
    assert answer.status == 0 and "*nat" in answer.out, answer


@once
def test_what_gets_through_by_chance_changes_nothing_that_is_not_epoks(lab: Lab, client: Client) -> None:
    """Inputs of epok's with a byte, a word or a line changed at random: those that get through are let loose."""
    restore(lab, FIREWALL)
    dice = random.Random(25)
    words = [*(GOOD + UNDO).split(), "-j", "ACCEPT", "DROP", "INPUT", "-F", "-P", "!", "-M", "/tmp/mine", "lo"]
    foreign = not_epoks(lab)
    through = 0
    for _ in range(20_000):
        parts = re.split(r"(\s+)", dice.choice((GOOD, UNDO)))
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(len(parts))
            parts[place] = dice.choice(words) if dice.random() < 0.7 else spoilt(parts[place], dice)
        text = "".join(parts)
        try:
            check(text, 4, gate.MARK, gate.Saved())
        except gate.Refused:
            continue
        through += 1
        lab.host.run(["iptables-restore", "-n"], text, check=False)
        assert not_epoks(lab) == foreign, text
    assert through > 50


def spoilt(text: str, dice: random.Random) -> str:
    place = dice.randrange(len(text) + 1)
    return text[:place] + chr(dice.randrange(256)) + text[place + dice.randint(0, 1) :]


def not_epoks(lab: Lab) -> list[str]:
    """The rules, chains and policies that are not epok's; of epok's hooks only that they are where they belong."""
    hooks = {f"-A {hook}" for hooks in gate.HOOKS.values() for hook in hooks}
    lines = everything(lab).split("table ")[0].splitlines()
    return [line for line in lines if line not in hooks and not re.match(r"(-A |:)EPOK", line)]


@once
def test_another_mark_is_let_through_when_setup_host_was_told(lab: Lab, client: Client) -> None:
    done = client.epok("--mark", "0x3")
    assert done.status == 1 and "--mark" in done.err and "setup-host" in done.err, done.err
    assert "EPOK" not in lab.saved().replace("EPOK-FORWARD", "")
    client.gateway.setup_host("--address", HOST, "--mark", "0x3")
    try:
        assert client.epok("--mark", "0x3").status == 0
        assert client.epok("--clean").status == 0
        refused(client, SWAP, GOOD.encode())
    finally:
        client.gateway.setup_host("--address", HOST)


# ------------------------------------------------ who else there is on the host


@contextlib.contextmanager
def swapping(lab: Lab) -> Iterator[None]:
    """Somebody else swaps, for as long as this lasts."""
    with (lab.host.root / "run/epok-gate/swap").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@once
def test_nobody_else_on_the_host_can_hold_a_swap_up(lab: Lab, client: Client) -> None:
    assert client.epok().status == 0
    for path in ("/usr/local/sbin/epok-gate", "/run/epok-gate/swap", "/run/epok-gate/gate0"):
        done = lab.host.run(["setpriv", "--reuid=65534", "--clear-groups", "flock", path, "true"], check=False)
        assert done.returncode and "Permission denied" in done.stderr, done


@once
def test_a_swap_that_must_wait_is_tried_again_and_given_up_in_time(lab: Lab, client: Client) -> None:
    before = everything(lab)
    with swapping(lab):
        answer = client.ssh(SWAP, data=GOOD.encode())
        assert answer.status == 75 and "another swap is under way: Resource temporarily" in answer.err, answer
        done = client.epok("--timeout", str(stretched(12)))
    assert done.status == 1 and "another swap is under way" in done.err and "setup-host" not in done.err, done.err
    assert everything(lab) == before
    assert client.epok().status == 0


SLOW = """#!/bin/sh
sleep 10000 &
sleep 10000
"""


@contextlib.contextmanager
def slow_restore(lab: Lab) -> Iterator[None]:
    tool = lab.host.root / "run/alternatives/iptables-restore"
    kept = tool.readlink()
    tool.unlink()
    tool.write_text(SLOW)
    tool.chmod(0o755)
    yield
    tool.unlink()
    tool.symlink_to(kept)


def at_work(lab: Lab) -> list[str]:
    """The gates, and what they have started."""
    return [each.words for each in lab.host.processes() if re.search("/epok-gate|sleep 10000", each.words)]


def renewed(client: Client, swap: "subprocess.Popen[bytes]") -> None:
    old = client.key.read_text()
    secret = secret_data(client.gateway.setup_host("--address", HOST, "--renew").stdout)
    assert client.ssh("ip -br addr").status == 255  # with the old one
    client.key.write_text(secret["id_rsa"])
    assert old != secret["id_rsa"] and client.ssh("ip -br addr").status == 0


def removed(client: Client, swap: "subprocess.Popen[bytes]") -> None:
    kept = {path: (client.gateway.root / path).read_bytes() for path in KEYS}
    client.gateway.setup_host("--remove", "--force")
    assert at_work(client.lab) == []
    put_back(client.gateway, kept)


ENDS: dict[str, Callable[[Client, "subprocess.Popen[bytes]"], None]] = {
    "its client": lambda client, swap: swap.kill(),
    "the key": renewed,
    "setup-host --remove": removed,
}


@once
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_swap_ends_with(lab: Lab, client: Client, end: Callable[[Client, Any], None]) -> None:
    """And all that it has started."""
    before = everything(lab)
    with slow_restore(lab):
        argv = client.argv(SWAP)
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as swap:
            assert swap.stdin
            swap.stdin.write(GOOD.encode())
            swap.stdin.close()
            until(lambda: sum("sleep" in words for words in at_work(lab)) == 2, "the swap is under way")
            end(client, swap)
            until(lambda: at_work(lab) == [], "nothing of it is left")
            swap.kill()
    assert everything(lab) == before
    assert client.epok().status == 0


@once
def test_a_swap_whose_client_went_while_it_waited_is_not_done(lab: Lab, client: Client) -> None:
    assert client.epok().status == 0
    before = everything(lab)
    with swapping(lab), subprocess.Popen(client.argv(SWAP), stdin=subprocess.PIPE) as swap:
        assert swap.stdin
        swap.stdin.write(UNDO.encode())
        swap.stdin.close()
        until(lambda: any("python3" in words for words in at_work(lab)), "a gate waits")
        swap.kill()
        until(lambda: at_work(lab) == [], "the gate has given up")
    assert everything(lab) == before


@once
def test_what_was_let_through_is_logged_and_kept_for_root(lab: Lab, client: Client) -> None:
    told = len(client.gateway.logged("epok-gate"))
    assert client.ssh(SWAP, data=GOOD.encode()).status == 0
    assert client.ssh(SWAP, data=UNDO.encode()).status == 0
    until(lambda: len(client.gateway.logged("epok-gate")) > told + 1, "both are in the log")
    came, went = client.gateway.logged("epok-gate")[told:]
    assert came.endswith("; tcp/25 to 10.0.0.11:2025") and went.endswith("; tcp/25 no more"), (came, went)
    found = re.search(r": \d+ bytes, kept as /(\S+\.gz);", came)
    assert found, came
    copy = client.gateway.root / found[1]
    assert gzip.decompress(copy.read_bytes()).decode() == GOOD
    assert (copy.stat().st_mode & 0o777, copy.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_copies_of_inputs_fill_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "COPIES", str(tmp_path))
    monkeypatch.setattr(gate, "COPIES_COUNT", 5)
    for number in range(9):
        gate.kept("iptables", str(number).encode())
        gate.kept("iptables", b"the same again")
    assert len(list(tmp_path.iterdir())) == 5
    monkeypatch.setattr(gate, "COPIES_BYTES", 100)
    gate.kept("iptables", b"one more")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100
    monkeypatch.setattr(gate, "COPIES", "/proc/none")
    assert gate.kept("iptables", b"").startswith("not kept, since ")


@once
def test_flows_are_listed_without_their_clients_and_others_not_at_all(lab: Lab, client: Client) -> None:
    need("conntrack", "apt-get install conntrack")
    assert client.epok(services=(DNS, MAIL)).status == 0
    for ask in ((53, "udp", HOST), (53, "udp", HOST6), (25, "tcp", HOST)):
        lab.ask(ask[0], ask[1], to=ask[2])
    lab.ask(30053, "udp", to="10.0.0.12")  # which only passes through
    for words, to, reply in (
        ("-p udp", HOST, r"10\.0\.0\.1\d sport=30053"),
        ("-p udp -f ipv6", HOST6, r"2001:db8:2::1\d sport=30053"),
        ("-p tcp --orig-port-dst 25", HOST, r"10\.0\.0\.1\d sport=2025"),
    ):
        answer = client.ssh(f"sudo -n conntrack -L {words}")
        assert answer.status == 0, answer
        shown = rf"(udp|tcp [A-Z_]+) dst={to} dport=\d+ (\[UNREPLIED\] )?(\[ASSURED\] )?src={reply} mark=\d+"
        lines = [line for line in answer.out.splitlines() if f" dst={to} " in line]  # -p udp lists both families
        assert len(lines) == 1 and re.fullmatch(shown, lines[0]) and "dst=10." not in answer.out, answer
    assert client.ssh("sudo -n conntrack -L").status == REFUSED


@once
def test_ways_are_told_and_what_the_host_takes_for_its_own_is_no_node(lab: Lab, client: Client) -> None:
    for words, told in (
        ("ip route get 10.0.0.11", "dev eth1"),
        ("ip route get 10.0.0.11 from 192.0.2.10 iif eth0", "iif eth0"),
        ("ip -6 route get 2001:db8:2::11", "dev eth1"),
        ("ip route show table local", HOST),
        ("ip rule", "lookup local"),
        ("sudo -n iptables-save", "*nat"),
        ("sudo -n ip6tables-save", "*nat"),
    ):
        answer = client.ssh(words)
        assert answer.status == 0 and told in answer.out, (words, answer)
    lab.host.wire("route add local 198.51.100.128/25 dev lo")
    refused(client, "nc -nvz -w 2 198.51.100.200 22")
    lab.host.wire("route del local 198.51.100.128/25 dev lo")


@once
def test_epok_mends_what_a_thief_put_in_its_way(lab: Lab, client: Client) -> None:
    """As much as one input takes."""
    chains = [f"EPOK-tcp-1-{number:06x}" for number in range(8000)]
    text = "".join(f":{chain} - [0:0]\n" for chain in (*chains, "EPOK"))
    text += "".join(f"-A {chain} -p tcp -j DNAT --to-destination 10.0.0.11:2025\n" for chain in chains)
    text += "".join(f"-A EPOK -i eth{n} -p tcp -g {chain}\n" for n, chain in enumerate(chains[:4096]))
    assert client.ssh(SWAP, data=f"*nat\n{text}COMMIT\n".encode()) == Answer(0, "", "")
    done = client.epok()
    assert done.status == 0 and lab.ask(25).port == 2025, done.err
    assert lab.saved().count(":EPOK") < 10


# ------------------------------------------------ setup-host


@pytest.fixture
def bare(gateway: Gateway) -> Iterator[Gateway]:
    """The host without what setup-host did for the other tests, which it does again after."""
    kept = {path: (gateway.root / path).read_bytes() for path in KEYS}
    gateway.setup_host("--remove", "--force")
    yield gateway
    gateway.setup_host("--remove", "--force", check=False)
    put_back(gateway, kept)


def put_back(gateway: Gateway, keys: dict[str, bytes]) -> None:
    (gateway.root / KEYS[0]).parent.mkdir()
    for path, text in keys.items():
        (gateway.root / path).write_bytes(text)
        (gateway.root / path).chmod(0o600)
    gateway.setup_host("--address", HOST)


KEYS = ("etc/epok/id_ed25519", "etc/epok/id_ed25519.pub")
# Of useradd and userdel, what they were before; a lock file; subordinate ids, which are rewritten without a change.
TRACES = re.compile(r"etc/upper/(\.pwd\.lock|(passwd|shadow|group|gshadow|subuid|subgid)-?)$")


def says(done: Done) -> list[str]:
    lines = done.stderr.splitlines()
    assert all(line.startswith("setup-host: ") for line in lines), lines
    return [line.removeprefix("setup-host: ") for line in lines]


@once
def test_setup_host_says_what_it_does_and_a_second_run_has_nothing_to_do(client: Client, bare: Gateway) -> None:
    first = bare.setup_host("--address", HOST)
    assert says(first) == [
        "made a key, /etc/epok/id_ed25519",
        "made the user epok",
        "wrote /usr/local/sbin/epok-gate",
        "wrote /etc/sudoers.d/epok",
        "wrote /var/lib/epok/.ssh/authorized_keys",
        f"tried it: epok@{HOST} can log in and read the rules",
    ]
    state = bare.state()
    second = bare.setup_host("--address", HOST)
    assert says(second) == [f"tried it: epok@{HOST} can log in and read the rules", "nothing to do"]
    assert (second.stdout, bare.state()) == (first.stdout, state)


@once
def test_setup_host_gives_nobody_but_root_what_it_makes(client: Client) -> None:
    owners = client.gateway.space.run(
        ["stat", "-c", "%n %U %a", "/usr/local/sbin/epok-gate", "/etc/sudoers.d/epok", "/etc/epok/id_ed25519",
         "/var/lib/epok", "/var/lib/epok/.ssh", "/var/lib/epok/.ssh/authorized_keys"]
    ).stdout.splitlines()  # fmt: skip
    assert [line.split()[1:] for line in owners] == [
        ["root", mode] for mode in ("700", "440", "600", "755", "755", "644")
    ]
    shadow = client.gateway.space.run(["getent", "shadow", "epok"]).stdout
    assert shadow.split(":")[1] == "*"


@once
def test_remove_takes_back_all_that_setup_host_did(client: Client, bare: Gateway) -> None:
    before = {path: content for path, content in bare.state().items() if not TRACES.search(path)}
    accounts = [bare.space.run(["getent", what]).stdout for what in ("passwd", "group")]
    bare.setup_host("--address", HOST)
    done = bare.setup_host("--remove")
    assert sorted({line.split()[0] for line in says(done)} - {"left"}) == ["removed"] and len(says(done)) >= 6
    assert {path: content for path, content in bare.state().items() if not TRACES.search(path)} == before
    assert accounts == [bare.space.run(["getent", what]).stdout for what in ("passwd", "group")]
    assert says(bare.setup_host("--remove")) == ["nothing to do"]


def removal_refused(bare: Gateway, script: str = "") -> str:
    """The one line that --remove says; it does nothing."""
    before = bare.state()
    done = bare.space.run([script or str(CRON / "setup-host"), "--remove"], check=False)
    [line] = says(done)
    assert done.returncode == 1 and bare.state() == before, line
    return line


def obey(bare: Gateway, line: str) -> None:
    """The command at the end of the line, by a shell of root's, which has more than one word for a blank."""
    command = line.partition("this takes them away, here: ")[2]
    assert bare.space.run(["sh", "-c", command], check=False).returncode == 0, command


@pytest.fixture
def alone(bare: Gateway) -> str:
    """setup-host on a host that has no more of the clone."""
    bare.space.run(["install", "-D", str(CRON / "setup-host"), "/opt/no clone/cron/setup-host"])
    return "/opt/no clone/cron/setup-host"


OTHER = {"nft": "legacy", "legacy": "nft"}


def others(lab: Lab) -> str:
    """The rules of the backend that plain iptables is not."""
    saves = (f"{tool}tables-{OTHER[lab.backend]}-save" for tool in ("ip", "ip6"))
    return "".join(lab.host.run([save]).stdout for save in saves)


def test_remove_refuses_while_epoks_rules_are_there_and_names_what_takes_them_away(
    lab: Lab, client: Client, bare: Gateway, alone: str, tmp_path: Path
) -> None:
    somebody = operator(lab, bare, (), tmp_path)
    for script in ("", alone):
        assert somebody.epok(services=(MAIL, WEB)).status == 0
        restore(lab, FIREWALL)
        line = removal_refused(bare, script)
        assert "in iptables, ip6tables: " in line and '"Uninstall" in README.md' in line
        with_epok = not script and (EPOK.parent / ".venv" / "bin" / "python").exists()
        assert ("epok.py' --clean local" in line) == with_epok, line
        obey(bare, line)
        left = re.sub('"-j EPOK"', "", lab.saved() + lab.saved(6))
        assert "EPOK" not in left and left.count("MINE") == FIREWALL.count("MINE"), left
        lab.flush()
    done = bare.setup_host("--remove")
    assert sorted({line.split()[0] for line in says(done)} - {"left"}) == ["removed"] and len(says(done)) >= 6


@pytest.mark.parametrize("version", [4, 6])
def test_remove_refuses_for_rules_of_the_other_backend_too(
    lab: Lab, client: Client, bare: Gateway, version: int
) -> None:
    """That was the plain one when epok came."""
    tool = f"{'ip6' if version == 6 else 'ip'}tables-{OTHER[lab.backend]}"
    bare.setup_host("--address", HOST)
    lab.host.run([f"{tool}-restore", "-n"], GOOD.replace("10.0.0.11:2025", ":2025"))
    line = removal_refused(bare)
    assert f"in {tool}: " in line
    obey(bare, line)
    assert "EPOK" not in others(lab)
    assert bare.setup_host("--remove").returncode == 0


def test_remove_goes_on_by_force_and_leaves_the_rules(lab: Lab, client: Client, bare: Gateway, tmp_path: Path) -> None:
    assert operator(lab, bare, (), tmp_path).epok().status == 0
    before = everything(lab)
    done = bare.setup_host("--remove", "--force")
    assert sorted({line.split()[0] for line in says(done)} - {"left"}) == ["removed"] and len(says(done)) >= 6
    assert everything(lab) == before


@once
def test_remove_does_nothing_where_it_cannot_see_whether_rules_are_left(
    lab: Lab, client: Client, bare: Gateway
) -> None:
    bare.setup_host("--address", HOST)
    restore(lab, "*nat\n:MINE - [0:0]\n-A PREROUTING -j MINE\nCOMMIT\n")
    lab.host.run(["nft", "add rule ip nat PREROUTING meta mark set numgen inc mod 2"])
    line = removal_refused(bare)
    assert "is incompatible" in line and "move native rules to a table of their own" in line, line
    lab.host.run(["nft", "flush chain ip nat PREROUTING"])
    assert bare.setup_host("--remove").returncode == 0


@once
def test_remove_does_nothing_where_iptables_save_fails(lab: Lab, client: Client, bare: Gateway) -> None:
    bare.setup_host("--address", HOST)
    tool = bare.root / "run/alternatives/ip6tables-save"
    kept = tool.readlink()
    tool.unlink()
    tool.write_text("#!/bin/sh\necho no way >&2\nexit 1\n")
    tool.chmod(0o755)
    line = removal_refused(bare)
    tool.unlink()
    tool.symlink_to(kept)
    assert "ip6tables-save does not tell" in line and "(no way)" in line and "--remove --force" in line, line


@once
def test_setup_host_leaves_a_user_and_a_sudoers_file_alone_that_are_not_its_own(client: Client, bare: Gateway) -> None:
    """They are there when the older epok's instructions were followed."""
    old = bare.root / "etc/sudoers.d/epok"
    old.write_text("%epok ALL=(ALL) NOPASSWD: /usr/sbin/iptables, /usr/sbin/iptables-save\n")
    bare.space.run(["useradd", "--home-dir", "/home/epok", "--no-create-home", "epok"])
    for args, lack in (((), "userdel --remove epok"), (("--remove",), "userdel --remove epok")):
        done = bare.setup_host(*args, check=False)
        assert done.returncode == 1 and lack in says(done)[0] and not done.stdout
    bare.space.run(["userdel", "epok"])
    home = bare.root / "var/lib/epok"
    home.mkdir()
    done = bare.setup_host("--address", HOST, check=False)
    assert done.returncode == 1 and "/var/lib/epok that is not of this script" in says(done)[0]
    home.rmdir()
    done = bare.setup_host("--address", HOST, check=False)
    assert done.returncode == 1 and "rm /etc/sudoers.d/epok" in says(done)[0]
    assert old.read_text().startswith("%epok")
    old.unlink()


@once
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--nonsense",), "--nonsense; --help lists"),
        (("--address",), "--address needs a value"),
        (("--address", "192.0.2.1;id"), "accepted are an address and a host name"),
        (("--address", '192.0.2.1"'), "accepted are an address and a host name"),
        (("--port", "ssh"), "accepted is a port"),
        *(
            (("--mark", mark), "accepted is what epok accepts")
            for mark in ("0x3 ALL", "x3", "0", "0x1", "0x7", "010", "0x300000000")
        ),
        (("--mark", "0x3", "--sudoers"), "--mark is for the gate"),
        (("--force",), "--force is for --remove"),
        (("--renew", "--remove"), "--renew is not for --remove"),
        (("--renew", "--public-key", "/run/two.pub"), "--renew makes a key"),
        (("--port", "99999"), "accepted is a port"),
        (("--public-key", "/run/two.pub"), "/run/two.pub: give one key, on one line"),
        (("--public-key", "/nowhere"), "/nowhere: there is no such file"),
        (("--public-key", "/etc/passwd"), "/etc/passwd: give one key, on one line"),
        (("--public-key", "/etc/hostname"), "/etc/hostname: this is no public key"),
    ],
)
def test_setup_host_says_in_one_line_what_is_wrong_and_does_nothing(
    client: Client, bare: Gateway, args: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    two = "\n".join(make_key(tmp_path / name, "ed25519").with_suffix(".pub").read_text().strip() for name in "ab")
    (bare.root / "run" / "two.pub").write_text(two)
    before = bare.state()
    done = bare.setup_host(*args, check=False)
    assert done.returncode == 1 and words in says(done)[-1] and not done.stdout
    assert bare.state() == before


@once
def test_setup_host_takes_a_key_of_ones_own(client: Client, bare: Gateway, tmp_path: Path) -> None:
    key = make_key(tmp_path / "own", "ed25519")
    # whatever stands behind the key in the file must not become a line of its own
    written = key.with_suffix(".pub").read_text().strip() + "\\n" + make_key(tmp_path / "b", "ed25519").read_text()[:20]
    (bare.root / "run/own.pub").write_text(written)
    done = bare.setup_host("--address", HOST, "--public-key", "/run/own.pub")
    assert "id_rsa=$EPOK_SSH_KEY" in done.stdout and not (bare.root / KEYS[0]).exists()
    [line] = (bare.root / "var/lib/epok/.ssh/authorized_keys").read_text().splitlines()
    assert line.startswith('restrict,command="sudo -n /usr/local/sbin/epok-gate" ssh-ed25519 ')
    secret = {"id_rsa": key.read_text(), "known_hosts": done.stdout, "ssh_host": f"epok@{HOST}"}
    assert Client(client.lab, bare, secret, tmp_path).epok("--dry-run").status == 3


@once
@pytest.mark.parametrize(
    ("seen", "address", "name"),
    [
        (f"192.0.2.10 4022 {HOST} 22", HOST, HOST),
        (f"192.0.2.10 4022 {HOST} 2222", HOST, f"[{HOST}]:2222"),
        (f"2001:db8:1::10 4022 {HOST6} 22", f"[{HOST6}]", HOST6),
    ],
)
def test_epok_is_to_log_in_where_the_administrator_did(client: Client, seen: str, address: str, name: str) -> None:
    secret = secret_data(client.gateway.setup_host(env={"SSH_CONNECTION": seen}).stdout)
    assert secret["ssh_host"] == f"epok@{address}" and secret["ssh_port"] == seen.split()[3]
    assert {line.split()[0] for line in secret["known_hosts"].splitlines()} == {name}


# ------------------------------------------------ what a stolen key can do


THEFTS = {
    "redirect ports": (SWAP, GOOD),
    "open a shell": ("echo $0", ""),
    "read files that everybody may": ("cat /etc/passwd", ""),
    "empty the firewall": (SWAP, "*filter\n-F\nCOMMIT\n"),
    "shut everybody out": (SWAP, "*filter\n:INPUT DROP [0:0]\nCOMMIT\n"),
    "redirect packets that are only passing through": (
        SWAP, "*nat\n-A PREROUTING -p tcp --dport 443 -j DNAT --to 10.0.0.11\nCOMMIT\n"
    ),
    "write a file as root": ("sudo -n iptables-save -f /etc/stolen", ""),
    "run a program as root": ("sudo -n id", ""),
    "read a file of root's": ("sudo -n cat /etc/shadow", ""),
}  # fmt: skip


@once
def test_a_thief_can_redirect_ports_and_only_under_plain_sudoers_do_more(client: Client, bare: Gateway) -> None:
    can = {way: thefts(client, bare, args) for way, args in (("gate", ()), ("sudoers", ("--sudoers",)))}
    assert can["gate"] == ["redirect ports"]
    assert can["sudoers"] == [name for name in THEFTS if "root" not in name]


def thefts(client: Client, bare: Gateway, args: tuple[str, ...]) -> list[str]:
    """Those of THEFTS that succeed."""
    folder = client.folder / (args[0] if args else "gate")
    folder.mkdir(exist_ok=True)
    thief = Client(client.lab, bare, secret_data(bare.setup_host("--address", HOST, *args).stdout), folder)
    done = []
    for name, (command, text) in THEFTS.items():
        client.lab.flush()
        restore(client.lab, FIREWALL)
        before = everything(client.lab)
        answer = thief.ssh(command, data=text.encode())
        if everything(client.lab) != before if text else answer.status == 0:
            done.append(name)
        assert not (bare.root / "etc/stolen").exists()
    client.lab.flush()
    return done


# ------------------------------------------------ what --status and --explain may see


WAYS = pytest.mark.parametrize("args", [(), ("--sudoers",)], ids=["gate", "sudoers"])
DROPPING = """
add table inet mine
add chain inet mine forward { type filter hook forward priority 10; }
add chain inet mine wall-1.b
add rule inet mine forward jump wall-1.b
add rule inet mine wall-1.b tcp dport 2025 drop
"""


def operator(lab: Lab, bare: Gateway, args: tuple[str, ...], folder: Path) -> Client:
    return Client(lab, bare, secret_data(bare.setup_host("--address", HOST, *args).stdout), folder)


def looked(somebody: Client, *args: str) -> dict[str, Any]:
    """What --status or --explain says, in JSON."""
    done = somebody.epok(*args, "-o", "json")
    assert done.status == 0, done.err
    [host] = json.loads(done.out)["hosts"]
    found: dict[str, Any] = host
    return found


def problems(document: dict[str, Any]) -> list[str]:
    return [check["problem"] for check in document["checks"] if not check["ok"]]


@WAYS
def test_status_and_explain_see_all_that_matters(
    lab: Lab, client: Client, bare: Gateway, args: tuple[str, ...], tmp_path: Path
) -> None:
    somebody = operator(lab, bare, args, tmp_path)
    assert somebody.epok(services=(WEB,)).status == 0
    lab.ask(80)
    told = len(bare.logged("epok-gate"))
    status, explained = looked(somebody, "--status"), looked(somebody, "--explain", "default/web")
    assert problems(status) == [] and problems(explained) == [], (problems(status), problems(explained))
    assert [forward["connections"] for forward in status["forwards"]] == [1, 0]
    answering = {check["check"].split()[0] for check in explained["checks"] if "port 30080 answers" in check["check"]}
    assert answering == {f"{network}{number}" for network in ("10.0.0.", "2001:db8:2::") for number in (11, 12, 13)}
    assert bare.logged("epok-gate")[told:] == []


@WAYS
def test_what_drops_connections_beside_epoks_rules_is_seen(
    lab: Lab, client: Client, bare: Gateway, args: tuple[str, ...], tmp_path: Path
) -> None:
    """A table of nft's own, and the rules of the other iptables."""
    somebody = operator(lab, bare, args, tmp_path)
    assert somebody.epok().status == 0
    lab.host.run(["nft", "-f", "-"], DROPPING)
    try:
        [problem] = problems(looked(somebody, "--status"))
        assert "drops tcp/25 from eth0 by nft table inet mine, chain wall-1.b, handle" in problem, problem
        for name in ("a/b", "_", ".c"):  # the last and the first are not asked for
            lab.host.run(["nft", f"add chain inet mine {name}"])
            lab.host.run(["nft", f"insert rule inet mine forward jump {name}"])
        [first, second, _] = sorted(problems(looked(somebody, "--status")), key=len)
        assert "does not tell all that matters: nft" in first and "does not tell all that matters: nft" in second
    finally:
        lab.host.run(["nft", "delete table inet mine"])
    other = "iptables-legacy" if lab.backend == "nft" else "iptables-nft"
    lab.host.run([other, "-A", "FORWARD", "-p", "tcp", "-m", "tcp", "--dport", "2025", "-j", "DROP"])
    try:
        [problem] = problems(looked(somebody, "--status"))
        assert "drops tcp/25 from eth0 by -A FORWARD -p tcp -m tcp --dport 2025 -j DROP" in problem, problem
        assert f"{other} -I FORWARD" in problem
    finally:
        lab.host.run([other, "-F", "FORWARD"])


# What the user epok says in a shell, where only cron/sudoers stands in the way.
ATTACKS = {
    "a command more": "nft -j list chain ip nat 'EPOK; flush ruleset'",
    "a command more without a blank": "nft -j list chain ip nat 'EPOK;flush'",
    "a command more in all": "nft -j 'list chain ip nat EPOK; flush ruleset'",
    "a command more after all chains": "nft -j list 'chains; flush ruleset'",
    "a line more": "nft -j list chain ip nat 'EPOK\nflush ruleset'",
    "a line break at the end": "nft -j list chain ip nat 'EPOK\n'",
    "a tab": "nft -j list chain ip nat 'EPOK\tflush'",
    "an open brace": "nft -j list chain ip nat '{'",
    "a body": "nft -j list chain ip nat 'EPOK{policy_drop}'",
    "quotes": "nft -j list chain ip nat '\"EPOK\"'",
    "an apostrophe": 'nft -j list chain ip nat "EPOK\'"',
    "a comment": "nft -j list chain ip nat 'EPOK#'",
    "a variable": "nft -j list chain ip nat '$EPOK'",
    "a path": "nft -j list chain ip /etc/shadow EPOK",
    "a path in a name": "nft -j list chain ip nat a/b",
    "an option as a name": "nft -j list chain ip -f /etc/shadow",
    "a third name": "nft -j list chain ip nat EPOK handle",
    "two names in one": "nft -j list chain ip 'nat EPOK x'",
    "a name that is not ASCII": "nft -j list chain ip nat \u00e9",
    "another family": "nft -j list chain arp filter INPUT",
    "another verb": "nft -j flush chain ip nat EPOK",
    "all of nft": "nft -j list ruleset",
    "a file": "nft -f /etc/shadow",
    "a file at the end": "nft -j list chains -f /etc/shadow",
    "an option first": "nft -c -j list chains",
    "legacy's rules to a file": "iptables-legacy-save -f /etc/stolen",
    "nft's rules to a file": "iptables-nft-save -f /etc/stolen",
    "a program to load modules": "ip6tables-legacy-save -M /tmp/mine",
    "counts to a file": "iptables-save -c -t nat -f /etc/stolen",
    "counts to a file, in one word": "iptables-save -c -t 'nat -f /etc/stolen'",
    "counts of another table": "iptables-save -c -t filter",
    "ss": "ss -K",
    "ss as root": "ss -Hltun",
    "ip": "ip route add default via 192.0.2.10",
    "ip as root": "ip route",
    "nc": "nc -l 4444",
    "nc as root": "nc -nvz -w 2 10.0.0.11 2025",
}


@once
def test_sudo_lets_nothing_through_that_only_resembles_epoks_words(
    lab: Lab, client: Client, bare: Gateway, tmp_path: Path
) -> None:
    thief = operator(lab, bare, ("--sudoers",), tmp_path)
    assert thief.epok().status == 0
    before = everything(lab)
    assert thief.ssh("sudo -n nft -j list chain ip nat EPOK").status == 0
    for name, command in ATTACKS.items():
        answer = thief.ssh(f"sudo -n {command}")
        assert answer.status == 1 and re.match("sudo: a password is required|.*not allowed", answer.err), (name, answer)
    # one word with blanks in it is the same to sudo, and not to the tools
    for command in ("nft '-j list chains'", "nft -j 'list chain' ip nat EPOK", "iptables-save '-c -t nat'"):
        thief.ssh(f"sudo -n {command}")
    assert everything(lab) == before and not (bare.root / "etc/stolen").exists()


# ------------------------------------------------ hosts that know less


LATER_IN_THE_GATE = {
    'SAVE = "ip6?tables(?:-save(?: -t (?:nat|filter)| -c -t nat)?|-(?:legacy|nft)-save)"':
        'SAVE = "ip6?tables-save -t (?:nat|filter)"',
    '    f"ip(?: -6)? (?:netconf|rule|route(?: show table local| get {ANY}(?: from {ANY} iif {DEVICE})?)?)",\n': "",
    '    "ss -Hltun",\n    "printenv SSH_CONNECTION",\n    "nft -j list chains",\n': "",
    '    f"nft -j list chain (?:ip|ip6|inet) {NFT_NAME} {NFT_NAME}",\n': "",
    'f"nc -nvz ': 'f"no nc ',
    'LISTED = f"-p': 'LISTED = f"no list -p',
}  # fmt: skip
LATER_IN_SUDOERS = {
    ", \\\n    /usr/sbin/iptables-save -c -t nat, /usr/sbin/ip6tables-save -c -t nat": "",
    "    /usr/sbin/conntrack ^-L -p (udp|tcp --orig-port-dst [0-9]+)( -f ipv6)?$, \\\n": "",
    ", EPOK_LOOK": "",
}


def make_older(bare: Gateway, args: tuple[str, ...]) -> None:
    """What setup-host installed before it knew of --status."""
    path, later = ("etc/sudoers.d/epok", LATER_IN_SUDOERS) if args else ("usr/local/sbin/epok-gate", LATER_IN_THE_GATE)
    file = bare.root / path
    text = file.read_text()
    for new, old in later.items():
        assert text.count(new) >= 1, new
        text = text.replace(new, old)
    file.write_text(text)
    bare.space.run(["visudo", "-c", "-q"])


@WAYS
@once
def test_an_older_gate_or_sudoers_lets_runs_go_on_and_says_what_cannot_be_seen(
    lab: Lab, client: Client, bare: Gateway, args: tuple[str, ...], tmp_path: Path
) -> None:
    somebody = operator(lab, bare, args, tmp_path)
    make_older(bare, args)
    port = r"printenv SSH_CONNECTION: epok-gate: refused.* run cron/setup-host of this epok on the host"
    for more, lines in (((), 2), (("--metrics-file", str(tmp_path / "epok.prom")), 4)):
        before = len(bare.logged("epok-gate"))
        done = somebody.epok(*more)
        assert done.status == 0 and done.err.count("warning: ") == (not args), done.err
        assert bool(re.search(port, done.err)) == (not args), done.err
        logged = [line for line in bare.logged("epok-gate")[before:] if "refused" in line]
        assert len(logged) == (0 if args else lines), logged  # sudo -n logs no refusal
    status = somebody.epok("--status")
    assert status.status == 0 and status.err.count("warning: ") == (not args), status.err
    assert re.search(r"CONNECTIONS  ANSWERED\ntcp/25 .* \? +\?\n", status.out), status.out
    unseen = "sudo -n nft -j list chains: sudo: a password is required" if args else "ip netconf: epok-gate: refused"
    lines = [line for line in status.out.splitlines() if line.startswith("maybe")]
    assert sum(unseen in line and "; run cron/setup-host of this epok on the host" in line for line in lines) == 1, (
        lines
    )
    explained = looked(somebody, "--explain", "default/mail")
    untried = [problem for problem in problems(explained) if "could not be tried" in problem]
    assert len(untried) == (0 if args else 3) and all("cron/setup-host" in problem for problem in untried)


@pytest.fixture
def poor(gateway: Gateway) -> Iterator[None]:
    """The host without nft, nc and ss."""
    hide = """
    for place in bin sbin; do
        mkdir -p /run/poor/$place/upper /run/poor/$place/work
        options=lowerdir=/usr/$place,upperdir=/run/poor/$place/upper,workdir=/run/poor/$place/work
        mount -t overlay -o $options overlay /usr/$place
    done
    rm -f /usr/sbin/nft /usr/bin/nc /usr/bin/ss
    """
    gateway.space.run(["sh", "-ec", hide])
    yield
    gateway.space.run(["umount", "--lazy", "/usr/bin", "/usr/sbin"])
    gateway.space.run(["rm", "-r", "/run/poor"])


@WAYS
@once
def test_a_host_without_nft_nc_and_ss_is_set_up_and_forwards_as_any(
    lab: Lab, client: Client, bare: Gateway, poor: None, args: tuple[str, ...], tmp_path: Path
) -> None:
    somebody = operator(lab, bare, args, tmp_path)
    done = somebody.epok()
    assert done.status == 0 and "warning" not in done.err, done.err
    lab.ask(25)
    lacks = problems(looked(somebody, "--explain", "default/mail"))
    assert sum("netcat-openbsd" in problem for problem in lacks) == 3
    unseen = [problem for problem in lacks if "does not tell all that matters" in problem]
    assert len(unseen) == 2 and any("ss: " in problem and "not found" in problem for problem in unseen), unseen
    assert any("nft: command not found" in problem or "if that has nft" in problem for problem in unseen), unseen
