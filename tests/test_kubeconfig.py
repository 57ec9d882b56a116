"""Which cluster, as whom, and by which way: the same kubeconfigs and environment to kubectl and to epok.

Both reach the same cluster as the same user, or neither does. With a real kube-apiserver, tinyproxy and microsocks.
"""

import base64
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import epok
from conftest import Tally, often
from lab.apiserver import ADDRESS, PORT, ApiServer
from lab.authority import Authority
from lab.fake_api import FakeApi
from lab.machine import need, need_lab, stretched, until
from lab.network import EPOK, Namespace

Object = dict[str, Any]
ELSEWHERE = "10.9.0.1"  # also the server's; no proxy is asked for loopback addresses
NAME = "api.cluster.example"
TWO, DEAD = "two.cluster.example", "10.9.1.1"  # a name of the server, and its first address, which drops all packets
# Asks the cluster who it takes us for; runs in the network of the server, once for all tests.
ASKER = f"""
import json, os, sys, time
sys.path.insert(0, {str(EPOK.parent)!r})
import epok
PATH = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
BODY = {{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}}
print("ready", flush=True)
for line in sys.stdin:
    question = json.loads(line)
    os.environ.clear()
    os.environ.update(question["env"])
    start = time.monotonic()
    try:
        options = epok.parse_options(["-i", "eth0", *question["args"], "local"], os.environ)
        deadline = epok.Deadline(question["seconds"])
        cluster = epok.Cluster(options, deadline)
        reply = epok.persist(deadline, cluster.request, "POST", PATH, deadline, BODY)
        if reply.status == 201:
            answer = {{"who": json.loads(reply.data)["status"]["userInfo"]}}
        else:
            answer = {{"error": str(cluster.refusal(reply, "create", "selfsubjectreviews"))}}
    except epok.Fatal as error:
        answer = {{"error": str(error)}}
    except BaseException as error:
        answer = {{"error": f"TRACEBACK {{error!r}}"}}
    print(json.dumps({{**answer, "seconds": time.monotonic() - start}}), flush=True)
"""


class Ground:
    """A real API server, at a loopback address and at another; what kubectl and epok say of a kubeconfig."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ELSEWHERE} {NAME}\n{DEAD} {TWO}\n{ELSEWHERE} {TWO}\n")
        setup = f"""
            mount --bind {folder}/hosts /etc/hosts
            ip link set lo up
            ip addr add {DEAD}/32 dev lo
            ip addr add {ELSEWHERE}/32 dev lo
            iptables-nft -A INPUT -d {DEAD} -j DROP
        """
        self.space = Namespace("kubeconfig", setup)
        self.server = ApiServer(self.space, folder, names=[NAME, TWO], addresses=[ELSEWHERE])
        self.kubectl = self.server.programs["kubectl"]
        self.server.grant()
        argv = [sys.executable, "-c", ASKER]
        self.asker = self.space.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.asker.stdout
        assert self.asker.stdout.readline() == "ready\n"

    def running(self, words: str) -> bool:
        return any(words in process.words for process in self.space.processes())

    def environ(self, **more: str) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder / "home"), **more}

    def says_kubectl(self, *args: str, seconds: float = 30, **env: str) -> Object:
        argv = [self.kubectl, *args, f"--request-timeout={stretched(seconds)}", "auth", "whoami", "-o", "json"]
        done = self.space.run(argv, check=False, env=self.environ(**env), timeout=stretched(seconds) + 300)
        if done.returncode:
            return {"error": done.stderr}
        return {"who": json.loads(done.stdout)["status"]["userInfo"]}

    def says_epok(self, *args: str, seconds: float = 30, **env: str) -> Object:
        assert self.asker.stdin
        assert self.asker.stdout
        limit = stretched(seconds)
        question = {"args": args, "env": self.environ(**env), "seconds": limit}
        self.asker.stdin.write(json.dumps(question) + "\n")
        self.asker.stdin.flush()
        answer: Object = json.loads(self.asker.stdout.readline())
        assert "TRACEBACK" not in answer.get("error", ""), answer
        return {**answer, "at once": answer["seconds"] < limit * 2 / 3}

    def both(self, *args: str, **env: str) -> tuple[Object, Object]:
        """What kubectl and epok say, which must be the same user or no one."""
        kubectl, ours = self.says_kubectl(*args, **env), self.says_epok(*args, **env)
        assert kubectl.get("who") == ours.get("who"), f"kubectl: {kubectl}\nepok: {ours}"
        return kubectl, ours


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    need_lab("nft")
    made = Ground(tmp_path_factory.mktemp("kubeconfig"))
    yield made
    made.space.close()


def written(path: Path, document: Any) -> str:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def config(cluster: Object, user: Any, name: str = "one", **more: Any) -> Object:
    """A kubeconfig with one of each, all of the same name."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [] if user is None else [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        **more,
    }


