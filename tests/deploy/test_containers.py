"""Dockerfiles and the Compose file, as far as they can be read without a daemon."""

import copy
import re
import shutil
import subprocess

import pytest
from compose_pydantic.models import ComposeSpecification
from pydantic import ValidationError

from tests.deploy import files

DOCKERFILES = sorted((files.DEPLOY / "docker").glob("*Dockerfile"))


def compose_plugin():
    docker = shutil.which("docker")
    if docker is None:
        return None
    found = subprocess.run([docker, "compose", "version"], capture_output=True, timeout=30, check=False)
    return docker if found.returncode == 0 else None


DOCKER = compose_plugin()


def instructions(path):
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=files.named)
def test_what_is_copied_exists_and_is_not_ignored(path):
    """Each COPY from the checkout finds its source in the build's context."""
    ignored = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for word, rest in instructions(path):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (files.ROOT / source).exists(), source
                assert f"!{source}" in ignored, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=files.named)
def test_what_the_package_is_built_from_is_copied(path):
    """pyproject.toml names a readme, a licence and folders of packages: without them no wheel is built."""
    copied = {name for word, rest in instructions(path) if word == "COPY" for name in rest.split()[:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "kvpool", "connectors"} <= copied


def test_the_image_runs_as_nobody_special():
    """A number, which Kubernetes can tell from root; and the same one in every manifest."""
    ((_, user),) = [line for line in instructions(files.DEPLOY / "docker/Dockerfile") if line[0] == "USER"]
    assert user == "10001:10001"
    for where, item in files.manifests():
        for spec in files.pod_specs(item):
            security = spec.get("securityContext", {})
            if any(c["image"].startswith("kvpool:") for c in spec["containers"]):
                assert (security["runAsUser"], security["runAsGroup"], security["runAsNonRoot"]) == (
                    10001,
                    10001,
                    True,
                ), where


def test_compose_is_valid():
    """Every field of the file exists and has the right type, extensions left out."""
    content = {name: value for name, value in files.compose().items() if not name.startswith("x-")}
    ComposeSpecification(**content)
    engine = copy.deepcopy(content)
    engine["services"]["engine"] = files.compose_engine()
    ComposeSpecification(**engine)
    content["services"]["node-1"]["helthcheck"] = {}
    with pytest.raises(ValidationError, match="helthcheck"):
        ComposeSpecification(**content)


def test_names_in_compose_lead_somewhere():
    """Volumes, configurations and services that are named exist; so do files of the checkout."""
    content, folder = files.compose(), files.DEPLOY / "compose"
    services = {**content["services"], "engine": files.compose_engine()}
    for service in services.values():
        volumes = {mount.partition(":")[0] for mount in service.get("volumes", [])}
        assert volumes <= content["volumes"].keys()
        assert service.get("depends_on", {}).keys() <= services.keys()
        assert {mount["source"] for mount in service.get("configs", [])} <= content["configs"].keys()
        if "build" in service:
            context = folder / service["build"]["context"]
            assert (context / service["build"]["dockerfile"]).is_file()
    for config in content["configs"].values():
        assert (folder / config["file"]).is_file()


def test_compose_publishes_on_the_loopback_only():
    """There is no token: whatever a service publishes stays on this machine."""
    for name, service in {**files.compose()["services"], "engine": files.compose_engine()}.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name


@pytest.mark.skipif(DOCKER is None, reason="docker compose is not installed")
def test_compose_itself_reads_the_file():
    """`docker compose config` takes it."""
    command = [str(DOCKER), "compose", "-f", str(files.DEPLOY / "compose/compose.yaml"), "config", "--quiet"]
    subprocess.run(command, timeout=60, check=True)
