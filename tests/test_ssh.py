"""epok over SSH: a real sshd on the lab's host, and epok on the client's machine."""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import epok
from conftest import faults
from lab.clock import set_clock
from lab.fake_api import TOKEN, FakeApi, write_kubeconfig
from lab.machine import latest_end, need, stretched, until
from lab.network import CHOOSE_BACKEND, FORWARDING, HOST, HOST6, PROGRAM, Lab, bare_environment
from lab.objects import node, port, service, snapshot
from lab.relay import Relay
from lab.sshd import (
    BROKEN_LOGIN,
    DRIPPING_OUTPUT,
    ENDLESS_OUTPUT,
    FEW_SESSIONS,
    KEY_TYPES,
    PLACE,
    STALLED_COMMAND,
    STALLED_LOGIN,
    USER,
    Sshd,
    impostor,
    make_key,
)

SECOND = "203.0.113.10"  # another host, behind the first
LATE, SILENT, NOBODY, OTHER, IMPOSTORS_FROM = 2301, 2302, 2303, 2304, 2400  # ports where no sshd listens
SAVES = {"iptables-save -t filter", "iptables-save -t nat"}  # IPv4's, which are read first and at the same time
VOCABULARY = (
    r"iptables-save -t nat",
    r"iptables-save -t filter",
    r"iptables-restore --noflush --wait 5",
    r"ip6tables-save -t nat",
    r"ip6tables-save -t filter",
    r"ip6tables-restore --noflush --wait 5",
    r"iptables-save -c -t nat",
    r"ip6tables-save -c -t nat",
    r"nft -j list chains",
    r'iptables-save ""',
    r'ip6tables-save ""',
    r"conntrack -L -p udp",
    r"conntrack -L -p udp -f ipv6",
    r"conntrack -D -p udp --orig-dst [0-9a-f.:]+ --orig-port-dst [0-9]+ --reply-src [0-9a-f.:]+( -f ipv6)?",
)
VALUES = {"TOOL": "ip6?tables", "ADDRESS": "[0-9a-f.:]+"}
# What a run has to ask for.
USUAL = {
    "SAVE", "RESTORE", "FORWARDING", "ADDRESSES", "CONNECTION", "NETCONF", "LISTENERS", "NFT_CHAINS", "WAY", "WAY_FROM",
}  # fmt: skip
SUDOERS = [f"{USER} ALL=(root) NOPASSWD: /usr/sbin/{words}" for words in VOCABULARY[:-1]]
SUDOERS += [rf"{USER} ALL=(root) NOPASSWD: /usr/sbin/conntrack ^{VOCABULARY[-1].removeprefix('conntrack ')}$"]

MAIL = service("mail", "25:2025", [port(25, 2025)])
WEB = service("web", "80:30080", [port(80, 30080)])
DUAL = service("web", "80:30080", [port(80, 30080)], families=("IPv4", "IPv6"))
DNS = service("dns", "53:30053", [port(53, 30053, protocol="UDP")])

# What does not depend on the rules' backend runs once.
once = pytest.mark.parametrize("lab", ["nft"], indirect=True)
fault = faults("SSH faults")
as_root_and_user = pytest.mark.parametrize("user", ["root", USER])


class Run(NamedTuple):
    """What one run of epok left, and the commands that the lab's host got to see."""

    status: int
    out: str
    err: str
    seconds: float
    timeout: int
    commands: list[str]

    def __str__(self) -> str:
        return f"exit {self.status} after {self.seconds:.1f} s of {self.timeout}\n{self.err}{self.out}{self.commands}"

    def lines(self, level: str) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith(f"{level}: ")]

    @property
    def error(self) -> str:
        """The one error of a run that failed."""
        assert self.status == 1, str(self)
        errors = self.lines("error")
        assert len(errors) == 1, str(self)
        return errors[0]

    @property
    def swapped(self) -> bool:
        return any("-restore" in command for command in self.commands)


def check(run: Run) -> None:
    """What holds for every run: it ends in time, its log is clean, its commands are those of the design."""
    assert run.seconds < latest_end(run.timeout), str(run)
    for line in run.err.splitlines():  # a traceback has other lines
        assert re.fullmatch(r"(debug|info|warning|error): [ -~]+", line), f"{line!r} of {run}"
        assert len(line) < 2000, str(run)
    for command in run.commands:
        assert kind(command), command


def kind(command: str) -> str:
    """The name of a command in epok's table, empty when there is none."""
    for each in epok.Command:
        words = re.sub(r"\b[A-Z]{2,}\b", lambda name: VALUES.get(name[0], r"[\w.-]+"), each.value)
        if re.fullmatch(("(sudo -n )?" if each.as_root else "") + words, command):
            return each.name
    return ""


class Operator:
    """Somebody on the client's machine, with a home directory, who runs epok against the lab's host."""

    def __init__(self, lab: Lab, server: Sshd, keys: dict[str, Path], home: Path) -> None:
        self.lab, self.server, self.keys, self.home = lab, server, keys, home
        self.known_hosts = home / ".ssh" / "known_hosts"
        self.known_hosts.parent.mkdir(mode=0o700)
        names = (HOST, f"[{HOST}]:2222", HOST6)
        self.know(*(f"{name} {server.host_key(kind)}" for name in names for kind in KEY_TYPES))

    def know(self, *lines: str) -> None:
        text = "".join(f"{line}\n" for line in lines)
        self.known_hosts.write_bytes(text.encode("utf-8", "surrogateescape"))

    def start(
        self,
        *args: str,
        services: "Sequence[dict[str, Any]] | dict[str, Any]" = (MAIL,),
        key: str = "ed25519",
        host: str = f"root@{HOST}",
        timeout: int = 20,
        env: "dict[str, str] | None" = None,
    ) -> Run:
        """Run epok with these Services or this snapshot; `key` is a name in `keys` or a file."""
        limit = stretched(timeout)
        cluster = services if isinstance(services, dict) else self.lab.cluster(*services)
        argv = [*PROGRAM, "--snapshot", "-", "-i", "eth0"]
        argv += ["--timeout", str(limit), "ssh", *(word for name in host.split() for word in ("--host", name))]
        argv += ["--key", str(self.keys.get(key, key))] if key else []
        noted = len(self.server.commands())
        began = time.monotonic()
        done = self.lab.client.run(
            [*argv, *args],
            json.dumps(cluster),
            check=False,
            env={**bare_environment(), "HOME": str(self.home), **(env or {})},
            timeout=limit + 300,
        )
        seconds = time.monotonic() - began
        return Run(done.returncode, done.stdout, done.stderr, seconds, limit, self.server.commands()[noted:])

    def epok(self, *args: str, **kw: Any) -> Run:
        run = self.start(*args, **kw)
        check(run)
        return run

    def succeeds(self, *args: str, **kw: Any) -> Run:
        run = self.epok(*args, **{"timeout": 60, **kw})
        assert run.status == 0, str(run)
        assert not run.lines("error"), str(run)
        return run

    def fails(self, *args: str, **kw: Any) -> Run:
        """A run that fails with one error, and leaves the rules as they are."""
        before = rules(self.lab)
        run = self.epok(*args, **kw)
        assert run.error
        assert rules(self.lab) == before
        return run


def rules(lab: Lab) -> str:
    return lab.saved() + lab.saved(6)


def answers(lab: Lab, number: int) -> bool:
    try:
        return lab.ask(number).name.startswith("node")
    except ConnectionRefusedError:
        return False


def fingerprint(line: str) -> str:
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def known_line(error: str, name: str) -> str:
    """The line for known_hosts in a message."""
    found = re.search(rf"(?<!\S){re.escape(name)} (ssh-ed25519|ecdsa-\S+|ssh-rsa) AAAA[A-Za-z0-9+/]+={{0,2}}", error)
    assert found, error
    return found[0]


