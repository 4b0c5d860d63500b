"""Tiny random models in the official Hugging Face formats, made by the tests, and pictures to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_mask2former(folder: Path, *, seed: int = 0, labels: int = 80, spread: float = 3.0) -> Path:
    """A Mask2Former of 20 queries that answers differently to different pictures (`spread` scales the class head)."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(seed)
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0)
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=3,
                               num_attention_heads=2, num_queries=20, num_labels=labels)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("class_predictor"):
                value.normal_(std=spread)
            elif "queries" in name:
                value.normal_(std=1.0)
    model.save_pretrained(folder)
    return folder


def save_clip(folder: Path, *, seed: int = 0, activation: str = "quick_gelu", image_size: int = 32) -> Path:
    """A CLIP of two layers with a byte-level tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, projection_dim=16, max_position_embeddings=77, hidden_act=activation,
                          bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              projection_dim=16, image_size=image_size, patch_size=8, hidden_act=activation)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def picture(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    """A few blocks of colour on a plain ground, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(4):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        image[top:top + rng.integers(6, height // 2), left:left + rng.integers(6, width // 2)] = rng.integers(0, 256, 3)
    return image


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change keys of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
