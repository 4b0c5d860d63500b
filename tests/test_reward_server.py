"""The reward server as a real process on loopback: same values as here, bounds, the token, and what its death means."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from small import draw, small_config, small_policy, small_prompts

from unigrpo.cli import main
from unigrpo.rewards.client import remote_reward
from unigrpo.rewards.conformance import Batch, check_reward, example_batch
from unigrpo.rewards.pictures import encode_png
from unigrpo.rewards.registry import make_reward
from unigrpo.rewards.server import Bounds, RewardServer
from unigrpo.rewards.shapes import shapes_exact, shapes_graded
from unigrpo.train import train
from unigrpo.types import Reward, Rollouts
from unigrpo.update import rl_optimizer, trainable_experts

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-of-enough-characters"


@contextlib.contextmanager
def served(*arguments: str, cwd: Path = ROOT) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`unigrpo serve-rewards` in a process of its own; its URL once it answers. Ends with the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", "unigrpo", "serve-rewards", "--port", "0", *arguments], cwd=cwd, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield process, line.split()[0]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = ("--max-images", "16", "--max-pixels", "4096", "--max-bytes", "400000")
    with served("shapes_graded", "shapes_exact", *limits) as (_, found):
        yield found


def call(url: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(method, path, body=body, headers=dict(headers))
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def post(url: str, payload: Any, **headers: str) -> tuple[int, Any]:
    return call(url, "POST", "/v1/score", json.dumps(payload).encode(), {"Content-Type": "application/json", **headers})


def request(batch: Batch | None = None, **changes: Any) -> dict[str, Any]:
    from dataclasses import asdict

    batch = batch or example_batch().rows([0])
    pictures = [np.rint(image * 255).astype(np.uint8) for image in batch.images]
    return {"rewards": ["shapes_graded"], "images": [{"png": base64.b64encode(encode_png(p)).decode()} for p in pictures],
            "prompts": [asdict(prompt) for prompt in batch.prompts], "thinking": batch.thinking, **changes}


def test_values_are_those_of_the_reward_here(url: str) -> None:
    """Whatever the size and order of batches, with PNG and with floats; images that are not finite are not sent."""
    batch = example_batch()
    batch.images[5, 0, 0, 0] = np.nan
    expected = [reward(batch.images, batch.prompts, batch.thinking)[0] for reward in (shapes_graded, shapes_exact)]
    for options in ({"batch": 64}, {"batch": 3, "threads": 3}, {"batch": 1}, {"batch": 3, "exact": True}):
        records = remote_reward(url, ["shapes_graded", "shapes_exact"], **options)(batch.images, batch.prompts, batch.thinking)
        assert [record.name for record in records] == ["shapes_graded", "shapes_exact"]
        for record, own in zip(records, expected, strict=True):
            assert torch.equal(record.value.nan_to_num(9), own.value.nan_to_num(9)), options
    rows = random.Random(0).sample(range(8), 8)
    (shuffled,) = remote_reward(url, ["shapes_graded"], batch=3)(**vars(batch.rows(rows)))
    assert torch.equal(shuffled.value.nan_to_num(9), expected[0].value[rows].nan_to_num(9))
    assert expected[0].value.isnan().sum() == 1


def test_a_served_reward_keeps_the_contract(url: str) -> None:
    reward = make_reward("shapes_graded", {"server": {"url": url}})
    assert check_reward(reward).broken == []
    assert reward is make_reward("shapes_graded", {"server": {"url": url}})


def test_the_client_asks_first(url: str) -> None:
    with pytest.raises(ValueError, match=r"has shapes_exact, shapes_graded, not judge"):
        remote_reward(url, ["judge"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match="start it with `unigrpo serve-rewards judge`"):
        remote_reward(f"http://127.0.0.1:{port}", ["judge"])
    with pytest.raises(ValueError, match="batch of a reward server must be a whole number from 1, got 0"):
        remote_reward(url, ["shapes_exact"], batch=0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels in a few bytes."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def image(data: bytes) -> list[dict[str, str]]:
    return [{"png": base64.b64encode(data).decode()}]


BAD_REQUESTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "another reward": ({"rewards": ["judge"]}, 400, "shapes_exact, shapes_graded wanted"),
    "no reward": ({"rewards": []}, 400, "wanted"),
    "a reward twice": ({"rewards": ["shapes_exact"] * 2}, 400, "different names"),
    "a text for a list": ({"rewards": "shapes_exact"}, 400, "four lists wanted"),
    "no prompt": ({"prompts": []}, 400, "a prompt and a thinking for each"),
    "no images": ({"images": [], "prompts": [], "thinking": []}, 400, "1 to 16 images wanted"),
    "another key": ({"pickle": "gASVAAAA"}, 400, "the keys rewards, images, prompts and thinking wanted"),
    "thinking of numbers": ({"thinking": [3]}, 400, "thinking must be texts"),
    "a wrong prompt": ({"prompts": [{"id": "x"}]}, 400, "prompt 0: wanted the key 'tag'"),
    "no base64": ({"images": [{"png": "!!!"}]}, 400, "an image is"),
    "no PNG": ({"images": image(b"rubbish")}, 400, "a complete PNG wanted"),
    "a cut PNG": ({"images": image(encode_png(np.zeros((32, 32, 3), np.uint8))[:60])}, 400, "a complete PNG wanted"),
    "a bomb": ({"images": image(png_header(60_000, 60_000))}, 400, "at most 4096 pixels wanted, got 60000 x 60000"),
    "too few floats": ({"images": [{"float32": "AAAA", "size": [32, 32]}]}, 400, "height * width * 3 float32 wanted"),
    "a negative size": ({"images": [{"float32": "", "size": [-1, 0]}]}, 400, "1 to 4096 pixels wanted"),
    "a float that is none": ({"images": [{"float32": base64.b64encode(np.full(3, np.nan, "<f4").tobytes()).decode(),
                                          "size": [1, 1]}]}, 400, "a finite image wanted"),
    "an image for the reward to refuse": ({"images": image(encode_png(np.zeros((8, 8, 3), np.uint8)))}, 500,
                                          "the reward failed: ValueError"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_in_words(url: str, name: str) -> None:
    changes, status, message = BAD_REQUESTS[name]
    found, answer = post(url, request(**changes))
    assert (found, set(answer)) == (status, {"error"})
    assert message in answer["error"]


def test_bounds_of_http(url: str) -> None:
    body = json.dumps(request()).encode()
    json_type = {"Content-Type": "application/json"}
    assert post(url, request())[0] == 200
    assert call(url, "GET", "/v1/rewards", None, {}) == (200, {"protocol": 1, "rewards": ["shapes_exact", "shapes_graded"]})
    assert call(url, "GET", "/etc/passwd", None, {})[0] == 404
    assert call(url, "POST", "/v1/rewards", body, json_type)[0] == 404
    assert call(url, "POST", "/v1/score", body, {"Content-Type": "text/plain"})[0] == 415
    assert call(url, "POST", "/v1/score", b"[" * 1000, json_type)[0] == 400
    assert call(url, "POST", "/v1/score", b'{"rewards": NaN}', json_type)[0] == 400
    assert call(url, "GET", "/v1/rewards", None, {"Host": "evil.example"})[0] == 403, "a page that rebinds its name"
    netloc = urlsplit(url).netloc
    host, port = netloc.split(":")
    for headers, status in ((b"Content-Length: 999999999", b"413"), (b"Content-Length: -1", b"411"), (b"X: 1", b"411"),
                            (b"Transfer-Encoding: chunked", b"411")):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n%s\r\n\r\n"
                               % (netloc.encode(), headers))
            assert connection.recv(100).split()[1] == status, headers


def nothing(images: np.ndarray, prompts: Any, thinking: Any) -> list[Reward]:
    return [Reward("nothing", torch.full((len(images),), torch.nan)), Reward("nothing/why", torch.ones(len(images)), 1)]


@contextlib.contextmanager
def here(rewards: Mapping[str, Any], **options: Any) -> Iterator[str]:
    """A server in a thread."""
    server = RewardServer(("127.0.0.1", 0), rewards, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_missing_values_and_logged_parts_travel() -> None:
    with here({"nothing": nothing}) as url:
        first, second = remote_reward(url, ["nothing"])(**vars(example_batch()))
    assert first.value.isnan().all()
    assert (second.name, second.segment, second.value.tolist()) == ("nothing/why", 1, [1.0] * 8)


def test_infinite_values_are_an_error_of_the_server() -> None:
    def infinite(images: np.ndarray, prompts: Any, thinking: Any) -> list[Reward]:
        return [Reward("infinite", torch.full((len(images),), torch.inf))]

    with here({"infinite": infinite}) as url:
        (record,) = remote_reward(url, ["infinite"], attempts=1)(**vars(example_batch()))
    assert record.value.isnan().all()


def test_a_token_is_needed_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("WRONG_TOKEN", TOKEN + "x")
    with here({"nothing": nothing}, token=TOKEN) as url:
        for headers, status in (({}, 401), ({"Authorization": TOKEN[:-1]}, 401), ({"Authorization": f"Bearer {TOKEN}x"}, 401),
                                ({"Authorization": "Bearer "}, 401), ({"Authorization": f"Bearer {TOKEN}"}, 200)):
            assert call(url, "GET", "/v1/rewards", None, headers)[0] == status, headers
        assert post(url, request(rewards=["nothing"]))[0] == 401
        remote_reward(url, ["nothing"], key_env="REWARD_TOKEN")
        for options in ({}, {"key_env": "WRONG_TOKEN"}):
            with pytest.raises(ValueError, match="HTTP 401: the key is refused") as error:
                remote_reward(url, ["nothing"], **options)
            assert TOKEN not in str(error.value)


@pytest.mark.parametrize(("host", "token", "message"), [
    ("0.0.0.0", None, "needs a token"), ("192.0.2.1", None, "needs a token"), ("127.0.0.1", "short", "at least 16"),
])
def test_a_server_for_others_needs_a_token(host: str, token: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardServer((host, 0), {"nothing": nothing}, token=token)


def test_the_command_refuses_what_cannot_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve-rewards", "shapes_exact", "--host", "0.0.0.0"]) == 2
    assert main(["serve-rewards", "beauty"]) == 2
    assert main(["serve-rewards", "shapes_exact", "--token-env", "NO_SUCH_TOKEN"]) == 2
    (tmp_path / "options.json").write_text('{"judge": {}}')
    assert main(["serve-rewards", "shapes_exact", "--options", str(tmp_path / "options.json")]) == 2
    err = capsys.readouterr().err
    for words in ("needs a token", "unknown reward 'beauty'", "NO_SUCH_TOKEN is empty", "wanted for some of shapes_exact"):
        assert words in err


def test_a_client_that_does_not_finish_is_hung_up_on() -> None:
    """It sends a byte at a time, each of them in time; others are served meanwhile."""
    with here({"nothing": nothing}, bounds=Bounds(read_s=2, connections=2)) as url:
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(b"POST /v1/score HTTP/1.1\r\n")
            assert call(url, "GET", "/v1/rewards", None, {})[0] == 200
            closed = False
            for letter in b"X: " + b"a" * 400:  # 20 seconds
                try:
                    slow.sendall(bytes([letter]))
                except OSError:
                    closed = True
                    break
                time.sleep(0.05)
            assert closed


def test_no_more_connections_than_allowed() -> None:
    with here({"nothing": nothing}, bounds=Bounds(connections=1)) as url:
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as first:
            first.sendall(b"GET ")
            with socket.create_connection((host, int(port)), timeout=10) as second:
                assert second.recv(10) == b""
        for _ in range(100):
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert call(url, "GET", "/v1/rewards", None, {})[0] == 200
                break
            time.sleep(0.1)
        else:
            pytest.fail("the place was not free again within ten seconds")


def test_a_reward_that_hangs_costs_the_clients_time_only() -> None:
    release = threading.Event()

    def hangs(images: np.ndarray, prompts: Any, thinking: Any) -> list[Reward]:
        release.wait(60)
        return [Reward("hangs", torch.ones(len(images)))]

    with here({"hangs": hangs}, bounds=Bounds(wait_s=0.2)) as url:
        reward = remote_reward(url, ["hangs"], timeout=2.0, attempts=1)
        (record,) = reward(**vars(example_batch()))
        assert record.value.isnan().all()
        assert post(url, request(rewards=["hangs"])) == (503, {"error": "the server is busy"})
        release.set()


def steps(reward: Any, config: Any, after: Any = lambda step: None) -> list[dict[str, float]]:
    """Training with a reward of (images, prompts, thinking); its metrics."""
    policy = small_policy(config)
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([name for parameters in experts.values() for name in parameters])
    logged: list[dict[str, float]] = []

    def score(rollouts: Rollouts) -> list[Reward]:
        return reward(policy.decode(rollouts.image.final_latents), rollouts.prompts, policy.thinking_texts(rollouts))

    train(policy, rl_optimizer(experts, config.optim), lambda step: small_prompts(config.rollout.prompts_per_step), score,
          config, draw=draw, log=lambda step, metrics, rollouts, rewards: logged.append(metrics), save=after)
    return logged


def test_a_server_that_is_killed_in_a_run_is_missing_values() -> None:
    """After step 0: counted NaN where that is allowed, and the run's end where it is not; never a mean of zeros."""
    config = small_config(train={"num_steps": 3}, reward={"weights": {"shapes_graded": 1.0}, "max_missing": 1.0})
    with served("shapes_graded") as (process, url):
        local = steps(shapes_graded, config)
        reward = remote_reward(url, ["shapes_graded"], timeout=20, attempts=2, backoff=0.0)
        rows = steps(reward, config, after=lambda step: process.kill() if step == 0 else None)
    assert [row["reward/missing"] for row in rows] == [0.0, 1.0, 1.0]
    assert rows[0]["reward/mean"] == local[0]["reward/mean"]
    assert np.isnan(rows[1]["reward/mean"])
    strict = config.model_copy(update={"reward": config.reward.model_copy(update={"max_missing": 0.1})})
    with pytest.raises(ValueError, match=r"100% of the rewards of step 0 are missing, more than reward\.max_missing=10%"):
        steps(reward, strict)
    with served("shapes_graded", "--port", url.rsplit(":", 1)[1]):
        assert [row["reward/missing"] for row in steps(reward, strict)] == [0.0, 0.0, 0.0], "a new one serves the same client"


def test_a_users_reward_with_options_in_a_server(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def scaled(gain):\n"
                                      "    return lambda images, prompts, thinking: gain * images.mean(axis=(1, 2, 3))\n")
    (tmp_path / "options.json").write_text('{"mine:scaled": {"gain": 3}}')
    batch = example_batch()
    with served("mine:scaled", "--options", "options.json", cwd=tmp_path) as (_, url):
        for exact, tolerance in ((True, 1e-6), (False, 3 * 0.5 / 255)):
            (record,) = make_reward("mine:scaled", {"server": {"url": url, "exact": exact}})(**vars(batch))
            assert record.name == "mine:scaled"
            assert record.value.numpy() == pytest.approx(3 * batch.images.mean(axis=(1, 2, 3)), abs=tolerance)
