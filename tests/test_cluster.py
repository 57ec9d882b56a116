"""What epok does when the Kubernetes API, or a file in its place, is not what it should be.

Before each fault the rules of a good run are in place; a run that cannot read all of the cluster must leave
every byte of them alone, and say in one line what is wrong.
"""

import contextlib
import copy
import datetime
import email.utils
import functools
import gzip
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import epok
from conftest import faults, often
from lab.authority import Authority
from lab.clock import set_clock
from lab.fake_api import (
    ALWAYS,
    MISSING,
    TOKEN,
    Behaviour,
    Exchange,
    FakeApi,
    answer,
    closing_unannounced,
    cut,
    cut_in_chunks,
    dripping_body,
    dripping_head,
    edited,
    failure,
    hanging_up,
    silent,
    silent_after_head,
    truncated,
    write_kubeconfig,
)
from lab.machine import latest_end, stretched
from lab.network import PROGRAM, Lab, bare_environment
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, snapshot

pytestmark = pytest.mark.parametrize("lab", ["nft"], indirect=True)
fault = faults("API faults")

LITTLE = ["prlimit", "--data=1000000000"]  # bytes of memory; who needs more ends in a traceback
HOPELESS = 3  # --timeout of runs that cannot succeed
PLENTY = 60  # and of those that can
LEVELS = ("debug", "info", "warning", "error")
NODES = [node(f"node{n}", f"10.0.0.{10 + n}", f"2001:db8:2::{10 + n}") for n in (1, 2, 3)]
WEB = service("web", "8080:30080", [port(80, 30080)])
MAIL = service("mail", "25:2025", [port(25, 2025)])
LOCAL_MAIL = service("mail", "25:2025", [port(25, 2025)], policy="Local")
MAIL_SLICE = endpoint_slice("mail", [endpoint("node2", "10.244.1.5")])
ATTACKS = {
    "rule": 'mail"\n-A INPUT -j ACCEPT\n#',
    "newline": "mail\n",
    "double quote": 'ma"il',
    "single quote": "ma'il",
    "space": "ma il",
    "backslash": "mail\\",
    "NUL": "ma\0il",
    "slash": "default/../mail",
    "letter that is not ASCII": "ma\u0131l",
    "half a letter": "ma\ud800il",
    "too long": "m" * 300,
}


class Run(NamedTuple):
    status: int
    out: str
    log: str
    seconds: float
    timeout: int


def run(
    lab: Lab,
    *args: str,
    stdin: "str | None" = "",
    env: "dict[str, str] | None" = None,
    timeout: int = PLENTY,
    through: "list[str] | None" = None,
) -> Run:
    """epok -i eth0 ... local on the host; with stdin None its standard input stays open and silent.

    Whatever happens, it ends soon after its timeout, every line of its log is one line, and none has the token. Where
    everything takes longer the timeout is longer too, so that a run comes to what it cannot do.
    """
    timeout = stretched(timeout)
    clean = {name: text for name, text in bare_environment().items() if not name.lower().endswith("_proxy")}
    argv = [
        *(through or []),
        *PROGRAM,
        "-i",
        "eth0",
        "-v",
        "--timeout",
        str(timeout),
        *args,
        "local",
    ]
    start = time.monotonic()
    with lab.host.popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**clean, **(env or {})}
    ) as child:
        try:
            if stdin is None:
                child.wait(timeout + 300)
            out, log = child.communicate(stdin, timeout + 300)
        except subprocess.TimeoutExpired:
            child.kill()
            pytest.fail(f"epok was still running 300 s after its --timeout {timeout}")
        done = Run(child.returncode, out, log, time.monotonic() - start, timeout)
    assert "Traceback" not in out + log, log
    assert TOKEN not in out + log
    assert len(log) < 100_000
    for line in log.splitlines():
        assert re.fullmatch(rf"({'|'.join(LEVELS)}): [ -~]+", line), f"no line of a log: {line!r}"
    assert done.seconds < latest_end(timeout), f"--timeout {timeout} took {done.seconds:.1f} s\n{log}"
    return done


def errors(done: Run) -> list[str]:
    return [line for line in done.log.splitlines() if line.startswith("error: ")]


def saved(lab: Lab) -> str:
    return lab.saved(4) + lab.saved(6)


def targets(lab: Lab) -> set[str]:
    """ADDRESS:NODEPORT of all that the host forwards to."""
    return set(re.findall(r"--to-destination (\S+)", lab.saved()))


def on_nodes(node_port: int, *numbers: int) -> set[str]:
    return {f"10.0.0.{10 + number}:{node_port}" for number in numbers or (1, 2, 3)}


