"""The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card
from common import resources as wanted
from metaflow import card, resources, step
from process import die_with_parent


class EvaluateFlow(StageFlow):
    """The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""

    @resources(**wanted())
    @card(type="blank")
    @step
    def evaluate(self):
        """The benchmark of one checkpoint: verdicts, outcomes, metrics, samples."""
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")


if __name__ == "__main__":
    die_with_parent()
    EvaluateFlow()
