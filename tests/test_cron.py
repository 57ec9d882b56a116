"""What cron/ ships, as its users apply it: with envsubst or kustomize, kubectl and a real kube-apiserver."""

import base64
import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import epok
from lab.apiserver import ApiServer
from lab.machine import BACKENDS, need, until
from lab.manifests import CRON, container, environment, manifests, one, template
from lab.network import EPOK, Lab
from lab.objects import Object

needs_lab = pytest.mark.parametrize("lab", BACKENDS[:1], indirect=True)

# The commands that cron/epok.config tells its readers: to read it, to make the namespace and the Secret, to install.
READ, NAMESPACE, SECRET, INSTALL = (
    re.sub(r"\\\n#", "", found)
    for found in re.findall(r"^#   (\S(?:.*\\\n)*.*)$", (CRON / "epok.config").read_text(), re.MULTILINE)
)
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted pod-security.kubernetes.io/warn=restricted"
ACCOUNT = "system:serviceaccount:epok:epok"
KEY = "a private key\n"
KNOWN_HOST = "192.0.2.1 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2gUjGsyxAQtRxfQbF1kLa4yJSgPA5VnGl6cqcQS9PD\n"
OVERLAY = """
resources: [../cron]
namespace: other
images:
  - name: registry.example/epok
    newTag: 2.0.0
patches:
  - target:
      kind: CronJob
    patch: |
      apiVersion: batch/v1
      kind: CronJob
      metadata: {name: epok}
      spec: {jobTemplate: {spec: {template: {spec: {containers: [
        {name: epok, env: [{name: EPOK_INTERFACES, value: "lo,eth+"}, {name: EPOK_MASQUERADE, value: always}]}]}}}}}
"""
Done = subprocess.CompletedProcess[str]
Shell = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the two files that cron/epok.config names."""
    made = tmp_path_factory.mktemp("home")
    (made / ".ssh").mkdir()
    (made / ".ssh" / "epok").write_text(KEY)
    (made / ".ssh" / "epok_known_hosts").write_text(KNOWN_HOST)
    return made


@pytest.fixture(scope="module")
def server(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    return ApiServer(lab.host, tmp_path_factory.mktemp("apiserver"))


@pytest.fixture(scope="module")
def shell(server: ApiServer, home: Path) -> Shell:
    """A person's shell in the checkout, after the commands that come before the installation."""
    need("envsubst", "apt-get install gettext-base")
    config = server.kubeconfig("admin", certificate=server.admin)
    path = os.pathsep.join((str(Path(server.programs["kubectl"]).parent), os.environ["PATH"]))
    environ = {"PATH": path, "HOME": str(home), "KUBECONFIG": config}

    def run(*lines: str, input: str = "", succeeds: bool = True) -> Done:
        script = "\n".join((f"cd {EPOK.parent}", READ, *lines))
        done = server.space.run(["sh", "-euc", script], input, check=False, env=environ)
        assert (done.returncode == 0) == succeeds, f"{script}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    run(NAMESPACE, f"kubectl label ns $EPOK_NS {RESTRICTED}", SECRET)
    return run


@pytest.fixture
def installed(shell: Shell) -> Done:
    """What the installation said; the objects are there."""
    return shell(INSTALL)


def by_kind(text: str) -> dict[str, Object]:
    return {made["kind"]: made for made in yaml.safe_load_all(text)}


