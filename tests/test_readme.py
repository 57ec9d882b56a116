"""Every shell block of README.md, run as its reader would, but for those that need a cluster: test_real_cluster.py."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lab.apiserver import ApiServer
from lab.gateway import Gateway
from lab.machine import BACKENDS, need
from lab.network import EPOK, HOST, Lab
from lab.objects import port, service
from lab.readme import BLOCKS, BROKEN, DEVELOPERS, HAND, IN_CLUSTER, README, TIMER, UNINSTALL, Reader, copy_checkout
from lab.sshd import make_key

pytestmark = [pytest.mark.long, pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)]

MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")])


class World:
    """The host, the cluster, and a person with a clone of this repository who reads the README."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.gateway = Gateway(lab.host)
        self.server = ApiServer(lab.host, folder)
        self.server.create(*lab.node_objects(), MAIL)
        self.config = self.server.kubectl("config", "view", "--flatten", "--raw")
        self.reader = Reader(lab.host, lab.host, folder, self.server.programs["kubectl"], self.config)
        self.read, self.home = self.reader.read, self.reader.home
        # nothing is booted here, so nothing can be started; that the units work is test_units.py's
        drop_now = 'for word; do shift; [ "$word" = --now ] || set -- "$@" "$word"; done'
        systemctl = need("systemctl", "apt-get install systemd")
        self.reader.tool("systemctl", f'{drop_now}\nSYSTEMD_OFFLINE=1 exec {systemctl} "$@"')
        # there is no index in the lab's network
        wheels = folder / "wheels"
        argv = [sys.executable, "-m", "pip", "download", "-q", "-r", "requirements.txt", "-d", str(wheels)]
        subprocess.run(argv, cwd=EPOK.parent, check=True)
        self.reader.environ = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def has_a_small_role(self, file: str) -> None:
        """It is root's alone, its account may do what epok does and no more, and it is the same when made again."""
        host = self.lab.host
        asked = ("list nodes", "create events", "get secrets", "list secrets", "create pods", "patch services")
        may = [["--kubeconfig", file, "auth", "can-i", *words.split(), "-A"] for words in asked]
        said = [host.run([self.server.programs["kubectl"], *words], check=False).stdout.strip() for words in may]
        assert said == ["yes"] * 2 + ["no"] * 4
        assert host.run(["stat", "-c", "%a %u", file]).stdout == "600 0\n"
        before = host.run(["cat", file]).stdout
        host.run(["ln", "-sf", "/etc/passwd", file])  # no link is followed
        again = self.reader.shell(f"# on the host, as root, in a clone\ncron/kubeconfig {file}")
        assert host.run(["cat", file]).stdout == before and again.count("unchanged") == 4, again

    def forwards(self) -> bool:
        try:
            return self.lab.ask(25).port == 2025
        except ConnectionRefusedError:
            return False


@pytest.fixture(scope="module")
def world(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(lab, tmp_path_factory.mktemp("readme"))


def test_try_it(world: World) -> None:
    shown = world.read("Try it", 0)
    assert "port 25 is closed again" in shown
    assert re.search(r"tcp/25  default/mail:smtp +2025 +3  hidden +[1-9]", shown)


def test_all_tests_are_what_ci_runs(world: World) -> None:
    """This very test is run by it."""
    command = BLOCKS["Try it", 1].splitlines()[-1]
    assert command in (EPOK.parent / ".ci" / "run").read_text().split()
    world.reader.ran.add(("Try it", 1))


def test_by_systemd(world: World) -> None:
    host = world.lab.host
    copy_checkout(world.gateway.root / "opt" / "epok")
    world.server.fill_tokens()
    world.read(TIMER, 0)
    world.has_a_small_role("/etc/epok/kubeconfig")
    wanted = host.run(["readlink", "-f", "/etc/systemd/system/timers.target.wants/epok.timer"]).stdout
    assert wanted == "/etc/systemd/system/epok.timer\n"
    # what the unit runs, with what it is given; that systemd does so is test_units.py's
    unit = host.run(["cat", "/etc/systemd/system/epok.service"]).stdout
    [command] = re.findall(r"(?m)^ExecStart=(.*)$", unit)
    [file] = re.findall(r"(?m)^EnvironmentFile=(.*)$", unit)
    [kubeconfig] = re.findall(r"(?m)^LoadCredential=kubeconfig:(.*)$", unit)
    done = host.run(["sh", "-euc", f"set -a; . {file}; KUBECONFIG={kubeconfig} {command}"])
    assert "now forwarding tcp/25" in done.stderr and world.forwards()

    world.read(TIMER, 1)
    timer = host.run(["cat", "/etc/systemd/system/epok.timer"]).stdout
    [often] = re.findall("(?m)^OnCalendar=(.*)$", timer)
    analyze = need("systemd-analyze", "apt-get install systemd")
    when = host.run([analyze, "calendar", "--iterations=3", often]).stdout
    assert len(set(re.findall(r":([0-5])\d(?:\.0+)? UTC", when))) == 3, when

    world.read(UNINSTALL, 2)
    assert not world.forwards()
    left = host.run(["sh", "-c", "ls -d /etc/epok; find /etc/systemd -name 'epok*'"], check=False).stdout
    assert left == ""


def test_by_hand(world: World) -> None:
    key = make_key(world.home / ".ssh" / "hand", "ed25519")
    shown = world.gateway.setup_host("--address", HOST, "--public-key", f"{key}.pub").stdout
    key.replace(world.home / ".ssh" / "epok")
    (world.home / ".ssh" / "epok_known_hosts").write_text(shown)
    world.read(HAND, 0)
    assert "now forwarding tcp/25" in world.read(HAND, 1)
    assert world.forwards()
    assert "in sync" in world.read(HAND, 2)
    shown = world.read(BROKEN, 0)
    assert "default/mail:smtp" in shown and "hooks in place" in shown
    assert "Most likely: it works as far as can be seen from here: " in shown
    world.read(UNINSTALL, 3)
    assert not world.forwards()
    world.gateway.setup_host("--remove")


def test_the_whole_proof_is_found(world: World) -> None:
    """It takes hours."""
    command = BLOCKS[DEVELOPERS, 0].splitlines()[-1]
    done = subprocess.run(["sh", "-euc", f"{command} --collect-only"], cwd=EPOK.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Counter(re.findall(r"(?m)^tests/test_(\w+)\.py::", done.stdout))
    assert found.keys() >= {"kill", "cluster", "iptables", "ssh", "fuzz", "neighbours", "versions", "soak"}
    assert found["cluster"] > 25
    world.reader.ran.add((DEVELOPERS, 0))


def test_what_a_run_costs(world: World) -> None:
    """The whole of it takes minutes."""
    script = BLOCKS[DEVELOPERS, 1].replace(".venv/bin/python", f"{sys.executable} -B")
    quick = {**os.environ, "EPOK_BENCH": "10"}
    done = subprocess.run(["sh", "-euc", script], cwd=EPOK.parent, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(?m)^# (\w+)$", done.stdout) == ["path", "runs", "memory", "nodes", "stages", "swaps"]
    assert re.findall(r"(?m)^failed connections in \d+ swaps +(\w+) +0 ", done.stdout) == list(BACKENDS)
    assert " MB  " in done.stdout and " outside " in done.stdout
    world.reader.ran.add((DEVELOPERS, 1))


def test_every_shell_block_was_run(world: World) -> None:
    """By the tests above; alone, this one fails."""
    assert set(BLOCKS) == world.reader.ran | IN_CLUSTER
    assert README.count("```sh\n") == len(BLOCKS)
