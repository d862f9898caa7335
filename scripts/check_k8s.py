"""Checks every kustomization of k8s/ without a cluster and without kustomize.

Renders base and overlays (only the fields of a kustomization that k8s/ uses; others are refused),
validates each resource strictly against the schema of Kubernetes, and loads the settings and the
fleet of the ConfigMap the way the services do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from aither_sdk.errors import ConfigError
from aither_sdk.settings_sources import load_settings
from pulse_svc.fleet_file import load_fleet

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = "1.31"
"""Strictness is that of this version: an old one that is still run, so that newer fields show."""
_CLUSTER_WIDE = ("Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume")
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}

Resource = dict[str, Any]


class Refused(Exception):
    """A manifest is wrong. The message names it and says what is wrong."""


def main() -> int:
    faults = list(check(ROOT / "k8s"))
    for fault in faults:
        print(fault, file=sys.stderr)
    return bool(faults)


def check(k8s: Path) -> Iterator[str]:
    """Every fault in the folder, a line each. None at all is itself a fault."""
    found = sorted(k8s.rglob("kustomization.yaml"))
    if not found:
        yield f"{_name(k8s)}: no kustomization.yaml in it"
    for file in found:
        yield from _left_over(file)
        try:
            resources = render(file.parent)
        except Refused as refused:
            yield str(refused)
            continue
        for resource in resources:
            where = f"{_name(file)}: {_identity(resource)}"
            yield from (f"{where}: {fault}" for fault in _faults(resource))


def _faults(resource: Resource) -> Iterator[str]:
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    except (
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.InvalidSchemaError,
    ) as error:
        yield error.message
    for container in (
        resource.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ())
    ):
        yield from _probe_faults(container)
    if resource["kind"] == "ConfigMap":
        yield from _content_faults(resource.get("data", {}))


def _probe_faults(container: Resource) -> Iterator[str]:
    """A probe of a port that the container does not name would be answered by nobody. Our own
    services are asked by gRPC, others as they like it."""
    ports = {port["containerPort"] for port in container.get("ports", ())}
    names = {port.get("name") for port in container.get("ports", ())}
    for name in ("startup", "liveness", "readiness"):
        probe = container.get(f"{name}Probe", {})
        asked = probe.get("grpc", {})
        if not container["image"].startswith("aither"):
            if probe.get("httpGet", {}).get("port") not in names:
                yield f"{container['name']}: {name}Probe asks none of the ports {sorted(names)}"
        elif asked.get("service") != name:
            yield f"{container['name']}: {name}Probe does not ask for the service {name} by gRPC"
        elif asked["port"] not in ports:
            yield f"{container['name']}: {name}Probe asks none of the ports {sorted(ports)}"


def _content_faults(data: dict[str, str]) -> Iterator[str]:
    """What Aither itself would say of the files in a ConfigMap."""
    loaders: dict[str, Callable[[Path], object]] = {
        "aither.yaml": load_settings,
        "fleet.yaml": load_fleet,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in loaders.keys() & data.keys():
            path = Path(folder, name)
            path.write_text(data[name], "utf-8")
            try:
                loaders[name](path)
            except ConfigError as error:
                yield str(error).replace(f"{folder}/", "")


def _left_over(file: Path) -> Iterator[str]:
    """Manifests that lie beside a kustomization and stand in none."""
    kustomization = _documents(file)[0]
    named = [*kustomization.get("resources", ())]
    named += [patch.get("path") for patch in kustomization.get("patches", ())]
    for path in sorted(file.parent.glob("*.yaml")):
        if path != file and path.name not in named:
            yield f"{_name(path)}: {file.name} does not name it"


# -- rendering, as kustomize does it


def render(folder: Path) -> list[Resource]:
    """The resources of a kustomization. Raises Refused."""
    file = folder / "kustomization.yaml"
    if not file.is_file():
        raise Refused(f"{_name(folder)}: no kustomization.yaml in it")
    kustomization = _documents(file)[0]
    if unknown := kustomization.keys() - _KNOWN:
        raise Refused(f"{_name(file)}: cannot render {sorted(unknown)}; teach scripts/check_k8s.py")
    resources = [
        each for name in kustomization["resources"] for each in _named(folder / name, file)
    ]
    _patch(resources, kustomization.get("patches", ()), file)
    for resource in resources:
        if "namespace" in kustomization and resource["kind"] not in _CLUSTER_WIDE:
            resource["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", ()):
            _set_image(resource, image)
    identities = [_identity(resource) for resource in resources]
    if twice := {each for each in identities if identities.count(each) > 1}:
        raise Refused(f"{_name(file)}: more than once: {sorted(twice)}")
    return resources


def _named(path: Path, file: Path) -> list[Resource]:
    if path.is_dir():
        return render(path.resolve())
    if not path.is_file():
        raise Refused(f"{_name(file)}: names {path.name}, which does not exist")
    return _documents(path)


def _patch(resources: list[Resource], patches: list[dict[str, str]], file: Path) -> None:
    for patch in patches:
        if patch.keys() != {"path"}:
            raise Refused(f"{_name(file)}: only patches of the form `path: file` can be rendered")
        for document in _named(file.parent / patch["path"], file):
            targets = [each for each in resources if _identity(each) == _identity(document)]
            if not targets:
                raise Refused(
                    f"{_name(file)}: {patch['path']} patches {_identity(document)}: not here"
                )
            targets[0].update(_merged(targets[0], document))


def _merged(below: Any, above: Any) -> Any:
    """A strategic merge, as far as it is needed: lists of named things merge by name."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = below | {key: _merged(below.get(key), value) for key, value in above.items()}
        return {key: value for key, value in both.items() if value is not None}
    if _are_named(below) and _are_named(above):
        items = {item["name"]: item for item in below}
        for item in above:
            items[item["name"]] = _merged(items.get(item["name"]), item)
        return list(items.values())
    return above


def _are_named(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and "name" in each for each in value
    )


def _set_image(resource: Resource, image: dict[str, str]) -> None:
    for container in (
        resource.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ())
    ):
        if container["image"].partition(":")[0] == image["name"]:
            tag = (
                f"@{image['digest']}" if "digest" in image else f":{image.get('newTag', 'latest')}"
            )
            container["image"] = image.get("newName", image["name"]) + tag


def _documents(path: Path) -> list[Resource]:
    try:
        documents = [
            each for each in yaml.safe_load_all(path.read_text("utf-8")) if each is not None
        ]
    except yaml.YAMLError as error:
        raise Refused(f"{_name(path)}: {error}") from error
    if not documents or not all(isinstance(each, dict) for each in documents):
        raise Refused(f"{_name(path)}: not YAML mappings")
    return documents


def _identity(resource: Resource) -> str:
    metadata = resource.get("metadata", {})
    return f"{resource.get('kind')} {metadata.get('namespace', '')}/{metadata.get('name')}"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