def large(services: int, nodes: int = 10) -> dict[str, Any]:
    return snapshot(
        *(node(f"node{n}", f"10.0.0.{10 + n}") for n in range(1, nodes + 1)),
        *(service(f"s{n}", f"{10000 + n}:{30000 + n}", [port(80, 30000 + n)]) for n in range(services)),
    )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Private keys by name; each has its public key beside it."""
    need("ssh-keygen", "apt-get install openssh-client")
    place = tmp_path_factory.mktemp("keys")
    made = {kind: make_key(place / kind, kind) for kind in KEY_TYPES}
    for kind in ("ed25519", "rsa"):
        made[f"{kind} stranger"] = make_key(place / f"{kind}-stranger", kind)
    made["rsa in a PEM file"] = make_key(place / "pem", "rsa", "-m", "PEM")
    made["with a passphrase"] = make_key(place / "locked", "ed25519", "-N", "secret")
    return made


def public(keys: dict[str, Path], name: str) -> str:
    """Like "ssh-ed25519 AAAA..."."""
    return " ".join(keys[name].with_suffix(".pub").read_text().split()[:2])


def authorize(server: Sshd, keys: dict[str, Path]) -> None:
    friends = (name for name in keys if "stranger" not in name)
    server.authorize("# a comment", *(f"restrict {public(keys, name)} {name}" for name in friends))


@pytest.fixture
def ssh(lab: Lab, server: Sshd, keys: dict[str, Path], tmp_path: Path) -> Iterator[Operator]:
    """Somebody whom the host lets in, and whose epok never makes its sshd hang up."""
    server.reset()
    authorize(server, keys)
    yield Operator(lab, server, keys, tmp_path)
    told = (server.place / "log").read_text()
    assert not [line for line in told.splitlines() if "nonexistent channel" in line]


@pytest.fixture(scope="module")
def second(lab: Lab) -> tuple[Lab, Sshd]:
    """Another host, that the client reaches through the first; its address is SECOND."""
    other = Lab(backend=lab.backend)
    other.host = lab.namespace("second", FORWARDING + CHOOSE_BACKEND.replace("BACKEND", lab.backend))
    lab.link("eth3", other.host, (4, "203.0.113"), 10)
    return other, Sshd(other.host)


@pytest.fixture
def both(ssh: Operator, second: tuple[Lab, Sshd]) -> Lab:
    """The second host, as new, known, and with the same users."""
    other, its = second
    its.reset()
    authorize(its, ssh.keys)
    other.flush()
    with ssh.known_hosts.open("a") as file:
        file.writelines(f"{name} {its.host_key()}\n" for name in (SECOND, f"[{SECOND}]:2222"))
    return other


# ------------------------------------------------ a run, as a whole


@as_root_and_user
def test_a_forward_lives_from_annotation_to_clean(ssh: Operator, user: str) -> None:
    ssh.server.sudoers(*SUDOERS)
    host = f"{user}@{HOST}"
    pristine = rules(ssh.lab)
    assert not answers(ssh.lab, 25)
    ssh.succeeds(host=host)
    assert answers(ssh.lab, 25)
    made = rules(ssh.lab)
    again = ssh.succeeds(host=host)
    assert len(again.err.splitlines()) == 1, str(again)
    assert not again.swapped
    assert rules(ssh.lab) == made
    ssh.succeeds(host=host, services=(WEB,))
    assert answers(ssh.lab, 80)
    assert not answers(ssh.lab, 25)
    ssh.succeeds("--clean", host=host)
    assert rules(ssh.lab) == pristine
    sudo = {command.startswith("sudo -n ") for command in ssh.server.commands() if "tables-" in command}
    assert sudo == {user != "root"}


@as_root_and_user
@once
def test_the_host_sees_the_words_of_the_design_and_nothing_else(ssh: Operator, user: str) -> None:
    ssh.server.sudoers(*SUDOERS)
    run = ssh.succeeds(host=f"{user}@{HOST}", services=(MAIL, DUAL))
    assert {kind(command) for command in run.commands} == USUAL
    status = ssh.succeeds("--status", host=f"{user}@{HOST}", services=(MAIL, DUAL))
    assert {kind(command) for command in status.commands} == USUAL - {"RESTORE"} | {
        "COUNTS",
        "PORT_FLOWS",
        "PORT_FLOWS_6",
    }
    for command in (*run.commands, *status.commands):
        assert command.startswith("sudo -n ") == (epok.Command[kind(command)].as_root and user != "root"), command


@as_root_and_user
@once
def test_a_udp_client_that_was_there_before_meets_the_new_forward(ssh: Operator, user: str) -> None:
    ssh.server.sudoers(*SUDOERS)
    ssh.succeeds(host=f"{user}@{HOST}")  # without any forward the kernel may track nothing
    with ssh.lab.host.entered():
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with own:  # a server of the host's own, so that the flow is one with replies
        own.bind((HOST, 53))
        with ssh.lab.connect(53, "udp", sport=40053) as client:
            client.send(b"who?")
            own.sendto(b"the host", own.recvfrom(100)[1])
            assert client.recv(100) == b"the host"
    run = ssh.succeeds(host=f"{user}@{HOST}", services=(DNS,))
    deletion = f"conntrack -D -p udp --orig-dst {HOST} --orig-port-dst 53 --reply-src {HOST}"
    assert any(command.endswith(deletion) for command in run.commands), str(run)
    assert ssh.lab.ask(53, "udp", sport=40053).name.startswith("node")


@once
def test_a_host_that_does_not_let_epok_list_udp_flows_is_served_with_one_warning(ssh: Operator) -> None:
    """As it was set up for an older epok."""
    ssh.server.sudoers(*(line for line in SUDOERS if "conntrack -L" not in line))
    for _ in range(2):
        run = ssh.succeeds(host=f"{USER}@{HOST}", services=(DNS,))
        [warning] = [line for line in run.err.splitlines() if "conntrack" in line]
        assert warning.startswith(f"warning: {USER}@{HOST}: sudo -n conntrack -L -p udp: sudo: "), warning
        assert "UDP flows may stay where they were: run cron/setup-host on the host" in warning
    assert ssh.lab.ask(53, "udp").name.startswith("node")


# 2,700 are 4 MB of input. With sudo one more process stands in the way, which on Debian gives the command a terminal.
def test_2700_services_on_ten_nodes_go_through(ssh: Operator) -> None:
    ssh.server.sudoers(*SUDOERS)
    host = f"{'root' if ssh.lab.backend == 'legacy' else USER}@{HOST}"
    cluster = large(2700)
    ssh.succeeds(services=cluster, host=host, timeout=50)
    assert len(set(re.findall(r"--dport (1[0-2]\d{3}) -m comment", ssh.lab.saved()))) == 2700
    assert not ssh.succeeds(services=cluster, host=host, timeout=50).swapped


@once
def test_ipv6_reaches_the_host_too(ssh: Operator) -> None:
    ssh.know(f"{HOST6} {ssh.server.host_key()}")
    ssh.succeeds(host=f"root@[{HOST6}]")


@once
def test_settings_come_from_the_environment(ssh: Operator) -> None:
    elsewhere = ssh.known_hosts.rename(ssh.home / "known")
    settings = {"HOST": f"root@{HOST}", "PORT": "2222", "KEY": str(ssh.keys["rsa"]), "KNOWN_HOSTS": str(elsewhere)}
    ssh.succeeds(host="", key="", env={f"EPOK_SSH_{name}": value for name, value in settings.items()})
    assert answers(ssh.lab, 25)


@contextlib.contextmanager
def another_sshd(ssh: Operator, *settings: str, name: str = HOST) -> Iterator[None]:
    """One with these settings on the port OTHER, which the operator knows."""
    running = ssh.server.start(OTHER, more=settings)
    try:
        with ssh.known_hosts.open("a") as file:
            file.writelines(f"[{name}]:{OTHER} {ssh.server.host_key(kind)}\n" for kind in KEY_TYPES)
        noted = ssh.server.connections()
        yield
        assert ssh.server.connections() > noted
    finally:
        ssh.server.stop(running, OTHER)


# ------------------------------------------------ the client's key


@pytest.mark.parametrize("key", [*KEY_TYPES, "rsa in a PEM file"])
@once
def test_each_kind_of_client_key_lets_epok_in(ssh: Operator, key: str) -> None:
    ssh.succeeds(key=key)
    assert answers(ssh.lab, 25)


@contextlib.contextmanager
def agent(ssh: Operator, *names: str) -> Iterator[dict[str, str]]:
    """ssh-agent with these keys, as the environment that finds it."""
    need("ssh-agent", "apt-get install openssh-client")
    env = {"SSH_AUTH_SOCK": str(ssh.home / "agent")}
    running = ssh.lab.client.popen(["ssh-agent", "-D", "-a", env["SSH_AUTH_SOCK"]], stdout=subprocess.DEVNULL)
    try:
        until(lambda: os.path.exists(env["SSH_AUTH_SOCK"]), "ssh-agent")
        argv = ["ssh-add", "-q", *(str(ssh.keys[name]) for name in names)]
        subprocess.run(argv, check=True, env={**os.environ, **env}, stderr=subprocess.DEVNULL)
        yield env
    finally:
        running.kill()
        running.wait()


@pytest.mark.parametrize("names", [["ed25519"], ["rsa"], ["ed25519 stranger", "rsa stranger", "ecdsa"]], ids=" ".join)
@once
def test_the_agents_keys_serve_without_a_key_option(ssh: Operator, names: list[str]) -> None:
    with agent(ssh, *names) as env:
        ssh.succeeds(key="", env=env)
    assert answers(ssh.lab, 25)


@once
def test_a_key_in_the_home_directory_serves_without_a_key_option(ssh: Operator) -> None:
    file = ssh.home / ".ssh" / "id_ed25519"
    file.write_bytes(ssh.keys["ed25519"].read_bytes())
    file.chmod(0o600)
    ssh.succeeds(key="")


@pytest.mark.parametrize("home", ["empty", "no key", "with a passphrase", "dead agent"])
@fault
@once
def test_no_key_at_all_is_an_error_at_once_that_names_the_option(ssh: Operator, home: str) -> None:
    file = ssh.home / ".ssh" / "id_ed25519"
    if home in ("no key", "with a passphrase"):
        file.write_text(ssh.keys[home].read_text() if home in ssh.keys else "nothing\n")
    run = ssh.fails(key="", env={"SSH_AUTH_SOCK": str(ssh.home / "agent")} if home == "dead agent" else {})
    assert "--key" in run.error
    assert ssh.server.connections() <= 1


@once
def test_the_key_given_is_the_only_one_that_is_tried(ssh: Operator) -> None:
    with agent(ssh, "ed25519") as env:
        ssh.fails(key="ed25519 stranger", env=env)


@fault
@once
def test_a_key_that_is_refused_is_an_error_at_once_that_leads_to_the_gate(ssh: Operator) -> None:
    run = ssh.fails(key="ed25519 stranger")
    assert ssh.server.connections() == 1
    assert (
        f"echo '{public(ssh.keys, 'ed25519 stranger')}' >" in run.error and "cron/setup-host --public-key" in run.error
    )
    assert "authorized_keys" not in run.error, "a line there would let it do all that the user may"


@pytest.mark.parametrize("more", ["password", "keyboard-interactive"])
@fault
@once
def test_a_key_that_is_accepted_but_not_enough_is_not_called_refused(ssh: Operator, more: str) -> None:
    allowed = ["-oPasswordAuthentication=yes", "-oKbdInteractiveAuthentication=yes", "-oUsePAM=yes"]
    with another_sshd(ssh, f"-oAuthenticationMethods=publickey,{more}", *allowed):
        error = ssh.fails(host=f"root@{HOST}:{OTHER}").error
    assert f"wants {more} as well" in error and "accepts the key" in error and "cron/setup-host" in error
    assert "refused" not in error


@fault
@once
def test_an_sshd_that_takes_no_keys_is_told_of(ssh: Operator) -> None:
    with another_sshd(ssh, "-oPubkeyAuthentication=no", "-oPasswordAuthentication=yes", "-oPermitRootLogin=yes"):
        error = ssh.fails(host=f"root@{HOST}:{OTHER}").error
    assert "by password alone" in error and "refused" not in error


KEY_MAKERS = {
    "EC of openssl": "openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out FILE",
    "RSA of openssl": "openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out FILE",
    "Ed25519 of openssl": "openssl genpkey -algorithm ED25519 -out FILE",
    "EC of ssh-keygen": "ssh-keygen -q -t ecdsa -m PKCS8 -N '' -f FILE",
    "RSA of ssh-keygen": "ssh-keygen -q -t rsa -b 2048 -m PKCS8 -N '' -f FILE",
    "P-521 of ssh-keygen": "ssh-keygen -q -t ecdsa -b 521 -m PKCS8 -N '' -f FILE",
}


@pytest.mark.parametrize("kind", KEY_TYPES)
def test_a_key_without_a_comment_is_read_also_where_it_needs_no_padding(tmp_path: Path, kind: str) -> None:
    for number in range(8 if kind == "ecdsa" else 2):
        file = make_key(tmp_path / f"{kind}{number}", kind, "-C", "")
        assert epok.load_key(str(file)).get_base64() == file.with_suffix(".pub").read_text().split()[1]


@pytest.mark.parametrize("made", KEY_MAKERS)
@once
def test_a_key_in_pkcs8_lets_epok_in(ssh: Operator, made: str) -> None:
    need("openssl", "apt-get install openssl")
    file = ssh.home / "key"
    subprocess.run(["sh", "-ec", KEY_MAKERS[made].replace("FILE", str(file))], check=True)
    assert "BEGIN PRIVATE KEY" in file.read_text()
    ssh.server.authorize(epok.load_key(str(file)).get_name() + " " + epok.load_key(str(file)).get_base64())
    ssh.succeeds(key=str(file))


CONVERTED = {
    "DER": "openssl genpkey -quiet -algorithm RSA -outform DER -out FILE",
    "a passphrase, in PKCS#8": "ssh-keygen -q -t ecdsa -m PKCS8 -N secret -f FILE",
    "a passphrase, in PEM": "ssh-keygen -q -t rsa -b 2048 -m PEM -N secret -f FILE",
}


@pytest.mark.parametrize("form", CONVERTED)
@fault
@once
def test_a_key_that_epok_cannot_read_comes_with_the_command_that_converts_it(ssh: Operator, form: str) -> None:
    need("openssl", "apt-get install openssl")
    file = ssh.home / "key"
    subprocess.run(["sh", "-ec", CONVERTED[form].replace("FILE", str(file))], check=True)
    file.chmod(0o600)
    error = ssh.fails(key=str(file)).error
    found = re.search(r"(?:convert it|take it away): (.*?), (?:and give --key (\S+)|or)", error)
    assert found, error
    made = found[2] or str(file)
    subprocess.run(["sh", "-ec", found[1] + (" -P secret >/dev/null" if "passphrase" in form else "")], check=True)
    assert Path(made).stat().st_mode & 0o077 == 0, "nobody else may read it"
    ssh.server.authorize(subprocess.run(["ssh-keygen", "-y", "-f", made], capture_output=True, text=True).stdout)
    ssh.succeeds(key=made)


@pytest.mark.parametrize("text, told", [
    ("PuTTY-User-Key-File-3: ssh-ed25519\nEncryption: none\n", r"puttygen \S+ -O private-openssh -o (\S+), .*--key \1"),
    ("---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n", r"umask 077; ssh-keygen -i -f \S+ >(\S+)\), .*--key \1"),
    ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA me\n", "is a public key; give the private one"),
    ("-----BEGIN CERTIFICATE-----\n", "ssh-keygen -q -t ed25519"),
], ids=["PuTTY", "SSH2", "public", "certificate"])  # fmt: skip
@fault
@once
def test_what_is_no_key_of_openssh_is_told_what_to_do_with(ssh: Operator, text: str, told: str) -> None:
    file = ssh.home / "key"
    file.write_text(text)
    error = ssh.fails(key=str(file)).error
    assert re.search(told, error), error


@pytest.mark.parametrize("content", [
    "missing", "no key", "empty", "a directory", "a public key", "half a key", "with a passphrase",
])  # fmt: skip
@fault
@once
def test_a_key_file_that_is_no_use_is_one_error_that_names_it(ssh: Operator, content: str) -> None:
    file, good = ssh.home / "key", ssh.keys["ed25519"]
    texts = {
        "no key": "\x1b[31mnothing\n",
        "empty": "",
        "half a key": good.read_text()[:150],
        "a public key": good.with_suffix(".pub").read_text(),
        "with a passphrase": ssh.keys["with a passphrase"].read_text(),
    }
    if content == "a directory":
        file.mkdir()
    elif content != "missing":
        file.write_text(texts[content])
    run = ssh.fails(key=str(file))
    assert str(file) in run.error
    assert ("passphrase" in run.error) == (content == "with a passphrase")
    assert not ssh.server.connections()


# ------------------------------------------------ the host's key


def strange_lines(ssh: Operator) -> list[str]:
    """Lines that say nothing about the lab's host."""
    stranger = public(ssh.keys, "ed25519 stranger")
    lines = ["# a comment", "", "   ", "@revoked", "garbage", "\udcff\x00\x1b[31m binary", f"elsewhere {stranger}"]
    lines += [f"{mark} {stranger}" for mark in ("@cert-authority *", "@revoked *", f"@unknown {HOST}", f"[{HOST}]:23")]
    lines += [f"{name} {stranger}" for name in ("|1|bad|hash", "|1|", "|1||||", "|1", "|2|a|b")]
    blobs = ("ssh-ed25519 no+base64!", "ssh-ed25519 AAAA", "ssh-ed25519", "ssh-unknown AAAAB3NzaC1kc3MAAACB")
    return lines + [f"{HOST} {blob}" for blob in blobs]


