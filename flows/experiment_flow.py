"""The whole graph of a scale as one flow: `python flows/launch.py experiment <scale>` runs it or deploys it.

    start ─┬─ curate ─┬─ sft ─┬─ each training: train ── evaluate ─┬─ each report: report ── end
           └─ base ───┘       └─ base and sft: evaluate ───────────┘

DVC decides nothing here: every stage runs. Steps hand on manifests, and files move through the datastore; a step that has a
stage calls its function and nothing else. Where sft, train and evaluate take several machines, see experiment_nodes_flow.py.
"""

from __future__ import annotations

from common import ProvenanceFlow, call_stage, fill_card
from graph import GraphParameters, begin_branch, merge_files, plan, publish
from metaflow import card, step
from places import where
from process import die_with_parent


class ExperimentFlow(GraphParameters, ProvenanceFlow):
    """Curate, base, sft; every training and its evaluation; base and sft evaluated; every report."""

    @where("small")
    @step
    def start(self):
        """The names of all branches, from params/experiment.yaml."""
        plan(self)
        self.next(self.curate, self.base)

    @where("curate")
    @step
    def curate(self):
        """Prompts: generated, deduplicated, split without leakage."""
        call_stage(self, "curate")
        self.next(self.prepared)

    @where("base")
    @step
    def base(self):
        """The base model: trained from scratch, or a released checkpoint."""
        call_stage(self, "base")
        self.next(self.prepared)

    @where("small")
    @step
    def prepared(self, inputs):
        """Prompts and base model together."""
        merge_files(self, inputs)
        self.next(self.sft)

    @where("sft")
    @step
    def sft(self):
        """The warm-up on thinking."""
        call_stage(self, "sft")
        self.next(self.trainings, self.given)

    @where("small")
    @step
    def trainings(self):
        """One branch a training."""
        self.next(self.train, foreach="training_names")

    @where("train")
    @card(type="blank")
    @step
    def train(self):
        """UniGRPO: thinking and image trained by one reward."""
        begin_branch(self)
        self.metrics = call_stage(self, "train")
        fill_card(self, "train", gallery="gallery")
        self.next(self.evaluate)

    @where("evaluate")
    @card(type="blank")
    @step
    def evaluate(self):
        """The benchmarks of a trained checkpoint."""
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")
        self.next(self.all_trained)

    @where("small")
    @step
    def given(self):
        """One branch for base and one for sft."""
        self.next(self.evaluate_given, foreach="given_names")

    @where("evaluate")
    @card(type="blank")
    @step
    def evaluate_given(self):
        """The benchmarks of base or sft."""
        begin_branch(self)
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")
        self.next(self.all_given)

    @where("small")
    @step
    def all_trained(self, inputs):
        """Every training and its evaluation."""
        merge_files(self, inputs)
        self.next(self.evaluated)

    @where("small")
    @step
    def all_given(self, inputs):
        """The evaluations of base and sft."""
        merge_files(self, inputs)
        self.next(self.evaluated)

    @where("small")
    @step
    def evaluated(self, inputs):
        """All of it together."""
        merge_files(self, inputs)
        self.next(self.reports)

    @where("small")
    @step
    def reports(self):
        """One branch a report."""
        self.next(self.report, foreach="report_names")

    @where("report")
    @step
    def report(self):
        """Tables, curves and galleries on one page, and their numbers as JSON."""
        begin_branch(self)
        call_stage(self, "report")
        self.next(self.reported)

    @where("small")
    @step
    def reported(self, inputs):
        """Every report."""
        merge_files(self, inputs)
        self.next(self.end)

    @where("small")
    @step
    def end(self):
        """The manifest of everything is kept under this run's name."""
        publish(self)


if __name__ == "__main__":
    die_with_parent()
    ExperimentFlow()
