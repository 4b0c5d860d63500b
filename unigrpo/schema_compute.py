"""The schema of where stages run when not on this machine; nothing here can move a number. unigrpo.schema holds the rest."""

from __future__ import annotations

from pydantic import Field

from unigrpo.schema_model import Count, Positive, Section


class SmallConfig(Section):
    """What a remote step without GPUs asks for."""

    cpu: Positive
    memory_mb: Positive


class RemoteConfig(Section):
    """Kubernetes and AWS Batch: read by flows/ where UNIGRPO_BACKEND names one; null leaves a choice to Metaflow's settings.

    `compute.resources` says what a step with GPUs asks for, of every node.
    """

    nodes: Positive
    image: str | None
    small: SmallConfig
    disk_mb: Positive
    retries: Count
    retry_minutes: Count
    timeout_hours: Positive
    mirror_seconds: float = Field(gt=0)
    secrets: tuple[str, ...]
    namespace: str | None
    service_account: str | None
    node_selector: dict[str, str]
    tolerations: tuple[dict[str, str], ...]
    labels: dict[str, str]
    queue: str | None
    small_queue: str | None
