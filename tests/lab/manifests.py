"""cron/cronjob.yaml as objects, for the tests that need an account as epok has it in a cluster."""

import string
from collections.abc import Iterable, Mapping

import yaml

from lab.network import EPOK
from lab.objects import Object

CRON = EPOK.parent / "cron"
ACCOUNT = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")


def manifests(
    namespace: str = "kube-system",
    image: str = "epok",
    interfaces: str = "eth0",
    publish: str = "none",
    file: str = "cronjob.yaml",
) -> list[Object]:
    """All objects. Raises KeyError or ValueError at a $ that stands for none of these variables."""
    values = {"EPOK_NS": namespace, "EPOK_IMAGE": image, "EPOK_INTERFACES": interfaces, "EPOK_PUBLISH": publish}
    values["EPOK_PORTS"] = ""
    text = string.Template((CRON / file).read_text()).substitute(values)
    return list(yaml.safe_load_all(text))


def account(namespace: str = "kube-system") -> list[Object]:
    """The account that epok has in the cluster: all but the CronJob."""
    return [made for made in manifests(namespace) if made["kind"] in ACCOUNT]


def one(kind: str, objects: Iterable[Object]) -> Object:
    """The only object of that kind."""
    [found] = [made for made in objects if made["kind"] == kind]
    return found


def template(objects: Iterable[Object]) -> Object:
    """What the CronJob makes a pod of."""
    return one("CronJob", objects)["spec"]["jobTemplate"]["spec"]["template"]


def container(objects: Iterable[Object]) -> Object:
    [only] = template(objects)["spec"]["containers"]
    return only


def environment(made: Object, secret: Mapping[str, str]) -> dict[str, str]:
    """That of a container, as the kubelet makes it with the Secret epok-ssh."""

    def value(variable: Object) -> str:
        if "valueFrom" not in variable:
            return variable.get("value", "")  # the API server drops an empty one
        key = variable["valueFrom"]["secretKeyRef"]
        assert key["name"] == "epok-ssh"
        return secret[key["key"]]

    return {variable["name"]: value(variable) for variable in made["env"]}
