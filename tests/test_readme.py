"""Every shell block of README.md, run as its reader would: on the lab's host, or where kubectl and docker work.

There are no controllers and no kubelet, so a test plays them (`Controllers`, `run_job`, `kubectl logs`), and no docker
engine: `docker` is a script that calls buildah.
"""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.apiserver import ApiServer
from lab.container import ACCOUNT, API, Container, Store, secret_volume, service_account
from lab.gateway import OLDER_RULE, Gateway
from lab.machine import BACKENDS, need, until
from lab.manifests import environment
from lab.network import EPOK, HOST, Lab
from lab.objects import Object, port, service
from lab.readme import BLOCKS, CLUSTER, OLDER, README, UPGRADE, copy_checkout
from lab.sshd import make_key

pytestmark = [pytest.mark.long, pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)]

SECRET = "/api/v1/namespaces/epok/secrets/epok-ssh"
RAN: set[tuple[str, int]] = set()
TIMER = "On the host, every minute, by systemd"
HAND = "By hand"
DEVELOPERS = "For developers"
BROKEN = "When it does not work"
MAIL = service("mail", "25:2025", [port(25, 2025, "smtp")])


class World:
    """The host, the cluster, and a person with a clone of this repository who reads the README."""

    def __init__(self, lab: Lab, store: Store, folder: Path) -> None:
        self.lab, self.store, self.folder = lab, store, folder
        self.gateway = Gateway(lab.host)
        self.server = ApiServer(lab.host, folder)
        self.server.create(*lab.node_objects(), MAIL)
        self.home, self.clone, self.tools = folder / "home", folder / "clone", folder / "tools"
        for made in (self.home / ".kube", self.home / ".ssh", self.tools):
            made.mkdir(parents=True)
        self.config = self.server.kubectl("config", "view", "--flatten", "--raw")
        (self.home / ".kube" / "config").write_text(self.config)
        copy_checkout(self.clone)
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.tool("kubectl", self.kubectl())
        self.tool("docker", self.docker())
        # nothing is booted here, so nothing can be started; that the units work is test_units.py's
        drop_now = 'for word; do shift; [ "$word" = --now ] || set -- "$@" "$word"; done'
        self.tool(
            "systemctl", f'{drop_now}\nSYSTEMD_OFFLINE=1 exec {need("systemctl", "apt-get install systemd")} "$@"'
        )
        self.wheels = self.download()

    def tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / name).chmod(0o755)

    def kubectl(self) -> str:
        """The real one, but for logs, which are the kubelet's."""
        return f"""case "$*" in
"logs -n epok -l app.kubernetes.io/name=epok") cat {self.logs}/* ;;
"logs -n epok job/"*) cat "{self.logs}/${{4#job/}}" ;;
*) exec {self.server.programs["kubectl"]} "$@" ;;
esac"""

    def docker(self) -> str:
        """docker build and docker push, in the machine's own network, for pip."""
        here = f"nsenter --net=/proc/{os.getpid()}/ns/net env TMPDIR={self.store.folder}"
        return f"""case $1 in
build) shift; exec {here} {shlex.join(self.store.command("build", *self.store.how()))} "$@" ;;
push) exec {here} {shlex.join(self.store.command("push", "--quiet"))} "$2" dir:{self.folder}/registry ;;
*) exit 1 ;;
esac"""

    def download(self) -> Path:
        """The packages, since there is no index in the lab's network."""
        wheels = self.folder / "wheels"
        argv = [sys.executable, "-m", "pip", "download", "-q", "-r", "requirements.txt", "-d", str(wheels)]
        subprocess.run(argv, cwd=EPOK.parent, check=True)
        return wheels

    def read(self, heading: str, number: int) -> str:
        """Run a block where its first line says, and return what it printed. It must succeed."""
        where, _, script = BLOCKS[heading, number].partition("\n")
        place = "/opt/epok" if where.endswith("that is /opt/epok") else str(self.clone)
        argv = self.person(where, "sh", "-euc", f"cd {place}\n{script}")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{script}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
        RAN.add((heading, number))
        return done.stdout + done.stderr

    def person(self, where: str, *argv: str) -> list[str]:
        """The argv that runs another where a block's first line says, in the person's environment."""
        assert re.match("# (on the host|where kubectl works|in a clone)", where), where
        path = os.pathsep.join((str(self.tools), os.environ["PATH"]))
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environ = {"PATH": path, "HOME": str(self.home), **pip}
        shell = ["env", "-i", *(f"{k}={v}" for k, v in environ.items()), *argv]
        network = ["nsenter", f"--net=/proc/{self.lab.host.pid}/ns/net"]
        return self.lab.host.command(shell) if where.startswith("# on the host") else [*network, *shell]

    def paste(self, block: str, *shell: str) -> tuple[int, list[str]]:
        """A block pasted into an interactive shell: its exit status, and what it printed. The shell lives on."""
        lines = f'cd {self.clone}\n{block}\necho "left $?"\nfalse\necho and goes on\n'
        argv = self.person(block, "env", "PS1=", "PS2=", *shell, "-i")
        # without a terminal, which such a shell would take from the one that runs the tests
        done = subprocess.run(argv, input=lines, capture_output=True, text=True, timeout=3600, start_new_session=True)
        printed, left, status = done.stdout.partition("\nleft ")
        assert left and status.endswith("\nand goes on\n"), done.stdout + done.stderr
        return int(status.split()[0]), (printed + "\n" + done.stderr).splitlines()

    def now(self, name: str) -> str:
        """A run of the CronJob that does not wait for the minute, as a Job of that name; returns its log."""
        self.server.kubectl("create", "job", "-n", "epok", "--from=cronjob/epok", name)
        done = self.run_job("epok", name)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    def run_job(self, namespace: str, name: str) -> "subprocess.CompletedProcess[str]":
        """What the kubelet and the Job's controller do; returns the container that is done."""
        path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{name}"
        pod = self.server.request("GET", path)["spec"]["template"]
        done = self.run_pod(namespace, pod["spec"])
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "epok"
        (self.logs / name).write_text(done.stdout + done.stderr)
        now = "2024-01-01T00:00:00Z"
        kinds = ("FailureTarget", "Failed") if done.returncode else ("SuccessCriteriaMet", "Complete")
        ends = [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds]
        count = {"failed": 1} if done.returncode else {"succeeded": 1, "completionTime": now}
        status = {**count, "startTime": now, "conditions": ends, "uncountedTerminatedPods": {}}
        self.server.patch(f"{path}/status", status=status)
        return done

    def run_pod(self, namespace: str, pod: Object) -> "subprocess.CompletedProcess[str]":
        [spec] = pod["containers"]
        stored = self.server.request("GET", f"/api/v1/namespaces/{namespace}/secrets/epok-ssh")["data"]
        secret = {key: base64.b64decode(value) for key, value in stored.items()}
        env = API | environment(spec, {key: value.decode() for key, value in secret.items()})
        volume = pod["volumes"][0]["name"]
        [mount] = [one for one in spec["volumeMounts"] if one["name"] == volume]
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        account = service_account(folder / "account", self.server, namespace)
        volumes = {mount["mountPath"]: secret_volume(folder / "secret", secret), ACCOUNT: account}
        container = Container(self.store.image(spec["image"]), volumes, env)
        return self.lab.host.run(container.argv(*spec["args"]), check=False)

    def start_run(self, name: str) -> None:
        """A run of the CronJob that has a pod, and gets no further."""
        self.server.kubectl("create", "job", "-n", "epok", "--from=cronjob/epok", name)
        job = self.server.request("GET", f"/apis/batch/v1/namespaces/epok/jobs/{name}")
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        made = job["spec"]["template"]
        metadata = {**made["metadata"], "name": name, "ownerReferences": [owner]}
        pod = {"metadata": metadata, "spec": {**made["spec"], "nodeName": "node1"}}
        self.server.request("POST", "/api/v1/namespaces/epok/pods", pod)

    def forwards(self) -> bool:
        try:
            return self.lab.ask(25).port == 2025
        except ConnectionRefusedError:
            return False