def hash_names(ssh: Operator) -> None:
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(ssh.known_hosts)], check=True, capture_output=True)
    assert HOST not in ssh.known_hosts.read_text()


@pytest.mark.parametrize("line", [
    "HOST ED25519", "HOST ECDSA", "HOST RSA", "elsewhere,HOST,192.0.2.2 ED25519", "HOST ED25519 a comment",
    "  HOST \t ED25519", "HOST\tED25519\r",
])  # fmt: skip
@once
def test_a_line_of_known_hosts_that_has_the_key_lets_epok_in(ssh: Operator, line: str) -> None:
    values = {"HOST": HOST, **{kind.upper(): ssh.server.host_key(kind) for kind in KEY_TYPES}}
    ssh.know(re.sub(r"\b(HOST|ED25519|ECDSA|RSA)\b", lambda word: values[word[0]], line))
    ssh.succeeds()


@pytest.mark.parametrize("number, kinds", [(22, KEY_TYPES), (2222, ["rsa"])], ids=["22", "2222"])
@once
def test_hashed_names_in_known_hosts_count(ssh: Operator, number: int, kinds: Sequence[str]) -> None:
    name = HOST if number == 22 else f"[{HOST}]:{number}"
    ssh.know(*(f"{name} {ssh.server.host_key(kind)}" for kind in kinds))
    hash_names(ssh)
    ssh.succeeds(host=f"root@{HOST}:{number}")


