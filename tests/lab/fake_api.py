"""A Kubernetes API that lists what it is given, in pages, and misbehaves on demand.

    with FakeApi(lab.host, *objects) as api:
        api.misbehave("services", answer(503), at={1})
        write_kubeconfig(path, api.url)

It is a thread of this process that listens on 127.0.0.1 in the network of one namespace. Misbehaviours are
functions that get the Exchange and answer it, or do not.
"""

import json
import re
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Container, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from lab.network import Namespace
from lab.objects import Object

LISTS = {
    "/api/v1/services": ("services", "v1", "Service"),
    "/api/v1/nodes": ("nodes", "v1", "Node"),
    "/apis/discovery.k8s.io/v1/endpointslices": ("endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
}
TOKEN = "fake-token-Zm9vYmFy"
ALWAYS = range(1, 1_000_000)
MISSING = object()


class Request(NamedTuple):
    """A request that came; `resource` is the path when it is neither a list nor about Events."""

    resource: str
    query: dict[str, str]
    url: str
    authorization: str
    time: float


class Exchange:
    """One request to be answered; `body` is the right answer."""

    def __init__(self, handler: BaseHTTPRequestHandler, api: "FakeApi", body: bytes) -> None:
        self.handler, self.api, self.body = handler, api, body

    def head(self, status: int, **headers: object) -> None:
        """The status line and the headers, Content_Length for Content-Length."""
        fields = {"Content_Type": "application/json", **headers}
        lines = [f"HTTP/1.1 {status} Answer", *(f"{name.replace('_', '-')}: {fields[name]}" for name in fields)]
        self.write("\r\n".join([*lines, "", ""]).encode())

    def write(self, data: bytes, pause: float = 0) -> None:
        """All at once, or byte by byte with pauses."""
        for piece in [data[n : n + 1] for n in range(len(data))] if pause else [data]:
            self.handler.wfile.write(piece)
            self.handler.wfile.flush()
            if pause and self.api.closing.wait(pause):
                return

    def hang(self) -> None:
        self.api.closing.wait(60)
        self.hang_up()

    def hang_up(self) -> None:
        self.handler.close_connection = True


Behaviour = Callable[[Exchange], None]


def answer(status: int, body: "bytes | str | Object" = "", **headers: object) -> Behaviour:
    def behave(exchange: Exchange) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body.encode() if isinstance(body, str) else body
        exchange.head(status, Content_Length=len(data), **headers)
        exchange.write(data)

    return behave


def failure(status: int, reason: str, message: str, **metadata: str) -> Behaviour:
    """An error as a kube-apiserver words it."""
    return answer(
        status,
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": status,
        },
    )


def edited(**fields: Any) -> Behaviour:
    """The right answer with other, or without, these top-level fields."""

    def behave(exchange: Exchange) -> None:
        listing = {**json.loads(exchange.body), **fields}
        answer(200, {name: value for name, value in listing.items() if value is not MISSING})(exchange)

    return behave


def silent(exchange: Exchange) -> None:
    exchange.hang()


def silent_after_head(exchange: Exchange) -> None:
    exchange.head(200, Content_Length=len(exchange.body))
    exchange.hang()


def dripping_head(exchange: Exchange) -> None:
    exchange.write(b"HTTP/1.1 200 OK\r\nX-Drip: " + b"z" * 60, pause=1)
    exchange.hang_up()


def dripping_body(exchange: Exchange) -> None:
    exchange.head(200, Content_Length=len(exchange.body))
    exchange.write(exchange.body, pause=1)
    exchange.hang_up()


def hanging_up(exchange: Exchange) -> None:
    exchange.hang_up()


def cut(exchange: Exchange) -> None:
    exchange.head(200, Content_Length=len(exchange.body))
    exchange.write(exchange.body[:-40])
    exchange.hang_up()


def cut_in_chunks(exchange: Exchange) -> None:
    exchange.head(200, Transfer_Encoding="chunked")
    exchange.write(b"%x\r\n%b\r\n" % (len(exchange.body) - 40, exchange.body[:-40]))
    exchange.hang_up()


def truncated(exchange: Exchange) -> None:
    answer(200, exchange.body[:-40])(exchange)


def closing_unannounced(exchange: Exchange) -> None:
    """The right answer, and the connection closed without a word about it."""
    answer(200, exchange.body)(exchange)
    exchange.hang_up()


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.api.answer(self)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.api.answer(self)

    protocol_version = "HTTP/1.1"
    do_PUT = do_PATCH = do_DELETE = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 64
    api: "FakeApi"

    def verify_request(self, request: object, address: object) -> bool:
        self.api.dropped -= 1
        return self.api.dropped < 0

    def handle_error(self, request: object, address: object) -> None:
        """A client that is gone, or does not like the certificate, is what some tests are about."""


