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
TIMER = "On the host, every minute, by systemd"
HAND = "By hand"
BROKEN = "When it does not work"
OLDER = "Coming from the older epok in Rust"
BALANCER = "As a load balancer"
UNINSTALL = "Uninstall"
UPGRADE = "Upgrade, renew the key"
DEVELOPERS = "For developers"
# What test_real_cluster.py runs; the rest is test_readme.py's.
IN_CLUSTER = {(CLUSTER, number) for number in range(5)} | {(OLDER, number) for number in range(3)}
IN_CLUSTER |= {(UPGRADE, 0), (UPGRADE, 1), (BROKEN, 1), (BALANCER, 0), (UNINSTALL, 0), (UNINSTALL, 1)}


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

    def read(self, heading: str, number: int) -> str:
        """Run a block where its first line says, and return what it printed. It must succeed."""
        self.ran.add((heading, number))
        return self.shell(BLOCKS[heading, number])

    def shell(self, block: str) -> str:
        where, _, script = block.partition("\n")
        place = "/opt/epok" if where.endswith("that is /opt/epok") else str(self.clone)
        done = self.person(where, ["sh", "-euc", f"cd {place}\n{script}"])
        assert done.returncode == 0, f"{script}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def paste(self, block: str, *shell: str) -> tuple[int, list[str]]:
        """A block pasted into an interactive shell: its exit status, and what it printed. The shell lives on."""
        lines = f'cd {self.clone}\n{block}\necho "left $?"\nfalse\necho and goes on\n'
        done = self.person(block, ["env", "PS1=", "PS2=", *shell, "-i"], lines)
        printed, left, status = done.stdout.partition("\nleft ")
        assert left and status.endswith("\nand goes on\n"), done.stdout + done.stderr
        return int(status.split()[0]), (printed + "\n" + done.stderr).splitlines()

    def person(self, where: str, argv: list[str], text: str = "") -> "subprocess.CompletedProcess[str]":
        """Run argv where a block's first line says, in the person's environment."""
        assert re.match("# (on the host|where kubectl works|in a clone)", where), where
        path = os.pathsep.join((str(self.tools), os.environ["PATH"]))
        environ = {"PATH": path, "HOME": str(self.home), **self.environ}
        shell = ["env", "-i", *(f"{k}={v}" for k, v in environ.items()), *argv]
        # what it started ends when we do
        desk = ["nsenter", f"--net=/proc/{self.desk.pid}/ns/net", "setpriv", "--pdeathsig", "KILL"]
        if where.startswith("# where kubectl works"):  # and tests/try reads /proc, which is that of outside
            desk += ["unshare", "--pid", "--fork", "--kill-child"]
        argv = self.host.command(shell) if where.startswith("# on the host") else [*desk, *shell]
        # in a session of its own: an interactive shell would take the terminal from the one that runs the tests
        return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=1200, start_new_session=True)


def copy_checkout(target: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=EPOK.parent, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (EPOK.parent / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(EPOK.parent / name, target / name)