@once
def test_strange_lines_in_known_hosts_do_no_harm(ssh: Operator) -> None:
    ssh.know(*strange_lines(ssh), f"{HOST} {ssh.server.host_key()}", *strange_lines(ssh))
    ssh.succeeds()


@pytest.mark.parametrize("known", ["no directory", "empty", "strange lines", "another port", "an authority"])
@fault
@once
def test_an_unknown_host_key_is_an_error_at_once_with_the_line_that_accepts_it(ssh: Operator, known: str) -> None:
    keys = [ssh.server.host_key(kind) for kind in KEY_TYPES]
    ssh.know(
        *{
            "strange lines": strange_lines(ssh),
            "another port": [f"[{HOST}]:2222 {key}" for key in keys],
            "an authority": [f"@cert-authority {HOST} {key}" for key in keys],
        }.get(known, [])
    )
    if known == "no directory":
        ssh.known_hosts.unlink()
        ssh.known_hosts.parent.rmdir()
    run = ssh.fails()
    assert str(ssh.known_hosts) in run.error
    assert ssh.server.connections() == 1
    ssh.known_hosts.parent.mkdir(exist_ok=True)
    with ssh.known_hosts.open("a") as file:
        file.write(known_line(run.error, HOST) + "\n")
    ssh.succeeds()


@once
def test_a_key_that_changed_under_a_pattern_is_a_changed_one_and_the_pattern_stays(ssh: Operator) -> None:
    line = f"192.0.2.* {public(ssh.keys, 'ed25519 stranger')}"
    ssh.know("# mine", line)
    error = ssh.fails().error
    assert f"is not the one in {ssh.known_hosts}, line 2: somebody may be in between" in error
    command = re.search(r"run: (.*)$", error)
    assert command and "ssh-keygen -R" not in command[1], "it would make other hosts unknown"
    subprocess.run(["sh", "-ec", command[1]], check=True)
    ssh.succeeds()
    assert line in ssh.known_hosts.read_text()


@once
def test_a_certificate_authority_is_what_epok_cannot_check_and_says_so(ssh: Operator) -> None:
    ssh.know(f"@cert-authority 192.0.2.* {public(ssh.keys, 'ed25519 stranger')}")
    error = ssh.fails().error
    assert "epok cannot check a certificate by its @cert-authority" in error and "somebody" not in error
    command = re.search(r"run: (.*)$", error)
    assert command
    subprocess.run(["sh", "-ec", command[1]], check=True)
    ssh.succeeds()


@once
def test_a_file_that_may_not_be_read_is_named(ssh: Operator) -> None:
    ssh.known_hosts.unlink()
    ssh.known_hosts.mkdir()
    run = ssh.fails()
    assert [line for line in run.lines("warning") if f"{ssh.known_hosts}: Is a directory" in line], str(run)


@once
def test_the_file_of_the_system_counts_beside_the_users_and_not_beside_one_that_is_given(ssh: Operator) -> None:
    ssh.known_hosts.unlink()
    system = ssh.home / "etc"
    system.mkdir()
    (system / "ssh_known_hosts").write_text(f"{HOST} {ssh.server.host_key()}\n")
    mounted = ssh.lab.client.run(["sh", "-c", f"mount --bind {system} /etc/ssh && grep -c . /etc/ssh/ssh_known_hosts"])
    assert mounted.stdout == "1\n"
    try:
        ssh.succeeds()
        assert "is unknown" in ssh.fails("--known-hosts", str(ssh.known_hosts)).error
        (system / "ssh_known_hosts").write_text(f"{HOST} {public(ssh.keys, 'ed25519 stranger')}\n")
        error = ssh.fails().error
        assert "is not the one in /etc/ssh/ssh_known_hosts, line 1" in error
        assert f">>{ssh.known_hosts}" in error and "ssh-keygen -R" not in error
    finally:
        ssh.lab.client.run(["umount", "/etc/ssh"])


@pytest.mark.parametrize("host, name, args", [
    (f"root@{HOST}", f"[{HOST}]:2222", ["--port", "2222"]), (f"root@[{HOST6}]:2222", f"[{HOST6}]:2222", []),
    (f"root@[{HOST6}]", HOST6, []),
], ids=["--port", "[ipv6]:port", "[ipv6]"])  # fmt: skip
@once
def test_the_line_has_the_name_that_ssh_itself_would_use(ssh: Operator, host: str, name: str, args: list[str]) -> None:
    ssh.know()
    ssh.know(known_line(ssh.fails(*args, host=host).error, name))
    ssh.succeeds(*args, host=host)


@pytest.mark.parametrize("kind, hashed", [("ed25519", False), ("rsa", False), ("ed25519", True)])
@fault
@once
def test_a_wrong_host_key_is_refused_at_once(ssh: Operator, kind: str, hashed: bool) -> None:
    ssh.know(f"{HOST} {public(ssh.keys, f'{kind} stranger')}")
    if hashed:
        hash_names(ssh)
    run = ssh.fails()
    assert fingerprint(ssh.server.host_key(kind)) in run.error
    assert str(ssh.known_hosts) in run.error
    assert not ssh.server.commands()
    assert ssh.server.connections() == 1
    ssh.know(known_line(run.error, HOST))
    ssh.succeeds()


@pytest.mark.parametrize("lines", [
    "GOOD;@revoked HOST KEY", "@revoked * KEY;GOOD", "GOOD;@revoked\t192.0.2.*\tKEY a comment",
    "GOOD;@revoked *  KEY", "GOOD; @revoked * KEY",
])  # fmt: skip
@fault
@once
def test_a_revoked_host_key_is_refused_at_once(ssh: Operator, lines: str) -> None:
    text = lines.replace("GOOD", "HOST KEY").replace("HOST", HOST).replace("KEY", ssh.server.host_key())
    ssh.know(*text.split(";"))
    run = ssh.fails()
    assert "revoked" in run.error
    assert not ssh.server.commands()
    assert ssh.server.connections() == 1


