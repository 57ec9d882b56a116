"""The shell blocks of README.md, by heading and number: BLOCKS["Uninstall", 0], and a person who reads them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from lab.network import EPOK, Namespace

README = (EPOK.parent / "README.md").read_text()
BLOCKS = {
    (heading, number): block
    for heading, text in re.findall(r"(?ms)^##+ ([^\n]+)\n(.*?)(?=^##+ |\Z)", README)
    for number, block in enumerate(re.findall(r"(?ms)^```sh\n(.*?)^```$", text))
}
CLUSTER = "In the cluster, every minute, over SSH"
OLDER = "Coming from the older epok in Rust"
UNINSTALL = "Uninstall"
UPGRADE = "Upgrade, renew the key"
# What test_real_cluster.py runs too.
IN_CLUSTER = {(CLUSTER, 3), (CLUSTER, 4), (OLDER, 0), (OLDER, 1)}


class Reader:
    """A person with a clone of this repository, who does what the README says on the host and where kubectl works.

    `desk` is the network of the latter; `ran` tells which blocks were run.
    """

    def __init__(self, host: Namespace, desk: Namespace, folder: Path, kubectl: str, config: str) -> None:
        self.host, self.desk = host, desk
        self.home, self.clone, self.tools = folder / "home", folder / "clone", folder / "tools"
        for made in (self.home / ".kube", self.home / ".ssh", self.tools):
            made.mkdir(parents=True)
        (self.home / ".kube" / "config").write_text(config)
        copy_checkout(self.clone)
        self.tool("kubectl", f'exec {kubectl} "$@"')
        self.environ: dict[str, str] = {}
        self.ran: set[tuple[str, int]] = set()

    def tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / name).chmod(0o755)

    def read(self, heading: str, number: int, succeeds: bool = True) -> str:
        """Run a block where its first line says, and return what it printed."""
        where, _, script = BLOCKS[heading, number].partition("\n")
        assert re.match("# (on the host|where kubectl works|in a clone)", where), where
        place = "/opt/epok" if where.endswith("that is /opt/epok") else str(self.clone)
        self.ran.add((heading, number))
        return self.shell(script, place, where.startswith("# on the host"), succeeds)

    def shell(self, script: str, place: "str | None" = None, on_host: bool = False, succeeds: bool = True) -> str:
        path = os.pathsep.join((str(self.tools), os.environ["PATH"]))
        environ = {"PATH": path, "HOME": str(self.home), **self.environ}
        script = f"cd {place or self.clone}\n{script}"
        shell = ["env", "-i", *(f"{k}={v}" for k, v in environ.items()), "sh", "-euc", script]
        # what it started ends when we do
        network = ["nsenter", f"--net=/proc/{self.desk.pid}/ns/net", "setpriv", "--pdeathsig", "KILL"]
        network += ["unshare", "--pid", "--fork", "--kill-child"]
        argv = self.host.command(shell) if on_host else [*network, *shell]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=1200)
        assert (done.returncode == 0) == succeeds, f"{script}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr


def copy_checkout(target: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=EPOK.parent, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (EPOK.parent / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(EPOK.parent / name, target / name)
