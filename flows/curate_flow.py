"""Prompts: generated, deduplicated, split without leakage."""

from __future__ import annotations

from common import StageFlow, call_stage
from metaflow import step
from process import die_with_parent


class CurateFlow(StageFlow):
    """Prompts: generated, deduplicated, split without leakage."""

    @step
    def curate(self):
        """Prompts: generated, deduplicated, split without leakage."""
        self.metrics = call_stage(self, "curate")


if __name__ == "__main__":
    die_with_parent()
    CurateFlow()
