"""known_hosts as ssh reads it: files made by hypothesis, with ssh-keygen -F and a real ssh as oracles."""

import re
from pathlib import Path

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import epok
from conftest import Tally, often
from lab.network import HOST, Lab
from lab.sshd import KEY_TYPES, PLACE, Sshd, await_banner, make_key

RECORD = False  # nothing goes into iptables here
once = pytest.mark.parametrize("lab", ["nft"], indirect=True)
PORTS: dict[int, tuple[str, ...]] = {
    22: KEY_TYPES, 2222: KEY_TYPES, 2501: ("ecdsa", "rsa"), 2502: ("rsa",),
}  # fmt: skip
MARKS = ("", "", "", "", "", "", "@revoked ", "@cert-authority ", "@unknown ", "@revoked @revoked ", "@REVOKED ")
NAMES = (
    HOST, HOST, HOST, "192.0.2.*", "192.0.?.1", "*.2.1", "*", "192.0.2.??", "192.0.2.[1]", "elsewhere", "192.0.2.2", "",
    f"!{HOST}", "!192.0.2.*", "!elsewhere", "!!", "!", f"![{HOST}]:2222",
    f"[{HOST}]:2222", f"[{HOST}]:2501", f"[{HOST}]:2502", "[192.0.2.*]:2222", f"[{HOST}]:*", f"[{HOST}]:25??",
    "[*]:2222",
    f"[{HOST}]:22", f"[{HOST}]", f"{HOST}:2222",
)  # fmt: skip
HASHED = (HOST, f"[{HOST}]:2222", f"[{HOST}]:2502", "elsewhere", "|1|bad|hash", "|1|", "|", "|2|a|b")
COMMENTS = ("", "", " a comment", "\ta comment", " #", "\r", "  ")


def hashed(name: str) -> str:
    return name if name.startswith("|") else paramiko.HostKeys.hash_host(name)


names = st.one_of(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(",".join),
    st.sampled_from(HASHED).map(hashed),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(HASHED)).map(lambda pair: f"{pair[0]},{hashed(pair[1])}"),
)
ODD = ("", "   ", "# a comment", f"#{HOST} ssh-rsa AAAA", "garbage", HOST, f"{HOST} ", "@", "@revoked")


def lines(keys: list[str]) -> st.SearchStrategy[str]:
    """A line of known_hosts with one of these keys."""
    blank = st.sampled_from([" ", " ", "\t", "  "])
    made = st.tuples(
        st.sampled_from(["", "", " ", "\t"]), st.sampled_from(MARKS), names, blank, st.sampled_from(keys),
        st.sampled_from(COMMENTS),
    )  # fmt: skip
    return made.map("".join)


def files(keys: list[str]) -> st.SearchStrategy[str]:
    some = st.lists(st.one_of(lines(keys), lines(keys), lines(keys), st.sampled_from(ODD)), max_size=4)
    return some.map(lambda each: "".join(f"{line}\n" for line in each))


class Oracle:
    """A host with sshd on PORTS, and somebody whom it lets in, once by ssh and once by epok."""

    def __init__(self, lab: Lab, server: Sshd, folder: Path) -> None:
        self.lab, self.server, self.folder = lab, server, folder
        self.key = make_key(folder / "key", "ed25519")
        self.file = folder / "known_hosts"
        server.reset()
        server.authorize(self.key.with_suffix(".pub").read_text())
        for port, kinds in PORTS.items():
            if kinds != KEY_TYPES:
                argv = ["/usr/sbin/sshd", "-D", "-f", f"{PLACE}/config", "-E", f"{PLACE}/log", "-p", str(port)]
                server.space.popen(argv + [word for kind in kinds for word in ("-h", f"{PLACE}/host_{kind}")])
                await_banner(server.space, port)

    def ssh(self, port: int) -> bool:
        settings = ("BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes", "GlobalKnownHostsFile=none")
        words = [f"-o{setting}" for setting in (*settings, f"UserKnownHostsFile={self.file}")]
        argv = ["ssh", "-F", "none", *words, "-i", str(self.key), "-p", str(port), f"root@{HOST}", "true"]
        return self.lab.client.run(argv, check=False).returncode == 0

    def epok(self, port: int) -> bool:
        words = ["--key", str(self.key), "--known-hosts", str(self.file), "ssh", f"--host=root@{HOST}:{port}"]
        options = epok.parse_options(["-i", "eth0", *words], {})
        host = epok.SshHost(options.host[0], options)
        with self.lab.client.entered():
            try:
                return host.run(("true",), "", epok.Deadline(30)).status == 0
            except epok.Fatal as error:
                assert "host key" in str(error), error
                return False
            finally:
                host.close()

    def both(self, text: str, port: int) -> tuple[bool, bool]:
        """Whether ssh gets in with that known_hosts, and whether epok does."""
        self.file.write_bytes(text.encode("latin-1"))
        return self.ssh(port), self.epok(port)


