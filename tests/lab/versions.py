"""Other versions of what epok runs on than the machine's own, each unpacked in a folder of the cache.

They come from the archive of the machine's own distribution, whose other suites have older and newer ones; what apt
checks there it checks here. Nothing is installed: each program runs with the C library of its own suite.

    root = unpacked("sid")
    iptables(root)           # EPOK_TEST_IPTABLES for tests/lab/network.py
    python(root, "3.14")     # an interpreter that has what epok and its tests import
"""

import hashlib
import platform
import re
import shutil
import sys
import time
from pathlib import Path

from lab.container import ALONE, CACHE, apt_settings, apt_sources, locked, output
from lab.machine import need
from lab.network import EPOK

# From the oldest that epok may meet to the newest that there is.
SUITES = {"debian": ("bullseye", "bookworm", "trixie", "sid"), "ubuntu": ("jammy", "noble", "devel")}
UNPACK = [
    "mmdebstrap",
    "--mode=root",
    "--variant=extract",
    "--format=directory",
    "--include=iptables",
    r"--include=~n^python3\.[0-9]+$!~v",
    "--keyring=/usr/share/keyrings",
    '--aptopt=Acquire::Check-Valid-Until "false"',  # an archive that lags is signed all the same
]
REQUIREMENTS = (EPOK.parent / "requirements.txt").read_text()
TEST_PACKAGES = re.findall(
    r"(?m)^(?:pytest|hypothesis|prometheus_client)==\S+", (EPOK.parent / "tests" / "requirements.txt").read_text()
)


def suites() -> tuple[str, ...]:
    return SUITES[platform.freedesktop_os_release()["ID"]]


def unpacked(suite: str) -> Path:
    """The root directory with a suite's iptables, its Pythons and what they need, as of this month."""
    own = platform.freedesktop_os_release()["VERSION_CODENAME"]
    source = next(line for line in apt_sources() if line.split()[2] == own).replace(f" {own} ", f" {suite} ")
    root = CACHE / f"{suite}-{digest(*UNPACK, source, time.strftime('%Y-%m'))}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE):
        if not iptables(root).exists():
            for old in CACHE.glob(f"{suite}-*"):
                shutil.rmtree(old)
            need(UNPACK[0], f"apt-get install {UNPACK[0]}")
            settings = [f"--aptopt={line}" for line in apt_settings()]
            output([*ALONE, *UNPACK, *settings, suite, str(root), source])
            write_iptables(root)
    return root


def digest(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def started(root: Path, program: str, *options: str) -> str:
    """The shell's words that start a program of the root."""
    [loader, *_] = [*root.glob("usr/lib/*-linux-*/ld-linux*"), *root.glob("lib/*-linux-*/ld-linux*")]
    libraries = ":".join(map(str, [*root.glob("lib/*-linux-*"), *root.glob("usr/lib/*-linux-*")]))
    return " ".join([f"exec {loader} --library-path {libraries}", *options, f"{root}/{program}"])


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# ------------------------------------------------ iptables


def iptables(root: Path) -> Path:
    return root / "iptables"


def write_iptables(root: Path) -> None:
    """All the names of iptables, in a folder that is there when it is whole."""
    folder, [extensions, *_] = root / "iptables.new", root.glob("usr/lib/*-linux-*/xtables")
    for family in ("iptables", "ip6tables"):
        for backend in ("nft", "legacy"):
            for name in (f"{family}-{backend}{what}" for what in ("", "-save", "-restore")):
                program = started(root, f"usr/sbin/xtables-{backend}-multi")
                write_script(folder / name, f'export XTABLES_LIBDIR={extensions}\n{program} {name} "$@"')
    folder.rename(iptables(root))


def iptables_version(root: Path) -> str:
    return output([str(iptables(root) / "iptables-nft"), "--version"]).split()[1].removeprefix("v")


# ------------------------------------------------ Python


def pythons(root: Path) -> list[str]:
    """The versions that epok runs on, like 3.14."""
    found = [path.name.removeprefix("python3.") for path in (root / "usr" / "bin").glob("python3.*")]
    return [f"3.{minor}" for minor in sorted(int(text) for text in found if text.isdigit()) if minor >= 11]


def python(root: Path, version: str) -> Path:
    """The interpreter of a virtual environment in the root, made with the first call after the requirements changed."""
    venv = root / f"venv-{version}-{digest(REQUIREMENTS, *TEST_PACKAGES)}"
    interpreter = venv / "bin" / "python"
    with locked(root):
        if not (venv / "whole").exists():
            for old in root.glob(f"venv-{version}-*"):
                shutil.rmtree(old)
            venv.mkdir()
            (venv / "pyvenv.cfg").write_text(f"home = {root}/usr/bin\n")
            start = started(root, f"usr/bin/python{version}", f"--argv0 {interpreter}")
            (venv / "bin").mkdir()
            write_script(interpreter, f'{start} "$@"')
            install(interpreter)
            (venv / "whole").touch()
    return interpreter


def install(interpreter: Path) -> None:
    """What epok needs, as locked. A package without a wheel for that Python is built by it, with this setuptools."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--python", str(interpreter)]
    output([*uv, "setuptools"])
    output([*uv, "--no-build-isolation", "-r", str(EPOK.parent / "requirements.txt")])
    output([*uv, *TEST_PACKAGES])
