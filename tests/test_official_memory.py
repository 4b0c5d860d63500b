"""Host memory that import and load take; the table of docs/checkpoints.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from official import write_release

MEASURE = """
import os, resource, sys
from pathlib import Path
import torch
import diffusers.models.autoencoders.autoencoder_kl, transformers.models.siglip.modeling_siglip, tokenizers
from unigrpo.checkpoint import load_checkpoint
from unigrpo.interchange import import_release
torch.set_num_threads(1)
source, output = Path(sys.argv[1]), Path(sys.argv[2])

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for what in ("import", "load", "convert"):
    if os.fork() == 0:                       # each starts at the same memory, the imported libraries'
        before = peak()
        if what == "import":
            import_release(source, output, report=lambda line: None)
        else:
            model, _ = load_checkpoint(output, dtype={"load": None, "convert": torch.float32}[what])
            total = sum(float(p.detach().sum()) for p in model.parameters())   # every page is touched
        print(what, peak() - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def measure(tmp_path: Path, vocab_size: int, layers: int, width: int) -> dict[str, float]:
    """Host memory that an import and loads add to a fresh process at their peak, mapped pages of files included.

    Returns: peaks over the bytes that bound them: the checkpoint's, or what it becomes in float32.
    """
    llm = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": vocab_size, "intermediate_size": 4 * width,
           "num_attention_heads": width // 64}
    source, out = write_release(tmp_path / "release", llm=llm), tmp_path / "checkpoint"
    size = (source / "ema.safetensors").stat().st_size
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(source), str(out)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    peaks = {line.split()[0]: int(line.split()[1]) for line in ran.stdout.splitlines()}
    ratios = {"import": peaks["import"] / size, "load": peaks["load"] / size, "convert": peaks["convert"] / (2 * size),
              "gigabytes": size / 1e9}
    print({name: round(value, 3) for name, value in ratios.items()})
    return ratios


def test_memory_of_import_and_load(tmp_path):
    ratios = measure(tmp_path, vocab_size=10000, layers=6, width=640)
    assert ratios["gigabytes"] > 0.15
    assert ratios["import"] < 1.0           # one tensor at a time, and the autoencoder
    assert ratios["load"] < 1.3
    assert ratios["convert"] < 1.3


@pytest.mark.slow
def test_memory_of_two_gigabytes(tmp_path):
    ratios = measure(tmp_path, vocab_size=32000, layers=20, width=1280)
    assert ratios["gigabytes"] > 1.9
    assert ratios["import"] < 0.3
    assert ratios["load"] < 1.1
    assert ratios["convert"] < 1.1
