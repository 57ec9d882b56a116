#!/usr/bin/env python3
"""Make annotated Services of a self-hosted Kubernetes cluster reachable on ports of a host.

One run lists the Services, computes the host's whole set of iptables rules, swaps in what differs,
and exits. Running it again changes nothing.

Usage:
  epok.py [options] local
  epok.py [options] ssh [--host=<user@host>]... [--port=<port>] [--key=<file>]
                        [--known-hosts=<file>] [--host-key=<key>]
  epok.py (-h | --help)
  epok.py (-V | --version)

Examples:
  epok.py -i eth0 --dry-run local                  what would change on this machine
  epok.py -i eth0 local                            change it
  epok.py -i eth0 ssh --host=epok@192.0.2.1        the same on another one
  epok.py --status local                           what is forwarded, and how many connections came
  epok.py --explain=default/mail -i eth0 local     why a Service cannot be reached

Where the rules go:
  local    this machine (with sudo when not root and without CAP_NET_ADMIN)
  ssh      one or more hosts over SSH (with sudo when the user is not root)

Options (the command line wins, then the environment, then the default):
  -i, --interfaces=<names>     Interfaces of the host to forward packets from, separated by commas.
                               eth+ stands for all whose names begin with eth; lo for connections
                               that the host makes to its own addresses, 127.0.0.0/8 excepted.
                               Required, but for --clean, --status and --explain. [EPOK_INTERFACES]
  --external-interface=<name>  The one of them through which Services with the annotation "internal"
                               are not reachable. [EPOK_EXTERNAL_INTERFACE]
  --addresses=<cidrs>          Forward connections to these addresses of the host only, separated by
                               commas; otherwise to all of them. [EPOK_ADDRESSES]
  --batch-commands=<bool>      true: one iptables-restore run if --batch-size allows; false: one run
                               for each chain; true unless given. [EPOK_BATCH_COMMANDS]
  --batch-size=<bytes>         The largest input of iptables-restore, 1677722 unless given, 8388608
                               at most; a larger chain goes alone, a larger swap in stages: new
                               chains, the flip, old chains. [EPOK_BATCH_SIZE]
  --max-nodes=<n>              Forward a Service to at most so many of the nodes, 16 unless given.
                               Each Service has nodes of its own, so that all get their share. On a
                               host that is a node it goes to all of its pods. [EPOK_MAX_NODES]
  --masquerade=<when>          Whether nodes see the host's address instead of the client's: always,
                               never or auto, which is all but Services with externalTrafficPolicy
                               Local; auto unless given. [EPOK_MASQUERADE]
  --ports=<ports>              External ports that Services may take, like
                               "25,80,443,8000-8999/tcp,53/udp"; all but tcp/22 unless given. Over
                               SSH never the port that epok logs in by. [EPOK_PORTS]
  --publish=<addresses>        What goes into status.loadBalancer of Services of class
                               getbetter.ro/epok: IP addresses, or one host name, or auto, which
                               is the global addresses of the interfaces; none unless given.
                               [EPOK_PUBLISH]
  --mark=<bits>                Two bits of the connection mark for epok alone, 0x30000000 unless
                               given. [EPOK_MARK]
  --kubeconfig=<file>          Which cluster. Without it the account of the pod that epok runs in,
                               else ~/.kube/config. [KUBECONFIG]
  --context=<name>             Context of the kubeconfig. [EPOK_CONTEXT]
  --snapshot=<file>            Read a file instead of a cluster ("-" is standard input): what
                               "kubectl get services,nodes,endpointslices -A -o json" (or yaml)
                               prints. [EPOK_SNAPSHOT]
  --timeout=<seconds>          For the whole run, retries and all; 50 unless given. [EPOK_TIMEOUT]
  --dry-run                    Print the forwards that would come (+), go (-) and change (~), then
                               the exact iptables-restore input; change nothing.
  --clean                      Remove every rule that epok, or the older epok in Rust, put on the
                               host. Needs no cluster; with --publish, or where one is named or
                               this is a pod of it, takes away what --publish wrote, too.
  --status                     Print what the host forwards now, from its live rules, with the new
                               connections of each forward since its rules were made; what is wanted
                               and not there, when the cluster answers; and what on the host is in
                               the way. Changes nothing.
  --explain=<namespace/name>   Print the whole story of one Service, from its annotation to the live
                               rules, try its NodePort on each node, and say what is most likely
                               wrong. Changes nothing.
  -o, --output=<format>        text or json of --status, --explain and --dry-run; else text.
  --metrics-file=<file>        Write what the run did, for node_exporter's textfile collector.
                               [EPOK_METRICS_FILE]
  -q                           Log warnings and errors only.
  -v                           Log every command and request too. [EPOK_LOG_LEVEL: debug, info,
                               warning or error]
  -h, --help                   Print this.
  -V, --version                Print the version.

Options for ssh:
  -H, --host=<user@host>       user@host or user@host:port. Repeat it, or separate with commas, for
                               several hosts, which all get the same rules. [EPOK_SSH_HOST]
  -p, --port=<port>            Port of the SSH server, 22 unless given. [EPOK_SSH_PORT]
  -k, --key=<file>             Private key, else the agent's and those in ~/.ssh. [EPOK_SSH_KEY]
  --known-hosts=<file>         Keys of known hosts, as ssh reads them; ~/.ssh/known_hosts and
                               /etc/ssh/ssh_known_hosts unless given. [EPOK_SSH_KNOWN_HOSTS]
  --host-key=<key>             Accept this host key alone: an "ssh-ed25519 AAAA..." line or a
                               "SHA256:..." fingerprint, several with commas between; "any" turns
                               the check off. [EPOK_SSH_HOST_KEY]

Annotations of a Service of type NodePort or LoadBalancer:
  getbetter.ro/externalport: "25:2025, 53:dns/udp, 8000-8010:30000-30010"
      EXTERNAL [":" TARGET] [":" PROTOCOL | "/" PROTOCOL], separated by commas. EXTERNAL is a port
      of the host or a range; TARGET a NodePort of this Service, a range as long, or the name of a
      Service port; without it EXTERNAL is a Service port. externalports means the same.
  getbetter.ro/internal: ""
      Not through --external-interface.
  getbetter.ro/allow-range: "192.0.2.0/24, 2001:db8::/32"
      For these clients only; without it spec.loadBalancerSourceRanges counts.
  The prefix epok.getbetter.ro/ is as good for each of them. Another name with one of these prefixes
  is warned about; one that may be a restriction misspelt keeps the Service from being forwarded.
A Service of type LoadBalancer with loadBalancerClass getbetter.ro/epok needs no mapping: without
one each of its ports is forwarded from the external port of the same number.
A node with the annotation epok.getbetter.ro/exclude or the label epok_exclude gets no traffic.

What it needs: iptables on the host (nft or legacy), and that it forwards packets (sysctl -w
net.ipv4.ip_forward=1); of the cluster the permission to list services, nodes and endpointslices,
to create and patch events, and, for --publish, to patch services/status. Its rules on the host are
the chains EPOK and EPOK-* and what jumps to them from PREROUTING, OUTPUT, POSTROUTING and FORWARD;
it reads and writes nothing else there.

Exit status: 0 the host is right; 1 it failed and the rules are as they were, or the message says
what was done; 2 the command line is wrong; 3 --dry-run and the host differs.
"""

# Contents. A section uses only names of the sections before it.
#
#   words         errors, and values and lists for messages
#   time          deadline, retries, threads, programs
#   options       argv, environment -> Options
#   access        kubeconfigs, or a pod's account -> Access
#   cluster       Kubernetes API or file -> Snapshot
#   plan          Snapshot -> Forwards and Rejections
#   ruleset       Forwards -> chains of iptables rules
#   live          chains -> forwards, and what changed
#   transaction   iptables-save -> iptables-restore
#   hosts         the only part that runs anything there
#   swap          makes a host right, and proves it
#   news          what a run did: log, Events, metrics
#
# So far what changes a host; the rest only looks.
#
#   looking       what else decides on a host
#   showing       --dry-run, --status and --explain
#   main          the pieces put together

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (before anything that an older one does not know)
    this = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        f"error: epok needs Python 3.11 or newer, and this is {this}: "
        "apt-get install python3.11-venv && python3.11 -m venv .venv && "
        ".venv/bin/pip install -r requirements.txt, then .venv/bin/python epok.py; "
        "or use the image"
    )

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # or Ctrl-C during the imports, which take a while, is a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import base64
import bisect
import contextlib
import dataclasses
import datetime
import enum
import errno
import fnmatch
import functools
import gc
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import pwd
import queue
import random
import re
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

HOW_TO_INSTALL = (
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt, "
    "then .venv/bin/python epok.py"
)
try:
    import docopt
    import msgspec
    import tenacity
except ModuleNotFoundError as error:
    sys.exit(f"error: the Python package {error.name} is missing: {HOW_TO_INSTALL}")

VERSION = "1.0.0"
PREFIXES = ("getbetter.ro/", "epok.getbetter.ro/")  # either is right for every annotation
PORT_WORDS = ("externalport", "externalports")
PORT_ANNOTATIONS = tuple(prefix + word for word in PORT_WORDS for prefix in PREFIXES)
INTERNAL_ANNOTATIONS = tuple(prefix + "internal" for prefix in PREFIXES)
ALLOW_ANNOTATIONS = tuple(prefix + "allow-range" for prefix in PREFIXES)
SERVICE_ANNOTATIONS = (*PORT_ANNOTATIONS, *INTERNAL_ANNOTATIONS, *ALLOW_ANNOTATIONS)
EXCLUDE_ANNOTATIONS = tuple(prefix + "exclude" for prefix in PREFIXES)
BALANCER_CLASS = "getbetter.ro/epok"  # of Services of type LoadBalancer that are epok's
EXCLUDE_LABEL = "epok_exclude"
STANDARD_EXCLUDE_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
AUTOSCALER_TAINT = "ToBeDeletedByClusterAutoscaler"
# Where clouds tell a machine its secrets, beside the addresses of a link: no node's. The gate too.
METADATA = {"168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254"}
PROTOCOLS = ("tcp", "udp", "sctp")
ALL_BUT_SSH = "1-21,22/udp,22/sctp,23-65535"
MAX_STRANGE = 10  # annotations of one Service that epok does not know
MAX_REASONS = 10  # told of one Service's rejected mappings; then how many more there are
MAX_LINES = 100  # of the log about what is wrong in the cluster, in one run
MAX_NAME = 63  # characters of an annotation's name, behind the slash
MAX_MAPPINGS = 1000  # of one Service, so that none can keep the others waiting
MAX_SOURCES = 50_000  # of one Service, in the rules of all its ports
MAX_RULES = 200_000  # of an IP version, for all Services
MAX_ASKED = 1 << 24  # bytes of memory for what all Services ask for
MAX_SHARE = MAX_ASKED // 8  # for what one does
CHAIN_SOURCES = 1000  # of one chain: iptables-nft prints a chain in time that grows with its square
MAX_BUCKETS = 4096  # of clients in one chain, which has two rules for each
ROOT_RULES = 4096  # of EPOK, which each new connection meets
INPUT_BYTES, INPUT_CHAINS = 1 << 23, 10_000  # of one input at most; the gate takes a little more
HOST_RULES = 225_000  # of epok's in nat; of more, what is not needed goes before others come
MAIL_PORTS = (25, 465, 587)
CONNECT_SECONDS = 5  # to each address of an API server: of several, the first may drop all packets
LOOK_SECONDS = 10  # for looking; a fifth of --timeout, if that is more, and no more than
LOOK_LIMIT = 30
PAGE_OBJECTS = 500  # of a list at once; fewer, where they would be more bytes than
PAGE_LIMIT = 1 << 23
ANSWER_LIMIT = 1 << 26  # bytes of any other answer, and of a page of one object
RACES = 6  # tries where another writer may have come between, or the kernel refuses for good
MAX_FLOWS = 10_000  # that a run ends; the next one ends the rest
EVENT_SECONDS = 5  # for all Events of a run, so that many rejections cannot make it a long one
STATUS_SECONDS = 15  # the same for the status of Services, which people and programs wait for

log = logging.getLogger("epok")
T = TypeVar("T")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# ------------------------------------------------ words: errors, and values and lists for messages


class Fatal(Exception):
    """What stops a run, in one line for a person; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class Transient(Exception):
    """What may be gone when tried again `after` so many seconds; `advice` is for when it stays."""

    def __init__(
        self, message: str, after: float = 0, attempts: int = 1000, advice: str = ""
    ) -> None:
        super().__init__(message)
        self.after, self.attempts, self.advice = after, attempts, advice


def quoted(value: object) -> str:
    """The value in double quotes for a message: printable ASCII, cut at 100 characters."""
    try:
        text = str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits, which YAML can have
        text = "a number of thousands of digits"
    return json.dumps(text if len(text) <= 100 else text[:100] + "...")


def one_line(error: object) -> str:
    """What an error or a command says, without line breaks, cut at 300 characters."""
    text = " ".join(str(error)[:10_000].split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def printable(text: str) -> str:
    """The text in printable ASCII; what is not is escaped."""
    return re.sub(r"[^ -~]", lambda match: match[0].encode("unicode_escape").decode(), text)


def plural(count: int, one: str, many: str = "") -> str:
    return one if count == 1 else many or one + "s"


def enumerated(texts: Iterable[str]) -> str:
    """The first ten of them for a message, and how many more there are."""
    every = list(texts)
    return ", ".join(every[:10]) + (f" and {len(every) - 10} more" if len(every) > 10 else "")


COLOURS = {"+": 32, "-": 31, "~": 33, "ok": 32, "FAILED": 31, "maybe": 33, "title": 1}


def painted(text: str, what: str) -> str:
    """In colour on a terminal, unless NO_COLOR (no-color.org) is set."""
    plain = os.environ.get("NO_COLOR") or not (sys.stdout and sys.stdout.isatty())
    return text if plain or what not in COLOURS else f"\033[{COLOURS[what]}m{text}\033[0m"


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Lines of a table; a column of numbers is aligned to the right."""
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        align = str.rjust if all(cell.isdigit() for cell in cells[1:]) else str.ljust
        columns.append([align(cell, width) for cell in cells])
    return [(indent + "  ".join(row)).rstrip() for row in zip(*columns, strict=True)]


# ------------------------------------------------ time: deadline, retries, threads, programs


class Deadline:
    """The end of the time that the whole run, or a part of it, has."""

    def __init__(self, seconds: float, name: str = "--timeout") -> None:
        self.seconds, self.name = seconds, name
        self.end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never less than a millisecond: zero means no limit to many functions."""
        return max(self.end - time.monotonic(), 0.001)

    def to_look(self, part: float = 1) -> Deadline:
        """For looking alone, and no more than this part of what is left."""
        most = min(max(LOOK_SECONDS, self.seconds / 5), LOOK_LIMIT)
        return Deadline(min(most, self.remaining() * part), "the time for looking,")

    def missed(self, doing: str) -> Fatal:
        return Fatal(f"{doing}: no answer within {self.name} {round(self.seconds, 2):g} seconds")


def persist(deadline: Deadline, action: Callable[..., T], *args: object) -> T:
    """Calls `action` again while it raises Transient and time is left; the last one is Fatal."""

    def enough(state: Any) -> bool:
        # a try with less than half a second left would take too long, and hide the cause
        late = state.upcoming_sleep + 0.5 >= deadline.remaining()
        return bool(late or state.attempt_number >= state.outcome.exception().attempts)

    def announce(state: Any) -> None:
        log.info("%s; trying again in %.1f s", state.outcome.exception(), state.upcoming_sleep)

    def give_up(state: Any) -> NoReturn:
        error, tries = state.outcome.exception(), state.attempt_number
        counted = f"gave up after {tries} {plural(tries, 'try', 'tries')}"
        raise Fatal(f"{error} ({counted}){error.advice}") from error

    # two that lost a race must not meet again, so chance may double the pause
    by_chance = tenacity.wait_random_exponential(multiplier=0.2, max=5)
    pause = tenacity.wait_exponential(multiplier=0.2, max=5) + by_chance
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Transient),
        wait=tenacity.wait_exception(operator.attrgetter("after")) + pause,
        stop=enough,
        before_sleep=announce,
        retry_error_callback=give_up,
    )(action, *args)


class Background(threading.Thread):
    """Runs `work(*args)` in a thread that cannot keep the process alive."""

    def __init__(self, work: Callable[..., Any], *args: object) -> None:
        super().__init__(daemon=True)
        self.work, self.args = work, args
        self.value: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.work(*self.args)
        except BaseException as error:  # raised again by result()
            self.error = error

    def result(self, deadline: Deadline, doing: str, grace: float = 0.2) -> Any:
        """What `work` returned; raises what it raised, or Fatal if it is not done at the deadline.

        Limits of sockets do not do that: they count from byte to byte, and look-ups have none.
        `grace` is for what says by itself and better that it missed the deadline; so who waits
        for a thread that waits for another has more of it.
        """
        self.join(deadline.remaining() + grace)
        if self.is_alive():
            raise deadline.missed(doing)
        if self.error is not None:
            raise self.error
        return self.value


# a foreign comment may have any bytes, and they must come back as they were
CODING = ("utf-8", "surrogateescape")
PIECE = 1 << 16  # bytes, or characters, that are handed on at once
PIECES = 64  # that wait to be taken
TEXT_LIMIT = 1 << 24  # bytes of an output that is kept as it is
# bytes, lines and chains of epok's in a host's rules, an IP version: more than the gate lets in
RULES_LIMIT, RULES_LINES, RULES_CHAINS = 1 << 26, 700_000, 210_000
OTHERS = 60_000  # rules in a table that are not epok's, and may be before its own


class Result(NamedTuple):
    """What a command left: its exit status (127: not found) and both outputs."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return one_line(self.err or self.out or f"exit status {self.status}")


Take = Callable[[Iterable[bytes]], str]  # makes of the pieces of an output what Result.out shall be


class Meter:
    """Lets so many bytes and lines pass, of one output or several, so that no memory is filled."""

    def __init__(self, what: str, size: int, lines: int) -> None:
        self.left, self.chains = [size, lines], RULES_CHAINS
        self.complaint = f"{what}: more than {size >> 20} MiB, or {lines:,} lines"

    def passing(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Raises Fatal when it is too much."""
        for piece in pieces:
            self.left[0] -= len(piece)
            self.left[1] -= piece.count(b"\n")
            if self.exceeded:
                raise Fatal(self.complaint)
            yield piece

    @property
    def exceeded(self) -> bool:
        return min(*self.left, self.chains) < 0


def lines_of(pieces: Iterable[bytes]) -> Iterator[str]:
    """The lines of an output, without their ends, while it comes."""
    begun: list[bytes] = []  # of the line whose end has not come yet
    for piece in pieces:
        ended, end, rest = piece.rpartition(b"\n")
        if end:
            yield from b"".join([*begun, ended]).decode(*CODING).split("\n")
            begun = []
        begun.append(rest)
    yield b"".join(begun).decode(*CODING)


def collect(read: Callable[[int], bytes], doing: str, take: Take | None = None) -> Background:
    """Takes what a command prints, read a little ahead by another thread; else keeps it, as text.

    Raises Fatal in result() when it has no end.
    """
    ready: queue.Queue[bytes] = queue.Queue(PIECES)

    def work() -> None:
        try:
            while piece := read(PIECE):
                ready.put(piece)
        finally:
            ready.put(b"")

    reading = Background(work)

    def pieces() -> Iterator[bytes]:
        while (piece := ready.get()) and not reading.error:
            yield piece
        reading.join()  # it has read all there is, or failed
        if reading.error:
            raise reading.error

    def whole(pieces: Iterable[bytes]) -> str:
        return b"".join(Meter(doing, TEXT_LIMIT, TEXT_LIMIT).passing(pieces)).decode(*CODING)

    return Background(take or whole, pieces())


def feed(write: Callable[[bytes], object], close: Callable[[], object], text: str) -> Background:
    """Writes a command's input, or what it wants to read of it; in pieces, as it may be large."""

    def work() -> None:
        with contextlib.suppress(OSError):
            for begin in range(0, len(text), PIECE):
                write(text[begin : begin + PIECE].encode(*CODING))
            close()  # only then: what is cut off must not look whole

    return Background(work)


def start(argv: Sequence[str], **how: Any) -> Any:
    """The program, running; a Result that says why where it does not."""
    try:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, **how)
    except FileNotFoundError:
        return Result(127, "", f"{argv[0]}: command not found")
    except OSError as error:  # it may not be run
        return Result(126, "", f"{argv[0]}: {error.strerror}")


def execute(
    argv: Sequence[str],
    text: str,
    env: Mapping[str, str],
    deadline: Deadline,
    doing: str,
    group: bool = False,
    terminal: bool = False,
    take: Take | None = None,
) -> Result:
    """Runs a program with an input, or at the terminal; at the deadline Fatal, and it is killed.

    With `group` all that it has started is killed too, also when epok itself is ended.
    """
    pipe = None if terminal else subprocess.PIPE
    alone = group and not terminal  # another session could not read from the terminal
    child = start(argv, stdin=pipe, stderr=pipe, env=env, start_new_session=alone)
    if isinstance(child, Result):
        return child

    def stop() -> None:
        with contextlib.suppress(OSError):  # sudo may not be killed
            os.killpg(child.pid, signal.SIGKILL) if alone else child.kill()

    if group:
        atexit.register(stop)
    # not communicate(), which takes whatever comes
    if child.stdin:
        feed(child.stdin.write, child.stdin.close, text)
    pairs = [(child.stdout, take), (child.stderr, None)]
    taking = [collect(file.read1, doing, each) for file, each in pairs if file]
    try:
        texts = [each.result(deadline, doing, 0) for each in taking]
        return Result(child.wait(deadline.remaining()), texts[0], "".join(texts[1:]))
    except (Fatal, subprocess.TimeoutExpired) as error:
        stop()
        raise error if isinstance(error, Fatal) else deadline.missed(doing) from None
    finally:
        atexit.unregister(stop)


def connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A TCP connection to the first address of the host that takes one; a dead one costs 0.25 s.

    Raises OSError that names addresses and port, or socket.gaierror when the name has no address.
    """
    import asyncio

    import aiohappyeyeballs  # RFC 8305

    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    addresses = Background(look_up).result(deadline, f"looking up {host}")
    race = aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=0.25)
    left = deadline.remaining()
    patience = max(left - 0.5, left / 2)  # to end before the deadline, with the cause
    try:
        connection = asyncio.run(asyncio.wait_for(race, patience))
        connection.settimeout(deadline.remaining())
        # paramiko does not, which costs 40 ms a channel
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    except OSError as error:
        tried = " and ".join(dict.fromkeys(address[0] for *_, address in addresses))
        numbers = dict.fromkeys(re.findall(r"\[Errno (\d+)\]", str(error)))
        why = ", ".join(os.strerror(int(number)) for number in numbers) or "no answer"
        raise OSError(f"{tried} port {port}: {why}") from None


# ------------------------------------------------ options: argv, environment -> Options


class Mark(NamedTuple):
    """Bits of the connection mark: epok forwarded the connection; and masquerade it."""

    forwarded: int
    masquerade: int


class Range(NamedTuple):
    """Ports, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


class Login(NamedTuple):
    """Where and as whom to log in over SSH."""

    user: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}" + (f":{self.port}" if self.port != 22 else "")


def one_of(*words: str, **older: str) -> Callable[[str], str]:
    """Converts to one of the words; `older` are what the older epok called some of them."""

    def convert(text: str) -> str:
        word = older.get(text.lower(), text.lower())
        if word not in words:
            raise ValueError("accepted are " + ", ".join(words))
        return word

    return convert


def number_of(what: str, most: int = 999_999_999_999) -> Callable[[str], int]:
    """Converts to a whole number above zero, with no more digits than the largest one has."""
    digits = f"[0-9]{{1,{len(str(most))}}}"

    def convert(text: str) -> int:
        if not (re.fullmatch(digits, text) and 1 <= int(text) <= most):
            raise ValueError(f"accepted is {what} from 1 to {most}")
        return int(text)

    return convert


to_level = one_of("debug", "info", "warning", "error", warn="warning", trace="debug")
to_port = number_of("a port", 65535)


def to_seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) == 0:
        raise ValueError("accepted is a number of seconds above zero")
    return float(text)


def to_mark(text: str) -> Mark:
    value = int(text, 0) if re.fullmatch("0[xX][0-9A-Fa-f]{1,8}|[1-9][0-9]{0,9}", text) else 0
    bits = [1 << n for n in range(value.bit_length()) if value >> n & 1]
    if len(bits) != 2 or value >> 32:
        raise ValueError("accepted is a number of 32 bits, two of them set, like 0x30000000")
    return Mark(*bits)


def items(text: str) -> list[str]:
    """What stands between the commas, without white space and empty ones."""
    return [item for part in re.findall("[^,]+", text) if (item := part.strip(" \t\r\n"))]


def to_range(text: str) -> Range | None:
    """Reads "25" or "8000-8010", None if it is neither. Raises ValueError if it is no port."""
    # no leading zeros: to some programs, iptables among them, they mean an octal number
    match = re.fullmatch(r"(0|[1-9][0-9]*)(?:[ \t]*-[ \t]*(0|[1-9][0-9]*))?", text)
    if not match:
        return None
    ends = [match[1], match[2] or match[1]]
    if any(len(end) > 5 or not 1 <= int(end) <= 65535 for end in ends):
        raise ValueError(f"{quoted(text)} is out of range; ports are 1 to 65535")
    if int(ends[0]) > int(ends[1]):
        raise ValueError(f"{quoted(text)} runs backwards; write the lower port first")
    return Range(int(ends[0]), int(ends[1]))


class Allowed(NamedTuple):
    """External ports that Services may take: of a protocol, or of all where that is empty."""

    ports: Range
    protocol: str

    def __str__(self) -> str:
        return f"{self.ports}{self.protocol and '/'}{self.protocol}"

    def has(self, protocol: str, port: int) -> bool:
        return self.protocol in ("", protocol) and self.ports.first <= port <= self.ports.last


def to_ports(text: str) -> tuple[Allowed, ...]:
    allowed = []
    for item in items(text) or [text]:
        external, slash, protocol = (part.strip(" \t\r\n") for part in item.lower().partition("/"))
        ports = to_range(external)
        if not ports or (slash and protocol not in PROTOCOLS):
            raise ValueError(f"{quoted(item)} is no port like 25, 8000-8999/tcp or 53/udp")
        allowed.append(Allowed(ports, protocol))
    return tuple(dict.fromkeys(allowed))


def to_interfaces(text: str) -> tuple[str, ...]:
    for name in items(text):
        if not re.fullmatch(r"[A-Za-z0-9_.@][A-Za-z0-9_.@-]*\+?", name) or len(name) > 15:
            raise ValueError(f"{quoted(name)} is no interface like eth0, or eth+ for all of eth")
    return tuple(dict.fromkeys(items(text)))


def to_networks(text: str) -> tuple[Network, ...]:
    """Addresses and CIDRs; bits behind the prefix length do not count, as in Kubernetes."""
    networks = []
    for item in items(text) or [text] * bool(text):
        try:
            mask = re.fullmatch(r"[0-9A-Fa-f.:]+(?:/([0-9]{1,3}|[0-9.]{7,15}))?", item)
            network = ipaddress.ip_network(item, strict=False)
            if not mask or ("." in (mask[1] or "") and mask[1] != str(network.netmask)):
                raise ValueError  # 0.0.0.255 is 255.255.255.0 to ipaddress, but not to iptables
            networks.append(network)
        except ValueError:
            raise ValueError(
                f"{quoted(item)} is no CIDR like 192.0.2.0/24, 2001:db8::/32"
            ) from None
    return tuple(dict.fromkeys(networks))


def to_address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def usable(text: str) -> Address | None:
    """The address of a node, pod or host, or None when nothing can be sent there."""
    address = to_address(text)
    if address is None or address.is_unspecified or address.is_loopback or address.is_multicast:
        return None
    if address.is_reserved or address.is_link_local or str(address) in METADATA:
        return None
    mapped = address.version == 6 and (address.ipv4_mapped or address.scope_id)
    return None if mapped else address


def to_published(text: str) -> tuple[str, ...]:
    """Addresses, or one host name or the word auto, as they stand in the status of a Service."""
    names = [name.lower() for name in items(text)]
    addresses = [str(address) for name in names if (address := usable(name))]
    if names and len(addresses) == len(names):
        return tuple(dict.fromkeys(addresses))
    label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    host_name = rf"({label}\.)*(?![0-9]+$){label}"  # what ends in a number is an address misspelt
    if len(names) != 1 or len(names[0]) > 253 or not re.fullmatch(host_name, names[0]):
        raise ValueError("accepted are IP addresses that can be reached, one host name, or auto")
    return () if names == ["none"] else (names[0],)


def to_logins(text: str) -> tuple[Login, ...]:
    """Whom to log in as, and where; port 0 where none is named."""
    name, ipv6, zone = r"[\w.-]+", "[0-9A-Fa-f:.]+", r"%[\w.-]+"
    host = rf"{name}|\[{ipv6}(?:{zone})?\]|{ipv6}{zone}$"
    logins = []
    for item in items(text):
        match = re.fullmatch(rf"({name})@({host})(?::([0-9]{{1,5}}))?", item, re.ASCII)
        user, where, port = match.groups() if match else ("", "", "")
        address = where.strip("[]")
        if not (re.fullmatch(name, where) or to_address(address)):
            raise ValueError(f"{quoted(item)} is no user@host, user@host:port or user@[IPv6]:port")
        logins.append(Login(user, address, to_port(port) if port else 0))
    return tuple(logins)


def to_host_keys(text: str) -> tuple[str, ...]:
    key = r"any|SHA256:[A-Za-z0-9+/]{43}=?|[a-z0-9@.-]+ +[A-Za-z0-9+/]+={0,2}( .*)?"
    for item in items(text) or [text] * bool(text):
        if not re.fullmatch(key, item):
            raise ValueError(f'{quoted(item)} is no "ssh-ed25519 AAAA...", "SHA256:..." or "any"')
    return tuple(items(text))


def to_service_name(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9.-]{1,253}/[A-Za-z0-9.-]{1,253}", text):
        raise ValueError("accepted is namespace/name of a Service, like default/mail")
    return text


def given_by(variable: str, default: str, convert: Callable[[str], Any]) -> Any:
    """A field of Options that is an option with a value: its variable, default and converter."""
    return field(metadata={"variable": variable, "default": default, "convert": convert})


@dataclass(frozen=True)
class Options:
    """A command line and environment that were checked."""

    executor: str
    dry_run: bool
    clean: bool
    status: bool
    explain: str = given_by("", "", to_service_name)
    output: str = given_by("", "text", one_of("text", "json"))
    log_level: str = given_by("EPOK_LOG_LEVEL", "info", to_level)
    interfaces: tuple[str, ...] = given_by("EPOK_INTERFACES", "", to_interfaces)
    external_interface: str = given_by("EPOK_EXTERNAL_INTERFACE", "", str)
    addresses: tuple[Network, ...] = given_by("EPOK_ADDRESSES", "", to_networks)
    batch_commands: str = given_by("EPOK_BATCH_COMMANDS", "true", one_of("true", "false"))
    batch_size: int = given_by("EPOK_BATCH_SIZE", "1677722", number_of("a number of bytes"))
    max_nodes: int = given_by("EPOK_MAX_NODES", "16", number_of("a number of nodes"))
    masquerade: str = given_by("EPOK_MASQUERADE", "auto", one_of("auto", "always", "never"))
    ports: tuple[Allowed, ...] = given_by("EPOK_PORTS", ALL_BUT_SSH, to_ports)
    publish: tuple[str, ...] = given_by("EPOK_PUBLISH", "none", to_published)
    mark: Mark = given_by("EPOK_MARK", "0x30000000", to_mark)
    kubeconfig: str = given_by("KUBECONFIG", "", str)
    context: str = given_by("EPOK_CONTEXT", "", str)
    snapshot: str = given_by("EPOK_SNAPSHOT", "", str)
    timeout: float = given_by("EPOK_TIMEOUT", "50", to_seconds)
    metrics_file: str = given_by("EPOK_METRICS_FILE", "", os.path.expanduser)
    host: tuple[Login, ...] = given_by("EPOK_SSH_HOST", "", to_logins)
    port: int = given_by("EPOK_SSH_PORT", "22", to_port)
    key: str = given_by("EPOK_SSH_KEY", "", os.path.expanduser)
    known_hosts: str = given_by("EPOK_SSH_KNOWN_HOSTS", "", os.path.expanduser)
    host_key: tuple[str, ...] = given_by("EPOK_SSH_HOST_KEY", "", to_host_keys)

    @property
    def looks(self) -> bool:
        """Whether the run only looks, at what is there rather than at what would change."""
        return self.status or bool(self.explain)

    def covers(self, address: Address) -> bool:
        """Whether connections to this address of the host are forwarded."""
        networks = self.addresses
        return not networks or any(address in network for network in networks)

    def takes_from(self, interface: str) -> bool:
        """Whether connections that come by this interface are forwarded."""
        return any(like(pattern, interface) for pattern in self.interfaces)


def like(pattern: str, interface: str) -> bool | None:
    """Whether an interface is the one meant, or begins as a pattern that ends in "+"."""
    if not interface:
        return None
    return interface.startswith(pattern[:-1]) if pattern.endswith("+") else interface == pattern


class Setting(NamedTuple):
    """An option with a value: where its text may come from and what makes the value of it."""

    name: str
    option: str
    variable: str
    default: str
    convert: Callable[[str], Any]


SETTINGS = [
    Setting(made.name, "--" + made.name.replace("_", "-"), **made.metadata)
    for made in dataclasses.fields(Options)
    if made.metadata
]


def strange_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with variables that the older epok knew, or that are nearly one of epok's."""
    variables = [setting.variable for setting in SETTINGS if setting.variable]
    for name, text in environ.items():
        if name in variables or not name.startswith("EPOK_") or not text:
            continue
        import difflib

        nothing = f"{name} in the environment means nothing to epok; "
        if name == "EPOK_EXTRA_INTERNAL_IPS":
            yield nothing + "what it was to the older one is --addresses (EPOK_ADDRESSES)"
        elif nearest := difflib.get_close_matches(name, variables, 1, 0.8):
            yield nothing + f"what comes nearest is {nearest[0]}"


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Checks a command line and environment. Raises Fatal with status 2 when they make no sense."""
    words = read_words(argv)
    if words["-v"] or words["-q"]:
        words["--log-level"] = "debug" if words["-v"] else "warning"
    values = {name: words["--" + name.replace("_", "-")] for name in ("dry_run", "clean", "status")}
    values["executor"] = "ssh" if words["ssh"] else "local"
    for setting in SETTINGS:
        source, text = setting.option, words.get(setting.option)
        if isinstance(text, list):
            text = ",".join(text) if text else None
        if text is None:
            source = f"{setting.variable} in the environment"
            text = environ.get(setting.variable) or setting.default
        elif not text:  # from an unset variable of a shell script, perhaps
            raise Fatal(f"{source} needs a value", 2)
        try:
            values[setting.name] = setting.convert(text)
        except ValueError as error:
            raise Fatal(f"{source}: {quoted(text)}: {error}", 2) from None
    port = values["port"]
    logins = values["host"] if words["ssh"] else ()
    values["host"] = tuple(login._replace(port=login.port or port) for login in logins)
    options = Options(**values)
    check_combination(options)
    return options


def read_words(argv: Sequence[str]) -> dict[str, Any]:
    """docopt's dictionary; prints help or version and exits when asked for."""
    usage = __doc__ or ""
    options = re.findall(r"--[a-z-]+", usage)
    valued = "".join(re.findall(r"-(\w), --[a-z-]+=<", usage))
    for word in argv:
        # docopt takes --cle for --clean, as any unique beginning of an option, and -:V for -V
        option = word.split("=")[0] if word.startswith("--") else word
        odd = re.match(rf"-[^-{valued}]*[^-{valued}\w]", word)
        if odd or (word.startswith("--") and option not in options):
            raise Fatal(f"unknown option {quoted(option)}; epok.py --help lists them all", 2)
    try:
        return dict(docopt.docopt(usage, list(argv), version=f"epok {VERSION}"))
    except docopt.DocoptExit as error:
        raise Fatal(explain_usage(str(error), argv), 2) from None


