"""epok's image, built here without a registry, and containers of it. Needs root, buildah and mmdebstrap.

The base image is the machine's own distribution, as small as it goes, with Python and pip, and like the official Python
image without byte code. Its archive is made once a month, in the user's cache; images are in a folder beside it, which
goes when we do, or with the next run when we are killed.

    with Store() as store:
        image = store.build()
        container = Container(image, {"/etc/epok": folder}, {"EPOK_INTERFACES": "eth0"})
        print(lab.nodes[0].run(container.argv("ssh")).stdout)
"""

import ast
import configparser
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.apiserver import ADDRESS, PORT, ApiServer
from lab.machine import lacking
from lab.network import EPOK, Made

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epok"
USER = "65532"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
API = {"KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT)}  # for every container of a cluster
DEVICES = ("null", "zero", "full", "random", "urandom")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # what runtimes give an image that says nothing

# Mounts and processes of buildah and mmdebstrap die with the thread that starts them.
ALONE = [
    "setpriv",
    "--pdeathsig",
    "KILL",
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# How apt reaches this machine's sources must not stay in what is made.
SMALL = [
    "mmdebstrap",
    "--mode=root",
    "--variant=essential",
    "--keyring=/usr/share/keyrings",
    '--customize-hook=rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/apt.conf.d/99mmdebstrap',
]
BASE = [
    *SMALL,
    "--format=tar",
    "--include=python3,python3-pip",
    '--customize-hook=find "$1/usr" -name __pycache__ -prune -exec rm -r {} +',
]
INDEX_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "cert",
    "client-cert",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
)
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
# The image is the lower layer of an overlay, as runtimes do it; mount points are made in the upper one, which is gone
# with the container. The root file system is read-only before the first program of the image runs.
CONTAIN = f"""
stage=$1 image=$2 tmp=$3 root=$1/root
shift 3
cd "$image"
mount -t tmpfs -o mode=755 tmpfs "$stage"
mkdir "$stage/upper" "$stage/work" "$root"
mount -t overlay -o "lowerdir=.,upperdir=$stage/upper,workdir=$stage/work" overlay "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t tmpfs -o nosuid,mode=755 tmpfs "$root/dev"
for device in {" ".join(DEVICES)}; do
    : >"$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -o remount,ro "$root/dev"
[ -z "$tmp" ] || mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$root/tmp"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$root${{2%/*}}" && : >"$root$2"; fi
    mount --bind "$1" "$root$2"
    mount -o remount,bind,ro,nosuid,nodev "$root$2"
    shift 2
done
mount -o remount,bind,ro "$root"
shift
exec "$@"
"""
# What it takes to get into the root and to be the user; he has none of them, nor any way to one.
ENTER = [
    "/usr/bin/setpriv",
    "--bounding-set=-all,+sys_chroot,+setuid,+setgid",
    "--inh-caps=-all",
    "--no-new-privs",
    "/usr/sbin/chroot",
]


class Image(NamedTuple):
    """What a runtime knows of an image, as OCI words it, and its files."""

    config: dict[str, Any]
    history: list[dict[str, Any]]
    layers: list[int]  # bytes of each as a tar archive
    root: Path
    stage: Path  # an empty folder, for containers to mount on


class Container:
    """How a runtime starts the image in a pod: as its user, on a root file system that is read-only.

    `volumes` are read-only folders and files: where in the container -> which. `groups` is the pod's fsGroup.
    """

    def __init__(
        self,
        image: Image,
        volumes: Mapping[str, Path] | None = None,
        env: Mapping[str, str] | None = None,
        groups: Sequence[str] = (USER,),
        tmp: bool = False,
    ) -> None:
        self.image = image
        self.volumes = {resolved(image.root, target): source for target, source in (volumes or {}).items()}
        self.groups, self.tmp = groups, tmp
        own = dict(line.split("=", 1) for line in image.config.get("Env", ()))
        self.env = {"PATH": PATH, "HOME": "/", **own, **(env or {})}

    def argv(self, *args: str, entrypoint: Sequence[str] | None = None) -> list[str]:
        """What runs the image's entry point, or another command, with these arguments, in any namespace of the lab."""
        stage = self.image.stage
        volumes = [word for target, source in self.volumes.items() for word in (str(source), target)]
        contain = ["sh", "-ec", CONTAIN, "sh", str(stage), str(self.image.root), "tmp" * self.tmp, *volumes, "--"]
        env = ["env", "-i", *(f"{name}={value}" for name, value in self.env.items())]
        user = [f"--userspec={self.image.config['User']}", f"--groups={','.join(self.groups)}", f"{stage}/root"]
        command = self.image.config["Entrypoint"] if entrypoint is None else entrypoint
        return [*ALONE, *contain, *env, *ENTER, *user, *command, *args]

    def run(self, *args: str, entrypoint: Sequence[str] | None = None) -> "subprocess.CompletedProcess[str]":
        """The same in the machine's network."""
        return subprocess.run(self.argv(*args, entrypoint=entrypoint), capture_output=True, text=True, timeout=300)


def secret_volume(folder: Path, data: Mapping[str, bytes]) -> Path:
    """A Secret as the kubelet mounts it: links to a folder of that moment, for the pod's group to read."""
    moment = folder / "..2024_03_01"
    moment.mkdir(parents=True)
    (folder / "..data").symlink_to(moment.name)
    for name, content in data.items():
        (moment / name).write_bytes(content)
        os.chown(moment / name, 0, int(USER))
        (moment / name).chmod(0o440)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


def service_account(folder: Path, server: ApiServer, namespace: str) -> Path:
    """What a pod of epok's account finds in ACCOUNT: the token is for the pod's group, the rest for everybody."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(server.ca, folder / "ca.crt")
    (folder / "namespace").write_text(namespace)
    token = folder / "token"
    token.write_text(server.token("epok", namespace))
    os.chown(token, 0, int(USER))
    token.chmod(0o640)
    return folder


def resolved(root: Path, path: str) -> str:
    """The path with symbolic links followed as in the container: its /var/run is a link to /run."""
    found, parts = "/", path.split("/")
    while parts:
        found = os.path.normpath(os.path.join(found, parts.pop(0)))
        place = root / found[1:]
        if place.is_symlink():
            parts = os.path.join(os.path.dirname(found), os.readlink(place)).split("/") + parts
            found = "/"
    return found


class Store(Made):
    """Images and containers, in a folder that lives as long as this.

    The driver overlay is quicker, but what it stores can be mounted by buildah alone, so `image` takes vfs.
    """

    def __init__(self, driver: str = "vfs") -> None:
        super().__init__()
        self.driver = driver

    def make(self) -> None:
        self.secret = secrets.token_hex(16)  # stands beside pip's settings, and must not stay in an image
        self.images: dict[str, Image] = {}
        self.folder = self.stack.enter_context(scratch())
        self.stage = self.folder / "container"
        self.stage.mkdir()
        self.archive = distribution("base", BASE, self.folder)
        self.import_base()

    def command(self, *args: str) -> list[str]:
        """What runs buildah on this store; its temporary files should go to `folder`."""
        places = [f"--root={self.folder}/root", f"--runroot={self.folder}/run", f"--storage-driver={self.driver}"]
        # buildah keeps a cache in /var/lib/containers, whatever --root says
        private = 'mount -t tmpfs tmpfs /var/lib; exec "$@"'
        return [*ALONE, "sh", "-ec", private, "sh", "buildah", *places, *args]

    def buildah(self, *args: str) -> str:
        """What buildah prints. Raises RuntimeError with the end of what it says when it fails."""
        return output(self.command(*args), self.folder)

    def import_base(self) -> None:
        context = self.folder / "base"
        context.mkdir()
        os.link(self.archive, context / "base.tar")
        (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self.buildah("build", "--layers=false", "--tag=base", str(context))

    def how(self) -> list[str]:
        """Options of a build: without a registry, and with the machine's way to the package index."""
        given = ["--isolation=chroot", "--layers=false", "--pull-never", "--build-arg=BASE=localhost/base"]
        # newer buildah asks for a million of each, which not every root may
        limits = {
            "nproc": resource.getrlimit(resource.RLIMIT_NPROC),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        given += [f"--ulimit={name}={soft}:{hard}" for name, (soft, hard) in limits.items() if soft > 0 and hard > 0]
        return [*given, *self.index()]

    def build(self, context: Path = EPOK.parent, *options: str, name: str = "localhost/epok") -> Image:
        """The image of a Dockerfile."""
        self.buildah("build", *self.how(), *options, f"--tag={name}", str(context))
        return self.image(name)

    def image(self, name: str) -> Image:
        """The image of that name, which takes a copy of all its files the first time."""
        if name not in self.images:
            self.images[name] = self.unpack(name)
        return self.images[name]

    def unpack(self, name: str) -> Image:
        container = self.buildah("from", "--pull-never", name).strip()
        root = Path(self.buildah("mount", container).strip())
        found = json.loads(self.buildah("inspect", "--type=image", name))
        layers = [layer["size"] for layer in json.loads(found["Manifest"])["layers"]]
        return Image(found["OCIv1"]["config"], found["OCIv1"]["history"], layers, root, self.stage)

    def index(self) -> list[str]:
        """Options of a build: pip's settings of this machine, and the files that they name, as volumes."""
        settings = pip_settings()
        config = configparser.RawConfigParser()
        config["global"], config["secret"] = settings, {"secret": self.secret}
        with (self.folder / "pip.conf").open("w") as file:
            config.write(file)
        named = {word for name in ("cert", "client-cert", "find-links") for word in settings.get(name, "").split()}
        files = {name: name for name in sorted(named) if name.startswith("/") and os.path.exists(name)}
        files["/etc/pip.conf"] = f"{self.folder}/pip.conf"
        return [f"--volume={source}:{target}:ro" for target, source in files.items()]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in the cache, locked while it is in use; those whose process was killed are removed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE):
        for old in CACHE.glob("images-*"):
            # it is in use, or was until now
            with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(old, fcntl.LOCK_NB):
                shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(prefix="images-", dir=CACHE))
        lock = contextlib.ExitStack()
        lock.enter_context(locked(folder))
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


