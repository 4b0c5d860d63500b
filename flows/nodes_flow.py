"""Any stage on several other machines at once: as remote_flow.py, where compute.remote.nodes is more than one."""

from __future__ import annotations

from common import StageFlow, call_stage, fill_card, receive_outputs, send_inputs
from metaflow import card, parallel, step
from places import STAGE, where
from process import die_with_parent


class NodesFlow(StageFlow):
    """A stage on several machines at once. Every one starts its share of the processes; the first one writes."""

    @step
    def start(self):
        """Inputs go to the datastore."""
        send_inputs(self, STAGE)
        self.next(self.work, num_parallel=self.nodes)

    @where(STAGE)
    @card(type="blank")
    @parallel
    @step
    def work(self):
        """The stage, with one process group over all machines."""
        self.metrics = call_stage(self, STAGE)
        fill_card(self, STAGE, gallery="gallery" if STAGE == "train" else "samples")
        self.next(self.gather)

    @step
    def gather(self, inputs):
        """What the first machine wrote."""
        self.outputs, self.metrics = next((part.outputs, part.metrics) for part in inputs if part.outputs)
        self.next(self.end)

    @step
    def end(self):
        """The stage's outputs come to the workspace, where DVC takes them from."""
        receive_outputs(self)


if __name__ == "__main__":
    die_with_parent()
    NodesFlow()
