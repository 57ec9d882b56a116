"""epok.main as often as wanted, in one process on a host of the lab: a run takes milliseconds, not half a second.

All is as in a process of its own, but that

- what a command printed is known as long as the rules that it reads are the same: nobody else changes them,
- there are no UDP flows to end and no nodes to try, so conntrack and connections are not,
- before another attempt nothing is waited for: nothing here goes away by itself.

    with Driver(lab.host) as driver:
        assert not driver.load(4, "*nat\n...")
        done = driver.run(["-i", "eth0", "local"], snapshot=b"...")
        print(done.status, done.err, done.restored, driver.saved(4, "nat"))
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = "/run/snapshot"
METRICS = "/run/epok.prom"
NO_FLOWS = (1, "", "conntrack v1.4.7 (conntrack-tools): 0 flow entries have been deleted.\n")
NOT_NOW = (2, "", "iptables-restore: not while its neighbour iptables-save is a fake\n")


@dataclasses.dataclass
class Done:
    """A run: exit status, both outputs, and each command that was to change something with how that ended."""

    status: int
    out: str
    err: str
    calls: list[tuple[list[str], str, int, str]]

    @property
    def restored(self) -> list[tuple[list[str], str, int, str]]:
        return [call for call in self.calls if "restore" in call[0][0]]


class Driver:
    """The process, seen from the tests; it ends with the with statement."""

    def __init__(self, space: Any) -> None:
        argv = [sys.executable, "-B", "-X", "utf8", str(Path(__file__).resolve())]
        self.process = space.popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]}
        )

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that runs epok has died; why is above"
        return json.loads(answer)

    def load(self, version: int, text: str) -> str:
        """Makes the text all that the tables have; returns what iptables-restore has against it."""
        said: str = self.ask(load=[version, text])
        return said

    def saved(self, version: int, table: str) -> str:
        """What iptables-save -t prints."""
        text: str = self.ask(saved=[version, table])
        return text

    def run(
        self,
        argv: Sequence[str],
        snapshot: bytes = b"",
        environ: Mapping[str, str] | None = None,
        fakes: Mapping[str, tuple[int, str, str]] | None = None,
    ) -> Done:
        """One run. `snapshot` is what the file SNAPSHOT has; with `fakes`, results by command, nothing is changed."""
        answer = self.ask(run=[list(argv), snapshot.decode("latin-1"), environ or {}, fakes or {}])
        return Done(*answer)


class Host:
    """The host that this process is on, as LocalHost.run() of epok sees it."""

    def __init__(self, epok: types.ModuleType) -> None:
        self.epok = epok
        self.really = epok.LocalHost.run
        self.numbers = itertools.count()
        self.states: dict[int, object] = {4: next(self.numbers), 6: next(self.numbers)}
        self.memory: dict[object, Any] = {}
        self.calls: list[tuple[list[str], str, int, str]] = []
        self.fakes: Mapping[str, Sequence[Any]] = {}
        epok.LocalHost.run = lambda local, argv, text, deadline, take=None: self.taken(
            self.run(local, tuple(argv), text, deadline), take
        )
        epok.LocalHost.reach = lambda *args: ""

    def taken(self, result: Any, take: Any) -> Any:
        """The result of a command whose output is read while it comes."""
        return result._replace(out=take([result.out.encode(*self.epok.CODING)])) if take else result

    def run(self, local: Any, argv: tuple[str, ...], text: str, deadline: Any) -> Any:
        command = " ".join(argv)
        if command in self.fakes:
            return self.epok.Result(*self.fakes[command])
        if argv[:2] == ("conntrack", "-L"):
            return self.epok.Result(0, "", "")
        if argv[0] == "conntrack" or argv[0].endswith("-restore"):
            result = self.change(local, argv, text, deadline)
            self.calls.append((list(argv), text, result.status, result.err))
            return result
        key = argv, tuple(self.states[version] for version in versions_of(argv[0]))
        if key not in self.memory:
            if len(self.memory) > 2000:
                self.memory.clear()
            self.memory[key] = self.really(local, argv, text, deadline)
        return self.memory[key]

    def change(self, local: Any, argv: tuple[str, ...], text: str, deadline: Any) -> Any:
        if argv[0] == "conntrack":
            return self.epok.Result(*NO_FLOWS)
        if self.fakes:
            return self.epok.Result(*NOT_NOW)
        [version] = versions_of(argv[0])
        self.states[version] = next(self.numbers)
        return self.really(local, argv, text, deadline)

    def load(self, version: int, text: str) -> str:
        if self.states[version] == text:
            return ""
        tool = "iptables-restore" if version == 4 else "ip6tables-restore"
        self.states[version] = next(self.numbers)
        done = self.really(LOCAL, (tool, "--counters", "--wait", "5"), text, self.epok.Deadline(50))
        if done.status == 0:
            self.states[version] = text
        return "" if done.status == 0 else done.said

    def saved(self, version: int, table: str) -> str:
        argv = ("iptables-save" if version == 4 else "ip6tables-save", "-t", table)
        text: str = self.run(LOCAL, argv, "", self.epok.Deadline(50)).out
        return text

    def main(self, argv: list[str], snapshot: str, environ: dict[str, str], fakes: dict[str, Any]) -> Sequence[Any]:
        Path(SNAPSHOT).write_bytes(snapshot.encode("latin-1"))
        for name in [name for name in os.environ if name != "PATH"]:
            del os.environ[name]
        os.environ.update(environ)
        self.calls, self.fakes = [], fakes
        out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = self.epok.main(argv)
            except BaseException:
                status = -1
                traceback.print_exc()
            # what a run leaves behind, and what that starts, must not read what the next one changes
            while others := [each for each in threading.enumerate() if each is not threading.current_thread()]:
                others[0].join()
        said = out.buffer.getvalue().decode(*self.epok.CODING)
        self.fakes = {}
        return status, said, err.getvalue(), self.calls


LOCAL = types.SimpleNamespace(name="this host", sudo=())


def versions_of(tool: str) -> tuple[int, ...]:
    """The IP versions whose rules a tool reads or changes."""
    return (6,) if tool.startswith("ip6tables") else (4,) if tool.startswith("iptables") else (4, 6) * (tool == "nft")


def serve() -> None:
    """Does what the lines of standard input ask for, until there are no more."""
    sys.path.insert(0, str(ROOT))
    import tenacity.nap

    import epok

    tenacity.nap.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0))  # type: ignore[assignment]
    host = Host(epok)
    tasks = {"load": host.load, "saved": host.saved, "run": host.main}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        [(task, arguments)] = json.loads(line).items()
        print(json.dumps(tasks[task](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