class FakeApi:
    """`objects` are what it lists, `page_size` the most that it puts on a page, whatever `limit` allows.

    For the first `delay` seconds it refuses connections, and the first `dropped` of them it closes at once.
    """

    def __init__(
        self,
        namespace: Namespace,
        *objects: Object,
        tls: "ssl.SSLContext | None" = None,
        delay: float = 0,
        dropped: int = 0,
    ) -> None:
        self.dropped = dropped
        self.objects: list[Any] = list(objects)
        self.page_size = 10_000
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.faults: list[tuple[str, Behaviour, Container[int]]] = []
        with namespace.entered():
            self.server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server.server_bind()
        self.server.api, self.server.timeout = self, 0.05
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.address}"
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        if not delay:
            self.server.server_activate()
        self.thread = threading.Thread(target=self.work, args=[delay], daemon=True)

    def work(self, delay: float) -> None:
        if delay and not self.closing.wait(delay):
            self.server.server_activate()
        while not self.closing.is_set():
            self.server.handle_request()

    def __enter__(self) -> "FakeApi":
        self.thread.start()
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        self.thread.join()
        self.server.server_close()

    def misbehave(self, resource: str, behaviour: Behaviour, at: Container[int] = ALWAYS) -> None:
        """At these requests for the resource, counted from the first that comes from now on."""
        self.requests.clear()
        self.faults.append((resource, behaviour, at))

    def asked(self, resource: str) -> list[Request]:
        return [request for request in self.requests if request.resource == resource]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        events = re.fullmatch("/api/v1/namespaces/[^/]+/events(/[^/]+)?", url.path)
        resource, version, kind = LISTS.get(url.path, ("events" if events else url.path, "", ""))
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.requests.append(
            Request(resource, query, handler.path, handler.headers.get("Authorization", ""), time.monotonic())
        )
        if one := re.fullmatch("/api/v1/namespaces/([^/]+)/services", url.path):
            version, kind = "v1", "Service"
            query["fieldSelector"] += f",metadata.namespace={one[1]}"
        body = self.page(version, kind, query) if kind else b""
        exchange, number = Exchange(handler, self, body), len(self.asked(resource))
        if self.requests[-1].authorization != f"Bearer {TOKEN}":
            return failure(401, "Unauthorized", "Unauthorized")(exchange)
        for faulty, behaviour, at in self.faults:
            if faulty == resource and number in at:
                return behaviour(exchange)
        return answer(200, body)(exchange) if kind else failure(403, "Forbidden", "not allowed")(exchange)

    def page(self, version: str, kind: str, query: dict[str, str]) -> bytes:
        """One page as the API writes it: items without apiVersion and kind; a token that a URL must quote."""
        found = [item for item in self.objects if item["kind"] == kind and selected(item, query)]
        start = int(query.get("continue", "0=").split("=")[0])
        end = start + min(int(query.get("limit", "10000")), self.page_size)
        left = len(found) - end
        more: Object = {"continue": f"{end}=&+/%41 x", "remainingItemCount": left} if left > 0 else {}
        items = [
            item.get("raw", {name: item[name] for name in item if name not in ("apiVersion", "kind")})
            for item in found[start:end]
        ]
        return json.dumps(
            {
                "kind": f"{kind}List",
                "apiVersion": version,
                "metadata": {"resourceVersion": "4711", **more},
                "items": items,
            }
        ).encode()


def selected(item: Object, query: dict[str, str]) -> bool:
    """Whether selectors take an object: `label=value`, `label in (value,value)`, `metadata.field=value,...`."""
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        field, value = term.removeprefix("metadata.").split("=")
        if item["metadata"].get(field) != value:
            return False
    if "labelSelector" not in query:
        return True
    match = re.fullmatch(r"([\w./-]+)(?: in \((.*)\)|==?(.*))", query["labelSelector"])
    assert match, f"this fake knows no such selector: {query}"
    values = [value.strip() for value in (match[2] or match[3]).split(",")]
    return (item["metadata"].get("labels") or {}).get(match[1]) in values


def write_kubeconfig(
    path: Path, *servers: str, user: "Object | None" = None, cluster: "Mapping[str, object] | None" = None
) -> str:
    """A file with contexts one, two, ... for the servers; the first is the current one. Returns its name."""
    names = dict(zip(("one", "two", "three"), servers, strict=False))
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "one",
                "preferences": {},
                "clusters": [
                    {"name": f"cluster-{name}", "cluster": {"server": names[name], **(cluster or {})}} for name in names
                ],
                "users": [{"name": "epok", "user": user or {"token": TOKEN}}],
                "contexts": [
                    {"name": name, "context": {"cluster": f"cluster-{name}", "user": "epok"}} for name in names
                ],
            }
        )
    )
    return str(path)