@pytest.fixture(scope="module")
def good(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The rules, IPv4's and IPv6's, that a good run makes of WEB."""
    lab.flush()
    with FakeApi(lab.host, *NODES, WEB) as api:
        done = run(lab, "--kubeconfig", write_kubeconfig(tmp_path_factory.mktemp("good") / "config", api.url))
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(30080)
    return lab.saved(4), lab.saved(6)


@pytest.fixture
def before(lab: Lab, good: tuple[str, str], flushed: None) -> str:
    """The rules of that run, in place again."""
    for tool, text in zip(("iptables-restore", "ip6tables-restore"), good, strict=True):
        lab.host.run([tool, "--wait", "5"], text)
    assert saved(lab) == "".join(good)
    return "".join(good)


@pytest.fixture
def api(lab: Lab, before: str) -> Iterator[FakeApi]:
    """An API that has MAIL instead of WEB by now."""
    with FakeApi(lab.host, *NODES, MAIL) as made:
        yield made


@pytest.fixture
def config(api: FakeApi, tmp_path: Path) -> str:
    return write_kubeconfig(tmp_path / "config", api.url)


def assert_failed(lab: Lab, done: Run, before: str, *says: str) -> str:
    """Exit status 1, rules untouched, and one error that matches all of `says`, which is returned."""
    assert saved(lab) == before, f"the rules are others now\n{done.log}"
    assert done.status == 1, done.log
    assert len(errors(done)) == 1, done.log
    for words in says:
        assert re.search(words, errors(done)[0]), f"not in the error: {words}\n{errors(done)[0]}"
    return errors(done)[0]


def forbidden(resource: str, group: str = "") -> Behaviour:
    return failure(
        403,
        "Forbidden",
        f'{resource} is forbidden: User "system:serviceaccount:kube-system:epok" cannot '
        f'list resource "{resource}" in API group "{group}" at the cluster scope',
    )


# ---- faults that stay

HTML = "<!DOCTYPE html><html><head><title>Sign in</title></head>\n<body>caf\u00e9 \x1b[31m</body></html>"
SERVICES, NODE_LIST, SLICES = "services", "nodes", "endpointslices"
SECOND = range(2, 1_000_000)
FROM_API = r"\bcluster\b|endpointslices|127\.0\.0\.1:"  # and not the host that the rules are for
expired = failure(
    410,
    "Expired",
    "The provided continue parameter is too old to display a consistent list result.",
    **{"continue": "inconsistent"},
)


def endless(exchange: Exchange) -> None:
    edited(metadata={"continue": "0=again"})(exchange)


def moving(exchange: Exchange) -> None:
    """Each page is of another time, so that what moves to a page that was read already is on none."""
    meta = json.loads(exchange.body)["metadata"]
    edited(metadata={**meta, "resourceVersion": str(time.monotonic_ns())})(exchange)


def on_and_on(piece: bytes, begin: bytes = b"", **headers: object) -> Behaviour:
    """Begins an answer, with these headers or else as `begin` does, and then sends the same again as fast as it can."""

    def behave(exchange: Exchange) -> None:
        exchange.head(200, **headers) if headers else exchange.write(begin)
        while not exchange.api.closing.is_set():
            exchange.write(piece)

    return behave


def with_port(text: str) -> Behaviour:
    """The right answer with this in the place of a NodePort."""

    def behave(exchange: Exchange) -> None:
        answer(200, exchange.body.replace(b'"nodePort": 2025', f'"nodePort": {text}'.encode()))(exchange)

    return behave


def then_hang_up(data: bytes, **headers: object) -> Behaviour:
    def behave(exchange: Exchange) -> None:
        if headers:
            exchange.head(200, **headers)
        exchange.write(data)
        exchange.hang_up()

    return behave


BLANKS = b" " * (1 << 20)
BLANK_CHUNK = b"100000\r\n" + BLANKS + b"\r\n"


FAULTS_OF_A_KIND: "dict[str, Any]" = {  # that FAULTS has one of already
    "nodes that change between pages": (moving, ["nodes changed between two pages"], NODE_LIST),
    "a body that cannot be unpacked": (answer(200, BLANKS, Content_Encoding="gzip"), ["decode"]),
    "headers without end": (on_and_on(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n"), ["headers"]),
    "a header without end": (on_and_on(BLANKS, b"HTTP/1.1 200 OK\r\nX: "), ["header line"]),
    "another protocol": (then_hang_up(b"SSH-2.0-OpenSSH_9.2\r\n"), ["SSH-2.0"]),
    "noise": (then_hang_up(bytes(range(256)) * 99), [r"(?i)status ?line"]),
    "a status of five digits": (then_hang_up(b"HTTP/1.1 20000 OK\r\n\r\n"), ["20000"]),
    "two lengths": (then_hang_up(b"12345", Content_Length="5, 6"), ["Content-Length"]),
    "a chunk of no length": (then_hang_up(b"zz\r\n", Transfer_Encoding="chunked"), ["(?i)incomplete|chunk"]),
    "a number that is none": (with_port("NaN"), ["nodePort"]),
}
FAULTS: "dict[str, Any]" = {
    "silence": (silent, ["(?i)time"]),
    "headers and then silence": (silent_after_head, ["(?i)time"]),
    "headers that drip": (dripping_head, ["(?i)time"]),
    "a body that drips": (dripping_body, ["(?i)time"]),
    "a list without end": (endless, ["(?i)time"]),
    "a connection closed at once": (hanging_up, ["(?i)clos|abort|connection"]),
    "401": (failure(401, "Unauthorized", "Unauthorized"), ["401", "credential|token"]),
    "403": (forbidden("services"), ["403", r"\blist\b", r"\bservices\b", "system:serviceaccount:kube-system:epok"]),
    "403 for nodes": (forbidden("nodes"), ["403", r"\blist\b", r"\bnodes\b", "kube-system:epok"], NODE_LIST),
    "403 from a proxy": (answer(403, HTML), ["403", r"\blist\b", r"\bservices\b"]),
    "404": (failure(404, "NotFound", "the server could not find the requested resource"), ["404", "services"]),
    "418": (answer(418, "short and stout"), ["418"]),
    "301": (answer(301, Location="/elsewhere"), ["301"]),
    "429 for an hour": (answer(429, "", Retry_After=3600), ["429"]),
    "500": (failure(500, "InternalError", "etcdserver: leader changed"), ["500"]),
    "503 without a body": (answer(503), ["503"]),
    "a token that always expires": (expired, ["(?i)expired|410"], SERVICES, SECOND),
    "a body always cut off": (cut, ["(?i)incomplete|connection|broken|read"]),
    "chunks always cut off": (cut_in_chunks, ["(?i)incomplete|connection|broken|read|chunk"]),
    "JSON cut short": (truncated, ["JSON"]),
    "HTML": (answer(200, HTML, Content_Type="text/html"), ["JSON|ServiceList"]),
    "nothing": (answer(200), ["JSON|ServiceList"]),
    "not UTF-8": (answer(200, b'{"kind": "ServiceList", "items": [], "x": "\xff\xfe"}'), ["JSON|UTF"]),
    "a Status": (failure(200, "", "fine"), ["ServiceList"]),
    "a PodList": (edited(kind="PodList"), ["ServiceList"]),
    "a list in a list": (answer(200, b"[[]]"), ["ServiceList"]),
    "items null": (edited(items=None), ["ServiceList"]),
    "items missing": (edited(items=MISSING), ["ServiceList"]),
    "items a text": (edited(items="none"), ["ServiceList", "items"]),
    "items an object": (edited(items={}), ["ServiceList", "items"]),
    "metadata a text": (edited(metadata="none"), ["ServiceList", "metadata"]),
    "continue a number": (edited(metadata={"continue": 5}), ["ServiceList", "continue"]),
    "nested deeply": (answer(200, "[" * 200_000), ["(?i)JSON|nest"]),
    "an item nested deeply": (
        answer(200, '{"kind": "ServiceList", "items": [{"metadata": ' + '{"a": ' * 200_000),
        ["(?i)JSON|nest"],
    ),
    "no nodes": (edited(items=[]), [r"\bno node\b"], NODE_LIST),
    "a second page of 500": (answer(500), ["500"], SERVICES, SECOND),
    "a second page of HTML": (answer(200, HTML), ["JSON|ServiceList"], SERVICES, SECOND),
    "a second page of silence": (silent, ["(?i)time"], SERVICES, SECOND),
    "a second page without items": (edited(items=MISSING), ["ServiceList"], SERVICES, SECOND),
    "nodes of 500": (answer(500), ["500"], NODE_LIST),
    "nodes of silence": (silent, ["(?i)time"], NODE_LIST),
    "nodes' second page of 500": (answer(500), ["500"], NODE_LIST, SECOND),
    "403 for endpoints": (
        forbidden("endpointslices", "discovery.k8s.io"),
        ["403", r"\blist\b", "endpointslices", "discovery.k8s.io", "kube-system:epok"],
        SLICES,
    ),
    "404 for endpoints": (failure(404, "NotFound", "not here"), ["404", "endpointslices"], SLICES),
    "endpoints of 500": (answer(500), ["500"], SLICES),
    "endpoints of silence": (silent, ["(?i)time", FROM_API], SLICES),
    "a list that changes between pages": (moving, ["services changed between two pages"]),
    "another version of the API": (edited(apiVersion="v2"), ["ServiceList of v1"]),
    "no version": (edited(apiVersion=MISSING), ["ServiceList of v1"]),
    "resourceVersion a number": (edited(metadata={"resourceVersion": 5}), ["ServiceList", "resourceVersion"]),
    "100 Continue without end": (on_and_on(b"HTTP/1.1 100 Continue\r\n\r\n"), ["(?i)time"]),
    "redirects without end": (answer(302, Location="/api/v1/services?limit=500"), ["302"]),
    "a chunk of less than nothing": (then_hang_up(b"-5\r\n", Transfer_Encoding="chunked"), ["length|chunk"]),
    "a number that is too large": (with_port("1e999"), ["nodePort"]),
    "a number of 5000 digits": (with_port("9" * 5000), ["JSON"]),
    "endpoints that drip": (dripping_body, ["(?i)time", FROM_API], SLICES),
    **(FAULTS_OF_A_KIND if often(0, big=1) else {}),
}


@pytest.mark.parametrize(
    "behaviour, says, where, at",
    [pytest.param(*(*fault, *(SERVICES, ALWAYS)[len(fault) - 2 :]), id=name) for name, fault in FAULTS.items()],
)
@fault
def test_a_fault_leaves_the_rules_alone(
    lab: Lab, api: FakeApi, config: str, before: str, behaviour: Behaviour, says: list[str], where: str, at: range
) -> None:
    api.page_size = 1
    api.objects += [service("more"), LOCAL_MAIL | {"metadata": LOCAL_MAIL["metadata"] | {"name": "local"}}, MAIL_SLICE]
    api.misbehave(where, behaviour, at)
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, *says)
    assert "/elsewhere" not in [request.url for request in api.requests]


TOO_LARGE = {
    "a body without end": on_and_on(BLANKS, Connection="close"),
    "chunks without end": on_and_on(BLANK_CHUNK, Transfer_Encoding="chunked"),
    "a body larger than all memory": on_and_on(BLANKS, Content_Length=10**15),
    "a small body that unpacks to 2 GB": answer(200, gzip.compress(BLANKS) * 2_000, Content_Encoding="gzip"),
}


@pytest.mark.parametrize("behaviour", TOO_LARGE.values(), ids=TOO_LARGE)
@fault
def test_an_answer_without_end_does_not_fill_the_memory(
    lab: Lab, api: FakeApi, config: str, before: str, behaviour: Behaviour
) -> None:
    api.misbehave("services", behaviour)
    done = run(lab, "--kubeconfig", config, through=LITTLE)
    assert_failed(lab, done, before, "more than 64 MiB in one answer")


@pytest.mark.parametrize("status", [401, 403, 404])
@fault
def test_what_cannot_get_better_is_not_tried_again(
    lab: Lab, api: FakeApi, config: str, before: str, status: int
) -> None:
    api.misbehave("services", failure(status, "Whatever", "no"))
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, str(status))
    assert len(api.asked("services")) == 1


@fault
def test_an_api_that_is_down_is_not_hammered(lab: Lab, api: FakeApi, config: str, before: str) -> None:
    api.misbehave("services", answer(503))
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "503")
    assert 2 <= len(api.asked("services")) <= 12


@fault
def test_a_dry_run_that_cannot_read_the_cluster_fails_too(lab: Lab, api: FakeApi, config: str, before: str) -> None:
    api.misbehave("services", answer(503))
    done = run(lab, "--dry-run", "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, "503")
    assert not done.out


EVENT_FAULTS = {
    "silence": (silent, "(?i)time"),
    "an answer that drips": (dripping_head, "(?i)time"),
    "500": (answer(500), "500"),
    "429 for an hour": (answer(429, "", Retry_After=3600), "429"),
    "401": (failure(401, "Unauthorized", "Unauthorized"), "401"),
    "403": (failure(403, "Forbidden", "events is forbidden"), r"403.*\bpatch\b.*\bevents\b"),
    "422": (failure(422, "Invalid", "no good Event"), "422.*no good Event"),
    "a connection closed at once": (hanging_up, "(?i)clos|abort|connection"),
    "HTML": (answer(200, HTML), "JSON"),
    "nothing": (answer(200), "JSON"),
    "a list": (answer(200, "[]"), "Event"),
    "a count that is none": (answer(200, {"count": "many"}), "Event.count"),
}


@pytest.mark.parametrize("behaviour, says", EVENT_FAULTS.values(), ids=EVENT_FAULTS)
@fault
def test_events_that_cannot_be_written_are_one_warning_in_time(
    lab: Lab, api: FakeApi, config: str, behaviour: Behaviour, says: str
) -> None:
    api.objects.append(service("typo", "443:htps", [port(443, 30443, "https")]))
    api.misbehave("events", behaviour)
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    rejected, warning = [line for line in done.log.splitlines() if line.startswith("warning: ")]
    assert "rejected" in rejected
    assert re.search(says, warning), warning
    assert targets(lab) == on_nodes(2025)
    assert done.seconds < done.timeout / 2


@pytest.mark.parametrize("behaviour", [answer(404), answer(409)], ids=["namespace gone", "told by another"])
def test_an_event_that_has_no_place_any_more_is_no_warning(
    lab: Lab, api: FakeApi, config: str, behaviour: Behaviour
) -> None:
    api.misbehave("events", behaviour)
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0
    assert "warning: " not in done.log
    assert len(api.asked("events")) == 2


def test_clean_needs_no_cluster(lab: Lab, api: FakeApi, config: str) -> None:
    api.misbehave("services", silent)
    done = run(lab, "--clean", "--kubeconfig", config, timeout=5)
    assert done.status == 0
    why = "(no answer within|Read timed out).*"
    assert re.search(f"(?m)^warning: .*{why}; Services may still have addresses$", done.log), done.log[-600:]
    assert "EPOK" not in saved(lab)


# ---- faults that go away


def in_two_seconds() -> str:
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2), usegmt=True)


def busy_until(exchange: Exchange) -> None:
    answer(429, Retry_After=in_two_seconds())(exchange)


PASSING = {
    "429, number": (answer(429, Retry_After=1), SERVICES, {1}),
    "429, date": (busy_until, SERVICES, {1}),
    "429, nonsense": (answer(429, Retry_After="soon"), SERVICES, {1}),
    "429, nothing": (answer(429), SERVICES, {1}),
    "500": (failure(500, "InternalError", "etcdserver: request timed out"), SERVICES, {1}),
    "502": (answer(502, HTML), SERVICES, {1}),
    "503": (answer(503), SERVICES, {1}),
    "504": (answer(504), SERVICES, {1}),
    "503 for nodes": (answer(503), NODE_LIST, {1}),
    "503 for endpoints": (answer(503), SLICES, {1}),
    "500 on page 2": (answer(500), SERVICES, {2}),
    "410 on page 2": (expired, SERVICES, {2}),
    "410 on page 2 of nodes": (expired, NODE_LIST, {2}),
    "body cut off": (cut, SERVICES, {1}),
    "body cut off on page 2": (cut, SERVICES, {2}),
    "chunks cut off": (cut_in_chunks, SERVICES, {1}),
    "closed at once": (hanging_up, SERVICES, {1, 2}),
    "page 2 of another time": (edited(metadata={"resourceVersion": "4712"}), SERVICES, {2}),
    "closed after each answer": (closing_unannounced, SERVICES, ALWAYS),
}


@pytest.mark.parametrize("behaviour, where, at", PASSING.values(), ids=PASSING)
@fault
def test_a_fault_that_passes_is_got_over(
    lab: Lab, api: FakeApi, config: str, behaviour: Behaviour, where: str, at: "set[int] | range"
) -> None:
    api.page_size = 1
    api.objects += [
        service("more"),
        service("web", "8080:30080", [port(80, 30080)], policy="Local"),
        endpoint_slice("web", [endpoint("node3", "10.244.2.7")]),
    ]
    api.misbehave(where, behaviour, at)
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert not errors(done)
    assert targets(lab) == on_nodes(2025) | on_nodes(30080, 3)
    assert lab.ask(25).port == 2025


@pytest.mark.parametrize("behaviour", [answer(429, Retry_After=1), busy_until], ids=["number", "date"])
def test_retry_after_is_waited_for(lab: Lab, api: FakeApi, config: str, behaviour: Behaviour) -> None:
    api.misbehave("services", behaviour, at={1})
    assert run(lab, "--kubeconfig", config).status == 0
    first, second = api.asked("services")
    assert 0.95 < second.time - first.time < 4


def test_an_expired_token_starts_the_list_over(lab: Lab, api: FakeApi, config: str) -> None:
    """From the first page: the token that comes with a 410 would continue an inconsistent list."""
    api.page_size = 1
    api.objects += [service("more"), WEB]
    api.misbehave("services", expired, at={3})
    assert run(lab, "--kubeconfig", config).status == 0
    tokens = [request.query.get("continue", "first") for request in api.asked("services")]
    assert tokens == ["first", *(2 * [f"{page}=&+/%41 x" for page in (1, 2)])][:3] + [
        "first",
        *(f"{page}=&+/%41 x" for page in (1, 2)),
    ]
    assert targets(lab) == on_nodes(2025) | on_nodes(30080)


@pytest.mark.parametrize("hours", [6, -6])
@faults("host faults")
def test_a_clock_that_is_set_makes_no_run_shorter_or_longer(
    lab: Lab, api: FakeApi, config: str, before: str, tmp_path: Path, hours: int
) -> None:
    env = set_clock(tmp_path, hours)
    api.misbehave("services", silent, {1})
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS, env=env)
    assert_failed(lab, done, before, "(?i)time")
    assert done.seconds > HOPELESS - 0.5
    api.faults.clear()
    api.misbehave("services", answer(429, Retry_After=1), {1})
    assert run(lab, "--kubeconfig", config, env=env).status == 0
    assert targets(lab) == on_nodes(2025)


# ---- connections that do not come about


def certificate(
    directory: Path, name: str = "127.0.0.1", days: int = 1, strict: bool = True
) -> tuple[str, ssl.SSLContext]:
    """The file of a new authority, and what a server needs to show a certificate of it."""
    authority = Authority(strict)
    file, server = directory / "ca.pem", directory / "server.pem"
    file.write_bytes(authority.pem)
    server.write_bytes(authority.issue("server", name, days=days))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)
    return str(file), context


@pytest.mark.parametrize(
    "trusted, name, days",
    [
        pytest.param(False, "127.0.0.1", 1, id="unknown authority"),
        pytest.param(True, "192.0.2.7", 1, id="another server's"),
        pytest.param(True, "127.0.0.1", -1, id="expired"),
    ],
)
@fault
def test_a_wrong_certificate_is_refused(
    lab: Lab, before: str, tmp_path: Path, trusted: bool, name: str, days: int
) -> None:
    file, context = certificate(tmp_path, name, days)
    authority = {"certificate-authority": file} if trusted else {}
    with FakeApi(lab.host, *NODES, MAIL, tls=context) as api:
        config = write_kubeconfig(tmp_path / "config", api.url, cluster=authority)
        done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
        assert_failed(lab, done, before, "(?i)certificate", re.escape(api.address.partition(":")[2]))
        assert not api.requests


@pytest.mark.parametrize("strict", [True, False])
def test_a_trusted_certificate_is_accepted(lab: Lab, before: str, tmp_path: Path, strict: bool) -> None:
    file, context = certificate(tmp_path, strict=strict)
    with FakeApi(lab.host, *NODES, MAIL, tls=context) as api:
        config = write_kubeconfig(tmp_path / "config", api.url, cluster={"certificate-authority": file})
        assert run(lab, "--kubeconfig", config).status == 0
    assert targets(lab) == on_nodes(2025)


def test_a_certificate_that_nobody_checks_keeps_the_log_in_shape(lab: Lab, before: str, tmp_path: Path) -> None:
    _, context = certificate(tmp_path)
    with FakeApi(lab.host, *NODES, MAIL, tls=context) as api:
        config = write_kubeconfig(tmp_path / "config", api.url, cluster={"insecure-skip-tls-verify": True})
        assert run(lab, "--kubeconfig", config).status == 0


@fault
def test_plain_http_where_tls_was_expected_fails(lab: Lab, api: FakeApi, before: str, tmp_path: Path) -> None:
    config = write_kubeconfig(tmp_path / "config", f"https://{api.address}")
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, "SSL|TLS", re.escape(api.address.partition(":")[2]))


def test_a_certificate_of_an_authority_that_the_machine_trusts_is_accepted(
    lab: Lab, before: str, tmp_path: Path
) -> None:
    file, context = certificate(tmp_path)
    with FakeApi(lab.host, *NODES, MAIL, tls=context) as api:
        config = write_kubeconfig(tmp_path / "config", api.url)
        assert run(lab, "--kubeconfig", config, env={"SSL_CERT_FILE": file}).status == 0
        assert run(lab, "--kubeconfig", config, timeout=HOPELESS).status == 1


@fault
def test_a_tls_server_that_hangs_up_at_first_is_tried_again(lab: Lab, before: str, tmp_path: Path) -> None:
    file, context = certificate(tmp_path)
    with FakeApi(lab.host, *NODES, MAIL, tls=context, dropped=2) as api:
        config = write_kubeconfig(tmp_path / "config", api.url, cluster={"certificate-authority": file})
        done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert done.log.count("trying again") == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7),
        ("", 0),
        ("soon", 0),
        ("-3", 0),
        ("9" * 400, 21600),
        ("Wed, 99999999999999999999 Oct 2015 07:28:00 GMT", 21600),
    ],
)
def test_any_retry_after_is_a_number_of_seconds(lab: Lab, text: str, seconds: float) -> None:
    assert epok.retry_after(text) == seconds


@fault
def test_a_refused_connection_fails(lab: Lab, api: FakeApi, config: str, before: str) -> None:
    api.close()
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, "(?i)refused", re.escape(api.address))


@fault
def test_a_connection_refused_at_first_is_got_over(lab: Lab, before: str, tmp_path: Path) -> None:
    with FakeApi(lab.host, *NODES, MAIL, delay=2) as api:
        done = run(lab, "--kubeconfig", write_kubeconfig(tmp_path / "config", api.url))
        assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025)


@fault
def test_a_server_that_drops_packets_fails(lab: Lab, before: str, tmp_path: Path) -> None:
    """Its queue of connections is full, so that Linux ignores each SYN."""
    with contextlib.ExitStack() as stack, lab.host.entered():
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        address = f"127.0.0.1:{server.getsockname()[1]}"
        config = write_kubeconfig(tmp_path / "config", f"http://{address}")
        assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "(?i)time", address)


@fault
def test_a_name_server_that_never_answers_fails(lab: Lab, before: str, tmp_path: Path) -> None:
    """A resolver waits 5 seconds and more, whatever the time limit of the connection is."""
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    config = write_kubeconfig(tmp_path / "config", "https://api.cluster.example:6443")
    with lab.host.entered():
        silence = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with silence:
        silence.bind(("127.0.0.1", 53))
        through = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$0" /etc/resolv.conf; exec "$@"', str(resolv)]
        done = run(lab, "--kubeconfig", config, timeout=HOPELESS, through=through)
        assert silence.recv(1000)
    assert_failed(lab, done, before, "(?i)time|resol", r"api\.cluster\.example")


# ---- what is asked for


def test_the_token_is_sent(lab: Lab, api: FakeApi, config: str) -> None:
    assert run(lab, "--kubeconfig", config).status == 0
    assert {request.authorization for request in api.requests} == {f"Bearer {TOKEN}"}


def test_1200_services_are_read_in_pages(lab: Lab, api: FakeApi, config: str) -> None:
    numbers = range(1200)
    api.objects = [*NODES, *(service(f"s{n}", f"{2000 + n}:{30000 + n}", [port(80, 30000 + n)]) for n in numbers)]
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert targets(lab) == set().union(*(on_nodes(30000 + n) for n in numbers))
    assert lab.ask(2009).port == 30009
    lists = [request for request in api.requests if request.resource != "events"]
    assert [request.query["limit"] for request in lists] == ["500"] * 4
    assert [len(api.asked(resource)) for resource in (SERVICES, NODE_LIST, SLICES)] == [3, 1, 0]


def test_endpoints_are_not_asked_for_without_need(lab: Lab, api: FakeApi, config: str) -> None:
    """Nor for a Service with externalTrafficPolicy Local that is not forwarded."""
    api.objects.append(service("local", None, [port(80, 30080)], policy="Local"))
    assert run(lab, "--kubeconfig", config).status == 0
    assert not api.asked(SLICES)


def many_local(count: int) -> list[Object]:
    """Services with long names on the first node alone, and one without an annotation on the second."""
    names = [f"{n:03}-{'x' * 53}" for n in range(count)]
    return [
        *NODES,
        *(
            service(name, f"{2000 + n}:{30000 + n}", [port(80, 30000 + n)], policy="Local")
            for n, name in enumerate(names)
        ),
        *(endpoint_slice(name, [endpoint("node1", "10.244.0.5")]) for name in names),
        MAIL_SLICE,
    ]


@pytest.mark.parametrize("count", [1, 3, 300])
def test_endpoints_of_a_few_services_are_asked_for_by_name(lab: Lab, api: FakeApi, config: str, count: int) -> None:
    """Of many they are not: the URL would be too long."""
    api.objects = many_local(count)
    assert run(lab, "--kubeconfig", config).status == 0
    assert targets(lab) == set().union(*(on_nodes(30000 + n, 1) for n in range(count)))
    asked = api.asked(SLICES)
    assert ["labelSelector" in request.query for request in asked] == [count < 10]
    assert all(len(request.url) < 8000 for request in asked)


def test_an_endpoint_slice_may_have_a_long_name(lab: Lab, api: FakeApi, config: str) -> None:
    """Kubernetes allows 253 characters, unlike for Services."""
    api.objects = [*NODES, LOCAL_MAIL, endpoint_slice("mail", [endpoint("node2", "10.244.1.5")], suffix="x" * 200)]
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025, 2)


@fault
def test_objects_that_two_pages_repeat_count_once(lab: Lab, api: FakeApi, config: str) -> None:
    api.page_size = 2
    api.objects = [
        NODES[0],
        NODES[1],
        NODES[1],
        NODES[2],
        NODES[0],
        LOCAL_MAIL,
        WEB,
        WEB,
        LOCAL_MAIL,
        WEB,
        MAIL_SLICE,
        MAIL_SLICE,
        MAIL_SLICE,
    ]
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert "warning: rejected" not in done.log
    assert targets(lab) == on_nodes(2025, 2) | on_nodes(30080)
    assert sorted(re.findall(r"--to-destination (\S+)", lab.saved())) == sorted(targets(lab))


@pytest.mark.parametrize(
    "other",
    [
        service("mail", "26:2025", [port(25, 2025)]),
        service("mail", "25:2026", [port(25, 2026)]),
        node("node2", "10.0.0.99"),
    ],
    ids=["another mapping", "another NodePort", "another address"],
)
@fault
def test_objects_that_come_twice_and_differ_stop_the_run(
    lab: Lab, api: FakeApi, config: str, before: str, other: Object
) -> None:
    api.page_size = 1
    api.objects.append(other)
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, rf"{other['kind']} \S*{other['metadata']['name']} twice")


def test_services_without_annotations_take_the_forwards_away(lab: Lab, api: FakeApi, config: str) -> None:
    api.objects = [*NODES, service("web", None, [port(80, 30080)])]
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert not targets(lab)


def test_no_services_at_all_take_the_forwards_away(lab: Lab, api: FakeApi, config: str) -> None:
    api.objects = [*NODES]
    assert run(lab, "--kubeconfig", config).status == 0
    assert not targets(lab)


# ---- what the objects contain


def changed(made: Object, path: str, value: Any) -> Object:
    """A copy with another value, or none, at a path like "spec ports 0 port"; "" is the whole object."""
    if not path:
        return {"kind": made["kind"], "raw": value}
    copied: Any = copy.deepcopy(made)
    *way, last = [int(word) if word.isdigit() else word for word in path.split()]
    inner = functools.reduce(lambda inner, key: inner[key], way, copied)
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return copied  # type: ignore[no-any-return]


ANNOTATION = "metadata annotations getbetter.ro/externalport"
NULL_OR_MISSING = {"null": None, "missing": MISSING}


def full_service(name: str, number: int) -> Object:
    """One that has every field, with port 3000 + number."""
    made = service(
        name,
        f"{3000 + number}:{30000 + number}",
        [port(80, 30000 + number, "http")],
        policy="Local",
        loadBalancerSourceRanges=["192.0.2.0/24"],
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 10800}},
        annotations={"epok.getbetter.ro/internal": ""},
    )
    return changed(made, "metadata labels", {"app": name})


def full_node(name: str, address: str) -> Object:
    return node(name, address, taints=[{"key": "example.org/x", "effect": "NoSchedule", "value": "y"}])


def full_slice(name: str, node_name: str, suffix: str) -> Object:
    ports = [{"name": "http", "port": 8080, "protocol": "TCP"}]
    return endpoint_slice(name, [endpoint(node_name, "10.244.0.5")], ports, suffix=suffix)


# The nodes that a Service's forward goes to when it lacks a field: its one endpoint is on the second.
WITHOUT_SERVICE_FIELD = {
    **dict.fromkeys(["metadata annotations", ANNOTATION, "spec", "spec type", "spec ports"], ()),
    **dict.fromkeys(["spec ports 0 nodePort"], ()),
    **dict.fromkeys(["spec externalTrafficPolicy"], (1, 2, 3)),
    **dict.fromkeys(["metadata labels", "metadata creationTimestamp", "metadata uid", "status"], (2,)),
    **dict.fromkeys(["metadata annotations epok.getbetter.ro/internal", "status loadBalancer"], (2,)),
    **dict.fromkeys(["spec ports 0 name", "spec ports 0 protocol", "spec ports 0 targetPort"], (2,)),
    **dict.fromkeys(["spec ipFamilies", "spec ipFamilyPolicy", "spec clusterIP"], (2,)),
    **dict.fromkeys(["spec sessionAffinity", "spec sessionAffinityConfig", "spec loadBalancerSourceRanges"], (2,)),
}
# Whether a node is used that lacks a field.
WITHOUT_NODE_FIELD = {
    **dict.fromkeys(["status", "status addresses", "status conditions", "status conditions 1 status"], False),
    **dict.fromkeys(["metadata labels", "metadata annotations", "metadata creationTimestamp"], True),
    **dict.fromkeys(["spec", "spec taints", "spec taints 0 value"], True),
}
# Whether an endpoint on the first node counts when its slice lacks a field.
WITHOUT_SLICE_FIELD = {
    **dict.fromkeys(["metadata labels", "endpoints", "endpoints 0 nodeName"], False),
    **dict.fromkeys(["endpoints 0 conditions", "endpoints 0 conditions ready"], True),
    **dict.fromkeys(["endpoints 0 conditions serving", "endpoints 0 addresses", "addressType", "ports"], True),
    **dict.fromkeys(["ports 0 name", "ports 0 port", "ports 0 protocol"], True),
}


def without(table: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """Each path, null and missing: what is done, the path, the value, and what is expected."""
    return [
        (f"{path} {word}", path, value, expected)
        for path, expected in table.items()
        for word, value in NULL_OR_MISSING.items()
    ]


@fault
def test_a_service_that_lacks_a_field_loses_its_own_forward_at_most(lab: Lab, api: FakeApi, config: str) -> None:
    """Null is missing."""
    cases = without(WITHOUT_SERVICE_FIELD)
    api.objects = [*NODES, WEB]
    for number, (_, path, value, _) in enumerate(cases):
        api.objects.append(changed(full_service(f"s{number}", number), path, value))
        api.objects.append(full_slice(f"s{number}", "node2", "abcde"))
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    seen = {what: targets(lab) & on_nodes(30000 + number) for number, (what, *_) in enumerate(cases)}
    assert seen == {
        what: on_nodes(30000 + number, *nodes) if nodes else set() for number, (what, _, _, nodes) in enumerate(cases)
    }
    assert targets(lab) >= on_nodes(30080)


@fault
def test_a_node_that_lacks_a_field_is_lost_at_most(lab: Lab, api: FakeApi, config: str) -> None:
    cases = without(WITHOUT_NODE_FIELD)
    api.objects = [*NODES, MAIL]
    for number, (_, path, value, _) in enumerate(cases):
        api.objects.append(changed(full_node(f"n{number}", f"10.0.0.{100 + number}"), path, value))
    done = run(lab, "--kubeconfig", config, env={"EPOK_MAX_NODES": "100"})
    assert done.status == 0, done.log
    seen = {what: f"10.0.0.{100 + number}:2025" in targets(lab) for number, (what, *_) in enumerate(cases)}
    assert seen == {what: used for what, _, _, used in cases}
    assert targets(lab) >= on_nodes(2025)


@fault
def test_an_endpoint_slice_that_lacks_a_field_is_lost_at_most(lab: Lab, api: FakeApi, config: str) -> None:
    """conditions.ready is true when it is absent; an endpoint without nodeName is on no node."""
    cases = without(WITHOUT_SLICE_FIELD)
    api.objects = [*NODES]
    for number, (_, path, value, _) in enumerate(cases):
        api.objects.append(full_service(f"s{number}", number))
        api.objects.append(changed(full_slice(f"s{number}", "node1", "aaaaa"), path, value))
        api.objects.append(full_slice(f"s{number}", "node2", "bbbbb"))
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    seen = {what: targets(lab) & on_nodes(30000 + number) for number, (what, *_) in enumerate(cases)}
    assert seen == {
        what: on_nodes(30000 + number, *([1, 2] if counts else [2]))
        for number, (what, _, _, counts) in enumerate(cases)
    }


WRONG = {
    "Service mail": (
        full_service("mail", 0),
        {
            "metadata annotations": ["x", [5]],
            ANNOTATION: [25, ["25:2025"]],
            "metadata annotations epok.getbetter.ro/internal": [True],
            "metadata creationTimestamp": [1704067200],
            "spec": ["x"],
            "spec type": [1],
            "spec ports": ["x", {}],
            "spec ports 0": ["x", None],
            "spec ports 0 port": ["80", True],
            "spec ports 0 nodePort": ["30000", 30000.5, True],
            "spec ports 0 name": [5],
            "spec ports 0 protocol": [6],
            "spec ipFamilies": ["IPv4"],
            "spec ipFamilies 0": [4, None],
            "spec externalTrafficPolicy": [True],
            "spec sessionAffinity": [1],
            "spec loadBalancerSourceRanges": ["192.0.2.0/24"],
            "spec loadBalancerSourceRanges 0": [5, None],
        },
    ),
    "Node node2": (
        full_node("node2", "10.0.0.12"),
        {
            "metadata labels": [[]],
            "metadata annotations": ["x"],
            "spec": ["x"],
            "spec taints": [{}],
            "spec taints 0": ["x", None],
            "spec taints 0 key": [1],
            "status": [[]],
            "status addresses": ["10.0.0.12"],
            "status addresses 0": ["10.0.0.12", None],
            "status addresses 0 address": [167772172],
            "status addresses 0 type": [1],
            "status conditions": [{}],
            "status conditions 0": ["Ready", None],
            "status conditions 1 status": [True],
        },
    ),
    "EndpointSlice mail": (
        full_slice("mail", "node1", "abcde"),
        {
            "endpoints": [{}],
            "endpoints 0": ["x", None],
            "endpoints 0 nodeName": [1],
            "endpoints 0 conditions": ["ready"],
            "endpoints 0 conditions ready": ["true", 1],
            "endpoints 0 addresses": ["10.244.0.5", [5]],
            "ports": [{}],
            "ports 0 port": ["8080"],
        },
    ),
}
NAMELESS = {
    "Service": (
        full_service("mail", 0),
        {"": [None, "mail"], "metadata": ["x", None], "metadata name": [5, None, ""], "metadata namespace": [5]},
    ),
    "Node": (
        full_node("node2", "10.0.0.12"),
        {"": [None, "node2"], "metadata": ["x", None], "metadata name": [5, None, ""]},
    ),
}


def wrong_fields(table: "dict[str, Any]") -> list[Any]:
    return [
        pytest.param(whose, path, changed(made, path, value), id=f"{whose} {path} {json.dumps(value)}")
        for whose, (made, paths) in table.items()
        for path, values in paths.items()
        for value in values
    ]


@pytest.mark.parametrize("whose, path, item", wrong_fields(WRONG))
@fault
def test_a_field_of_a_wrong_type_stops_the_run(
    lab: Lab, api: FakeApi, config: str, before: str, whose: str, path: str, item: Object
) -> None:
    """The error names the object and the field."""
    made = [LOCAL_MAIL, NODES[1], MAIL_SLICE]
    api.objects = [NODES[0], NODES[2], WEB, *(other for other in made if other["kind"] != item["kind"]), item]
    kind, name = whose.split()
    words = [word for word in path.split() if not word.isdigit()]
    done = run(lab, "--kubeconfig", config, timeout=HOPELESS)
    assert_failed(lab, done, before, kind, rf"\b{name}\b", re.escape(words[-1]))


@pytest.mark.parametrize("kind, path, item", wrong_fields(NAMELESS))
@fault
def test_an_object_without_a_name_stops_the_run(
    lab: Lab, api: FakeApi, config: str, before: str, kind: str, path: str, item: Object
) -> None:
    api.objects = [*NODES, WEB, item]
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, kind)


BAD_ADDRESSES = [
    "node9.example.org",
    "",
    "0.0.0.0",
    "224.0.0.1",
    "127.0.0.1",
    "255.255.255.255",
    "fe80::1",
    "fe80::1%eth0",
    "::",
    "::1",
    "ff02::1",
    "::ffff:10.0.0.19",
    "10.0.0.19/24",
    "10.0.0.19:22",
    " 10.0.0.19",
    "010.0.0.19",
    "10.0.0.19\n-A INPUT -j ACCEPT",
]


@fault
def test_nodes_that_nothing_can_be_sent_to_are_as_good_as_none(
    lab: Lab, api: FakeApi, config: str, before: str
) -> None:
    """The control plane may be wrong: what is forwarded stays."""
    bad = (node(f"bad{n}", address) for n, address in enumerate(BAD_ADDRESSES))
    api.objects = [node("node1"), *bad, MAIL]
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "none of its nodes", "InternalIP")


@fault
def test_addresses_that_nothing_can_be_sent_to_are_left_out(lab: Lab, api: FakeApi, config: str) -> None:
    """Others of the same node are used, and other nodes."""
    api.objects = [
        node("node1", *BAD_ADDRESSES, "10.0.0.11", "2001:db8:2::11"),
        NODES[1],
        *(node(f"bad{n}", address) for n, address in enumerate(BAD_ADDRESSES)),
        service("mail", "25:2025", [port(25, 2025)], families=("IPv4", "IPv6")),
    ]
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025, 1, 2)
    assert set(re.findall(r"--to-destination (\S+)", lab.saved(6))) == {
        "[2001:db8:2::11]:2025",
        "[2001:db8:2::12]:2025",
    }


def mail_named(name: str) -> Object:
    return service(name, "25:2025", [port(25, 2025)])


def mail_in_namespace(name: str) -> Object:
    return service("mail", "25:2025", [port(25, 2025)], namespace=name)


@pytest.mark.parametrize(
    "make, name",
    [
        *(pytest.param(mail_named, name, id=what) for what, name in ATTACKS.items()),
        *(pytest.param(mail_in_namespace, ATTACKS[what], id=f"namespace: {what}") for what in ("rule", "space")),
        *(pytest.param(node, ATTACKS[what], id=f"node: {what}") for what in ("rule", "space")),
    ],
)
@fault
def test_a_name_that_is_none_stops_the_run(
    lab: Lab, api: FakeApi, config: str, before: str, make: Callable[[str], Object], name: str
) -> None:
    """No API lets them through; but names are printed into rules."""
    api.objects.append(make(name))
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "name")


@pytest.mark.parametrize(
    "path, value",
    [
        *(
            pytest.param(f"spec ports 0 {field}", ATTACKS[what], id=f"{field}: {what}")
            for field in ("name", "protocol")
            for what in ("rule", "newline", "NUL", "letter that is not ASCII")
        ),
        pytest.param("spec ports 0 nodePort", 99999, id="NodePort too high"),
        pytest.param("spec ports 0 nodePort", -2025, id="NodePort below zero"),
        pytest.param("spec ports 0 nodePort", 10**4000, id="NodePort of 4000 digits"),
        pytest.param("spec type", "NodePort\n", id="type"),
    ],
)
@fault
def test_a_strange_port_harms_nobody_else(
    lab: Lab, api: FakeApi, config: str, before: str, path: str, value: Any
) -> None:
    """Whether it is an error, a rejection or a forward: no rule of it stands outside epok's chains."""
    api.objects = [*NODES, WEB, changed(service("mail", "25-25", [port(25, 2025)]), path, value)]
    done = run(lab, "--kubeconfig", config)
    if done.status:
        assert_failed(lab, done, before, "mail")
    assert targets(lab) in (on_nodes(30080), on_nodes(30080) | on_nodes(2025))
    built_in = [line for line in saved(lab).splitlines() if re.match(r"-A (?!EPOK)", line)]
    assert built_in == [line for line in before.splitlines() if re.match(r"-A (?!EPOK)", line)]


HUGE = often(5_000_000, big=50_000_000)
OFTEN = "25:2025," * 32_000
NETWORKS = ",".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(15_000))
MEGABYTES = {
    "50 MB of somebody else's": ("example.org/notes", "x" * 50_000_000),
    "50 MB of no mapping": ("getbetter.ro/externalport", "x" * 50_000_000),
    "digits": ("getbetter.ro/externalport", "2" * HUGE),
    "one mapping, over and over": ("getbetter.ro/externalport", "25:2025," * (HUGE // 8)),
    "white space": ("getbetter.ro/externalport", " " * HUGE),
    "commas": ("getbetter.ro/externalport", "," * HUGE),
    "colons": ("getbetter.ro/externalport", ":" * HUGE),
    "one network, over and over": ("epok.getbetter.ro/allow-range", "10.0.0.0/24," * (HUGE // 12)),
    # 256 KiB is what the API allows; so everybody who may annotate a Service can do this
    "no mapping, over and over": ("getbetter.ro/externalport", ",".join(f"x{n}" for n in range(35_000))),
    "ports that are none of its own": ("getbetter.ro/externalport", ",".join(f"{n}:9" for n in range(1, 30_000))),
    "all ports, over and over": ("getbetter.ro/externalport", ",".join(f"{n}-65535" for n in range(1, 22_000))),
    "all ports and targets": (
        "getbetter.ro/externalport",
        ",".join(f"{n}-{n + 32767}:{32768 - n}-{65535 - n}" for n in range(1, 9_000)),
    ),
    "one mapping, as often as fits": ("getbetter.ro/externalport", OFTEN),
    "networks": ("epok.getbetter.ro/allow-range", NETWORKS),
}


@pytest.mark.parametrize("name, text", MEGABYTES.values(), ids=MEGABYTES)
@fault
def test_a_huge_annotation_does_not_stop_the_others(lab: Lab, api: FakeApi, config: str, name: str, text: str) -> None:
    api.objects = [*NODES, WEB, service("mail", "25:2025", [port(25, 2025)], annotations={name: text})]
    done = run(lab, "--kubeconfig", config, timeout=often(PLENTY, big=3 * PLENTY), through=LITTLE)
    assert done.status == 0, done.log[-2000:]
    assert targets(lab) >= on_nodes(30080)
    if name == "example.org/notes" or text in (OFTEN, NETWORKS):
        assert targets(lab) == on_nodes(30080) | on_nodes(2025)
    else:
        assert "default/mail" in "".join(re.findall("(?m)^warning: rejected: .*", done.log))


def test_a_tenants_1000_services_of_bad_mappings_take_little_and_leave_the_others_a_hearing(
    lab: Lab, api: FakeApi, config: str
) -> None:
    bad = ",".join(f"{n}:{n}" for n in range(1, 201))
    noisy = [service(f"bad{n}", bad, [port(80, 30081 + n)], namespace="tenant") for n in range(1000)]
    quiet = service("mail", "25:2025,26:smpt", [port(25, 2025)], namespace="quiet", created="2030-01-01T00:00:00Z")
    api.objects = [*NODES, *noisy, quiet]
    done = run(lab, "--kubeconfig", config, through=["prlimit", f"--data={128 << 20}"])
    assert done.status == 0 and targets(lab) == on_nodes(2025), done.log[-2000:]
    rejected = re.findall("(?m)^warning: rejected: .*", done.log)
    assert len(rejected) == 100 and sum("quiet/mail" in line for line in rejected) == 1
    # ten of each Service, and how many more of its there are
    assert "\nwarning: 10901 more warnings like these" in done.log
    namespaces = [request.url.split("/")[4] for request in api.asked("events")]
    assert "quiet" in namespaces[:20], "among the first"


@fault
def test_a_host_full_of_forwards_is_not_waited_for(lab: Lab, api: FakeApi, config: str, before: str) -> None:
    """What 200 ports and an annotation of 240 kB can ask for is computed within --timeout, or not at all."""
    ports = [port(1000 + n, 30000 + n, f"p{n}") for n in range(200)]
    mappings = ",".join(f"{n}-{n + 199}:30000-30199" for n in range(1, 11_000))
    api.objects = [*NODES, WEB, service("mail", mappings, ports)]
    done = run(lab, "--kubeconfig", config, timeout=10)
    if done.status:
        assert_failed(lab, done, before)


@fault
def test_what_a_server_says_stays_on_its_line(lab: Lab, api: FakeApi, config: str, before: str) -> None:
    api.misbehave("services", failure(403, "Forbidden", 'User "a\nerror: all is well\x1b[2J\r" cannot list'))
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "403")


@fault
def test_what_an_annotation_says_stays_on_its_line(lab: Lab, api: FakeApi, config: str) -> None:
    api.objects.append(service("evil", '1:\nerror: x\x1b[2J\r, 2:"\u2028', [port(25, 2026)]))
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert not errors(done)
    assert targets(lab) == on_nodes(2025)


# ---- which cluster


@pytest.fixture
def two(lab: Lab, api: FakeApi, tmp_path: Path) -> Iterator[str]:
    """A kubeconfig with MAIL's cluster, context one, and another with port 30001, context two."""
    with FakeApi(lab.host, *NODES, service("other", "81:30001", [port(81, 30001)])) as other:
        yield write_kubeconfig(tmp_path / "two", api.url, other.url)


@pytest.mark.parametrize(
    "args, env, node_port",
    [
        pytest.param(["--kubeconfig", "FILE"], {}, 2025, id="--kubeconfig"),
        pytest.param([], {"KUBECONFIG": "FILE"}, 2025, id="KUBECONFIG"),
        pytest.param([], {"KUBECONFIG": "/missing:FILE"}, 2025, id="KUBECONFIG, two files"),
        pytest.param(["--kubeconfig", "FILE"], {"KUBECONFIG": "/missing"}, 2025, id="--kubeconfig wins"),
        pytest.param(["--kubeconfig", "FILE", "--context", "two"], {}, 30001, id="--context"),
        pytest.param(["--kubeconfig", "FILE"], {"EPOK_CONTEXT": "two"}, 30001, id="EPOK_CONTEXT"),
        pytest.param(["--kubeconfig", "FILE", "--context", "one"], {"EPOK_CONTEXT": "two"}, 2025, id="--context wins"),
        pytest.param([], {"HOME": "HOME"}, 2025, id="~/.kube/config"),
        pytest.param(["--context", "two"], {"HOME": "HOME"}, 30001, id="~/.kube/config, --context"),
        pytest.param(["--kubeconfig", "~/.kube/config"], {"HOME": "HOME"}, 2025, id="--kubeconfig with ~"),
    ],
)
def test_the_cluster_that_is_named_is_read(
    lab: Lab, two: str, tmp_path: Path, args: list[str], env: dict[str, str], node_port: int
) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text(Path(two).read_text())
    args = [arg.replace("FILE", two) for arg in args]
    env = {name: text.replace("FILE", two).replace("HOME", str(tmp_path)) for name, text in env.items()}
    done = run(lab, *args, env=env)
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(node_port)


ONE_USER = "{current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}], users: [{name: a, user: %s}], "
ONE_USER += "clusters: [{name: a, cluster: %s}]}"
KUBECONFIGS = {
    "missing": (None, "FILE"),
    "a directory": ("DIRECTORY", "FILE"),
    "empty": ("", "FILE"),
    "a text": ("none", "FILE"),
    "a list": ("[]", "FILE"),
    "not YAML": ("{[", "FILE"),
    "binary": (b"\x00\xff\xfe\n", "FILE"),
    "no contexts": ("{apiVersion: v1, kind: Config}", "FILE"),
    "context without a cluster": ("{current-context: a, contexts: [{name: a, context: {cluster: gone}}]}", "FILE"),
    "server a number": (ONE_USER % ("{}", "{server: 6443}"), "FILE"),
    "server without a scheme": (ONE_USER % ("{}", "{server: '127.0.0.1:1'}"), "127.0.0.1:1"),
    "missing authority": (ONE_USER % ("{}", "{server: 'https://[::1]:1', certificate-authority: /gone}"), "/gone"),
    "missing certificate": (ONE_USER % ("{client-certificate: /gone}", "{server: 'https://[::1]:1'}"), "/gone"),
    "missing token": (ONE_USER % ("{tokenFile: /gone}", "{server: 'SERVER'}"), "/gone"),
    "plugin that is missing": (ONE_USER % ("{exec: {COMMAND: /gone/login}}", "{server: 'SERVER'}"), "/gone/login"),
    "plugin that fails": (ONE_USER % ("{exec: {COMMAND: /bin/false}}", "{server: 'SERVER'}"), "login plugin"),
    "plugin that talks nonsense": (
        ONE_USER % ("{exec: {COMMAND: /bin/pwd}}", "{server: 'SERVER'}"),
        "login plugin",
    ),
    "plugin that hangs": (
        ONE_USER % ("{exec: {COMMAND: /bin/cat}}", "{server: 'SERVER'}"),
        "(?i)/bin/cat|plugin|cluster",
    ),
}


@pytest.mark.parametrize("content, says", KUBECONFIGS.values(), ids=KUBECONFIGS)
@fault
def test_a_kubeconfig_that_is_none_fails(
    lab: Lab, api: FakeApi, before: str, tmp_path: Path, content: "str | bytes | None", says: str
) -> None:
    file = tmp_path / "kubeconfig"
    if content == "DIRECTORY":
        file.mkdir()
    elif isinstance(content, str):
        plugin = "interactiveMode: Never, apiVersion: client.authentication.k8s.io/v1, command"
        file.write_text(content.replace("SERVER", api.url).replace("COMMAND", plugin))
    elif content is not None:
        file.write_bytes(content)
    done = run(lab, "--kubeconfig", str(file), timeout=HOPELESS, stdin=None if "/bin/cat" in str(content) else "")
    assert_failed(lab, done, before, says.replace("FILE", re.escape(str(file))))
    assert not api.requests


def test_a_token_file_is_read_without_its_newline(lab: Lab, api: FakeApi, tmp_path: Path) -> None:
    """kubectl does so too."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    config = write_kubeconfig(tmp_path / "config", api.url, user={"tokenFile": str(tmp_path / "token")})
    done = run(lab, "--kubeconfig", config)
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025)


def test_a_token_that_no_header_can_carry_is_not_shown(lab: Lab, api: FakeApi, before: str, tmp_path: Path) -> None:
    config = write_kubeconfig(tmp_path / "config", api.url, user={"token": f"{TOKEN}\nX: y"})
    assert_failed(lab, run(lab, "--kubeconfig", config, timeout=HOPELESS), before, "token")


def test_an_unknown_context_fails(lab: Lab, two: str, before: str) -> None:
    done = run(lab, "--kubeconfig", two, "--context", "three", timeout=HOPELESS)
    assert_failed(lab, done, before, r"\bthree\b")


def test_no_cluster_at_all_fails(lab: Lab, before: str, tmp_path: Path) -> None:
    done = run(lab, env={"HOME": str(tmp_path)}, timeout=HOPELESS)
    assert_failed(lab, done, before, "(?i)kubeconfig")


# ---- a file instead


def listed(*objects: Object, kind: str = "List") -> Object:
    return {"apiVersion": "v1", "kind": kind, "items": [*objects]}


def typed(kind: str, *objects: Object) -> Object:
    """As the API prints it: its items have no kind."""
    return listed(*({name: item[name] for name in ("metadata", "spec", "status")} for item in objects), kind=kind)


ALL = snapshot(*NODES, MAIL)
SNAPSHOTS = {
    "JSON": json.dumps(ALL),
    "YAML": yaml.safe_dump(ALL),
    "YAML of several documents": "---\n" + yaml.safe_dump_all([None, *NODES, MAIL, None], explicit_start=True),
    "YAML of several lists": yaml.safe_dump_all([typed("NodeList", *NODES), typed("ServiceList", MAIL)]),
    "typed lists in a list": json.dumps(listed(typed("NodeList", *NODES), typed("ServiceList", MAIL))),
    "lists in a list": json.dumps(listed(listed(*NODES), listed(listed(MAIL)))),
    "other kinds too": json.dumps(snapshot(*NODES, MAIL, {"kind": "Pod", "metadata": {"name": "a b"}, "spec": 5})),
    "JSON on Windows": "\ufeff" + json.dumps(ALL, indent=1).replace("\n", "\r\n"),
    "YAML with a time": yaml.safe_dump(ALL).replace("'2024-01-01T00:00:00Z'", "2024-01-01T00:00:00Z"),
    "YAML with a number for a name": yaml.safe_dump(ALL).replace("annotations:", "annotations:\n      5: x"),
}


@pytest.mark.parametrize("text", SNAPSHOTS.values(), ids=SNAPSHOTS)
def test_a_snapshot_is_read(lab: Lab, before: str, text: str) -> None:
    done = run(lab, "--snapshot", "-", stdin=text)
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025)


def test_a_snapshot_file_is_read(lab: Lab, before: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_text(SNAPSHOTS["YAML"])
    done = run(lab, env={"EPOK_SNAPSHOT": str(tmp_path / "snapshot")})
    assert done.status == 0, done.log
    assert targets(lab) == on_nodes(2025)


BAD_SNAPSHOTS = {
    "JSON cut short": (json.dumps(ALL)[:-20], ["JSON|YAML"]),
    "YAML cut short": (yaml.safe_dump(ALL)[:-120], ["snapshot|standard input"]),
    "bad YAML": ("a: [b\nc: }", ["YAML"]),
    "YAML with a tag": ("!!python/object/apply:os.system [id]", ["YAML|tag"]),
    "YAML with a number that is none": ("kind: !!int ''", ["YAML"]),
    "YAML with a truth value that is none": ("kind: !!bool x", ["YAML"]),
    "a number of thousands of digits": (
        yaml.safe_dump(ALL).replace("port: 25\n", f"port: 0x{'f' * 5000}\n"),
        [r"\bmail\b", "number", "port"],
    ),
    "YAML with tabs": ("kind: List\nitems:\n\t- kind: Service", ["YAML|tab"]),
    "a control character": ("kind: \x01", ["YAML"]),
    "nothing": ("", ["snapshot|standard input"]),
    "white space": (" \n\n", ["snapshot|standard input"]),
    "null": ("null", ["snapshot|standard input"]),
    "a text": ("error: the server is currently unable to handle the request", ["snapshot|standard input"]),
    "a number": ("5", ["snapshot"]),
    "a list": ("[]", ["snapshot"]),
    "an object of no kind": ("{}", ["snapshot"]),
    "kind a number": ('{"kind": 5}', ["kind"]),
    "items a text": ('{"kind": "List", "items": "x"}', ["items"]),
    "an item that is none": ('{"kind": "List", "items": [5]}', ["item"]),
    "no nodes": (json.dumps(snapshot(MAIL)), ["snapshot|standard input", r"\bno node\b"]),
    "no endpoints": (json.dumps(snapshot(*NODES, LOCAL_MAIL)), ["EndpointSlice", "kubectl get"]),
    "nested deeply": ("[" * 100_000, ["nest|deep"]),
    "lists nested deeply": ('{"kind":"List","items":[' * 2_000 + "]}" * 2_000, ["nest|deep|node"]),
    "a list within itself": ("&a {kind: List, items: [*a]}", ["nest|deep|recurs|itself"]),
    "annotation without quotes": (
        yaml.safe_dump(ALL).replace("'25:2025'", "25").replace("25:2025", "25"),
        [r"\bmail\b", "externalport"],
    ),
}


@pytest.mark.parametrize("text, says", BAD_SNAPSHOTS.values(), ids=BAD_SNAPSHOTS)
def test_a_bad_snapshot_leaves_the_rules_alone(lab: Lab, before: str, text: str, says: list[str]) -> None:
    assert_failed(lab, run(lab, "--snapshot", "-", stdin=text, timeout=HOPELESS), before, *says)


def test_a_mapping_that_yaml_takes_for_a_number_is_named(lab: Lab, before: str) -> None:
    """22:22 without quotes is 1342 in YAML 1.1, to the base of 60."""
    text = yaml.safe_dump(ALL).replace("'25:2025'", "22:22").replace("25:2025", "22:22")
    done = run(lab, "--snapshot", "-", stdin=text)
    assert "mail" in done.log
    if done.status:
        assert_failed(lab, done, before, "externalport")


@pytest.mark.parametrize(
    "make",
    [lambda file: None, Path.mkdir, lambda file: file.write_bytes(b"\x00\xff{")],
    ids=["missing", "a directory", "binary"],
)
def test_a_snapshot_file_that_cannot_be_read_is_named(
    lab: Lab, before: str, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "snapshot")
    done = run(lab, "--snapshot", str(tmp_path / "snapshot"), timeout=HOPELESS)
    assert_failed(lab, done, before, re.escape(str(tmp_path / "snapshot")))


def test_a_snapshot_that_never_ends_is_not_waited_for(lab: Lab, before: str) -> None:
    assert_failed(lab, run(lab, "--snapshot", "-", stdin=None, timeout=HOPELESS), before, "(?i)time")