def explain_usage(problem: str, argv: Sequence[str]) -> str:
    """One line for what docopt says over several, in the terms of its own classes."""
    first = problem.splitlines()[0]
    if "requires argument" in first or "must not have" in first:
        return f"{first.replace('requires argument', 'needs a value')}; see epok.py --help"
    shorts = re.findall(r"(-\w), --[a-z-]+=<", __doc__ or "")
    takes_value = {*shorts, *(setting.option for setting in SETTINGS)}
    rest = iter(argv)
    arguments = [word for word in rest if not (word in takes_value and next(rest, None))]
    if not {"local", "ssh"} & set(arguments):
        ways = "epok.py [options] local, or epok.py [options] ssh --host=<user@host>"
        return f"say where the rules go: {ways}"
    parts = r"Option\((?:'-\w', )?(?:None, )?'?(--?[\w-]+)|Argument\(None, '(.*?)'\)"
    unexpected = ", ".join(quoted(option or word) for option, word in re.findall(parts, first))
    return f"unexpected or repeated: {unexpected or quoted(' '.join(argv))}; see epok.py --help"


def check_combination(options: Options) -> None:
    """Raises Fatal for options that need another one, or that contradict each other."""
    ssh, outside = options.executor == "ssh", options.external_interface
    hosts = {(login.host.lower(), login.port) for login in options.host}
    if not (options.clean or options.looks):
        if not options.interfaces:
            ask = "give --interfaces (or EPOK_INTERFACES), like -i eth0; see ip -br addr"
            raise Fatal(f"which interfaces of the host? {ask}", 2)
        if outside and outside not in options.interfaces:
            names = ",".join(options.interfaces)
            raise Fatal(f"--external-interface {quoted(outside)} is not one of -i {names}", 2)
    if ssh and not options.host:
        raise Fatal("which host? give --host (or EPOK_SSH_HOST), like --host epok@192.0.2.1", 2)
    if ssh and len(hosts) < len(options.host):
        raise Fatal("--host names one host twice", 2)
    if bool(options.explain) + options.status + (options.dry_run or options.clean) > 1:
        raise Fatal("give one of --status, --explain and --dry-run or --clean, not several", 2)
    if options.output == "json" and not (options.looks or options.dry_run):
        raise Fatal("--output json is for --status, --explain and --dry-run, which print", 2)


# ------------------------------------------------ access: kubeconfigs, or a pod's account -> Access


def in_pod() -> bool:
    """Whether epok runs in a pod, so with its account, and with files that nobody can write to."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


# What kubectl reads of a kubeconfig: k8s.io/client-go/tools/clientcmd/api/v1.
# A field that is not there is empty.
class ClusterEntry(msgspec.Struct, rename="kebab"):
    server: str = ""
    tls_server_name: str = ""
    insecure_skip_tls_verify: bool = False
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    proxy_url: str = ""
    extensions: list[dict[str, Any]] = []


class Plugin(msgspec.Struct, rename="camel"):
    """A program that makes credentials: client.authentication.k8s.io."""

    command: str = ""
    args: list[str] = []
    env: list[dict[str, str]] = []
    api_version: str = ""
    provide_cluster_info: bool = False
    interactive_mode: str = ""


class UserEntry(msgspec.Struct, rename="kebab"):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(name="tokenFile", default="")
    impersonate: str = msgspec.field(name="as", default="")
    as_uid: str = ""
    as_groups: list[str] = []
    as_user_extra: dict[str, list[str]] = {}
    username: str = ""
    password: str = ""
    auth_provider: dict[str, Any] | None = None
    exec: Plugin | None = None


class ContextEntry(msgspec.Struct, frozen=True):
    cluster: str = ""
    user: str = ""


class Entry(msgspec.Struct):
    """An entry of one of a kubeconfig's three lists, with what it has of that list's kind."""

    name: str = ""
    cluster: ClusterEntry = msgspec.field(default_factory=ClusterEntry)
    user: UserEntry = msgspec.field(default_factory=UserEntry)
    context: ContextEntry = ContextEntry()


class Kubeconfig(msgspec.Struct, rename="kebab"):
    kind: Literal["Config", ""] = ""
    api_version: Literal["v1", ""] = msgspec.field(name="apiVersion", default="")
    current_context: str = ""
    clusters: list[Entry] = []
    users: list[Entry] = []
    contexts: list[Entry] = []


class Credentials(msgspec.Struct, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""


class PluginAnswer(msgspec.Struct, rename="camel"):
    """What a plugin prints."""

    api_version: str
    status: Credentials
    kind: Literal["ExecCredential", ""] = ""


@dataclass(frozen=True)
class Access:
    """Where a cluster is, how its server is known, and as whom to ask it.

    For messages: `origin` is where all this stands, `file` the name of that if it is one file, and
    `kubectl` the command that goes the same way. `ca` is PEM, empty for the system's own
    authorities, and `certificate` a chain and its key, in PEM.
    """

    origin: str
    server: str
    kubectl: str = ""
    file: str = ""
    ca: str = ""
    verify: bool = True
    server_name: str = ""
    proxy: str = ""
    certificate: tuple[str, str] | None = None
    headers: Sequence[tuple[str, str]] = ()

    @property
    def shows(self) -> str:
        """By what the server may know who asks; empty when by nothing."""
        scheme = dict(self.headers).get("Authorization", "").partition(" ")[0].lower()
        otherwise = "client certificate" if self.certificate else ""
        return {"basic": "password", "bearer": "token"}.get(scheme, otherwise)


def documents(data: bytes) -> Iterator[Any]:
    """What is in JSON, or in each document of YAML. Raises ValueError, which tells no secret."""
    try:
        yield json.loads(data)  # first, since PyYAML takes no tabs
        return
    except ValueError:
        pass
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    # times stay texts
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _, node: node.value)
    try:
        # from a file, since PyYAML's errors show the line of a text
        yield from yaml.load_all(io.BytesIO(data), Loader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the last for a wrong !!int, !!bool
        quotes = r"(^|(alias|anchor|tag|handle|:) )'[^']*'"
        raise ValueError(re.sub(quotes, r"\1'...'", one_line(error))) from None


def without_nulls(value: Any, other: Any = None) -> Any:
    """Leaves out null fields, but of labels and annotations; another null becomes `other`."""
    if isinstance(value, list):
        return [without_nulls(each, other) for each in value]
    if not isinstance(value, dict):
        return other if value is None else value
    return {
        name: each if name in ("labels", "annotations") else without_nulls(each, other)
        for name, each in value.items()
        if each is not None
    }


def read_kubeconfig(file: str) -> Kubeconfig | None:
    """One file, its paths made absolute; None when it is not there. Raises Fatal."""
    try:
        with open(file, "rb") as opened:
            document = next(documents(opened.read()), None)
        config = msgspec.convert(without_nulls(document, {}), Kubeconfig)
        for entries in (config.clusters, config.users, config.contexts):
            names = sorted(quoted(entry.name) for entry in entries)
            if len(set(names)) < len(names):
                raise ValueError(f"a name stands twice in one list: {enumerated(names)}")
    except FileNotFoundError:
        return None
    except PermissionError:  # as k3s and kubeadm make it
        copy = f"sudo install -m 600 -o {os.geteuid()} {shlex.quote(file)} kubeconfig"
        how = f"run epok as its owner, or: {copy}, and give --kubeconfig kubeconfig"
        raise Fatal(f"kubeconfig {file}: this user may not read it; {how}") from None
    except (OSError, ValueError, RecursionError) as error:
        check = f"check it with kubectl config view --kubeconfig {shlex.quote(file)}"
        raise Fatal(f"kubeconfig {file}: {one_line(error)}; {check}") from None
    folder = os.path.dirname(os.path.abspath(file))
    for entry in (*config.clusters, *config.users):
        resolve(folder, entry.cluster, "certificate_authority")
        resolve(folder, entry.user, "client_certificate", "client_key", "token_file")
        if entry.user.exec and "/" in entry.user.exec.command:
            resolve(folder, entry.user.exec, "command")
    return config


def resolve(folder: str, entry: msgspec.Struct, *fields: str) -> None:
    """Paths in a kubeconfig are relative to its own folder."""
    for name in fields:
        if path := getattr(entry, name):
            setattr(entry, name, os.path.normpath(os.path.join(folder, path)))


def at_hand(options: Options) -> bool:
    """Whether a cluster is named that --clean may ask, which needs none."""
    named = options.kubeconfig or options.context or options.publish or in_pod()
    return bool(named and not options.snapshot)


def kubeconfig_access(options: Options, deadline: Deadline) -> Access:
    """What the kubeconfigs say, read as kubectl reads them. Raises Fatal."""
    names = options.kubeconfig or "~/.kube/config"
    # the variable is a list; the option names one file, whatever is in its name
    several = names.split(os.pathsep) if names == os.environ.get("KUBECONFIG") else [names]
    files = [os.path.expanduser(name) for name in several if name]
    file = files[0] if len(files) == 1 else ""
    origin = f"kubeconfig {file or names}"
    configs = [config for each in files if (config := read_kubeconfig(each))]
    if not configs:
        places = "k3s has --kubeconfig /etc/rancher/k3s/k3s.yaml, "
        places += "kubeadm --kubeconfig /etc/kubernetes/admin.conf"
        raise Fatal(f"{origin}: there is no such file; {places}; or give --snapshot to do without")
    kubectl = ["kubectl", *(["--kubeconfig", file] if file else [])]
    kubectl += ["--context", options.context] * bool(options.context)
    access = Access(origin, "", shlex.join(kubectl), file)
    try:
        return chosen_access(configs, options.context, access, deadline)
    except OSError as error:  # as under systemd, which copies the kubeconfig alone
        flat = f"{access.kubectl} config view --raw --flatten"
        raise Fatal(f"{origin}: {one_line(error)}; what {flat} prints needs no files") from None
    except ValueError as error:
        raise Fatal(f"{origin}: {one_line(error)}") from None


def chosen_access(
    configs: Sequence[Kubeconfig], name: str, access: Access, deadline: Deadline
) -> Access:
    """Adds what a context says, the current one if none is named. Raises as user_access()."""
    backwards = configs[::-1]  # so that what the first file has comes last, and stays
    contexts = {entry.name: entry.context for config in backwards for entry in config.contexts}
    clusters = {entry.name: entry.cluster for config in backwards for entry in config.clusters}
    users = {entry.name: entry.user for config in backwards for entry in config.users}
    name = name or next(filter(None, (config.current_context for config in configs)), "")
    context = chosen(contexts, name, "context", "give --context")
    cluster = chosen(clusters, context.cluster, "cluster", f"context {quoted(name)} names it")
    user = users.get(context.user, UserEntry())
    access = user_access(user, cluster, cluster_access(cluster, access), deadline)
    if not access.shows and access.server.startswith("https:"):  # kubectl proxy needs none
        lacks = "has none" if context.user in users else "is not among its users"
        who = f"user {quoted(context.user)} of context {quoted(name)} {lacks}"
        give = "give it a token, tokenFile, client-certificate or exec"
        raise ValueError(f"there are no credentials: {who}; {give}")
    return access


def chosen(entries: Mapping[str, T], name: str, what: str, hint: str) -> T:
    if name in entries:
        return entries[name]
    there = f"there are {enumerated(map(quoted, entries))}" if entries else "there are none at all"
    which = f"there is no {what} {quoted(name)}" if name else f"no {what} is named"
    raise ValueError(f"{which}; {hint}; {there}")


def data_or_file(entry: msgspec.Struct, name: str) -> str:
    """What a field has in base64, or its file, as latin-1. Raises ValueError, OSError."""
    data, file, word = getattr(entry, f"{name}_data"), getattr(entry, name), name.replace("_", "-")
    if data and file:
        raise ValueError(f"there are both {word} and {word}-data; take one of them out")
    if file:
        with open(file, encoding="latin-1") as opened:
            return opened.read()
    try:
        return base64.b64decode(re.sub(r"[\r\n]", "", data), validate=True).decode("latin-1")
    except ValueError:
        raise ValueError(f"{word}-data is not base64") from None


def hidden(url: str) -> str:
    """An address less the user and the password in it, whatever characters they have."""
    return re.sub(r"^(\w*://)?.*@", r"\1...@", url, flags=re.DOTALL)


def to_url(text: str, what: str, *schemes: str) -> urllib.parse.SplitResult:
    """An address of one of these schemes. Raises ValueError, which shows no password."""
    with contextlib.suppress(ValueError):
        url = urllib.parse.urlsplit(text)
        if url.scheme in schemes and url.hostname and url.port != 0:
            return url
    ways = " or ".join(f"{scheme}://" for scheme in schemes)
    raise ValueError(f"{what} {quoted(hidden(text))}: accepted is {ways} and a host, maybe a port")


def server_url(server: str) -> str:
    """The address of an API server in a kubeconfig; without a scheme it is one of plain http."""
    if not server:
        raise ValueError("the cluster has no server")
    url = to_url(server if "://" in server else f"http://{server}", "server", "https", "http")
    if "@" in url.netloc:
        raise ValueError(f"server {quoted(hidden(server))}: user and password do not belong there")
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def cluster_access(cluster: ClusterEntry, access: Access) -> Access:
    """Adds the server, its authority, and the way to it. Raises ValueError, OSError."""
    server, proxy = server_url(cluster.server), cluster.proxy_url
    ca = data_or_file(cluster, "certificate_authority")
    if ca and cluster.insecure_skip_tls_verify:
        raise ValueError("certificate-authority and insecure-skip-tls-verify: take one of them out")
    if proxy:
        to_url(proxy, "proxy-url", "http", "https", "socks5")
    return dataclasses.replace(
        access,
        server=server,
        ca=ca,
        verify=not cluster.insecure_skip_tls_verify,
        server_name=cluster.tls_server_name,
        proxy=proxy or proxy_for(server),
    )


def proxy_for(server: str) -> str:
    """The environment's proxy for a server, as Go has it: golang.org/x/net/http/httpproxy."""
    url = urllib.parse.urlsplit(server)
    name = f"{url.scheme}_proxy"
    proxy = os.environ.get(name.upper()) or os.environ.get(name)
    host, port = url.hostname or "", url.port or {"http": 80, "https": 443}[url.scheme]
    address = to_address(host)
    if not proxy or host == "localhost" or (address and address.is_loopback):
        return ""  # never for the machine's own addresses
    spared = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    if any(spares(entry.strip().lower(), host, port) for entry in spared.split(",")):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def spares(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means a host: *, CIDR, or address or domain, maybe with port."""
    if entry == "*":
        return True
    match = re.fullmatch(r"(?:\[([^/]*)\]|([^:/]*)):([^:]*)", entry)
    name, only = (match[1] or match[2], match[3]) if match else (entry, "")
    if not name or only not in ("", str(port)):
        return False
    if address := to_address(host):
        try:
            return address in ipaddress.ip_network(name, strict=False)
        except ValueError:
            return False
    name = name.removeprefix("*")
    below = name if name.startswith(".") else f".{name}"
    return host == name or host.endswith(below)


def user_access(
    user: UserEntry, cluster: ClusterEntry, access: Access, deadline: Deadline
) -> Access:
    """Adds who epok is. Raises Fatal, ValueError, OSError."""
    if user.auth_provider:
        name = quoted(user.auth_provider.get("name", ""))
        raise ValueError(f"auth-provider {name}: give a token, or a login plugin (exec), instead")
    token, basic = bearer_token(user), bool(user.username or user.password)
    if token and basic:
        raise ValueError("there are both a token and a username; take one of them out")
    certificate = None
    if user.client_certificate or user.client_certificate_data:
        certificate = data_or_file(user, "client_certificate"), data_or_file(user, "client_key")
        if not certificate[1]:
            raise ValueError("there is a client-certificate, but no client-key")
    if user.exec and not (token or basic or certificate):
        token, certificate = run_plugin(user.exec, cluster, access, deadline)
    headers = [("Authorization", f"Bearer {token}")] if token else []
    if basic:
        headers = [("Authorization", basic_words(user.username, user.password))]
    headers += impersonation(user)
    return dataclasses.replace(access, certificate=certificate, headers=headers)


def bearer_token(user: UserEntry) -> str:
    """That of the file, which somebody renews, before the one beside it. Raises ValueError."""
    if not user.token_file:
        return user.token
    try:
        with open(user.token_file, encoding="utf-8") as file:
            token, why = file.read().strip(), "it is empty"
    except OSError as error:
        token, why = "", one_line(error)
    if not (token or user.token):
        raise ValueError(f"tokenFile {user.token_file}: {why}")
    return token or user.token


def basic_words(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def impersonation(user: UserEntry) -> list[tuple[str, str]]:
    """The headers for whom the user wants to be taken. Raises ValueError."""
    if not user.impersonate:
        if user.as_uid or user.as_groups or user.as_user_extra:
            raise ValueError("there is as-uid, as-groups or as-user-extra, but no as")
        return []
    headers = [("Impersonate-User", user.impersonate)]
    headers += [("Impersonate-Uid", user.as_uid)] * bool(user.as_uid)
    headers += [("Impersonate-Group", group) for group in user.as_groups]
    for key, values in user.as_user_extra.items():
        # a header's name has other characters percent-encoded: Kubernetes, user impersonation
        name = urllib.parse.quote(key, safe="!#$&'*+^`|")
        headers += [(f"Impersonate-Extra-{name}", value) for value in values]
    return headers


# Whether a plugin may ask a person, where its entry does not say so; with v1 it has to.
PLUGIN_MODES = {
    "client.authentication.k8s.io/v1": "",
    "client.authentication.k8s.io/v1beta1": "IfAvailable",
}


def run_plugin(
    plugin: Plugin, cluster: ClusterEntry, access: Access, deadline: Deadline
) -> tuple[str, tuple[str, str] | None]:
    """The token, and certificate and key, that a login plugin makes. Raises Fatal, ValueError."""
    mode = plugin_mode(plugin)
    doing = f"{access.origin}: its login plugin {quoted(plugin.command)}"
    check = f"check it with {access.kubectl} get nodes"
    instead = f"{check}; a token or client-certificate needs no plugin"
    terminal = mode != "Never" and sys.stdin is not None and sys.stdin.isatty()
    if mode == "Always" and not terminal:
        why = "asks a person, and there is no terminal (interactiveMode Always)"
        raise Fatal(f"{doing} {why}; {instead}")
    spec: dict[str, Any] = {"interactive": terminal}
    if plugin.provide_cluster_info:
        spec["cluster"] = plugin_cluster(cluster, access)
    asked = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": spec}
    variables = {variable["name"]: variable.get("value", "") for variable in plugin.env}
    env = {**os.environ, **variables, "KUBERNETES_EXEC_INFO": json.dumps(asked)}
    program = shutil.which(plugin.command) or plugin.command  # in epok's PATH, not in its own
    try:
        done = execute([program, *plugin.args], "", env, deadline, doing, True, terminal)
    except Fatal as error:
        raise Fatal(f"{error}; does it wait for a person? {instead}") from None
    if done.status:
        # not what it printed, which may have a token
        said = one_line(done.err or f"exit status {done.status}")
        raise Fatal(f"{doing} failed, {said}; {instead}")
    try:
        return credentials_in(done.out, plugin.api_version)
    except (ValueError, RecursionError) as error:
        raise Fatal(f"{doing} prints no credentials: {one_line(error)}; {instead}") from None


def plugin_mode(plugin: Plugin) -> str:
    """Whether a login plugin may ask a person. Raises ValueError where its entry is not right."""
    if not plugin.command or plugin.api_version not in PLUGIN_MODES:
        raise ValueError(f"exec needs a command, and an apiVersion: {' or '.join(PLUGIN_MODES)}")
    mode = plugin.interactive_mode or PLUGIN_MODES[plugin.api_version]
    if mode not in ("Never", "IfAvailable", "Always"):
        raise ValueError("exec needs an interactiveMode: Never, IfAvailable or Always")
    if not all(variable.get("name") for variable in plugin.env):
        raise ValueError("exec needs a name for each variable of env")
    return mode


def plugin_cluster(cluster: ClusterEntry, access: Access) -> dict[str, Any]:
    """What a plugin that wants to know is told about the cluster."""
    key = "client.authentication.k8s.io/exec"
    configs = [entry.get("extension") for entry in cluster.extensions if entry.get("name") == key]
    told = {
        "server": cluster.server,
        "tls-server-name": cluster.tls_server_name,
        "insecure-skip-tls-verify": cluster.insecure_skip_tls_verify,
        "certificate-authority-data": base64.b64encode(access.ca.encode("latin-1")).decode(),
        "proxy-url": cluster.proxy_url,
        "config": configs[0] if configs else None,
    }
    return {name: value for name, value in told.items() if value}


def credentials_in(out: str, version: str) -> tuple[str, tuple[str, str] | None]:
    """The token, and the certificate and key, in what a login plugin printed. Raises ValueError."""
    answer = msgspec.convert(without_nulls(next(documents(out.encode(*CODING)), {})), PluginAnswer)
    if answer.api_version != version:
        raise ValueError(f"apiVersion {quoted(answer.api_version)}")
    made = answer.status
    pair = made.client_certificate_data, made.client_key_data
    if any(pair) and not all(pair):
        raise ValueError("half of a pair of certificate and key")
    if not (made.token or any(pair)):
        raise ValueError("neither a token nor a certificate")
    return made.token, pair if any(pair) else None


def pod_access() -> Access:
    """The account of the pod that epok runs in. Raises Fatal."""
    from kubernetes import client, config

    pod = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=pod)
        with open(pod.ssl_ca_cert, encoding="latin-1") as file:
            ca = file.read()
    except (config.ConfigException, OSError, ValueError) as error:
        instead = "give --kubeconfig, or --snapshot to do without"
        raise Fatal(f"the pod's account: {one_line(error).rstrip('.')}; {instead}") from None
    headers = [("Authorization", each["value"].strip()) for each in pod.auth_settings().values()]
    return Access("the pod's account", pod.host, ca=ca, proxy=proxy_for(pod.host), headers=headers)


def tls_context(access: Access) -> ssl.SSLContext:
    """What the server is checked by, and how epok shows who it is. Raises Fatal.

    As kubectl does it, any certificate of the authorities is trusted by itself, be it a root or
    not; and what Python 3.13 asks of certificates beyond that is not asked: some clusters lack it.
    """
    import urllib3

    context = urllib3.util.ssl_.create_urllib3_context()
    context.check_hostname = access.verify
    context.verify_mode = ssl.CERT_REQUIRED if access.verify else ssl.CERT_NONE
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    pem = "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----"
    try:
        if access.ca:
            context.load_verify_locations(cadata="\n".join(re.findall(pem, access.ca, re.DOTALL)))
        else:
            context.load_default_certs()
    except (ssl.SSLError, ValueError):
        raise Fatal(f"{access.origin}: its certificate-authority is no PEM certificate") from None
    if access.certificate:
        certificate, secret = map(private_file, access.certificate)
        try:
            with certificate as chain, secret as key:
                context.load_cert_chain(chain, key, password=lambda: "")
        except (ssl.SSLError, ValueError) as error:
            why = "client-certificate and client-key are no pair of PEM files without a password"
            raise Fatal(f"{access.origin}: its {why} ({one_line(error)})") from None
    return context


@contextlib.contextmanager
def private_file(text: str) -> Iterator[str]:
    """The path of a file without a name, which nothing can leave behind."""
    memory = getattr(os, "memfd_create", None)  # of Linux; a pod may have no /tmp
    with open(memory("epok"), "wb") if memory else tempfile.TemporaryFile() as file:
        file.write(text.encode("latin-1"))
        file.flush()
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}"


def connections(access: Access) -> Any:
    """A pool of connections to the cluster's server, by its proxy if it has one. Raises Fatal."""
    import urllib3

    context = tls_context(access)
    # without retries by urllib3 itself, which nobody would see
    settings: dict[str, Any] = {"ssl_context": context, "retries": False}
    if access.server_name:
        settings["server_hostname"] = access.server_name
    if not access.proxy:
        return urllib3.PoolManager(**settings)
    try:
        url = to_url(access.proxy, "proxy", "http", "https", "socks5", "socks5h")
    except ValueError as error:
        raise Fatal(f"{access.origin}: {error}") from None
    login, at, place = url.netloc.rpartition("@")
    if url.scheme.startswith("socks5"):
        import socks  # noqa: F401 (urllib3 needs it, and does not say so well)
        from urllib3.contrib.socks import SOCKSProxyManager

        # h: as Go has it, the proxy looks the name up
        return SOCKSProxyManager(f"socks5h://{login}{at}{place}", **settings)
    words = basic_words(*map(urllib.parse.unquote, (url.username or "", url.password or "")))
    settings["proxy_headers"] = {"Proxy-Authorization": words} if at else {}
    return urllib3.ProxyManager(f"{url.scheme}://{place}", proxy_ssl_context=context, **settings)


# ------------------------------------------------ cluster: Kubernetes API or file -> Snapshot

# Names stand in rules, so they have only the characters that Kubernetes allows.
# \Z, since $ matches before a line break too.
Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9.-]{1,253}\Z")]
PortName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9-]{0,63}\Z")]
PortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]


# What is read of the API's objects; the rest of their fields may be anything.
class Metadata(msgspec.Struct, kw_only=True, rename="camel"):
    name: Name
    labels: dict[Any, Any] = {}
    annotations: dict[Any, Any] = {}


class NamespacedMetadata(Metadata, kw_only=True):
    namespace: Name
    uid: str = ""
    creation_timestamp: str = ""
    resource_version: str = ""


class Port(msgspec.Struct, rename="camel", gc=False):
    """A port of a Service, or of the pods of an EndpointSlice; `node_port` 0 is none."""

    name: PortName = ""
    protocol: str = "TCP"
    port: PortNumber = 0
    node_port: PortNumber = 0

    def __post_init__(self) -> None:
        self.protocol = self.protocol.lower()


class ServiceSpec(msgspec.Struct, frozen=True, rename="camel"):
    type: str = "ClusterIP"
    ports: list[Port] = []
    external_traffic_policy: str = ""
    session_affinity: str = ""
    ip_families: list[str] = []
    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default_factory=list)
    load_balancer_source_ranges: list[str] = []
    load_balancer_class: str = ""


class PortStatus(msgspec.Struct, omit_defaults=True):
    port: int = 0
    protocol: str = ""
    error: str = ""


class Ingress(msgspec.Struct, omit_defaults=True, rename="camel"):
    """An address in the status of a Service, and what became of the Service's ports there."""

    ip: str = ""
    ip_mode: str = ""
    hostname: str = ""
    ports: list[PortStatus] = []

    def __post_init__(self) -> None:
        # Kubernetes before 1.30 does not keep it, later ones always have it
        self.ip_mode = self.ip_mode or "Proxy" * bool(self.ip)

    @property
    def name(self) -> str:
        return self.ip or self.hostname

    def __str__(self) -> str:
        ports = (f"{p.protocol.lower()}/{p.port} {p.error}".rstrip() for p in self.ports)
        return f"{self.name} ({enumerated(ports)})"


class BalancerStatus(msgspec.Struct, frozen=True):
    ingress: list[Ingress] = []


class ServiceStatus(msgspec.Struct, frozen=True, rename="camel"):
    load_balancer: BalancerStatus = BalancerStatus()


class ServiceObject(msgspec.Struct):
    metadata: NamespacedMetadata
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class NodeEntry(msgspec.Struct):
    """A taint, an address or a condition of a Node."""

    key: str = ""
    type: str = ""
    address: str = ""
    status: str = ""


class NodeSpec(msgspec.Struct, frozen=True):
    taints: list[NodeEntry] = []


class NodeStatus(msgspec.Struct, frozen=True):
    addresses: list[NodeEntry] = []
    conditions: list[NodeEntry] = []


class NodeObject(msgspec.Struct):
    metadata: Metadata
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class EndpointConditions(msgspec.Struct, frozen=True):
    ready: bool = True  # "a nil value should be interpreted as true": its API reference
    serving: bool | None = None


class SliceEndpoint(msgspec.Struct, rename="camel"):
    addresses: list[str] = []
    node_name: str = ""
    conditions: EndpointConditions = EndpointConditions()


class EndpointSlice(msgspec.Struct):
    metadata: NamespacedMetadata
    endpoints: list[SliceEndpoint] | None = None  # the API writes null where there are none
    ports: list[Port] | None = None


class Balanced(NamedTuple):
    """What the status of a Service of epok's own class says, in this version of the Service."""

    ingress: list[Ingress]
    version: str


@dataclass(frozen=True, slots=True)
class Service:
    """What matters of a Service, with the annotations that are, or look like, epok's.

    `size` is about how many bytes of memory it takes to know what it asks for, 0 if that is
    nothing; `beyond` is whether that is more than there is room for, see within_limit.
    """

    key: str
    uid: str
    created: str
    type: str
    annotations: Mapping[str, str]
    ports: tuple[Port, ...]
    local: bool
    sticky: bool
    versions: tuple[int, ...]
    source_ranges: str | None  # separated by commas
    balanced: Balanced | None
    size: int = field(default=0, compare=False)
    beyond: bool = field(default=False, compare=False)

    @property
    def mapped(self) -> bool:
        return not self.annotations.keys().isdisjoint(PORT_ANNOTATIONS)

    @property
    def seniority(self) -> tuple[str, str]:
        """Sorts the older Service first, and one without a date last."""
        return self.created or "~", self.key

    def refused(self, whole: str) -> Service:
        """It as one that is beyond; only the one named `whole` keeps what it asks for."""
        if self.key == whole:
            return dataclasses.replace(self, beyond=True)
        return dataclasses.replace(self, beyond=True, annotations={}, ports=(), source_ranges=None)


@dataclass(frozen=True)
class Node:
    """What matters of a Node."""

    name: str
    addresses: tuple[Address, ...]  # at most one of each IP version
    ready: bool
    excluded: str  # by what
    labelled: bool  # to be left out, if there are others


class Endpoint(NamedTuple):
    """An endpoint of a Service: a pod, its node, and its ports by name and protocol."""

    service: str
    node: str
    address: Address | None
    ports: Mapping[tuple[str, str], int]
    ready: bool
    serving: bool


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one time; `endpoints` by Service, and only where they are needed."""

    services: tuple[Service, ...]
    nodes: tuple[Node, ...]
    endpoints: Mapping[str, Sequence[Endpoint]]


def to_service(item: ServiceObject, always: str = "") -> Service | None:
    """None for a Service that asks for nothing, unless it is the one that matters `always`."""
    meta, spec = item.metadata, item.spec
    key = f"{meta.namespace}/{meta.name}"
    annotations = {}
    for name, text in meta.annotations.items():
        if not (isinstance(name, str) and name.startswith(PREFIXES)):
            continue
        if not isinstance(text, str | None):
            what = f"Service {key} annotation {name}: {quoted(text)} is not a text"
            raise Fatal(f"{what}; nothing was changed")
        # null is "" to the API server too: an annotation that is there
        annotations[name] = text or ""
    balanced = None
    if spec.type == "LoadBalancer" and spec.load_balancer_class == BALANCER_CLASS:
        balanced = Balanced(item.status.load_balancer.ingress, meta.resource_version)
    asks = balanced or annotations.keys() & set(PORT_ANNOTATIONS)
    if not asks and key != always:
        return None
    families = spec.ip_families or ["IPv6" if ":" in ip else "IPv4" for ip in spec.cluster_ips]
    ranges = spec.load_balancer_source_ranges
    source_ranges = ",".join(ranges) if ranges else None
    texts = *annotations, *annotations.values(), source_ranges
    return Service(
        key=key,
        uid=meta.uid,
        created=meta.creation_timestamp,
        type=spec.type,
        annotations=annotations,
        ports=tuple(port for port in spec.ports if port.protocol in PROTOCOLS),
        local=spec.external_traffic_policy == "Local",
        sticky=spec.session_affinity == "ClientIP",
        versions=tuple(6 if family == "IPv6" else 4 for family in families or ["IPv4"]),
        source_ranges=source_ranges,
        balanced=balanced,
        size=500 + sum(map(sys.getsizeof, texts)) + 300 * len(spec.ports) if asks else 0,
    )


def within_limit(services: list[Service], whole: str = "") -> list[Service]:
    """The Services, of which those that ask for too much are `beyond`, and keep nothing of it.

    The older ones have what they ask for, up to the first that does not fit, so that it does not
    matter in which order pages come. What the one named `whole` asks for is kept, to be explained.
    """
    sizes = [service.size for service in services]
    if sum(sizes) <= MAX_ASKED and max(sizes, default=0) <= MAX_SHARE:
        return services
    left, limited, last = MAX_ASKED, [], ""
    for service in sorted(services, key=lambda each: each.seniority):
        # a file may have it twice
        left -= service.size if service.size <= MAX_SHARE and service.key != last else 0
        last = service.key
        fits = service.size <= MAX_SHARE and (left >= 0 or not service.size)
        limited.append(service if fits or service.beyond else service.refused(whole))
    return limited


def to_node(item: NodeObject) -> Node:
    meta, kinds = item.metadata, ("InternalIP", "ExternalIP")  # the first that can be used counts
    texts = [each.address for kind in kinds for each in item.status.addresses if each.type == kind]
    addresses: dict[int, Address] = {}
    for text in texts:
        if address := usable(text):
            addresses.setdefault(address.version, address)
    marks = [f"annotation {name}" for name in EXCLUDE_ANNOTATIONS if name in meta.annotations]
    if EXCLUDE_LABEL in meta.labels:
        marks.append(f"label {EXCLUDE_LABEL}")
    if any(taint.key == AUTOSCALER_TAINT for taint in item.spec.taints):
        marks.append(f"taint {AUTOSCALER_TAINT}")
    conditions = {condition.type: condition.status for condition in item.status.conditions}
    return Node(
        name=meta.name,
        addresses=tuple(addresses[version] for version in sorted(addresses)),
        ready=conditions.get("Ready") == "True",
        excluded=", ".join(marks),
        labelled=STANDARD_EXCLUDE_LABEL in meta.labels,
    )


def to_endpoints(item: EndpointSlice, services: Container[str]) -> list[Endpoint]:
    """Those of some Services, as only these matter."""
    meta = item.metadata
    service = f"{meta.namespace}/{meta.labels.get('kubernetes.io/service-name', '')}"
    if service not in services:
        return []
    ports = {(port.name, port.protocol): port.port for port in item.ports or ()}
    endpoints = []
    for each in item.endpoints or ():
        ready, serving = each.conditions.ready, each.conditions.serving
        address = usable(next(iter(each.addresses), ""))
        serving = ready if serving is None else serving
        endpoints.append(Endpoint(service, each.node_name, address, ports, ready, serving))
    return endpoints


class Kind(NamedTuple):
    """A kind of API object, its type, and what makes ours of one, or None when it is not needed.

    `limit` takes out of a list of ours what is too much for the memory; `list` takes out nothing.
    """

    name: str
    path: str
    group: str
    type: Any
    convert: Callable[[Any], Any]
    limit: Callable[[list[Any]], list[Any]] = list


SERVICES = Kind("Service", "/api/v1/services", "", ServiceObject, to_service, within_limit)
NODES = Kind("Node", "/api/v1/nodes", "", NodeObject, to_node)
DISCOVERY = "discovery.k8s.io"
SLICES = "EndpointSlice"
SLICES_PATH = f"/apis/{DISCOVERY}/v1/endpointslices"


def endpoint_slices(services: Container[str]) -> Kind:
    convert = functools.partial(to_endpoints, services=services)
    return Kind(SLICES, SLICES_PATH, DISCOVERY, EndpointSlice, convert)


def needed(kind: Kind, objects: Iterable[Any]) -> list[Any]:
    """What matters of objects of a kind, which are JSON (Raw), or were read from JSON or YAML."""
    made = (kind.convert(typed(each, kind.type, kind.name)) for each in objects)
    return [each for each in made if each]


def typed(item: Any, form: type[T], what: str) -> T:
    """The item as a struct; a null is an absent field. Raises Fatal that names object and field."""
    raw = isinstance(item, msgspec.Raw)
    try:
        return msgspec.json.decode(item, type=form) if raw else msgspec.convert(item, form)
    except (msgspec.DecodeError, RecursionError):
        pass  # by a null, perhaps
    try:
        item = without_nulls(json.loads(bytes(item)) if raw else item)
        return msgspec.convert(item, form)
    except msgspec.ValidationError as error:
        raise wrong_field(item, str(error), what) from None
    except (ValueError, RecursionError) as error:
        raise Fatal(f"{what} in JSON or YAML: {one_line(error)}; nothing was changed") from None


def wrong_field(item: Any, error: str, what: str) -> Fatal:
    """Says which field of which object msgspec does not take, and what is there."""
    meta = item.get("metadata") if isinstance(item, dict) else None
    names = [meta.get(key) for key in ("namespace", "name")] if isinstance(meta, dict) else []
    name = "/".join(each for each in names if isinstance(each, str))
    path = "".join(re.findall(r"\$([^`]*)", error))  # of msgspec's `$.spec.ports[0].port`
    value = item
    for key, number in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        value = value[key] if key else value[int(number)]
    where = f"{what} {quoted(name)} {path.lstrip('.')}" if name else f"{what}{path}"
    why = error.partition(" - at ")[0]
    return Fatal(f"{where}: {quoted(value)}: {why}; nothing was changed")


HOW_TO_WRITE = "write it with kubectl get services,nodes,endpointslices -A -o json"


class SnapshotFile:
    """A cluster that was written to a file by kubectl, as JSON or YAML."""

    def __init__(self, name: str) -> None:
        self.name = f"--snapshot {'standard input' if name == '-' else name}"
        try:
            # unbuffered: a thread that waits in a buffer keeps Python from exiting
            with open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-") as file:
                there = [each for each in documents(file.read()) if each is not None]
                self.objects = list(flatten(there))
        except (OSError, ValueError) as error:
            what = f"{self.name} cannot be read as JSON or YAML: {one_line(error)}"
            raise Fatal(f"{what}; {HOW_TO_WRITE}") from None
        except RecursionError:
            raise Fatal(f"{self.name}: nested too deeply; {HOW_TO_WRITE}") from None

    def read(self, kind: Kind, selector: str = "") -> list[Any]:
        """All that the file has of a kind; a selector only saves the API work."""
        wanted = [item for name, item in self.objects if name == kind.name]
        if kind.name == SLICES and not wanted:
            why = "which externalTrafficPolicy Local, and a host that is itself a node, need"
            raise Fatal(f"{self.name} has no EndpointSlices, {why}; {HOW_TO_WRITE}")
        return kind.limit(needed(kind, wanted))


class Document(msgspec.Struct):
    kind: str = ""


class DocumentList(msgspec.Struct):
    items: list[Any] = []


def flatten(
    objects: Iterable[Any], kind: str = "", what: str = "snapshot"
) -> Iterator[tuple[str, Any]]:
    """The objects, also those in lists of any kind; `kind` is that of those that say none."""
    for each in objects:
        own = typed(each, Document, what).kind or kind
        if own.endswith("List"):
            inside = typed(each, DocumentList, what).items
            yield from flatten(inside, own.removesuffix("List"), "snapshot item")
        else:
            yield own, each


class Answer(NamedTuple):
    """What the API server answered."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str | None = None
    more: str | None = msgspec.field(name="continue", default=None)


