"""The judge against an endpoint of the test's own, on loopback, that answers well, late, wrongly or not at all."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import draw, small_config, small_policy, small_prompts

from unigrpo.credit import assign_credit
from unigrpo.rewards.conformance import check_reward
from unigrpo.rewards.judge import judge
from unigrpo.rewards.registry import make_reward
from unigrpo.rewards.shapes import RewardFunction
from unigrpo.rewards.transport import Endpoint, RateLimit
from unigrpo.train import train
from unigrpo.types import PromptRecord
from unigrpo.update import rl_optimizer, trainable_experts

KEY = "sk-very-secret-0123456789"
Answer = tuple[int, dict[str, str], bytes]


def completion(content: Any, finish: str = "stop", **message: Any) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content)
    return json.dumps({"choices": [{"finish_reason": finish, "message": {"content": text, **message}}]}).encode()


def ok(content: Any, **kwargs: Any) -> Answer:
    return 200, {}, completion(content, **kwargs)


class Service:
    """A chat endpoint whose answers the test writes: a function of the request and how many came before it."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any], int], Answer] = lambda request, number: ok({"alignment": 10})
        self.requests: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        lock, service = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(service.requests)
                    service.requests.append((time.monotonic(), request, {"path": self.path, **self.headers}))
                try:
                    status, headers, body = service.answer(request, number)
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(body)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    slow = headers.get("X-Drip")
                    for piece in ([body[i:i + 1] for i in range(len(body))] if slow else [body]):
                        self.wfile.write(piece)
                        time.sleep(float(slow or 0))
                except OSError:
                    pass

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    running = Service()
    yield running
    running.server.shutdown()
    running.server.server_close()


def ask(service: Service, count: int = 1, **options: Any) -> list[float]:
    (first, *_) = reward_of(service, **options)(pictures(count), [prompt(f"prompt {i}") for i in range(count)], [""] * count)
    return [float(value) for value in first.value]


def reward_of(service: Service, **options: Any) -> RewardFunction:
    return judge(service.url, "vlm", **{"key_env": "TEST_JUDGE_KEY", "timeout": 5.0, "attempts": 1, "backoff": 0.0, **options})


def prompt(text: str) -> PromptRecord:
    return PromptRecord(id=text, tag="colors", prompt=text, include=({"class": "cat", "count": 1},))


def pictures(count: int) -> np.ndarray:
    return np.linspace(0, 1, count * 4 * 4 * 3, dtype=np.float32).reshape(count, 4, 4, 3)


def shown(request: dict[str, Any]) -> np.ndarray:
    """The picture in a request."""
    url = request["messages"][1]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def asked(request: dict[str, Any]) -> dict[str, str]:
    """What the text part says."""
    return json.loads(request["messages"][1]["content"][0]["text"])


