"""The image that Dockerfile makes: built here, and run as the CronJob runs it, against the lab's host over real SSH."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import epok
from lab.apiserver import ApiServer
from lab.container import ACCOUNT, API, CACHE, USER, Container, Image, Store, scratch, secret_volume, service_account
from lab.machine import BACKENDS, lacking, need
from lab.manifests import container, environment, manifests
from lab.network import EPOK, Lab, Namespace
from lab.objects import endpoint, endpoint_slice, port, service
from lab.sshd import Sshd, make_key

HOST = "10.0.0.1"  # as the nodes see it, and so the pods
SECRET = "/etc/epok"
SNAPSHOT = "/etc/snapshot.yaml"
TRIED = EPOK.parent / "tests" / "lab" / "snapshot.yaml"  # that of tests/try
REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGEST = 150_000_000  # bytes that the image may add to its base
one_lab = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)
Done = subprocess.CompletedProcess[str]
Files = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    if os.geteuid():
        lacking("images are built as root: run the tests with sudo")
    for tool, package in (("buildah", "buildah"), ("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux")):
        need(tool, f"apt-get install {package}")
    with Store() as made:
        yield made


@pytest.fixture(scope="module")
def image(store: Store) -> Image:
    return store.build(EPOK.parent, f"--build-arg=REVISION={REVISION}")


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Sshd:
    return Sshd(lab.host)


@pytest.fixture
def secret(server: Sshd, tmp_path: Path) -> Path:
    """The CronJob's, with a key that the server takes."""
    key = make_key(tmp_path / "key", "ed25519")
    server.authorize(key.with_suffix(".pub").read_text())
    known_hosts = f"{HOST} {server.host_key()}\n".encode()
    return secret_volume(tmp_path / "secret", {"id_rsa": key.read_bytes(), "known_hosts": known_hosts})


def pod(image: Image, secret: Path, volumes: Mapping[str, Path] | None = None, **env: str) -> Container:
    """A container with what the CronJob gives it."""
    settings = environment(container(manifests()), {"ssh_host": f"root@{HOST}", "ssh_port": "22"})
    return Container(image, {SECRET: secret, **(volumes or {})}, {**settings, **env})


def in_pod(space: Namespace, made: Container, *args: str) -> Done:
    return space.run(made.argv(*args), check=False)


def with_snapshot(image: Image, secret: Path) -> Container:
    return pod(image, secret, {SNAPSHOT: TRIED}, EPOK_SNAPSHOT=SNAPSHOT)


def files(root: Path) -> Files:
    """Mode, size and time of all that is below."""
    found: Files = {}
    todo = [str(root)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    todo.append(entry.path)
                found[entry.path.removeprefix(str(root))] = (info.st_mode, info.st_size, info.st_mtime_ns)
    return found


# ---- what is in it


def test_the_image_is_its_base_and_one_folder(store: Store, image: Image) -> None:
    with tarfile.open(store.archive) as archive:
        base = {entry.name.removeprefix("."): entry for entry in archive if entry.name != "."}
    made = files(image.root)
    assert {path for path in made if not path.startswith("/epok/")} == {*base, "/epok"}
    for path, entry in base.items():
        if entry.isfile():
            mode, size, time = made[path]
            assert (stat.S_IMODE(mode), size, time // 10**9) == (entry.mode, entry.size, entry.mtime), path
    assert len(image.layers) == 2


def test_it_adds_less_than_150_mb_to_its_base(image: Image) -> None:
    assert LARGEST / 10 < image.layers[-1] < LARGEST
    assert sum(size for _, size, _ in files(image.root / "epok").values()) < LARGEST


def test_nobody_but_root_may_write_what_it_brings(image: Image) -> None:
    for path, (mode, _, _) in files(image.root / "epok").items():
        info = (image.root / "epok" / path.lstrip("/")).lstat()
        assert (info.st_uid, info.st_gid) == (0, 0) and not mode & 0o022 or stat.S_ISLNK(mode), path


def test_nothing_of_how_it_was_built_is_in_it(store: Store, image: Image) -> None:
    assert store.secret in (store.folder / "pip.conf").read_text()
    brought = [path for path in (image.root / "epok").rglob("*") if path.is_file()]
    assert not [path for path in brought if store.secret.encode() in path.read_bytes()]
    words = json.dumps([image.config, image.history])
    assert not re.search(rf"{store.secret}|{re.escape(str(store.folder))}|pip\.conf|PIP_|_CERT", words)
    assert not [path for path in files(image.root) if re.search(r"/(pip\.conf|\.cache|\.netrc|epok/bin)$", path)]


def test_its_configuration_suits_a_pod_that_must_not_run_as_root(image: Image) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.config["User"])
    assert image.config["Entrypoint"][0] == "python3"
    assert image.config.get("WorkingDir", "/") in ("", "/")
    assert not image.config.keys() & {"Cmd", "Volumes", "ExposedPorts"}


def test_its_labels_name_it(image: Image) -> None:
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image.config["Labels"].items()}
    assert (labels["title"], labels["version"], labels["revision"]) == ("epok", epok.VERSION, REVISION)
    assert labels["description"]