@pytest.fixture(scope="module")
def oracle(lab: Lab, server: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(lab, server, tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def known(oracle: Oracle) -> list[str]:
    """Keys for lines: the host's own, others, and what is none."""
    own = [oracle.server.host_key(kind) for kind in KEY_TYPES]
    others = [
        " ".join(make_key(oracle.folder / f"other-{kind}", kind).with_suffix(".pub").read_text().split()[:2])
        for kind in KEY_TYPES
    ]
    blobs = [line.split()[1] for line in own]
    none = [
        f"ssh-rsa {blobs[0]}", f"ssh-ed25519 {blobs[2]}", f"rsa-sha2-512 {blobs[2]}", f"ssh-ed25519 {blobs[0][:-4]}",
        f"ssh-ed25519 {blobs[0]}AAAA", f"ecdsa-sha2-nistp384 {blobs[1]}", f"ecdsa-sha2-nistp256 {blobs[1].rstrip('=')}",
        f"ED25519 {blobs[0]}", "ssh-ed25519 no+base64!", "ssh-ed25519", "ssh-ed25519 AAAA", f"ssh-ed25519\t{blobs[0]}",
    ]  # fmt: skip
    return own * 5 + others * 2 + none


@once
def test_ssh_and_epok_get_in_with_the_same_known_hosts_or_neither_does(
    oracle: Oracle, known: list[str], tally: Tally
) -> None:
    answers: list[tuple[bool, bool]] = []
    wrong: list[str] = []

    @settings(max_examples=often(40, 5000), database=None, suppress_health_check=list(HealthCheck))
    @given(files(known), st.sampled_from(sorted(PORTS)))
    def compare(text: str, port: int) -> None:
        answers.append(oracle.both(text, port))
        if len(set(answers[-1])) > 1:
            wrong.append(f"port {port}, ssh {'gets' if answers[-1][0] else 'does not get'} in:\n{text}")

    compare()
    for what, ssh in (("gets in", True), ("does not get in", False)):
        mine = [epok for theirs, epok in answers if theirs == ssh]
        tally(f"known_hosts files with which ssh {what}, given to epok", len(mine), mine.count(not ssh))
    assert not wrong, f"{len(wrong)} of {len(answers)}; for example {min(wrong, key=len)}"


@once
def test_the_lines_that_name_a_host_are_those_that_ssh_keygen_finds(oracle: Oracle, tally: Tally) -> None:
    key = oracle.server.host_key()
    wrong: list[str] = []
    tried = 0

    @settings(max_examples=often(60, 5000), database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(names, min_size=1, max_size=20), st.sampled_from([name for name in HASHED if "|" not in name]))
    def compare(hosts: list[str], name: str) -> None:
        nonlocal tried
        tried += len(hosts)
        oracle.file.write_text("".join(f"{host} {key}\n" for host in hosts if host))
        told = oracle.lab.client.run(["ssh-keygen", "-F", name, "-f", str(oracle.file)], check=False).stdout
        theirs = [int(number) for number in re.findall(r"(?m)^# Host .* found: line (\d+)", told)]
        if theirs != [line.number for line in epok.known_keys([str(oracle.file)], name)]:
            wrong.append(f"{name}: {theirs} of\n{oracle.file.read_text()}")

    compare()
    tally("lines of known_hosts of which ssh-keygen -F and epok said the same", tried, len(wrong))
    assert not wrong, wrong[0]