@pytest.fixture
def cluster(ground: Ground) -> Object:
    return {"server": f"https://{ADDRESS}:{PORT}", "certificate-authority": ground.server.ca}


def in_base64(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


# ---- generated ones


def entries(kind: str, values: "st.SearchStrategy[Object]") -> "st.SearchStrategy[list[Object]]":
    named = st.builds(lambda name, value: {"name": name, kind: value}, st.sampled_from(["a", "b", "c"]), values)
    return st.lists(named, max_size=3, unique_by=lambda each: str(each["name"]))


def of_these(values: "dict[str, st.SearchStrategy[Any]]") -> "st.SearchStrategy[Object]":
    return st.fixed_dictionaries({}, optional=values)


def files(ground: Ground, tmp: Path) -> "st.SearchStrategy[list[Object | str | None]]":
    """What may stand in the files of a KUBECONFIG; None is a file that is not there."""
    good, stale = ground.server.token(), ground.server.expired(ground.server.token())
    admin = ground.server.admin
    (tmp / "token").write_text(good + "\n")
    (tmp / "stale").write_text(stale)
    (tmp / "empty").write_text("")
    some = st.sampled_from
    users = of_these(
        {
            "token": some([good, stale, "", None]),
            "tokenFile": some(["token", str(tmp / "token"), "stale", "empty", "gone", ""]),
            "client-certificate": some([admin, "", "gone"]),
            "client-certificate-data": some([in_base64(admin), "", None]),
            "client-key": some([admin, ""]),
            "client-key-data": some([in_base64(admin), ""]),
            "username": some(["somebody", ""]),
            "as": some(["jane", "system:serviceaccount:kube-system:epok", ""]),
            "as-groups": some([[], ["system:masters"], ["one", "two"]]),
            "as-uid": some(["", "1234"]),
            "as-user-extra": some([{}, {"example.org/why": ["a", "b c"]}]),
        }
    )
    clusters = of_these(
        {
            "server": some(
                [f"https://{ADDRESS}:{PORT}", f"https://{ADDRESS}:{PORT}/", f"https://{ELSEWHERE}:{PORT}", ""]
            ),
            "certificate-authority": some([ground.server.ca, "gone", ""]),
            "certificate-authority-data": some([in_base64(ground.server.ca), ""]),
            "insecure-skip-tls-verify": some([True, False, None]),
            "tls-server-name": some([ADDRESS, "", "other.example"]),
        }
    )
    contexts = of_these({"cluster": some(["a", "b", "gone", ""]), "user": some(["a", "b", "gone", ""])})
    whole = of_these(
        {
            "kind": some(["Config", "Service", None]),
            "apiVersion": some(["v1", "v2"]),
            "current-context": some(["a", "b", "", None]),
            "clusters": entries("cluster", clusters),
            "users": entries("user", users),
            "contexts": entries("context", contexts),
        }
    )
    pair = {"client-certificate": admin, "client-key": admin}
    more = of_these({"as": some(["jane", ""]), "as-groups": some([[], ["one"]]), "token": some(["", good, stale])})
    right = st.builds(lambda one, extra: {**one, **extra}, some([{"token": good}, {"tokenFile": "token"}, pair]), more)
    # one that is likely to work, with anything in addition
    works = st.builds(
        lambda user, current: {
            **config({"server": f"https://{ADDRESS}:{PORT}", "certificate-authority": ground.server.ca}, user, "a"),
            "current-context": current,
        },
        st.one_of(right, right, users),
        some(["a", "a", "b", ""]),
    )
    odd: st.SearchStrategy[Any] = some([None, "", "{}", "[]", "a: [", "current-context: b\n"])
    return st.lists(st.one_of(works, whole, works, odd), min_size=1, max_size=3)


@pytest.mark.proof
def test_generated_kubeconfigs_are_those_of_kubectl(ground: Ground, tmp_path: Path, tally: Tally) -> None:
    tried = [0, 0]

    @settings(max_examples=often(60, 1000), suppress_health_check=list(HealthCheck), database=None)
    @given(files(ground, tmp_path), st.sampled_from(["", "", "a", "b"]))
    def compare(documents: list[Any], context: str) -> None:
        names = [str(tmp_path / f"config{number}") for number in range(len(documents))]
        for name, document in zip(names, documents, strict=True):
            Path(name).unlink(missing_ok=True)
            if document is not None:
                written(Path(name), document)
        args = ["--context", context] * bool(context)
        args = [args[0], args[1]] if context else []
        kubectl, ours = ground.both(*args, KUBECONFIG=":".join(names))
        tried[0] += 1
        tried[1] += "who" in ours
        assert "who" in ours or ours["error"]

    compare()
    tally("kubeconfigs compared with kubectl", tried[0], 0)
    assert tried[1] > tried[0] / 20, f"only {tried[1]} of {tried[0]} reached the server: nothing was compared"


# ---- cases, each of which people have


def data_of(entry: Object, *names: str) -> Object:
    """The entry with the contents of files instead of their names."""
    return {
        **{name: value for name, value in entry.items() if name not in names},
        **{f"{name}-data": in_base64(entry[name]) for name in names},
    }


def test_of_several_files_the_first_ones_context_counts(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    home = written(tmp_path / "home", config(cluster, {"token": ground.server.token()}, "home"))
    work = written(tmp_path / "work", config({"server": "https://127.0.0.9:1"}, {"token": "x"}, "work"))
    for names in ([home, work], ["", home, work], [str(tmp_path / "gone"), home], [home, str(tmp_path / "gone")]):
        _, ours = ground.both(KUBECONFIG=":".join(names))
        assert "who" in ours, ours
    assert "127.0.0.9" in ground.says_epok(KUBECONFIG=f"{work}:{home}", seconds=2)["error"]


@pytest.mark.parametrize(
    "later", ["", "current-context: ''", "# nothing", "---", "current-context: null", "users: null"]
)
def test_a_later_file_without_a_context_changes_nothing(
    ground: Ground, cluster: Object, tmp_path: Path, later: str
) -> None:
    first = written(tmp_path / "first", config(cluster, {"token": ground.server.token()}))
    for names in (f"{first}:{written(tmp_path / 'later', later)}", f"{written(tmp_path / 'later', later)}:{first}"):
        _, ours = ground.both(KUBECONFIG=names)
        assert "who" in ours, ours


def test_the_option_names_one_file_and_the_variable_several(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    odd = written(tmp_path / "a:b", config(cluster, {"token": ground.server.token()}))
    assert "who" in ground.both(f"--kubeconfig={odd}")[1]
    assert "error" in ground.both(KUBECONFIG=odd)[1]
    assert "error" in ground.both(f"--kubeconfig={tmp_path}/gone:{odd}")[1]


def test_paths_are_relative_to_the_file_that_has_them(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, source in (("ca.pem", ground.server.ca), ("me.pem", ground.server.admin)):
        (tmp_path / "deep" / name).write_bytes(Path(source).read_bytes())
    user = {"client-certificate": "../me.pem", "client-key": "../me.pem"}
    file = written(tmp_path / "deep" / "er" / "config", config({**cluster, "certificate-authority": "../ca.pem"}, user))
    assert ground.both(f"--kubeconfig={file}")[1]["who"]["username"] == "admin"


@pytest.mark.parametrize("user", [None, {}, {"token": ""}, {"client-key": "gone"}, {"as": "system:admin"}])
def test_no_credentials_are_said_to_be_none(
    ground: Ground, cluster: Object, tmp_path: Path, user: "Object | None"
) -> None:
    file = written(tmp_path / "config", config(cluster, user))
    error = ground.both(f"--kubeconfig={file}")[1]["error"]
    assert "no credentials" in error
    assert '"one"' in error
    assert "clusterrole" not in error


def test_a_token_file_counts_before_the_token_beside_it(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    fresh, stale = ground.server.token(), ground.server.expired(ground.server.token())
    written(tmp_path / "fresh", fresh + "\n")
    written(tmp_path / "stale", stale)
    users = {
        "stale beside fresh file": ({"token": stale, "tokenFile": "fresh"}, True),
        "fresh beside stale file": ({"token": fresh, "tokenFile": "stale"}, False),
        "fresh beside no file": ({"token": fresh, "tokenFile": "gone"}, True),
        "empty beside fresh file": ({"token": "", "tokenFile": "fresh"}, True),
        "no file": ({"tokenFile": "gone"}, False),
    }
    for what, (user, gets_in) in users.items():
        file = written(tmp_path / "config", config(cluster, user))
        assert ("who" in ground.both(f"--kubeconfig={file}")[1]) == gets_in, what


def test_empty_data_beside_a_file_is_none(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    user = {"client-certificate": ground.server.admin, "client-key": ground.server.admin}
    empty = {f"{name}-data": "" for name in user}
    file = written(tmp_path / "config", config({**cluster, "certificate-authority-data": ""}, {**user, **empty}))
    assert "who" in ground.both(f"--kubeconfig={file}")[1]
    whole = data_of(user, *user)
    file = written(tmp_path / "config", config(data_of(cluster, "certificate-authority"), whole))
    assert "who" in ground.both(f"--kubeconfig={file}")[1]


@pytest.mark.parametrize(
    "both",
    [
        {"client-certificate": "admin", "client-certificate-data": "admin", "client-key": "admin"},
        {"token": "good", "username": "me", "password": "secret"},
        {"client-certificate": "admin"},
        {"as-groups": ["system:masters"], "token": "good"},
        {"tokenFile": "good", "username": "me"},
    ],
    ids=lambda both: " and ".join(both),
)
def test_what_contradicts_itself_is_refused(ground: Ground, cluster: Object, tmp_path: Path, both: Object) -> None:
    token = ground.server.token()
    written(tmp_path / "good", token)
    values = {"token": token, "client-certificate": ground.server.admin, "client-key": ground.server.admin}
    values["client-certificate-data"] = in_base64(ground.server.admin)
    file = written(tmp_path / "config", config(cluster, {**both, **{k: v for k, v in values.items() if k in both}}))
    error = ground.both(f"--kubeconfig={file}")[1]["error"]
    assert any(name in error for name in both)
    assert token not in error


@pytest.mark.parametrize(
    "wanted",
    [
        {"as": "jane"},
        {"as": "jane", "as-groups": ["one", "two"], "as-uid": "1234"},
        {"as": "jane", "as-user-extra": {"example.org/why": ["a", "b"], "Mixed_Case %": ["c"]}},
        {"as": "system:serviceaccount:kube-system:epok"},
    ],
    ids=lambda wanted: " ".join(wanted),
)
def test_whom_a_kubeconfig_impersonates_epok_does_too(
    ground: Ground, cluster: Object, tmp_path: Path, wanted: Object
) -> None:
    user = {"client-certificate": ground.server.admin, "client-key": ground.server.admin}
    file = written(tmp_path / "config", config(cluster, {**user, **wanted}))
    assert ground.both(f"--kubeconfig={file}")[1]["who"]["username"] == wanted["as"]


def test_who_may_not_impersonate_is_told_to_leave_it(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    file = written(tmp_path / "config", config(cluster, {"token": ground.server.token(), "as": "jane"}))
    error = ground.both(f"--kubeconfig={file}")[1]["error"]
    assert "cannot impersonate" in error
    assert "take as" in error
    assert "clusterrole" not in error


def test_a_provider_that_epok_does_not_know_is_refused_by_name(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    user = {"auth-provider": {"name": "oidc", "config": {"id-token": ground.server.token()}}}
    file = written(tmp_path / "config", config(cluster, user))
    assert 'auth-provider "oidc"' in ground.says_epok(f"--kubeconfig={file}")["error"]


# ---- login plugins


V1 = "client.authentication.k8s.io/v1"


def plugin(folder: Path, script: str, **more: Any) -> Object:
    """A user whose credentials come from a script."""
    (folder / "plugin").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "plugin").chmod(0o755)
    return {"exec": {"apiVersion": V1, "command": "./plugin", "interactiveMode": "Never", **more}}


def printing(token: str, version: str = V1) -> str:
    made = {"apiVersion": version, "kind": "ExecCredential", "status": {"token": token}}
    return f"cat <<'EOF'\n{json.dumps(made)}\nEOF"


def test_login_plugins_are_asked_as_kubectl_asks_them(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    token = ground.server.token()
    env = [{"name": "WORD", "value": "open sesame"}]
    check = (
        f'[ "$WORD" = "open sesame" ] && [ "$1" = now ] || exit 3\nprintf %s "$KUBERNETES_EXEC_INFO" >{tmp_path}/seen'
    )
    user = plugin(tmp_path, f"{check}\n{printing(token)}", args=["now"], env=env, provideClusterInfo=True)
    extensions = [{"name": "client.authentication.k8s.io/exec", "extension": {"audience": "epok"}}]
    file = written(tmp_path / "config", config({**cluster, "extensions": extensions}, user))
    seen = []
    for says in (ground.says_kubectl, ground.says_epok):
        assert "who" in says(f"--kubeconfig={file}")
        seen.append(json.loads((tmp_path / "seen").read_text()))
    assert seen[0] == seen[1]
    assert seen[1]["spec"]["cluster"]["config"] == {"audience": "epok"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"apiVersion": "client.authentication.k8s.io/v1beta1", "interactiveMode": None},
        {"interactiveMode": None},
        {"apiVersion": "client.authentication.k8s.io/v1alpha1"},
        {"apiVersion": None},
        {"interactiveMode": "Always"},
        {"interactiveMode": "IfAvailable"},
        {"command": None},
        {"env": [{"name": "", "value": "x"}]},
    ],
    ids=str,
)
def test_what_is_said_of_a_login_plugin_is_read_as_kubectl_reads_it(
    ground: Ground, cluster: Object, tmp_path: Path, more: Object
) -> None:
    script = printing(ground.server.token(), more.get("apiVersion") or V1)
    file = written(tmp_path / "config", config(cluster, plugin(tmp_path, script, **more)))
    ground.both(f"--kubeconfig={file}")


def test_a_plugin_may_make_a_certificate(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    pem = Path(ground.server.admin).read_text()
    made = {"apiVersion": V1, "kind": "ExecCredential", "status": {"clientCertificateData": pem, "clientKeyData": pem}}
    file = written(tmp_path / "config", config(cluster, plugin(tmp_path, f"cat <<'EOF'\n{json.dumps(made)}\nEOF")))
    assert ground.both(f"--kubeconfig={file}")[1]["who"]["username"] == "admin"


@pytest.mark.parametrize(
    "script", ["exit 3", "echo nonsense", "echo '{}'", printing("t", "other/v1"), printing(""), "kill -9 $$"]
)
def test_a_plugin_that_makes_no_credentials_is_named(
    ground: Ground, cluster: Object, tmp_path: Path, script: str
) -> None:
    file = written(tmp_path / "config", config(cluster, plugin(tmp_path, script)))
    assert f"{tmp_path}/plugin" in ground.both(f"--kubeconfig={file}")[1]["error"]


def test_a_plugin_that_waits_for_a_person_is_named_and_ended(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    """With all that it has started, which holds its output open."""
    script = "sleep 3141 & sleep 3142"
    file = written(tmp_path / "config", config(cluster, plugin(tmp_path, script)))
    error = ground.says_epok(f"--kubeconfig={file}", seconds=2)["error"]
    assert f"{tmp_path}/plugin" in error
    assert "wait for a person" in error
    until(lambda: not ground.running("sleep 314"), "the plugin has ended", 60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_plugin_ends_with_epok(ground: Ground, cluster: Object, tmp_path: Path, number: signal.Signals) -> None:
    """Also where the terminal is closed."""
    file = written(
        tmp_path / "config", config(cluster, plugin(tmp_path, f"sleep 3143 & echo $PPID >{tmp_path}/pid; wait"))
    )
    argv = [sys.executable, "-B", str(EPOK), "-i", "eth0", "--kubeconfig", file, "--dry-run", "local"]
    run = ground.space.popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ground.environ())
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the plugin runs", 60)
    ground.space.run(["kill", f"-{number:d}", (tmp_path / "pid").read_text().strip()])
    run.wait(60)
    until(lambda: not ground.running("sleep 3143"), "the plugin has ended", 60)


def test_a_certificate_needs_no_folder_for_temporary_files(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    """A pod may have a file system that is only read."""
    user = {"client-certificate": ground.server.admin, "client-key": ground.server.admin}
    file = written(tmp_path / "config", config(cluster, user))
    with patch("tempfile._get_default_tempdir", side_effect=FileNotFoundError), patch("tempfile.tempdir", None):
        options = epok.parse_options(["-i", "eth0", "--kubeconfig", file, "local"], {})
        epok.tls_context(epok.kubeconfig_access(options, epok.Deadline(50)))


# ---- the server's certificate


@pytest.mark.parametrize("trusted", ["root", "intermediate", "server", "foreign", "none"])
def test_any_certificate_of_the_chain_may_be_the_authority(ground: Ground, tmp_path: Path, trusted: str) -> None:
    root, foreign = Authority(), Authority()
    middle = root.intermediate()
    server = middle.issue("server", ADDRESS)
    chain = tmp_path / "server.pem"
    chain.write_bytes(server + middle.pem)
    anchors = {
        "root": root.pem,
        "intermediate": middle.pem,
        "server": server,
        "foreign": foreign.pem,
        "none": b"no PEM",
    }
    (tmp_path / "ca.pem").write_bytes(anchors[trusted])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    with FakeApi(ground.space, tls=context) as api:
        made = config({"server": api.url, "certificate-authority": "ca.pem"}, {"token": "fake-token-Zm9vYmFy"})
        file = written(tmp_path / "config", made)
        argv = [ground.kubectl, f"--kubeconfig={file}", "get", "--raw", "/api/v1/services"]
        kubectl = ground.space.run(argv, check=False, env=ground.environ())
        error = ground.says_epok(f"--kubeconfig={file}")["error"]
    assert (kubectl.returncode == 0) == (trusted not in ("foreign", "none")), kubectl.stderr
    # this server allows no such request: who comes as far as that has been let in
    assert ("answers 403" in error) == (kubectl.returncode == 0), error
    if trusted == "foreign":
        assert "not by the certificate-authority" in error


# ---- ways to the server


@contextlib.contextmanager
def tinyproxy(ground: Ground, folder: Path, port: int, *lines: str, allowed: int = PORT) -> Iterator[None]:
    program = need("tinyproxy", "apt-get install tinyproxy-bin")
    log = folder / f"tinyproxy{port}.log"
    text = [f"Port {port}", f"Listen {ELSEWHERE}", "MaxClients 20", f'LogFile "{log}"', "LogLevel Info", *lines]
    (folder / "tinyproxy.conf").write_text("\n".join([*text, f"ConnectPort {allowed}", ""]))
    process = ground.space.popen([program, "-d", "-c", str(folder / "tinyproxy.conf")], stdout=subprocess.DEVNULL)
    until(lambda: log.exists() and "Accepting connections" in log.read_text(), "tinyproxy listens", 60)
    try:
        yield
    finally:
        ground.space.run(["pkill", "-x", "tinyproxy"], check=False)
        process.wait(60)


def connects(folder: Path, port: int) -> int:
    return (folder / f"tinyproxy{port}.log").read_text().count("CONNECT ")


PROXY = f"{ELSEWHERE}:3128"


@pytest.mark.parametrize(
    ("env", "server", "by_proxy"),
    [
        ({"HTTPS_PROXY": f"http://{PROXY}"}, ELSEWHERE, True),
        ({"https_proxy": f"http://{PROXY}"}, ELSEWHERE, True),
        ({"HTTPS_PROXY": PROXY}, ELSEWHERE, True),
        ({"HTTPS_PROXY": f"http://{PROXY}"}, ADDRESS, False),
        ({"HTTPS_PROXY": f"http://{PROXY}"}, "localhost", False),
        ({"HTTP_PROXY": f"http://{PROXY}", "ALL_PROXY": f"socks5://{PROXY}"}, ELSEWHERE, False),
        *(
            ({"HTTPS_PROXY": PROXY, "NO_PROXY": spared}, server, by_proxy)
            for spared, server, by_proxy in [
                ("*", ELSEWHERE, False),
                ("10.9.0.0/24", ELSEWHERE, False),
                ("10.9.1.0/24", ELSEWHERE, True),
                (f"other, {ELSEWHERE}", ELSEWHERE, False),
                (f"{ELSEWHERE}:{PORT}", ELSEWHERE, False),
                (f"{ELSEWHERE}:1", ELSEWHERE, True),
                ("cluster.example", NAME, False),
                (".cluster.example", NAME, False),
                ("*.cluster.example", NAME, False),
                (NAME.upper(), NAME, False),
                (f".{NAME}", NAME, True),
                ("luster.example", NAME, True),
                (f"{NAME}:{PORT}", NAME, False),
                (f"{NAME}:1", NAME, True),
                (ELSEWHERE, NAME, True),
            ]
        ),
        ({"HTTPS_PROXY": PROXY, "no_proxy": ELSEWHERE}, ELSEWHERE, False),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "x", "no_proxy": ELSEWHERE}, ELSEWHERE, True),
    ],
    ids=str,
)
def test_the_environments_proxy_is_used_where_kubectl_uses_it(
    ground: Ground, cluster: Object, tmp_path: Path, env: dict[str, str], server: str, by_proxy: bool
) -> None:
    where = {**cluster, "server": f"https://{server}:{PORT}", "tls-server-name": ADDRESS}
    file = written(tmp_path / "config", config(where, {"token": ground.server.token()}))
    with tinyproxy(ground, tmp_path, 3128):
        for says in (ground.says_kubectl, ground.says_epok):
            before = connects(tmp_path, 3128)
            answer = says(f"--kubeconfig={file}", **env)
            assert "who" in answer, answer
            assert (connects(tmp_path, 3128) > before) == by_proxy, says


@pytest.mark.parametrize("way", ["environment", "proxy-url"])
@pytest.mark.parametrize(("login", "gets_in"), [("me:p%2Dss_word@", True), ("me:wrong@", False), ("", False)])
def test_a_proxy_may_want_a_password(
    ground: Ground, cluster: Object, tmp_path: Path, way: str, login: str, gets_in: bool
) -> None:
    proxy = f"http://{login}{PROXY}"
    where = {**cluster, "server": f"https://{ELSEWHERE}:{PORT}", **({"proxy-url": proxy} if way == "proxy-url" else {})}
    file = written(tmp_path / "config", config(where, {"token": ground.server.token()}))
    env = {"HTTPS_PROXY": proxy} if way == "environment" else {}
    with tinyproxy(ground, tmp_path, 3128, "BasicAuth me p-ss_word"):
        _, ours = ground.both(f"--kubeconfig={file}", **env)
    assert ("who" in ours) == gets_in, ours
    if not gets_in:
        assert re.search("the proxy answers 40[17]: user:password@", ours["error"])
        assert ours["at once"], "it was tried again"
        assert "me:wrong" not in ours["error"]


def test_a_proxy_of_the_kubeconfig_counts_for_loopback_too(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    file = written(
        tmp_path / "config", config({**cluster, "proxy-url": f"http://{PROXY}"}, {"token": ground.server.token()})
    )
    with tinyproxy(ground, tmp_path, 3128):
        for says in (ground.says_kubectl, ground.says_epok):
            before = connects(tmp_path, 3128)
            assert "who" in says(f"--kubeconfig={file}", NO_PROXY="*")
            assert connects(tmp_path, 3128) > before


def test_a_proxy_that_forbids_the_server_is_named_at_once(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    file = written(
        tmp_path / "config", config({**cluster, "proxy-url": f"http://{PROXY}"}, {"token": ground.server.token()})
    )
    with tinyproxy(ground, tmp_path, 3128, allowed=1):
        ours = ground.both(f"--kubeconfig={file}")[1]
    assert "the proxy answers 403" in ours["error"]
    assert ours["at once"], "it was tried again"


@pytest.mark.parametrize("scheme", ["ftp", "socks4", "socks5h", ""])
def test_a_proxy_that_kubectl_does_not_take_is_refused_by_name(
    ground: Ground, cluster: Object, tmp_path: Path, scheme: str
) -> None:
    proxy = f"{scheme}://{PROXY}" if scheme else PROXY
    file = written(tmp_path / "config", config({**cluster, "proxy-url": proxy}, {"token": ground.server.token()}))
    assert "proxy-url" in ground.both(f"--kubeconfig={file}")[1]["error"]


@pytest.mark.parametrize("login", ["", "me:secret@"])
@pytest.mark.parametrize("way", ["proxy-url", "environment"])
def test_socks_proxies_work_as_with_kubectl(
    ground: Ground, cluster: Object, tmp_path: Path, way: str, login: str
) -> None:
    """As the Kubernetes documentation has it for ssh -D; the proxy looks the name up."""
    program = need("microsocks", "apt-get install microsocks")
    words = ["-u", "me", "-P", "secret"] if login else []
    process = ground.space.popen([program, "-i", ELSEWHERE, "-p", "1080", *words], stderr=subprocess.DEVNULL)
    until(lambda: ":1080" in ground.space.run(["ss", "-Hltn"]).stdout, "microsocks listens", 60)
    proxy = f"socks5://{login}{ELSEWHERE}:1080"
    where = {**cluster, "server": f"https://{ELSEWHERE}:{PORT}", **({"proxy-url": proxy} if way == "proxy-url" else {})}
    file = written(tmp_path / "config", config(where, {"token": ground.server.token()}))
    try:
        _, ours = ground.both(f"--kubeconfig={file}", **({"HTTPS_PROXY": proxy} if way == "environment" else {}))
        assert "who" in ours, ours
    finally:
        process.kill()
        ground.space.run(["pkill", "-x", "microsocks"], check=False)
        process.wait(60)


def test_a_dead_first_address_is_passed_over(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    where = {**cluster, "server": f"https://{TWO}:{PORT}"}
    file = written(tmp_path / "config", config(where, {"token": ground.server.token()}))
    assert "who" in ground.both(f"--kubeconfig={file}")[1]


# ---- what must not get out, and odd files


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("token: ", "token: x: "),
        ("token: ", 'token: "'),
        ("token: ", "token: !"),
        ("token: ", "token: *"),
        ("token", "\ttoken"),
    ],
)
def test_no_message_about_a_broken_kubeconfig_shows_the_token(
    ground: Ground, cluster: Object, tmp_path: Path, before: str, after: str
) -> None:
    secret = "opensesame"
    text = yaml.safe_dump(config(cluster, {"token": secret}))
    file = written(tmp_path / "config", text.replace(before, after))
    error = ground.both(f"--kubeconfig={file}")[1]["error"]
    assert file in error
    assert secret not in error


@pytest.mark.parametrize(
    "where",
    [
        {"server": "https://me:opensesame@127.0.0.1:6443"},
        {"server": "https://me:opensesame/@127.0.0.1"},
        {"proxy-url": "ftp://me:opensesame@192.0.2.1"},
        {"proxy-url": "me:opensesame@192.0.2.1:3128"},
        {"proxy-url": "http://me:opensesame/x@192.0.2.1:3128"},
        {"proxy-url": "http://me:open@sesame@127.0.0.1:1"},
    ],
    ids=str,
)
def test_no_message_about_an_address_shows_the_password(
    ground: Ground, cluster: Object, tmp_path: Path, where: Object
) -> None:
    file = written(tmp_path / "config", config({**cluster, **where}, {"token": "x"}))
    error = ground.says_epok(f"--kubeconfig={file}", seconds=2)["error"]
    assert "sesame" not in error


def test_a_server_of_plain_http_is_asked_without_credentials_too(ground: Ground, tmp_path: Path) -> None:
    """As kubectl proxy is; this one wants a token."""
    with FakeApi(ground.space) as api:
        file = written(tmp_path / "config", config({"server": api.url}, {}))
        assert "no credentials were sent" in ground.says_epok(f"--kubeconfig={file}")["error"]
        assert [request.authorization for request in api.requests] == [""]


@pytest.mark.parametrize("encode", ["tabs", "utf-16", "utf-8-sig", "CRLF", "two documents"])
def test_kubeconfigs_are_read_however_they_are_written(
    ground: Ground, cluster: Object, tmp_path: Path, encode: str
) -> None:
    made = config(cluster, {"token": ground.server.token()})
    text = yaml.safe_dump(made)
    data = {
        "tabs": json.dumps(made, indent="\t").encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "two documents": f"{text}---\ncurrent-context: other\n".encode(),
    }
    (tmp_path / "config").write_bytes(data.get(encode) or text.encode(encode))
    assert "who" in ground.both(f"--kubeconfig={tmp_path}/config")[1]


def test_a_variable_that_names_no_file_is_not_the_one_at_home(ground: Ground, cluster: Object) -> None:
    home = ground.folder / "home" / ".kube"
    home.mkdir(parents=True)
    file = Path(written(home / "config", config(cluster, {"token": ground.server.token()})))
    try:
        assert "who" in ground.both(KUBECONFIG="")[1]
        assert "there is no such file" in ground.both(KUBECONFIG=":")[1]["error"]
    finally:
        file.unlink()
        home.rmdir()


def test_names_of_any_letters_are_impersonated(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    user = {"client-certificate": ground.server.admin, "client-key": ground.server.admin}
    for name in ("jürgen", "иван"):
        wanted = {"as": name, "as-groups": [name], "as-user-extra": {name: [name]}}
        file = written(tmp_path / "config", config(cluster, {**user, **wanted}))
        assert ground.both(f"--kubeconfig={file}")[1]["who"]["username"] == name


def test_a_password_is_said_to_be_none_of_the_clusters(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    file = written(tmp_path / "config", config(cluster, {"username": "me", "password": "secret"}))
    error = ground.both(f"--kubeconfig={file}")[1]["error"]
    assert "no username and password" in error
    assert "clusterrole" not in error


def test_what_a_plugin_prints_is_not_shown(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    for script in (f"{printing('opensesame')}\nexit 1", "echo 'token: [opensesame'", printing("opensesame", "v1")):
        file = written(tmp_path / "config", config(cluster, plugin(tmp_path, script)))
        assert "opensesame" not in ground.both(f"--kubeconfig={file}")[1]["error"]


def test_a_plugin_may_print_yaml_and_have_a_path_of_its_own(ground: Ground, cluster: Object, tmp_path: Path) -> None:
    script = f"printf 'apiVersion: {V1}\\nkind: ExecCredential\\nstatus: {{token: {ground.server.token()}}}\\n'"
    user = plugin(tmp_path, script, command="plugin", env=[{"name": "PATH", "value": "/nowhere"}])
    file = written(tmp_path / "config", config(cluster, user))
    assert "who" in ground.both(f"--kubeconfig={file}", PATH=f"{tmp_path}:{os.environ['PATH']}")[1]
    assert "error" in ground.both(f"--kubeconfig={file}")[1]


@pytest.mark.parametrize(
    ("words", "shows"), [("Bearer x", "token"), ("bearer x", "token"), ("Basic x", "password"), ("", "")]
)
def test_by_what_the_server_knows_us_is_told_from_what_is_sent(words: str, shows: str) -> None:
    """The token of a pod's account too, which the Kubernetes package writes in small letters."""
    assert epok.Access("here", "https://192.0.2.1", headers=[("Authorization", words)]).shows == shows