class Controllers:
    """Meanwhile, in a namespace: Jobs are run and deleted, pods end when they shall, and so does the namespace.

    A run that was started ends its work before its pod ends; on a dead node the pod never ends.
    """

    def __init__(self, world: World, namespace: str, dead: str = "") -> None:
        self.world, self.namespace, self.dead = world, namespace, dead
        self.ran: list[str] = []
        self.left = threading.Event()
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self.play)

    def __enter__(self) -> "Controllers":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()
        self.thread.join()
        assert not self.errors, self.errors

    def play(self) -> None:
        try:
            while not self.left.wait(0.1):
                if self.step():
                    return
        except BaseException as error:
            self.errors.append(error)

    def step(self) -> bool:
        """Whatever is to be done now; whether the namespace has ended."""
        request, place = self.world.server.request, f"/api/v1/namespaces/{self.namespace}"
        batch = f"/apis/batch/v1/namespaces/{self.namespace}"
        if "deletionTimestamp" in request("GET", place)["metadata"]:
            for kind in (f"{batch}/cronjobs", f"{batch}/jobs", f"{place}/secrets", f"{place}/serviceaccounts"):
                request("DELETE", f"{kind}?propagationPolicy=Background")
            request("PUT", f"{place}/finalize", {"metadata": {"name": self.namespace}, "spec": {}})
            return True
        owners = set()
        for pod in request("GET", f"{place}/pods")["items"]:
            name = pod["metadata"]["name"]
            owners.add(pod["metadata"]["ownerReferences"][0]["name"])
            if "deletionTimestamp" in pod["metadata"] and name != self.dead:
                self.ran.append(name)
                done = self.world.run_pod(self.namespace, pod["spec"])
                assert done.returncode == 0, done.stderr
                self.world.server.patch(f"{place}/pods/{name}", metadata={"finalizers": None})
                request("DELETE", f"{place}/pods/{name}?gracePeriodSeconds=0")
        for job in request("GET", f"{batch}/jobs")["items"]:
            name = job["metadata"]["name"]
            if "deletionTimestamp" in job["metadata"] and name not in owners:
                self.world.server.patch(f"{batch}/jobs/{name}", metadata={"finalizers": None})
            elif "conditions" not in job["status"] and name not in owners:
                self.ran.append(name)
                self.world.run_job(self.namespace, name)
        return False


