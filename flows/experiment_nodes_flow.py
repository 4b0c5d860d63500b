"""The whole graph of a scale where sft, train and evaluate take several machines (compute.remote.nodes above one).

As experiment_flow.py, with a step before such a stage that knows how many machines, and one after it that takes what the first
one wrote. Kubernetes and Argo Workflows start such groups (JobSets), AWS Step Functions does not.
"""

from __future__ import annotations

from common import call_stage, fill_card
from experiment_flow import ExperimentFlow
from graph import begin_branch, merge_files
from metaflow import card, parallel, step
from places import where
from process import die_with_parent


class ExperimentNodesFlow(ExperimentFlow):
    """Curate, base, sft; every training and its evaluation; base and sft evaluated; every report."""

    @where("small")
    @step
    def prepared(self, inputs):
        """Prompts and base model together."""
        merge_files(self, inputs)
        self.next(self.begin_sft)

    @where("small")
    @step
    def begin_sft(self):
        """As many branches as machines."""
        self.next(self.sft, num_parallel=self.nodes)

    @where("sft")
    @parallel
    @step
    def sft(self):
        """The warm-up on thinking."""
        call_stage(self, "sft")
        self.next(self.warm)

    @where("small")
    @step
    def warm(self, inputs):
        """What the first machine wrote."""
        merge_files(self, inputs)
        self.next(self.arms)

    @where("small")
    @step
    def arms(self):
        """Trainings, and beside them the evaluations of base and sft."""
        self.next(self.trainings, self.given)

    @where("small")
    @step
    def trainings(self):
        """One branch a training."""
        self.next(self.begin_train, foreach="training_names")

    @where("small")
    @step
    def begin_train(self):
        """A branch's training."""
        begin_branch(self)
        self.next(self.train, num_parallel=self.nodes)

    @where("train")
    @card(type="blank")
    @parallel
    @step
    def train(self):
        """UniGRPO: thinking and image trained by one reward."""
        self.metrics = call_stage(self, "train")
        fill_card(self, "train", gallery="gallery")
        self.next(self.trained)

    @where("small")
    @step
    def trained(self, inputs):
        """What the first machine wrote."""
        merge_files(self, inputs)
        self.next(self.begin_evaluate)

    @where("small")
    @step
    def begin_evaluate(self):
        """As many branches as machines."""
        self.next(self.evaluate, num_parallel=self.nodes)

    @where("evaluate")
    @card(type="blank")
    @parallel
    @step
    def evaluate(self):
        """The benchmarks of a trained checkpoint."""
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")
        self.next(self.measured)

    @where("small")
    @step
    def measured(self, inputs):
        """What the first machine wrote."""
        merge_files(self, inputs)
        self.next(self.all_trained)

    @where("small")
    @step
    def given(self):
        """One branch for base and one for sft."""
        self.next(self.begin_given, foreach="given_names")

    @where("small")
    @step
    def begin_given(self):
        """A branch's evaluation."""
        begin_branch(self)
        self.next(self.evaluate_given, num_parallel=self.nodes)

    @where("evaluate")
    @card(type="blank")
    @parallel
    @step
    def evaluate_given(self):
        """The benchmarks of base or sft."""
        self.metrics = call_stage(self, "evaluate")
        fill_card(self, "evaluate", gallery="samples")
        self.next(self.measured_given)

    @where("small")
    @step
    def measured_given(self, inputs):
        """What the first machine wrote."""
        merge_files(self, inputs)
        self.next(self.all_given)


if __name__ == "__main__":
    die_with_parent()
    ExperimentNodesFlow()
