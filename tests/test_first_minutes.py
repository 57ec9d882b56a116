"""The errors that a newcomer meets, and that what each says to do takes epok past it.

What can be copied out of a message is copied out and run, by a shell, where the message says.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import epok
from lab.apiserver import ApiServer
from lab.fake_api import FakeApi, write_kubeconfig
from lab.machine import need, stretched, until
from lab.network import EPOK, HOST, Lab, Namespace, bare_environment
from lab.objects import port, service
from lab.sshd import PLACE, USER, Sshd, make_key

once = pytest.mark.parametrize("lab", ["nft"], indirect=True)
MAIL = service("mail", "25:2025", [port(25, 2025)])
PROGRAM = [sys.executable, str(EPOK)]
INSTALL = r"python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
Done = subprocess.CompletedProcess[str]


def message(done: Done, level: str = "error", status: int = 1) -> str:
    """The one line of that level that a run left."""
    assert done.returncode == status, done.stderr
    for line in done.stderr.splitlines():
        assert re.fullmatch(r"(info|warning|error): [ -~]{1,1500}", line), f"{line!r} of {done.stderr}"
    [found] = [line for line in done.stderr.splitlines() if line.startswith(f"{level}: ")]
    return found


def copied(pattern: str, text: str) -> str:
    """What somebody copies out of a message: the group of the pattern."""
    found = re.search(pattern, text)
    assert found, f"not in the message: {pattern}\n{text}"
    return found[1]


# ------------------------------------------------ Python and its packages


def start(*argv: str, **kw: Any) -> Done:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("EPOK_", "KUBE", "PYTHON"))}
    kw["env"] = {**env, **kw.get("env", {})}
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, **kw)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is cloned, and python3 and pip that install without a network: what is here is linked to."""
    for name in ("epok.py", "requirements.txt"):
        shutil.copy(EPOK.parent / name, tmp_path)
    site = f".venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f"""#!/bin/sh -e
        [ "$*" = "-m venv .venv" ]
        "{sys.executable}" -m venv --without-pip .venv
        cat >.venv/bin/pip <<"EOF"
