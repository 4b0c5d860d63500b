"""Any stage on another machine: UNIGRPO_STAGE says which, and so what its step asks for."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card, receive_outputs, send_inputs
from metaflow import card, step
from places import STAGE, where
from process import die_with_parent


class RemoteFlow(StageFlow):
    """A stage on another machine: here only its inputs are sent and its outputs received."""

    @step
    def start(self):
        """Inputs go to the datastore."""
        send_inputs(self, STAGE)
        self.next(self.work)

    @where(STAGE)
    @card(type="blank")
    @step
    def work(self):
        """The stage."""
        self.metrics = call_stage(self, STAGE)
        fill_card(self, STAGE, gallery="gallery" if STAGE == "train" else "samples")
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs come to the workspace, where DVC takes them from."""
        receive_outputs(self)


if __name__ == "__main__":
    die_with_parent()
    RemoteFlow()