class Page(msgspec.Struct, rename="camel"):
    """A page of a list; its items stay JSON, so that each is decoded when its turn comes."""

    api_version: str = ""
    kind: str = ""
    metadata: ListMetadata | None = None
    items: list[msgspec.Raw] | None = None


class KnownEvent(msgspec.Struct):
    count: int | None = 1


class Event(NamedTuple):
    """News about a Service, as `kubectl describe service` shows them."""

    service: str
    type: str
    reason: str
    message: str


Task = tuple[Any, ...]  # a Service, a method that writes about it, and what that takes


class Cluster:
    """The Kubernetes API, with plain JSON: typed models cost a second of start-up."""

    def __init__(self, options: Options, deadline: Deadline) -> None:
        self.deadline = deadline
        by_account = in_pod() and not (options.kubeconfig or options.context)
        self.access = pod_access() if by_account else kubeconfig_access(options, deadline)
        self.pool = connections(self.access)
        self.name = self.access.server
        if self.access.proxy:
            self.name += f" by proxy {hidden(self.access.proxy)}"
        if not self.access.verify:
            log.warning("%s: its certificate is not checked (insecure-skip-tls-verify)", self.name)

    def read(self, kind: Kind, selector: str = "") -> list[Any]:
        """All objects of a kind, or those whose labels a selector takes, complete or Fatal."""
        return persist(self.deadline, self.all_pages, kind, selector)

    def all_pages(self, kind: Kind, selector: str) -> list[Any]:
        kept: list[Any] = []
        versions: set[str] = set()
        query: dict[str, Any] = {"labelSelector": selector} if selector else {}
        query["limit"] = PAGE_OBJECTS
        while page := persist(self.deadline, self.page, kind, query, self.deadline):
            objects, meta, query["limit"] = page
            versions.add(meta.resource_version or "")
            if len(versions) > 1:  # what has moved to a page that was read before would be missing
                raise Transient(f"{self.name}: the list of {kind.path} changed between two pages")
            kept = kind.limit(kept + objects)
            if not meta.more:
                return kept
            query["continue"] = meta.more
        raise Transient(f"{self.name}: the list of {kind.path} expired between two pages")

    def page(
        self, kind: Kind, query: Mapping[str, Any], deadline: Deadline
    ) -> tuple[list[Any], ListMetadata, int] | None:
        """What matters of one page, its metadata, and how many objects the next one should have.

        None when its continue token has expired.
        """
        words = urllib.parse.urlencode(query, quote_via=urllib.parse.quote, safe="/")
        limit = query.get("limit", 1)
        most = ANSWER_LIMIT if limit == 1 else PAGE_LIMIT
        answer = self.request("GET", f"{kind.path}?{words}", deadline, most=most)
        if len(answer.data) > most:
            if limit > 1:
                return self.page(kind, {**query, "limit": -(-limit // 8)}, deadline)
            raise Fatal(f"{self.name}: more than {most >> 20} MiB in one answer; nothing changed")
        if answer.status == 410:
            return None
        if answer.status != 200:
            raise self.refusal(answer, "list", kind.path.rsplit("/", 1)[1], kind.group)
        version, name = f"{kind.group}/v1".lstrip("/"), f"{kind.name}List"
        page = self.decode(answer.data, Page, name)
        if (page.api_version, page.kind) != (version, name) or page.items is None:
            got = quoted(status_message(answer.data))
            raise Fatal(f"{self.name} answers no {name} of {version} in JSON, but {got}")
        fitting = len(page.items) * PAGE_LIMIT // (2 * len(answer.data))
        following = max(1, min(fitting, PAGE_OBJECTS))
        return needed(kind, page.items), page.metadata or ListMetadata(), following

    def decode(self, body: bytes, form: type[T], what: str) -> T:
        """A whole answer as the struct. Raises Fatal."""
        try:
            return msgspec.json.decode(body, type=form)
        except (msgspec.DecodeError, RecursionError) as error:
            place = re.search(r"\(byte (\d+)\)", str(error))
            got = status_message(body[max(0, int(place[1]) - 30) if place else 0 :])
            why = one_line(error).replace("$", what)
            raise Fatal(
                f"{self.name} answers no {what} in JSON, but {quoted(got)}: {why}"
            ) from None

    def request(
        self, method: str, path: str, deadline: Deadline, body: Any = None, most: int = PAGE_LIMIT
    ) -> Answer:
        """The answer, of any status, cut off behind `most` bytes. Raises Transient or Fatal."""
        import urllib3

        # as UTF-8, which Go sends; http.client makes latin-1 of it
        sent = [(name, value.encode().decode("latin-1")) for name, value in self.access.headers]
        headers = urllib3.HTTPHeaderDict(sent)  # a name may stand there twice
        headers.update({"Accept": "application/json", "User-Agent": f"epok/{VERSION}"})
        merging = "merge-patch+" if method == "PATCH" else ""
        headers["Content-Type"] = f"application/{merging}json"
        left = deadline.remaining()
        timeout = urllib3.Timeout(connect=min(CONNECT_SECONDS, left), read=left)
        how = {"redirect": False, "preload_content": False, "timeout": timeout}
        url = f"{self.access.server}{path}"
        try:
            answer = self.pool.request(method, url, headers=headers, json=body, **how)
            content = self.body_of(answer, most)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self.unreachable(error) from None
        except ValueError:  # its text would show the token
            what = "the address, the token or an as has characters that no request can have"
            raise Fatal(f"{self.name}: {what}") from None
        asked = f"{self.name}: {method} {path.partition('?')[0]}"
        log.debug("%s: status %d, %d bytes", asked, answer.status, len(content))
        return Answer(answer.status, answer.headers, content)

    def unreachable(self, error: Exception) -> Exception:
        """What a connection that was not made, or that broke, means."""
        import urllib3

        said = str(error)
        # EOF: by a load balancer, say, whose API server is about to come back
        if isinstance(error, urllib3.exceptions.SSLError) and "EOF" not in said:
            why = next(why for pattern, why in TLS_TROUBLES.items() if re.search(pattern, said))
            return Fatal(f"{self.name}: {one_line(error)}: {why}{self.how_to_reach()}")
        refused = re.search("Tunnel connection failed: (4[0-9][0-9])|SOCKS5 authentication", said)
        if not refused:
            return Transient(f"{self.name}: {one_line(error)}", advice=self.how_to_reach())
        what = f"answers {refused[1]}" if refused[1] else "lets nobody in like that"
        why = "its rules forbid it"
        if refused[1] in ("401", "407", None):
            why = "user:password@ in its address is missing or wrong"
        return Fatal(f"{self.name}: the proxy {what}: {why}; see proxy-url, or HTTPS_PROXY")

    @staticmethod
    def body_of(answer: Any, most: int) -> bytes:
        """A body, unpacked, or a byte more than the most of it. Raises OSError if it breaks off."""
        try:
            body: bytes = answer.read(most + 1)
        except ValueError as error:  # the length of a chunk is less than nothing, say
            raise OSError(one_line(error)) from None
        if len(body) > most:
            answer.close()
        return body

    def refusal(self, answer: Answer, verb: str, resource: str, group: str = "") -> Exception:
        """What an answer means that was not wished for: Fatal with what to do, or Transient."""
        said = status_message(answer.data)
        told = f"{self.name} answers {answer.status} to {verb} {resource} ({said})"
        if answer.status == 429 or answer.status >= 500:
            return Transient(told, retry_after(answer.headers.get("Retry-After", "")))
        if answer.status not in (401, 403):
            return Fatal(f"{told}; is this a Kubernetes API server (1.21 or newer)?")
        allow = f"allow verb {verb} on {resource} of apiGroup {quoted(group)} in its ClusterRole"
        allow += how_to_allow(resource, said)
        return Fatal(f"{told}: {mistaken(answer.status, said, self.access) or allow}")

    def how_to_reach(self) -> str:
        """What to do about an API server that does not answer."""
        if not self.access.kubectl:
            return ""
        local = re.fullmatch(r"https?://(localhost|127\.[0-9.]+)(:[0-9]+)?/*", self.access.server)
        if local and self.access.file and not self.access.proxy:
            # of a kubeconfig that was copied from where the server is: k3s makes it so
            edit = f"sed -i s/{local[1]}/ADDRESS/ {shlex.quote(self.access.file)}"
            return f"; if the cluster is on another machine, give its address: {edit}"
        return f"; check it with {self.access.kubectl} get nodes"

    def service(self, key: str, deadline: Deadline) -> Service | None:
        """A Service as it is now, None when it is gone. Raises Transient or Fatal."""
        namespace, _, name = key.partition("/")
        convert = functools.partial(to_service, always=key)
        path = f"/api/v1/namespaces/{namespace}/services"
        kind = SERVICES._replace(path=path, convert=convert)
        page = self.page(kind, {"fieldSelector": f"metadata.name={name}"}, deadline)
        return page[0][0] if page and page[0] else None

    def publish(
        self, service: Service, ingress: list[Ingress], deadline: Deadline
    ) -> Service | None:
        """Writes a Service's status; returns it then, None where it is not epok's, or gone.

        Raises Transient or Fatal.
        """
        namespace, _, name = service.key.partition("/")
        path = f"/api/v1/namespaces/{namespace}/services/{name}/status"
        now: Service | None = service
        for _ in range(RACES):
            if not now or not now.balanced or now.uid != service.uid:
                return None
            version = {"resourceVersion": now.balanced.version}  # else there is a conflict
            entries = msgspec.to_builtins(ingress) or None
            body = {"metadata": version, "status": {"loadBalancer": {"ingress": entries}}}
            answer = self.request("PATCH", path, deadline, body=body)
            if answer.status == 200:
                return to_service(self.decode(answer.data, ServiceObject, "Service"))
            if answer.status == 404:
                return None
            if answer.status != 409:
                break
            now = self.service(service.key, deadline)
        raise self.refusal(answer, "patch", "services/status")

    def record(self, event: Event, uids: Mapping[str, str], deadline: Deadline) -> None:
        """Writes an Event, or counts up the one that says the same. Raises Transient or Fatal."""
        namespace, _, service = event.service.partition("/")
        if not (uid := uids.get(event.service)):
            if not (its := self.service(event.service, deadline)):
                return  # nobody would look for it
            uid = its.uid
        name = f"{service}.{hashlib.sha256(repr((uid, event)).encode()).hexdigest()[:16]}"
        path = f"/api/v1/namespaces/{namespace}/events"
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        # an empty patch changes nothing and tells what is there, without the permission to get
        if there := self.send("PATCH", f"{path}/{name}", {}, deadline):
            again = {"count": (there.count or 1) + 1, "lastTimestamp": now}
            self.send("PATCH", f"{path}/{name}", again, deadline)
            return
        about = {"kind": "Service", "namespace": namespace, "name": service, "uid": uid}
        made = {
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {"apiVersion": "v1", **about},
            "type": event.type,
            "reason": event.reason,
            "message": event.message,
            "source": {"component": "epok"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        self.send("POST", path, made, deadline)

    def write_all(self, what: str, tasks: Iterable[Task], deadline: Deadline) -> None:
        """Writes about Services; leaves out namespaces that refuse. Raises Fatal if any did."""
        failed: dict[str, str] = {}
        for service, write, *args in tasks:
            namespace = service.partition("/")[0]
            if namespace in failed:
                continue
            try:
                persist(deadline, write, *args, deadline)
            except Fatal as error:
                failed[namespace] = str(error)
        if failed:
            first = next(iter(failed.values()))
            raise Fatal(f"{first}; no {what} in namespace {enumerated(failed)}")

    def send(self, method: str, path: str, body: Any, deadline: Deadline) -> KnownEvent | None:
        """Creates or patches an Event; None where there is none to patch, or no place for it."""
        answer = self.request(method, path, deadline, body=body)
        ending = answer.status == 403 and b"is being terminated" in answer.data
        if answer.status in (404, 409) or ending:
            return None
        if answer.status not in (200, 201):
            raise self.refusal(answer, "create" if method == "POST" else "patch", "events")
        return self.decode(answer.data, KnownEvent, "Event")


def mistaken(status: int, message: str, access: Access) -> str:
    """Why the server takes epok for somebody else, or nobody; empty when it does not."""
    # these are everybody: never grant them anything
    nobody = re.search('User "system:(anonymous|unauthenticated)"', message)
    if (status == 401 or nobody) and not access.shows:
        return f"no credentials were sent, since {access.origin} has none"
    if status == 401:
        renew = "; cron/kubeconfig makes one for epok alone; k3s: copy /etc/rancher/k3s/k3s.yaml "
        renew += "anew; kubeadm: kubeadm certs renew admin.conf"
        return f"the {access.shows} is not accepted; renew it{renew if access.kubectl else ''}"
    if nobody and access.shows == "password":
        return f"API servers take no username and password any more; give {access.origin} a token"
    if nobody:
        return f"the {access.shows} of {access.origin} did not arrive; is TLS ended in between?"
    if "cannot impersonate" in message:
        return f"take as, as-uid, as-groups and as-user-extra out of {access.origin}"
    return ""


ROLES = {  # of somebody who is not the CronJob's account: its name, verbs and resources
    "events": ("epok-events", "create,patch", "events"),
    "services/status": ("epok-status", "patch", "services/status"),
}
LISTS = "epok-list", "list", "services,nodes,endpointslices.discovery.k8s.io"


def how_to_allow(resource: str, message: str) -> str:
    """How to give a user the permission that an answer with status 403 says it lacks."""
    user = re.search(r'User "([A-Za-z0-9:@._-]{1,253})" cannot', message)
    more = ", as in cron/publish.yaml" * (resource == "services/status")
    if not user:
        return more or "; cron/cronjob.yaml has all that it needs"
    if more and user[1].endswith(":epok"):
        return f"{more}: . cron/epok.config && envsubst < cron/publish.yaml | kubectl apply -f -"
    name, verbs, resources = ROLES.get(resource, LISTS)
    role = f"kubectl create clusterrole {name} --verb={verbs} --resource={resources}"
    binding = f"kubectl create clusterrolebinding {name} --clusterrole={name} --user={user[1]}"
    return f"{more}: {role} && {binding}"


# What OpenSSL says, and what is wrong then.
TLS_TROUBLES = {
    "certificate has expired": "its certificate has expired, or this machine's clock is wrong",
    "not yet valid": "this machine's clock is behind, or its certificate is for later",
    "mismatch": "its certificate is for other names than that in server, or in tls-server-name",
    "verify failed": "its certificate is not by the certificate-authority (or this machine's)",
    "WRONG_VERSION_NUMBER|record layer|HTTP_REQUEST": "what answers there speaks no TLS",
    "alert": "it, or what is before it, refuses clients with this certificate, or with none",
    "": "TLS failed",
}


def status_message(body: bytes) -> str:
    """What a Status object of the API says, or how the body begins."""
    try:
        message = json.loads(body)["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = body[:60].decode("ascii", "replace")
    return one_line(message) if message else "no more is said"


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for, in a number or date; six hours at most."""
    import urllib3

    try:
        return urllib3.Retry().parse_retry_after(text)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0


class Reader:
    """Reads a cluster, from the API or from a file, within the deadline."""

    def __init__(self, options: Options, deadline: Deadline) -> None:
        self.deadline = deadline
        file = options.snapshot
        login = Background(SnapshotFile, file) if file else Background(Cluster, options, deadline)
        doing = "logging in to the cluster, or reading the snapshot"
        self.source: SnapshotFile | Cluster = login.result(deadline, doing, 1)

    def read(self, kind: Kind, selector: str = "") -> Any:
        reading = Background(self.source.read, kind, selector)
        return reading.result(self.deadline, f"{self.source.name}: the list of {kind.name}s")

    def snapshot(self, explained: str = "") -> Snapshot:
        """Services with mappings, and the one that is explained, and all nodes; no endpoints."""
        convert = functools.partial(to_service, always=explained)
        limit = functools.partial(within_limit, whole=explained)
        services = self.once_each(SERVICES._replace(convert=convert, limit=limit), "key")
        nodes = self.once_each(NODES, "name")
        if not nodes:
            why = "has no node at all, so it cannot be whole"
        elif not any(node.addresses for node in nodes):
            why = "none of its nodes has an InternalIP or ExternalIP that packets can be sent to"
            why += "; see kubectl get nodes -o wide"
        else:
            return Snapshot(services, nodes, {})
        raise Fatal(f"{self.source.name}: {why}; nothing was changed")

    def once_each(self, kind: Kind, key: str) -> tuple[Any, ...]:
        """All that matter of a kind. What comes twice counts once; the two must not differ."""
        unique: dict[str, Any] = {}
        for each in self.read(kind):
            name = getattr(each, key)
            if unique.setdefault(name, each) != each:
                what = f"{self.source.name} has {kind.name} {name} twice, and not the same"
                raise Fatal(f"{what}; nothing was changed")
        return tuple(unique.values())

    def with_endpoints(self, snapshot: Snapshot, on_node: bool, explained: str = "") -> Snapshot:
        """Adds endpoints: on a host that is a node all Services', else those of policy Local."""
        some = [service for service in snapshot.services if not service.beyond]
        keys = {service.key for service in some if on_node or service.local}
        if explained and explained not in keys:
            with contextlib.suppress(Fatal):  # they may not be had
                return self.having_endpoints(snapshot, {explained, *keys})
        return self.having_endpoints(snapshot, keys) if keys else snapshot

    def having_endpoints(self, snapshot: Snapshot, keys: Set[str]) -> Snapshot:
        names = sorted({key.split("/")[-1] for key in keys})
        # a long selector would not fit into a URL; then all are listed
        selector = f"kubernetes.io/service-name in ({','.join(names)})" if len(names) <= 50 else ""
        endpoints: dict[str, list[Endpoint]] = {}
        for endpoint in itertools.chain.from_iterable(self.read(endpoint_slices(keys), selector)):
            endpoints.setdefault(endpoint.service, []).append(endpoint)
        return dataclasses.replace(snapshot, endpoints={**snapshot.endpoints, **endpoints})


# ------------------------------------------------ plan: Snapshot -> Forwards and Rejections


class Target(msgspec.Struct, frozen=True, gc=False):
    """Where a forward sends connections; a struct, which takes half as much memory."""

    address: Address
    port: int


@dataclass(frozen=True, slots=True)
class Route:
    """External ports of a Service; the n-th goes to the n-th port from each target's port on.

    `direct` targets are pods, not NodePorts.
    """

    protocol: str
    first: int
    last: int
    service: str
    port: str
    targets: tuple[Target, ...]
    direct: bool


@dataclass(frozen=True, slots=True)
class Forward(Route):
    """What shall be forwarded; `sources` are the networks that may use it, None for everybody.

    With affinity clients are shared out over the `known` addresses, of which some may be no
    targets now.
    """

    masquerade: bool
    internal: bool
    sources: Iterable[Network] | None
    known: tuple[Address, ...] = ()


class Rejection(NamedTuple):
    """A mapping, or with an empty `mapping` a whole Service, that cannot stand, and why.

    It may stand for a `number` of them. `told` is the reason in words for the Service's own
    namespace, which name no other.
    """

    service: str
    mapping: str
    reason: str
    told: str = ""
    number: int = 1

    def __str__(self) -> str:
        return f"{self.service}: {self.message}"

    @property
    def message(self) -> str:
        return f"{quoted(self.mapping)}: {self.reason}" if self.mapping else self.reason

    def event(self, name: str) -> Event:
        message = self._replace(reason=self.told or self.reason).message
        return Event(self.service, "Warning", name, message)

    def document(self) -> dict[str, str]:
        return {"service": self.service, "mapping": self.mapping, "reason": self.reason}


@dataclass
class Plan:
    """What shall be forwarded, what cannot be, and what a person should know.

    `unknown` are annotations that stop nothing; `claims` and `places` are of the Service that is
    `explained`, of which all reasons are kept. `fates` tell of the ports of Services of epok's
    class, each by its own number, what keeps it from being forwarded from that, or nothing.
    """

    explained: str = ""
    forwards: list[Forward] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unknown: list[Rejection] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    fates: dict[tuple[str, str, int], str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # of rejections, by Service

    def reject(self, service: Service, why: object, mapping: str = "", told: str = "") -> None:
        """Notes why; of a Service with many reasons the first ones, and how many more there are."""
        made = Rejection(service.key, mapping, str(why), told)
        number = self.numbers[service.key] = self.numbers.get(service.key, 0) + 1
        more = 0 if service.key == self.explained else number - MAX_REASONS
        if more > 0:
            made = Rejection(service.key, "", f"{more} more {plural(more, 'mapping')}", number=more)
        if more > 1:
            self.rejections.pop()  # how many more there were so far
        self.rejections.append(made)

    def decide(self, service: Service, claim: Claim, error: str = "") -> None:
        """Notes the fate of a Service's port, for its status."""
        key = service.key, claim.port.protocol, claim.port.port
        if service.balanced and claim.external == claim.port.port:
            self.fates[key] = error
        elif service.balanced:
            self.fates.setdefault(key, "OtherPort")


class PortMapping(NamedTuple):
    """A mapping as written; `target` is a NodePort range, the name of a port, or None."""

    external: Range
    target: Range | str | None
    protocol: str


def to_mapping(text: str) -> PortMapping:
    """Reads EXTERNAL [":" TARGET] [":" PROTOCOL | "/" PROTOCOL]. Raises ValueError: why not."""
    head, slash, protocol = (part.strip(" \t\r\n") for part in text.partition("/"))
    words = [word.strip(" \t\r\n") for word in head.split(":")]
    if not slash and len(words) > 1 and words[-1].lower() in PROTOCOLS:
        protocol = words.pop()
    if (slash or protocol) and protocol.lower() not in PROTOCOLS:
        raise ValueError(f"no protocol {quoted(protocol)}; there are tcp, udp and sctp")
    external = to_range(words[0])
    if external is None or len(words) > 2:
        raise ValueError(
            'not understood; write it like "25:2025", "53:dns/udp" or "8000-8010:30000-30010"'
        )
    target = None
    if len(words) == 2:
        target = to_range(words[1]) or words[1]
        if isinstance(target, str) and not re.fullmatch(r"[A-Za-z0-9-]{1,63}", target):
            raise ValueError(f"{quoted(target)} is neither a NodePort nor the name of a port")
    size = external.last - external.first
    if isinstance(target, Range) and target.last - target.first != size:
        raise ValueError(f"{external} and {target} are not equally long")
    if isinstance(target, str) and size:
        raise ValueError(f"the one port {quoted(target)} cannot be the target of a range")
    return PortMapping(external, target, protocol.lower())


def list_node_ports(ports: Iterable[Port]) -> str:
    """The NodePorts of a Service for a message."""
    having = (port for port in ports if port.node_port)
    texts = (f"{each.node_port} ({each.name or each.port}/{each.protocol})" for each in having)
    return enumerated(texts) or "none"


def index_ports(service: Service) -> dict[str, list[Port]]:
    """The ports of a Service by NodePort, by name and by port, in the words of messages."""
    index: dict[str, list[Port]] = {}
    for port in service.ports:
        for what in (f"NodePort {port.node_port}", f"port named {port.name}", f"port {port.port}"):
            index.setdefault(what, []).append(port)
    return index


def ports_for(
    service: Service, index: Mapping[str, list[Port]], mapping: PortMapping, offset: int
) -> list[Port]:
    """Where the external port number `offset` of a mapping goes. Raises ValueError if nowhere."""
    what = f"port {mapping.external.first + offset}"
    if isinstance(mapping.target, Range):
        what = f"NodePort {mapping.target.first + offset}"
    elif mapping.target:
        what = f"port named {mapping.target}"
    ports = index.get(what, [])
    wanted = [port for port in ports if mapping.protocol in ("", port.protocol)]
    if not wanted:
        problem = f"{what} has no {mapping.protocol}" if ports else f"no {what}"
        raise ValueError(
            f"{problem}; the NodePorts of this Service are {list_node_ports(service.ports)}"
        )
    if not all(port.node_port for port in wanted):
        namespace, _, name = service.key.partition("/")
        patch = """'{"spec": {"allocateLoadBalancerNodePorts": true}}'"""
        cure = f": kubectl patch service -n {namespace} {name} -p {patch}"
        allocate = "let the Service allocate NodePorts" + cure * (service.type == "LoadBalancer")
        raise ValueError(f"{what} has no NodePort; {allocate}")
    return wanted


class Claim(NamedTuple):
    """One external port and protocol, and the Service port that it goes to."""

    mapping: str
    external: int
    port: Port


def claims_of(service: Service, plan: Plan) -> Iterator[Claim]:
    """What a Service asks for, rejecting the mappings that cannot stand."""
    texts = [text for name in PORT_ANNOTATIONS for text in items(service.annotations.get(name, ""))]
    if not service.mapped and service.balanced:
        texts = [f"{port.port}/{port.protocol}" for port in service.ports]
    index = index_ports(service)
    for number, text in enumerate(dict.fromkeys(texts)):
        if number == MAX_MAPPINGS:
            plan.reject(service, f"has more than {number} mappings; the rest is left out")
            return
        try:
            if service.type not in ("NodePort", "LoadBalancer"):
                why = "has no NodePorts; make it NodePort or LoadBalancer"
                raise ValueError(f"a Service of type {service.type} {why}")
            mapping = to_mapping(text)
            first, last = mapping.external
            # all before the first is yielded: a mapping stands as a whole or not at all
            ports = [ports_for(service, index, mapping, n) for n in range(last - first + 1)]
        except ValueError as error:
            plan.reject(service, error, text)
            continue
        for external, wanted in enumerate(ports, first):
            yield from (Claim(text, external, port) for port in wanted)


def check_room(service: Service) -> None:
    """Raises ValueError where a Service asks for more than there is room for."""
    if service.size > MAX_SHARE:
        what = f"asks for more than fits into {MAX_SHARE >> 20} MiB of memory"
        raise ValueError(f"{what}; ask for fewer ports or networks")
    if service.beyond:
        what = f"finds no room left in the {MAX_ASKED >> 20} MiB of memory for what all Services "
        what += "ask for, the older ones first; epok's log names those that ask for most"
        raise ValueError(what)


def check_annotations(service: Service, plan: Plan) -> None:
    """Finds unknown annotations. Raises ValueError where one may be a restriction, misspelt."""
    strange = sorted(service.annotations.keys() - set(SERVICE_ANNOTATIONS))
    if not strange or not (service.mapped or service.balanced):
        return
    if len(strange) > MAX_STRANGE:
        many = f"{len(strange)} annotations that epok does not know"
        raise ValueError(f"has {many}, like {quoted(strange[0])}")
    for name in strange:
        meant = nearest(name)
        what = f"epok knows no annotation {quoted(name)}; is {meant} meant?"
        # without a mapping all ports would be forwarded, so one misspelt is a restriction as well
        if meant not in PORT_ANNOTATIONS or not service.mapped:
            raise ValueError(f"{what} It is not forwarded until that is mended or removed")
        plan.unknown.append(Rejection(service.key, "", what))


def nearest(name: str) -> str:
    """The annotation with the same prefix that looks most like one that is none.

    A restriction wins if its name is in it.
    """
    import difflib

    prefix, _, word = name.partition("/")
    letters = re.sub("[^a-z]", "", word[:MAX_NAME].lower())

    def likeness(annotation: str) -> tuple[bool, float]:
        right = annotation.partition("/")[2]
        within = annotation not in PORT_ANNOTATIONS and right.replace("-", "") in letters
        return within, difflib.SequenceMatcher(None, letters, right).ratio()

    same_prefix = [each for each in SERVICE_ANNOTATIONS[::-1] if each.startswith(f"{prefix}/")]
    return max(same_prefix, key=likeness)


@dataclass(frozen=True, slots=True)
class Networks:
    """Networks as one text, which takes a tenth of the memory that they take themselves."""

    text: str

    def __len__(self) -> int:
        return len(self.text.split())

    def __iter__(self) -> Iterator[Network]:
        return map(ipaddress.ip_network, self.text.split())


def allowed_sources(service: Service) -> Networks | None:
    """The networks that may use it, None for everybody. Raises ValueError: in doubt nobody may."""
    given = [name for name in ALLOW_ANNOTATIONS if name in service.annotations]
    if len({service.annotations[name] for name in given}) > 1:
        why = "say different things; until one of them is gone nobody may"
        raise ValueError(f"{' and '.join(given)} {why}")
    if not given and service.source_ranges is None:
        return None
    name, text = "spec.loadBalancerSourceRanges", service.source_ranges or ""
    if given:
        name, text = given[0], service.annotations[given[0]].strip(" \t\r\n,")
    if text.count(",") >= MAX_SOURCES:
        raise ValueError(f"{name} has more than {MAX_SOURCES} networks; until then nobody may")
    try:
        networks = to_networks(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; until then nobody may") from None
    if not networks:
        raise ValueError(f"{name} is empty; name the clients, or remove it to let everybody in")
    return Networks(" ".join(map(str, networks)))


def choose_nodes(nodes: Iterable[Node], plan: Plan) -> list[Node]:
    """The nodes that forwards go to, as people expect it of a load balancer."""
    rest = [node for node in nodes if not node.excluded]
    ready = [node for node in rest if node.ready]
    if best := [node for node in ready if not node.labelled]:
        return best
    what = "every node is excluded by an annotation, label or taint; nothing can be forwarded"
    if ready:
        what = f"every Ready node has the label {STANDARD_EXCLUDE_LABEL}"
        what += "; forwarding to them all the same"
    elif rest:
        what = "no node is Ready; forwarding to all of them"
    plan.warnings.append(what)
    return ready or [node for node in rest if not node.labelled] or rest


class Place(NamedTuple):
    """Where a Service is reached: a node, or a pod with its ports by name and protocol.

    It is used now (`live`), or may come back. A stand-in has the place of one that may come back.
    """

    name: str
    address: Address
    ports: Mapping[tuple[str, str], int] | None
    live: bool
    stand_in: bool = False

    def target(self, port: Port) -> Target:
        number = port.node_port
        if self.ports is not None:
            number = self.ports.get((port.name, port.protocol), 0)
        return Target(self.address, number)


def each_address_once(places: Iterable[Place]) -> list[Place]:
    """In order; of an address that two have, the live one counts, with the ports of both."""
    unique: dict[Address, Place] = {}
    for place in sorted(places, key=lambda place: (place.live, place.name)):
        other = unique.get(place.address)
        if place.ports and other and other.ports:
            place = place._replace(ports={**other.ports, **place.ports})
        unique[place.address] = place
    return [unique[address] for address in sorted(unique, key=lambda ip: (ip.version, ip))]


def node_places(nodes: Iterable[Node], chosen: Sequence[Node]) -> list[Place]:
    """The nodes that were chosen, live, and those that may come back, not kept out by a label."""
    live = {node.name for node in chosen}
    labelled = any(node.labelled for node in chosen)
    some = [node for node in nodes if labelled or not node.labelled]
    return [Place(node.name, ip, None, node.name in live) for node in some for ip in node.addresses]


def pod_places(service: Service, endpoints: Iterable[Endpoint], own: Set[str]) -> list[Place]:
    """A Service's pods; with policy Local those on the nodes that are the host itself."""
    having = [e for e in endpoints if e.address and (not service.local or e.node in own)]
    return [Place(e.node, e.address, e.ports, live) for e, live in in_use(having) if e.address]


def having_pods(nodes: Iterable[Place], endpoints: Sequence[Endpoint]) -> list[Place]:
    """Of the nodes those that have pods; only where these can be used they are live."""
    having = {each.node for each in endpoints}
    using = {each.node for each, used in in_use(endpoints) if used}
    some = [node for node in nodes if node.name in having]
    return [node._replace(live=node.live and node.name in using) for node in some]


def in_use(endpoints: Sequence[Endpoint]) -> list[tuple[Endpoint, bool]]:
    """Which get connections: the ready ones, or if there is none those that end but still serve."""
    ready = any(endpoint.ready for endpoint in endpoints)
    return [(each, each.ready if ready else each.serving) for each in endpoints]


def highest(service: str, places: list[Place], most: int) -> list[Place]:
    """So many of the nodes: those that a Service ranks highest, and a stand-in for each not live.

    Each Service has a ranking of its own (rendezvous hashing: Thaler and Ravishankar, 1996), so
    that all nodes have about equally many Services, and a node that comes or goes changes only
    those that rank it high.
    """
    if len(places) <= most:
        return places

    def rank(place: Place) -> bytes:
        return hashlib.sha256(f"{service} {place.name}".encode()).digest()

    ranked = sorted(places, key=rank)
    homes, others = ranked[:most], (place for place in ranked[most:] if place.live)
    lacking = sum(not place.live for place in homes)
    stand_ins = [place._replace(stand_in=True) for place in itertools.islice(others, lacking)]
    return sorted(homes + stand_ins, key=lambda place: place.address)


def spans(ports: Iterable[int]) -> str:
    """Ports for a message, neighbours as a range: "25, 8000-8010"."""
    runs = itertools.groupby(enumerate(sorted(ports)), lambda pair: pair[1] - pair[0])
    blocks = [[port for _, port in run] for _, run in runs]
    return enumerated(str(Range(block[0], block[-1])) for block in blocks)


def bucket_count(known: int) -> int:
    """Into how many parts clients are divided that are shared out over so many places."""
    return max(64, min(1 << (4 * known - 1).bit_length(), MAX_BUCKETS))


def rule_counts(
    service: Service, places: Iterable[Place], sources: Networks | None
) -> dict[int, int]:
    """How many rules each forward of a Service takes, by IP version."""
    counts: dict[int, int] = {}
    for version in sorted({*service.versions}):
        its = [place for place in places if place.address.version == version]
        live = sum(place.live for place in its)
        picks = live
        if service.sticky and live > 1:
            picks = 2 * bucket_count(sum(not place.stand_in for place in its))
        networks = sum(network.version == version for network in sources or ())
        if live and (sources is None or networks):
            counts[version] = picks + networks + 2  # the mark, and what leads there
    return counts


def in_ranges(forwards: Iterable[Forward]) -> list[Forward]:
    """Those of a Service's forwards to neighbouring ports of the same targets become one range."""

    def run_of(pair: tuple[int, Forward]) -> tuple[object, ...]:
        number, forward = pair
        shifts = [(target.address, target.port - forward.first) for target in forward.targets]
        return forward.protocol, forward.first - number, shifts

    ranges = []
    ordered = sorted(forwards, key=lambda forward: (forward.protocol, forward.first))
    for _, run in itertools.groupby(enumerate(ordered), run_of):
        first, *others = [forward for _, forward in run]
        if others:
            last, ports = others[-1].last, f"{first.port}-{others[-1].port}"
            first = dataclasses.replace(first, last=last, port=ports)
        ranges.append(first)
    return ranges


class Planning:
    """A plan in the making, and what is left for the Services that come next."""

    def __init__(
        self, snapshot: Snapshot, options: Options, own: Set[str], login_port: int
    ) -> None:
        self.snapshot, self.options, self.own = snapshot, options, own
        self.plan = Plan(options.explain)
        chosen = [] if own else choose_nodes(snapshot.nodes, self.plan)
        self.possible = bool(own or chosen)  # else there is one warning for all
        self.nodes = node_places(snapshot.nodes, chosen)
        self.unique = each_address_once(self.nodes)
        self.left = dict.fromkeys((4, 6), MAX_RULES)
        self.taken: dict[tuple[str, int], tuple[str, int]] = {}  # ports by Services and NodePorts
        if options.executor == "ssh":
            logins = {login_port, *(login.port for login in options.host)}
            self.taken = {("tcp", port): ("", 0) for port in logins}

    def add(self, service: Service) -> None:
        """Plans what a Service asks for and can have."""
        plan = self.plan
        try:
            check_room(service)
            check_annotations(service, plan)
            sources = allowed_sources(service)
        except ValueError as error:
            plan.reject(service, error)
            return
        claims, places = list(self.granted(service)), self.places_of(service)
        if service.key == plan.explained:
            plan.claims, plan.places = claims, places
        forwards = list(self.forwards_of(service, claims, places, sources))
        lacking = [forward.port for forward in forwards if not forward.targets]
        if lacking and self.possible:
            what = f"there is no {'ready endpoint' if self.own or service.local else 'node'}"
            why = f"{what} of its IP families to forward to"
            if any(place.live for place in places):
                why = f"no ready pod has the port {enumerated(lacking)}"
            plan.warnings.append(f"{service.key}: not forwarded, {why}")
        ranges = in_ranges(forward for forward in forwards if forward.targets)
        if len(ranges) * len(sources or ()) > MAX_SOURCES:
            what = f"{len(ranges)} external ports for {len(sources or ())} networks"
            plan.reject(service, f"{what} make more than {MAX_SOURCES} rules; ask for fewer")
            return
        self.afford(service, ranges, claims, rule_counts(service, places, sources))

    def granted(self, service: Service) -> Iterator[Claim]:
        """The claims of a Service that nobody made before."""
        plan, ports = self.plan, self.options.ports
        refused: dict[tuple[str, str, str], list[Claim]] = {}
        for claim in claims_of(service, plan):
            key, wish = (claim.port.protocol, claim.external), (service.key, claim.port.node_port)
            if key not in self.taken and any(allowed.has(*key) for allowed in ports):
                self.taken[key] = wish
                plan.decide(service, claim)
                yield claim
                continue
            owner, port = self.taken.get(key, (None, 0))
            if (owner, port) == wish:  # a mapping given twice counts once
                continue
            reason = told = "the host's own SSH port, kept for epok"
            if owner is None:
                reason = told = f"not in --ports ({enumerated(map(str, ports))})"
            elif owner:
                reason, told = f"taken by {owner}", "taken by an older Service"
                if owner == service.key:
                    told = "taken by another mapping of this Service"
            error = {None: "PortNotAllowed", "": "PortReserved"}.get(owner, "PortTaken")
            plan.decide(service, claim, error)
            refused.setdefault((claim.mapping, reason, told), []).append(claim)
        for (mapping, reason, told), claims in refused.items():
            protocols = ", ".join(sorted({claim.port.protocol for claim in claims}))
            what = f"external port {spans({claim.external for claim in claims})} ({protocols}) is "
            plan.reject(service, what + reason, mapping, what + told)

    def places_of(self, service: Service) -> list[Place]:
        """Where a Service's connections may go: nodes, or, on a host that is one of them, its pods.

        On such a host a NodePort cannot be the target: a connection is translated only once, so
        kube-proxy would not see it.
        """
        endpoints = self.snapshot.endpoints.get(service.key, ())
        places, most = self.unique, self.options.max_nodes
        if self.own:
            pods = pod_places(service, endpoints, self.own)
            places, most = each_address_once(pods), len(pods)
        elif service.local:
            places = each_address_once(having_pods(self.nodes, endpoints))
        chosen: list[Place] = []
        for version in sorted({*service.versions}):
            its = [place for place in places if place.address.version == version]
            chosen += highest(service.key, its, most)
        return chosen

    def forwards_of(
        self, service: Service, claims: list[Claim], places: list[Place], sources: Networks | None
    ) -> Iterator[Forward]:
        """One for each claim; those of ports that no pod has are without targets."""
        live = [place for place in places if place.live]
        homes = tuple(place.address for place in places if not place.stand_in)
        masquerade = {"always": True, "never": False, "auto": not service.local}
        for _, external, port in claims:
            targets = (place.target(port) for place in live)
            yield Forward(
                protocol=port.protocol,
                first=external,
                last=external,
                service=service.key,
                port=port.name or str(port.port),
                targets=tuple(target for target in targets if target.port),
                direct=bool(self.own),
                masquerade=masquerade[self.options.masquerade],
                internal=not service.annotations.keys().isdisjoint(INTERNAL_ANNOTATIONS),
                sources=sources,
                known=homes if service.sticky else (),
            )

    def afford(
        self, service: Service, forwards: list[Forward], claims: list[Claim], costs: dict[int, int]
    ) -> None:
        """Takes forwards of a Service as long as there are rules left; rejects the others."""
        fitting = ((self.left[version] // cost, version) for version, cost in costs.items())
        count, version = min(fitting, default=(len(forwards), 0))
        self.plan.forwards += forwards[:count]
        for each, cost in costs.items():
            self.left[each] -= cost * len(forwards[:count])
        if count >= len(forwards):
            return
        mappings = {(claim.port.protocol, claim.external): claim.mapping for claim in claims}
        for forward in forwards[count:]:
            ports = Range(forward.first, forward.last)
            why = (
                f"external port {ports} ({forward.protocol}) would take {costs[version]} rules, "
                f"more than are left of {MAX_RULES:,} for IPv{version}, which older Services get "
                "first; ask for fewer ports or networks"
            )
            lost = [(forward.protocol, port) for port in range(ports.first, ports.last + 1)]
            for mapping in dict.fromkeys(map(mappings.pop, lost)):
                self.plan.reject(service, why, mapping)
        if service.key == self.plan.explained:
            self.plan.claims = [c for c in claims if (c.port.protocol, c.external) in mappings]


def crowding(services: Sequence[Service]) -> Iterator[str]:
    """Says which Services take the room that others find none in."""
    count = sum(service.beyond and service.size <= MAX_SHARE for service in services)
    if count:
        having = (service for service in services if not service.beyond)
        largest = sorted(having, key=lambda each: -each.size)[:3]
        names = enumerated(f"{each.key} ({(each.size >> 10) + 1} KiB)" for each in largest)
        what = f"{count} {plural(count, 'Service finds', 'Services find')} no room left for what "
        what += "Services ask for; let those that ask for most ask for fewer ports or networks"
        yield f"{what}: {names}"


def make_plan(
    snapshot: Snapshot, options: Options, own: Set[str] = frozenset(), login_port: int = 0
) -> Plan:
    """Decides what is forwarded.

    `own` are the names of the nodes that the host itself is, `login_port` is that of Facts.
    """
    planning = Planning(snapshot, options, own, login_port)
    # the older Service wins a port that two ask for
    for service in sorted(snapshot.services, key=lambda each: each.seniority):
        planning.add(service)
    planning.plan.warnings += crowding(snapshot.services)
    planning.plan.forwards.sort(key=lambda forward: (forward.first, forward.protocol))
    return planning.plan


def ingress_of(
    service: Service, forwards: Iterable[Forward], plan: Plan, names: Iterable[str]
) -> list[Ingress]:
    """What the status of a Service says, from its forwards: an entry for each name of the host.

    A port has no error there if connections to it, by its own number, are forwarded to it.
    """
    reached: dict[tuple[str, int], set[int]] = {}  # by IP version
    for forward in forwards:
        some: set[int] = {target.address.version for target in forward.targets}
        for number in range(forward.first, forward.last + 1):
            reached[forward.protocol, number] = some
    entries = []
    for name in names:
        address = to_address(name)
        versions: set[int] = {address.version} if address else {4, 6}
        if not any(versions & each for each in reached.values()):
            continue
        entry = Ingress(ip=name) if address else Ingress(hostname=name)
        for port in service.ports:
            error = plan.fates.get((service.key, port.protocol, port.port), "NotForwarded")
            if not error and not versions & reached.get((port.protocol, port.port), set()):
                error = "NotForwarded"
            error = error and f"{PREFIXES[0]}{error}"
            entry.ports.append(PortStatus(port.port, port.protocol.upper(), error))
        entries.append(entry)
    return entries


# ------------------------------------------------ ruleset: Forwards -> chains of iptables rules

# iptables-save printed back each rule below as it stands here, by nft and legacy, IPv4 and IPv6.

ROOT, FORWARD, POSTROUTING = "EPOK", "EPOK-FORWARD", "EPOK-POSTROUTING"
BUILT_IN = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
}
HOST_HOOK = f"-m addrtype --dst-type LOCAL -j {ROOT}"
HOOKS = {  # with lo, nat's OUTPUT has HOST_HOOK too
    "filter": {"FORWARD": f"-j {FORWARD}"},
    "nat": {"PREROUTING": HOST_HOOK, "POSTROUTING": f"-j {POSTROUTING}"},
}
# The trie over the 16 bits of a port is cut at these bits: fewer bits a level send less when a
# port changes, more bits a level make fewer chains.
CUTS = (13, 10, 8, 6, 4, 2, 0)


class Family(NamedTuple):
    """An IP version and the words for it."""

    version: int
    tool: str
    loopback: Network


FAMILIES = (
    Family(4, "iptables", ipaddress.ip_network("127.0.0.0/8")),
    Family(6, "ip6tables", ipaddress.ip_network("::1/128")),
)


@functools.lru_cache(maxsize=10_000)
def once_in_memory(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The same texts, but once in memory."""
    return tuple(map(sys.intern, texts))


class Rules(Sequence[str]):
    """The rules of a chain.

    What they have before their last ":", most leaves have alike: it is in memory once, as is what
    comes behind the network of a client.
    """

    __slots__ = ("ends", "starts")

    def __init__(self, rules: Sequence[str]) -> None:
        sourced = rules[:1] and rules[0].startswith("-s ")
        parts = [rule.rpartition(" -m " if sourced else ":") for rule in rules]
        self.starts = once_in_memory(tuple([start + cut for start, cut, _ in parts]))
        self.ends = tuple(map(sys.intern, [end for _, _, end in parts]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: Any) -> Any:
        return list(self)[number]

    def __iter__(self) -> Iterator[str]:
        return map(operator.add, self.starts, self.ends)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rules):
            return self.ends == other.ends and self.starts == other.starts
        return list(self) == other


NO_RULES = Rules(())


Chains = Mapping[str, Sequence[str]]  # rules, by chain


@dataclass
class Table:
    """What is, or shall be, epok's in a table: its chains, and the rules that jump to them.

    `hooks` are these rules, by built-in chain, `held` chains of epok's that foreign rules refer to,
    `older` the (chain, rule) pairs of the older epok. Of a table that was read, `counts` are the
    packets that met each rule of a chain, where they were asked for, `origin` is what printed it,
    `foreign` are the rules of all other chains, as Saved has them, and `beside` is whether the host
    has tables of iptables-legacy too. `neighbours`, of the filter table, are the rules of those
    that are never epok's, None where they were not read with it.
    """

    chains: dict[str, Sequence[str]] = field(default_factory=dict)
    hooks: dict[str, list[str]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    older: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict, compare=False)
    origin: str = field(default="", compare=False)
    foreign: Chains = field(default_factory=dict, compare=False)
    beside: bool = field(default=False, compare=False)
    neighbours: Mapping[str, Chains] | None = field(default=None, compare=False)

    def add(self, prefix: str, lines: list[str]) -> str:
        """Adds an immutable chain, named by prefix and digest; returns its name."""
        rules, text = Rules(lines), "\n".join(lines)
        while True:
            name = f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
            if self.chains.setdefault(name, rules) == rules:
                return name
            text += "\n"  # another chain has this digest already


Tables = dict[str, Table]
Wanted = Mapping[int, Tables]  # by IP version
Found = Mapping[int, Tables | None]  # by IP version, None where the host cannot do it
NOTHING: Tables = {"filter": Table(), "nat": Table()}


def render(forwards: Sequence[Forward], family: Family, options: Options) -> Tables:
    """The tables of one IP version that make the forwards work."""
    external, mark = options.external_interface, options.mark
    ways = {name: matches_for(name, family, options.addresses) for name in options.interfaces}
    inner = any(ways[name] for name in ways if name != external)
    outer = bool(ways.get(external))
    nat = Table()
    leaves: list[Leaf] = []
    for forward in forwards:
        if inner or (outer and not forward.internal):
            leaves += add_leaf(forward, family, mark, nat)
    inside = add_trees(leaves, nat) if inner else {}
    outside = add_trees([leaf for leaf in leaves if not leaf.internal], nat) if outer else {}
    bit = f"{mark.masquerade:#x}/{mark.masquerade:#x}"
    nat.chains[ROOT] = root_rules(ways, inside, outside, external)
    nat.chains[POSTROUTING] = [f"-m connmark --mark {bit} -j MASQUERADE --random-fully"]
    accept = Table({FORWARD: [f"-m connmark {marked(mark)} -j ACCEPT"]})
    tables = {"filter": accept, "nat": nat}
    for name, table in tables.items():
        table.hooks = {chain: [hook] for chain, hook in HOOKS[name].items()}
    nat.hooks["OUTPUT"] = [HOST_HOOK] if "lo" in options.interfaces else []
    return tables


def marked(mark: Mark) -> str:
    """How connmark knows the connections that epok forwards."""
    return f"--mark {mark.forwarded:#x}/{mark.forwarded:#x}"


def root_rules(
    ways: dict[str, list[str]], inside: dict[str, str], outside: dict[str, str], external: str
) -> list[str]:
    """The rules of EPOK, from each way in to a protocol's first chain; the external one first."""
    rules = []
    for interface, matches in sorted(ways.items(), key=lambda way: way[0] != external):
        trees = outside if interface == external else inside
        for match, (protocol, chain) in itertools.product(matches, trees.items()):
            rules.append(f"{match} -p {protocol} -g {chain}")
        if interface == external and inside:
            # so that another interface that covers this one, like eth+, does not let its packets in
            rules.append(f"{'-o' if interface == 'lo' else '-i'} {interface} -j RETURN")
    if len(rules) > ROOT_RULES:
        what = f"--interfaces and --addresses make {len(rules)} rules, more than {ROOT_RULES}"
        raise Fatal(f"{what} that each new connection meets: give fewer, or larger networks")
    return rules


def matches_for(interface: str, family: Family, addresses: Sequence[Network]) -> list[str]:
    """What packets match that come in through an interface to these addresses, one rule each."""
    given = [network for network in addresses if network.version == family.version]
    everywhere = not addresses or any(not network.prefixlen for network in given)
    # packets of the host to itself pass OUTPUT, where -i cannot match
    if interface == "lo" and everywhere:
        return [f"! -d {family.loopback} -o lo"]
    if interface == "lo":
        parts = [part for network in given for part in cut_out(family.loopback, network)]
        return [f"-d {text_of(part)} -o lo" for part in parts]
    if everywhere:
        return [f"-i {interface}"]
    return [f"-d {text_of(network)} -i {interface}" for network in given]


def cut_out(hole: Any, network: Any) -> list[Network]:
    """The networks that are left of one when another is taken out of it."""
    if not network.overlaps(hole):
        return [network]
    return sorted(network.address_exclude(hole)) if hole.subnet_of(network) else []


def text_of(network: Network) -> str:
    """As iptables prints it: with the C library's form of IPv6 addresses."""
    address = network.network_address
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, address.packed)}/{network.prefixlen}"


class Leaf(NamedTuple):
    """External ports and the rule that sends them to the chain of their nodes."""

    first: int
    last: int
    protocol: str
    internal: bool
    rule: str


def add_trees(leaves: Iterable[Leaf], nat: Table) -> dict[str, str]:
    """Adds the chains that lead packets to their leaves; returns each protocol's first chain."""
    roots = {}
    for protocol in PROTOCOLS:
        chosen = sorted(leaf for leaf in leaves if leaf.protocol == protocol)
        if chosen:
            roots[protocol] = add_branch(protocol, chosen, 0, nat)
    return roots


def add_branch(protocol: str, leaves: Sequence[Leaf], level: int, nat: Table) -> str:
    """Adds the chain that tells the leaves apart by port, and the smaller ones below it."""
    while len(leaves) > 1 and leaves[0].first >> CUTS[level] == leaves[-1].last >> CUTS[level]:
        level += 1

    def block_of(leaf: Leaf) -> tuple[int, int]:
        return leaf.first >> CUTS[level], leaf.last >> CUTS[level]

    rules = []
    # a range that crosses a border between blocks stands alone in this chain
    for _, group in itertools.groupby(leaves, block_of):
        block = list(group)
        rule = block[0].rule
        if len(block) > 1:
            ports = f"-p {protocol} -m {protocol} --dport {block[0].first}:{block[-1].last}"
            rule = f"{ports} -g {add_branch(protocol, block, level + 1, nat)}"
        rules.append(rule)
    return nat.add(f"EPOK-{protocol}-{leaves[0].first}-{leaves[-1].last}", rules)


def add_leaf(forward: Forward, family: Family, mark: Mark, nat: Table) -> list[Leaf]:
    """Adds the chain that marks a connection and picks a node.

    Returns its leaf; none when no target or client is of the family.
    """
    version, protocol = family.version, forward.protocol
    targets = [target for target in forward.targets if target.address.version == version]
    sources = [network for network in forward.sources or () if network.version == version]
    if not targets or (forward.sources is not None and not sources):
        return []
    bits = mark.forwarded | (mark.masquerade if forward.masquerade else 0)
    addresses = tuple(target.address for target in targets)
    known = tuple(address for address in forward.known if address.version == version)
    ports = [target_ports(forward, target) for target in targets]
    rules = [f"-j CONNMARK --set-xmark {bits:#x}/{mark.forwarded | mark.masquerade:#x}"]
    rules += [start + ports[number] for number, start in shares(protocol, addresses, known)]
    prefix = f"EPOK-{protocol}-{Range(forward.first, forward.last)}"
    chain = nat.add(prefix, rules)
    # 255 bytes are all that iptables keeps: four names of 63 make more
    comment = f"{forward.service} {forward.port}"[:250] + (" pods" if forward.direct else "")
    # anything else could end the rule or begin another
    if not re.fullmatch(r"[A-Za-z0-9_.:/ -]{1,255}", comment):
        raise Fatal(f"{quoted(comment)} cannot stand in a comment of iptables; nothing was changed")
    jump = f'-m comment --comment "{comment}" -g'
    if sources and all(network.prefixlen for network in sources):
        everything, leads = sources[0].supernet(new_prefix=0), {}
        for area, some in parted(everything, without_inner(sources)):
            guards = [f"-s {text_of(source)} {jump} {chain}" for source in some]
            leads[nat.add(prefix, guards)] = area
        [chain, *more] = leads
        if more:
            guards = [f"-s {text_of(area)} {jump} {guard}" for guard, area in leads.items()]
            chain = nat.add(prefix, guards)
    external = f"{forward.first}"
    if forward.last > forward.first:
        external += f":{forward.last}"
    rule = f"-p {protocol} -m {protocol} --dport {external} {jump} {chain}"
    return [Leaf(forward.first, forward.last, protocol, forward.internal, rule)]


def without_inner(networks: list[Network]) -> list[Network]:
    """Networks in their order, less those within another, if they are too many for one chain."""
    if len(networks) <= CHAIN_SOURCES:
        return networks
    outer: list[Network] = []
    last = -1
    for network in sorted(networks, key=lambda each: (int(each.network_address), each.prefixlen)):
        if int(network.network_address) > last:
            outer.append(network)
            last = int(network.broadcast_address)
    return outer


def parted(area: Any, networks: list[Network]) -> Iterator[tuple[Network, list[Network]]]:
    """The networks of an area in groups of at most CHAIN_SOURCES, each with the area that it is in.

    They are in order where there are more.
    """
    if len(networks) <= CHAIN_SOURCES:
        yield area, networks
        return
    low, high = area.subnets()
    start = int(high.network_address)
    middle = bisect.bisect_left(networks, start, key=lambda each: int(each.network_address))
    for half, some in ((low, networks[:middle]), (high, networks[middle:])):
        if some:
            yield from parted(half, some)


@functools.lru_cache
def shares(
    protocol: str, targets: tuple[Address, ...], known: tuple[Address, ...]
) -> list[tuple[int, str]]:
    """The rules that pick a target: its number, and all of the rule but the port, which comes last.

    The pick is by the client's address when addresses are `known` (see Forward), else at random.
    """
    hosts = [f"[{address}]" if address.version == 6 else f"{address}" for address in targets]
    ends = [f"-j DNAT --to-destination {host}:" for host in hosts]
    if known and len(targets) > 1:
        owners = buckets_of(tuple(map(str, known)), tuple(map(str, targets)))
        make = type(targets[0])
        # once with and once without the first bit: iptables 1.8.7 (nft) makes nothing of a mask
        # that begins with zeros
        first = 1 << targets[0].max_prefixlen - 1
        mask = make(first + len(owners) - 1)
        sources = [(n, make(bit + bucket)) for bucket, n in enumerate(owners) for bit in (0, first)]
        return [(n, f"-s {source}/{mask} -p {protocol} {ends[n]}") for n, source in sources]
    rules = []
    for number, end in enumerate(ends):
        left = len(ends) - number
        # 1/left as iptables-save prints it: the kernel keeps 31 bits of a probability
        chance = f"{int(2**31 / left + 0.5) / 2**31:.11f}"
        pick = f" -m statistic --mode random --probability {chance}" if left > 1 else ""
        rules.append((number, f"-p {protocol}{pick} {end}"))
    return rules


@functools.lru_cache
def buckets_of(known: tuple[str, ...], live: tuple[str, ...]) -> list[int]:
    """Shares the low bits of client addresses out evenly: each bucket's number of a `live` name.

    Those that are known take in turn what they like best, as in Maglev (Eisenbud et al., NSDI
    2016); a bucket whose owner is not live goes to the live name that likes it best. So a client
    is with its own node whenever that is there.
    """
    count = bucket_count(len(known))
    wishes = {}
    for name in known:
        wishes[name] = iter(sorted(range(count), key=likings(name, count).__getitem__))
    owners: dict[int, str] = {}
    for name in itertools.islice(itertools.cycle(known), count):
        owners[next(bucket for bucket in wishes[name] if bucket not in owners)] = name
    for bucket in [bucket for bucket in owners if owners[bucket] not in live]:
        owners[bucket] = min(live, key=lambda name: likings(name, count)[bucket])
    return [live.index(owners[bucket]) for bucket in range(count)]


@functools.lru_cache(maxsize=1024)
def likings(name: str, count: int) -> list[bytes]:
    """How much a name likes each bucket, the lower the more."""
    return [hashlib.sha256(f"{name} {bucket}".encode()).digest() for bucket in range(count)]


def target_ports(forward: Forward, target: Target) -> str:
    """A target's port, or of a range "30000-30010/8000": port 8000 goes to 30000, and so on."""
    if forward.first == forward.last:
        return f"{target.port}"
    return f"{target.port}-{target.port + forward.last - forward.first}/{forward.first}"


# ------------------------------------------------ live: chains -> forwards, and what changed


Key = tuple[int, int, str, str]  # ports, protocol and Service


@dataclass(frozen=True, slots=True)
class Live(Route):
    """What rules forward: `ways` are the interfaces, and addresses, by which it is reached.

    `counts` are the new connections since its rules were made, all and those to each target;
    empty is not known.
    """

    version: int
    chain: str
    kept: bool
    sources: tuple[str, ...]
    ways: tuple[str, ...] = ()
    counts: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.protocol}/{Range(self.first, self.last)}"

    @property
    def key(self) -> Key:
        return self.first, self.last, self.protocol, self.service

    @property
    def node_ports(self) -> str:
        size = self.last - self.first
        firsts = dict.fromkeys(target.port for target in self.targets)
        return ", ".join(str(Range(first, first + size)) for first in firsts)

    @property
    def text(self) -> str:
        """As "default/mail:smtp (NodePort 2025) on 3 nodes, client address kept"."""
        what, place = ("port", "pod") if self.direct else ("NodePort", "node")
        places = f"{len(self.targets)} {plural(len(self.targets), place)}"
        text = f"{self.service}:{self.port} ({what} {self.node_ports}) on {places}"
        text += ", client address kept" if self.kept else ""
        text += f", for {enumerated(self.sources)} only" if self.sources else ""
        return text + (" over IPv6" if self.version == 6 else "")

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        places = [{"address": str(target.address), "port": target.port} for target in self.targets]
        for place, count in zip(places, self.counts[1:], strict=False):
            place["connections"] = count
        return {
            "protocol": self.protocol,
            "first": self.first,
            "last": self.last,
            "service": self.service,
            "port": self.port,
            "ipVersion": self.version,
            "pods" if self.direct else "nodes": places,
            "clientAddressKept": self.kept,
            "onlyFor": list(self.sources),
            "reachedBy": list(self.ways),
            "connections": self.counts[0] if self.counts else None,
            "chain": self.chain,
        }


# strict: another program may have written these rules
DISPATCH = re.compile(
    r"-p (\w+) -m \w+ --dport (\d{1,5})(?::(\d{1,5}))? "
    r'-m comment --comment "([\w.-]+/[\w.-]+) ([\w-]+)( pods)?" -g (\S+)',
    re.ASCII,
)
TARGET = re.compile(r"--to-destination \[?([0-9a-f.:]+)\]?:(\d{1,5})", re.ASCII)
# address, unless it is negated, interface and chain
ENTRY = re.compile(r"(?:! -d \S+ |-d (\S+) )?(?:-i|-o) (\S+) -p \w+ -g (\S+)")
# A rule that leads to a forward, and the ways by which packets come to it.
Dispatch = tuple[str, tuple[str, ...]]


def dispatches_in(tables: Tables) -> dict[Key, Dispatch]:
    """What rules lead to forwards."""
    chains = tables["nat"].chains
    dispatches: dict[Key, Dispatch] = {}
    for address, interface, start in entries_in(tables):
        way = f"{address} by {interface}" if address else interface
        todo, seen = [start], {start}
        while todo:
            for rule in chains.get(todo.pop(), []):
                jump = rule.rpartition(" -g ")[2]
                if match := DISPATCH.match(rule):
                    protocol, first, last, service = match.groups()[:4]
                    key = int(first), int(last or first), protocol, service
                    ways = dispatches[key][1] if key in dispatches else ()
                    dispatches[key] = rule, ways if way in ways else (*ways, way)
                elif jump not in seen:
                    seen.add(jump)
                    todo.append(jump)
    return dispatches


def forwards_in(
    tables: Tables, version: int, counts: dict[str, list[int]] | None = None
) -> dict[Key, Live]:
    """What rules forward; `counts` are those of the rules, by chain, if not the table's own."""
    nat = dataclasses.replace(tables["nat"], counts=counts or tables["nat"].counts)
    dispatches = dispatches_in(tables).items()
    return {key: read_forward(key, dispatch, nat, version) for key, dispatch in dispatches}


def entries_in(tables: Tables) -> list[tuple[str, str, str]]:
    """What EPOK's rules let in: to which address, if to one alone, by what, and to which chain."""
    matches = map(ENTRY.fullmatch, tables["nat"].chains.get(ROOT, ()))
    return [(match[1] or "", match[2], match[3]) for match in matches if match]


# the same objects for the same words, which many rules have
number_in = functools.lru_cache(maxsize=100)(int)
address_in = functools.lru_cache(maxsize=1000)(to_address)

GUARD = re.compile(r"-s (\S+) .* -g (\S+)")  # of some clients, and where they are led


def leaf_of(chain: str, nat: Table) -> tuple[str, list[str]]:
    """The leaf behind chains that let only some networks pass, and these networks."""
    leaf, sources, todo, seen = chain, [], [chain], {chain}
    while todo:
        for guard in filter(None, map(GUARD.fullmatch, nat.chains.get(todo.pop(0), ()))):
            source, target = guard.groups()
            if not GUARD.fullmatch(next(iter(nat.chains.get(target, ())), "")):
                leaf = target
                sources.append(source)
            elif target not in seen:
                seen.add(target)
                todo.append(target)
    return leaf, sources


def read_forward(key: Key, dispatch: Dispatch, nat: Table, version: int) -> Live:
    """The forward that a rule leads to."""
    (first, last, protocol, service), (jump, ways) = key, dispatch
    port, pods, chain = DISPATCH.findall(jump)[0][4:]
    leaf, sources = leaf_of(chain, nat)
    rules, counts = nat.chains.get(leaf, []), nat.counts.get(leaf, [])
    met: dict[Target, int] = {}
    for rule, count in zip(rules, itertools.chain(counts, itertools.repeat(0)), strict=False):
        place = TARGET.search(rule)
        if place and (address := address_in(place[1])):
            target = Target(address, number_in(place[2]))
            met[target] = met.get(target, 0) + count
    marks = re.search(r"--set-xmark (\w+)/(\w+)", next(iter(rules), ""))
    return Live(
        first=first,
        last=last,
        protocol=protocol,
        service=service,
        port=port,
        version=version,
        chain=chain,
        targets=tuple(met),
        direct=bool(pods),
        kept=bool(marks and marks[1] != marks[2]),
        sources=tuple(sources),
        ways=ways,
        counts=(counts[0], *met.values()) if counts else (),
    )


class Change(NamedTuple):
    """A forward of a Service that came (+), went (-), or goes elsewhere now (~).

    `before` is how that was before.
    """

    sign: str
    live: Live
    before: Live | None = None

    @property
    def text(self) -> str:
        return self.live.text + (f": {difference(self.before, self.live)}" if self.before else "")

    @property
    def line(self) -> str:
        return painted(f"{self.sign} {self.live} -> {self.text}", self.sign)

    def document(self) -> dict[str, Any]:
        before = {"before": self.before.document()} if self.before else {}
        return {"change": self.sign, **self.live.document(), **before}


def difference(old: Live, new: Live) -> str:
    """What changed about a forward, as a person says it."""
    news = []
    if old.node_ports != new.node_ports:
        news.append(f"NodePort {old.node_ports} before")
    for word, before, after in (
        ("", [str(t.address) for t in old.targets], [str(t.address) for t in new.targets]),
        ("by ", old.ways, new.ways),
        ("for ", old.sources, new.sources),
    ):
        gone = [each for each in before if each not in after]
        come = [each for each in after if each not in before]
        if gone and after:
            news.append(f"no longer {word}{enumerated(gone)}")
        if come:
            too = " too" if len(come) < len(after) else ""
            news.append(f"now {word}{enumerated(come)}{too}")
    if old.sources and not new.sources:
        news.append("for everybody")
    if old.kept != new.kept:
        news.append(f"client address {'kept' if new.kept else 'hidden'} now")
    if old.port != new.port:
        news.append(f"port {old.port} before")
    return "; ".join(news) or "nodes picked in another way"


VERBS = {"+": "now forwarding", "-": "no longer forwarding", "~": "changed:"}
REASONS = {"+": "ExternalPortForwarded", "-": "ExternalPortRemoved"}  # of Events


def changes_between(before: Found, after: Wanted) -> list[Change]:
    changes = []
    for version, tables in before.items():
        if tables is None:
            continue
        old, new = dispatches_in(tables), dispatches_in(after[version])
        one, other = tables["nat"], after[version]["nat"]
        chains = [chain for chain in one.chains if chain != ROOT and chain in other.chains]
        tampered = any(one.chains[chain] != other.chains[chain] for chain in chains)
        for key in sorted(old.keys() | new.keys()):
            if not tampered and old.get(key) == new.get(key):
                continue  # the names of chains say what is in them
            was = read_forward(key, old[key], one, version) if key in old else None
            now = read_forward(key, new[key], other, version) if key in new else None
            if now and now != was:
                changes.append(Change("~" if was else "+", now, was))
            elif was and not now:
                changes.append(Change("-", was))
    return changes


# ------------------------------------------------ transaction: iptables-save -> iptables-restore


OWNED = re.compile(rf"{ROOT}(-[^\x00-\x20\"'\\\x7f]*)?")


def owned(chain: str) -> bool:
    """Whether a chain is epok's, by its name: without a quote, or it could not be deleted."""
    return bool(OWNED.fullmatch(chain))


OLDER_COMMENT = re.compile(r"epok_rule_id\b|.*\bepok_rule_id\b\W{0,3}\w")
SAVED_LINE = re.compile(r"(?:\[(\d+):\d+\] )?(-A ([^ ]+) ?(.*))|(.*)")


class Saved:
    """A table that iptables-save prints, read line by line while it comes: the text is never whole.

    `table` is what is epok's. `others` are the lines of all other rules, by chain, and then the
    chain's policy; none with `own`. `said` is for messages: how it begins, and what nft says of
    rules that it cannot print.
    """

    def __init__(self, name: str, meter: Meter | None = None, own: bool = False) -> None:
        self.own = own
        self.others: dict[str, list[str]] = {}
        self.name, self.table, self.said = name, Table(foreign=self.others), ""
        self.meter = meter or Meter("rules", RULES_LIMIT, RULES_LINES)
        self.count = 0  # of these
        self.policies: dict[str, str] = {}
        self.seen = self.inside = self.broken = False

    @property
    def whole(self) -> Table | None:
        """The table, None when there was none from its beginning to its end."""
        return self.table if self.seen and not (self.inside or self.broken) else None

    @property
    def kept(self) -> bool:
        """Whether the rules of others are."""
        return not self.own and self.count <= OTHERS

    def take(self, pieces: Iterable[bytes]) -> str:
        """Reads all that a command prints; returns what a message needs of it."""
        return self.read(lines_of(self.meter.passing(pieces))).said

    def read(self, lines: Iterable[str]) -> Saved:
        matches = filter(None, map(SAVED_LINE.match, lines))
        for chain, group in itertools.groupby(matches, operator.itemgetter(3)):
            if self.inside and chain and owned(chain):
                self.read_own(chain, group)
                continue
            for match in group:
                if chain is None:
                    self.read_line(match[5])
                elif self.inside:
                    self.read_other(*match.groups()[1:4])
        for chain, policy in self.policies.items() if self.kept else ():
            self.others.setdefault(chain, []).append(f"-P {chain} {policy}")
        return self

    def read_line(self, line: str) -> None:
        """One that is no rule."""
        odd = tells_of_more(line)
        if line and len(self.said) < (3000 if odd else 300):
            self.said += line + "\n"
        if line.startswith("*"):
            begins = line == f"*{self.name}"
            odd = self.inside or (begins and self.seen)
            self.inside, self.seen = begins, self.seen or begins
        elif line.startswith("# Generated by ") and not self.seen:
            self.table.origin = line
        elif self.inside and line == "COMMIT":
            self.inside = False
        elif self.inside and line.startswith(":"):
            chain, _, policy = line[1:].partition(" ")
            if owned(chain):
                self.table.chains[chain] = NO_RULES
                self.meter.chains -= 1
                if self.meter.exceeded:
                    raise Fatal(f"{self.meter.complaint}, or {RULES_CHAINS:,} chains of epok's")
            else:
                self.policies[chain] = policy.split(" ")[0]
        self.broken |= odd

    def read_own(self, chain: str, matches: Iterable[re.Match[str]]) -> None:
        if chain not in self.table.chains:  # iptables-save names all chains first
            self.broken = True
            return
        read = [match.group(1, 4) for match in matches]
        self.table.chains[chain] = Rules([*self.table.chains[chain], *(rule for _, rule in read)])
        if counts := [int(count) for count, _ in read if count]:
            self.table.counts.setdefault(chain, []).extend(counts)

    def read_other(self, line: str, chain: str, rule: str) -> None:
        self.count += 1
        if self.kept:
            self.others.setdefault(chain, []).append(line)
        elif self.count == OTHERS + 1 and not self.own:
            log.info("table %s has more than %d rules of others: not looked at", self.name, OTHERS)
            self.others.clear()
        words = split(rule) if ROOT in rule or "epok_rule_id" in rule else []
        pairs = list(itertools.pairwise(words))
        targets = [value for option, value in pairs if option in ("-j", "-g") and owned(value)]
        if targets and chain in BUILT_IN.get(self.name, ()):
            self.table.hooks.setdefault(chain, []).append(rule)
        elif targets:
            self.table.held.add(targets[0])
        elif any(option == "--comment" and OLDER_COMMENT.match(value) for option, value in pairs):
            self.table.older.append((chain, rule))


def tells_of_more(line: str) -> bool:
    """Whether nft's iptables-save says there that it cannot print all; a comment may say so too."""
    return "incompatible" in line and line[0] not in ":-["  # it is no chain, and no rule


def split(rule: str) -> list[str]:
    """The words of a rule, without quotes."""
    try:
        return shlex.split(rule)
    except ValueError:  # an open quote in somebody's comment
        return rule.split()


AROUND = len("*nat\nCOMMIT\n")


class Block:
    """Lines of an input that stay together: chains, which are emptied and filled, and the rest."""

    __slots__ = ("chains", "lines", "size")

    def __init__(self, chains: Mapping[str, Sequence[str]], lines: Sequence[str] = ()) -> None:
        self.chains, self.lines = chains, lines
        self.size = sum(map(len, (*self.declarations(), *self.changes())))

    def declarations(self) -> Iterator[str]:
        return (f":{chain} - [0:0]\n" for chain in self.chains)

    def changes(self) -> Iterator[str]:
        for chain, rules in self.chains.items():
            yield from (f"-A {chain} {rule}\n" for rule in rules)
        yield from (f"{line}\n" for line in self.lines)


def restore_inputs(wanted: Tables, found: Tables, limit: int) -> Iterator[str]:
    """The smallest iptables-restore --noflush inputs that make `found` what is `wanted`.

    One input does it at once, none where nothing differs. Where one is longer than `limit`, chains
    that nothing refers to yet go ahead, one input turns the traffic over to them, and the old ones
    are deleted after it. Each is made when it is asked for.
    """
    if wanted["nat"].chains.get(ROOT) == [] and not any(table.chains for table in found.values()):
        return  # no forwards, and never any: leave the host as it is
    # filter is a handful of lines, and an EPOK-FORWARD that comes before the forwards does no harm
    start = joined("filter", sum(stages("filter", wanted["filter"], found["filter"]), []))
    ahead, flip, emptied, deleted = stages("nat", wanted["nat"], found["nat"])
    whole = [*ahead, *flip, *emptied, *deleted]
    fits = len(whole) < INPUT_CHAINS
    if fits and len(start) + AROUND + sum(block.size for block in whole) <= limit:
        ahead, flip, emptied, deleted = [], whole, [], []
    elif sum(map(len, found["nat"].chains.values())) > HOST_RULES:
        kept = needed_chains(wanted["nat"], found["nat"])
        less = dataclasses.replace(found["nat"], chains=kept)
        for blocks in stages("nat", Table(kept), Table(found["nat"].chains, held=less.held)):
            yield from packed(blocks, limit)
        ahead, flip, emptied, deleted = stages("nat", wanted["nat"], less)
    yield from packed(ahead, limit)
    if text := start + joined("nat", flip):
        yield text
    yield from packed(emptied, limit)  # all of them before the first is deleted
    yield from packed(deleted, limit)


def needed_chains(wanted: Table, found: Table) -> dict[str, Sequence[str]]:
    """Of too many chains those that are wanted, and those that EPOK leads to if it can be epok's.

    The others are what a run left that was broken off, or somebody who has the key.
    """
    used, todo = {ROOT, POSTROUTING, *found.held}, [ROOT, *found.held]
    while todo:
        targets = {rule.rpartition(" -g ")[2] for rule in found.chains.get(todo.pop(), ())}
        todo += targets - used
        used |= targets
    chains = {chain: rules for chain, rules in found.chains.items() if chain in used}
    if sum(map(len, chains.values())) > HOST_RULES:
        chains = {ROOT: []}
    # what is wrong with a wanted one goes, and not the chain: others that are right lead to it
    for chain, rules in found.chains.items():
        if chain in wanted.chains:
            chains.setdefault(chain, rules if wanted.chains[chain] == rules else [])
    return chains


def stages(name: str, wanted: Table, found: Table) -> tuple[list[Block], ...]:
    """What differs in a table: chains to go ahead, the flip, old chains to empty, and to delete.

    A chain that is still referred to cannot be deleted.
    """
    differing = {
        chain: rules for chain, rules in wanted.chains.items() if found.chains.get(chain) != rules
    }
    changed = {chain: differing.pop(chain) for chain in (ROOT, POSTROUTING) if chain in differing}
    strange: list[str] = []
    hooks: list[str] = []
    for chain in BUILT_IN[name]:
        wants = wanted.hooks.get(chain, [])
        leads = {rule.split()[-1] for rule in wants}
        for line in hook_changes(chain, wants, found.hooks.get(chain, [])):
            # first goes what leads to where it never should: nft has no DNAT behind INPUT
            lost = wanted.hooks and line.split()[-1] not in leads
            (strange if lost else hooks).append(line)
    ahead = [Block({}, strange)] if strange else []
    older = [] if wanted.hooks else [f"-D {chain} {rule}" for chain, rule in found.older]
    stale = [chain for chain in found.chains if chain not in wanted.chains]
    return (
        ahead + [Block({chain: rules}) for chain, rules in differing.items()],
        [Block(changed, [*hooks, *older])] if changed or hooks or older else [],
        [Block({each: ()}) for each in stale if each not in found.held or found.chains[each]],
        [Block({}, [f"-X {chain}"]) for chain in stale if chain not in found.held],
    )


def joined(name: str, blocks: Sequence[Block]) -> str:
    """One input for a table, empty without blocks; chains are declared before rules name them."""
    lines = [f"*{name}\n"]
    for block in blocks:
        lines += block.declarations()
    for block in blocks:
        lines += block.changes()
    return "".join([*lines, "COMMIT\n"]) if blocks else ""


def packed(blocks: Iterable[Block], limit: int) -> Iterator[str]:
    """As few inputs for nat of at most `limit` bytes as can be; a larger block goes alone."""
    some: list[Block] = []
    size = AROUND
    for block in blocks:
        if some and (size + block.size > limit or len(some) == INPUT_CHAINS):
            yield joined("nat", some)
            some, size = [], AROUND
        some.append(block)
        size += block.size
    if some:
        yield joined("nat", some)


def hook_changes(chain: str, wanted: list[str], found: list[str]) -> list[str]:
    """Deletes wrong and double hooks, inserts a missing one, and leaves one where it is."""
    lines = []
    kept: list[str] = []
    for rule in reversed(found):  # -D deletes the first that is equal, so the last one stays
        if rule in wanted and rule not in kept:
            kept.append(rule)
        else:
            lines.append(f"-D {chain} {rule}")
    return lines + [f"-I {chain} {rule}" for rule in wanted if rule not in kept]


def older_rules(found: Found) -> int:
    """How many rules the older epok has left, which made them in this table alone."""
    return len((found[4] or NOTHING)["nat"].older)


# ------------------------------------------------ hosts: the only part that runs anything there


class Command(enum.Enum):
    """Every command that epok can run on a host; there is no other.

    Each word goes as it is; over SSH, where a shell reads them, quoted. What takes root is run by
    sudo -n, unless epok is root there. In capitals is what differs: TOOL is iptables or ip6tables,
    BACKEND legacy or nft, TABLE nat or filter; of nft TABLE, as FAMILY and CHAIN, is what
    "list chains" has shown.
    """

    # what a run does
    SAVE = "TOOL-save -t TABLE"  # what is there
    RESTORE = "TOOL-restore --noflush --wait 5"  # the swap, with the changes as its input
    FLOWS = "conntrack -L -p udp"  # UDP flows, which may go on to what is no target now
    FLOWS_6 = f"{FLOWS} -f ipv6"
    # ends one of them, so that its client goes the new way
    END_FLOWS = "conntrack -D -p udp --orig-dst ADDRESS --orig-port-dst PORT --reply-src ADDRESS"
    END_FLOWS_6 = f"{END_FLOWS} -f ipv6"
    # whether the host forwards packets
    FORWARDING = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"
    ADDRESSES = "ip -br addr"  # the interfaces, and whether the host is itself a node
    CONNECTION = "printenv SSH_CONNECTION"  # the port that epok logs in by, seen from there
    # what only looks
    COUNTS = "TOOL-save -c -t nat"  # how many connections came: to show, and as metrics
    NETCONF = "ip netconf"  # whether an interface forwards, and what rp_filter drops
    LISTENERS = "ss -Hltun"  # whether a forward hides a program of the host
    NFT_CHAINS = "nft -j list chains"  # whether nft's own rules are in the way
    NFT_CHAIN = "nft -j list chain FAMILY TABLE CHAIN"  # the rules of one that may be
    OTHER_SAVE = "TOOL-BACKEND-save"  # whether rules of the other iptables are in the way
    REACH = "nc -nvz -w 2 ADDRESS PORT"  # whether a node answers: --explain over SSH
    # what gates learnt later
    LOCAL = "ip route show table local"  # the addresses, where ip knows no -br
    # whether rules of the tables raw and mangle are in the way; on this host also what is there
    SAVE_ALL = "TOOL-save"
    WAY = "ip route get ADDRESS"  # by which interface packets leave
    WAY_6 = "ip -6 route get ADDRESS"
    WAY_FROM = "ip route get ADDRESS from ADDRESS iif IF"  # by which those of others do
    RULES = "ip rule"  # whether packets' marks, or their sources, decide that
    # how many connections are answered, and how many wait, without their clients
    PORT_FLOWS = "conntrack -L -p tcp --orig-port-dst PORT"
    PORT_FLOWS_6 = f"{PORT_FLOWS} -f ipv6"

    @property
    def as_root(self) -> bool:
        return str(self.value).startswith(("TOOL", "conntrack", "nft"))

    def argv(self, sudo: Sequence[str], *values: object) -> tuple[str, ...]:
        """The command, behind `sudo` where it takes root, with values in place of the capitals."""
        left = map(str, values)
        words = (re.sub(r"\b[A-Z]{2,}\b", lambda _: next(left), w) for w in self.value.split())
        return (*(sudo if self.as_root else ()), *words)

    def of(self, version: int) -> Command:
        """The command that does the same for an IP version."""
        return Command[f"{self.name}_6"] if version == 6 else self


REACH_SECONDS = 2  # as Command.REACH has it
SYSCTLS = Command.FORWARDING.value.split()[1:]


class LocalHost:
    """The machine that epok runs on."""

    name = "this host"
    sudo: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.machine = socket.gethostname()
        self.user = f"#{os.geteuid()}"
        with contextlib.suppress(KeyError):
            self.user = pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() != 0 and not self.may_pass_on_net_admin():
            self.sudo = ("sudo", "-n")

    @staticmethod
    def may_pass_on_net_admin() -> bool:
        """Whether commands will have CAP_NET_ADMIN (bit 12): only what is ambient is passed on."""
        with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
            ambient = re.search(r"(?m)^CapAmb:\s*([0-9a-f]+)", file.read())
            return bool(ambient and int(ambient[1], 16) >> 12 & 1)
        return False

    def run(
        self, argv: Sequence[str], text: str, deadline: Deadline, take: Take | None = None
    ) -> Result:
        path = f"{os.environ.get('PATH') or os.defpath}:/usr/sbin:/sbin:/usr/bin:/bin"
        doing = f"{self.name}: {shlex.join(argv)}"
        env = {**os.environ, "LC_ALL": "C", "PATH": path}
        done = execute(argv, text, env, deadline, doing, take=take)
        log.debug("%s: exit status %d", doing, done.status)
        return done

    def reach(self, address: str, port: int, deadline: Deadline) -> str | None:
        """Why a TCP port does not answer, "" when it does; None when that cannot be tried."""
        seconds = min(REACH_SECONDS, deadline.remaining())
        try:
            socket.create_connection((address, port), seconds).close()
        except OSError as error:
            return one_line(error.strerror or error)
        return ""

    def close(self) -> None:
        pass


class SshHost:
    """A host that epok logs in to."""

    def __init__(self, login: Login, options: Options) -> None:
        self.login, self.options = login, options
        self.name, self.machine, self.user = str(login), str(login), login.user
        self.sudo = () if login.user == "root" else ("sudo", "-n")
        self.client: Any = None
        self.opening = threading.Lock()
        self.sessions = threading.Semaphore(2)  # at once: some have set sshd's MaxSessions so low
        self.closed = False
        self.gated = False  # whether the key has a command of its own, by sudo
        self.slow = ""  # why its sudo takes long

    def reach(self, address: str, port: int, deadline: Deadline) -> str | None:
        result = self.run(Command.REACH.argv(self.sudo, address, port), "", deadline)
        if result.status in (126, 127):
            return None
        return "" if result.status == 0 else result.said.rpartition(": ")[2]

    def run(
        self, argv: Sequence[str], text: str, deadline: Deadline, take: Take | None = None
    ) -> Result:
        """Runs a command over the one connection, which is made when there is none.

        Raises Transient when it breaks. Several may call this at the same time.
        """
        import paramiko

        doing, client = f"{self.name}: {shlex.join(argv)}", None
        try:
            with self.sessions:
                with self.opening:  # one at a time: paramiko mixes up why they failed
                    if deadline.remaining() <= 0.001:
                        raise self.missed(deadline, doing)
                    if self.closed:
                        raise Fatal(f"{doing}: not needed any more")
                    client = self.client = self.client or self.connect(deadline)
                    channel = client.get_transport().open_session(timeout=deadline.remaining())
                return self.talk(channel, argv, text, deadline, take)
        except paramiko.ChannelException as error:  # more sessions than it allows, most likely
            raise Transient(f"{doing}: {one_line(error)}") from None
        except (paramiko.SSHException, OSError, EOFError) as error:
            with self.opening:
                if client is self.client:  # or another thread has a new one already
                    self.drop()
            if deadline.remaining() <= 0.1:  # it was epok that broke off
                raise self.missed(deadline, doing) from None
            kind = Fatal if self.closed else Transient  # by close() nobody waits for it any more
            raise kind(f"{doing}: {one_line(error)}") from None

    def talk(
        self, channel: Any, argv: Sequence[str], text: str, deadline: Deadline, take: Take | None
    ) -> Result:
        """Runs a command in a session of its own."""
        command = shlex.join(argv)
        doing = f"{self.name}: {command}"
        began = time.monotonic()
        channel.settimeout(deadline.remaining())
        channel.exec_command(command)
        # all three at once: neither side may wait for the other with full buffers
        if text:
            feed(channel.sendall, channel.shutdown_write, text)
        else:
            end_input(channel)
        taking = [collect(channel.recv, doing, take), collect(channel.recv_stderr, doing)]
        out, err = (each.result(deadline, doing) for each in taking)
        if not channel.status_event.wait(deadline.remaining()):
            raise self.missed(deadline, doing)
        if channel.exit_status == -1:
            raise EOFError("the connection was lost before the exit status came")
        channel.close()
        log.debug("%s: exit status %d", doing, channel.exit_status)
        self.note(argv, err, time.monotonic() - began)
        return Result(channel.exit_status, out, err)

    def missed(self, deadline: Deadline, doing: str) -> Fatal:
        return Fatal(f"{deadline.missed(doing)}{self.slow}")

    def note(self, argv: Sequence[str], err: str, seconds: float) -> None:
        """Learns from what sudo says, also before the command of a key that has one."""
        if argv[0] != "sudo" and re.search("(?m)^sudo: (?!unable to resolve)", err):
            self.gated = True
        name = re.search(r"(?m)^sudo: unable to resolve host ([\w.-]+)", err)
        if name and seconds > 2 and not self.slow:
            slow = f"sudo takes {seconds:.0f} s there, since {name[1]} does not know its own name"
            slow += f": as root on the host run: echo 127.0.1.1 {name[1]} >>/etc/hosts"
            log.warning("%s: %s", self.name, slow)
            self.slow = f"; {slow}"

    def connect(self, deadline: Deadline) -> Any:
        """Logs in. Raises Fatal for what will not change, Transient for the rest."""
        import paramiko

        check: Any = HostKeyCheck(self.login, self.options)
        key = load_key(self.options.key)
        for algorithms in check.attempts():
            client = paramiko.SSHClient()
            client.set_missing_host_key_policy(check)
            try:
                self.log_in(client, key, algorithms, deadline)
                return client
            except check.Refused:
                client.close()
            except socket.gaierror as error:
                raise self.unresolved(error) from None
            except paramiko.ssh_exception.IncompatiblePeer as error:
                client.close()
                if "host key" not in str(error) or not check.pins:
                    raise Fatal(f"{self.name}: {how_to_agree(error)}") from None
            except (paramiko.SSHException, OSError, EOFError) as error:
                transport = client.get_transport()
                alive = transport is not None and transport.is_active()
                client.close()
                # paramiko's own limits go by a clock that may have been set meanwhile
                late = re.search("(?i)timeout|no existing session", str(error))
                login = isinstance(error, paramiko.SSHException) and alive and not late
                if login and deadline.remaining() > 0.01:  # not the connection's fault
                    raise Fatal(f"{self.name}: {self.how_to_let_in(key, error)}") from None
                where = f"{self.login.host} port {self.login.port}: " if transport else ""
                what = f"{self.name}: {where}{one_line(error)}"
                advice = "; is the address right, sshd running there, and no firewall between?"
                raise Fatal(what) if self.closed else Transient(what, advice=advice) from None
            except ValueError as error:  # a host name that is none, a key in ~/.ssh that is no text
                what = f"{self.name}: {one_line(error)}"
                raise Fatal(f"{what}; check --host, and give a key with --key") from None
        raise Fatal(check.advice())

    def unresolved(self, error: socket.gaierror) -> Exception:
        """What a name without an address means: Transient where no name server answers."""
        what = f"{self.name}: {quoted(self.login.host)} does not resolve ({error.strerror})"
        advice = "; give an address, or a name that epok can look up; ~/.ssh/config is not read"
        if error.errno == socket.EAI_AGAIN and not self.closed:
            return Transient(what, attempts=3, advice=advice)
        return Fatal(what + advice)

    def log_in(self, client: Any, key: Any, algorithms: Sequence[str], deadline: Deadline) -> None:
        import paramiko

        class Transport(paramiko.Transport):
            def __init__(transport, *args: Any, **how: Any) -> None:  # noqa: N805
                super().__init__(*args, **how)
                offered = transport.get_security_options()
                offered.key_types = [name for name in algorithms if name in offered.key_types]

            def auth_publickey(transport, *args: Any) -> list[str]:  # noqa: N805
                if wanted := super().auth_publickey(*args):  # paramiko would ask at the terminal
                    more = " or ".join(wanted)
                    what = f"{self.name}: sshd accepts the key, but wants {more} as well"
                    raise Fatal(f"{what}; {how_to_ask_for_keys(self.user)}")
                return []

        limits = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")
        client.connect(
            *(self.login.host, self.login.port, self.login.user),
            sock=connect(self.login.host, self.login.port, deadline),
            pkey=key,
            allow_agent=key is None,
            look_for_keys=key is None,
            transport_factory=Transport,
            **dict.fromkeys(limits, deadline.remaining()),
        )

    def how_to_let_in(self, key: Any, error: Exception) -> str:
        allowed = getattr(error, "allowed_types", ["publickey"])
        if "publickey" not in allowed:
            what = f"sshd lets {self.user} in by {', '.join(allowed)} alone"
            return f"{what}; {how_to_ask_for_keys(self.user)}"
        if key is None:
            made = how_to_make_key(os.path.expanduser("~/.ssh/epok"))
            return f"no key was accepted ({one_line(error)}); give one with --key; {made}"
        refused = f"the key {self.options.key} is refused"
        if in_pod():
            return f"{refused}; {RENEW}"
        steps = f"echo '{key.get_name()} {key.get_base64()}' >epok.pub"
        steps += " && cron/setup-host --public-key epok.pub"
        then = f"--host {self.login._replace(user='epok')}, where this key alone works then"
        where = "as root on the host, in a clone of epok's repository"
        return f"{refused}; {where}, run: {steps}; then give {then}, behind a gate"

    def drop(self) -> None:
        if self.client is not None:
            self.client.close()
            self.client = None

    def close(self) -> None:
        """Ends the connection, for commands that still run too, and there will be no other."""
        self.closed = True
        self.drop()


def end_input(channel: Any) -> None:
    """Like shutdown_write(), but never behind the end of the channel, where sshd hangs up.

    paramiko has no public way to send it before it lets go of the lock.
    """
    with channel.lock:
        if message := channel._send_eof():
            channel.get_transport()._send_user_message(message)


AGAIN = "run cron/setup-host on the host, with the options that it had before"
GATE = "run cron/setup-host on the host, which makes a user epok with a gate, and log in as that"
RENEW = AGAIN + ", and replace the Secret by what it prints"
HOST_KEY_TYPES: tuple[Sequence[str], ...] = (  # in the order that ssh prefers
    ("ssh-ed25519",),
    ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    ("rsa-sha2-512", "rsa-sha2-256"),
)
# paramiko's word for what cannot be agreed on, sshd's, and one of those that epok has
NEGOTIATED = {
    "kex": ("key exchange", "KexAlgorithms", "curve25519-sha256@libssh.org"),
    "host key": ("host key", "HostKeyAlgorithms (ssh-keygen -A makes the key)", "ssh-ed25519"),
    "ciphers": ("cipher", "Ciphers", "aes256-gcm@openssh.com"),
    "macs": ("MAC", "MACs", "hmac-sha2-256-etm@openssh.com"),
}


def how_to_agree(error: Exception) -> str:
    """What a server lacks with which nothing can be negotiated."""
    for word, (what, keyword, example) in NEGOTIATED.items():
        if f"acceptable {word}" in str(error):
            add = f"add {example} to {keyword} in /etc/ssh/sshd_config"
            return f"sshd has no {what} that epok has: on the host {add}"
    return one_line(error)


def how_to_ask_for_keys(user: str) -> str:
    """The setting of sshd with which a key is enough, for a user that has a gate."""
    if user != "epok":
        return GATE
    lines = "Match User epok\\nPubkeyAuthentication yes\\nAuthenticationMethods publickey\\n"
    return f"as root on the host run: printf '{lines}' >>/etc/ssh/sshd_config, and reload sshd"


def how_to_make_key(name: str) -> str:
    if in_pod():
        return RENEW
    make = f"{into_directory(name)}ssh-keygen -q -t ed25519 -N '' -f {shlex.quote(name)}"
    return f"to make one, run cron/setup-host on the host, or: {make}"


def into_directory(name: str) -> str:
    """How a command begins that makes a file: by its directory, where there is none."""
    directory = os.path.dirname(name) or "."
    return "" if os.path.isdir(directory) else f"mkdir -p -m 700 {shlex.quote(directory)} && "


def load_key(name: str) -> Any:
    """The private key in a file, None without a name.

    Raises Fatal: later it would look like a lost connection.
    """
    import paramiko

    if not name:
        return None
    try:
        try:
            return paramiko.PKey.from_path(name)
        except paramiko.SSHException:
            return convert_key(name)
    except (paramiko.PasswordRequiredException, TypeError):  # TypeError is of cryptography
        away = f"take it away: ssh-keygen -p -N '' -f {shlex.quote(name)}"
        away += ", or use ssh-agent and no --key"
        why = f"it has a passphrase; {RENEW if in_pod() else away}"
    except FileNotFoundError:
        why = f"there is no such file; {how_to_make_key(name)}"
    except OSError as error:
        give = f"give a file that user {os.geteuid()}, who runs epok, may read"
        why = f"{error.strerror}; {'take fsGroup from cron/cronjob.yaml' if in_pod() else give}"
    except Exception as error:  # what its parsers raise is not documented
        why = how_to_convert(name, error)
    raise Fatal(f"--key {name}: {why}")


def convert_key(name: str) -> Any:
    """A private key that paramiko cannot read: in PKCS#8, or OpenSSH's without a comment."""
    import paramiko
    from cryptography.hazmat.primitives import serialization as form

    with open(name, "rb") as file:
        data = file.read()
    key: Any
    try:
        key = form.load_ssh_private_key(data, None)
    except ValueError:
        key = form.load_pem_private_key(data, None)
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    made: Any = paramiko.RSAKey if public.startswith(b"ssh-rsa ") else paramiko.ECDSAKey
    written = form.PrivateFormat.TraditionalOpenSSL
    if public.startswith(b"ssh-ed25519 "):
        made, written = paramiko.Ed25519Key, form.PrivateFormat.OpenSSH
    text = key.private_bytes(form.Encoding.PEM, written, form.NoEncryption()).decode()
    return made.from_private_key(io.StringIO(text))


def how_to_convert(name: str, error: Exception) -> str:
    """What is in a file that is no private key for epok, and the command that makes one of it."""
    if in_pod():
        return f"{one_line(error)}; {RENEW}"
    with open(name, "rb") as file:
        head = file.read(300)
    old, new = shlex.quote(name), shlex.quote(name + ".openssh")
    for begin, command in (
        (b"PuTTY-User-Key-File", f"puttygen {old} -O private-openssh -o {new}"),
        (b"---- BEGIN SSH2", f"(umask 077; ssh-keygen -i -f {old} >{new})"),
        (b"0", f"openssl pkey -inform DER -in {old} -out {new}"),
    ):
        if head.startswith(begin):
            return f"it is not of OpenSSH's form; to convert it: {command}, and give --key {new}"
    if re.match(rb"(ssh|ecdsa|sk)-[\w@.-]+ AAAA", head):
        return "it is a public key; give the private one, which is mostly the file without .pub"
    make = how_to_make_key(name + ".new")
    return f"{one_line(error)}; give a private key that ssh-keygen made; {make}"


class KnownKey(NamedTuple):
    """A line of known_hosts: where it stands, its mark (@revoked), its names, and its key."""

    file: str
    number: int
    mark: str
    names: str
    key: Any


def known_keys(files: Iterable[str], name: str) -> list[KnownKey]:
    """The lines that name the host, as ssh reads them; what is none, or has no key, is skipped."""
    import paramiko

    found = []
    for file in files:
        try:
            with open(file, encoding="latin-1", newline="\n") as opened:
                lines = opened.read().split("\n")
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("%s: %s; so epok knows none of the hosts in it", file, error.strerror)
            continue
        for number, line in enumerate(lines, 1):
            words = re.split("[ \t]+", line.partition("\0")[0].strip(" \t"))
            mark = words.pop(0) if words[0] in ("@cert-authority", "@revoked") else ""
            if len(words) < 3 or not is_named(name, words[0]):
                continue
            kind, text = words[1], words[2].rstrip("\r")
            with contextlib.suppress(Exception):  # what its parsers raise is not documented
                key = paramiko.PKey.from_type_string(kind, base64.b64decode(text))
                kinds = (key.get_name(), "rsa-sha2-256", "rsa-sha2-512")
                if key.get_base64() == text and kind in kinds:
                    found.append(KnownKey(file, number, mark, words[0], key))
    return found


def is_named(name: str, names: str) -> bool:
    """Whether that field of known_hosts means the host: a hash, or patterns, of which no ! fits."""
    import paramiko

    if names.startswith("|"):
        with contextlib.suppress(AssertionError, ValueError):  # it is no hash
            return bool(paramiko.HostKeys.hash_host(name, names) == names)
        return False
    patterns = names.lower().replace("[", "[[]").split(",")  # brackets are those of [host]:port
    fitting = [each for each in patterns if fnmatch.fnmatchcase(name, each.removeprefix("!"))]
    return bool(fitting) and not any(pattern.startswith("!") for pattern in fitting)


class HostKeyCheck:
    """Decides, as ssh does or by --host-key, whether a host key is right; a policy for paramiko."""

    class Refused(Exception):
        """The server has another key than those that are accepted."""

    def __init__(self, login: Login, options: Options) -> None:
        self.login, self.pins = login, options.host_key
        system = [os.path.expanduser("~/.ssh/known_hosts"), "/etc/ssh/ssh_known_hosts"]
        self.files = [options.known_hosts] if options.known_hosts else system
        host = login.host.lower()
        self.name = host if login.port == 22 else f"[{host}]:{login.port}"
        self.seen: list[Any] = []
        # where no line has the name with the port, that without it counts too
        names = [] if self.pins else dict.fromkeys([self.name, host])
        self.known = [known_keys(self.files, name) for name in names]

    def attempts(self) -> list[Sequence[str]]:
        """The algorithms of host keys to ask for, one list a connection, the best first."""
        flat = list(itertools.chain(*HOST_KEY_TYPES))
        if self.pins and "any" not in self.pins:
            kinds = {pin.split()[0].replace("ssh-rsa", "rsa-sha2-512") for pin in self.pins}
            # a fingerprint does not say of what kind its key is
            every = any(kind.startswith("SHA256:") for kind in kinds)
            return [some for some in HOST_KEY_TYPES if every or kinds.intersection(some)] or [flat]
        kinds = {line.key.get_name() for lines in self.known[:1] for line in lines if not line.mark}
        if "ssh-ed25519" in kinds:  # the best is known, so ssh leaves the order as it is
            return [flat]
        return [sorted(flat, key=lambda name: re.sub("rsa-sha2-.*", "ssh-rsa", name) not in kinds)]

    def verdict(self, key: Any) -> tuple[str, KnownKey | None]:
        """What known_hosts says of a key, and the line that says it."""
        for lines in self.known:
            equal = [line for line in lines if line.key.get_base64() == key.get_base64()]
            for mark, verdict in (("@revoked", "revoked"), ("", "known")):
                if line := next((line for line in equal if line.mark == mark), None):
                    return verdict, line
            if line := next((line for line in lines if not line.mark), None):
                return "changed", line
        lines = [line for lines in self.known for line in lines if line.mark == "@cert-authority"]
        return "unknown", lines[0] if lines else None

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        """paramiko calls this for each connection, since it was given no keys to know."""
        self.seen.append(key)
        if "any" in self.pins:
            what = f"its host key is not checked (--host-key any); pin {key.fingerprint}"
            log.warning("%s: %s", self.login, what)
        elif self.pins:
            pinned = {pin.split()[:2][-1].rstrip("=") for pin in self.pins}
            if not {key.get_base64().rstrip("="), key.fingerprint} & pinned:
                raise self.Refused
        elif self.verdict(key)[0] != "known":
            raise self.Refused

    def advice(self) -> str:
        """What is wrong with the host's key, and the line that would accept it."""
        if not self.seen:
            return f"{self.login}: it has no host key of the kind of --host-key; check that"
        key, file = self.seen[0], self.files[0]
        what = f"{self.login}: its host key {key.get_name()} {key.fingerprint}"
        kind = next((kind for kind in ("ed25519", "ecdsa", "rsa") if kind in key.get_name()), "*")
        compare = f"on the host: ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub"
        between = "somebody may be in between; only if the host was reinstalled and has this key"
        between += f" ({compare})"
        if self.pins:
            new = f'--host-key "{key.get_name()} {key.get_base64()}"'
            return f"{what} is not the one of --host-key: {between}, give {new}"
        verdict, line = self.verdict(key)
        if line and verdict == "revoked":
            return f"{what} is marked @revoked in {line.file}; connect to no such host"
        # the blank does no harm, and who looks for the line finds its first word alone
        add = f"{into_directory(file)}echo ' {self.name} {key.get_name()} {key.get_base64()}'"
        add += f" >>{shlex.quote(file)}"
        if line and verdict == "changed":
            what += f" is not the one in {line.file}, line {line.number}: {between}"
            # a pattern is for other hosts too, and the system's file for other users
            if line.file == file and not re.search("[*?]", line.names):
                add = f"ssh-keygen -R {shlex.quote(self.name)} -f {shlex.quote(file)} && {add}"
            return f"{what}, {RENEW if in_pod() else f'run: {add}'}"
        what += f" is unknown to {file}" if line is None else f" is not in {line.file}"
        if line:
            what += ", and epok cannot check a certificate by its @cert-authority"
        check = f"compare it with that {compare}, and if it is the same, run: {add}"
        return f"{what}; {RENEW if in_pod() else check}"


Host = LocalHost | SshHost


class Facts(NamedTuple):
    """Interfaces of a host with their addresses, and by IP version whether it forwards packets.

    They are not all `whole` where its ip is BusyBox's. `login_port` is where its SSH server has
    epok's connection, which a router may have brought there from another port; 0 is not known.
    """

    interfaces: Mapping[str, Sequence[Address]]
    forwarding: Mapping[int, bool]
    login_port: int = 0
    whole: bool = True

    @property
    def addresses(self) -> list[Address]:
        return [address for addresses in self.interfaces.values() for address in addresses]

    @property
    def evidence(self) -> set[Address]:
        """The addresses that tell which machine it is, since hardly another one has them."""
        rare = [name for name in self.interfaces if not COMMON.fullmatch(name)]
        return {address for name in rare for address in self.interfaces[name]}


# bridges of Docker, libvirt, podman, LXC and Kubernetes' network plugins
COMMON = re.compile("docker0|docker_gwbridge|br-[0-9a-f]{12}|(virbr|cni|podman|cni-podman|lxcbr)0")


def read_facts(host: Host, deadline: Deadline) -> Facts:
    links = host.run(Command.ADDRESSES.argv(host.sudo), "", deadline)
    words = [line.split() for line in links.out.splitlines()]
    if links.status != 0:
        why = "it is BusyBox's" if "BusyBox" in links.err else links.said
        what = "epok cannot tell all interfaces and addresses of the host, and whether it is a node"
        cure = "apt-get install iproute2 (OpenWrt: ip-full)"
        log.warning("%s: ip -br addr: %s; so %s: %s", host.name, why, what, cure)
        local = host.run(Command.LOCAL.argv(host.sudo), "", deadline).out
        # lines begin as "local 192.0.2.1 dev eth0"
        words = [[line[3], "", line[1]] for line in map(str.split, local.splitlines()) if line[3:]]
    interfaces: dict[str, list[Address]] = {}
    for name, _, *rest in (line for line in words if line[1:]):
        # of a point-to-point link, "ADDRESS peer ADDRESS", the second is somebody else's
        own = [text for before, text in itertools.pairwise(["", *rest]) if before != "peer"]
        addresses = [usable(text.split("/")[0]) for text in own]
        interfaces.setdefault(name.split("@")[0], []).extend(filter(None, addresses))
    values = host.run(Command.FORWARDING.argv(host.sudo), "", deadline).out.split()
    forwarding = {version: value != "0" for version, value in zip((4, 6), values, strict=False)}
    return Facts(interfaces, forwarding, login_port(host, deadline), links.status == 0)


def login_port(host: Host, deadline: Deadline) -> int:
    """The port of a host that epok has logged in by, as the host itself sees it; 0 if unknown."""
    if isinstance(host, LocalHost) or host.options.clean:
        return 0
    result = host.run(Command.CONNECTION.argv(host.sudo), "", deadline)
    # last, as a shell may say something first
    if ports := re.findall(r"(?m)^\S+ [0-9]+ \S+ ([0-9]{1,5})$", result.out):
        return int(ports[-1])
    what = f"{host.name}: {Command.CONNECTION.value}: {result.said}; so epok keeps for itself only"
    what += f" port {host.login.port}, and not the one that a router may have brought it to"
    if result.status == 127:  # as with some BusyBox, and nobody can mend that
        log.info("%s", what)
    else:
        log.warning("%s%s", what, ANOTHER_GATE)
    return 0


def read_all_tables(host: Host, deadline: Deadline, counted: bool = False) -> Found:
    """epok's part of a host's rules, by IP version. Raises Fatal."""
    found: dict[int, Tables | None] = {}
    # elsewhere an older gate, or sudoers, may refuse what reads all at once, in each run
    fast = isinstance(host, LocalHost) and not (host.sudo or counted)
    for each in FAMILIES:
        tables = persist(deadline, read_at_once, host, each, deadline) if fast else None
        found[each.version] = tables or read_tables(host, each, [*BUILT_IN], deadline, counted)
    return found


def read_tables(
    host: Host,
    family: Family,
    names: Sequence[str],
    deadline: Deadline,
    counted: bool = False,
    own: bool = False,
) -> Tables | None:
    """epok's part of some tables, None when the host has no such IP version. Raises Fatal.

    With `own` the rules of others are left out.
    """
    meter = Meter(f"{host.name}: {family.tool}-save", RULES_LIMIT, RULES_LINES)
    reading = [
        Background(persist, deadline, read_table, host, family, name, meter, deadline, counted, own)
        for name in names
    ]
    doing = f"{host.name}: reading its rules"
    tables = [thread.result(deadline, doing, 0.5) for thread in reading]
    return None if None in tables else dict(zip(names, tables, strict=True))


def read_at_once(host: Host, family: Family, deadline: Deadline) -> Tables | None:
    """epok's part of all tables by one command, since nft's iptables-save gets all to print one.

    None where that does not tell all. Raises Transient, Fatal.
    """
    meter = Meter(f"{host.name}: {family.tool}-save", RULES_LIMIT, RULES_LINES)
    saved: dict[str, Saved] = {}

    def take(pieces: Iterable[bytes]) -> str:
        saved.update(saved_by_table(pieces, meter))
        return ""

    try:
        result = host.run(Command.SAVE_ALL.argv(host.sudo, family.tool), "", deadline, take)
    except Fatal:
        if meter.exceeded:  # perhaps by tables that are not epok's
            return None
        raise
    head = saved.pop("", Saved(""))
    complaint = result.status != 0 or head.broken or "incompatible" in result.err
    if complaint or not (saved.keys() >= BUILT_IN.keys() and all(t.whole for t in saved.values())):
        log.debug("%s: %s-save does not tell all at once", host.name, family.tool)
        return None
    tables = {name: saved[name].table for name in BUILT_IN}
    for table in tables.values():
        table.origin, table.beside = head.table.origin, "legacy tables present" in result.err
    around = {name: each.others for name, each in saved.items() if name not in tables}
    tables["filter"].neighbours = around
    return tables


def saved_by_table(
    pieces: Iterable[bytes], meter: Meter, known: Container[str] = ()
) -> dict[str, Saved]:
    """All tables that iptables-save prints, and as "" what is before the first.

    Those that are known are not read, but for what says that nft cannot print all.
    """
    name, saved = "", dict[str, Saved]()

    def table(line: str) -> str:
        nonlocal name
        if line.startswith("*"):
            name = line[1:]
        return name

    for each, lines in itertools.groupby(lines_of(meter.passing(pieces)), table):
        wanted = tells_of_more if each in known else None  # or all that are not empty
        saved.setdefault(each, Saved(each, meter)).read(filter(wanted, lines))
    return saved


def read_table(
    host: Host,
    family: Family,
    name: str,
    meter: Meter,
    deadline: Deadline,
    counted: bool = False,
    own: bool = False,
) -> Table | None:
    """epok's part of a table, None when the host lacks the IP version. Raises Transient, Fatal."""
    argv = asked = Command.SAVE.argv(host.sudo, family.tool, name)
    if counted and name == "nat":
        asked = Command.COUNTS.argv(host.sudo, family.tool)
    saved = Saved(name, meter, own)
    result = host.run(asked, "", deadline, saved.take)
    if asked != argv and result.status not in (0, 127):  # of an older gate, or sudoers
        log.debug("%s: %s: %s; so there are no counts", host.name, shlex.join(asked), result.said)
        return read_table(host, family, name, meter, deadline, own=own)
    lacking = r"command not found|Address family not supported|Table does not exist"
    if family.version == 6 and (
        result.status == 127 or (result.status != 0 and re.search(lacking, result.err))
    ):
        return None
    table = saved.whole if result.status == 0 else None
    if table is None or "incompatible" in result.err:
        raise refusal(host, argv, result)
    table.beside = "legacy tables present" in result.err
    return table


class Failure(NamedTuple):
    """A command that failed on a host, and what it said."""

    host: Host
    argv: Sequence[str]
    err: str


def how_to_have_sudo(failure: Failure) -> str:
    or_root = f", or {how_to_be_root('su -c')}" if isinstance(failure.host, LocalHost) else ""
    return f"; install it on the host: apt-get install sudo{or_root}"


def how_to_allow_sudo(failure: Failure) -> str:
    """What lets a user run by sudo what epok needs, and no more where the gate stands."""
    host, argv, err = failure
    visudo = "as root on the host run visudo -f /etc/sudoers.d/epok and add: "
    tools = [family.tool for family in FAMILIES]
    every = [argv[2:]]
    every += [Command.SAVE.argv((), tool, table) for tool in tools for table in ("nat", "filter")]
    every += [Command.RESTORE.argv((), tool) for tool in tools]
    paths = ", ".join(f"/usr/sbin/{words}" for words in dict.fromkeys(map(shlex.join, every)))
    line = f"{visudo}{host.user} ALL=(root) NOPASSWD: {paths}"
    if isinstance(host, LocalHost):
        return f"; {how_to_be_root('sudo -E')}; or {line}"
    if host.gated or host.user == "epok":
        return f"; {AGAIN}"
    if "must have a tty" in err:
        return f"; {visudo}Defaults:{host.user} !requiretty"
    return f"; {GATE}; or, if who has the key may change all of the firewall, {line}"


def how_to_be_able(failure: Failure) -> str:
    if isinstance(failure.host, LocalHost) and not failure.host.sudo and os.geteuid() != 0:
        return f"; {how_to_be_root('sudo -E')}"
    gets = "a container gets by --cap-add NET_ADMIN --network host"
    return f"; root lacks CAP_NET_ADMIN there, which {gets}"


def how_to_be_root(by: str) -> str:
    """How to do without sudo -n: by a command that takes epok's words."""
    words = shlex.join([sys.executable, *sys.argv])
    return f"run epok as root: {by} {shlex.quote(words) if by == 'su -c' else words}"


def named_line(err: str, text: str) -> str:
    number, lines = re.search(r"line:? (\d+)", err), text.splitlines()
    if number and 0 < int(number[1]) <= len(lines):
        return f": {quoted(lines[int(number[1]) - 1])}"
    return ""


ANOTHER_GATE = "; run cron/setup-host of this epok on the host, with --mark if epok has that option"
# What a failure means, by its exit status, the command's first word and what it says: the first
# that fits counts. Then how often that is tried at most, 0 where it will not change; and what to
# do, which ends the message: LINE stands for the line of the input that iptables names.
FAILURES: tuple[tuple[str, int, str | Callable[[Failure], str]], ...] = (
    # also seen while another process made the tables of a host that had none
    ("incompatible", 3, "; native nft rules share the table: move them to a table of their own"),
    (r"\bsudo: (command )?not found", 0, how_to_have_sudo),
    ("^127 |command not found", 0, "; install it on the host: apt-get install iptables"),
    ("epok-gate: ", 0, ANOTHER_GATE),
    ("^[0-9-]+ sudo (?s:.*)(sudo:|not allowed)", 0, how_to_allow_sudo),
    ("must be root|Permission denied|not permitted", 0, how_to_be_able),
    ("temporarily unavailable|xtables lock|^-", 1000, ""),
    ("^2 ", 0, "LINE; this is a defect of epok or an iptables that is too old"),
    # a race with another writer, which goes away, or something that the kernel refuses, which stays
    ("", RACES, "LINE"),
)


def refusal(host: Host, argv: Sequence[str], result: Result, text: str = "") -> Exception:
    """What a failed command of the iptables family means: Fatal with what to do, or Transient."""
    # which sudo only remarks, of a host that does not know its own name
    result = result._replace(err=re.sub(r"(?m)^sudo: unable to resolve host .*\n?", "", result.err))
    said = f"{result.status} {argv[0]} {result.err}"
    if "incompatible" in result.out:
        said += "incompatible"
    _, tries, advice = next(row for row in FAILURES if re.search(row[0], said))
    if isinstance(advice, str):
        advice = advice.replace("LINE", named_line(result.err, text))
    else:
        advice = advice(Failure(host, argv, result.err))
    message = f"{host.name}: {shlex.join(argv)}: {result.said}{advice}"
    return Transient(message, attempts=tries) if tries else Fatal(message)


# ------------------------------------------------ swap: makes a host right, and proves it


Input = tuple[tuple[str, ...], str]  # a command of Command.RESTORE, without sudo, and its input


def next_inputs(wanted: Wanted, found: Found, options: Options) -> Iterator[Input]:
    """What makes the tables that were found the wanted ones; each made when it is asked for."""
    limit = min(options.batch_size, INPUT_BYTES) if options.batch_commands == "true" else 0
    for family in FAMILIES:
        if tables := found[family.version]:
            for text in restore_inputs(wanted[family.version], tables, limit):
                yield Command.RESTORE.argv((), family.tool), text


def converge(
    host: Host, wanted: Wanted, found: Found, options: Options, deadline: Deadline
) -> list[int]:
    """Makes the host's tables the wanted ones and proves it by reading again what it changed.

    Returns how many lines each input had that it sent.
    """
    sent: list[int] = []  # all that may have worked, also when its answer was lost
    done: list[str] = []  # the commands that did
    known: Found | None = found

    def attempt() -> None:
        nonlocal known
        # after a failure the host is read first: a command that was cut off may have worked
        current, known = known or read_all_tables(host, deadline), None
        changed = set()
        for argv, text in next_inputs(wanted, current, options):
            sent.append(text.count("\n"))
            result = host.run((*host.sudo, *argv), text, deadline)
            if result.status != 0:
                raise refusal(host, (*host.sudo, *argv), result, text)
            done.append(argv[0])
            changed |= {(argv[0], name) for name in BUILT_IN if f"*{name}\n" in text}
        if not changed:
            return
        after = read_changed(host, current, changed, deadline)
        if left := next(next_inputs(wanted, after, options), None):
            example = quoted(left[1].splitlines()[1])
            raise Transient(
                f"{host.name}: the rules differ again after the swap, at {example}", attempts=RACES
            )

    try:
        persist(deadline, attempt)
    except Fatal as error:
        if done:
            took = f"{len(done)} {plural(len(done), 'input')} of {', '.join(dict.fromkeys(done))}"
            raise Fatal(f"{error}; before that {took} took effect") from None
        raise
    return sent


def read_changed(
    host: Host, before: Found, changed: Set[tuple[str, str]], deadline: Deadline
) -> Found:
    """The tables that were found, but for those to which something was sent: they are read again.

    What somebody else has done to another one since then is for the next run to see.
    """
    after = dict(before)
    for family in FAMILIES:
        names = [name for name in BUILT_IN if (f"{family.tool}-restore", name) in changed]
        tables, again = before[family.version], read_tables(host, family, names, deadline, own=True)
        after[family.version] = None if tables is None or again is None else {**tables, **again}
    return after


# The first dst and dport are where a client sends to, the last src and sport who answers. epok-gate
# leaves out most of the rest; not every kernel has a mark.
FLOW = re.compile(
    r"\bdst=(\S+) .*?\bdport=(\d+) .*\bsrc=(\S+) .*?\bsport=(\d+)(?:.* mark=(\d+))?", re.ASCII
)
Flow = tuple[Address, int, Address]  # what a client sends to, address and port, and who answers


def udp_routes(routes: Iterable[Route]) -> dict[int, list[Route]]:
    """Those of UDP, by external port."""
    found: dict[int, list[Route]] = {}
    for route in routes:
        for port in range(route.first, route.last + 1) if route.protocol == "udp" else ():
            found.setdefault(port, []).append(route)
    return found


def ends_of(routes: Iterable[Route], port: int, version: int) -> list[Target]:
    """Where a port leads to."""
    pairs = ((target, route.first) for route in routes for target in route.targets)
    some = ((target, first) for target, first in pairs if target.address.version == version)
    return [Target(target.address, target.port + port - first) for target, first in some]


def stale_flows(
    lines: Iterable[str],
    had: Mapping[int, Sequence[Route]],
    has: Mapping[int, Sequence[Route]],
    facts: Facts,
    options: Options,
) -> Set[Flow]:
    """Which flows do not go where new ones do, by the routes that were and that are."""
    own = {str(address): address for address in facts.addresses}  # never of 127.0.0.0/8

    @functools.lru_cache(1 << 16)  # many are alike
    def read(to: str, port: str, source: str, number: str, mark: str) -> Flow | None:
        address, asked, reply = own[to], int(port), to_address(source)
        before, after = (
            ends_of(each.get(asked, ()), asked, address.version) for each in (had, has)
        )
        end = reply and Target(reply, int(number))
        if int(mark) & options.mark.forwarded or end in before:
            stale = end not in after
        else:  # the host itself answered, before the port was forwarded
            stale = bool(after) and end == Target(address, asked) and options.covers(address)
        return (address, asked, reply) if reply and stale else None

    found: set[Flow] = set()
    for match in filter(None, map(FLOW.search, lines)):
        flow = read(*match.groups("0")) if match[1] in own else None
        if flow and len(found) < MAX_FLOWS:
            found.add(flow)
    return found


def end_stale_flows(
    host: Host,
    forwards: Iterable[Route],
    changes: Iterable[Change],
    facts: Facts,
    options: Options,
    deadline: Deadline,
) -> None:
    """Lets UDP clients go the new way that keep their port, and so that of their first packet.

    All flows are looked at: the last run may have been killed between its swap and this.
    """
    had = udp_routes(change.before or change.live for change in changes if change.sign != "+")
    has, stale = udp_routes(forwards), set[Flow]()

    def take(pieces: Iterable[bytes]) -> str:
        passing = Meter(f"{host.name}: its UDP flows", 1 << 26, 1 << 20).passing(pieces)
        stale.update(stale_flows(lines_of(passing), had, has, facts, options))
        return ""

    routes = itertools.chain(*had.values(), *has.values())
    targets = {target.address.version for route in routes for target in route.targets}
    for version in sorted(targets & {own.version for own in facts.addresses}):
        listing = Command.FLOWS.of(version)
        if not track(host, listing.argv(host.sudo), deadline, take):
            return
    for flow in sorted(stale, key=str):
        ending = Command.END_FLOWS.of(flow[0].version)
        if not track(host, ending.argv(host.sudo, *flow), deadline):
            return


def track(host: Host, argv: Sequence[str], deadline: Deadline, take: Take | None = None) -> bool:
    """Runs conntrack; False, with a warning, when it cannot."""
    result = host.run(argv, "", deadline, take)
    none = result.status == 1 and "0 flow entries have been deleted" in result.err
    if result.status == 0 or none:
        return True
    cure = "apt-get install conntrack" if result.status == 127 else AGAIN
    told = f"{host.name}: {shlex.join(argv)}: {result.said}"
    log.warning("%s; old UDP flows may stay where they were: %s", told, cure)
    return False


# ------------------------------------------------ news: what a run did: log, Events, metrics


@contextlib.contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Notes how long a step takes."""
    began = time.monotonic()
    yield
    seconds[step] = time.monotonic() - began


@contextlib.contextmanager
def as_warning(then: str) -> Iterator[None]:
    """What fails within is a warning, for the host is right without it."""
    try:
        yield
    except Fatal as error:
        log.warning("%s%s", error, then)


def rendered(plan: Plan, options: Options) -> Wanted:
    return {family.version: render(plan.forwards, family, options) for family in FAMILIES}


class Publication(NamedTuple):
    """What the status of a Service says, and what it is to say."""

    service: Service
    before: list[Ingress]
    after: list[Ingress]

    @property
    def line(self) -> str:
        return f"{self.service.key}: EXTERNAL-IP {ips(self.after)}"

    def document(self) -> dict[str, Any]:
        before, after = (msgspec.to_builtins(each) for each in (self.before, self.after))
        return {"service": self.service.key, "before": before, "after": after}


def ips(ingress: Iterable[Ingress]) -> str:
    return ", ".join(map(str, ingress)) or "none"


class Publisher:
    """Tells in the status of Services of epok's class what the hosts forward that are right."""

    def __init__(
        self, options: Options, source: SnapshotFile | Cluster, services: Iterable[Service]
    ) -> None:
        self.options, self.source = options, source
        self.services = {service.key: service for service in services if service.balanced}
        self.right: list[tuple[Facts, Plan, dict[str, list[Forward]]]] = []
        self.lock = threading.Lock()
        self.failed = False

    @property
    def all_right(self) -> bool:
        return len(self.right) == max(1, len(self.options.host))

    def names(self, facts: Facts, service: Service) -> list[str]:
        """What the world calls a host, of the names that are to be published."""
        options = self.options
        if options.publish != ("auto",):
            own = {*map(str, facts.addresses)}
            others = {str(address) for host, *_ in self.right for address in host.addresses}
            # what is no host's own, like a router's address, is everybody's
            any_host = self.all_right or own.isdisjoint(options.publish)
            return [n for n in options.publish if n in own or (any_host and n not in others)]
        internal = not service.annotations.keys().isdisjoint(INTERNAL_ANNOTATIONS)
        closed = options.external_interface * internal
        return [
            str(address)
            for interface, addresses in facts.interfaces.items()
            if options.takes_from(interface) and not (closed and like(closed, interface))
            for address in addresses
            if options.covers(address)
        ]

    def add(self, facts: Facts, plan: Plan) -> list[Publication]:
        """What is to be written now that one more host is right, which forwards what is planned."""
        if not self.services or (self.options.publish == ("auto",) and not facts.interfaces):
            return []  # a host that does not tell its addresses keeps what was written
        self.right.append((facts, plan, grouped(plan.forwards)))
        news: list[Publication] = []
        named: set[str] = set()
        for service in self.services.values():
            before = service.balanced.ingress if service.balanced else []
            its: dict[str, Ingress] = {}
            names: set[str] = set()
            for host, planned, forwards in self.right:
                own = self.names(host, service)
                names.update(own)
                for entry in ingress_of(service, forwards.get(service.key, ()), planned, own):
                    other = its.setdefault(entry.name, entry)
                    for one, two in zip(other.ports, entry.ports, strict=True):
                        one.error = one.error or two.error
            if not self.all_right:  # a host that failed keeps what was written
                its |= {each.name: each for each in before if each.name not in names}
            after = sorted(its.values(), key=self.order)
            named |= names
            if after != before:
                news.append(Publication(service, before, after))
        if self.options.publish and not named:
            where = f"-i {','.join(self.options.interfaces)}"
            log.warning("--publish auto: no global address on %s; give the addresses", where)
        return news

    def order(self, entry: Ingress) -> tuple[int, bool, str]:
        """The same whichever host was right first."""
        given = self.options.publish
        place = given.index(entry.name) if entry.name in given else len(given)
        return place, ":" in entry.name, entry.name

    def publish(self, facts: Facts, plan: Plan, deadline: Deadline) -> list[Publication]:
        """Writes what differs, and returns it; in a --dry-run only that. Raises Fatal."""
        seconds = min(STATUS_SECONDS, deadline.remaining() / 2)
        deadline = Deadline(seconds, "the time for the status of Services,")
        with self.lock:
            news = self.add(facts, plan)
            if not news or self.options.dry_run or self.failed:
                return news
            self.failed = True
            if not isinstance(self.source, Cluster):
                raise Fatal(f"{self.source.name} is a file; no new EXTERNAL-IP was written")
            tasks = [(each.service.key, self.write, each) for each in news]
            writing = Background(self.source.write_all, "new EXTERNAL-IP", tasks, deadline)
            writing.result(deadline, f"{self.source.name}: writing the status of Services")
            self.failed = False
            return news

    def write(self, publication: Publication, deadline: Deadline) -> None:
        service, _, ingress = publication
        assert isinstance(self.source, Cluster)
        if now := self.source.publish(service, ingress, deadline):
            # its ports, and what it asks for, stay those that were planned
            was = self.services[now.key]
            self.services[now.key] = dataclasses.replace(was, balanced=now.balanced)
            log.info("%s", publication.line)


def cluster_to_clean(options: Options, deadline: Deadline) -> Publisher:
    """What --clean takes out of the status of Services. Raises Fatal."""
    reader = Reader(options, deadline)
    return Publisher(options, reader.source, reader.once_each(SERVICES, "key"))


def grouped(forwards: Iterable[Forward]) -> dict[str, list[Forward]]:
    """Forwards by Service."""
    by_service: dict[str, list[Forward]] = {}
    for forward in forwards:
        by_service.setdefault(forward.service, []).append(forward)
    return by_service


def in_turn(remarks: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """One of each namespace, then another of each, and so on: none keeps the others from a hearing.

    `name` begins with it.
    """
    turns: dict[str, int] = {}

    def turn(remark: T) -> int:
        namespace = name(remark).partition("/")[0]
        turns[namespace] = turns.get(namespace, 0) + 1
        return turns[namespace]

    return sorted(remarks, key=turn)


class Planner:
    """Makes the tables for each host from one snapshot; one that is itself a node has others."""

    def __init__(self, options: Options, deadline: Deadline) -> None:
        self.options = options
        self.seconds: dict[str, float] = {}
        with timed(self.seconds, "cluster"):
            self.reader = Reader(options, deadline)
            self.snapshot = self.reader.snapshot(options.explain)
        self.publisher: Publisher | None = None
        if options.publish:
            self.publisher = Publisher(options, self.reader.source, self.snapshot.services)
        self.plans: dict[tuple[Set[str], int], Plan] = {}
        self.rulesets: dict[tuple[Set[str], int], Wanted] = {}
        self.announced: set[str] = set()
        self.untold: dict[Event, None] = {}
        self.lock = threading.Lock()

    def own(self, facts: Facts) -> Mapping[str, Address]:
        """The nodes that a host itself is, by name, and its addresses that tell so."""
        pairs = ((node.name, ip) for node in self.snapshot.nodes for ip in reversed(node.addresses))
        evidence = facts.evidence
        return {name: ip for name, ip in pairs if ip in evidence}

    def taken(self, facts: Facts) -> str:
        """What the host is taken for, if it is a node."""
        names = enumerated(f"{name} ({ip})" for name, ip in self.own(facts).items())
        return f"the host is taken for node {names}, so forwards go to pods" if names else ""

    def key(self, facts: Facts) -> tuple[Set[str], int]:
        """What hosts that get the same have alike: the nodes that they are, and a port to keep."""
        dialed = {login.port for login in self.options.host}
        port = 0 if facts.login_port in dialed else facts.login_port
        return frozenset(self.own(facts)), port

    def plan(self, facts: Facts) -> Plan:
        """What shall be forwarded. Raises Fatal."""
        key, explain = self.key(facts), self.options.explain
        with self.lock:
            if key not in self.plans:
                with timed(self.seconds, "plan"):
                    self.snapshot = self.reader.with_endpoints(self.snapshot, bool(key[0]), explain)
                    self.plans[key] = make_plan(self.snapshot, self.options, *key)
                if not self.options.looks:
                    self.announce(self.plans[key])
            return self.plans[key]

    def wanted(self, facts: Facts) -> Wanted:
        """The rules for it. Raises Fatal."""
        plan, key = self.plan(facts), self.key(facts)
        with self.lock:
            if key not in self.rulesets:
                with timed(self.seconds, "ruleset"):
                    self.rulesets[key] = rendered(plan, self.options)
            return self.rulesets[key]

    def announce(self, plan: Plan) -> None:
        """Logs what is wrong in the cluster, and keeps it for Events; what has been said, once."""
        lines = [*plan.warnings, *map(str, plan.unknown)]
        lines += [f"rejected: {rejection}" for rejection in plan.rejections]
        lines = [line for line in lines if line not in self.announced]
        self.announced.update(lines)
        some = lines
        if len(lines) > MAX_LINES:
            some = in_turn(lines, lambda line: line.removeprefix("rejected: "))[:MAX_LINES]
        for line in some:
            log.warning("%s", line)
        if more := len(lines) - len(some):
            log.warning("%d more warnings like these; --status shows all of them", more)
        events = [each.event("UnknownAnnotation") for each in plan.unknown]
        events += [each.event("ExternalPortRejected") for each in plan.rejections]
        self.untold |= dict.fromkeys(events)

    def tell(self, news: Iterable[Event]) -> None:
        """Writes Events about a host, then those about rejections, which the first host takes."""
        with self.lock:
            untold, self.untold = [*self.untold], {}
        # in any order: where the time does not suffice for all, each gets its turn
        events = [*news, *random.sample(untold, len(untold))]
        events = in_turn(events, lambda event: event.service)
        source = self.reader.source
        if not events or not isinstance(source, Cluster):
            return
        seconds = min(EVENT_SECONDS, self.reader.deadline.remaining())
        deadline = Deadline(seconds, "the time for Events,")
        uids = {service.key: service.uid for service in self.snapshot.services}
        tasks = [(event.service, source.record, event, uids) for event in events]
        with as_warning(""):
            writing = Background(source.write_all, "Events", tasks, deadline)
            writing.result(deadline, f"{source.name}: writing Events")


def events_of(changes: Iterable[Change], machine: str) -> list[Event]:
    """An Event for each forward that a Service has got or lost, in one IP version or both."""
    events: dict[tuple[object, ...], Event] = {}
    for sign, live, _ in changes:
        if sign in REASONS:
            message = f"{machine}: {VERBS[sign]} {live} to {live.text}"
            event = Event(live.service, "Normal", REASONS[sign], message)
            events.setdefault((sign, *live.key), event)
    return list(events.values())


def report_swap(
    prefix: str,
    before: Found,
    wanted: Wanted,
    inputs: Sequence[int],
    changes: Sequence[Change],
    taken: str = "",
) -> None:
    """Says what a run did, and which nodes the host was taken for."""
    say, complain = (functools.partial(level, "%s%s", prefix) for level in (log.info, log.warning))
    if taken and inputs:
        say(taken)
    for change in changes:
        say(f"{VERBS[change.sign]} {change.live} to {change.text}")
    # each once, in both IP versions
    count = len({key for tables in wanted.values() for key in dispatches_in(tables)})
    total = f"{count} {plural(count, 'forward')}"
    older = 0 if wanted[4]["nat"].hooks else older_rules(before)
    if older:
        say(f"removed {older} {plural(older, 'rule')} of the older epok")
    if not inputs:
        say(f"in sync, {total}, nothing changed{taken and '; '}{taken}")
    elif not changes and not older:
        lines = sum(inputs) - 2 * len(inputs)
        say(f"rules of epok's were put right with {lines} {plural(lines, 'line')}, {total}")
    for version, name in itertools.product(wanted, BUILT_IN):
        held = (before[version] or NOTHING)[name].held - wanted[version][name].chains.keys()
        if held:
            what = f"kept these chains, empty, in table {name}: {enumerated(sorted(held))}"
            complain(f"{what}: a rule that is not epok's refers to them; delete it")
    old, new = (each["filter"].chains.get(FORWARD) for each in (before[4] or NOTHING, wanted[4]))
    if old and new and old != new:
        complain("--mark is another one now: connections that were open have lost their way")


def all_lives(tables: Found, counted: Found) -> list[Live]:
    """The forwards of both IP versions, with the counts of the rules that were there already."""
    lives: list[Live] = []
    for version, each in tables.items():
        counts = (counted[version] or NOTHING)["nat"].counts
        lives += forwards_in(each, version, counts).values() if each else []
    return sorted(lives, key=lambda live: (live.first, live.protocol, live.version, live.service))


class Shown(Protocol):
    """What is printed about a host."""

    def text(self) -> str: ...

    def document(self) -> dict[str, Any]: ...


@dataclass
class Outcome:
    """What came of one host: its exit status, what is to be printed, and what the metrics tell."""

    host: str
    status: int = 1
    shown: Shown | None = None
    lives: Sequence[Live] = ()
    changes: Sequence[Change] = ()
    seconds: dict[str, float] = field(default_factory=dict)


Sample = tuple[str, float, Mapping[str, object]]  # a metric, its value and its labels
HELP = {
    "success": "Whether the last run made the host right.",
    "last_success_timestamp_seconds": "When a run last made the host right, in seconds since 1970.",
    "forwards": "Forwards of the host.",
    "nodes": "Nodes, or pods, that the host forwards to.",
    "changes": "Forwards that the last run added, removed or changed.",
    "connections_total": "New connections through a forward since its rules were made.",
    "step_duration_seconds": "How long a step of the last run took; steps of hosts, and of the "
    "cluster, overlap.",
    "rejections": "Mappings and Services that the last run rejected.",
    "duration_seconds": "How long the last run took.",
}


def metrics_text(
    outcomes: Sequence[Outcome], planner: Planner | None, seconds: float, before: str
) -> str:
    """What the runs on all hosts did, for Prometheus; `before` is the file of the last run."""
    samples = [sample for outcome in outcomes for sample in host_samples(outcome, before)]
    if planner:
        samples += step_samples("", planner.seconds)
        rejections = {rejection for plan in planner.plans.values() for rejection in plan.rejections}
        samples.append(("rejections", sum(each.number for each in rejections), {}))
    samples.append(("duration_seconds", seconds, {}))
    metrics: dict[str, str] = {}
    for name, value, labels in samples:
        kind = "counter" if name.endswith("_total") else "gauge"
        head = f"# HELP epok_{name} {HELP[name]}\n# TYPE epok_{name} {kind}\n"
        words = ",".join(f"{key}={json.dumps(str(text))}" for key, text in labels.items())
        line = f"epok_{name}{words and f'{{{words}}}'} {value:.15g}\n"
        metrics[name] = metrics.get(name, head) + line
    return "".join(metrics.values())


def step_samples(host: str, seconds: Mapping[str, float]) -> list[Sample]:
    name = "step_duration_seconds"
    return [(name, took, {"host": host, "step": step}) for step, took in seconds.items()]


def host_samples(outcome: Outcome, before: str) -> Iterator[Sample]:
    """What a run did on one host; of one that failed when it last did not, from `before`."""
    host = {"host": outcome.host}
    success, lives = "last_success_timestamp_seconds", outcome.lives
    yield "success", int(outcome.status == 0), host
    if outcome.status:
        label = re.escape(json.dumps(outcome.host))
        if last := re.search(rf"(?m)^epok_{success}{{host={label}}} (\S+)$", before):
            yield success, float(last[1]), host
        return
    yield success, time.time(), host
    yield "forwards", len({live.key for live in lives}), host
    for version in sorted({live.version for live in lives}):
        its = [live for live in lives if live.version == version]
        nodes = {target.address for live in its for target in live.targets}
        yield "nodes", len(nodes), {**host, "ip_version": version}
    for sign, name in (("+", "added"), ("-", "removed"), ("~", "changed")):
        count = sum(change.sign == sign for change in outcome.changes)
        yield "changes", count, {**host, "change": name}
    for live in lives:
        if live.counts:
            port = {"protocol": live.protocol, "port": Range(live.first, live.last)}
            labels = {**host, "ip_version": live.version, **port, "service": live.service}
            yield "connections_total", live.counts[0], labels
    yield from step_samples(outcome.host, outcome.seconds)


def write_metrics(name: str, make: Callable[[str], str]) -> None:
    """Puts what `make` makes of the file's old text in its place, whole or not at all.

    The folder may be another user's, so all goes by descriptors. Failing is a warning.
    """
    folder, base = os.path.split(name)
    fresh = f"{base}.{os.getpid()}"  # node_exporter reads *.prom alone
    try:
        place = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            before, opener = "", functools.partial(open_regular, place)
            with contextlib.suppress(FileNotFoundError), open(base, "rb", opener=opener) as file:
                before = file.read(1 << 24).decode(errors="replace")
            with contextlib.suppress(FileNotFoundError):  # of a killed run with the same number
                os.unlink(fresh, dir_fd=place)
            with open(fresh, "x", encoding="utf-8", opener=opener) as file:
                # node_exporter is another user, and has no secrets to see here
                os.fchmod(file.fileno(), 0o644)
                file.write(make(before))
            os.replace(fresh, base, src_dir_fd=place, dst_dir_fd=place)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=place)
            os.close(place)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else one_line(error)
        log.warning("--metrics-file %s: %s; nothing else depends on it", name, why)


def open_regular(place: int, name: str, flags: int) -> int:
    """A descriptor of a regular file in a folder, which waits for nobody. Raises OSError."""
    descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=place)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return descriptor


# ------------------------------------------------ looking: what else decides on a host

Forwarding = Forward | Live


class Packet(NamedTuple):
    """The first packet of a connection, before epok forwards it (`local`) or after.

    `out` tells by which interface it leaves, or nothing; `mark` is the bit of the connection mark
    that epok has set, `tracked` whether the packet has come to where connections are tracked.
    """

    version: int
    interface: str
    out: Callable[[], str]
    protocol: str
    port: int
    address: Address
    local: bool
    mark: int = 0
    tracked: bool = True


class Option(NamedTuple):
    """What a rule asks of a packet, in the words of iptables: one of these values, or none of them.

    An empty value is one that is not understood.
    """

    name: str
    values: list[str]
    negated: bool = False

    def fits(self, packet: Packet) -> bool | None:
        """None where that cannot be told."""
        asks = HAS.get(self.name)
        answers = [asks(packet, value) if asks and value else None for value in self.values]
        if True not in answers and (None in answers or not answers):
            return None
        return (True in answers) != self.negated


def has_state(packet: Packet, value: str) -> bool:
    if not packet.tracked:
        return value == "INVALID"
    return value == "NEW" or (value == "DNAT" and not packet.local)


def has_mark(packet: Packet, value: str) -> bool | None:
    bits, _, mask = value.partition("/")
    return bits == mask if mask == f"{packet.mark:#x}" else None


def is_within(address: Address, text: str) -> bool | None:
    """Whether an address is in a network, or in a range from one to another."""
    first, _, last = text.partition("-")
    with contextlib.suppress(ValueError):
        if last:
            low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
            return int(low) <= int(address) <= int(high)
        return address in ipaddress.ip_network(text, strict=False)
    return None


def has_port(packet: Packet, ports: str) -> bool | None:
    """Whether its port is in "25", "8000:8010" or "8000-8010"."""
    match = re.fullmatch("([0-9]{1,5})(?:[:-]([0-9]{1,5}))?", ports)
    return int(match[1]) <= packet.port <= int(match[2] or match[1]) if match else None


# Whether a packet has a value that an option asks for; None where that cannot be told.
HAS: dict[str, Callable[[Packet, str], bool | None]] = {
    "-m": lambda packet, value: True,
    "-i": lambda packet, value: like(value, packet.interface),
    "-o": lambda packet, value: like(value, packet.out()),
    "-p": lambda packet, value: value in (packet.protocol, "all"),
    "-d": lambda packet, value: is_within(packet.address, value),
    "--syn": lambda packet, value: packet.protocol == "tcp" if value == "syn" else None,
    "--dst-type": lambda packet, value: value == ("LOCAL" if packet.local else "UNICAST"),
    "nfproto": lambda packet, value: value == f"ipv{packet.version}",
    "connmark --mark": has_mark,
    **dict.fromkeys(("--dport", "--dports"), has_port),
    **dict.fromkeys(("--state", "--ctstate"), has_state),
}


class Rule(NamedTuple):
    """A rule on the way of packets, and what becomes of one that it matches.

    `verdict` is accept, drop, nat (which translates it), notrack (so that nothing does), return,
    jump or goto (to `chain`), own where epok's rules decide from there on, empty for a rule that
    lets packets go on, or "?". A chain's last rule is its policy, return where it has none.
    """

    options: Sequence[Option]
    verdict: str
    chain: str
    text: str

    def matches(self, packet: Packet) -> bool | None:
        """None where that cannot be told."""
        answers = [option.fits(packet) for option in self.options]
        return False if False in answers else None if None in answers else True

    def many(self, packet: Packet) -> bool:
        """Whether all that is not known is the client, and it is for many of them."""
        sources = [option for option in self.options if option.name == "-s"]
        others = [option.fits(packet) for option in self.options if option not in sources]
        return all(others) and any(each.negated or any(map(large, each.values)) for each in sources)


def large(network: str) -> bool:
    """Whether a network is no single client or household."""
    length = network.partition("/")[2]
    return length.isdecimal() and int(length) <= (56 if ":" in network else 24)


RulesOf = Callable[[str], Sequence[Rule]]  # by chain
Decision = tuple[Rule | None, bool]
LOST = ("drop", "notrack")
FINAL = ("accept", "nat", *LOST)


class Walk:
    """A packet's way through chains.

    `decided` are those that it has met, `doubts` the rules with a verdict that `loses`, if its
    client is one of many that are meant.
    """

    def __init__(self, rules: RulesOf, packet: Packet, loses: Container[str] = LOST) -> None:
        self.rules, self.packet, self.loses = rules, packet, loses
        self.decided: dict[str, Decision] = {}
        self.doubts: list[Rule] = []

    def decision(self, chain: str) -> Decision:
        """The rule that decides about the packet, None when none does, and whether that is sure.

        Not sure is what comes after a rule that may have sent the packet another way; one that may
        drop it is taken not to.
        """
        if chain not in self.decided:
            # or chains in a circle, which the kernel refuses, had no end
            self.decided[chain] = None, False
            if len(self.decided) < 200:
                self.decided[chain] = self.walk(chain)
        return self.decided[chain]

    def walk(self, chain: str) -> Decision:
        sure = True
        for rule in self.rules(chain):
            matched = rule.matches(self.packet)
            if matched is False or not rule.verdict:
                continue
            end = rule if rule.verdict in FINAL else None
            clear = bool(end) or rule.verdict in ("return", "own")
            if rule.chain:
                end, clear = self.decision(rule.chain)
            leaves = end or rule.verdict in ("return", "goto", "own")
            if matched and leaves:
                policy = self.rules(chain)[-1]
                if rule.verdict in ("return", "goto") and policy.verdict in ("accept", "drop"):
                    end = end or policy
                return end, sure and clear
            if end and end.verdict in self.loses and rule.many(self.packet):
                self.doubts.append(end)
            sure = sure and clear and (not leaves or bool(end and end.verdict in LOST))
        return None, sure


COMMENT = re.compile(r' -m comment --comment (?:"(?:\\.|[^"\\])*"|\S+)')
VERDICTS = {
    "RETURN": "return",
    "ACCEPT": "accept",
    "NOTRACK": "notrack",
    **dict.fromkeys(("DROP", "REJECT"), "drop"),
    **dict.fromkeys(("DNAT", "REDIRECT", "NETMAP", "SNAT", "MASQUERADE"), "nat"),
}
GOING_ON = "(LOG|NFLOG|MARK|CONNMARK|TCPMSS|TRACE|TTL|HL|DSCP|CHECKSUM|CLASSIFY|CT|SET)?"


def iptables_rules(chains: Mapping[str, Sequence[str]]) -> RulesOf:
    """The rules of chains as Saved reads them."""
    return functools.cache(
        lambda chain: [iptables_rule(line, chains) for line in chains.get(chain, ())]
    )


def iptables_rule(line: str, chains: Container[str]) -> Rule:
    if line.startswith("-P "):
        return Rule((), VERDICTS.get(line.split()[-1], "return"), "", line)
    options: list[Option] = []
    words = split(COMMENT.sub("", line).replace("--tcp-flags FIN,SYN,RST,ACK SYN", "--syn syn"))
    end = next((number for number, word in enumerate(words) if word in ("-j", "-g")), len(words))
    for before, word in itertools.pairwise(words[1:end]):
        if re.match("--?[a-z]", word):
            name = f"{before} {word}" if word == "--mark" else word  # packets have one too
            options.append(Option(name, [], before == "!"))
        elif options and word != "!":
            options[-1].values.extend(word.split(","))
    jump, target = [*words[end : end + 2], "", ""][:2]
    target = "NOTRACK" if "--notrack" in words else target
    if owned(target):
        return Rule(options, "own", "", line)
    if target in chains:
        return Rule(options, "goto" if jump == "-g" else "jump", target, line)
    other = "" if re.fullmatch(GOING_ON, target) else "?"
    return Rule(options, VERDICTS.get(target, other), "", line)


PACKAGES = {"ip": "iproute2", "ss": "iproute2", "nft": "nftables"}
NFT_NAME = r"[A-Za-z_][A-Za-z0-9_.-]{0,127}"  # that the gate and sudoers let through


def at(value: Any, *path: str) -> Any:
    """What is at a path of objects within objects; None where there is nothing."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def without_inner_chains(part: dict[str, Any]) -> dict[str, Any] | None:
    """Forgets a chain that is at no hook as soon as it is read: epok makes thousands of them.

    But for EPOK, which tells where they are.
    """
    chain = part.get("chain")
    if len(part) > 1 or not isinstance(chain, dict) or chain.get("name") == ROOT:
        return part
    return part if "hook" in chain else None


class BaseChain(NamedTuple):
    """A chain of nft at a hook; those of a lower `priority` come first."""

    priority: int
    family: str
    table: str
    name: str
    policy: str
    hook: str
    type: str


def nft_rules(visit: Visit, base: BaseChain) -> RulesOf:
    """The rules of a table that iptables did not make; a chain is read when a packet meets it."""
    read: dict[str, list[Rule]] = {}

    def rules(chain: str) -> list[Rule]:
        where = f"nft table {base.family} {base.table}, chain {chain}"
        unknown = [Rule((), "?", "", where)]
        if chain not in read and len(read) < 50:
            listed = visit.nft("rule", Command.NFT_CHAIN, base.family, base.table, chain)
            read[chain] = unknown if listed is None else [nft_rule(each, where) for each in listed]
            policy = base.policy.upper() if chain == base.name else ""
            end = VERDICTS.get(policy, "return")
            read[chain].append(Rule((), end, "", f"{where}, its policy"))
        return read.get(chain, unknown)

    return rules


def nft_rule(rule: Mapping[str, Any], where: str) -> Rule:
    """Reads a rule of libnftables-json(5): what it asks of packets, and at last a verdict."""
    text = f"{where}, handle {rule.get('handle')}"
    options: list[Option] = []
    statements = rule.get("expr")
    for statement in statements if isinstance(statements, list) else ():
        one = isinstance(statement, dict) and len(statement) == 1
        [(kind, value)] = statement.items() if one else [("", None)]
        target = at(value, "target")
        if kind == "match":
            options += nft_options(value)
        elif kind in ("limit", "quota"):
            options.append(UNKNOWN)
        elif kind.upper() in VERDICTS:
            return Rule(options, VERDICTS[kind.upper()], "", text)
        elif kind in ("jump", "goto") and isinstance(target, str):
            return Rule(options, kind, target, text)
        elif kind not in ("counter", "log", "mangle", "flow", "ct helper", "ct timeout"):
            return Rule(options, "?", "", text)
    return Rule(options, "", "", text)


UNKNOWN = Option("?", [])
NFT_OPTIONS = {  # by what stands on the left of an expression
    ("meta", "key", "iif"): "-i",
    ("meta", "key", "iifname"): "-i",
    ("meta", "key", "oif"): "-o",
    ("meta", "key", "oifname"): "-o",
    ("meta", "key", "l4proto"): "-p",
    ("meta", "key", "nfproto"): "nfproto",
    ("ct", "key", "state"): "--ctstate",
    ("ct", "key", "status"): "--ctstate",
    ("fib", "result", "type"): "--dst-type",
    ("payload", "field", "protocol"): "-p",
    ("payload", "field", "nexthdr"): "-p",
    ("payload", "field", "daddr"): "-d",
    ("payload", "field", "saddr"): "-s",
    ("payload", "field", "dport"): "--dport",
    ("payload", "field", "flags"): "--syn",
}
NFT_PROTOCOLS = (*PROTOCOLS, "icmp", "icmpv6", "igmp", "esp", "ah", "comp", "udplite", "dccp")


def nft_options(expression: Any) -> list[Option]:
    """What an expression of libnftables-json(5) asks of a packet, as options of iptables."""
    left, right, op = (at(expression, key) for key in ("left", "right", "op"))
    masked = at(left, "&")
    marks = isinstance(masked, list) and [at(each, "ct", "key") for each in masked] == [
        "mark",
        None,
    ]
    if marks and op in ("==", "!=") and isinstance(masked[1], int) and isinstance(right, int):
        return [Option("connmark --mark", [f"{right:#x}/{masked[1]:#x}"], op == "!=")]
    options, layer = [], at(left, "payload", "protocol")
    if layer is None and at(left, "payload") is not None:
        return [UNKNOWN]
    # a packet has such a field only when it is of that protocol
    if layer in ("ip", "ip6"):
        options = [Option("nfproto", ["ipv4" if layer == "ip" else "ipv6"])]
    elif layer in NFT_PROTOCOLS:
        options = [Option("-p", [layer])]
    names = [name for (*path, key), name in NFT_OPTIONS.items() if at(left, *path) == key]
    # a list is bits of which one is enough, but with any other operator than "in" all of them count
    exact = isinstance(right, list) or at(left, "ct", "key") == "status"
    operators = ("in",) if exact else ("in", "==", "!=")
    if not names or op not in operators or at(left, "fib", "flags") not in (None, ["daddr"]):
        return [*options, UNKNOWN]
    values = right["set"] if isinstance(right, dict) and "set" in right else right
    values = values if isinstance(values, list) else [values]
    return [*options, Option(names[0], [nft_text(value, names[0]) for value in values], op == "!=")]


def nft_text(value: Any, name: str) -> str:
    """A value of an expression as iptables has it; empty for what it has not, like a named set."""
    element, ends = at(value, "elem", "val"), at(value, "range")
    if element is not None:
        return nft_text(element, name)
    address, length = at(value, "prefix", "addr"), at(value, "prefix", "len")
    if name in ("-d", "-s") and None not in (address, length):
        return f"{address}/{length}"
    if isinstance(ends, list) and len(ends) == 2 and name in ("-d", "--dport"):
        return f"{ends[0]}-{ends[1]}"
    if isinstance(value, int) and name == "--dport":
        return str(value)
    if isinstance(value, str) and not value.startswith("@"):
        upper = name in ("--ctstate", "--dst-type")
        return re.sub(r"\*$", "+", value.upper() if upper else value)
    return ""


class Listener(NamedTuple):
    """A port that a program of the host listens on.

    No address is all of them; 0.0.0.0 and :: are all of an IP version.
    """

    protocol: str
    address: Address | None
    port: int


def strict_interfaces(netconf: str) -> set[str]:
    """The interfaces with strict rp_filter, by what ip netconf prints."""
    modes = dict(re.findall(r"(?m)^inet (\S+) .*\brp_filter (\w+)", netconf))
    # the higher of the interface's and that of all counts, and loose is higher: ip-sysctl.rst
    of_all = modes.pop("all", None)
    both = {name: {mode, of_all} for name, mode in modes.items() if name not in ("default", "lo")}
    return {name for name, some in both.items() if "strict" in some and "loose" not in some}


def to_listener(line: str) -> Listener | None:
    """Reads a line of ss -Hltun; None for what listens to the host itself alone."""
    local = r"\[?([^\]%\s]*)\]?(?:%(\S+?)\]?)?:([0-9]{1,5})"  # [::1]:25, 127.0.0.53%lo:53
    match = re.match(rf"\s*(\S+)(?:\s+\S+){{3}}\s+{local}(?!\S)", line)
    address = to_address(match[2]) if match else None
    direct = getattr(address, "ipv4_mapped", None) or address
    if not match or match[3] == "lo" or (direct and direct.is_loopback):
        return None
    return Listener(match[1], address, int(match[4]))


def to_base_chain(chain: Mapping[str, Any]) -> BaseChain | None:
    """None for one that what is forwarded does not pass."""
    priority, hook = chain.get("prio"), chain.get("hook")
    if hook not in ("prerouting", "forward", "postrouting") or not isinstance(priority, int):
        return None
    return BaseChain(priority, *(str(chain.get(word)) for word in BaseChain._fields[1:]))


class Way(NamedTuple):
    """The interface, and gateway if any, by which packets leave, or `why` they do not.

    All are empty where the host does not tell.
    """

    interface: str = ""
    gateway: str = ""
    why: str = ""


class Visit:
    """One host, and what it tells: what it has, its rules, and what else is there, each asked once.

    `options` are those of the run, or what the live rules tell of them. It is asked until
    `patience` ends; `blind` is what it did not tell, and why, `lacking` what is not asked again.
    What else decides about a connection is None until it has looked around, and if it cannot.
    """

    strict: Set[str] | None = None  # the interfaces with strict rp_filter
    idle: Set[str] | None = None  # those that do not forward IPv4
    listeners: Sequence[Listener] | None = None  # the programs that listen
    bases: Sequence[BaseChain] | None = None  # the chains of nft that what is forwarded passes
    rooted = False  # whether nft has a chain EPOK

    def __init__(self, host: Host, options: Options, deadline: Deadline) -> None:
        self.host, self.name, self.options = host, host.name, options
        self.deadline = self.patience = deadline
        self.blind: list[str] = []
        self.lacking: set[Command] = set()
        self.ways: dict[tuple[object, ...], Way] = {}
        self.looking: Background | None = None
        self.arriving = Background(self.arrive)

    def arrive(self) -> tuple[Facts, Background]:
        """What the host has; and its rules, which take longer, as a result to come."""
        facts = persist(self.deadline, read_facts, self.host, self.deadline)
        counted = self.options.looks or bool(self.options.metrics_file)
        reading = Background(read_all_tables, self.host, self.deadline, counted)
        # over SSH it must wait: what is sent must not share its sessions, or its connection
        if isinstance(self.host, LocalHost):
            self.looking = Background(self.learn)
        return facts, reading

    def arrived(self) -> tuple[Facts, Background]:
        doing = f"{self.name}: reading its addresses"
        return self.arriving.result(self.deadline, doing, 1)  # type: ignore[no-any-return]

    @property
    def facts(self) -> Facts:
        return self.arrived()[0]

    @property
    def found(self) -> Found:
        """Its rules. Raises Fatal."""
        doing = f"{self.name}: reading its rules"
        return self.arrived()[1].result(self.deadline, doing, 1)  # type: ignore[no-any-return]

    def look_around(self) -> None:
        """Learns what else is there. Raises Fatal."""
        looking = self.looking or Background(self.learn)
        looking.result(self.patience, f"{self.name}: reading what else is there")

    def learn(self) -> None:
        netconf, listening = self.output(Command.NETCONF), self.output(Command.LISTENERS)
        chains = self.nft("chain", Command.NFT_CHAINS)
        if netconf is not None:
            self.strict = strict_interfaces(netconf)
            self.idle = set(re.findall(r"(?m)^inet (\S+) .*\bforwarding off", netconf))
        if listening is not None:
            read = dict.fromkeys(map(to_listener, listening.splitlines()))
            self.listeners = [each for each in read if each]
        if chains is not None:
            self.bases = [each for each in map(to_base_chain, chains) if each]
            self.rooted = any(chain.get("name") == ROOT for chain in chains)

    def output(self, command: Command, *values: object, take: Take | None = None) -> str | None:
        """What a command prints, None when it cannot be had. Raises Fatal."""
        result = self.ask(command, *values, take=take)
        return result.out if result and result.status == 0 else None

    def ask(self, command: Command, *values: object, take: Take | None = None) -> Result | None:
        """What a command leaves that the host could run. Raises Fatal."""
        if command in self.lacking:
            return None
        argv, sudo = command.argv(self.host.sudo, *values), command.as_root and self.host.sudo
        result = persist(self.patience, self.host.run, argv, "", self.patience, take)
        if result.status == 0 or result.err.startswith("RTNETLINK answers: "):
            return result
        self.lacking.add(command)
        tool, said, cure = argv[len(sudo or ())], result.said, ""
        if "epok-gate: " in result.err:
            # an older gate logs whatever it refuses, and knows no later command
            every = list(Command)
            self.lacking.update(every[every.index(command) :])
            cure = ANOTHER_GATE
        elif sudo and re.search("password|not allowed", result.err):
            # sudo says so too when there is no such command
            cure = f"; run cron/setup-host of this epok on the host, if that has {tool}"
        elif "Permission denied" in result.err:
            cure = "; root may"  # read legacy's list of tables, as the unit's user may not
        elif result.status == 127 or "BusyBox" in result.err:
            said = f"not BusyBox's {tool}" if result.status != 127 else said
            cure = f": apt-get install {PACKAGES.get(tool, tool)}"
        self.blind.append(f"{shlex.join(argv)}: {said}{cure}")
        return None

    def nft(self, kind: str, command: Command, *names: str) -> list[Mapping[str, Any]] | None:
        """What nft lists of one kind, as in libnftables-json(5); None when that cannot be had."""
        asked = shlex.join(command.argv((), *names))
        if not all(re.fullmatch(NFT_NAME, name) for name in names):
            words = quoted(asked.removeprefix("nft "))
            self.blind.append(f"nft {words}: epok asks for no such name")
            return None
        text = self.output(command, *names)
        if text is None:
            return None
        with contextlib.suppress(ValueError, RecursionError):
            parts = at(json.loads(text, object_hook=without_inner_chains), "nftables")
            if isinstance(parts, list):
                objects = [at(part, kind) for part in parts]
                return [each for each in objects if isinstance(each, dict)]
        self.blind.append(f"{asked}: {quoted(text)} is not understood")
        return None

    def way(self, to: Address, *origin: object) -> Way:
        """How packets to an address leave. Raises Fatal.

        Their origin is the host, or an address and the interface that they come in by.
        """
        key = (to, *origin)
        if key not in self.ways:
            command = Command.WAY_FROM if origin else Command.WAY.of(to.version)
            result = self.ask(command, *key)
            found = result and re.search(r"(?:\bvia (\S+) )?\bdev (\S+)", result.out)
            why = result.err if result else ""
            self.ways[key] = Way(found[2], found[1] or "") if found else Way(why=why)
        return self.ways[key]

    @functools.cached_property
    def ip_rules(self) -> str:
        """How routes are chosen."""
        return self.output(Command.RULES) or ""

    @property
    def origin(self) -> str:
        """The first line that iptables-save prints."""
        return next(filter(None, self.found.values()), NOTHING)["filter"].origin

    @property
    def is_nft(self) -> bool:
        """Whether the host's iptables is nft's."""
        if not re.search(r"-save v1\.8\.[3-7] ", self.origin):  # these do not tell
            return bool(re.search("nf_tables|xtables-save", self.origin))
        if any(tables and ROOT in tables["nat"].chains for tables in self.found.values()):
            return self.rooted
        return any(of_iptables(base, 4, 6) for base in self.bases or ())

    @functools.cached_property
    def backends(self) -> list[Backend]:
        """The rules of iptables, by IP version and backend. Raises Fatal."""
        return [backend for family in FAMILIES for backend in backends_of(self, family)]

    @property
    def entries(self) -> list[str]:
        """The host's interfaces that packets come in by to be forwarded."""
        names = self.facts.interfaces
        return [name for name in names if name != "lo" and self.options.takes_from(name)]


# Where what is forwarded meets tables of iptables: the chain's priority among those of nft, and the
# verdicts of rules before epok's, or beside them, that decide against it.
HOOKED = {
    ("raw", "PREROUTING"): (-300, LOST),
    ("mangle", "PREROUTING"): (-150, LOST),
    ("nat", "PREROUTING"): (-100, ("accept", "drop", "nat")),
    ("mangle", "FORWARD"): (-150, LOST),
    ("filter", "FORWARD"): (0, LOST),
    ("security", "FORWARD"): (50, LOST),
    ("mangle", "POSTROUTING"): (-150, LOST),
    ("nat", "POSTROUTING"): (100, ("accept",)),
}
TRACKED, TRANSLATED = -200, -100  # where the kernel does so at prerouting


class Backend(NamedTuple):
    """Rules of iptables that are not epok's, by table and chain, and the tool that has them.

    `own` are epok's tables, in the backend that epok uses.
    """

    version: int
    tool: str
    tables: Mapping[str, Chains]
    own: Tables | None = None


def backends_of(visit: Visit, family: Family) -> Iterator[Backend]:
    own, bases = visit.found[family.version], visit.bases
    if own is None:
        return
    here = {base.table for base in bases or () if of_iptables(base, family.version)}
    nft = visit.is_nft
    tables = own["filter"].neighbours
    # legacy makes a table that is only asked for, so it is asked for all that there are
    if tables is None and (not nft or bases is None or here - BUILT_IN.keys()):
        tables = read_saved(visit, BUILT_IN, Command.SAVE_ALL, family.tool)
    tables = {**(tables or {}), **{name: table.foreign for name, table in own.items()}}
    yield Backend(family.version, family.tool, tables, own)
    if own["filter"].beside if nft else here:
        name = "legacy" if nft else "nft"
        saved = read_saved(visit, (), Command.OTHER_SAVE, family.tool, name)
        yield Backend(family.version, f"{family.tool}-{name}", saved)


def of_iptables(base: BaseChain, *versions: int) -> bool:
    """Whether iptables made a chain of nft, of one of these IP versions, by its name."""
    layers = {4: "ip", 6: "ip6"}
    return base.family in map(layers.get, versions) and (base.table, base.name) in HOOKED


def read_saved(
    visit: Visit, known: Container[str], command: Command, *words: str
) -> dict[str, Chains]:
    """The tables that iptables-save prints, but for those that are known. Raises Fatal."""
    tables: dict[str, Chains] = {}

    def take(pieces: Iterable[bytes]) -> str:
        meter = Meter(f"{visit.name}: {words[0]}-save", 2 * RULES_LIMIT, 2 * RULES_LINES)
        saved = saved_by_table(pieces, meter, known)
        whole = (name for name, each in saved.items() if each.seen and not each.inside)
        tables.update({name: saved[name].others for name in whole})
        said = "".join(each.said for each in saved.values()).splitlines()
        return "".join(filter(tells_of_more, said))

    if said := visit.output(command, *words, take=take):
        visit.blind.append(f"{shlex.join(command.argv((), *words))}: {one_line(said)}")
    return tables


class Firewall(NamedTuple):
    """Chains at a hook that what is forwarded passes, from `chain` on, and that are not epok's.

    A rule with a verdict that `loses` decides against epok. `sure` is whether it is known to come
    before epok's; of chains that come behind, `rivals` are the ports that their rules name, from
    first to last. `cure` lets packets through, with MATCH for what they are.
    """

    visit: Visit
    version: int
    hook: str
    priority: int
    chain: str
    rules: RulesOf
    loses: Sequence[str]
    cure: str = ""
    sure: bool = True
    rivals: Sequence[tuple[int, int]] | None = None

    @property
    def before_nat(self) -> bool:
        early = self.priority <= TRANSLATED or self.rivals is not None
        return early and self.hook == "prerouting"

    def cure_for(self, name: str, protocol: str, ports: Sequence[str]) -> str:
        """For what comes by an interface to ports of the host, and then has epok's mark."""
        mark, some = self.visit.options.mark, ", ".join(ports)
        if "nft insert" in self.cure:
            some = some if len(ports) == 1 else f"{{ {some} }}"
            early = f"iifname {name} {protocol} dport {some} fib daddr type local"
            late = f"ct mark and {mark.forwarded:#x} == {mark.forwarded:#x}"
        else:
            some = some.replace("-", ":").replace(" ", "")
            some = f"--dport {some}" if len(ports) == 1 else f"-m multiport --dports {some}"
            early = f"-i {name} -p {protocol} {some} -m addrtype --dst-type LOCAL"
            late = f"-m connmark {marked(mark)}"
        # a table or a chain, whose names stand before, may be called so too
        return (early if self.before_nat else late).join(self.cure.rsplit("MATCH", 1))

    def loss(self, forward: Forwarding, interface: str) -> tuple[str, str, bool] | None:
        """What it does to a forward, if anything, by which rule, and whether that is sure."""
        shows = self.loses == ("accept",)  # before they are masqueraded, where they shall be
        if shows and (forward.kept if isinstance(forward, Live) else not forward.masquerade):
            return None
        walks = [Walk(self.rules, each, self.loses) for each in self.packets(forward, interface)]
        decisions = [walk.decision(self.chain) for walk in walks]
        ends = [(rule, sure) for rule, sure in decisions if rule and rule.verdict in self.loses]
        sure = self.sure and len(ends) == len(decisions) and all(sure for _, sure in ends)
        rules = [rule for rule, _ in ends] + [doubt for walk in walks for doubt in walk.doubts]
        if not rules:
            return None
        does = {"drop": "drops", "notrack": "does not track"}.get(rules[0].verdict, "takes")
        return "shows nodes the clients of" if shows else does, rules[0].text, sure

    def packets(self, forward: Forwarding, interface: str) -> Iterator[Packet]:
        """The first packets of connections as they come here.

        What becomes of all of them becomes of the forward.
        """
        visit, version, protocol = self.visit, self.version, forward.protocol
        facts, options = visit.facts, visit.options
        targets = [target for target in forward.targets if target.address.version == version]
        own = [ip for ip in facts.addresses if ip.version == version and options.covers(ip)]
        # clients connect to addresses of the interface that they come in by, or else to any
        nearest = [ip for ip in own if ip in facts.interfaces[interface]] or own
        for offset in sorted({0, forward.last - forward.first}) if targets else ():
            if self.before_nat:
                port, tracked = forward.first + offset, self.priority > TRACKED
                for ip in nearest:
                    yield Packet(version, interface, str, protocol, port, ip, True, 0, tracked)
                continue
            for target in targets:
                out = functools.partial(lambda to: visit.way(to).interface, target.address)
                place = protocol, target.port + offset, target.address
                yield Packet(version, interface, out, *place, False, options.mark.forwarded)


def firewalls(visit: Visit) -> list[Firewall]:
    """What connections meet that is not epok's, in the order in which they do. Raises Fatal."""
    walls = [wall for backend in visit.backends for wall in of_backend(visit, backend)]
    for version, own in visit.found.items():
        walls += of_nft(visit, version) if own else ()
    order = ("prerouting", "forward", "postrouting")
    return sorted(walls, key=lambda wall: (order.index(wall.hook), wall.priority))


def of_backend(visit: Visit, backend: Backend) -> Iterator[Firewall]:
    for (table, chain), (priority, loses) in HOOKED.items():
        chains = backend.tables.get(table, {})
        if chain not in chains:
            continue
        command = f"{backend.tool} -t {table}"
        place = visit, backend.version, chain.lower(), priority, chain
        jump = HOOKS.get(table, {}).get(chain) if backend.own else None
        if not jump:
            cure = f"let it pass: {command.removesuffix(' -t filter')} -I {chain} MATCH -j ACCEPT"
            others = tuple(verdict for verdict in loses if verdict != "accept")
            # of two backends' tables, the kernel comes first to the one that was made later
            yield Firewall(*place, iptables_rules(chains), others, cure, sure=table != "nat")
        elif backend.own and jump in backend.own[table].hooks.get(chain, ()):
            cure = f"delete that rule, or {command} -D {chain} {jump}"
            cure += ", and epok's next run puts its own first"
            yield Firewall(*place, iptables_rules(chains), loses, cure)
        if jump == HOST_HOOK:
            lines, hook = chains[chain], f"-A {chain} {jump}"
            after = lines[lines.index(hook) + 1 :] if hook in lines else lines
            behind = {**chains, chain: [line for line in after if not re.search(IS_OLDER, line)]}
            yield Firewall(*place, iptables_rules(behind), ("nat",), rivals=ports_in(behind))


def of_nft(visit: Visit, version: int) -> Iterator[Firewall]:
    """Chains of nft that iptables did not make."""
    layer = "ip" if version == 4 else "ip6"
    bases = [base for base in visit.bases or () if base.family in ("inet", layer)]
    own_came = False  # epok's, of those with the same priority
    for base in bases:
        own_came |= base[1:4] == (layer, "nat", "PREROUTING")
        if of_iptables(base, version):
            continue
        loses, sure, rivals = LOST, True, None
        cure = f"let it pass: nft insert rule {base.family} {base.table} {base.name} MATCH accept"
        if base.table == "firewalld" and base.hook == "forward":
            cure = "StrictForwardPorts=no in /etc/firewalld/firewalld.conf lets it pass, "
            cure += "after firewall-cmd --reload"
        if base.type == "nat" and base.hook == "prerouting":
            # of chains with the same priority, the kernel comes first to the one made later
            sure = visit.is_nft or base.priority != TRANSLATED
            behind = sure and (base.priority, not own_came) > (TRANSLATED, False)
            loses, rivals = ("drop", "nat"), [(0, 65535)] if behind else None
        rules = nft_rules(visit, base)
        place = visit, version, base.hook, base.priority, base.name
        yield Firewall(*place, rules, loses, cure, sure, rivals)


class Check(NamedTuple):
    """Something on a host that forwards need.

    `problem` is what is wrong and what to do, empty when it is well. One that is not `sure` may be
    meant so, or cannot be told for sure from here.
    """

    what: str
    problem: str = ""
    sure: bool = True

    @property
    def line(self) -> str:
        word = "ok" if not self.problem else "FAILED" if self.sure else "maybe"
        return f"{painted(word, word)}{' ' * (8 - len(word))}{self.problem or self.what}"

    def document(self) -> dict[str, Any]:
        ok = not self.problem
        return {"check": self.what, "ok": ok, "sure": self.sure, "problem": self.problem}


def check_host(visit: Visit, forwards: Sequence[Forwarding]) -> Iterator[Check]:
    """Looks for what makes forwards fail without a word. Raises Fatal."""
    yield from check_forwarding(visit, forwards)
    for interface in visit.options.interfaces if visit.facts.whole else ():
        yield check_interface(visit, interface)
    some = forwards[:200]
    if not visit.options.looks:
        # one for each protocol is enough: what drops them all is what a run can be sure of
        some = list({forward.protocol: forward for forward in forwards}.values())
    walls = firewalls(visit)
    yield check_targets(visit, some)
    yield from check_answers(visit, some)
    yield from check_paths(visit, some, walls)
    yield from check_marks(visit)
    yield from check_listeners(visit, forwards)
    yield from check_rivals(visit, forwards, walls)
    yield from check_older(visit)


def check_sight(visit: Visit) -> Iterator[Check]:
    for reason in dict.fromkeys(visit.blind):
        problem = f"{visit.name} does not tell all that matters: {reason}"
        yield Check("the host tells all that matters", problem, False)


NODE_IP = "let kubelet report the node's own address (--node-ip; see kubectl get nodes -o wide)"


def check_targets(visit: Visit, forwards: Iterable[Forwarding]) -> Check:
    """Whether no forward leads back: an address that many machines have makes the host no node."""
    targets = {each.address for some in forwards if not some.direct for each in some.targets}
    own, problem = sorted(targets & {*visit.facts.addresses}, key=str), ""
    if own:
        problem = f"{visit.name} has the address {enumerated(map(str, own))} itself, which a "
        problem += f"node reports, so what is forwarded there comes back: {NODE_IP}"
    return Check("no node has an address of the host", problem)


def check_interface(visit: Visit, interface: str) -> Check:
    """Whether packets can come in by an interface that is given."""
    what, host = f"there is an interface {interface}", visit.name
    fitting = [name for name in visit.facts.interfaces if like(interface, name)]
    if not fitting:
        names = quoted(", ".join(visit.facts.interfaces))
        return Check(what, f"{host} has no interface {interface}: give -i those it has, of {names}")
    bare = not any(visit.facts.interfaces[name] for name in fitting)
    way = visit.way(BEYOND[4]).interface if bare else ""
    if not way or way in visit.entries:
        return Check(what)
    problem = f"{host} has no address at {interface}, as if that were a port of a bridge, by which "
    return Check(what, problem + f"nothing comes in: give -i {way}, its way to others", sure=False)


# stand for clients that are in no network of the host
BEYOND = {4: ipaddress.ip_address("100.0.0.1"), 6: ipaddress.ip_address("2000::1")}


def check_forwarding(visit: Visit, forwards: Iterable[Forwarding]) -> Iterator[Check]:
    targets = [target.address for forward in forwards for target in forward.targets]
    on, idle, host = visit.facts.forwarding, visit.idle, visit.name
    for family, sysctl in zip(FAMILIES, SYSCTLS, strict=True):
        version, what = family.version, f"forwarding of IPv{family.version} is on"
        node = next((address for address in targets if address.version == version), None)
        if not node:
            continue
        if visit.found[version] is None:
            yield Check(what, f"{host} has no working {family.tool}: no forwards over IPv{version}")
            continue
        # of IPv4 each interface has its own: that of clients, and that of the nodes' answers
        ways = [*visit.entries, visit.way(node).interface] if version == 4 and idle else []
        closed = [way for way in dict.fromkeys(ways) if way in (idle or ())]
        if closed and (len(closed) < len({*ways}) or on.get(version)):
            for way in closed:
                problem = f"{host} does not forward IPv4 that comes in by {way}: sysctl -w "
                problem += f"net.ipv4.conf.{way.replace('.', '/')}.forwarding=1"
                # of several that fit a pattern, some may be for others
                sure = way in visit.options.interfaces or way not in visit.entries
                yield Check(what, problem, sure)
        elif version in on:
            name = sysctl.removeprefix("/proc/sys/").replace("/", ".")
            problem = f"{host} does not forward IPv{version}: sysctl -w {name}=1"
            well = on[version] if version == 6 or idle is None else not closed
            yield Check(what, "" if well else problem)


NO_OLDER = "the older epok has left no rules"
# Makes -D of the -A of its rules. Their comment has spaces, so every iptables prints it in quotes.
IS_OLDER = r'--comment "[^"]*\bepok_rule_id[:=] ?\w'
DELETE_OLDER = rf"sed -nE '/^(\*|COMMIT)/p; s/^-A (.*{IS_OLDER}.*)/-D \1/p'"


def check_older(visit: Visit) -> Iterator[Check]:
    """What the older epok has left forwards whatever the annotations say by now."""
    count = older_rules(visit.found)
    if count and not visit.options.clean:
        problem = f"{visit.name} has {count} {plural(count, 'rule')} of the older epok, "
        problem += "which forward whatever the annotations say; once it is stopped, as root on the "
        problem += f"host: iptables-save -t nat | {DELETE_OLDER} | iptables-restore -n -w 5"
        yield Check(NO_OLDER, problem)


def check_answers(visit: Visit, forwards: Iterable[Forwarding]) -> Iterator[Check]:
    """Strict rp_filter drops a packet that comes in where an answer to it would not go out.

    Else an answer that leaves elsewhere comes from an address that others do not expect there.
    """
    targets = (target.address for forward in forwards for target in forward.targets)
    node = next((address for address in targets if address.version == 4), None)
    if visit.strict is None or not node:
        return
    inner, host, beyond = visit.way(node).interface, visit.name, BEYOND[4]
    for name in [name for name in visit.entries if inner and visit.facts.interfaces[name]]:
        what = f"rp_filter lets clients in by {name}, and answers leave by it"
        back, _, why = visit.way(beyond, node, inner)
        elsewhere = back not in ("", name)
        if elsewhere and "Invalid" in visit.way(node, beyond, name).why:
            problem = f"{host} drops what comes in by {name} from beyond its own networks, as "
            problem += f"rp_filter is strict and its way back is by {back}: {loose(name)}"
            # one inner interface of several has clients of its own networks, most likely
            sole = name == visit.options.external_interface or len(visit.entries) == 1
            yield Check(what, problem, sole)
        elif elsewhere and (cure := how_to_answer(visit, name, back)):
            problem = f"{host} sends answers to clients beyond the networks of {name} by "
            yield Check(what, f"{problem}{back}: {cure}", sure=False)
        elif "Invalid" in why:
            problem = f"{host} drops the nodes' answers, as rp_filter is strict and the way to "
            yield Check(what, f"{problem}{node} is not by {inner}: {loose(inner)}", sure=False)
        elif back or why:
            yield Check(what)
        if inner == name and "br" in name and visit.options.looks:
            problem = f"a node that is a VM on the bridge {name} cannot reach itself through the "
            problem += "host, where net.bridge.bridge-nf-call-iptables is 1, until its port says: "
            problem += "bridge link set dev PORT hairpin on"
            yield Check("nodes reach themselves", problem, sure=False)


def how_to_answer(visit: Visit, name: str, back: str) -> str:
    """What lets answers leave by the interface that clients come in by; empty if none are lost."""
    mark, own = visit.options.mark, map(str, visit.facts.interfaces[name])
    tables = dict(re.findall(r"\bfrom (\S+) lookup (\S+)", visit.ip_rules))
    table = next((tables[address] for address in own if address in tables), "")
    bit = next(1 << n for n in (30, 27) if not 1 << n & (mark.forwarded | mark.masquerade))
    bits, start = f"{bit:#x}/{bit:#x}", "iptables -t mangle -A PREROUTING"
    # an inner interface has no clients from beyond; with the mark, it is as this says
    if (back in visit.entries and not table) or f" fwmark {bits} " in visit.ip_rules:
        return ""
    steps = [
        f"ip rule add fwmark {bits} lookup {table or 7001}",
        f"{start} -i {name} -m conntrack --ctstate NEW -j CONNMARK --set-xmark {bits}",
        f"{start} -m connmark --mark {bits} -m conntrack --ctdir REPLY -j MARK --set-xmark {bits}",
    ]
    if not table:
        steps.insert(0, f"ip route add $(ip route show default dev {name}) dev {name} table 7001")
    return " && ".join(steps)


def loose(interface: str) -> str:
    """The command that makes rp_filter loose; sysctl has "/" for the dots of a name."""
    return f"sysctl -w net.ipv4.conf.{interface.replace('.', '/')}.rp_filter=2"


def check_paths(
    visit: Visit, forwards: Iterable[Forwarding], walls: Iterable[Firewall]
) -> Iterator[Check]:
    """Whether anything takes or drops the first packet of a connection."""
    what = "nothing takes or drops connections that epok forwards"
    ahead, entries = [wall for wall in walls if wall.rivals is None], visit.entries
    lost: dict[tuple[Firewall, str, str, str, str, bool], list[str]] = {}
    for wall, name, forward in itertools.product(ahead, entries, forwards):
        if loss := wall.loss(forward, name):
            where = lost.setdefault((wall, name, forward.protocol, *loss), [])
            where.append(f"{Range(forward.first, forward.last)}")
    checks = []
    for (wall, name, protocol, does, rule, sure), texts in lost.items():
        for ports in (texts[n : n + 7] for n in range(0, len(texts), 7)):  # as fit into a rule
            some = enumerated(f"{protocol}/{port}" for port in ports)
            perhaps, by = "" if sure else "perhaps ", printable(rule)  # with somebody's comments
            problem = f"{visit.name} {perhaps}{does} {some} from {name} by {by}; "
            checks.append(Check(what, problem + wall.cure_for(name, protocol, ports), sure))
    yield from dict.fromkeys(checks)
    aside = re.compile("(sudo -n )?(ip|ss|conntrack) ")
    if entries and not lost and all(map(aside.match, visit.blind)):
        yield Check(what)


COPIES = re.compile(r"-A (\S+) (.*)-j CONNMARK --(save|restore)-mark --nfmask (\w+) --ctmask (\w+)")


def check_marks(visit: Visit) -> Iterator[Check]:
    """Whether somebody's rules copy connections' marks whole, and epok's bits with them."""
    bits, host = visit.options.mark.forwarded | visit.options.mark.masquerade, visit.name
    copies = [
        (f"{backend.tool} -t mangle -R", number, match)
        for backend in visit.backends
        for lines in backend.tables.get("mangle", {}).values()
        for number, match in enumerate(map(COPIES.match, lines), 1)
        if match and int(match[4], 0) & int(match[5], 0) & bits
    ]
    for command, number, match in copies:
        chain, asked, kind, *masks = match.groups()
        does = "overwrites epok's bits of connection marks"
        sure = chain in ("FORWARD", "POSTROUTING")
        if kind == "restore":
            does = "gives packets epok's bits of connection marks, so that ip rule misses them,"
            sure = bool(re.search(r"(?m)^\d+:\s+from .*\bfwmark \w+ ", visit.ip_rules))
        if kind == "save" or sure:
            problem = f"{host} {does} by {printable(match[0])}; spare them: {command} {chain} "
            spared, others = (f"{int(mask, 0) & ~bits:#x}" for mask in masks)
            problem += f"{number} {asked}-j CONNMARK --{kind}-mark --nfmask {spared} "
            problem += f"--ctmask {others}"
            yield Check("epok's bits of marks are its own", problem, sure and not asked)


def check_listeners(visit: Visit, forwards: Iterable[Forwarding]) -> Iterator[Check]:
    """Whether a forward hides a program of the host."""
    options, interfaces = visit.options, visit.facts.interfaces
    if visit.listeners is None:
        return
    what = "no program of the host listens on an external port"
    inner = [name for name in interfaces if not options.takes_from(name)]
    elsewhere = {ip for name in inner for ip in interfaces[name] if "lo" not in options.interfaces}
    hidden = [
        (listener, forward)
        for forward, listener in itertools.product(forwards, visit.listeners)
        if forward.first <= listener.port <= forward.last and forward.protocol == listener.protocol
        if hides(forward, listener.address, options) and listener.address not in elsewhere
    ]
    for (protocol, address, port), forward in hidden:
        where = "" if address is None or address.is_unspecified else f" at {address}"
        problem = f"{visit.name} has a program that listens on {protocol}/{port}{where}, and "
        problem += f"clients get {forward.service} instead: stop it "
        problem += f"(ss -{protocol[0]}lnp sport = :{port} names it), or forward another port"
        yield Check(what, problem)
    if not hidden:
        yield Check(what)


def check_rivals(
    visit: Visit, forwards: Iterable[Forwarding], walls: Iterable[Firewall]
) -> Iterator[Check]:
    """Whether a forward takes the clients of somebody's rule that comes behind epok's."""
    told = {(each.protocol, each.port) for each in visit.listeners or ()}
    for wall, forward in itertools.product(walls, forwards):
        # most forwards have no rival: only of those whose ports rules name are the rules read
        named = wall.rivals or ()
        if not any(low <= forward.last and forward.first <= high for low, high in named):
            continue
        packets = (wall.packets(forward, name) for name in visit.entries)
        for packet in itertools.chain.from_iterable(packets):
            rule, sure = Walk(wall.rules, packet).decision(wall.chain)
            port = packet.protocol, packet.port
            by_port = rule and any(each.name.startswith("--dport") for each in rule.options)
            if rule and rule.verdict == "nat" and sure and by_port and port not in told:
                told.add(port)
                problem = f"{visit.name} has a rule that publishes {port[0]}/{port[1]}, "
                problem += f"{printable(rule.text)}, and clients get {forward.service} instead: "
                problem += "let whoever made it take another port, or forward another one"
                yield Check("nobody else's rule publishes an external port", problem)


def ports_in(chains: Chains) -> list[tuple[int, int]]:
    """The first and last ports that rules name."""
    named = (re.search(r"--dports? ([0-9,:]+)", line) for line in itertools.chain(*chains.values()))
    texts = {text for match in named if match for text in match[1].split(",")}
    return [(int(text.split(":")[0] or 0), int(text.split(":")[-1] or 65535)) for text in texts]


def hides(forward: Forwarding, address: Address | None, options: Options) -> bool:
    """Whether a forward takes what comes to an address that a program listens on."""
    if address is None:
        return True
    taken = address.is_unspecified or options.covers(address)
    return taken and address.version in {target.address.version for target in forward.targets}


def check_nodes(visit: Visit, forwards: Iterable[Forwarding]) -> Iterator[Check]:
    """Whether each target of TCP forwards answers, from the host."""
    tcp = [forward for forward in forwards if forward.protocol == "tcp"]
    some = list(dict.fromkeys(target for forward in tcp for target in forward.targets))[:64]
    limit = visit.deadline.to_look()
    reach = visit.host.reach
    trying = [Background(persist, limit, reach, str(t.address), t.port, limit) for t in some]
    for target, thread in zip(some, trying, strict=True):
        where, problem = f"{target.address} port {target.port}", ""
        reason: str | None = None
        with contextlib.suppress(Fatal):
            reason = thread.result(limit, where)
        if reason is None:
            problem = f"{where} could not be tried from {visit.name}: that takes nc there (apt-get "
            problem += "install netcat-openbsd), and the gate of this epok (cron/setup-host)"
        elif reason:
            problem = f"{where} does not answer {visit.name}: {reason}; are pods of the Service "
            problem += "ready, does kube-proxy run there, and is no firewall of the node between?"
        yield Check(f"{where} answers", problem, sure=reason is not None)


def check_pods(visit: Visit, planner: Planner) -> Iterator[Check]:
    """Whether a host that is taken for a node has a route to its pods, or is another machine."""
    own, snapshot = planner.own(visit.facts), planner.snapshot
    if not own:
        return
    nodes = {ip for node in snapshot.nodes for ip in node.addresses}
    pods = [(each.node, each.address) for each in itertools.chain(*snapshot.endpoints.values())]
    inner = [(node, ip) for node, ip in pods if ip and ip not in nodes]
    near = [ip for node, ip in inner if node in own]
    ways = {ip: visit.way(ip) for ip in (near or [ip for _, ip in inner])[:3]}
    if not ways or Way() in ways.values():
        return
    lost = [ip for ip, way in ways.items() if not way.interface]
    if near:
        # a node's own pods are never where all goes that no route is for; those of others may be
        lost += [ip for ip, way in ways.items() if way == visit.way(BEYOND[ip.version])]
    names, problem = enumerated(own), ""
    if ways.keys() == {*lost}:
        address = enumerated(map(str, own.values()))
        problem = f"{visit.name} has the address {address}, which node {names} reports, but "
        problem += f"no route to its pods, like {lost[0]}: if it is another machine, {NODE_IP}; "
        problem += "if it is that node, see to its network plugin"
    yield Check(f"a route to the pods of node {names}, which the host is taken for", problem)


MOST_PORTS = 32  # of TCP, for which conntrack is asked port by port
Flows = Mapping[Live, Sequence[int]]


def read_flows(visit: Visit, lives: Iterable[Live]) -> Flows:
    """How many connections to nodes the host tracks that are answered, and that still wait."""
    flows: dict[Live, Sequence[int]] = {}
    own, left = {str(address) for address in visit.facts.addresses}, MOST_PORTS
    tracked = functools.cache(visit.output)
    commands = {"udp": Command.FLOWS, "tcp": Command.PORT_FLOWS}
    for live in lives:
        ports = range(live.first, live.last + 1)
        asked = [(port,) for port in ports] if live.protocol == "tcp" else [()]
        left -= len(asked) if live.protocol == "tcp" else 0
        if live.protocol not in commands or left < 0:
            continue
        command = commands[live.protocol].of(live.version)
        texts = [tracked(command, *values) for values in asked]
        nodes = {str(target.address) for target in live.targets}
        waits = [
            "[UNREPLIED]" in line
            for text in texts
            for line in (text or "").splitlines()
            if (flow := FLOW.search(line))
            if flow[1] in own and int(flow[2]) in ports and flow[3] in nodes
        ]
        if None not in texts:
            flows[live] = waits.count(False), waits.count(True)
    return flows


# ------------------------------------------------ showing: --dry-run, --status and --explain


class DryRun:
    """What a run would do to a host."""

    def __init__(self, visit: Visit, wanted: Wanted, news: Sequence[Publication]) -> None:
        self.name, self.several, self.news = visit.name, len(visit.options.host) > 1, news
        self.changes = changes_between(visit.found, wanted)
        self.inputs = list(next_inputs(wanted, visit.found, visit.options))

    def text(self) -> str:
        """What would come and go, and the inputs under the commands that read them."""
        lines = [f"# on {self.name}"] if self.several else []
        lines += [change.line for change in self.changes]
        lines += [painted(f"~ {each.line}", "~") for each in self.news]
        for argv, text in self.inputs:
            lines += [f"# {shlex.join(argv)}", text.rstrip("\n")]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        changes = [change.document() for change in self.changes]
        inputs = [{"command": argv, "input": text} for argv, text in self.inputs]
        news = [each.document() for each in self.news]
        return {"host": self.name, "changes": changes, "published": news, "inputs": inputs}


NO_CLUSTER = Snapshot((), (), {})


class Status:
    """What a host does now, beside what the cluster wants, if that is known, and what was checked.

    With --explain all is about the Service `key`. `pending` is what the next run would change;
    `taken` tells which nodes the host is taken for.
    """

    def __init__(self, visit: Visit) -> None:
        self.visit, self.host = visit, visit.name
        self.tables, self.options = visit.found, visit.options
        self.key = visit.options.explain
        lives = all_lives(visit.found, visit.found)
        self.lives = [live for live in lives if self.concerns(live.service)]
        self.snapshot, self.plan = NO_CLUSTER, Plan()
        self.cluster = self.taken = ""
        self.pending: list[Change] = []
        self.rejections: list[Rejection] = []
        self.published: Mapping[str, list[Ingress]] = {}
        self.checks: list[Check] = []
        self.flows: Flows = {}

    def concerns(self, service: str) -> bool:
        return self.key in ("", service)

    def compare(self, planner: Planner, facts: Facts) -> None:
        """Learns what the cluster wants. Raises Fatal."""
        self.plan, self.taken = planner.plan(facts), planner.taken(facts)
        self.snapshot = planner.snapshot
        self.cluster = f"compared with {planner.reader.source.name}"
        changes = changes_between(self.tables, rendered(self.plan, self.options))
        self.pending = [change for change in changes if self.concerns(change.live.service)]
        self.rejections = [each for each in self.plan.rejections if self.concerns(each.service)]
        services = [each for each in self.snapshot.services if self.concerns(each.key)]
        self.published = {each.key: each.balanced.ingress for each in services if each.balanced}

    @property
    def warnings(self) -> list[str]:
        return [*self.plan.warnings, *map(str, self.plan.unknown)]

    @property
    def forwards(self) -> Sequence[Forwarding]:
        """What is checked."""
        return self.lives or self.plan.forwards

    def hooks(self, version: int) -> str:
        """Whether epok's hooks are there: "in place", "not used", or "missing in" some chain."""
        tables = self.tables[version]
        if tables is None or not any(table.chains for table in tables.values()):
            return "not used"
        lacking = [
            f"{name} {chain}"
            for name, hooks in HOOKS.items()
            for chain, rule in hooks.items()
            if rule not in tables[name].hooks.get(chain, [])
        ]
        return f"missing in {', '.join(lacking)}" if lacking else "in place"

    @property
    def backend(self) -> str:
        version = re.search(r"v([0-9.]+)", self.visit.origin)
        kind = "nft" if self.visit.is_nft else "legacy"
        return f"iptables {version[1] if version else '?'} ({kind})"

    def title(self) -> str:
        hooks = "; ".join(f"IPv{version} hooks {self.hooks(version)}" for version in self.tables)
        return painted(f"{self.host}: {self.backend}; {hooks}", "title")

    def to_come(self) -> list[str]:
        lines = [change.line for change in self.pending]
        return ["the next run would change:", *lines] if lines else []

    def text(self) -> str:
        rows = forward_rows(self.lives, self.flows)
        forwards = aligned(rows) if self.lives else ["no forwards"]
        lines = [self.title(), *filter(None, [self.taken]), *forwards, *self.to_come()]
        lines += [f"rejected: {rejection}" for rejection in self.rejections]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"{key}: EXTERNAL-IP {ips(found)}" for key, found in self.published.items()]
        lines += [self.cluster, *(check.line for check in self.checks if check.problem)]
        passed = sum(not check.problem for check in self.checks)
        return "\n".join([*lines, f"{passed} of {len(self.checks)} checks passed"])

    def document(self) -> dict[str, Any]:
        def tracked(live: Live) -> dict[str, int]:
            return dict(zip(("answered", "waiting"), self.flows.get(live, ()), strict=False))

        return {
            "host": self.host,
            "backend": self.backend,
            "hooks": {f"IPv{version}": self.hooks(version) for version in self.tables},
            "forwards": [live.document() | tracked(live) for live in self.lives],
            "cluster": self.cluster,
            "taken": self.taken,
            "pending": [change.document() for change in self.pending],
            "rejected": [each.document() for each in self.rejections],
            "warnings": self.warnings,
            "published": msgspec.to_builtins(self.published),
            "checks": [check.document() for check in self.checks],
        }


def forward_rows(lives: Sequence[Live], flows: Flows) -> list[list[str]]:
    """The table of --status; whom a forward is for is in it when one is not for everybody."""
    ways = {way for live in lives for way in live.ways}
    rows = [["PORT", "SERVICE", "NODEPORT", "NODES", "CLIENT", "CONNECTIONS", "ANSWERED", "ONLY"]]
    for live in lives:
        only = [*live.sources, *(f"by {way}" for way in live.ways if ways - {*live.ways})]
        rows.append([
            f"{live}{' IPv6' * (live.version == 6)}",
            f"{live.service}:{live.port}",
            live.node_ports,
            f"{len(live.targets)}{' pods' * live.direct}",
            "kept" if live.kept else "hidden",
            f"{live.counts[0]}" if live.counts else "?",
            f"{flows[live][0]}/{sum(flows[live])}" if live in flows else "?",
            enumerated(only) or "-",
        ])  # fmt: skip
    limited = any(row[-1] != "-" for row in rows[1:])
    return rows if limited else [row[:-1] for row in rows]


WORKS = "it works as far as can be seen from here: "


class Story(Status):
    """All about one Service on one host, from its annotation to its live rules."""

    @property
    def service(self) -> Service | None:
        return next((each for each in self.snapshot.services if each.key == self.key), None)

    @property
    def warnings(self) -> list[str]:
        """Those about this Service, or about all."""
        others = {service.key for service in self.snapshot.services} - {self.key}
        about = [text for text in super().warnings if text.partition(": ")[0] not in others]
        if self.plan.claims and self.published.get(self.key) == []:
            about.append("it has no EXTERNAL-IP: runs write it with --publish, and the permission")
        # one that cannot tell its clients from the cluster's nodes may relay for all
        tcp = {claim.external for claim in self.plan.claims if claim.port.protocol == "tcp"}
        mail = tcp.intersection(MAIL_PORTS)
        if mail and self.service and not self.service.local:
            namespace, _, name = self.key.partition("/")
            patch = """'{"spec": {"externalTrafficPolicy": "Local"}}'"""
            about.append(
                f"port {spans(mail)} looks like a mail server's, and externalTrafficPolicy Cluster "
                "hides its clients' addresses: if it trusts those of the cluster, it relays mail "
                f"for everybody: kubectl patch service -n {namespace} {name} -p {patch}"
            )
        return about

    @property
    def forwards(self) -> Sequence[Forwarding]:
        return [each for each in self.plan.forwards if each.service == self.key] or self.lives

    def mappings(self) -> list[tuple[str, str, bool]]:
        """Each mapping, its fate, and whether it stands."""
        ports: dict[str, list[str]] = {}
        for mapping, external, port in self.plan.claims:
            to = f"NodePort {port.node_port} ({port.name or port.port})"
            ports.setdefault(mapping, []).append(f"{port.protocol}/{external} -> {to}")
        fates = [(mapping, enumerated(some), True) for mapping, some in ports.items()]
        for each in self.rejections:
            fates.append((each.mapping or "all", f"rejected: {each.reason}", False))
        return fates

    def why_left_out(self, node: Node) -> str:
        """Why no connections go to a node; empty if they do."""
        service, used = self.service, {place.name for place in self.plan.places if place.live}
        if not service or node.name in used:
            return ""
        if self.taken:
            return "has no ready pod of the Service that the host, itself a node, may use"
        if node.excluded or not node.ready:
            return node.excluded or "not Ready"
        if node.labelled:
            return f"label {STANDARD_EXCLUDE_LABEL}"
        if not {ip.version for ip in node.addresses} & {*service.versions}:
            return f"no usable InternalIP or ExternalIP of IPv{service.versions[0]}"
        if service.local:
            return "has no ready pod of the Service (externalTrafficPolicy Local)"
        return f"{self.options.max_nodes} others are used (--max-nodes)"

    def pods(self) -> str:
        """How many pods are ready, empty when that is not known."""
        endpoints = self.snapshot.endpoints.get(self.key)
        if endpoints is None:
            return ""
        ready = [str(endpoint.address) for endpoint in endpoints if endpoint.ready]
        return f"{len(ready)} of {len(endpoints)} ready: {enumerated(ready)}".rstrip(": ")

    def cause(self) -> str:
        """The most likely cause when the Service cannot be reached, and what to do about it."""
        steps = self.not_asked, self.nowhere_to_go, self.not_done, self.in_the_way, self.evidence
        causes = (cause for step in steps for cause in step())
        return next(causes, f"{WORKS}connections come in, and the nodes answer")

    def not_asked(self) -> Iterator[str]:
        service, (namespace, _, name) = self.service, self.key.partition("/")
        if self.snapshot is not NO_CLUSTER and not service:
            keys = enumerated(sorted(each.key for each in self.snapshot.services)) or "none"
            yield f"there is no Service {self.key}; those with an annotation of epok's: {keys}"
        if service and not service.mapped and not service.balanced:
            strange = sorted(service.annotations.keys() - set(SERVICE_ANNOTATIONS))
            only = f", only {enumerated(map(quoted, strange))}" if strange else ""
            annotate = f"kubectl annotate service -n {namespace} {name} {PORT_ANNOTATIONS[0]}"
            yield f"it has no annotation {PORT_ANNOTATIONS[0]}{only}: {annotate}=EXTERNAL:NODEPORT"
        elif service and not self.plan.claims:
            yield from (rejection.message for rejection in self.rejections)
            yield "its annotation names no port"

    def nowhere_to_go(self) -> Iterator[str]:
        passed = [check.what for check in self.checks if not check.problem]
        if self.pods().startswith("0 of") and not any(w.endswith(" answers") for w in passed):
            namespace, _, name = self.key.partition("/")
            slices = f"endpointslices -n {namespace} -l kubernetes.io/service-name={name}"
            yield f"no pod of it is ready: kubectl get {slices}"
        if self.service and not any(place.live for place in self.plan.places):
            yield from self.warnings

    def not_done(self) -> Iterator[str]:
        for version in self.tables:
            if (hooks := self.hooks(version)).startswith("missing"):
                yield f"IPv{version} hooks {hooks}: run epok, and find out what deletes its rules"
        for sign, live, _ in self.pending:
            what = f"the next run would change it ({sign} {live})"
            yield f"{what}: run epok, and see whether its timer runs"
        if not self.lives:
            yield f"{self.host} has no rule for it; {self.cluster}"

    def in_the_way(self) -> Iterator[str]:
        for check in self.checks:
            # rules of the older epok keep nobody out
            if check.problem and check.sure and check.what != NO_OLDER:
                yield check.problem
        yield from (rejection.message for rejection in self.rejections)

    def nat(self, live: Live) -> Table:
        return (self.tables[live.version] or NOTHING)["nat"]

    def met(self, live: Live) -> int:
        """How many connections met its rules since EPOK was written, which is when -i changes."""
        nat, protocol = self.nat(live), f" -p {live.protocol} "
        pairs = zip(nat.chains.get(ROOT, ()), nat.counts.get(ROOT, ()), strict=False)
        return min(live.counts[0], sum(count for rule, count in pairs if protocol in rule))

    def evidence(self) -> Iterator[str]:
        """How far packets came, as the kernel counts them."""
        host, lives = self.host, self.lives
        if not lives or not all(live.counts for live in lives):
            return
        came, met = sum(live.counts[0] for live in lives), sum(map(self.met, lives))
        some = f"{came} {plural(came, 'connection')} met its rules"
        if not met:
            since = f"since the rules of EPOK last changed ({came} before)" if came else "yet"
            ways = enumerated(dict.fromkeys(way for live in lives for way in live.ways))
            look = f"tcpdump -ni {self.way} {lives[0].protocol} port {lives[0].first}"
            doubts = "; or ".join(["", *(check.problem for check in self.checks if check.problem)])
            yield (
                f"no connection has come in by {ways} {since}: try it from another machine, beyond "
                f"that interface; if {look} shows nothing on {host}, it is lost before it{doubts}"
            )
        kept = any(live.kept for live in lives)
        if not kept and not any(self.nat(live).counts.get(POSTROUTING, [1])[0] for live in lives):
            yield f"{some}, and none has left {host} again: a rule is in the way, or no route"
        answered, waiting = (sum(each[n] for each in self.flows.values()) for n in (0, 1))
        waits = f"{waiting} {plural(waiting, 'waits', 'wait')} for an answer"
        if answered:
            are = plural(answered, "connection is", "connections are")
            yield f"{WORKS}{answered} {are} answered{f', {waits}' * bool(waiting)}"
        elif waiting:
            back = "nodes have to route back to clients through it (externalTrafficPolicy Local)"
            yield f"{some}, {waits} after it left {host}: {back if kept else 'see the nodes'}"
        elif len(self.flows) == len(lives):
            yield f"{some}, and none is open now: try it, and look again meanwhile"

    @property
    def way(self) -> str:
        """An interface that it is reached by."""
        return self.lives[0].ways[0].split()[-1]

    def trace(self) -> list[str]:
        """How the kernel itself tells what it does with the first packet of each connection."""
        live = self.lives[0]
        rule = f"PREROUTING -i {self.way} -p {live.protocol} --dport {live.first} -j TRACE"
        begin = f"iptables -t raw -I {rule} && dmesg -w | grep TRACE:"
        end = f"iptables -t raw -D {rule}"
        if self.backend.endswith("(nft)"):
            syn = " tcp flags syn" * (live.protocol == "tcp")
            match = f"iifname {self.way.replace('+', '*')} {live.protocol} dport {live.first}{syn}"
            begin = "nft 'add table inet epok; "
            begin += "add chain inet epok trace { type filter hook prerouting priority -350; }; "
            begin += f"add rule inet epok trace {match} meta nftrace set 1' && nft monitor trace"
            end = "nft delete table inet epok"
        what = "To see what becomes of its packets, as root on"
        return [f"{what} {self.host}: {begin}", f"To end that: {end}"]

    def text(self) -> str:
        title = painted(f"{self.key} on {self.host}", "title")
        checks = ["Checks", *(f"  {check.line}" for check in self.checks)]
        cause = self.cause()
        # what is open, the kernel knows
        is_open = cause in self.evidence() and not cause.startswith(WORKS) and self.way != "lo"
        last = painted(f"Most likely: {cause}", "title")
        trace = self.trace() if is_open else []
        return "\n".join([title, *self.about(), *self.rules(), *checks, *trace, last])

    def about(self) -> list[str]:
        """What the cluster says."""
        service = self.service
        if not service:
            return [f"  {self.cluster}"]
        policy = "Local" if service.local else "Cluster"
        affinity = "ClientIP" if service.sticky else "None"
        balanced = f" of class {BALANCER_CLASS}" * bool(service.balanced)
        lines = [f"type {service.type}{balanced}, externalTrafficPolicy {policy}"]
        lines[0] += f", sessionAffinity {affinity}"
        lines += [f"NodePorts: {list_node_ports(service.ports)}"]
        for name, text in service.annotations.items():
            strange = " (not one that epok knows)" * (name not in SERVICE_ANNOTATIONS)
            lines.append(f"{name}: {quoted(text)}{strange}")
        if service.source_ranges is not None:
            ranges = service.source_ranges.split(",")
            lines.append(f"loadBalancerSourceRanges: {enumerated(ranges)}")
        lines += [f"EXTERNAL-IP: {ips(found)}" for found in self.published.values()]
        lines += [f"pods: {self.pods()}"] if self.pods() else []
        lines += [self.taken] if self.taken else []
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines = [f"  {line}" for line in lines]
        if mappings := self.mappings():
            rows = [[printable(mapping), fate] for mapping, fate, _ in mappings]
            lines += ["Mappings", *aligned(rows, "  ")]
        if self.plan.claims:
            rows = []
            for node in self.snapshot.nodes:
                addresses, why = enumerated(map(str, node.addresses)), self.why_left_out(node)
                fate = f"left out: {why}" if why else "used"
                rows.append([node.name, addresses or "no address", fate])
            lines += ["Nodes", *aligned(rows, "  ")]
        return lines

    def rules(self) -> list[str]:
        """What the host does."""
        lines = ["Rules", f"  {self.title()}"]
        for live in self.lives:
            came = "not counted"
            if live.counts:
                came = f"{live.counts[0]} new {plural(live.counts[0], 'connection')}"
            lines.append(f"  {live} -> {live.text}, by {enumerated(live.ways)}: {came}")
            lines.append(f"    chain {live.chain}")
            counts = live.counts[1:] or "?" * len(live.targets)
            for target, number in zip(live.targets, counts, strict=True):
                lines.append(f"    to {target.address} port {target.port}: {number}")
            if live in self.flows:
                answered, waiting = self.flows[live]
                lines.append(f"    tracked now: {answered} answered, {waiting} waiting for that")
        lines += [] if self.lives else ["  none for this Service"]
        return lines + [f"  {line}" for line in self.to_come()]

    def document(self) -> dict[str, Any]:
        story: dict[str, Any] = {"service": self.key}
        if self.service:
            story |= {"annotations": dict(self.service.annotations), "pods": self.pods()}
        words = "mapping", "fate", "stands"
        story["mappings"] = [dict(zip(words, each, strict=True)) for each in self.mappings()]
        story["clusterNodes"] = []
        for node in self.snapshot.nodes:
            addresses, why = [*map(str, node.addresses)], self.why_left_out(node)
            made = {"name": node.name, "addresses": addresses, "used": not why, "why": why}
            story["clusterNodes"].append(made)
        return {**super().document(), **story, "cause": self.cause()}


def show(text: str) -> None:
    """Prints what was asked for; a reader that has seen enough, like head, is no error."""
    if sys.stdout is None:
        raise Fatal("standard output is closed")
    try:
        sys.stdout.buffer.write(f"{text}\n".encode(*CODING) if text else b"")
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise Fatal(f"standard output: {one_line(error)}") from None


# ------------------------------------------------ main: the pieces put together


class OneLine(logging.Formatter):
    """Keeps a log record on one line of ASCII, whatever a server or a host put into it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(f"{record.levelname.lower()}: {record.getMessage()}")


def start_log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    log.handlers, log.propagate = [handler], False
    log.setLevel("INFO")
    logging.captureWarnings(True)
    # or Python prints what libraries log, which comes as an exception too
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())


def warn(visit: Visit, forwards: Sequence[Forward]) -> None:
    """Warns about what makes forwards fail without a word; not to be able to look is no failure."""
    visit.patience = visit.deadline.to_look(0.5)
    with as_warning("; so what else may be in the way was not checked"):
        visit.look_around()
        for check in check_host(visit, forwards):
            if check.problem and check.sure:
                log.warning("%s", check.problem)


def publish(
    visit: Visit, planner: Planner | None, cleaning: Background | None
) -> list[Publication]:
    """Writes what the host forwards to the status of Services; --dry-run only says what it would.

    That it cannot is a warning, for the host is right. But a pod that cleans has a cluster.
    """
    publisher, clean = planner and planner.publisher, visit.options.clean
    try:
        if cleaning:
            publisher = cleaning.result(visit.deadline, "reading the cluster", 1.5)
        plan = planner.plan(visit.facts) if planner else Plan()
        return publisher.publish(visit.facts, plan, visit.deadline) if publisher else []
    except Fatal as error:
        if clean and in_pod():
            raise Fatal(f"{error}; the rules are gone, but Services still have addresses") from None
        log.warning("%s%s", error, "; Services may still have addresses" * clean)
        return []


def check_node(visit: Visit, planner: Planner) -> None:
    """Raises Fatal for a host that is taken, or was, for a node that it perhaps is not."""
    for check in check_pods(visit, planner):
        if check.problem:
            raise Fatal(f"{check.problem}; nothing was changed")
    found = visit.found
    if not visit.facts.interfaces and any(live.direct for live in all_lives(found, found)):
        raise Fatal(
            f"{visit.host.name}: its rules are those of a node, and it does not tell whether it is "
            "one any more: apt-get install iproute2; nothing was changed"
        )


def serve(visit: Visit, planner: Planner | None, cleaning: Background | None) -> Outcome:
    """Makes one host right, or says what would change. Raises Fatal."""
    host, options, deadline = visit.host, visit.options, visit.deadline
    outcome = Outcome(host.name)
    wanted: Wanted = {family.version: NOTHING for family in FAMILIES}
    forwards: list[Forward] = []
    with timed(outcome.seconds, "read"):
        facts = visit.facts
        if planner:
            wanted, forwards = planner.wanted(facts), planner.plan(facts).forwards
            check_node(visit, planner)
        found = visit.found
    if options.dry_run:
        warn(visit, forwards)
        outcome.shown = dry = DryRun(visit, wanted, publish(visit, planner, cleaning))
        outcome.status = 3 if dry.inputs else 0
        return outcome
    with timed(outcome.seconds, "swap"):
        inputs = converge(host, wanted, found, options, deadline)
    outcome.changes = changes = changes_between(found, wanted) if inputs else []
    prefix = f"{host.name}: " if options.executor == "ssh" else ""
    report_swap(prefix, found, wanted, inputs, changes, planner.taken(facts) if planner else "")
    publish(visit, planner, cleaning)
    warn(visit, forwards)
    flows = Deadline(deadline.remaining() / 2, "the time for UDP flows,")
    with as_warning("; UDP clients from before may stay where they were until the next run"):
        persist(flows, end_stale_flows, host, forwards, changes, facts, options, flows)
    if planner:
        planner.tell(events_of(changes, host.machine))
    if options.metrics_file:
        outcome.lives = all_lives(wanted, found)
    outcome.status = 0
    return outcome


def as_found(options: Options, found: Found) -> Options:
    """The options, and where they name no interfaces those, and addresses, of the live rules."""
    present = [tables for tables in found.values() if tables]
    ways = [way for tables in present for way in entries_in(tables)]
    if options.interfaces or not ways:
        return options
    rules = [rule for tables in present for rule in tables["nat"].chains.get(ROOT, ())]
    outer = re.findall(r"(?m)^-[io] (\S+) -j RETURN$", "\n".join(rules))[:1]
    return dataclasses.replace(
        options,
        interfaces=tuple(dict.fromkeys([*(interface for _, interface, _ in ways), *outer])),
        external_interface="".join(outer),
        addresses=to_networks(",".join(address for address, _, _ in ways if address)),
    )


def look(visit: Visit, planning: Background) -> Outcome:
    """Says what a host does, or all about one Service. Raises Fatal."""
    visit.options = as_found(visit.options, visit.found)
    explains = bool(visit.options.explain)
    status = Story(visit) if explains else Status(visit)
    failed, planner = False, None
    try:
        planner = planning.result(visit.deadline, "reading the cluster", 1.5)
        status.compare(planner, visit.facts)
    except Fatal as error:
        failed = explains
        status.cluster = f"not compared with the cluster: {error}"
    try:
        visit.look_around()
    except Fatal as error:
        visit.blind.append(str(error))
    if planner:
        status.checks += check_pods(visit, planner)
    status.checks += check_host(visit, status.forwards)
    status.flows = read_flows(visit, status.lives)
    status.checks += check_sight(visit)
    if explains:
        status.checks += check_nodes(visit, status.forwards)
    return Outcome(visit.name, int(failed), status)


def everywhere(task: Callable[[Visit], Outcome], visits: Sequence[Visit]) -> list[Outcome]:
    """Does a task on all hosts at the same time; one that fails holds none of the others back."""

    def work(visit: Visit) -> Outcome:
        try:
            return task(visit)
        finally:
            visit.host.close()

    outcomes = []
    for visit, thread in [(visit, Background(work, visit)) for visit in visits]:
        try:
            outcomes.append(thread.result(visit.deadline, visit.name, grace=2))
        except Fatal as error:
            log.error("%s", error)
            outcomes.append(Outcome(visit.name, error.status))
    return outcomes


def print_outcomes(outcomes: Iterable[Outcome], options: Options) -> None:
    shown = [outcome.shown for outcome in outcomes if outcome.shown]
    if options.output == "json":
        show(json.dumps({"hosts": [each.document() for each in shown]}, indent=2))
    elif shown:
        texts = filter(None, (each.text() for each in shown))
        show(("\n\n" if options.looks else "\n").join(texts))


def run(options: Options) -> int:
    started, deadline = time.monotonic(), Deadline(options.timeout)
    # what a host says must not wait for a cluster that does not answer
    patience = deadline.to_look()
    remote = [SshHost(login, options) for login in options.host]
    hosts: Sequence[Host] = remote or [LocalHost()]
    # the hosts are read while the API answers, and what shall be is computed
    visits = [Visit(host, options, deadline) for host in hosts]
    planner, cleaning = None, None
    try:
        if options.looks:
            planning = Background(Planner, options, patience)
            outcomes = everywhere(lambda visit: look(visit, planning), visits)
        else:
            if not options.clean:
                planner = Planner(options, deadline)
            elif at_hand(options):
                cleaning = Background(cluster_to_clean, options, patience)
            outcomes = everywhere(lambda visit: serve(visit, planner, cleaning), visits)
    except Fatal as error:
        log.error("%s", error)
        outcomes = [Outcome(host.name) for host in hosts]
    print_outcomes(outcomes, options)
    if options.metrics_file and not (options.looks or options.dry_run):
        took = time.monotonic() - started
        make = functools.partial(metrics_text, outcomes, planner, took)
        write_metrics(options.metrics_file, make)
    statuses = [outcome.status for outcome in outcomes]
    return 1 if 1 in statuses else max(statuses)


def main(argv: Sequence[str]) -> int:
    """Does one run; returns the exit status."""
    start_log()
    try:
        strange = list(strange_variables(os.environ))
        try:
            options = parse_options(argv, os.environ)
        except (SystemExit, BrokenPipeError):  # docopt has printed --help or --version
            show("")
            return 0
        except Fatal as error:  # perhaps for the lack of what such a variable was to say
            raise Fatal("; ".join([str(error), *strange]), error.status) from None
        log.setLevel(options.log_level.upper())
        for text in strange:
            log.warning("%s", text)
        # a thread of its own, so that a signal breaks off nothing but the wait for it
        running = Background(run, options)
        while running.is_alive():
            running.join(0.1)  # by steps: a signal given to another thread ends no wait
        return int(running.result(Deadline(0), "epok"))
    except Fatal as error:
        log.error("%s", error)
        return error.status
    except ModuleNotFoundError as error:  # kubernetes and paramiko, imported where they are needed
        log.error("the Python package %s is missing: %s", error.name, HOW_TO_INSTALL)
    except KeyboardInterrupt:
        log.error("interrupted; run epok again to be sure that the host is right")
    return 1


def share_heap() -> None:
    """Lets all threads have one heap: what one of them has dropped, others use again.

    Only the C library of GNU has one for each.
    """
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX


if __name__ == "__main__":
    share_heap()
    # a short run makes much and drops little: not to look for cycles often saves time
    gc.set_threshold(100_000)
    # of which a quit would leave the memory, keys too, in a file
    ends = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT
    for number in ends:
        if signal.getsignal(number) == signal.SIG_DFL:  # not if it is to be ignored, as of nohup
            signal.signal(number, signal.default_int_handler)
    status = 1
    # registered first, this comes last, behind what ends a login plugin that still runs: without
    # it Python may crash while it takes down what a waiting thread still uses
    atexit.register(lambda: os._exit(status))
    status = main(sys.argv[1:])
    for number in ends:
        signal.signal(number, signal.SIG_IGN)  # all is done, and the exit status says how