def namespaces(value: Any) -> set[str]:
    """All that are named anywhere in an object, or a list of them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = {value["namespace"]} if isinstance(value, dict) and "namespace" in value else set()
    return own.union(*map(namespaces, inner))


def names(shell: Shell) -> set[str]:
    """Everything in the cluster that can be listed, but for what the server itself writes all the time."""
    listed = shell("kubectl api-resources --verbs=list -o name").stdout.split()
    kinds = [kind for kind in listed if not kind.startswith(("events", "leases."))]
    return set(shell(f"kubectl get {','.join(kinds)} -A --ignore-not-found -o name").stdout.split())


# ---- what the manifest says and epok.py knows


def test_deadline_lets_epok_speak_and_comes_before_the_next_minute() -> None:
    [timeout] = [setting.convert(setting.default) for setting in epok.SETTINGS if setting.option == "--timeout"]
    job, pod = one("CronJob", manifests())["spec"]["jobTemplate"]["spec"], template(manifests())["spec"]
    assert job["activeDeadlineSeconds"] > timeout + 5, "a pod needs some seconds to start"
    assert job["activeDeadlineSeconds"] + pod["terminationGracePeriodSeconds"] < 60


def test_a_pod_that_never_ends_holds_no_later_run_up() -> None:
    """As it does on a dead node."""
    assert one("CronJob", manifests())["spec"]["concurrencyPolicy"] == "Replace"
    assert "activeDeadlineSeconds" in one("CronJob", manifests())["spec"]["jobTemplate"]["spec"]


def test_epok_takes_the_command_line_and_environment_of_the_pod() -> None:
    made = manifests(interfaces="lo,eth+")
    environ = environment(container(made), {"ssh_host": "epok@192.0.2.1,epok@192.0.2.2:2222", "ssh_port": "22"})
    assert set(environ) <= {setting.variable for setting in epok.SETTINGS}
    options = epok.parse_options(container(made)["args"], environ)
    assert [str(login) for login in options.host] == ["epok@192.0.2.1", "epok@192.0.2.2:2222"]
    assert options.interfaces == ("lo", "eth+")


def test_epok_takes_the_configuration_on_the_command_line_too(home: Path) -> None:
    argv = ["env", "-i", f"HOME={home}", "sh", "-euc", f"cd {EPOK.parent}\n{READ}\nenv -0"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    environ = dict(line.split("=", 1) for line in printed.split("\0") if line)
    options = epok.parse_options(["--dry-run", "ssh"], environ)
    assert Path(options.key).is_file() and Path(options.known_hosts).is_file()


@pytest.mark.parametrize("file", ["cronjob.yaml", "publish.yaml"])
def test_nothing_is_bound_to_a_namespace_of_ours(file: str) -> None:
    assert namespaces(manifests(namespace="theirs", file=file)) == {"theirs"}


# ---- with envsubst


@needs_lab
def test_install_is_accepted_without_a_warning(installed: Done) -> None:
    assert installed.stderr == ""


@needs_lab
def test_install_again_changes_nothing(installed: Done, shell: Shell) -> None:
    again = shell(INSTALL)
    assert again.stderr == ""
    assert all(line.endswith(" unchanged") for line in again.stdout.splitlines()), again.stdout


@needs_lab
def test_a_misspelt_field_would_be_refused(shell: Shell) -> None:
    for right, wrong in (("enableServiceLinks", "enableServiceLink"), ("backoffLimit", "backOffLimit")):
        done = shell(INSTALL.replace("| kubectl", f"| sed s/{right}:/{wrong}:/ | kubectl"), succeeds=False)
        assert re.search(f'unknown field "spec.jobTemplate.spec.*{wrong}"', done.stderr), done.stderr


@needs_lab
def test_a_weaker_cronjob_would_be_warned_about(shell: Shell) -> None:
    done = shell(INSTALL.replace("| kubectl apply", "| sed /runAsNonRoot:/d | kubectl apply --dry-run=server"))
    assert 'Warning: would violate PodSecurity "restricted:latest"' in done.stderr


@needs_lab
@pytest.mark.parametrize("variable", ["EPOK_IMAGE", "EPOK_NS"])
def test_a_forgotten_variable_is_refused(shell: Shell, variable: str) -> None:
    shell(f"unset {variable}", INSTALL.replace("-f -", "--dry-run=server -f -"), succeeds=False)


def test_forgotten_interfaces_are_what_epok_complains_about() -> None:
    made = manifests(interfaces="")
    environ = environment(container(made), {"ssh_host": "epok@192.0.2.1", "ssh_port": "22"})
    with pytest.raises(epok.Fatal, match="EPOK_INTERFACES"):
        epok.parse_options(container(made)["args"], environ)


@needs_lab
def test_key_is_for_its_owner_and_the_group_alone(installed: Done, server: ApiServer) -> None:
    stored = server.request("GET", "/apis/batch/v1/namespaces/epok/cronjobs/epok")
    pod = template([stored])["spec"]
    assert [volume["secret"]["defaultMode"] for volume in pod["volumes"]] == [0o400]
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


@needs_lab
def test_pod_finds_in_the_secret_what_it_looks_for(installed: Done, server: ApiServer) -> None:
    made = [server.request("GET", "/apis/batch/v1/namespaces/epok/cronjobs/epok")]
    stored = server.request("GET", "/api/v1/namespaces/epok/secrets/epok-ssh")["data"]
    secret = {key: base64.b64decode(value).decode() for key, value in stored.items()}
    options = epok.parse_options(container(made)["args"], environment(container(made), secret))
    assert options.host == (epok.Login("epok", "192.0.2.1", 22),)
    [mount] = container(made)["volumeMounts"]
    files = {f"{mount['mountPath']}/{key}": value for key, value in secret.items()}
    assert (files[options.key], files[options.known_hosts]) == (KEY, KNOWN_HOST)


def test_pod_starts_with_a_secret_of_the_older_epok() -> None:
    environment(container(manifests()), {"ssh_host": "epok@192.0.2.1", "ssh_port": "22"})
    assert all("items" not in volume["secret"] for volume in template(manifests())["spec"]["volumes"])


@needs_lab
def test_uninstall_leaves_nothing(shell: Shell) -> None:
    uninstall = INSTALL.replace("apply", "delete")
    shell(f"{uninstall} --ignore-not-found")
    before = names(shell)
    shell(INSTALL)
    assert len(names(shell) - before) == 4
    shell(uninstall)
    assert names(shell) == before


# ---- pods


@pytest.fixture
def pod(installed: Done, shell: Shell, server: ApiServer, request: pytest.FixtureRequest) -> Object:
    """A pod as the controller would make it for a Job that kubectl made of the CronJob."""
    shell("kubectl delete job,pod -n $EPOK_NS --all --now")
    made = shell("kubectl create job -n $EPOK_NS --from=cronjob/epok now")
    assert made.stderr == ""
    job = server.request("GET", "/apis/batch/v1/namespaces/epok/jobs/now")["spec"]["template"]
    return {"apiVersion": "v1", "kind": "Pod", **job, "metadata": {**job["metadata"], "generateName": "now-"}}


def create(shell: Shell, made: Object, **how: Any) -> Done:
    return shell("kubectl create -n $EPOK_NS -o json -f -", input=json.dumps(made), **how)


@needs_lab
def test_pod_is_accepted_where_only_restricted_ones_are(pod: Object, shell: Shell) -> None:
    assert create(shell, pod).stderr == ""


@needs_lab
@pytest.mark.parametrize(
    "weaken",
    [
        pytest.param(lambda spec: spec["securityContext"].pop("runAsNonRoot"), id="perhaps root"),
        pytest.param(lambda spec: spec["securityContext"].update(runAsUser=0), id="root"),
        pytest.param(lambda spec: spec["securityContext"].pop("seccompProfile"), id="all system calls"),
        pytest.param(
            lambda spec: spec["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"), id="escalation"
        ),
        pytest.param(lambda spec: spec["containers"][0]["securityContext"].pop("capabilities"), id="capabilities"),
    ],
)
def test_a_weaker_pod_would_be_refused(pod: Object, shell: Shell, weaken: Callable[[Object], Any]) -> None:
    weaker = copy.deepcopy(pod)
    weaken(weaker["spec"])
    assert 'violates PodSecurity "restricted:latest"' in create(shell, weaker, succeeds=False).stderr


@needs_lab
def test_no_other_pod_of_the_account_gets_its_token(pod: Object, shell: Shell) -> None:
    def mounts(made: Object) -> set[str]:
        spec = json.loads(create(shell, made).stdout)["spec"]
        return {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}

    other = copy.deepcopy(pod)
    del other["spec"]["automountServiceAccountToken"]
    assert mounts(pod) - mounts(other) == {"/var/run/secrets/kubernetes.io/serviceaccount"}


# ---- the account


@needs_lab
def test_account_may_do_what_epok_does_and_nothing_else(installed: Done, shell: Shell) -> None:
    def rules(account: str, namespace: str) -> set[tuple[str, ...]]:
        done = shell(f"kubectl auth can-i --list --no-headers -n {namespace} --as={account}")
        assert done.stderr == ""
        return {tuple(re.split(r"\s{2,}", line.strip())) for line in done.stdout.splitlines()}

    for namespace in ("epok", "default", "kube-system"):
        anybody = rules("system:serviceaccount:epok:default", namespace)
        assert rules(ACCOUNT, namespace) - anybody == {
            ("services", "[]", "[]", "[list]"),
            ("nodes", "[]", "[]", "[list]"),
            ("endpointslices.discovery.k8s.io", "[]", "[]", "[list]"),
            ("events", "[]", "[]", "[create patch]"),
        }


@needs_lab
def test_publish_adds_one_verb_of_one_resource_and_goes_without_a_trace(installed: Done, shell: Shell) -> None:
    before, publish = names(shell), INSTALL.replace("cronjob", "publish")
    asked = f"kubectl auth can-i patch services --subresource=status -n default --as={ACCOUNT}"
    assert shell(asked, succeeds=False).stdout == "no\n"
    made = shell(publish)
    assert made.stderr == "" and len(made.stdout.splitlines()) == 2
    until(lambda: shell(f"{asked} || true").stdout == "yes\n", "the role counts")
    for other in ("patch services", "update services --subresource=status", "patch nodes --subresource=status"):
        assert shell(asked.replace("patch services --subresource=status", other), succeeds=False).stdout == "no\n"
    shell(publish.replace("apply", "delete"))
    assert names(shell) == before


@needs_lab
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("list services -A", "yes"),
        ("list nodes", "yes"),
        ("create events -n default", "yes"),
        ("get secrets -n epok", "no"),
        ("list secrets -A", "no"),
        ("list pods -A", "no"),
        ("watch services -A", "no"),
        ("patch services -n default", "no"),
        ("create jobs -n epok", "no"),
        ("create serviceaccounts/token -n epok", "no"),
    ],
)
def test_account_is_asked(installed: Done, shell: Shell, asked: str, answer: str) -> None:
    done = shell(f"kubectl auth can-i {asked} --as={ACCOUNT}", succeeds=answer == "yes")
    assert done.stdout.strip() == answer


# ---- with kustomize


@needs_lab
def test_kustomize_as_shipped_gives_what_the_configuration_as_shipped_gives(installed: Done, shell: Shell) -> None:
    done = shell("kubectl apply -k cron")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 4
    assert all(line.endswith(" unchanged") for line in done.stdout.splitlines()), done.stdout


@needs_lab
def test_kustomize_gives_what_envsubst_gives_for_the_same_values(shell: Shell, tmp_path: Path) -> None:
    edited = shutil.copytree(CRON, tmp_path / "cron") / "kustomization.yaml"
    text = edited.read_text()
    for old, new in (
        ("namespace: epok", "namespace: other"),
        ("image: registry.example/epok:1.0.0", "image: registry.example:5000/mine/epok:2.0.0"),
        ("value: eth0", 'value: "lo,eth+"'),
        ("value: none", "value: auto"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    edited.write_text(text)
    with_kustomize = shell(f"kubectl kustomize {edited.parent}")
    values = "EPOK_NS=other EPOK_IMAGE=registry.example:5000/mine/epok:2.0.0 EPOK_INTERFACES=lo,eth+ EPOK_PUBLISH=auto"
    with_envsubst = shell(f"export {values}", INSTALL.split("|")[0])
    assert with_kustomize.stderr == ""
    assert by_kind(with_kustomize.stdout) == by_kind(with_envsubst.stdout)


@needs_lab
def test_an_overlay_says_only_what_differs(shell: Shell, tmp_path: Path) -> None:
    shutil.copytree(CRON, tmp_path / "cron")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(OVERLAY)
    shell("kubectl create ns other", f"kubectl label ns other {RESTRICTED}")
    done = shell(f"kubectl apply --dry-run=server -o json -k {tmp_path}/mine")
    assert done.stderr == ""
    made = json.loads(done.stdout)["items"]
    assert container(made)["image"] == "registry.example/epok:2.0.0"
    assert [binding["namespace"] for binding in one("ClusterRoleBinding", made)["subjects"]] == ["other"]
    environ = environment(container(made), {"ssh_host": "epok@192.0.2.1", "ssh_port": "22"})
    options = epok.parse_options(container(made)["args"], environ)
    assert (options.interfaces, options.masquerade) == (("lo", "eth+"), "always")
