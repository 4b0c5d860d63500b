"""The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card
from common import resources as wanted
from metaflow import card, resources, step
from process import die_with_parent


class EvaluateFlow(StageFlow):
    """The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""

    @step
    def start(self):
        """Nothing to prepare: the launcher has checked name, params and inputs."""
        self.next(self.evaluate)

    @resources(**wanted())
    @card(type="blank")
    @step
    def evaluate(self):
        """The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs lie in the workspace, where DVC takes them from."""


if __name__ == "__main__":
    die_with_parent()
    EvaluateFlow()
