"""Kubernetes objects in the shape that `kubectl get services,nodes,endpointslices -A -o json` prints them."""

from collections.abc import Sequence
from typing import Any

CREATED = "2024-01-01T00:00:00Z"
CLUSTER_IP = "10.96.0.10"
Object = dict[str, Any]


def port(
    number: int, node_port: int = 0, name: str = "", protocol: str = "TCP", target: "int | str | None" = None
) -> Object:
    """A port of a Service; without a NodePort when that is 0."""
    made: Object = {"port": number, "protocol": protocol, "targetPort": number if target is None else target}
    return {**({"name": name} if name else {}), **made, **({"nodePort": node_port} if node_port else {})}


def service(
    name: str,
    externalport: "str | None" = None,
    ports: Sequence[Object] = (),
    *,
    annotations: "dict[str, str] | None" = None,
    namespace: str = "default",
    type: str = "NodePort",
    policy: str = "Cluster",
    families: Sequence[str] = ("IPv4",),
    created: str = CREATED,
    **spec: Any,
) -> Object:
    """A Service; `externalport` is the annotation that epok reads, `spec` adds to or replaces the spec's fields."""
    asked = {} if externalport is None else {"getbetter.ro/externalport": externalport}
    internal = {
        "clusterIP": CLUSTER_IP,
        "ipFamilies": list(families),
        "ipFamilyPolicy": "SingleStack" if len(families) == 1 else "PreferDualStack",
    }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{namespace}-{name}",
            "creationTimestamp": created,
            "annotations": {**asked, **(annotations or {})},
        },
        "spec": {
            "type": type,
            "ports": list(ports),
            **({} if type == "ExternalName" else internal),
            **({"externalTrafficPolicy": policy} if type in ("NodePort", "LoadBalancer") else {}),
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": name},
            **spec,
        },
        "status": {"loadBalancer": {}},
    }


def node(
    name: str,
    *addresses: str,
    ready: bool = True,
    labels: "dict[str, str] | None" = None,
    annotations: "dict[str, str] | None" = None,
    taints: Sequence[Object] = (),
    **spec: Any,
) -> Object:
    """A Node with these InternalIPs."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": CREATED,
            "labels": {"kubernetes.io/hostname": name, **(labels or {})},
            "annotations": {"node.alpha.kubernetes.io/ttl": "0", **(annotations or {})},
        },
        "spec": {**({"taints": list(taints)} if taints else {}), **spec},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in addresses]
            + [{"type": "Hostname", "address": name}],
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


def endpoint(node_name: str, *addresses: str, ready: bool = True, terminating: bool = False) -> Object:
    """A pod behind a Service, on that node. One that is `ready` to the end serves while it is terminating."""
    return {
        "addresses": list(addresses),
        "nodeName": node_name,
        "conditions": {"ready": ready and not terminating, "serving": ready, "terminating": terminating},
    }


def endpoint_slice(
    service_name: str,
    endpoints: Sequence[Object],
    ports: Sequence[Object] = (),
    *,
    namespace: str = "default",
    family: str = "IPv4",
    suffix: str = "abcde",
) -> Object:
    """An EndpointSlice of a Service; its ports are those that the pods listen on: slice_port()."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": family,
        "metadata": {
            "name": f"{service_name}-{suffix}",
            "namespace": namespace,
            "creationTimestamp": CREATED,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "endpoints": list(endpoints),
        "ports": list(ports),
    }


def slice_port(number: int, name: str = "", protocol: str = "TCP") -> Object:
    return {"name": name, "port": number, "protocol": protocol}


def snapshot(*objects: Object) -> Object:
    """All of them as kubectl's one List."""
    return {"apiVersion": "v1", "items": list(objects), "kind": "List", "metadata": {"resourceVersion": ""}}
