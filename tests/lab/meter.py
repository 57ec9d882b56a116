"""meter.py MOST ARGV...: runs a program, killed above MOST MB, and says at the end of standard error what it took.

The peak is that of the program alone, without what it starts; of a shell script that of its largest process. This is
a process of its own, since the peak of a child is never less than its parent's when it was forked.

    done, used = metered(lab.host, [sys.executable, str(EPOK), "local"], most=128)
"""

import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # what measures runs without it
    from lab.network import Namespace


class Used(NamedTuple):
    """What a command took; CPU is user and system time of all its processes."""

    seconds: float
    megabytes: float
    cpu: float


def metered(
    space: "Namespace",
    argv: Sequence[str],
    most: int = 1_000_000,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> "tuple[subprocess.CompletedProcess[str], Used]":
    """Runs a command in a namespace; its exit status is -9 when it took more than `most` MB."""
    meter = [sys.executable, "-IS", __file__, str(most), *argv]
    done = space.run(meter, check=check, env=None if env is None else dict(env), timeout=timeout)
    done.stderr, _, figures = done.stderr.rstrip("\n").rpartition("\n")
    return done, Used(*map(float, figures.split()))


def peak_of(process: int) -> float:
    """The most memory that a process had so far, in MB; 0 when it has ended."""
    with open(f"/proc/{process}/status") as file:
        return sum(map(int, re.findall(r"VmHWM:\s+(\d+)", file.read()))) / 1024


def main(most: int, argv: Sequence[str]) -> int:
    start = time.perf_counter()
    child = subprocess.Popen(argv)
    peak = 0.0
    while child.poll() is None:
        peak = max(peak, peak_of(child.pid))
        if peak > most:
            child.kill()
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if argv[0].endswith("sh"):
        peak = used.ru_maxrss / 1024
    print(f"\n{seconds} {peak} {used.ru_utime + used.ru_stime}", file=sys.stderr)
    return child.returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
