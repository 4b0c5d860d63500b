"""The warm-up on (prompt, thinking, image)."""

from __future__ import annotations

from common import StageFlow, call_stage
from common import resources as wanted
from metaflow import resources, step
from process import die_with_parent


class SftFlow(StageFlow):
    """The warm-up on (prompt, thinking, image)."""

    @resources(**wanted())
    @step
    def sft(self):
        """The warm-up on (prompt, thinking, image)."""
        self.metrics = call_stage(self, "sft")


if __name__ == "__main__":
    die_with_parent()
    SftFlow()
