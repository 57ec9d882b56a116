"""A cluster, and epok's options, that change at random, and what a client must meet then.

All that is drawn comes from one random.Random, so that a seed repeats it.

    cluster, options = Changing(rng), Choice()
    cluster.change()
    options = options.changed(rng)
    print(cluster.objects(), options.argv(), cluster.meets(options, 25, "tcp", 4))
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lab.network import NODE_PORTS, pod
from lab.objects import Object, endpoint, endpoint_slice, node, port, service, slice_port

NODES = (1, 2, 3)
FAMILIES = {4: "IPv4", 6: "IPv6"}
KNOWN_PORTS = (25, 53, 80, 443, *range(1000, 1040))
RANGE = range(30000, 30010)
SINGLE = tuple(number for number in NODE_PORTS if number not in RANGE)
# Which IP versions of the lab's client these let in.
SOURCES = {
    "": (4, 6),
    "192.0.2.0/24, 2001:db8:1::/64": (4, 6),
    "203.0.113.0/24,2001:db8:1::10,2001:db8:1::11": (6,),
    "198.51.100.0/24": (),
}
ADDRESSES = {"": (4, 6), "192.0.2.1": (4,), "192.0.2.0/24,2001:db8:1::/64": (4, 6), "198.51.100.1": ()}
INTERFACES = {"eth0": True, "eth0,lo": True, "eth+": True, "eth0,eth2": True, "eth2": False}
# Every cluster has this one, so that one without Services is not taken for a file without EndpointSlices.
KUBERNETES = endpoint_slice("kubernetes", [endpoint("node1", "10.0.0.11")], [slice_port(6443, "https")])
BATCHES = ((), ("--batch-size", "900"), ("--batch-commands", "false"))


class Meeting(NamedTuple):
    """Who may answer at a port, and on which NodePort; nobody when there are no names."""

    names: frozenset[str]
    node_port: int = 0


NOBODY = Meeting(frozenset())


@dataclasses.dataclass(frozen=True)
class Choice:
    """epok's options."""

    interfaces: str = "eth0"
    external: bool = False
    addresses: str = ""
    batch: Sequence[str] = ()
    masquerade: str = "auto"
    mark: str = "0x30000000"
    max_nodes: int = 0

    def changed(self, rng: random.Random) -> "Choice":
        """Another choice of one of them."""
        name, values = rng.choice([
            ("interfaces", tuple(INTERFACES)),
            ("external", (False, True)),
            ("addresses", tuple(ADDRESSES)),
            ("batch", BATCHES),
            ("masquerade", ("auto", "always", "never")),
            ("mark", ("0x30000000", "0xc000000")),
            ("max_nodes", (0, 1, 2)),
        ])  # fmt: skip
        return dataclasses.replace(self, **{name: rng.choice(values)})

    def argv(self) -> list[str]:
        words = ["--interfaces", self.interfaces, "--masquerade", self.masquerade, "--mark", self.mark, *self.batch]
        words += ["--external-interface", "eth0"] if self.bars else []
        words += ["--addresses", self.addresses] if self.addresses else []
        return words + (["--max-nodes", str(self.max_nodes)] if self.max_nodes else [])

    @property
    def bars(self) -> bool:
        """Whether eth0, where the client is, is the external interface."""
        return self.external and "eth0" in self.interfaces.split(",")

    def lets_in(self, version: int) -> bool:
        return INTERFACES[self.interfaces] and version in ADDRESSES[self.addresses]


@dataclasses.dataclass(frozen=True)
class App:
    """A Service: `count` external ports in a row to as many NodePorts; `pods` says by node whether one is ready."""

    name: str
    external: int
    node_port: int
    count: int
    protocols: Sequence[str]
    families: Sequence[int] = (4, 6)
    policy: str = "Cluster"
    affinity: str = "None"
    sources: str = ""
    internal: bool = False
    pods: Mapping[int, bool] = dataclasses.field(default_factory=dict)

    @property
    def externals(self) -> range:
        return range(self.external, self.external + self.count)

    @property
    def node_ports(self) -> range:
        return range(self.node_port, self.node_port + self.count)

    def objects(self) -> list[Object]:
        """The Service and its EndpointSlices; its pods listen on the numbers of the NodePorts."""
        named = [(f"{protocol}-{number}", number, protocol.upper()) for protocol in self.protocols
                 for number in self.node_ports]  # fmt: skip
        mapping = f"{self.external}:{self.node_port}"
        if self.count > 1:
            mapping = f"{self.external}-{self.externals[-1]}:{self.node_port}-{self.node_ports[-1]}"
        extra = {"epok.getbetter.ro/allow-range": self.sources} if self.sources else {}
        extra |= {"epok.getbetter.ro/internal": ""} if self.internal else {}
        made = service(
            self.name,
            mapping,
            [port(number, number, name, protocol) for name, number, protocol in named],
            annotations=extra,
            policy=self.policy,
            families=[FAMILIES[version] for version in self.families],
            sessionAffinity=self.affinity,
        )
        listening = [slice_port(number, name, protocol) for name, number, protocol in named]
        return [made, *(self.slice(version, listening) for version in self.families)]

    def slice(self, version: int, listening: Sequence[Object]) -> Object:
        pods = [endpoint(f"node{n}", pod(n)[version == 6], ready=ready) for n, ready in self.pods.items()]
        return endpoint_slice(self.name, pods, listening, family=FAMILIES[version], suffix=f"v{version}")