@pytest.mark.parametrize("kind, pin", [
    ("ed25519", "LINE"), ("rsa", "LINE"), ("ecdsa", "LINE root@gateway"), ("ed25519", "FINGERPRINT"),
    ("ecdsa", "FINGERPRINT="), ("rsa", "FINGERPRINT"), ("rsa", "STRANGER,FINGERPRINT"),
])  # fmt: skip
@once
def test_a_pinned_host_key_is_enough(ssh: Operator, kind: str, pin: str) -> None:
    line, stranger = ssh.server.host_key(kind), public(ssh.keys, "ed25519 stranger")
    for word, value in (("LINE", line), ("FINGERPRINT", fingerprint(line)), ("STRANGER", stranger)):
        pin = pin.replace(word, value)
    ssh.know(f"{HOST} {stranger}")
    run = ssh.succeeds("--host-key", pin)
    assert not run.lines("warning"), str(run)


@pytest.mark.parametrize(
    "kind, form",
    [("ed25519", str), ("rsa", str), ("ed25519", fingerprint)],
    ids=["ed25519", "rsa", "fingerprint"],
)
@fault
@once
def test_a_wrong_pin_is_refused_whatever_known_hosts_says(ssh: Operator, kind: str, form: Callable[[str], str]) -> None:
    run = ssh.fails("--host-key", form(public(ssh.keys, f"{kind} stranger")))
    assert "--host-key" in run.error
    assert fingerprint(ssh.server.host_key(kind)) in run.error
    assert not ssh.server.commands()
    assert ssh.server.connections() <= len(KEY_TYPES)


@once
def test_any_host_key_is_accepted_with_a_warning_in_every_run(ssh: Operator) -> None:
    ssh.know(f"{HOST} {public(ssh.keys, 'ed25519 stranger')}")
    for _ in range(2):
        run = ssh.succeeds(env={"EPOK_SSH_HOST_KEY": "any"})
        assert len(run.lines("warning")) == 1, str(run)
        assert re.search(rf"{re.escape(HOST)}.*host key", run.lines("warning")[0])


@pytest.mark.parametrize("pin", ["ssh-ed25519", "SHA256:short", "md5", "any,none"])
@once
def test_a_pin_that_means_nothing_is_a_wrong_command_line(ssh: Operator, pin: str) -> None:
    run = ssh.epok("--host-key", pin)
    assert run.status == 2
    assert len(run.err.splitlines()) == 1
    assert not ssh.server.connections()


# ------------------------------------------------ sudo


@once
def test_the_lines_for_sudoers_in_the_errors_are_all_that_it_takes(ssh: Operator) -> None:
    lines: list[str] = []
    run = ssh.epok(host=f"{USER}@{HOST}", services=(DUAL,))
    while run.status and len(lines) < len(VOCABULARY):
        found = re.search(rf"{USER} ALL=.*NOPASSWD: ?/[^;]*", run.error)
        assert found, str(run)
        lines.append(found[0])
        ssh.server.sudoers(*lines)
        ssh.lab.host.run(["visudo", "-c", "-q"])
        run = ssh.epok(host=f"{USER}@{HOST}", services=(DUAL,))
    assert run.status == 0, str(run)
    assert "*" not in "".join(lines)
    assert answers(ssh.lab, 80)


@pytest.mark.parametrize("lines", [
    [f"{USER} ALL=(root) ALL"], [f"{USER} ALL=(root) NOPASSWD: ALL, !/usr/sbin/iptables-save"],
    [line for line in SUDOERS if "/iptables-save" not in line], ["Defaults requiretty", *SUDOERS],
], ids=["a password is wanted", "the command is forbidden", "the command is not listed", "no terminal"])  # fmt: skip
@fault
@once
def test_sudo_that_says_no_is_an_error_at_once_with_the_line_for_sudoers(ssh: Operator, lines: list[str]) -> None:
    ssh.server.sudoers(*lines)
    run = ssh.fails(host=f"{USER}@{HOST}")
    refused = [command.removeprefix("sudo -n ") for command in run.commands if "tables" in command]
    assert set(refused) <= SAVES and len(refused) == len(set(refused)), "none is tried again"
    assert "sudoers" in run.error
    told = [words for words in refused if f"{USER} ALL=(root) NOPASSWD: /usr/sbin/{words}" in run.error]
    assert len(told) == 1 or "requiretty" in lines[0]


@once
def test_sudo_that_wants_a_terminal_is_told_by_the_line_that_it_needs_none(ssh: Operator) -> None:
    lines = ["Defaults requiretty", *SUDOERS]
    ssh.server.sudoers(*lines)
    found = re.search(r"/etc/sudoers.d/epok and add: (.*)$", ssh.fails(host=f"{USER}@{HOST}").error)
    assert found
    ssh.server.sudoers(*lines, found[1])
    ssh.succeeds(host=f"{USER}@{HOST}")


@once
def test_a_broken_gate_is_mended_by_setup_host_and_by_no_line_for_sudoers(ssh: Operator) -> None:
    """sudo -n before the gate says no to each command, also to those that epok sends without sudo."""
    ssh.server.misbehave("exec sudo -n /usr/local/sbin/epok-gate")
    error = ssh.fails(host=f"{USER}@{HOST}").error
    assert error.endswith(f"; {epok.AGAIN}"), error
    assert "NOPASSWD" not in error and "visudo" not in error


@once
def test_a_sudo_that_looks_long_for_the_hosts_own_name_is_named_and_not_the_connection(ssh: Operator) -> None:
    ssh.server.sudoers(*SUDOERS)
    ssh.server.misbehave(f"""case "$SSH_ORIGINAL_COMMAND" in sudo*)
        sleep {stretched(4)}; echo 'sudo: unable to resolve host gateway: Name or service not known' >&2 ;;
        esac
        exec sh -c "$SSH_ORIGINAL_COMMAND" """)
    run = ssh.fails(host=f"{USER}@{HOST}", timeout=10)
    [warning] = run.lines("warning")
    for line in (warning, run.error):
        assert "as root on the host run: echo 127.0.1.1 gateway >>/etc/hosts" in line, str(run)
    assert f"no answer within --timeout {run.timeout} seconds" in run.error and "lost" not in run.error


@fault
@once
def test_sudo_that_forbids_the_restore_alone_is_an_error_at_once_with_the_line_for_it(ssh: Operator) -> None:
    line = f"{USER} ALL=(root) NOPASSWD: /usr/sbin/iptables-restore --noflush --wait 5"
    ssh.server.sudoers(*(other for other in SUDOERS if other != line))
    run = ssh.fails(host=f"{USER}@{HOST}")
    assert line in run.error
    assert sum("-restore" in command for command in run.commands) == 1


@fault
@once
def test_what_sudo_remarks_of_a_host_without_a_name_is_no_refusal(ssh: Operator) -> None:
    remark = "sudo: unable to resolve host gateway: Temporary failure in name resolution"
    ssh.server.sudoers(*SUDOERS)
    ssh.server.misbehave(f"""echo '{remark}' >&2
        case "$SSH_ORIGINAL_COMMAND" in *iptables-restore*) if mkdir {PLACE}/cut; then
            cat >/dev/null; echo 'Resource temporarily unavailable' >&2; exit 4
        fi ;; esac
        exec sh -c "$SSH_ORIGINAL_COMMAND"
    """)
    ssh.succeeds(host=f"{USER}@{HOST}")
    assert answers(ssh.lab, 25)


@pytest.mark.parametrize("user, missing", [(USER, "sudo"), ("root", "iptables")])
@fault
@once
def test_a_tool_that_the_host_lacks_is_named(ssh: Operator, user: str, missing: str) -> None:
    ssh.server.misbehave('PATH=/nonexistent exec /bin/bash -c "$SSH_ORIGINAL_COMMAND"')
    run = ssh.fails(host=f"{user}@{HOST}")
    assert re.search(rf"install.*\b{missing}", run.error), str(run)
    asked = [command.removeprefix("sudo -n ") for command in run.commands if "tables" in command]
    assert set(asked) <= SAVES and len(asked) == len(set(asked)), "none is tried again"


# ------------------------------------------------ several hosts


