"""Checks the Kubernetes manifest against Kubernetes' schemas, and against what nodes.sh expects."""

from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
@pytest.mark.parametrize("version", ["1.31", "1.35"])
def test_manifest_fits_the_kubernetes_schema(document: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(document, version, strict=True)
    broken = {**document, "spec": {**document["spec"], "completionMod": "Indexed"}}
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, version, strict=True)


def test_host_counts_and_names_agree() -> None:
    service, job = DOCUMENTS
    spec, pod = job["spec"], job["spec"]["template"]
    environ = {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environ["NODES"])
    # A pod's name is JOB-INDEX; its subdomain gives it the address POD.SERVICE.
    assert environ["HEAD"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    mounted = {one["name"] for one in pod["spec"]["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    program, config, *_ = pod["spec"]["containers"][0]["command"]
    assert (LAUNCH / Path(program).name).is_file()
    assert config.startswith("/config/")