@contextlib.contextmanager
def locked(folder: Path, flags: int = 0) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


def distribution(name: str, mmdebstrap: Sequence[str], folder: Path) -> Path:
    """What mmdebstrap makes of the machine's own distribution this month: in the cache, or else made in `folder`."""
    release, sources = platform.freedesktop_os_release(), apt_sources()
    key = hashlib.sha256(" ".join([*mmdebstrap, *sources, time.strftime("%Y-%m")]).encode()).hexdigest()
    place = CACHE / f"{name}-{key[:12]}"
    with locked(CACHE):  # another file of tests may be about to make it too
        if not place.exists():
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            made, options = folder / "made", folder / "apt.conf"
            options.write_text("".join(f"{line}\n" for line in apt_settings()))
            argv = [*mmdebstrap, f"--aptopt={options}", release["VERSION_CODENAME"], str(made), *sources]
            output([*ALONE, *argv], folder)
            made.rename(place)
    return place


def apt_sources() -> list[str]:
    """The sources of the machine's own distribution, a line each. apt knows, in whatever files and formats they are."""
    fields = "$(ORIGIN)|deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"], capture_output=True, text=True
    ).stdout.splitlines()
    own = platform.freedesktop_os_release()["ID"]
    lines = [line for origin, line in (entry.split("|") for entry in found) if origin.lower() == own]
    return list(dict.fromkeys(lines)) or lacking(f"apt has no lists of {own}: apt-get update")


def apt_settings() -> list[str]:
    """How apt gets to the sources: proxies and the like."""
    dump = output(["apt-config", "dump"])
    return re.findall(r"(?m)^Acquire::(?:https?|Check-|Retries|ForceIPv).*$", dump)


def pip_settings() -> dict[str, str]:
    """How pip gets to the package index, from its files and the environment, which wins; and whom it trusts."""
    found: dict[str, str] = {}
    lines = output([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, value = line.split("=", 1)
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    bundles = [os.environ.get(name, "") for name in CERTIFICATES]
    bundle = next(filter(os.path.isfile, [*bundles, "/etc/ssl/certs/ca-certificates.crt"]), None)
    return ({"cert": bundle} if bundle else {}) | {name: found[name] for name in INDEX_SETTINGS if name in found}


def output(argv: Sequence[str], tmp: Path | None = None) -> str:
    """What a command prints; its temporary files go to `tmp`. Raises RuntimeError with the end of what it says."""
    env = {**os.environ, "TMPDIR": str(tmp)} if tmp else None
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