def test_several_hosts_get_the_same_rules(ssh: Operator, both: Lab) -> None:
    pristine = rules(ssh.lab), rules(both)
    run = ssh.succeeds(host=f"root@{HOST},root@{SECOND}")
    assert ssh.lab.saved() == both.saved()
    assert "--dport 25 " in both.saved()
    assert {f"root@{HOST}", f"root@{SECOND}"} <= set(re.findall(r"root@[\d.]*\d", run.err))
    again = ssh.succeeds(host=f"root@{HOST} root@{SECOND}")
    assert len(again.err.splitlines()) == 2
    ssh.succeeds("--clean", host=f"root@{HOST} root@{SECOND}")
    assert (rules(ssh.lab), rules(both)) == pristine


@fault
@once
def test_a_host_that_fails_holds_none_of_the_others_back(ssh: Operator, both: Lab, second: tuple[Lab, Sshd]) -> None:
    second[1].misbehave("echo no >&2; exit 1")
    nothing = both.saved()
    bad = [f"root@{HOST}:{NOBODY}", f"root@{HOST}:{SILENT}", f"root@{SECOND}"]
    with impostor(ssh.lab.host, SILENT, lambda _: None):
        run = ssh.epok(host=" ".join([*bad, f"root@{HOST}"]), timeout=6)
    assert run.status == 1
    assert len(run.lines("error")) == len(bad), str(run)
    for name in bad:
        assert sum(name in line for line in run.lines("error")) == 1, str(run)
    assert answers(ssh.lab, 25)
    assert both.saved() == nothing


@once
def test_a_host_that_was_given_up_is_not_logged_in_to_again(ssh: Operator, both: Lab, second: tuple[Lab, Sshd]) -> None:
    """Its other commands may still run, and a run goes on as long as its slowest host."""
    ssh.server.misbehave("""case "$SSH_ORIGINAL_COMMAND" in
        *"-save -t filter") echo "iptables-save: command not found" >&2; exit 127 ;;
        *"-save -t nat") sleep 1 ;;
        esac
        exec sh -c "$SSH_ORIGINAL_COMMAND" """)
    second[1].misbehave('sleep 1; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    run = ssh.epok(host=f"root@{HOST} root@{SECOND}", timeout=40)
    assert run.status == 1
    assert ssh.server.connections() == 1, str(run)
    assert "trying again" not in run.err
    assert "--dport 25 " in rules(both)


@once
def test_dry_run_shows_what_each_host_would_get_and_changes_nothing(ssh: Operator, both: Lab) -> None:
    hosts = {f"root@{HOST}": ssh.lab, f"root@{SECOND}": both}
    ssh.succeeds(host=f"root@{SECOND}")
    before = rules(ssh.lab), rules(both)
    run = ssh.epok("--dry-run", host=" ".join(hosts), services=(MAIL, WEB))
    assert run.status == 3, str(run)
    assert (rules(ssh.lab), rules(both)) == before
    assert not run.swapped
    parts = dict(part.split("\n", 1) for part in re.split(r"(?m)^# on ", run.out)[1:])
    assert parts.keys() == hosts.keys()
    for name, lab in hosts.items():
        forwards, heading, text = parts[name].partition("# iptables-restore --noflush --wait 5\n")
        assert ("25" in forwards) == (lab is ssh.lab)
        assert "80" in forwards
        assert heading
        lab.host.run(["iptables-restore", "--noflush", "--wait", "5"], text)
    again = ssh.epok("--dry-run", host=" ".join(hosts), services=(MAIL, WEB))
    assert again.status == 0, str(again)


@once
def test_dry_run_of_one_host_has_no_heading_for_it(ssh: Operator) -> None:
    run = ssh.epok("--dry-run")
    assert run.status == 3
    assert "# on " not in run.out


@once
def test_status_and_metrics_tell_of_several_hosts_also_when_one_is_down(ssh: Operator, both: Lab) -> None:
    names, nobody = [f"root@{HOST}", f"root@{SECOND}"], f"root@{HOST}:2"
    file = ssh.home / "epok.prom"
    run = ssh.epok("--metrics-file", str(file), host=",".join([*names, nobody]), timeout=5)
    assert run.status == 1
    told = re.findall(r'^epok_success{host="(.*)"} ([01])$', file.read_text(), re.MULTILINE)
    assert told == [*((name, "1") for name in names), (nobody, "0")]
    assert answers(ssh.lab, 25)
    status = ssh.succeeds("--status", "-o", "json", host=",".join(names))
    first, second = json.loads(status.out)["hosts"]
    assert [first["host"], second["host"]] == names
    assert [each["service"] for each in second["forwards"]] == ["default/mail"]
    assert [host["forwards"][0]["connections"] for host in (first, second)] == [1, 0]


# ------------------------------------------------ the port that epok itself uses


@pytest.mark.parametrize("host, args, guarded", [
    (f"root@{HOST}", [], 22), (f"root@{HOST}", ["--port", "2222"], 2222), (f"root@{HOST}:2222", [], 2222),
    (f"root@{HOST}:2222", ["--port", "22"], 2222),
], ids=["default", "--port", "host:port", "host:port wins"])  # fmt: skip
@once
def test_a_service_cannot_take_the_port_that_epok_comes_in_by(
    ssh: Operator, host: str, args: list[str], guarded: int
) -> None:
    shell = service("shell", f"{guarded}:30000", [port(22, 30000)])
    run = ssh.succeeds(*args, host=host, services=(shell, MAIL))
    warnings = run.lines("warning")
    assert len(warnings) == 1, str(run)
    assert re.search(rf"default/shell.*\b{guarded}\b", warnings[0])
    assert f"--dport {guarded} " not in ssh.lab.saved()
    assert answers(ssh.lab, 25)


@pytest.mark.parametrize("args, guarded", [([], 22), (["--port", "2222"], 2222)], ids=["22", "2222"])
@once
def test_of_a_range_that_port_alone_is_rejected(ssh: Operator, args: list[str], guarded: int) -> None:
    first = guarded - 2
    ports = [port(number, 30000 + number, f"p{number}") for number in range(5)]
    run = ssh.succeeds(
        *args, "--ports", "1-65535", services=(service("range", f"{first}-{first + 4}:30000-30004", ports),)
    )
    assert len(run.lines("warning")) == 1, str(run)
    assert {number: ssh.lab.ask(first + number).port for number in (0, 1, 3, 4)} == {n: 30000 + n for n in (0, 1, 3, 4)}
    ssh.succeeds(*args)


@once
def test_with_several_hosts_the_ports_of_all_of_them_are_guarded(ssh: Operator, both: Lab) -> None:
    greedy = [service(f"s{number}", f"{number}:30000", [port(22, 30000)]) for number in (22, 2222)]
    run = ssh.succeeds(host=f"root@{HOST} root@{SECOND}:2222", services=(*greedy, MAIL))
    assert len(run.lines("warning")) == 2
    assert not re.search("--dport 22(22)? ", ssh.lab.saved() + both.saved())
    assert answers(ssh.lab, 25)


@once
def test_behind_a_router_the_port_as_the_host_sees_it_is_kept_as_well(ssh: Operator) -> None:
    with Relay(ssh.lab.client, (HOST, 22)) as router:
        ssh.know(f"[127.0.0.1]:{router.port} {ssh.server.host_key()}")
        shell = service("shell", f"22:30000,{router.port}:30000", [port(22, 30000)])
        options = ("--port", str(router.port), "--ports", "1-65535")
        run = ssh.succeeds(*options, host="root@127.0.0.1", services=(shell, MAIL))
        kept = re.findall(r"external port (\d+) \(tcp\) is the host's own SSH port", run.err)
        assert sorted(kept) == sorted(["22", str(router.port)]), str(run)
        assert "--dport 22 " not in ssh.lab.saved() and answers(ssh.lab, 25)
        # an older gate does not tell it, and the run goes on
        refuse = (
            'case $SSH_ORIGINAL_COMMAND in printenv*) echo "epok-gate: refused: $SSH_ORIGINAL_COMMAND" >&2; exit 126'
        )
        ssh.server.misbehave(f'{refuse};; esac; exec sh -c "$SSH_ORIGINAL_COMMAND"')
        [warning] = ssh.succeeds(*options, host="root@127.0.0.1").lines("warning")
        assert "printenv SSH_CONNECTION: epok-gate: refused" in warning and "run cron/setup-host" in warning
        # what is gone must not need it
        assert ssh.succeeds("--clean", *options, host="root@127.0.0.1").lines("warning") == []


@once
def test_udp_of_that_number_and_the_port_of_another_sshd_are_free(ssh: Operator) -> None:
    shell = service("shell", "22:30000", [port(22, 30000)])
    dns = service("dns", "2222:30053", [port(53, 30053, protocol="UDP")])
    [refused] = ssh.succeeds("--port", "2222", services=(shell,)).lines("warning")
    assert 'default/shell: "22:30000": external port 22 (tcp) is not in --ports (1-21, ' in refused
    run = ssh.succeeds("--port", "2222", "--ports", "22,2222", services=(shell, dns))
    [warning] = run.lines("warning")  # the other sshd is not reached any more
    assert "has a program that listens on tcp/22, and clients get default/shell instead" in warning
    assert ssh.lab.ask(22).port == 30000
    assert ssh.lab.ask(2222, "udp").port == 30053


# ------------------------------------------------ servers that do not play along


@fault
@once
def test_a_server_that_allows_two_sessions_at_a_time_is_served_as_well(ssh: Operator) -> None:
    ssh.succeeds("--port", str(FEW_SESSIONS))
    assert answers(ssh.lab, 25)
    assert ssh.server.connections() == 1


@fault
@once
def test_a_refused_connection_is_tried_again(ssh: Operator) -> None:
    ssh.know(f"[{HOST}]:{LATE} {ssh.server.host_key()}")
    timer = threading.Timer(2, ssh.server.start, [LATE])
    timer.start()
    try:
        run = ssh.succeeds(host=f"root@{HOST}:{LATE}")
    finally:
        timer.join()
    assert run.seconds > 2
    assert answers(ssh.lab, 25)


@contextlib.contextmanager
def hosts_file(ssh: Operator, *lines: str) -> Iterator[None]:
    """What names mean on the client's machine."""
    file = ssh.home / "hosts"
    file.write_text("".join(f"{line}\n" for line in lines))
    ssh.lab.client.run(["mount", "--bind", str(file), "/etc/hosts"])
    try:
        yield
    finally:
        ssh.lab.client.run(["umount", "/etc/hosts"])


@once
def test_a_name_with_an_underscore_and_one_of_link_local_ipv6_are_names(ssh: Operator) -> None:
    shown = ssh.lab.host.run(["ip", "-br", "-6", "addr", "show", "dev", "eth0", "scope", "link"]).stdout
    local = re.findall(r"fe80::[0-9a-f:]+", shown)[0] + "%eth0"
    ssh.know(
        f"my_router {ssh.server.host_key()}",
        *(f"{name} {ssh.server.host_key()}" for name in (local, f"[{local}]:2222")),
    )
    with hosts_file(ssh, f"{HOST} my_router"):
        ssh.succeeds(host="root@my_router")
    for host in (f"root@{local}", f"root@[{local}]", f"root@[{local}]:2222"):
        ssh.succeeds(host=host)


@fault
@once
def test_a_name_whose_first_address_is_dead_costs_a_moment(ssh: Operator) -> None:
    ssh.know(f"gateway,{HOST} {ssh.server.host_key()}")
    drop = ["INPUT", "-p", "tcp", "-d", HOST6, "--dport", "22", "-j", "DROP"]
    ssh.lab.host.run(["ip6tables", "-I", *drop])
    try:
        with hosts_file(ssh, f"{HOST6} gateway", f"{HOST} gateway"):
            first = ssh.lab.client.run(["getent", "ahosts", "gateway"]).stdout.split()[0]
            assert first == HOST6
            slow = ssh.succeeds(host="root@gateway")
    finally:
        ssh.lab.host.run(["ip6tables", "-D", *drop])
    assert slow.seconds < slow.timeout / 2
    assert ssh.server.connections() == 1


@fault
@once
def test_a_name_that_means_nothing_is_an_error_soon_that_says_what_is_not_read(ssh: Operator) -> None:
    run = ssh.fails(host="root@my-router", timeout=30)
    assert "my-router" in run.error and "~/.ssh/config is not read" in run.error
    assert run.err.count("trying again") <= 2 and run.seconds < run.timeout - 5, str(run)


@fault
@once
def test_a_host_that_does_not_answer_is_named_by_address_and_port(ssh: Operator) -> None:
    drop = ["INPUT", "-p", "tcp", "--dport", str(OTHER), "-j", "DROP"]
    ssh.lab.host.run(["iptables", "-I", *drop])
    try:
        silent = ssh.fails(host=f"root@{HOST}:{OTHER}", timeout=4).error
    finally:
        ssh.lab.host.run(["iptables", "-D", *drop])
    refused = ssh.fails(host=f"root@{HOST}:{NOBODY}", timeout=4).error
    assert f"{HOST} port {OTHER}: no answer" in silent and f"{HOST} port {NOBODY}: Connection refused" in refused
    assert "ip -br" not in silent + refused


LACKING = {
    "Ciphers": "chacha20-poly1305@openssh.com",
    "KexAlgorithms": "curve25519-sha256",
    "MACs": "umac-64@openssh.com",
    "HostKeyAlgorithms": "ssh-rsa",
}


@pytest.mark.parametrize("setting", LACKING)
@fault
@once
def test_what_cannot_be_negotiated_is_one_try_and_names_what_the_server_lacks(ssh: Operator, setting: str) -> None:
    ciphers = ["-oCiphers=aes256-ctr"] * (setting == "MACs")  # others bring their own MAC
    with another_sshd(ssh, f"-o{setting}={LACKING[setting]}", *ciphers):
        before = ssh.server.connections()
        error = ssh.fails(host=f"root@{HOST}:{OTHER}").error
        assert ssh.server.connections() == before + 1
    found = re.search(rf"on the host add (\S+) to {setting}\b.* in /etc/ssh/sshd_config$", error)
    assert found, error
    with another_sshd(ssh, f"-o{setting}={LACKING[setting]},{found[1]}", *ciphers):
        ssh.succeeds(host=f"root@{HOST}:{OTHER}")


def drip(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x")
        time.sleep(0.1)


def flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"\x1b[31mnot SSH\r\n" * 1000)


IMPOSTORS: dict[str, Callable[[socket.socket], object] | None] = {
    "nobody listens": None,
    "silent": lambda connection: None,
    "closes at once": socket.socket.close,
    "drips": drip,
    "floods": flood,
    "another protocol": lambda connection: connection.sendall(b"HTTP/1.1 400 Bad\x1b[31m\xff\r\nerror: none\r\n\r\n"),
    "half a banner": lambda connection: connection.sendall(b"SSH-2.0-Open"),
    "a banner alone": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "garbage after it": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(range(256)) * 99),
}
STALLS = {
    "login stalls": STALLED_LOGIN,
    "login stalls and the clock is set": STALLED_LOGIN,
    "login breaks off": BROKEN_LOGIN,
    "command stalls": STALLED_COMMAND,
    "output without end": ENDLESS_OUTPUT,
    "output drips": DRIPPING_OUTPUT,
}
SHORT, AT_ONCE = 4, 7


