"""Prompts: generated, deduplicated, split without leakage."""

from __future__ import annotations

from common import StageFlow, call_stage
from metaflow import step
from process import die_with_parent


class CurateFlow(StageFlow):
    """Prompts: generated, deduplicated, split without leakage."""

    @step
    def start(self):
        """Nothing to prepare: the launcher has checked name, params and inputs."""
        self.next(self.curate)

    @step
    def curate(self):
        """Prompts: generated, deduplicated, split without leakage."""
        self.metrics = call_stage(self, "curate")
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs lie in the workspace, where DVC takes them from."""


if __name__ == "__main__":
    die_with_parent()
    CurateFlow()
