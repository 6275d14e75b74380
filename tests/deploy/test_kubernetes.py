"""Manifests without a cluster: the schemas of Kubernetes itself, and what schemas cannot say."""

import copy
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from kvpool_vllm.announce import address
from tests.deploy import files

VERSIONS = ("1.29", "1.35")
KUBECTL = shutil.which("kubectl")
OURS = [item for item in files.manifests() if item[1]["kind"] != "ModelServing"]
MODEL_SERVING = {
    "spec": {"plugins", "recoveryPolicy", "replicas", "rolloutStrategy", "schedulerName", "template"},
    "template": {"gangPolicy", "networkTopology", "restartGracePeriodSeconds", "roles"},
    "role": {
        "name", "replicas", "workerReplicas", "entryTemplate", "workerTemplate", "maxUnavailable", "partition",
    },
}  # fmt: skip
"""Fields of Kthena's v1alpha1, which no package carries a schema of."""


def ids(items):
    return [where for where, _ in items]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("item", [item for _, item in OURS], ids=ids(OURS))
def test_objects_are_valid(item, version):
    """Every field exists and has the right type; a misspelt one is an error."""
    kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_find_misspelt_fields():
    """The check above can fail, deep inside a pod too."""
    broken = copy.deepcopy(next(item for _, item in OURS if item["kind"] == "DaemonSet"))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_model_servings_pods_are_valid():
    """Kthena's own fields are those of its v1alpha1; the pods within are checked as Kubernetes' own."""
    ((_, serving),) = [item for item in files.manifests() if item[1]["kind"] == "ModelServing"]
    assert serving["apiVersion"] == "workload.serving.volcano.sh/v1alpha1"
    assert serving["spec"].keys() <= MODEL_SERVING["spec"]
    assert serving["spec"]["template"].keys() <= MODEL_SERVING["template"]
    roles = serving["spec"]["template"]["roles"]
    assert [role["name"] for role in roles] == ["prefill", "decode"]
    for role in roles:
        assert role.keys() <= MODEL_SERVING["role"]
        assert {"name", "workerReplicas", "entryTemplate"} <= role.keys()
        pod = {
            "apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": role["name"]},
            "template": role["entryTemplate"],
        }  # fmt: skip
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("path", files.kustomizations(), ids=files.named)
def test_what_a_kustomization_names_exists(path):
    """Resources and patches are there, and every manifest beside them is named."""
    content = yaml.safe_load(path.read_text())
    assert content["kind"] == "Kustomization"
    named = [*content["resources"], *(patch["path"] for patch in content.get("patches", []))]
    for name in named:
        target = path.parent / name
        assert (target / "kustomization.yaml").is_file() if target.is_dir() else target.is_file(), name
    beside = {file.name for file in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
    assert beside <= set(named)


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@pytest.mark.parametrize("path", files.kustomizations(), ids=files.named)
def test_kustomize_builds_what_is_valid(path):
    """What `kubectl kustomize` makes is valid, all in one namespace."""
    command = [str(KUBECTL), "kustomize", str(path.parent)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    items = list(yaml.safe_load_all(built.stdout))
    assert {"Deployment", "DaemonSet", "Service"} <= {item["kind"] for item in items}
    for item in items:
        kubernetes_validate.validate(item, VERSIONS[-1], strict=True)
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] == "kvpool"


@pytest.mark.parametrize("path", files.patches(), ids=files.named)
def test_patches_meet_what_they_change(path):
    """A patch changes an object and containers of the base: another name would add something instead."""
    base = {(item["kind"], item["metadata"]["name"]): item for _, item in OURS}
    for patch in files.documents(path):
        (target,) = files.pod_specs(base[patch["kind"], patch["metadata"]["name"]])
        (changed,) = files.pod_specs(patch)
        assert {c["name"] for c in changed["containers"]} <= {c["name"] for c in target["containers"]}


@pytest.mark.parametrize("item", [item for _, item in files.manifests()], ids=ids(files.manifests()))
def test_names_within_a_manifest_lead_somewhere(item):
    """Mounts name volumes, probes name ports, selectors match their pods."""
    for spec in files.pod_specs(item):
        volumes = {volume["name"] for volume in spec.get("volumes", [])}
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            ports = {port["name"] for port in container.get("ports", [])}
            numbers = {port["containerPort"] for port in container.get("ports", [])}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                for asked in container.get(kind, {}).values():
                    if isinstance(asked, dict):
                        assert asked["port"] in ports | numbers, f"{container['name']}: {kind}"
    if item["kind"] in {"Deployment", "DaemonSet", "StatefulSet"}:
        labels = item["spec"]["template"]["metadata"]["labels"]
        assert item["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_services_have_pods():
    """Each Service of ours selects pods of ours, by a port that they name; masters that are named are Services."""
    pods = [
        (item["spec"]["template"]["metadata"]["labels"], [p["name"] for c in spec["containers"] for p in c["ports"]])
        for _, item in OURS
        for spec in files.pod_specs(item)
    ]
    services = {item["metadata"]["name"]: item["spec"] for _, item in OURS if item["kind"] == "Service"}
    for name, spec in services.items():
        chosen = [ports for labels, ports in pods if spec["selector"].items() <= labels.items()]
        assert len(chosen) == 1, name
        assert {port["targetPort"] for port in spec["ports"]} <= set(chosen[0]), name
    for path in [*files.DEPLOY.glob("kubernetes/**/*.yaml"), *files.DEPLOY.glob("kthena/*.yaml")]:
        for service in re.findall(r"([a-z-]+)(?:\.kvpool)?:50088", path.read_text()):
            assert service in services, path


def test_engines_are_found_where_they_serve():
    """The proxy is told the master alone; engines behind it have a command line that says where they serve."""
    proxies = [call.argv for call in files.calls() if "kubernetes" in call.where and call.argv[0] == "kvpool-proxy"]
    assert proxies
    assert all("prefiller" not in arg and "--instances" not in arg for argv in proxies for arg in argv)
    engines = [c for where, c in files.containers() if "pd.yaml" in where and c["command"][:2] == ["vllm", "serve"]]
    assert {container["name"] for container in engines} == {"prefill", "decode"}
    for container in engines:
        port = container["ports"][0]["containerPort"]
        assert address(None, "an id", ["/usr/local/bin/vllm", *container["command"][1:]]) == f":{port}"


def test_who_needs_the_pool_is_let_in():
    """Pods that name the master carry the label that the NetworkPolicy asks for; its ports are those in use."""
    (policy,) = [item["spec"] for _, item in OURS if item["kind"] == "NetworkPolicy"]
    (label,) = policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"].items()
    for where, item in OURS:
        for spec in files.pod_specs(item):
            if "kvpool-master" in str(spec["containers"]) and item["metadata"]["name"] != "kvpool-master":
                assert label in item["spec"]["template"]["metadata"]["labels"].items(), where
    allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    base = [item for where, item in OURS if "/base/" in where]
    opened = {
        port["containerPort"]
        for item in base
        for spec in files.pod_specs(item)
        for container in spec["containers"]
        for port in container["ports"]
    }
    assert allowed == opened


def test_the_socket_is_at_one_place():
    """The master tells engines the path that the node listens on: it must be the same in every pod."""
    (node,) = [item for _, item in OURS if item["kind"] == "DaemonSet"]
    container = node["spec"]["template"]["spec"]["containers"][0]
    path = next(item["value"] for item in container["env"] if item["name"] == "KVPOOL_SOCKET_PATH")
    mounts = []
    for _, item in files.manifests():
        for spec in files.pod_specs(item):
            places = {v["name"]: v["hostPath"]["path"] for v in spec.get("volumes", []) if v["name"] == "sockets"}
            for c in spec["containers"]:
                mounts += [(places[m["name"]], m["mountPath"]) for m in c["volumeMounts"] if m["name"] in places]
    assert len(mounts) == 6  # the node, three kinds of example engines, two of Kthena
    assert set(mounts) == {(path.rpartition("/")[0],) * 2}


def test_memory_holds_the_segment():
    """A limit below the segment would end the node while it touches its memory."""
    for where, container in files.containers():
        env = {item["name"]: item.get("value") for item in container.get("env", [])}
        if "KVPOOL_SEGMENT_SIZE" in env:
            segment = int(env["KVPOOL_SEGMENT_SIZE"].removesuffix("GB"))
            limit = container["resources"]["limits"]["memory"]
            assert int(limit.removesuffix("Gi")) >= segment + 2, where
            assert container["resources"]["requests"]["memory"] == limit, where
