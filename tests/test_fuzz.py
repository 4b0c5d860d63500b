"""Thousands of malformed inputs to everything that reads a file or an answer: no crash without a message, no hang."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import Found, fuzz
from small import ROOT, small_config, small_policy, small_prompts

from unigrpo import config as reading
from unigrpo.checkpoint import load_checkpoint, save_checkpoint
from unigrpo.evaluation import outcomes
from unigrpo.prompts.records import read_records, write_records
from unigrpo.rewards import client, server
from unigrpo.rewards.transport import TransportError, _strict_json

COUNT = int(os.environ.get("UNIGRPO_FUZZ", "100"))  # inputs a target; `make test-slow` gives more


def through(path: Path, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a file as a function of the file's bytes."""
    def call(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)
    return call


def fuzz_config(folder: Path, count: int) -> Found:
    """params/scales/x.yaml, merged with the rest of params and checked."""
    shutil.copytree(ROOT / "params", folder / "params", dirs_exist_ok=True)
    whole, base = reading.read_yaml, folder / "params" / "base.yaml"
    known = functools.cache(whole)
    reading.read_yaml = lambda path: known(path) if path == base else whole(path)
    try:
        seeds = [(ROOT / "params" / "scales" / f"{name}.yaml").read_bytes() for name in ("smoke", "small")]
        path = folder / "params" / "scales" / "x.yaml"
        read = through(path, lambda _: reading.load_config("x", root=folder))
        return fuzz(read, seeds, count, names=("params",), key="config")
    finally:
        reading.read_yaml = whole


def fuzz_prompts(folder: Path, count: int) -> Found:
    """A JSONL of prompt records."""
    write_records(folder / "prompts.jsonl", small_prompts(3))
    return fuzz(through(folder / "x.jsonl", read_records), [(folder / "prompts.jsonl").read_bytes()], count,
                names=("x.jsonl",), key="prompts")


def fuzz_checkpoint(folder: Path, count: int) -> Found:
    """Each file of a checkpoint without a manifest in turn: what an import or another program wrote."""
    policy = small_policy(small_config())
    save_checkpoint(folder / "checkpoint", policy.model, policy.tokenizer)
    total = Found()
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    for name in files:
        path = folder / "checkpoint" / name
        whole = path.read_bytes()
        found = fuzz(through(path, lambda path: load_checkpoint(path.parent)), [whole], count // len(files),
                     names=("checkpoint",), key=name)
        path.write_bytes(whole)
        total.inputs, total.refused, total.accepted = (getattr(total, k) + getattr(found, k) for k in
                                                       ("inputs", "refused", "accepted"))
        total.lines, total.slowest = max(total.lines, found.lines), max(total.slowest, found.slowest)
        total.failures += [f"{name}: {failure}" for failure in found.failures]
    return total


def verdict_files(folder: Path) -> tuple[bytes, bytes]:
    import pandas as pd

    row = {"prompt_id": "a", "tag": "t", "reasoning": "", "needs_reasoning": False, "sample": 0, "cfg": "off", "thinking": "on",
           "thinking_text": "x", "image": "", "exact": True, "geneval": True, "graded": 1.0, "plan_right": True, "reason": "",
           "detections": "[]"}
    verdicts = outcomes.join_verdicts([pd.DataFrame([row, row | {"sample": 1}])])
    outcomes.write_verdicts(verdicts, folder / "v.parquet")
    outcomes.write_outcomes(outcomes.count_outcomes(verdicts), folder / "o.csv")
    return (folder / "v.parquet").read_bytes(), (folder / "o.csv").read_bytes()


def fuzz_verdicts(folder: Path, count: int) -> Found:
    """verdicts.parquet."""
    return fuzz(through(folder / "x.parquet", outcomes.read_verdicts), [verdict_files(folder)[0]], count,
                names=("x.parquet",), key="verdicts")


def fuzz_outcomes(folder: Path, count: int) -> Found:
    """outcomes.csv."""
    return fuzz(through(folder / "x.csv", outcomes.read_outcomes), [verdict_files(folder)[1]], count, names=("x.csv",),
                key="outcomes")


def fuzz_answers(folder: Path, count: int) -> Found:
    """What a reward server, or whatever answers in its place, sends back."""
    def call(data: bytes) -> Any:
        try:
            return client.read_records(_strict_json(data), ["a", "b"], 3)
        except TransportError as error:  # what the client counts as a missing value
            raise ValueError(str(error)) from error

    answer = {"records": {name: [{"name": name, "segment": None, "values": [0.5, None, 1]}] for name in "ab"}}
    return fuzz(call, [json.dumps(answer).encode()], count, names=("answer",), key="answers")


def fuzz_requests(folder: Path, count: int) -> Found:
    """What anybody sends to our reward server."""
    from test_reward_server import request

    def call(data: bytes) -> Any:
        try:
            return server.read_request(data, {"shapes_graded": lambda *_: []}, server.Bounds(pixels=4096))
        except server.Refused as error:
            raise ValueError(str(error)) from error

    return fuzz(call, [json.dumps(request()).encode()], count, key="requests")


TARGETS = {"params": fuzz_config, "prompt files": fuzz_prompts, "checkpoints": fuzz_checkpoint, "verdicts": fuzz_verdicts,
           "outcomes": fuzz_outcomes, "reward answers": fuzz_answers, "reward requests": fuzz_requests}


@pytest.mark.parametrize("target", TARGETS)
def test_malformed_inputs_are_refused_in_words(tmp_path: Path, target: str) -> None:
    found = TARGETS[target](tmp_path, COUNT)
    assert found.inputs >= COUNT - 3
    assert found.failures == []
    assert found.refused > found.inputs // 10
