"""Speed that cannot rot unseen: operators and operations that are counted, and ratios within one run, never seconds alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import phases  # noqa: E402
from pages import put  # noqa: E402
from phases import PHASES, Clock, Products  # noqa: E402
from serial import SerialPolicy  # noqa: E402
from training_step import Setting, compare, make_setting, run_step, scale_config, serial_config  # noqa: E402

COUNTS = ROOT / "docs" / "benchmarks" / "counts.json"
MORE = 1.02     # operators: another version of torch may split one
FLOPS = 1.001


def setting_of(prompts: int = 2, group: int = 4, thinking: int = 8, **changes) -> Setting:
    config = scale_config("tiny", thinking=thinking, prompts_per_step=prompts, group_size=group, **changes)
    return make_setting(config, device=torch.device("cpu"))


def counted(setting: Setting, *, serial: bool = False) -> dict[str, dict[str, float]]:
    """Operators and matrix FLOP of one step, by phase."""
    policy = SerialPolicy.of(setting.policy) if serial else setting.policy
    config, found = serial_config(setting.config) if serial else setting.config, {}
    with Products() as products:
        for name in ("calls", "flops"):
            clock = Clock(read=lambda name=name: float(getattr(products, name)))
            run_step(setting, policy, config, clock)
            found[name] = clock.seconds
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    return counted(setting_of())


@pytest.fixture(scope="module")
def wide():
    return counted(setting_of(group=12))


def test_a_step_does_no_more_than_it_did(base):
    """The committed counts. `python tests/test_speed.py` writes them anew: a change that makes them larger says why."""
    wanted = json.loads(COUNTS.read_text())
    for phase in PHASES:
        assert base["calls"][phase] <= MORE * wanted["calls"][phase], (phase, "operators")
        assert base["flops"][phase] <= FLOPS * wanted["flops"][phase], (phase, "matrix FLOP")


def test_more_rollouts_take_no_more_operators(base, wide):
    """Nothing in Python runs once a rollout: three times the siblings, the same operators, up to the draws and the reward."""
    for phase in ("think", "denoise", "anchor", "replay", "backward", "optimiser"):
        assert wide["calls"][phase] <= MORE * base["calls"][phase], phase
    assert wide["flops"]["denoise"] == pytest.approx(3 * base["flops"]["denoise"], rel=0.01)


def test_siblings_share_their_prompt_s_prefix(base, wide):
    """Thinking with three times the siblings costs less than three times the products: the prompt is read once."""
    assert wide["flops"]["think"] < 2.6 * base["flops"]["think"]


def test_a_window_step_adds_its_image_and_no_text(base):
    """Packed replay: a second window step costs the image's tokens, not the context once more."""
    def window(size: int) -> float:
        config = scale_config("tiny", thinking=8, prompts_per_step=2, group_size=4)
        rollout = config.rollout.model_copy(update={"window": config.rollout.window.model_copy(update={"size": size})})
        config = config.model_copy(update={"rollout": rollout})
        return counted(make_setting(config, device=torch.device("cpu")))["flops"]["replay"]

    one, two, three = window(1), base["flops"]["replay"], window(3)
    assert two - one < 0.75 * one
    assert three - two == pytest.approx(two - one, rel=0.1)


def test_batched_beats_serial_and_gives_its_numbers(monkeypatch):
    """A ratio within one run, in turns: 8 rollouts at once against one at a time. The committed page says what it is at full
    size; here it may not sink to what loops over rollouts would give."""
    monkeypatch.setattr(phases, "read_clock", time.process_time)  # of this process alone, whatever else runs
    setting = setting_of()
    serial = SerialPolicy.of(setting.policy)
    run_step(setting, setting.policy, setting.config)
    ours = [run_step(setting, setting.policy, setting.config)]
    serial.answer = ours[0].rollouts
    other = run_step(setting, serial, serial_config(setting.config))
    ours.append(run_step(setting, setting.policy, setting.config))
    compare(ours[0], other, serial.sampled)
    ratio = other.clock.total / min(outcome.clock.total for outcome in ours)
    assert ratio > 2.5, ratio


def test_a_table_replaces_the_one_before_it_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    put(page, "one", ["first"])
    put(page, "two", ["other"])
    page.write_text(page.read_text() + "\nends\n")
    put(page, "one", ["second"])
    wanted = "# A page\n\n<!-- one -->\n\nsecond\n\n<!-- /one -->\n\n<!-- two -->\n\nother\n\n<!-- /two -->\n\nends\n"
    assert page.read_text() == wanted
    page.write_text(page.read_text().replace("<!-- /one -->", ""))
    with pytest.raises(ValueError, match="must have the marks"):
        put(page, "one", ["third"])


def test_operands_that_share_numbers_can_be_multiplied_again():
    shared = phases.filled(((4, 6), (0, 1), torch.float32), torch.device("cpu"))
    assert (shared.shape, shared.stride()) == ((4, 6), (0, 1))
    assert torch.isfinite(shared @ phases.filled(((6, 3), (1, 6), torch.float32), torch.device("cpu"))).all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    COUNTS.write_text(json.dumps({"torch": torch.__version__, **counted(setting_of())}, indent=1) + "\n")
