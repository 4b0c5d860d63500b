"""Rewards scored by a reward server. A server that is late, gone or wrong means missing values (NaN), never zeros."""

from __future__ import annotations

import base64
import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from unigrpo.rewards.pictures import encode_png, finite_rows, spread, to_pictures
from unigrpo.rewards.server import PROTOCOL
from unigrpo.rewards.shapes import Images, RewardFunction
from unigrpo.rewards.transport import Endpoint, TransportError, request_json
from unigrpo.types import PromptRecord, Reward

LOG = logging.getLogger("unigrpo.rewards")
MAX_ANSWER = 64 << 20  # bytes


def remote_reward(url: str, names: Sequence[str], *, key_env: str | None = None, plain_http: bool = False, exact: bool = False,
                  batch: int = 64, threads: int = 1, timeout: float = 120.0, attempts: int = 2,
                  backoff: float = 1.0) -> RewardFunction:
    """Rewards of a server under their own names.

    Args:
        url: http://127.0.0.1:PORT. key_env, plain_http: see `Endpoint`.
        names: of rewards that the server has. It is asked at once whether it has them.
        exact: send the floats instead of 8-bit PNG, for a reward of your own that reads more than 8 bits; the project's round
            to 8 bits themselves and give the same values either way.
        batch: images per request. threads: requests at once (a server scores one at a time; sending then overlaps scoring).
        timeout: seconds per request. attempts: requests per batch at most. backoff: seconds before the second, then doubled.
    Returns: one record per name (and what the reward logs besides), (B,) in the order of the images. Images that are not
        finite are not sent and have no reward.
    Raises: ValueError if the server cannot be reached now, refuses the token or lacks a name. Later failures are NaN.
    """
    endpoint = Endpoint(url.rstrip("/"), key_env, plain_http)
    for setting, value in (("batch", batch), ("threads", threads), ("attempts", attempts)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{setting} of a reward server must be a whole number from 1, got {value!r}")
    check_server(endpoint, names, timeout=min(timeout, 10.0))

    def ask(rows: list[int], images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> Any:
        """The records of some rows, or the kind of the last failure."""
        sent = [_exact(image) for image in images[rows]] if exact else [
            {"png": base64.b64encode(encode_png(picture)).decode("ascii")} for picture in to_pictures(images[rows])]
        payload = {"rewards": list(names), "images": sent, "prompts": [asdict(prompts[row]) for row in rows],
                   "thinking": [thinking[row] for row in rows]}
        for attempt in range(attempts):
            try:
                answer = request_json(endpoint, "POST", "/v1/score", payload, timeout=timeout, max_bytes=MAX_ANSWER)
                return read_records(answer, names, len(rows))
            except TransportError as error:
                kind = error.kind
                if not error.retry:
                    return kind
            if attempt + 1 < attempts:
                time.sleep(backoff * 2 ** attempt)
        return kind

    def reward(images: Images, prompts: Sequence[PromptRecord], thinking: Sequence[str]) -> list[Reward]:
        finite = [int(row) for row in np.flatnonzero(finite_rows(images))]
        parts = [finite[start:start + batch] for start in range(0, len(finite), batch)]
        with ThreadPoolExecutor(threads) as pool:
            answers = list(pool.map(lambda rows: ask(rows, images, prompts, thinking), parts))
        failed = Counter[str]()
        collected: dict[str, np.ndarray] = {name: np.full(len(images), np.nan, dtype=np.float32) for name in names}
        segments: dict[str, int | None] = {}
        for rows, answer in zip(parts, answers, strict=True):
            if isinstance(answer, str):
                failed[answer] += len(rows)
                continue
            for record in answer:
                collected.setdefault(record.name, np.full(len(images), np.nan, dtype=np.float32))[rows] = record.value.numpy()
                segments[record.name] = record.segment
        if failed:
            LOG.warning("reward server %s: %d of %d images have no reward: %s", url, failed.total(), len(images),
                        ", ".join(f"{count} {kind}" for kind, count in sorted(failed.items())))
        return [Reward(name, torch.from_numpy(values), segments.get(name)) for name, values in collected.items()]

    return reward


def check_server(endpoint: Endpoint, names: Sequence[str], *, timeout: float) -> None:
    """Raise ValueError unless the server answers, speaks this protocol and has every reward."""
    try:
        found = request_json(endpoint, "GET", "/v1/rewards", None, timeout=timeout, max_bytes=MAX_ANSWER)
    except TransportError as error:
        raise ValueError(f"reward server {endpoint.url}: {error}; start it with `unigrpo serve-rewards {' '.join(names)}`"
                         + (f", and look at the token in {endpoint.key_env}" if error.kind in ("http_401", "no key") else "")
                         ) from None
    if not isinstance(found, dict) or found.get("protocol") != PROTOCOL or not isinstance(found.get("rewards"), list):
        raise ValueError(f"{endpoint.url} is no reward server of protocol {PROTOCOL}")
    if absent := sorted(set(names) - set(found["rewards"])):
        raise ValueError(f"reward server {endpoint.url} has {', '.join(map(str, found['rewards']))}, not {', '.join(absent)}")


def read_records(answer: Any, names: Sequence[str], size: int) -> list[Reward]:
    """The records of an answer. Raises TransportError for anything but `size` numbers or nulls in each."""
    try:
        by_name = answer["records"]
        if set(by_name) != set(names):
            raise ValueError
        records = []
        for name in names:
            if by_name[name][0]["name"] != name:
                raise ValueError
            for item in by_name[name]:
                values, segment = item["values"], item["segment"]
                if len(values) != size or not all(value is None or type(value) in (int, float) for value in values):
                    raise ValueError
                if type(item["name"]) is not str or not (segment is None or type(segment) is int):
                    raise ValueError
                numbers = [np.nan if value is None else value for value in values]
                if np.isinf(np.asarray(numbers, dtype=np.float32)).any():
                    raise ValueError
                records.append(Reward(item["name"], spread(numbers, range(size), size, item["name"]), segment))
        if len({record.name for record in records}) < len(records):
            raise ValueError
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):
        raise TransportError("rubbish", "the answer is not one of a reward server") from None
    return records


def _exact(image: np.ndarray) -> dict[str, Any]:
    """An image as its floats."""
    return {"float32": base64.b64encode(np.ascontiguousarray(image, dtype="<f4").tobytes()).decode("ascii"),
            "size": list(image.shape[:2])}