def test_grades_come_back_in_the_order_of_the_images(service: Service) -> None:
    """All are asked at once, and later images answer first; a grade is a tenth of the prompt's number."""
    together = threading.Barrier(6, timeout=60)

    def answer(request: dict[str, Any], number: int) -> Answer:
        together.wait()
        place = int(asked(request)["request"].split()[1])
        time.sleep(0.02 * (6 - place))
        return ok({"alignment": place})

    service.answer = answer
    assert ask(service, 6, threads=6, timeout=60.0) == pytest.approx([i / 10 for i in range(6)])
    _, request, headers = service.requests[0]
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (request["model"], request["temperature"]) == ("vlm", 0)
    schema = request["response_format"]["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["properties"] == {"alignment": {"type": "integer", "enum": list(range(11))}}
    by_prompt = {asked(request)["request"]: shown(request) for _, request, _ in service.requests}
    assert by_prompt["prompt 5"].max() == 255
    assert by_prompt["prompt 0"].max() < 255 / 5


def test_several_criteria_are_averaged_and_logged(service: Service) -> None:
    service.answer = lambda request, number: ok({"alignment": 4, "beauty": 1})
    criteria = {"alignment": "what was asked", "beauty": "how it looks"}
    records = reward_of(service, criteria=criteria, top=4, name="vlm")(pictures(1), [prompt("x")], ["my plan"])
    assert {record.name: float(record.value) for record in records} == {"vlm": 0.625, "vlm/alignment": 1.0, "vlm/beauty": 0.25}
    assert "how it looks" in service.requests[0][1]["messages"][0]["content"]
    assert asked(service.requests[0][1]) == {"request": "x"}, "the thinking is shown only if asked for"
    reward_of(service, criteria=criteria, top=4, show_thinking=True)(pictures(1), [prompt("x")], ["my plan"])
    assert asked(service.requests[1][1]) == {"request": "x", "thinking": "my plan"}


RUBBISH: dict[str, tuple[str, Answer]] = {
    "prose": ("not_json", ok("I would give it 8 out of 10.")),
    "fenced": ("not_json", ok('```json\n{"alignment": 8}\n```')),
    "with more after it": ("not_json", ok('{"alignment": 8} {"alignment": 2}')),
    "a key too many": ("wrong_keys", ok({"alignment": 8, "mood": 3})),
    "a key twice": ("not_json", ok('{"alignment": 8, "alignment": 2}')),
    "no key": ("wrong_keys", ok({})),
    "a text": ("wrong_grade", ok({"alignment": "8"})),
    "true": ("wrong_grade", ok({"alignment": True})),
    "a fraction": ("wrong_grade", ok({"alignment": 8.0})),
    "NaN": ("not_json", ok('{"alignment": NaN}')),
    "too large": ("wrong_grade", ok({"alignment": 11})),
    "negative": ("wrong_grade", ok({"alignment": -1})),
    "a list": ("wrong_keys", ok([8])),
    "null": ("no_message", (200, {}, b"null")),
    "no choices": ("no_message", (200, {}, b'{"choices": []}')),
    "no content": ("not_json", (200, {}, b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}')),
    "cut at its length": ("unfinished", ok({"alignment": 8}, finish="length")),
    "refused": ("refused", ok({"alignment": 8}, refusal="no")),
    "html": ("not_json", (200, {}, b"<html>welcome</html>")),
    "empty": ("not_json", (200, {}, b"")),
    "nested": ("not_json", (200, {}, b"[" * 100_000)),
    "not text": ("not_json", (200, {}, b"\xff\xfe\x00")),
    "cut off": ("connection", (200, {"Content-Length": "1000"}, b'{"choices": [')),
    "endless": ("too_large", (200, {}, b" " * ((1 << 20) + 5))),
    "moved": ("http_302", (302, {"Location": "http://127.0.0.1:9/v1"}, b"")),
    "unauthorized": ("http_401", (401, {}, json.dumps({"error": f"bad key {KEY}"}).encode())),
    "broken": ("http_500", (500, {}, b"oops")),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_is_missing_and_never_zero(service: Service, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    counted, answer = RUBBISH[kind]
    service.answer = lambda request, number: answer if asked(request)["request"] == "prompt 1" else ok({"alignment": 6})
    caplog.set_level(logging.DEBUG)
    assert ask(service, 3) == pytest.approx([0.6, np.nan, 0.6], nan_ok=True)
    assert f"judge: 1 of 3 images have no reward: 1 {counted}\n" in caplog.text
    assert KEY not in caplog.text


def test_fields_of_a_request_can_be_added_and_left_out(service: Service) -> None:
    ask(service, extra={"seed": 3, "temperature": None, "max_tokens": None, "model": "another"})
    request = service.requests[0][1]
    assert (request["seed"], request["model"]) == (3, "vlm")
    assert not {"temperature", "max_tokens"} & set(request)


def test_a_late_answer_is_missing_within_its_time(service: Service) -> None:
    """Late as a whole, or byte by byte, each of them in time: the clock counts the sum."""
    over = threading.Event()

    def answer(request: dict[str, Any], number: int) -> Answer:
        if asked(request)["request"] == "prompt 0":
            over.wait(60)
        if asked(request)["request"] == "prompt 1":
            return 200, {"X-Drip": "0.1"}, completion({"alignment": 8})  # about 8 seconds
        return ok({"alignment": 6})

    service.answer = answer
    assert ask(service, 3, timeout=2.0) == pytest.approx([np.nan, np.nan, 0.6], nan_ok=True)
    over.set()


def test_headers_that_drip_are_cut_off_too() -> None:
    """The other side is hung up on long before it has sent its ten seconds of header."""
    listener = socket.create_server(("127.0.0.1", 0))
    cut = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            try:
                for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 200:
                    connection.sendall(bytes([letter]))
                    time.sleep(0.05)
            except OSError:
                cut.set()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    reward = judge(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", "vlm", timeout=0.4, attempts=1)
    assert np.isnan(float(reward(pictures(1), [prompt("x")], [""])[0].value))
    thread.join(60)
    assert cut.is_set()
    listener.close()


def test_passing_failures_are_asked_again_and_lasting_ones_are_not(service: Service) -> None:
    troubles: list[Answer] = [(429, {"Retry-After": "0.2"}, b""), (503, {}, b""), ok("no JSON")]
    service.answer = lambda request, number: troubles[number] if number < 3 else ok({"alignment": 7})
    assert ask(service, attempts=4) == pytest.approx([0.7])
    times = [moment for moment, _, _ in service.requests]
    assert len(times) == 4
    assert times[1] - times[0] >= 0.2, "it waits as long as it was asked to"
    service.requests.clear()
    service.answer = lambda request, number: (401, {}, b"")
    assert np.isnan(ask(service, attempts=4)).all()
    assert len(service.requests) == 1


def test_the_rate_limit_holds_over_all_threads(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    assert not np.isnan(ask(service, 6, threads=6, requests_per_minute=60 / 0.1)).any()
    assert time.monotonic() - start >= 5 * 0.1
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("no limit waited"))
    RateLimit(0).wait()


def test_no_connection_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reward = judge(f"http://127.0.0.1:{port}/v1", "vlm", attempts=2, backoff=0.0)
    assert np.isnan(float(reward(pictures(1), [prompt("x")], [""])[0].value))
    assert "1 connection" in caplog.text


def test_the_key_is_nowhere_but_in_the_request(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    endpoint = Endpoint(service.url, "TEST_JUDGE_KEY")
    assert KEY not in repr(endpoint)
    assert KEY.encode() not in pickle.dumps(endpoint)
    with pytest.raises(ValueError, match="not the key itself") as error:
        Endpoint(service.url, KEY)
    assert KEY not in str(error.value)
    monkeypatch.setenv("TEST_JUDGE_KEY", f"{KEY}\r\nX-Injected: 1")
    assert np.isnan(ask(service)).all()
    assert service.requests == []


@pytest.mark.parametrize(("url", "message"), [
    ("ftp://127.0.0.1/v1", "a URL http"), ("file:///etc/passwd", "a URL http"), ("127.0.0.1:80", "a URL http"),
    ("http://me:secret@127.0.0.1/v1", "without user and password"), ("http://judge.example/v1", "unencrypted"),
])
def test_urls_that_would_lose_the_key_are_refused(service: Service, url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        judge(url, "vlm", key_env="TEST_JUDGE_KEY")
    assert "secret@" not in str(error.value)
    if "judge.example" in url:
        judge(url, "vlm", key_env="TEST_JUDGE_KEY", plain_http=True)
        judge(url.replace("http:", "https:"), "vlm", key_env="TEST_JUDGE_KEY")


@pytest.mark.parametrize(("options", "message"), [
    ({"key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE is empty"), ({"top": 0}, "top must be"), ({"threads": 0}, "threads of"),
    ({"attempts": 0}, "attempts of the judge"), ({"criteria": {"a": 3}}, "criteria must map"), ({"timeout": 0}, "timeout of"),
    ({"requests_per_minute": -1}, "requests_per_minute must be"), ({"attempts": 2.5}, "attempts of"),
])
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge("http://127.0.0.1:1/v1", "vlm", **options)


def test_a_judge_that_answers_the_same_keeps_the_contract(service: Service) -> None:
    service.answer = lambda request, number: ok({"alignment": int(shown(request).mean()) % 11})
    report = check_reward(make_reward("judge", {"url": service.url, "model": "vlm", "attempts": 1}))
    assert report.broken == []
    service.answer = lambda request, number: ok({"alignment": number % 11})
    assert [finding.clause for finding in check_reward(reward_of(service)).broken] == ["deterministic"]


def steps(service: Service, **changes: Any) -> list[dict[str, float]]:
    """Two training steps with the judge as the reward; their metrics."""
    name = "judge"
    config = small_config(train={"num_steps": 2}, reward={"weights": {name: 1.0}, **changes})
    policy = small_policy(config)
    experts = trainable_experts(policy.model, config.train.experts)
    policy.freeze_reference([names for parameters in experts.values() for names in parameters])
    reward, logged = reward_of(service, threads=4), []
    train(policy, rl_optimizer(experts, config.optim), lambda step: small_prompts(config.rollout.prompts_per_step),
          lambda rollouts: reward(policy.decode(rollouts.image.final_latents), rollouts.prompts,
                                  policy.thinking_texts(rollouts)),
          config, draw=draw, log=lambda step, metrics, rollouts, rewards: logged.append(metrics), save=lambda step: None)
    return logged


def test_training_counts_what_is_missing_and_stops_above_the_limit(service: Service) -> None:
    """One answer in four is rubbish: counted, no zeros; a limit below that stops the run before it learns anything."""
    service.answer = lambda request, number: ok("rubbish") if number % 4 == 3 else ok({"alignment": 5 + number % 3})
    metrics = steps(service, max_missing=0.5)
    assert [row["reward/missing"] for row in metrics] == [0.25, 0.25]
    assert all(row["reward/mean"] >= 0.5 for row in metrics), "a silent zero would lower the mean"
    with pytest.raises(ValueError, match=r"25% of the rewards of step 0 are missing, more than reward.max_missing=10%"):
        steps(service, max_missing=0.1)


def test_a_judge_that_is_silent_stops_the_run(service: Service) -> None:
    service.answer = lambda request, number: (503, {}, b"")
    with pytest.raises(ValueError, match="100% of the rewards of step 0 are missing"):
        steps(service, max_missing=0.5)
    records = reward_of(service)(pictures(4), [prompt("x")] * 4, [""] * 4)
    (advantages, _), metrics = assign_credit(records, ["text", "image"], group_size=2,  # type: ignore[list-item]
                                             weights={"judge": 1.0})
    assert metrics["reward/missing"] == 1
    assert (advantages == 0).all()
