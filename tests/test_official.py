"""The official BAGEL layout: its table, and import and export byte for byte."""

from __future__ import annotations

import json
import shutil
from math import prod

import pytest
import torch
from official import linked, quiet, release, write_shards
from safetensors.torch import load_file, save_file

from unigrpo.checkpoint import load_autoencoder, load_checkpoint, save_checkpoint
from unigrpo.cli import main
from unigrpo.digests import sha256_path
from unigrpo.interchange import export_release, import_release
from unigrpo.models.bagel import SpecialTokens, causal_mask
from unigrpo.models.mot import MoTConfig, MoTModel
from unigrpo.models.official import autoencoder_shapes, model_shapes, settings
from unigrpo.tensorfiles import TensorFiles, write_tensors

__all__ = ["release"]  # pytest finds the fixture by name

RELEASED_LLM = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
RELEASED_VIT = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "patch_size": 14, "image_size": 980}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and x.shape == b[k].shape and torch.equal(
        x.contiguous().flatten().view(torch.uint8), b[k].contiguous().flatten().view(torch.uint8)) for k, x in a.items())


@pytest.fixture(scope="module")
def imported(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    import_release(release, folder, report=quiet)
    return folder


def test_the_released_model_has_its_tensors_and_parameters():
    """Counts of the official classes; the model class, on the meta device, agrees in every key and shape."""
    config = settings(RELEASED_LLM, RELEASED_VIT)
    shapes = model_shapes(config)
    assert len(shapes) == 1223
    assert sum(map(prod, shapes.values())) == 14_607_260_128
    assert config.vision["num_hidden_layers"] == 26
    assert (config.max_latent_size, config.vit_max_patches, config.tie_word_embeddings) == (64, 70, False)
    with torch.device("meta"):
        model = MoTModel(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == shapes
    vae = autoencoder_shapes()
    assert len(vae) == 244
    assert sum(map(prod, vae.values())) == 83_819_683


@pytest.mark.parametrize(("name", "key", "value", "message"), [
    ("llm", "hidden_act", "gelu", "llm_config.json: hidden_act must be 'silu', got 'gelu'"),
    ("llm", "num_attention_heads", 5, "llm_config.json: num_attention_heads=5 must divide hidden_size=3584"),
    ("llm", "num_key_value_heads", 3, "num_key_value_heads=3 must divide num_attention_heads=28"),
    ("vit", "num_hidden_layers", 1, "vit_config.json: num_hidden_layers must be at least 2"),
    ("vit", "hidden_size", None, "vit_config.json lacks hidden_size"),
])
def test_configs_of_other_models_are_refused(name, key, value, message):
    configs = {"llm": dict(RELEASED_LLM), "vit": dict(RELEASED_VIT)}
    configs[name][key] = value
    if value is None:
        del configs[name][key]
    with pytest.raises(ValueError, match=message):
        settings(configs["llm"], configs["vit"])


def test_the_streaming_writer_writes_what_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5).bfloat16(), "c": torch.randn(2, 2).half(), "z": torch.tensor(7),
               "é": torch.randn(1, 3), "n": torch.zeros(0, 4), "t": torch.tensor([True, False]), "i": torch.arange(3).int()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    files = TensorFiles.find(tmp_path, "theirs")
    write_tensors(tmp_path / "ours", {n: (e.dtype, e.shape) for n, e in files.entries.items()}, files.read)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert same_bytes(load_file(tmp_path / "ours"), tensors)
    with pytest.raises(ValueError, match="tensor b must be"):
        write_tensors(tmp_path / "bad", {"b": ("F32", (3, 4))}, lambda name: torch.zeros(4, 3))


def test_import_keeps_every_byte(release, imported):
    assert same_bytes(load_file(imported / "model.safetensors"), load_file(release / "ema.safetensors"))
    assert len(load_file(imported / "model.safetensors")) == 1223
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (imported / name).read_bytes() == (release / name).read_bytes()
    record = json.loads((imported / "source.json").read_text())
    assert record["sha256"]["ema.safetensors"] == sha256_path(release / "ema.safetensors")
    assert str(release) not in (imported / "source.json").read_text()


def test_an_imported_checkpoint_runs(imported):
    model, tokenizer = load_checkpoint(imported)
    special = SpecialTokens.of(tokenizer)
    assert (special.pad, special.bos, special.eos) == (257, 258, 259)  # by name: llm_config.json says 256 and 258
    assert len(model.vit_model.vision_model.encoder.layers) == 26
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("pos_embed"))
    ids = tokenizer(["a red circle"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "a red circle"
    autoencoder = load_autoencoder(imported)
    with torch.no_grad():
        hidden, _ = model(model.embed_text(ids), torch.arange(ids.shape[1])[None],
                          causal_mask(torch.tensor([ids.shape[1]]), ids.shape[1]))
        assert model.logits(hidden).isfinite().all()
        (image,) = model.embed_image([torch.zeros(3, 28, 42)])
        assert image.shape == (6, 32)
        assert image.isfinite().all()
        assert autoencoder.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)
    widened, _ = load_checkpoint(imported, dtype=torch.float32)
    assert all(torch.equal(p, model.state_dict()[n].float()) for n, p in widened.state_dict().items())


def test_sharded_and_single_give_the_same_folder(release, imported, tmp_path):
    sharded = linked(release, tmp_path / "sharded")
    write_shards(sharded, load_file(release / "ema.safetensors"), 3)
    (sharded / "ema.safetensors").unlink()
    import_release(sharded, tmp_path / "checkpoint", report=quiet)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "autoencoder/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "checkpoint" / name).read_bytes() == (imported / name).read_bytes(), name
    # A checkpoint folder itself may be sharded too.
    folder = linked(imported, tmp_path / "shards")
    write_shards(folder, load_file(imported / "model.safetensors"), 3, stem="model")
    (folder / "model.safetensors").unlink()
    model, _ = load_checkpoint(folder)
    assert same_bytes(dict(model.state_dict()), load_file(imported / "model.safetensors"))


def test_an_index_beside_the_single_file_is_not_used(release, imported, tmp_path):
    """The released repository has one, and it names shards that are not there."""
    folder = linked(release, tmp_path / "release")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    import_release(folder, tmp_path / "checkpoint", report=quiet)
    assert (tmp_path / "checkpoint" / "source.json").read_bytes() == (imported / "source.json").read_bytes()


def test_import_is_idempotent_and_never_overwrites_something_else(release, imported, tmp_path):
    output = tmp_path / "checkpoint"
    (tmp_path / ".checkpoint.partial").mkdir()                        # a run that was killed
    (tmp_path / ".checkpoint.partial" / "model.safetensors").write_bytes(b"half")
    import_release(release, output, report=quiet)
    files = sorted(p.relative_to(output) for p in output.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(imported) for p in imported.rglob("*") if p.is_file())
    assert all((output / name).read_bytes() == (imported / name).read_bytes() for name in files)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    lines: list[str] = []
    import_release(release, output, report=lines.append)
    assert lines[-1].endswith("holds this import already")
    (output / "source.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and is not an import of these files"):
        import_release(release, output, report=quiet)


def test_export_gives_the_released_bytes(release, imported, tmp_path):
    assert main(["export", str(imported), str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert (out / name).read_bytes() == (release / name).read_bytes(), name
    for name in ("llm_config.json", "vit_config.json"):
        given, written = json.loads((release / name).read_text()), json.loads((out / name).read_text())
        assert given.items() <= written.items()
    card = (out / "README.md").read_text()
    assert "base_model: ByteDance-Seed/BAGEL-7B-MoT" in card
    assert "1,223 tensors" in card
    assert "apache-2.0" in card
    import_release(out, tmp_path / "again", report=quiet)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (imported / name).read_bytes()
    assert main(["export", str(imported), str(out)]) == 2                # never overwrites


@pytest.fixture
def trained(release, tmp_path):
    """What a training leaves: no source.json, adapters beside the weights, metrics beside the checkpoint."""
    import_release(release, tmp_path / "imported", report=quiet)
    model, tokenizer = load_checkpoint(tmp_path / "imported")
    folder = tmp_path / "tiny" / "unigrpo" / "0" / "checkpoint"
    save_checkpoint(folder, model, tokenizer)
    load_autoencoder(tmp_path / "imported").save(folder / "autoencoder")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "lora_dropout": 0.0, "rank_pattern": {}}))
    adapter = {}
    for i in range(28):
        for name, outputs in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            place = f"base_model.model.language_model.model.layers.{i}.self_attn.{name}_proj_moe_gen"
            adapter[f"{place}.lora_A.weight"], adapter[f"{place}.lora_B.weight"] = torch.randn(2, 32), torch.randn(outputs, 2)
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder.parent / "metrics.json").write_text(json.dumps({"bench/geneval": 0.5}))
    return folder


