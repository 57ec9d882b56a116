"""A real kube-apiserver with etcd, RBAC and an authority of its own, in the network of one namespace.

The programs are looked for in the folder that KUBEBUILDER_ASSETS names (the convention of setup-envtest), then in
.venv/kubernetes, where tests/setup puts what it builds, then in PATH.

    server = ApiServer(lab.host, folder)
    server.create(service("mail", "25:2025", [port(25, 2025)]))
    lab.epok("-i", "eth0", "--kubeconfig", server.kubeconfig("epok", token=server.token("epok")), "local")
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import urllib3
import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from lab.authority import Authority, private_pem, public_pem
from lab.fake_api import write_kubeconfig
from lab.machine import need, until
from lab.manifests import account
from lab.network import EPOK, Namespace
from lab.objects import CLUSTER_IP, Object

ADDRESS, PORT = "127.0.0.1", 6443
CLUSTER_ADDRESS = "10.96.0.1"  # of the Service kubernetes, where pods find it
ISSUER = "https://kubernetes.default.svc"
PATHS = {
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
}
AUDIT = """{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [
  {"level": "Metadata", "users": ["system:serviceaccount:kube-system:epok", "system:serviceaccount:epok:epok"]},
  {"level": "None"}]}"""
FLAGS = {
    "etcd-servers": "http://127.0.0.1:2379",
    "advertise-address": "10.0.0.1",
    "secure-port": str(PORT),
    "authorization-mode": "RBAC",
    "service-cluster-ip-range": "10.96.0.0/16,fd00:96::/112",
    "service-node-port-range": "2000-32767",
    "service-account-issuer": ISSUER,
}


class Asked(NamedTuple):
    """A request, as the server's audit log has it."""

    verb: str
    resource: str
    uri: str


def asset(name: str) -> str:
    """The path of one of the programs."""
    for folder in (os.environ.get("KUBEBUILDER_ASSETS"), EPOK.parent / ".venv" / "kubernetes"):
        if folder and (found := shutil.which(name, path=str(folder))):
            return found
    return need(name, "run tests/setup all, or set KUBEBUILDER_ASSETS to a folder that has it")


