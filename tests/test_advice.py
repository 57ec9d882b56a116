"""What a message says, done word for word, where it is read: behind the gate, by hand, in a pod."""

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import test_gate
from lab.gateway import Gateway, secret_data
from lab.network import EPOK, HOST, Lab
from lab.sshd import make_key
from test_gate import Answer, Client

once = pytest.mark.parametrize("lab", ["nft"], indirect=True)
client, gateway, bare = test_gate.client, test_gate.gateway, test_gate.bare
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}


def told(answer: Answer, pattern: str) -> str:
    """What is to be copied from the one error of a run that failed."""
    assert answer.status == 1, answer
    [error] = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    found = re.search(pattern, error)
    assert found, error
    return found[1]


def types(host: Gateway, command: str) -> str:
    """What root gets who types that on the host, in a clone of the repository."""
    clone = host.root / "run/clone"
    if not clone.exists():
        shutil.copytree(EPOK.parent / "cron", clone / "cron")
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SSH_CONNECTION": f"192.0.2.10 4022 {HOST} 22"}
    return host.space.run(["env", "-C", "/run/clone", "sh", "-ec", command], env=env).stdout


def has_no_more_than_the_gate_gives(somebody: Client) -> None:
    for command in ("id", "sudo -n id", "sudo -n iptables -S", "iptables-save -f /run/stolen"):
        answer = somebody.ssh(command)
        assert answer.status == 126 and "epok-gate: refused" in answer.err, (command, answer)


def somebody(lab: Lab, host: Gateway, folder: Path, user: str = "epok") -> Client:
    """Who knows the host, and has a key of his own."""
    keys = host.space.run(["sh", "-c", "cat /etc/ssh/ssh_host_*_key.pub"]).stdout.splitlines()
    known = "".join(f"{HOST} {key}\n" for key in keys)
    secret = {"id_rsa": make_key(folder / "own", "ed25519").read_text(), "known_hosts": known}
    return Client(lab, host, {**secret, "ssh_host": f"{user}@{HOST}"}, folder)


@pytest.mark.parametrize("user", ["epok", "root"])
@once
def test_a_refused_key_gets_in_behind_the_gate(
    lab: Lab, client: Client, bare: Gateway, user: str, tmp_path: Path
) -> None:
    me = somebody(lab, bare, tmp_path, user)
    answer = me.epok()
    types(bare, told(answer, r"run: (.*?);"))
    me.login = told(answer, r"then give --host (\S+),")
    done = me.epok()
    assert done.status == 0 and "now forwarding tcp/25" in done.err, done.err
    has_no_more_than_the_gate_gives(me)
    lines = (bare.root / "var/lib/epok/.ssh/authorized_keys").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith('restrict,command="sudo -n /usr/local/sbin/epok-gate" ')


@once
def test_a_gate_that_lost_its_right_is_made_again(lab: Lab, client: Client, bare: Gateway, tmp_path: Path) -> None:
    secret = secret_data(bare.setup_host("--address", HOST).stdout)
    me = Client(lab, bare, secret, tmp_path)
    (bare.root / "etc/sudoers.d/epok").unlink()
    types(bare, told(me.epok(), r"; run (cron/setup-host) on the host, with the options that it had before$"))
    assert me.epok().status == 0
    has_no_more_than_the_gate_gives(me)


@once
def test_a_second_factor_is_let_go_for_that_user_alone(lab: Lab, client: Client, bare: Gateway, tmp_path: Path) -> None:
    config = bare.root / "etc/ssh/sshd_config"
    before = config.read_text()
    me = Client(lab, bare, secret_data(bare.setup_host("--address", HOST).stdout), tmp_path)
    reload = "kill -HUP $(cat /run/sshd.pid) && sleep 1"
    try:
        config.write_text(f"AuthenticationMethods publickey,password\nPasswordAuthentication yes\n{before}")
        types(bare, reload)
        types(bare, told(me.epok(), r"as root on the host run: (.*), and reload sshd$"))
        types(bare, f"/usr/sbin/sshd -t && {reload}")
        assert me.epok().status == 0
        has_no_more_than_the_gate_gives(me)
        methods = [
            types(bare, f"/usr/sbin/sshd -T -C user={user} | grep ^authenticationm") for user in ("epok", "root")
        ]
        assert [line.split()[1:] for line in methods] == [["publickey"], ["publickey,password"]]
    finally:
        config.write_text(before)
        types(bare, reload)


@pytest.mark.parametrize("what", ["refused", "unknown", "changed"])
@once
def test_in_a_pod_setup_host_and_a_new_secret_are_the_cure(
    lab: Lab,
    client: Client,
    bare: Gateway,
    what: str,
    tmp_path: Path,
) -> None:
    secret = secret_data(bare.setup_host("--address", HOST).stdout)
    stranger = make_key(tmp_path / "stranger", "ed25519")
    stale = {
        "refused": {"id_rsa": stranger.read_text()},
        "unknown": {"known_hosts": ""},
        "changed": {"known_hosts": f"{HOST} {stranger.with_suffix('.pub').read_text()}"},
    }[what]
    answer = Client(lab, bare, {**secret, **stale}, tmp_path).epok(env=POD)
    printed = types(bare, told(answer, "run (cron/setup-host) on the host, .* replace the Secret by what it prints$"))
    me = Client(lab, bare, secret_data(printed), tmp_path)
    assert me.epok(env=POD).status == 0
    has_no_more_than_the_gate_gives(me)


@contextlib.contextmanager
def without_a_name(host: Gateway, folder: Path) -> Iterator[None]:
    """The host asks a DNS for its own name that does not answer, as sudo does where it is built for that."""
    files = {
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
        "resolv.conf": "nameserver 192.0.2.77\noptions timeout:2 attempts:2\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
        host.space.run(["mount", "--bind", str(folder / name), f"/etc/{name}"])
    hosts, sudoers = host.root / "etc/hosts", host.root / "etc/sudoers.d/fqdn"
    before = hosts.read_text()
    hosts.write_text("127.0.0.1 localhost\n")
    sudoers.write_text("Defaults fqdn\n")
    sudoers.chmod(0o440)
    try:
        yield
    finally:
        hosts.write_text(before)
        sudoers.unlink()
        host.space.run(["umount", *(f"/etc/{name}" for name in files)])


@once
def test_a_host_that_does_not_know_its_own_name_learns_it(
    lab: Lab, client: Client, bare: Gateway, tmp_path: Path
) -> None:
    """Told by setup-host, and by a run whose time real sudo takes."""
    me = Client(lab, bare, secret_data(bare.setup_host("--address", HOST).stdout), tmp_path)
    with without_a_name(bare, tmp_path):
        slow = me.epok("--timeout", "18")
        learn = told(slow, r"does not know its own name: as root on the host run: (echo .*)$")
        assert "lost" not in slow.err and "no answer within --timeout 18 seconds" in slow.err, slow.err
        found = re.search(r"own name, which sudo may wait for: (.*)\n", bare.setup_host("--address", HOST).stderr)
        assert found and found[1] == learn
        types(bare, learn)
        assert "own name" not in bare.setup_host("--address", HOST).stderr
        done = me.epok()
        assert done.status == 0 and "own name" not in done.err, done.err
