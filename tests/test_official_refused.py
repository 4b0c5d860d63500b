"""Defects planted into a release are refused by name; what the commands answer to digests, sources and repositories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import AE_CHANNELS, MARKERS, linked, quiet, release, write_shards, write_tokenizer
from safetensors.torch import load_file, save_file

from unigrpo.cli import main
from unigrpo.digests import sha256_path
from unigrpo.interchange import import_release

__all__ = ["release"]  # pytest finds the fixture by name


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def change_tensors(change):
    """A defect that rewrites ema.safetensors."""
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "ema.safetensors")
        change(tensors)
        (folder / "ema.safetensors").unlink()
        save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})

    return plant


def change_config(name: str, **values):
    """A defect in a config file."""
    def plant(folder: Path) -> None:
        replace(folder / name, json.dumps(json.loads((folder / name).read_text()) | values).encode())

    return plant


def truncate(folder: Path) -> None:
    replace(folder / "ema.safetensors", (folder / "ema.safetensors").read_bytes()[:-10])


def lose_a_marker(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    write_tokenizer(folder, MARKERS[:-1])


def lose_a_shard(folder: Path) -> None:
    write_shards(folder, load_file(folder / "ema.safetensors"), 3)
    (folder / "ema.safetensors").unlink()
    (folder / "ema-00002-of-00003.safetensors").unlink()


def widen_the_autoencoder(folder: Path) -> None:
    tensors = load_file(folder / "ae.safetensors")
    tensors["decoder.up.0.block.2.conv1.weight"] = torch.zeros(AE_CHANNELS, AE_CHANNELS, 1, 1)
    (folder / "ae.safetensors").unlink()
    save_file(tensors, folder / "ae.safetensors")


Q = "language_model.model.layers.27.self_attn.q_proj_moe_gen.weight"
DEFECTS = {
    "missing tensor": (change_tensors(lambda t: t.pop(Q)), rf"missing tensor {Q} \(32, 32\)"),
    "extra tensor": (change_tensors(lambda t: t.update({"ema.decay": torch.zeros(1).bfloat16()})),
                     r"extra tensor ema\.decay \(1,\)"),
    "wrong shape": (change_tensors(lambda t: t.update({Q: t[Q][:16].contiguous()})),
                    rf"tensor {Q} must have shape \(32, 32\), got \(16, 32\)"),
    "wrong type": (change_tensors(lambda t: t.update({Q: t[Q].float()})), rf"tensor {Q} must be of type BF16 .* got F32"),
    "not finite": (change_tensors(lambda t: t[Q][3].fill_(torch.nan)), rf"tensor {Q} has numbers that are not finite"),
    "truncated file": (truncate, r"ema\.safetensors must be a readable safetensors file"),
    "layers as built": (change_config("vit_config.json", num_hidden_layers=26),
                        r"one fewer is built: 25\)[\s\S]*extra tensor vit_model\.vision_model\.encoder\.layers\.25\."),
    "heads": (change_config("llm_config.json", num_attention_heads=8),
              r"does not fit llm_config\.json[\s\S]*q_norm\.weight must have shape \(4,\), got \(8,\)"),
    "tokenizer without a marker": (lose_a_marker, r"marker <\|vision_end\|> is missing"),
    "vocabulary too small": (change_config("llm_config.json", vocab_size=260),
                             r"embed_tokens\.weight must have shape \(260, 32\)"),
    "no autoencoder": (lambda folder: (folder / "ae.safetensors").unlink(), r"missing file ae\.safetensors"),
    "autoencoder's shape": (widen_the_autoencoder, r"decoder\.up\.0\.block\.2\.conv1\.weight must have shape \(32, 32, 3, 3\)"),
    "missing shard": (lose_a_shard, r"names the shard ema-00002-of-00003\.safetensors, which is missing"),
    "config is no JSON": (lambda folder: replace(folder / "vit_config.json", b"{"), r"vit_config\.json must be JSON"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_refused_by_name(release, tmp_path, defect):
    plant, message = DEFECTS[defect]
    folder = linked(release, tmp_path / "release")
    plant(folder)
    with pytest.raises(ValueError, match=message):
        import_release(folder, tmp_path / "checkpoint", report=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["release"]  # nothing half-written stays


def test_command_checks_digests_and_names_sources(release, tmp_path, capsys, monkeypatch):
    output, name = tmp_path / "checkpoint", "ema.safetensors"
    right = sha256_path(release / name)
    command = ["import-bagel", str(release), "--output", str(output)]
    assert main([*command, "--sha256", f"{name}={'0' * 64}"]) == 2
    assert f"{name} must have sha256 {'0' * 64}, got {right}" in capsys.readouterr().err
    assert main([*command, "--sha256", f"{name}=12"]) == 2
    assert main([*command, "--sha256", f"other.bin={right}"]) == 2
    assert "other.bin" in capsys.readouterr().err
    assert not output.exists()
    digests = tmp_path / "digests"
    digests.write_text(f"{right}  {name}\n")
    assert main([*command, "--digests", str(digests)]) == 0
    assert "copied" in capsys.readouterr().out
    assert main([*command, "--revision", "abc"]) == 2
    assert "leave it out" in capsys.readouterr().err
    assert main(["import-bagel", "no such folder"]) == 2
    assert "must be a folder, or a hub repository" in capsys.readouterr().err
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert main(["import-bagel", "ByteDance-Seed/BAGEL-7B-MoT"]) == 2
    assert "download it on a machine with a network" in capsys.readouterr().err


def test_a_repository_is_fetched_and_recorded(release, tmp_path, capsys, monkeypatch):
    snapshot = linked(release, tmp_path / "0123abc")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, revision, allow_patterns: str(snapshot))
    monkeypatch.chdir(tmp_path)
    assert main(["import-bagel", "ByteDance-Seed/BAGEL-7B-MoT"]) == 0
    record = json.loads((tmp_path / "checkpoints" / "BAGEL-7B-MoT" / "source.json").read_text())
    assert (record["repository"], record["revision"]) == ("ByteDance-Seed/BAGEL-7B-MoT", "0123abc")