class ApiServer:
    """Runs until its namespace ends; `folder` takes its certificates and logs."""

    def __init__(
        self,
        space: Namespace,
        folder: Path,
        names: Sequence[str] = (),
        addresses: Sequence[str] = (),
        address: str = ADDRESS,
        **flags: str,
    ) -> None:
        """With more names and addresses than `address` it listens at all of them; `flags` have _ for -."""
        self.space, self.folder = space, folder
        self.url = f"https://{address}:{PORT}"
        self.programs = {name: asset(name) for name in ("kube-apiserver", "etcd", "kubectl")}
        self.authority = Authority()
        self.account_key = rsa.generate_private_key(65537, 2048)
        self.ca = self.write("ca.pem", self.authority.pem)
        server = self.write("server.pem", self.authority.issue("kube-apiserver", address, *addresses, names=names))
        self.admin = self.write("admin.pem", self.authority.issue("admin", organisation="system:masters"))
        self.flags = FLAGS | {
            "bind-address": address,
            "client-ca-file": self.ca,
            "tls-cert-file": server,
            "tls-private-key-file": server,
            "service-account-key-file": self.write("accounts.pub", public_pem(self.account_key.public_key())),
            "service-account-signing-key-file": self.write("accounts.key", private_pem(self.account_key)),
            "audit-policy-file": self.write("audit.json", AUDIT.encode()),
            "audit-log-path": str(folder / "audit.log"),
            "kubelet-client-certificate": self.admin,
            "kubelet-client-key": self.admin,
            **{name.replace("_", "-"): value for name, value in flags.items()},
        }
        if addresses:
            self.flags["bind-address"] = "0.0.0.0"
        self.pool = urllib3.HTTPSConnectionPool(
            address, PORT, maxsize=8, ca_certs=self.ca, cert_file=self.admin, key_file=self.admin, retries=False
        )
        self.start_program("etcd", "--data-dir", "/run/etcd")
        # kube-apiserver waits no more than 20 seconds for it
        until(lambda: "ready to serve" in (folder / "etcd.log").read_text(), f"etcd serves, see {folder}", 300)
        self.start()

    def write(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return str(self.folder / name)

    def start_program(self, name: str, *args: str) -> "subprocess.Popen[str]":
        with (self.folder / f"{name}.log").open("a") as log:
            return self.space.popen([self.programs[name], *args], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start(self) -> None:
        """Returns when the server answers."""
        self.process = self.start_program("kube-apiserver", *(f"--{flag}={self.flags[flag]}" for flag in self.flags))
        until(self.ready, f"kube-apiserver is ready, see {self.folder}", 300)

    def fill_tokens(self) -> None:
        """Runs the controller that puts tokens into Secrets of accounts."""
        self.programs["kube-controller-manager"] = asset("kube-controller-manager")
        flags = {
            "kubeconfig": self.kubeconfig("admin", certificate=self.admin),
            "controllers": "serviceaccount-token-controller",
            "leader-elect": "false",
            "secure-port": "0",
            "service-account-private-key-file": self.flags["service-account-signing-key-file"],
            "root-ca-file": self.ca,
        }
        self.start_program("kube-controller-manager", *(f"--{flag}={text}" for flag, text in flags.items()))

    def ready(self) -> bool:
        assert self.process.poll() is None, (self.folder / "kube-apiserver.log").read_text()[-2000:]
        not_yet = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ProtocolError, AssertionError)
        with contextlib.suppress(*not_yet):
            return bool(self.request("GET", "/readyz"))
        return False

    def kill(self) -> None:
        """SIGKILL, as if its machine had lost power."""
        self.space.run(["pkill", "-KILL", "-x", "kube-apiserver"])
        self.process.wait(60)

    def request(self, method: str, path: str, body: "Object | None" = None, kind: str = "application/json") -> Any:
        """The answer to a request of an administrator, which must be a success."""
        data = None if body is None else json.dumps(body)
        with self.space.entered():
            answer = self.pool.request(method, path, body=data, headers={"Content-Type": kind}, timeout=120)
        assert answer.status in (200, 201), f"{method} {path}: {answer.status} {answer.data.decode()}"
        return json.loads(answer.data) if answer.data.startswith(b"{") else answer.data

    def create(self, *objects: Object) -> None:
        """Objects as objects.py makes them, less what a server decides."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.create_one, objects))

    def create_one(self, made: Object) -> None:
        copy = json.loads(json.dumps(made))
        for name in ("uid", "creationTimestamp"):
            copy["metadata"].pop(name, None)
        if copy.get("spec", {}).get("clusterIP") == CLUSTER_IP:
            del copy["spec"]["clusterIP"]
        self.request("POST", PATHS[made["kind"]].format(namespace=copy["metadata"].get("namespace")), copy)

    def grant(self) -> None:
        """epok's account, with the role of cron/."""
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(account()))

    def patch(self, path: str, **fields: Any) -> None:
        self.request("PATCH", path, fields, "application/merge-patch+json")

    def clear(self) -> None:
        """No Node, and in the namespace default no Service but the server's own, no EndpointSlice and no Event."""
        for path in (
            "/api/v1/nodes",
            "/api/v1/namespaces/default/services",
            "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
            "/api/v1/namespaces/default/events",
        ):
            self.request("DELETE", f"{path}?fieldSelector=metadata.name!=kubernetes")
        self.forget()

    def forget(self) -> None:
        """What was asked for until now."""
        with open(self.flags["audit-log-path"], "w"):
            pass

    def kubectl(self, *args: str, input: str = "") -> str:
        argv = [self.programs["kubectl"], "--kubeconfig", self.kubeconfig("admin", certificate=self.admin), *args]
        return self.space.run(argv, input).stdout

    def kubeconfig(self, name: str, token: str = "", certificate: str = "") -> str:
        """A kubeconfig with an account's token, or a user's certificate, as context `name`."""
        user = {"token": token} if token else {"client-certificate": certificate, "client-key": certificate}
        cluster = {"certificate-authority": self.ca}
        return write_kubeconfig(self.folder / f"{name}.config", self.url, user=user, cluster=cluster)

    def token(self, account: str = "epok", namespace: str = "kube-system") -> str:
        """A token as a pod of the account would get it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": [ISSUER]}}
        return self.request("POST", path, asked)["status"]["token"]

    def expired(self, token: str) -> str:
        """The same token, but with its end an hour ago, signed by the server's own key."""
        head, claims, _ = token.split(".")
        found = json.loads(base64.urlsafe_b64decode(claims + "=="))
        hours = {name: found[name] - 7200 for name in ("iat", "nbf")}
        signed = f"{head}.{encoded({**found, **hours, 'exp': found['iat'] - 3600})}"
        signature = self.account_key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"

    def asked(self) -> list[Asked]:
        """What epok's account asked for since clear()."""
        with open(self.flags["audit-log-path"]) as log:
            entries = [json.loads(line) for line in log]
        return [Asked(entry["verb"], entry["objectRef"]["resource"], entry["requestURI"]) for entry in entries]


def encoded(claims: Object) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