@pytest.fixture(scope="module")
def world(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    need("envsubst", "apt-get install gettext-base")
    need("buildah", "apt-get install buildah")
    folder = tmp_path_factory.mktemp("readme")
    with Store() as store:
        yield World(lab, store, folder)


def test_try_it(world: World) -> None:
    shown = world.read("Try it", 0)
    assert "port 25 is closed again" in shown
    assert re.search(r"tcp/25  default/mail:smtp +2025 +3  hidden +[1-9]", shown)


def test_all_tests_are_what_ci_runs(world: World) -> None:
    """This very test is run by it."""
    command = BLOCKS["Try it", 1].splitlines()[-1]
    assert command in (EPOK.parent / ".ci" / "run").read_text().split()
    RAN.add(("Try it", 1))


def test_in_the_cluster(world: World) -> None:
    world.read(CLUSTER, 0)
    world.read(CLUSTER, 1)
    key_is_nowhere_else(world)
    assert "now forwarding tcp/25" in world.now("first")
    assert world.forwards()
    head, epok, line, *_ = world.read(CLUSTER, 2).splitlines()
    assert epok.startswith("epok   * * * * *   <none>     False ")
    line = line.replace("10.0.0.1", HOST).replace("2025", "30025")
    assert f"\n{head}\n" in README and f"\n{line}\n" in README

    key = make_key(world.home / ".ssh" / "epok", "ed25519")
    shown = world.gateway.setup_host("--address", HOST, "--public-key", f"{key}.pub").stdout
    (world.home / ".ssh" / "epok_known_hosts").write_text(shown)
    world.server.kubectl("delete", "secret", "-n", "epok", "epok-ssh")
    world.read(CLUSTER, 3)
    assert "in sync" in world.now("second")

    assert world.read(CLUSTER, 4).count(" unchanged\n") == 4


def key_is_nowhere_else(world: World) -> None:
    """Than where the Secret has it."""
    stored = world.server.request("GET", SECRET)
    key = stored["data"].pop("id_rsa")
    assert "annotations" not in stored["metadata"] and stored["metadata"]["managedFields"]
    for line in base64.b64decode(key).decode().splitlines():
        assert line not in json.dumps(stored)
    assert key not in json.dumps(stored)


def test_looking_in_the_cluster(world: World) -> None:
    """The Jobs are none of the CronJob's, which would delete them with its own."""
    world.now("to-look-at")
    with Controllers(world, "epok") as played:
        shown = world.read(BROKEN, 1)
    assert played.ran == ["look", "look"]
    status = r"epok@192.0.2.1: iptables .*\nPORT .*\ntcp/25  default/mail:smtp +2025 +3  hidden +[0-9]+\n"
    assert re.search(status, shown)
    assert re.search(r"\ndefault/mail on epok@192.0.2.1\n(.*\n)+Most likely: ", shown)
    job = world.server.request("GET", "/apis/batch/v1/namespaces/epok/jobs/look")
    assert "ownerReferences" not in job["metadata"]
    other = world.server.request("GET", "/apis/batch/v1/namespaces/epok/jobs/to-look-at")
    assert other["metadata"]["ownerReferences"][0]["kind"] == "CronJob"


def test_upgrade_with_another_key(world: World) -> None:
    old = world.server.request("GET", SECRET)["data"]["id_rsa"]
    applied = {"kubectl.kubernetes.io/last-applied-configuration": old}
    world.server.patch(SECRET, metadata={"annotations": applied})
    world.lab.host.run(["rm", "-f", "/etc/epok/id_ed25519"])
    world.read(UPGRADE, 0)
    world.tool("docker", ":")  # that image was built above
    world.read(UPGRADE, 1)
    assert world.server.request("GET", SECRET)["data"]["id_rsa"] != old
    key_is_nowhere_else(world)
    assert not (world.clone / "epok-ssh.yaml").exists()
    assert "now forwarding tcp/25" in world.now("third")


def installed(world: World) -> set[str]:
    """What there is of epok's in the cluster, but for Jobs and pods."""
    kinds = "ns,cronjob,secret,sa,clusterrole,clusterrolebinding"
    listed = world.server.kubectl("get", kinds, "-A", "--ignore-not-found", "-o", "name").splitlines()
    return {name for name in listed if re.search(r"/epok(-ssh)?$", name)}


def said(lines: list[str]) -> str:
    """The one line of the uninstall block's own."""
    [line] = [line for line in lines if "epok is not uninstalled: " in line]
    assert line.endswith("; then paste this again"), line
    return line


BASH = ("bash", "--norc", "--noprofile", "--noediting")
SHELLS = pytest.mark.parametrize("shell", [BASH, ("dash",)], ids=["bash", "dash"])


@SHELLS
def test_uninstall_deletes_nothing_when_the_host_cannot_be_cleaned(world: World, shell: tuple[str, ...]) -> None:
    kubectl = world.server.kubectl
    world.now(f"before-{shell[0]}")
    kubectl("set", "env", "-n", "epok", "cronjob/epok", "EPOK_TIMEOUT=5")
    before = installed(world)
    assert len(before) == 6
    world.server.patch(SECRET, stringData={"ssh_port": "1"})
    for _ in range(2):
        begun = time.monotonic()
        with Controllers(world, "epok") as played:
            status, lines = world.paste(BLOCKS["Uninstall", 0].replace("--timeout=2m", "--timeout=30m"), *shell)
        assert time.monotonic() - begun < 1200, "the failure was not noticed"
        assert status == 1 and played.ran == ["clean"], lines
        assert "kubectl logs -n epok job/clean" in said(lines)
        assert installed(world) == before and world.forwards()
        assert kubectl("get", "cronjob", "-n", "epok", "epok", "-o", "jsonpath={.spec.suspend}") == "true"
    world.server.patch(SECRET, stringData={"ssh_port": "22"})
    kubectl("set", "env", "-n", "epok", "cronjob/epok", "EPOK_TIMEOUT-")


def test_uninstall_goes_no_further_than_a_pod_on_a_dead_node(world: World) -> None:
    world.start_run("dead")
    before = installed(world)
    quick = BLOCKS["Uninstall", 0].replace("--timeout=2m ||", "--timeout=5s ||")
    with Controllers(world, "epok", dead="dead") as played:
        status, lines = world.paste(quick, *BASH)
        assert status == 1 and played.ran == [] and installed(world) == before, lines
        [force] = re.findall("kubectl delete pods [^;]*", said(lines))
        status, lines = world.paste(f"# where kubectl works\n{force}", "dash")
        assert status == 0, lines
        jobs = "/apis/batch/v1/namespaces/epok/jobs"
        until(lambda: not world.server.request("GET", jobs)["items"], "the Job of the dead node's pod ends", 60)


def test_out_of_the_cluster_again(world: World) -> None:
    """While a run is under way, which puts the rules back as it ends."""
    world.start_run("underway")
    with Controllers(world, "epok") as played:
        world.read("Uninstall", 0)
    assert played.ran == ["underway", "clean"]
    assert not world.forwards() and "EPOK" not in world.lab.saved() + world.lab.saved(6)
    assert installed(world) == set()
    world.read("Uninstall", 1)
    assert "epok" not in world.lab.host.run(["cat", "/etc/passwd"]).stdout


def test_by_systemd(world: World) -> None:
    host = world.lab.host
    copy_checkout(world.gateway.root / "opt" / "epok")
    host.run(["mkdir", "-p", "/etc/rancher/k3s"])
    host.run(["sh", "-c", "cat >/etc/rancher/k3s/k3s.yaml"], world.config)
    world.read(TIMER, 0)
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

    world.read("Uninstall", 2)
    assert not world.forwards()
    left = host.run(["sh", "-c", "ls -d /etc/epok; find /etc/systemd -name 'epok*'"], check=False).stdout
    assert left == ""


def test_by_hand(world: World) -> None:
    world.gateway.setup_host("--remove")
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
    assert "Most likely: nothing that can be seen from here: connections come in" in shown
    world.read("Uninstall", 3)
    assert not world.forwards()
    world.gateway.setup_host("--remove")


def test_coming_from_the_older_epok(world: World) -> None:
    host, kubectl = world.lab.host, world.server.kubectl
    world.lab.flush()
    host.run(["useradd", "--create-home", "epok"])
    sudoers = "%epok ALL=(ALL) NOPASSWD: /usr/sbin/iptables, /usr/sbin/iptables-save"
    host.run(["sh", "-c", "cat >/etc/sudoers.d/epok"], sudoers)
    host.run(["iptables-restore", "-n"], f"*nat\n{OLDER_RULE}COMMIT\n")
    kubectl("create", "ns", "epok")
    kubectl("create", "secret", "-n", "epok", "generic", "epok-ssh", "--from-literal=ssh_host=10.0.0.1")
    kubectl("create", "deployment", "-n", "epok", "epok", "--image=epok")
    world.read(OLDER, 0)
    world.read(OLDER, 1)
    assert kubectl("get", "deployments", "-n", "epok", "-o", "name") == ""
    before = world.lab.saved()
    log = world.now("fourth")
    both = world.lab.saved()
    assert "now forwarding tcp/25" in log
    assert both.count("epok_rule_id") == before.count("epok_rule_id") == 1
    _, _, command = BLOCKS[OLDER, 2].partition("\n")
    assert f"as root on the host: {' '.join(command.split())}\n" in log
    world.read(OLDER, 2)
    assert world.lab.saved() == "".join(line for line in both.splitlines(True) if "epok_rule_id" not in line)
    assert world.forwards()


def test_the_whole_proof_is_found(world: World) -> None:
    """It takes hours."""
    command = BLOCKS[DEVELOPERS, 0].splitlines()[-1]
    done = subprocess.run(["sh", "-euc", f"{command} --collect-only"], cwd=EPOK.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Counter(re.findall(r"(?m)^tests/test_(\w+)\.py::", done.stdout))
    assert found.keys() >= {"kill", "cluster", "iptables", "ssh", "fuzz", "neighbours", "versions", "soak"}
    assert found["cluster"] > 25
    RAN.add((DEVELOPERS, 0))


def test_what_a_run_costs(world: World) -> None:
    """The whole of it takes minutes."""
    script = BLOCKS[DEVELOPERS, 1].replace(".venv/bin/python", f"{sys.executable} -B")
    quick = {**os.environ, "EPOK_BENCH": "10"}
    done = subprocess.run(["sh", "-euc", script], cwd=EPOK.parent, env=quick, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(?m)^# (\w+)$", done.stdout) == ["path", "runs", "nodes", "stages", "swaps"]
    assert re.findall(r"(?m)^failed connections in \d+ swaps +(\w+) +0 ", done.stdout) == list(BACKENDS)
    assert " MB  " in done.stdout and " outside " in done.stdout
    RAN.add((DEVELOPERS, 1))


def test_every_shell_block_was_run(world: World) -> None:
    """By the tests above; alone, this one fails."""
    assert set(BLOCKS) == RAN
    assert README.count("```sh\n") == len(BLOCKS)