class Changing:
    """The cluster: some Services, and three nodes; the host may be a node too, without pods."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.apps: list[App] = []
        self.nodes = dict.fromkeys(NODES, "ready")
        self.host_is_node = self.broken = False
        self.made = 0
        for _ in range(3):
            self.add()

    def change(self) -> None:
        """One thing becomes another."""
        steps = [self.add, self.remove, *[self.edit] * 5, *[self.change_node] * 2, *[self.change_pods] * 2]
        self.rng.choice([*steps, self.change_rarely])()

    def add(self) -> None:
        """A Service whose ports, and whose NodePorts, are those of no other."""
        self.made += 1
        taken = {number for app in self.apps for number in (*app.externals, *app.node_ports)}
        node_port = self.rng.choice([*SINGLE, *RANGE])
        count = self.rng.choice((1, 1, 2, 4)) if node_port in RANGE else 1
        external = self.rng.choice(KNOWN_PORTS)
        protocols = self.rng.choice((("tcp",), ("tcp",), ("udp",), ("tcp", "udp")))
        app = App(f"app{self.made}", external, node_port, count, protocols, pods=self.some_pods())
        wished = {*app.externals, *app.node_ports}
        if app.node_ports[-1] in (*SINGLE, *RANGE) and not wished & taken:
            self.apps.append(app)

    def remove(self) -> None:
        if self.apps:
            self.apps.remove(self.rng.choice(self.apps))

    def edit(self) -> None:
        if not self.apps:
            return
        index = self.rng.randrange(len(self.apps))
        app = self.apps.pop(index)
        others = [(other.externals, other.node_ports) for other in self.apps]
        externals, node_ports = ([number for both in others for number in both[n]] for n in (0, 1))
        field, values = self.rng.choice([
            ("protocols", (("tcp",), ("udp",), ("tcp", "udp"))),
            ("families", ((4,), (6,), (4, 6))),
            ("policy", ("Cluster", "Local")),
            ("affinity", ("None", "ClientIP")),
            ("sources", tuple(SOURCES)),
            ("internal", (False, True)),
            ("external", self.free(app.count, KNOWN_PORTS, externals)),
            ("node_port", self.free(app.count, (*SINGLE, *RANGE), node_ports)),
        ])  # fmt: skip
        self.apps.insert(index, dataclasses.replace(app, **{field: self.rng.choice(values)}))

    @staticmethod
    def free(count: int, numbers: Sequence[int], taken: Sequence[int]) -> list[int]:
        """Where so many numbers in a row are nobody's."""
        usable = {*numbers} - {*taken}
        return [number for number in numbers if {*range(number, number + count)} <= usable]

    def change_node(self) -> None:
        """One is there or not, and Ready or not; one stays there, for a cluster without nodes is read as a mistake."""
        number = self.rng.choice(NODES)
        self.nodes[number] = self.rng.choice(("ready", "ready", "ready", "not ready", "excluded", "gone"))
        if set(self.nodes.values()) == {"gone"}:
            self.nodes[number] = "ready"

    def some_pods(self) -> dict[int, bool]:
        return {number: self.rng.random() < 0.8 for number in NODES if self.rng.random() < 0.7}

    def change_pods(self) -> None:
        if self.apps:
            index = self.rng.randrange(len(self.apps))
            self.apps[index] = dataclasses.replace(self.apps[index], pods=self.some_pods())

    def change_rarely(self) -> None:
        if self.rng.random() < 0.5:
            self.host_is_node = not self.host_is_node
        else:
            self.broken = not self.broken

    # ------------------------------------------------ what that is

    def objects(self) -> list[Object]:
        """All that the API lists."""
        listed = [KUBERNETES, *(item for app in self.apps for item in app.objects())]
        if self.broken:
            listed.append(service("broken", "70000,1:nowhere,9-8", [port(80, 31000)]))
        return [*self.node_objects(), *listed]

    def node_objects(self) -> Iterator[Object]:
        for number, state in self.nodes.items():
            if state != "gone":
                marks: dict[str, Any] = {"epok.getbetter.ro/exclude": ""} if state == "excluded" else {}
                addresses = f"10.0.0.{10 + number}", f"2001:db8:2::{10 + number}"
                yield node(f"node{number}", *addresses, ready=state != "not ready", annotations=marks)
        if self.host_is_node:
            yield node("host", "10.0.0.1", "2001:db8:2::1")

    def meets(self, options: Choice, number: int, protocol: str, version: int) -> Meeting:
        """Whom the lab's client meets at a port of the host."""
        for app in self.apps:
            if number in app.externals and protocol in app.protocols and version in app.families:
                barred = app.internal and options.bars
                if barred or version not in SOURCES[app.sources] or not options.lets_in(version):
                    return NOBODY
                numbers = self.places(app)
                names = frozenset(f"node{place}" for place in numbers)
                return Meeting(names, app.node_port + number - app.external) if names else NOBODY
        return NOBODY

    def places(self, app: App) -> set[int]:
        """The numbers of the nodes where a Service is answered."""
        with_pods = {number for number, ready in app.pods.items() if ready}
        if self.host_is_node:
            return set() if app.policy == "Local" else with_pods
        present = {number for number, state in self.nodes.items() if state in ("ready", "not ready")}
        usable = {number for number in present if self.nodes[number] == "ready"} or present
        return usable & with_pods if app.policy == "Local" else usable

    def asked(self) -> list[tuple[int, str]]:
        """All ports that a Service asks for, with their protocols."""
        return [(number, protocol) for app in self.apps for number in app.externals for protocol in app.protocols]
