"""Kubernetes' objects, and whether they are of their schemas."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import kubernetes_validate

Object = dict[str, Any]
# The oldest version that docs/kubernetes.md promises, and the newest that there is a schema of.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
# For objects that are not Kubernetes' own: models made of the projects' definitions.
MODELS = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}


class Refused(Exception):
    """A document is not of its schema."""


def check(document: Object, version: str) -> None:
    module = MODELS.get(document["apiVersion"])
    try:
        if module is None:
            kubernetes_validate.validate(document, version, strict=True)
            return
        model = getattr(importlib.import_module(module), document["kind"])
        kept = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except (kubernetes_validate.ValidationError, ValueError) as reason:
        raise Refused(str(reason)) from None
    # The models ignore fields that they do not know.
    if kept != document:
        raise Refused(f"{document} is understood as {kept}")


def mappings(value: Any) -> Iterator[Object]:
    """Yield all mappings in a value, the value itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings(inner)
