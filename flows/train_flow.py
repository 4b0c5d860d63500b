"""UniGRPO: thinking and image trained by one reward."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card
from common import resources as wanted
from metaflow import card, resources, step
from process import die_with_parent


class TrainFlow(StageFlow):
    """UniGRPO: thinking and image trained by one reward."""

    @step
    def start(self):
        """Nothing to prepare: the launcher has checked name, params and inputs."""
        self.next(self.train)

    @resources(**wanted())
    @card(type="blank")
    @step
    def train(self):
        """UniGRPO: thinking and image trained by one reward."""
        self.metrics = call_stage(self, "train")
        fill_card(self, "train", gallery="gallery")
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs lie in the workspace, where DVC takes them from."""


if __name__ == "__main__":
    die_with_parent()
    TrainFlow()