def test_the_card_knows_released_weights_by_their_bytes(imported, tmp_path):
    """A record of the release beside other weights does not make them the released ones."""
    export_release(imported, tmp_path / "same", report=quiet)
    assert "Not trained further" in (tmp_path / "same" / "README.md").read_text()
    shutil.copytree(imported, tmp_path / "changed")
    tensors = load_file(imported / "model.safetensors")
    tensors["language_model.lm_head.weight"] += 1
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    export_release(tmp_path / "changed", tmp_path / "other", report=quiet)
    assert "Not trained further" not in (tmp_path / "other" / "README.md").read_text()


def test_export_of_a_trained_checkpoint(release, trained, tmp_path):
    export_release(trained, tmp_path / "out", report=quiet)
    assert same_bytes(load_file(tmp_path / "out" / "ema.safetensors"), load_file(release / "ema.safetensors"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / "adapter" / name).read_bytes() == (trained / "adapter" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `bench/geneval` | 0.5 |" in card
    assert "rank 2" in card
    assert "tiny unigrpo 0" in card
    import_release(tmp_path / "out", tmp_path / "again", report=quiet)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / "adapter" / name).read_bytes() == (trained / "adapter" / name).read_bytes()
    before, after = load_checkpoint(trained)[1], load_checkpoint(tmp_path / "again")[1]
    assert before("a red circle")["input_ids"] == after("a red circle")["input_ids"]


def test_adapters_that_do_not_fit_are_not_imported(trained, tmp_path):
    export_release(trained, tmp_path / "out", report=quiet)
    path = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"does not fit the checkpoint[\s\S]*extra tensor base_model\.model\.nowhere"):
        import_release(tmp_path / "out", tmp_path / "again", report=quiet)
    path.unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model\.safetensors"):
        import_release(tmp_path / "out", tmp_path / "again", report=quiet)


def test_merged_adapters_are_their_product(trained, tmp_path):
    export_release(trained, tmp_path / "out", merge=True, report=quiet)
    weights, merged = load_file(trained / "model.safetensors"), load_file(tmp_path / "out" / "ema.safetensors")
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], merged[name])}
    assert changed == {n.removeprefix("base_model.model.").replace(".lora_A", "") for n in adapter if ".lora_A" in n}
    assert len(changed) == 28 * 4
    name = "language_model.model.layers.3.self_attn.q_proj_moe_gen"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert torch.equal(merged[f"{name}.weight"], (weights[f"{name}.weight"].float() + 2.0 * up @ down).bfloat16())
    assert not (tmp_path / "out" / "adapter").exists()
    shutil.rmtree(trained / "adapter")
    with pytest.raises(ValueError, match="has no adapter/ folder"):
        export_release(trained, tmp_path / "none", merge=True, report=quiet)


def test_models_of_another_layout_are_not_exported(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(MoTConfig(prediction="clean").to_dict(), default=str))
    with pytest.raises(ValueError, match=r"prediction must be 'velocity', got 'clean'\n- vision must be set"):
        export_release(tmp_path / "model", tmp_path / "out")