@pytest.fixture(scope="module")
def bad_servers(
    lab: Lab, server: Sshd, keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """One run against each, several at the same time, since each takes its whole --timeout."""
    server.reset()
    authorize(server, keys)
    ports = {**{name: number for number, name in enumerate(IMPOSTORS, IMPOSTORS_FROM)}, **STALLS}
    before = rules(lab)

    def one(name: str) -> Run:
        ssh = Operator(lab, server, keys, tmp_path_factory.mktemp("home"))
        ssh.know(f"[{HOST}]:{ports[name]} {server.host_key()}")
        env = set_clock(ssh.home, hours=6) if "clock" in name else {}
        return ssh.start(host=f"root@{HOST}:{ports[name]}", timeout=SHORT, env=env)

    with contextlib.ExitStack() as stack:
        for name, say in IMPOSTORS.items():
            if say:
                stack.enter_context(impostor(lab.host, ports[name], say))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            runs = dict(zip(ports, pool.map(one, ports), strict=True))
    assert rules(lab) == before
    return runs


@pytest.mark.parametrize("name", [*IMPOSTORS, *STALLS])
@fault
@once
def test_a_server_that_does_not_play_along_is_one_error_in_time(bad_servers: dict[str, Run], name: str) -> None:
    run = bad_servers[name]
    assert HOST in run.error
    assert "authorized_keys" not in run.error, "nothing is wrong with the key"
    check(run)


# ------------------------------------------------ connections that break


CUTS = {
    "before it reads": "kill -9 $PPID; exit",
    "in the middle": 'head -c 700 | sh -c "$SSH_ORIGINAL_COMMAND"; kill -9 $PPID; exit',
    "in the middle of a lot": 'head -c 300000 | sh -c "$SSH_ORIGINAL_COMMAND"; kill -9 $PPID; exit',
    "when all is done": 'sh -c "$SSH_ORIGINAL_COMMAND"; kill -9 $PPID; exit',
    "in the middle, without exit status": 'head -c 700 | sh -c "$SSH_ORIGINAL_COMMAND"; kill -9 $$',
    "nothing done, without exit status": "kill -9 $$",
    "all done, without exit status": 'sh -c "$SSH_ORIGINAL_COMMAND"; kill -9 $$',
}


def cut_restore(server: Sshd, cut: str, when: str = "") -> None:
    """Each iptables-restore ends like that, or those when the shell command `when` succeeds."""
    server.misbehave(f"""case "$SSH_ORIGINAL_COMMAND" in *iptables-restore*) {when} {{ {CUTS[cut]}; }} ;; esac
        exec sh -c "$SSH_ORIGINAL_COMMAND"
    """)


@pytest.mark.parametrize("cut", CUTS)
@fault
@once
def test_a_swap_that_is_cut_off_is_made_good_in_the_same_run(ssh: Operator, cut: str) -> None:
    cluster = snapshot(*large(1200)["items"], MAIL) if "a lot" in cut else ssh.lab.cluster(MAIL)
    cut_restore(ssh.server, cut, when="mkdir /run/epok/cut 2>/dev/null &&")
    run = ssh.succeeds(services=cluster)
    restores = [number for number, command in enumerate(run.commands) if "-restore" in command]
    assert "iptables-save" in run.commands[restores[0] + 1], "what was done is read before anything else"
    if "all" in cut:
        assert len(restores) == 1, str(run)
    assert "now forwarding tcp/25 " in run.err, "also when the answer to what took effect was lost"
    assert "--dport 25 " in ssh.lab.saved()
    ssh.server.reset()
    assert not ssh.succeeds(services=cluster).swapped


@pytest.mark.parametrize("cut", ["in the middle", "in the middle of a lot", "nothing done, without exit status"])
@fault
def test_a_swap_that_is_cut_off_each_time_leaves_the_old_rules_for_the_next_run(ssh: Operator, cut: str) -> None:
    ssh.succeeds()
    cluster = large(1200) if "a lot" in cut else ssh.lab.cluster(WEB)
    cut_restore(ssh.server, cut)
    run = ssh.fails(services=cluster, timeout=4)
    assert HOST in run.error
    assert run.swapped
    assert answers(ssh.lab, 25)
    ssh.server.reset()
    ssh.succeeds(services=cluster)
    assert not answers(ssh.lab, 25)


@pytest.mark.parametrize("hours", [6, -6])
@fault
@once
def test_a_clock_that_is_set_only_costs_a_few_tries(ssh: Operator, tmp_path: Path, hours: int) -> None:
    """paramiko's own limits go by that clock."""
    ssh.succeeds(env=set_clock(tmp_path, hours))
    assert answers(ssh.lab, 25)


@fault
@once
def test_a_status_that_never_comes_is_an_error_in_time(ssh: Operator) -> None:
    ssh.server.misbehave("kill -9 $$")
    run = ssh.fails(timeout=3)
    assert HOST in run.error


# ------------------------------------------------ what the host prints


HOSTILE = r"""printf '\033]0;owned\007\033[2J\nerror: fake\r\n\377\000\302\233\n' >&STREAM
head -c 1000000 /dev/zero | tr '\0' '\033' >&STREAM
"""


@pytest.mark.parametrize("command, status, stream, fatal", [
    ("iptables-save", 0, "1", True), ("iptables-save", 127, "2", True), ("ip6tables-save", 1, "2", True),
    ("iptables-restore", 0, "1", True), ("iptables-restore", 1, "2", True), ("iptables-restore", 2, "1", True),
    ("cat", 0, "1", False), ("cat", 1, "2", False), ("ip?-br", 0, "1", False), ("ip?-br", 1, "2", False),
])  # fmt: skip
@fault
@once
def test_whatever_the_host_prints_the_log_stays_clean(
    ssh: Operator, command: str, status: int, stream: str, fatal: bool
) -> None:
    ssh.server.misbehave(f"""case "$SSH_ORIGINAL_COMMAND" in {command}*)
        cat >/dev/null; {HOSTILE.replace("STREAM", stream)} exit {status} ;;
        esac
        exec sh -c "$SSH_ORIGINAL_COMMAND"
    """)
    _ = ssh.fails() if fatal else ssh.succeeds()
    assert answers(ssh.lab, 25) != fatal


@fault
@once
def test_a_shell_that_says_hello_is_no_matter(ssh: Operator) -> None:
    ssh.server.misbehave('echo "Welcome to gateway 0 0"; echo "motd" >&2; exec sh -c "$SSH_ORIGINAL_COMMAND"')
    run = ssh.succeeds()
    assert not run.lines("warning"), str(run)
    assert answers(ssh.lab, 25)
    assert not ssh.succeeds().swapped


@once
@pytest.mark.parametrize("host", ["root@a..b", f"root@{'a' * 64}.example"])
def test_a_host_name_that_is_none_is_one_error(ssh: Operator, host: str) -> None:
    run = ssh.epok(host=host, timeout=4)
    assert host in run.error and "--host" in run.error


def test_a_known_host_is_known_however_its_name_is_spelt() -> None:
    options = epok.parse_options(["-i", "eth0", "--known-hosts", "/dev/null", "ssh", "--host", "root@Gateway"], {})
    assert epok.is_named(epok.HostKeyCheck(options.host[0], options).name, "elsewhere,GateWay")


@once
def test_a_host_that_is_no_ssh_server_is_not_taken_for_a_broken_login_plugin(ssh: Operator, tmp_path: Path) -> None:
    credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": TOKEN}}
    plugin = tmp_path / "plugin"
    plugin.write_text(f"#!/bin/sh\nsleep 1\necho '{json.dumps(credential)}'\n")
    plugin.chmod(0o755)
    user = {"exec": {"command": str(plugin), "interactiveMode": "Never", "apiVersion": credential["apiVersion"]}}
    with (
        FakeApi(ssh.lab.client, *ssh.lab.node_objects(), MAIL) as api,
        impostor(ssh.lab.host, SILENT, lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n") or sock.close()),
    ):
        config = write_kubeconfig(tmp_path / "config", api.url, user=user)
        hosts = ["--host", f"root@{HOST}:{SILENT}", "--host", f"root@{HOST}", "--key", str(ssh.keys["ed25519"])]
        argv = [*PROGRAM, "-i", "eth0", "--timeout", str(stretched(5)), "--kubeconfig", config, "ssh", *hosts]
        env = {**os.environ, "HOME": str(ssh.home)}
        done = ssh.lab.client.run(argv, check=False, env=env)
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{HOST}:{SILENT}" in error
    assert answers(ssh.lab, 25)


# ------------------------------------------------ in a pod


@pytest.mark.parametrize("what", ["unknown", "changed", "an authority", "refused", "no key", "a public key", "garbage"])
@fault
@once
def test_in_a_pod_the_cure_is_setup_host_and_a_new_secret(ssh: Operator, what: str) -> None:
    """Its files are those of a Secret, and gone with it."""
    stranger = public(ssh.keys, "ed25519 stranger")
    lines = {"unknown": [], "changed": [f"{HOST} {stranger}"], "an authority": [f"@cert-authority * {stranger}"]}
    if what in lines:
        ssh.know(*lines[what])
    file = ssh.home / "id_rsa"
    if what in ("a public key", "garbage"):
        file.write_text(stranger if what == "a public key" else "garbage")
    keys = {"refused": "ed25519 stranger", "no key": str(file), "a public key": str(file), "garbage": str(file)}
    error = ssh.fails(key=keys.get(what, "ed25519"), env={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}).error
    assert error.endswith(epok.RENEW) and "replace the Secret" in epok.RENEW, error
    assert not re.search(">>|authorized_keys|ssh-keygen -R|mkdir", error)
