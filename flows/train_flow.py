"""UniGRPO: thinking and image trained by one reward."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card
from common import resources as wanted
from metaflow import card, resources, step
from process import die_with_parent


class TrainFlow(StageFlow):
    """UniGRPO: thinking and image trained by one reward."""

    @resources(**wanted())
    @card(type="blank")
    @step
    def train(self):
        """UniGRPO: thinking and image trained by one reward."""
        self.metrics = call_stage(self, "train")
        fill_card(self, "train", gallery="gallery")


if __name__ == "__main__":
    die_with_parent()
    TrainFlow()