def test_the_build_sees_no_other_file_of_the_checkout(store: Store) -> None:
    assert {".git", ".venv", "tests"} <= {path.name for path in EPOK.parent.iterdir()}
    probe = store.folder / "probe"
    probe.write_text("FROM scratch\nCOPY . /\n")
    seen = store.build(EPOK.parent, f"--file={probe}", name="localhost/context")
    assert files(seen.root).keys() == {"/epok.py", "/requirements.txt"}


def test_a_package_other_than_the_lock_says_fails_the_build(store: Store, tmp_path: Path) -> None:
    for name in ("Dockerfile", "epok.py"):
        shutil.copy(EPOK.parent / name, tmp_path)
    [lines] = re.findall(r"(?m)^docopt-ng==(?:.*\\\n)+ .*\n", (EPOK.parent / "requirements.txt").read_text())
    wrong = re.sub(r"sha256:(\w+)", lambda match: "sha256:" + match[1][::-1], lines)
    (tmp_path / "requirements.txt").write_text(wrong)
    with pytest.raises(RuntimeError, match="DO NOT MATCH THE HASHES"):
        store.build(tmp_path, name="localhost/wrong")


# ---- how it runs


def test_it_prints_its_usage_and_version(image: Image) -> None:
    told = [Container(image).run(option) for option in ("-h", "--version")]
    assert [done.returncode for done in told] == [0, 0]
    assert "  epok.py [options] ssh " in told[0].stdout
    assert told[1].stdout == f"epok {epok.VERSION}\n"
    assert not told[0].stderr + told[1].stderr


def test_a_wrong_command_line_ends_it_with_status_2(image: Image) -> None:
    done = Container(image).run("ssh")
    assert done.returncode == 2
    assert re.fullmatch("error: .*EPOK_INTERFACES.*\n", done.stderr)


