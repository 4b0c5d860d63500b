"""The base model: trained from scratch on rendered scenes."""

from __future__ import annotations

from common import StageFlow, call_stage
from common import resources as wanted
from metaflow import resources, step
from process import die_with_parent


class BaseFlow(StageFlow):
    """The base model: trained from scratch on rendered scenes."""

    @resources(**wanted())
    @step
    def base(self):
        """The base model: trained from scratch on rendered scenes."""
        self.metrics = call_stage(self, "base")


if __name__ == "__main__":
    die_with_parent()
    BaseFlow()
