"""Folders of numbers that the official BAGEL source produced: their model, tensors and samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import golden_files
from safetensors.torch import load_file

from unigrpo.models.bagel import SpecialTokens
from unigrpo.models.embeddings import patchify
from unigrpo.models.mot import MoTConfig, MoTModel, unpatchify
from unigrpo.models.packing import Clean, Noised, Split, Text, View

CLOSE = {"atol": 5e-5, "rtol": 1e-5}
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size",
          "num_channels", "layer_norm_eps")


class Golden:
    """One folder of the official format: its model and its tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.manifest = json.loads((folder / "manifest.json").read_text())["files"]
        llm, bagel = self.config["llm_config"], self.config["bagel_config"]
        self.special = self.config["special_token_ids"]
        self.model = MoTModel(MoTConfig(
            **{k: llm[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                   "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
            latent_channels=self.config["vae_config"]["z_channels"],
            latent_downsample=self.config["vae_config"]["downsample"],
            max_latent_size=bagel["max_latent_size"], latent_patch_size=bagel["latent_patch_size"],
            timestep_shift=bagel["timestep_shift"], vit_max_patches=bagel["vit_max_num_patch_per_side"],
            vision={k: self.config["vit_config"][k] for k in VISION})).eval()
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def prompts(self) -> list[list[int]]:
        return self.manifest["velocity.safetensors"]["token_lists"]["prompts"]

    def segment(self, ids) -> list[int]:
        return [self.special["bos_token_id"], *[int(i) for i in ids], self.special["eos_token_id"]]

    @property
    def tokens(self) -> SpecialTokens:
        return SpecialTokens(*(self.special[k] for k in ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")),
                             pad=0)

    @property
    def markers(self) -> torch.Tensor:
        return torch.tensor([self.special["start_of_image"], self.special["end_of_image"]])


def needs(*names: str):
    """Which files of a folder a test reads; it is collected for the folders that have them."""
    def mark(function):
        function.files = names
        return function

    return mark


def pytest_generate_tests(metafunc):
    if "folder" in metafunc.fixturenames:
        folders = [p.parent for p in golden_files(metafunc.config, "bagel/manifest.json")]
        wanted = getattr(metafunc.function, "files", ())
        folders = [f for f in folders if all((f / f"{name}.safetensors").is_file() for name in wanted)]
        metafunc.parametrize("folder", folders, ids=[f"{p.parent.name}-{p.name}" for p in folders])


@pytest.fixture
def golden(folder):
    return Golden(folder)


def rows_of(flat: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tokens to a padded batch."""
    parts = flat.split(lengths)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.tensor(lengths)


def image_grid(places: torch.Tensor, side: int) -> tuple[int, int]:
    """(rows, columns) from the table rows of one image's tokens."""
    return int(places.max()) // side + 1, int(places.max()) % side + 1


def splits_of(golden: Golden, data: dict[str, torch.Tensor]) -> list[list[Split]]:
    """The samples of an official packed batch, read back from its packed tensors."""
    config, patch = golden.model.config, golden.model.config.latent_patch_size
    ids = dict(zip(data["in.packed_text_indexes"].tolist(), data["in.packed_text_ids"].tolist(), strict=True))
    vae = {p: i for i, p in enumerate(data["in.packed_vae_token_indexes"].tolist())}
    views = data.get("in.packed_vit_token_indexes", torch.zeros(0))
    vit = {p: i for i, p in enumerate(views.tolist())}
    targets, ce = set(data["in.mse_loss_indexes"].tolist()), set(data["in.ce_loss_indexes"].tolist())
    shift, image, rows, place = config.timestep_shift, 0, [], 0
    for length in data["in.sample_lens"].tolist():
        row: list[Split] = []
        stop = place + length
        while place < stop:
            first, kind = place, ids[place]
            last = golden.special["end_of_image" if kind == golden.special["start_of_image"] else "eos_token_id"]
            while ids.get(place) != last:
                place += 1
            inside = range(first + 1, place)
            place += 1
            if kind != golden.special["start_of_image"]:
                row.append(Text(torch.tensor([ids[p] for p in range(first, place)]), loss=first in ce))
            elif first + 1 in vit:
                index = torch.tensor([vit[p] for p in inside])
                grid = image_grid(data["in.packed_vit_position_ids"][index], config.vit_max_patches)
                row.append(View(unpatchify(data["in.packed_vit_tokens"][index][None], config.vision["patch_size"], grid)[0]))
            else:
                index = torch.tensor([vae[p] for p in inside])
                grid = tuple(data["in.patchified_vae_latent_shapes"][image].tolist())
                clean = patchify(data["in.padded_latent"][image][None, :, :grid[0] * patch, :grid[1] * patch], patch)[0]
                raw = torch.sigmoid(data["in.packed_timesteps"][index[0]]).item()
                sigma = shift * raw / (1 + (shift - 1) * raw)
                image += 1
                noise = data["in.noise"][index]
                row.append(Noised(clean, noise, grid, sigma) if first + 1 in targets else Clean(clean, grid))
        rows.append(row)
    return rows


def editing_row(golden: Golden, data: dict[str, torch.Tensor], index: int, t: float) -> list[Split]:
    """Condition image as latents and as view, prompt, and the image at x_t = noise."""
    config, latent = golden.model.config, data["edit.cond_latent"]
    patch = config.latent_patch_size
    x = data[f"edit.{index}.noise"]
    return [Clean(patchify(latent, patch)[0], (latent.shape[2] // patch, latent.shape[3] // patch)),
            View(data["edit.cond_vit_image"]), Text(torch.tensor(golden.segment(golden.prompts()[index]))),
            Noised(x, x, image_grid(data[f"edit.{index}.latent_position_ids"], config.max_latent_size), t)]