#!/bin/sh -e
[ "$*" = "install -r requirements.txt" ] && [ -s requirements.txt ]
echo "{Path(pytest.__file__).parent.parent}" >{site}/all.pth
EOF
        chmod +x .venv/bin/pip
    """)
    (tmp_path / "bin" / "python3").chmod(0o755)
    (tmp_path / "bin" / "python3.11").symlink_to("python3")
    return tmp_path


def installs(checkout: Path, error: str, pattern: str) -> None:
    """The command in the error makes the next one, which the error gives too, get as far as the options."""
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    done = start("sh", "-ec", copied(pattern, error), cwd=checkout, env={"PATH": path})
    assert done.returncode == 0, done.stderr
    then = start("sh", "-c", copied(r"then (\S+ epok\.py)", error) + " local", cwd=checkout)
    assert "which interfaces" in message(then, status=2)


def test_a_python_of_these_days_can_read_the_file_if_not_run_it() -> None:
    ast.parse(EPOK.read_text(), feature_version=(3, 8))


def test_an_older_python_is_told_how_to_get_a_newer_one(checkout: Path) -> None:
    older = "import runpy, sys; sys.version_info = (3, 9, 2); sys.argv = ['epok.py', 'local'];"
    done = start(sys.executable, "-c", f"{older} runpy.run_path({str(EPOK)!r}, run_name='__main__')")
    error = message(done)
    assert "3.11 or newer, and this is 3.9.2" in error and len(done.stderr.splitlines()) == 1
    assert copied(r"apt-get install (\S+) &&", error) == "python3.11-venv"
    installs(checkout, error, "(" + INSTALL.replace("python3", "python3.11") + ")")


@pytest.mark.parametrize("package, argv", [
    ("docopt", ["-I", "-S"]), ("docopt", []), ("tenacity", []), ("kubernetes", []), ("paramiko", []),
], ids=["all", "docopt", "tenacity", "kubernetes", "paramiko"])  # fmt: skip
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    checkout: Path, package: str, argv: list[str]
) -> None:
    (checkout / "less").mkdir()
    text = f"raise ModuleNotFoundError('No module named {package}', name={package!r})\n"
    (checkout / "less" / f"{package}.py").write_text(text)
    words = ["--clean", "ssh", "--host", "root@192.0.2.1"] if package == "paramiko" else ["-i", "eth0", "local"]
    env = {"PYTHONPATH": str(checkout / "less")}
    if package == "kubernetes":  # which reads the account of a pod
        env["KUBERNETES_SERVICE_HOST"] = "192.0.2.1"
    done = start(sys.executable, *argv, str(EPOK), "--timeout=5", *words, env=env)
    assert f"package {package} is missing" in message(done) and len(done.stderr.splitlines()) == 1
    installs(checkout, done.stderr, f"({INSTALL})")


# ------------------------------------------------ the cluster


class Newcomer:
    """Somebody with an empty home directory, whose name needs quotes in a shell."""

    def __init__(self, lab: Lab, home: Path) -> None:
        self.lab, self.home = lab, home / "it's home"
        self.home.mkdir()
        self.snapshot = self.home / "cluster.json"
        self.snapshot.write_text(json.dumps(lab.cluster(MAIL)))

    def run(self, space: Namespace, *argv: str, check: bool = False, **env: str) -> Done:
        environ = {**bare_environment(), "HOME": str(self.home), **env}
        return space.run(["env", "-C", str(self.home), *argv], check=check, env=environ)

    def local(self, *words: str, through: Sequence[str] = (), seconds: int = 15) -> Done:
        limit = ["--timeout", str(stretched(seconds))]
        return self.run(self.lab.host, *through, *PROGRAM, *limit, *words, "local")

    def with_snapshot(self, *words: str, through: Sequence[str] = ()) -> Done:
        return self.local("--snapshot", str(self.snapshot), *words, through=through)

    def ssh(self, *words: str, user: str = USER) -> Done:
        options = ["--snapshot", str(self.snapshot), "-i", "eth0", "--timeout", str(stretched(15)), "ssh", *words]
        host = [] if "--host" in words else ["--host", f"{user}@{HOST}"]
        return self.run(self.lab.client, *PROGRAM, *options, *host)

    def types(self, command: str, space: "Namespace | None" = None, **env: str) -> str:
        """Runs what a message says in a shell; it must succeed. Returns what it prints."""
        return self.run(space or self.lab.client, "sh", "-ec", command, check=True, **env).stdout


@pytest.fixture
def newcomer(lab: Lab, tmp_path: Path) -> Newcomer:
    return Newcomer(lab, tmp_path)


@pytest.mark.parametrize("words", [[], ["--kubeconfig", "/nowhere/config"]], ids=["none", "a file that is not there"])
@once
def test_without_a_kubeconfig_the_places_where_one_may_be_are_told(newcomer: Newcomer, words: list[str]) -> None:
    error = message(newcomer.local("-i", "eth0", *words))
    assert ".;" not in error and "/etc/kubernetes/admin.conf" in error
    option = copied(r"(--kubeconfig \S+k3s.yaml)", error).split()
    # a copy of /etc, with a cluster in it
    copy = "mkdir -p /run/etc; cp -a /etc/. /run/etc; mount --bind /run/etc /etc; install -D config " + option[1]
    with FakeApi(newcomer.lab.host, *newcomer.lab.node_objects(), MAIL) as api:
        write_kubeconfig(newcomer.home / "config", api.url)
        through = ["unshare", "--mount", "sh", "-ec", f'{copy}; exec "$@"', "sh"]
        assert newcomer.local("-i", "eth0", *option, through=through).returncode == 0


def test_a_kubeconfig_that_root_alone_may_read_is_copied(tmp_path: Path) -> None:
    need("sudo", "apt-get install sudo")
    file = tmp_path / "it's k3s.yaml"
    file.write_text("config")
    with patch("builtins.open", side_effect=PermissionError), pytest.raises(epok.Fatal) as raised:
        epok.read_kubeconfig(str(file))
    advice = str(raised.value)
    command, name = re.findall(r"or: (sudo .*), and give --kubeconfig (\S+)$", advice)[0]
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    assert (tmp_path / name).read_text() == "config"


@once
def test_an_api_server_that_refuses_connections_may_be_on_another_machine(newcomer: Newcomer) -> None:
    """A kubeconfig that was copied from there says 127.0.0.1."""
    with FakeApi(newcomer.lab.host, *newcomer.lab.node_objects(), MAIL) as api:
        config = write_kubeconfig(newcomer.home / "config", api.url.replace("127.0.0.1", "127.0.0.2"))
        words = ["-i", "eth0", "--kubeconfig", config]
        error = message(newcomer.local(*words, seconds=4))
        assert "Connection refused" in error
        newcomer.types(copied(r"(sed -i .*)$", error).replace("ADDRESS", "127.0.0.1"))
        assert newcomer.local(*words).returncode == 0
    write_kubeconfig(newcomer.home / "config", "http://10.0.0.1:6443")
    assert re.search(r"check it with kubectl --kubeconfig .* get nodes$", message(newcomer.local(*words, seconds=4)))


@once
def test_credentials_that_are_not_accepted_are_fetched_anew(newcomer: Newcomer) -> None:
    with FakeApi(newcomer.lab.host, *newcomer.lab.node_objects(), MAIL) as api:
        words = ["-i", "eth0", "--kubeconfig", write_kubeconfig(newcomer.home / "config", api.url, user={"token": "x"})]
        place = copied(r"401 .* copy (\S+) anew", message(newcomer.local(*words)))
        write_kubeconfig(newcomer.home / Path(place).name, api.url)
        newcomer.types(f"cp {Path(place).name} config")
        assert newcomer.local(*words).returncode == 0


@once
def test_a_user_without_permission_gets_it_by_the_commands_in_the_messages(newcomer: Newcomer, tmp_path: Path) -> None:
    server = ApiServer(newcomer.lab.host, tmp_path)
    server.create(*newcomer.lab.node_objects(), service("mail", "25:2025, 26:nope", [port(25, 2025)], policy="Local"))
    server.kubectl("create", "serviceaccount", "newcomer", "-n", "default")
    words = ["-i", "eth0", "--kubeconfig", server.kubeconfig("newcomer", token=server.token("newcomer", "default"))]
    admin = {"KUBECONFIG": server.kubeconfig("admin", certificate=server.admin)}
    admin["PATH"] = f"{Path(server.programs['kubectl']).parent}:{os.environ['PATH']}"
    error = message(newcomer.local(*words))
    assert all(word in error for word in ("403", "list", "services"))
    newcomer.types(copied(r"(kubectl create .*)$", error), newcomer.lab.host, **admin)
    until(lambda: newcomer.local(*words).returncode == 0, "the role counts")
    log = newcomer.local(*words).stderr
    newcomer.types(
        copied(r"warning: .* 403 .*: (kubectl create .*?)(?:; no Events.*)?\n", log), newcomer.lab.host, **admin
    )
    until(lambda: "403" not in newcomer.local(*words).stderr, "the role counts")


@pytest.mark.parametrize("name", ["x; reboot", "$(reboot)", "`reboot`", "x\n", "'"])
def test_a_user_with_a_strange_name_is_in_no_command(name: str) -> None:
    advice = epok.how_to_allow("services", f'services is forbidden: User "{name}" cannot list resource "services"')
    assert advice == "; cron/cronjob.yaml has all that it needs"


# ------------------------------------------------ the machine itself


@once
def test_no_interface_is_told_with_the_command_that_lists_them(newcomer: Newcomer) -> None:
    listed = newcomer.types(copied(r"see (ip .*)$", message(newcomer.with_snapshot(), status=2)), newcomer.lab.host)
    name = copied(rf"(?m)^(\S+?)(?:@\S+)? .*\b{re.escape(HOST)}/", listed)
    assert newcomer.with_snapshot("-i", name).returncode == 0


@once
def test_an_interface_that_is_not_there_is_told_with_those_that_are(newcomer: Newcomer) -> None:
    warning = message(newcomer.with_snapshot("-i", "ens18"), "warning", 0)
    names = copied(r'no interface ens18: give -i those it has, of "(.*)"$', warning).replace(" ", "")
    assert "warning: " not in newcomer.with_snapshot("-i", names).stderr


@once
def test_root_without_the_capability_is_told_what_a_container_needs(newcomer: Newcomer) -> None:
    drop = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
    error = message(newcomer.with_snapshot("-i", "eth0", through=drop))
    assert copied(r"--cap-add (\w+) --network host$", error).lower() == "net_admin"
    assert newcomer.with_snapshot("-i", "eth0").returncode == 0


# ------------------------------------------------ SSH and sudo


@pytest.fixture
def server(server: Sshd) -> Sshd:
    server.reset()
    server.authorize()
    return server


def friend(newcomer: Newcomer, server: Sshd) -> list[str]:
    """Options of somebody who knows the host and may log in."""
    key = make_key(newcomer.home / "key", "ed25519")
    server.authorize(key.with_suffix(".pub").read_text().strip())
    (newcomer.home / "known").write_text(f"{HOST} {server.host_key()}\n")
    return ["--known-hosts", str(newcomer.home / "known"), "--key", str(key)]


@once
def test_who_has_nothing_gets_in_by_doing_what_the_messages_say(newcomer: Newcomer, server: Sshd) -> None:
    words = ["--key", str(newcomer.home / "keys" / "epok")]
    error = message(newcomer.ssh(*words))
    assert "no such file" in error
    newcomer.types(copied(r", or: (.*)$", error))

    error = message(newcomer.ssh(*words))
    assert "unknown" in error
    same = (
        f"mkdir {PLACE}/ssh; for kind in rsa ecdsa ed25519; do cp {PLACE}/host_$kind.pub {PLACE}/ssh/ssh_host_${{kind}}"
    )
    same += f"_key.pub; done; mount --bind {PLACE}/ssh /etc/ssh; {copied(r'(ssh-keygen -lf [^ ,]+)', error)}"
    fingerprint = copied(r"(SHA256:\S+)", error)
    assert fingerprint in newcomer.run(server.space, "unshare", "--mount", "sh", "-ec", same, check=True).stdout
    newcomer.types(copied(r"run: (.*)$", error))

    assert "is refused" in message(newcomer.ssh(*words))  # where that leads is in test_advice.py
    server.authorize((newcomer.home / "keys" / "epok.pub").read_text().strip())

    error = message(newcomer.ssh(*words))
    assert "a password is required" in error
    server.sudoers(copied(r"run visudo -f /etc/sudoers\.d/epok and add: (.*)$", error))
    server.space.run(["visudo", "-c", "-q"])
    done = newcomer.ssh(*words)
    assert done.returncode == 0 and "now forwarding tcp/25" in done.stderr, done.stderr


@once
def test_who_has_no_key_or_a_locked_one_is_told_how_to_get_a_good_one(newcomer: Newcomer, server: Sshd) -> None:
    known = friend(newcomer, server)[:2]
    command = copied(r"give one with --key; .*or: (.*)$", message(newcomer.ssh(*known)))
    newcomer.types(command)
    key = ["--key", newcomer.types(f"printf %s {copied(r' -f (.*)$', command)}")]
    assert "is refused" in message(newcomer.ssh(*key, *known))
    newcomer.types(f"{command.replace('-q', '-qp')} -P '' -N secret".replace("-t ed25519 -N ''", ""))
    newcomer.types(copied(r"take it away: (.*), or", message(newcomer.ssh(*key, *known))) + " -P secret")
    assert "is refused" in message(newcomer.ssh(*key, *known))


@pytest.mark.parametrize("number, name", [(22, HOST), (2222, f"[{HOST}]:2222")], ids=["22", "2222"])
@once
def test_a_host_that_was_reinstalled_gets_its_new_line(
    newcomer: Newcomer, server: Sshd, number: int, name: str
) -> None:
    words = [*friend(newcomer, server), "--port", str(number)]
    stranger = make_key(newcomer.home / "stranger", "ed25519").with_suffix(".pub").read_text()
    (newcomer.home / "known").write_text(f"elsewhere {stranger}{name} {stranger}")
    error = message(newcomer.ssh(*words, user="root"))
    assert "only if the host was reinstalled" in error and "ssh-keygen -lf" in error
    newcomer.types(copied(r"run: (.*)$", error))
    left = (newcomer.home / "known").read_text()
    assert f"elsewhere {stranger}" in left and f"{name} {stranger}" not in left
    assert newcomer.ssh(*words, user="root").returncode == 0


@once
def test_tools_that_the_host_lacks_are_told_one_after_the_other(newcomer: Newcomer, server: Sshd) -> None:
    words = friend(newcomer, server)
    server.misbehave('PATH=/nonexistent exec /bin/bash -c "$SSH_ORIGINAL_COMMAND"')
    done = newcomer.ssh(*words)
    assert message(done).endswith(": apt-get install sudo"), "and nothing that gives the key all of root's rights"
    assert "apt-get install iproute2" in message(done, "warning")
    assert message(newcomer.ssh(*words, user="root")).endswith(": apt-get install iptables")
    server.reset()
    assert "warning: " not in newcomer.ssh(*words, user="root").stderr


# Python, the checkout and the folder of the tests may well be in a home directory that is closed to others.
SOMEBODY = ["setpriv", "--reuid", "64321", "--regid", "64321", "--clear-groups"]
SOMEBODY += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
WITHOUT_SUDO = """mkdir -p /run/whole /run/less; mount --bind /usr/bin /run/whole; ln -sf /run/whole/* /run/less
rm /run/less/sudo; mount --bind /run/less /usr/bin; exec "$@" """


@once
def test_who_is_not_root_on_the_machine_itself_runs_it_by_sudo(newcomer: Newcomer, server: Sshd) -> None:
    server.sudoers(f"{USER} ALL=(ALL) ALL")
    error = message(newcomer.with_snapshot("-i", "eth0", through=SOMEBODY))
    assert "a password is required" in error
    command, line = re.findall(r"run epok as root: (sudo -E .*); or as root .* and add: (.*)$", error)[0]
    server.sudoers(f"{USER} ALL=(ALL) NOPASSWD: ALL")  # for who would type a password
    done = newcomer.run(newcomer.lab.host, *SOMEBODY, "sh", "-c", command)
    assert done.returncode == 0 and "now forwarding tcp/25" in done.stderr, done.stderr
    server.sudoers(line)
    assert newcomer.with_snapshot("-i", "eth0", through=SOMEBODY).returncode == 0


@once
def test_who_is_not_root_on_a_machine_without_sudo_runs_it_by_su(newcomer: Newcomer, server: Sshd) -> None:
    hidden = ["unshare", "--mount", "sh", "-ec", WITHOUT_SUDO, "sh"]
    error = message(newcomer.with_snapshot("-i", "eth0", through=[*hidden, *SOMEBODY]))
    command = copied(r"apt-get install sudo, or run epok as root: (su -c .*)$", error)
    done = newcomer.run(newcomer.lab.host, *hidden, "sh", "-c", command)  # root types no password
    assert done.returncode == 0 and "now forwarding tcp/25" in done.stderr, done.stderr
