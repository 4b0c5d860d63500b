"""Tables, curves and galleries on one page, and their numbers as JSON."""

from __future__ import annotations

from common import StageFlow, call_stage
from metaflow import step
from process import die_with_parent


class ReportFlow(StageFlow):
    """Tables, curves and galleries on one page, and their numbers as JSON."""

    @step
    def start(self):
        """Nothing to prepare: the launcher has checked name, params and inputs."""
        self.next(self.report)

    @step
    def report(self):
        """Tables, curves and galleries on one page, and their numbers as JSON."""
        self.metrics = call_stage(self, "report")
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs lie in the workspace, where DVC takes them from."""


if __name__ == "__main__":
    die_with_parent()
    ReportFlow()
