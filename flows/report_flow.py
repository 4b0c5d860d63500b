"""Tables, curves and galleries on one page, and their numbers as JSON."""

from __future__ import annotations

from common import StageFlow, call_stage
from metaflow import step
from process import die_with_parent


class ReportFlow(StageFlow):
    """Tables, curves and galleries on one page, and their numbers as JSON."""

    @step
    def report(self):
        """Tables, curves and galleries on one page, and their numbers as JSON."""
        self.metrics = call_stage(self, "report")


if __name__ == "__main__":
    die_with_parent()
    ReportFlow()