def test_its_user_has_no_rights(image: Image) -> None:
    status = Container(image).run("/proc/self/status", entrypoint=["cat"]).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["Uid"].split() == fields["Gid"].split() == [USER] * 4
    assert fields["Groups"].split() == [USER]
    assert [fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 4
    assert fields["NoNewPrivs"] == "1"
    assert fields["Pid"] == "1"


@pytest.mark.parametrize("place", ["/", "/epok", "/epok/byte-code", "/tmp", "/dev", "/etc", SECRET])
def test_a_container_can_write_nowhere(image: Image, tmp_path: Path, place: str) -> None:
    tmp_path.chmod(0o777)
    done = Container(image, {SECRET: tmp_path}).run(f"{place}/written", entrypoint=["touch"])
    assert done.returncode and "Read-only file system" in done.stderr


def test_a_container_can_write_to_tmp_when_it_is_given_one(image: Image) -> None:
    assert Container(image, tmp=True).run("/tmp/written", entrypoint=["touch"]).returncode == 0


@one_lab
def test_a_dry_run_of_the_bundled_snapshot_prints_the_forwards(lab: Lab, image: Image, secret: Path) -> None:
    before = lab.saved()
    done = in_pod(lab.nodes[0], with_snapshot(image, secret), "--dry-run", "ssh")
    assert done.returncode == 3, done.stderr
    head, _ = done.stdout.split("# iptables-restore", 1)
    assert {"tcp/25", "tcp/53", "udp/53"} <= set(re.findall(r"\b(?:tcp|udp)/\d+", head))
    assert lab.saved() == before


@one_lab
def test_a_key_that_is_not_for_its_group_is_an_error_that_says_so(lab: Lab, image: Image, secret: Path) -> None:
    (secret / "id_rsa").chmod(0o400)
    done = in_pod(lab.nodes[0], with_snapshot(image, secret), "ssh")
    assert done.returncode == 1
    assert re.search(rf"(?m)^error: .*{SECRET}/id_rsa.*Permission denied", done.stderr), done.stderr


@one_lab
def test_a_secret_without_known_hosts_is_cured_by_another_secret(lab: Lab, image: Image, secret: Path) -> None:
    known = (secret / "known_hosts").read_bytes()
    (secret / "known_hosts").write_text("")
    there = pod(image, secret, {SNAPSHOT: TRIED}, EPOK_SNAPSHOT=SNAPSHOT, **API)
    done = in_pod(lab.nodes[0], there, "ssh")
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.endswith(epok.RENEW) and not re.search(">>|authorized_keys|ssh-keygen -R", error), error
    (secret / "known_hosts").write_bytes(known)  # as setup-host prints it
    assert in_pod(lab.nodes[0], there, "ssh").returncode == 0


# ---- in a cluster, and what it loads there


@pytest.fixture(scope="module")
def api(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    made = ApiServer(lab.host, tmp_path_factory.mktemp("apiserver"))
    made.grant()
    made.create(*lab.node_objects(), service("mail", "25:2025", [port(25, 2025, "smtp")], policy="Local"))
    made.create(endpoint_slice("mail", [endpoint("node2", "10.244.2.5")]))
    return made


def in_cluster(lab: Lab, api: ApiServer, image: Image, secret: Path, **env: str) -> Done:
    """A run with the account that a pod finds, and what it set up."""
    mounted = service_account(secret.parent / "account", api, "kube-system")
    done = in_pod(lab.host, pod(image, secret, {ACCOUNT: mounted}, **API, **env), "ssh")
    assert done.returncode == 0, re.findall(r"(?m)^(?:error|warning): .*", done.stderr)
    assert lab.ask(25).name == "node2"
    return done


def loaded(done: Done) -> set[str]:
    """The modules, as files, that came from byte code, as Python itself tells."""
    return {file for _, file in re.findall(r"# (/\S+?\.pyc) matches (/\S+?\.py)(?!c)", done.stderr)}


def compiled(done: Done) -> set[str]:
    """Those that were compiled."""
    return set(re.findall(r"# code object from (/\S+?\.py)(?!c)", done.stderr))


@one_lab
def test_in_a_cluster_no_module_is_compiled(lab: Lab, api: ApiServer, image: Image, secret: Path) -> None:
    done = in_cluster(lab, api, image, secret, PYTHONVERBOSE="1")
    assert not compiled(done)
    names = {file.removeprefix("/epok/") for file in loaded(done)}
    assert {"epok.py", "kubernetes/client/__init__.py", "paramiko/__init__.py"} <= names
    assert any(name.endswith("/ssl.py") for name in names)  # of the standard library
    assert len(names) > 500


@one_lab
@pytest.mark.parametrize("module", ["/epok/epok", "/epok/paramiko/client", "{library}/ssl"])
def test_a_module_without_byte_code_would_be_noticed(
    lab: Lab, api: ApiServer, image: Image, secret: Path, tmp_path: Path, module: str
) -> None:
    [library] = re.findall(r"/epok/byte-code(/.*)/ssl\.c", "\n".join(map(str, image.root.rglob("ssl.cpython-*.pyc"))))
    file = Path(module.format(library=library))
    [cached] = image.root.glob(f"epok/byte-code{file}.cpython-*.pyc")
    aside = cached.rename(tmp_path / "aside")
    try:
        assert compiled(in_cluster(lab, api, image, secret, PYTHONVERBOSE="1")) == {f"{file}.py"}
    finally:
        shutil.move(aside, cached)


# ---- what a killed test run leaves


HOLD = """import sys, time
from lab.container import scratch
with scratch() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_next_run_removes_what_a_killed_one_leaves_and_nothing_else() -> None:
    argv = [sys.executable, "-B", "-c", HOLD]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=EPOK.parent / "tests") as other:
        assert other.stdout
        left = Path(other.stdout.readline().strip())
        assert left.parent == CACHE
        with scratch() as own:
            assert own.is_dir() and left.is_dir()
        other.kill()
    assert left.is_dir()
    with scratch():
        assert not left.exists()
    assert not own.exists()
