"""Tiny random BLIP-VQA, DPT and OWLv2 checkpoints in the official Hugging Face formats, and a parser without models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "?", ",", "a", "the", "is", "there", "and", "red", "blue",
         "cup", "book", "dog", "cat", "bench", "apple", "circle", "square", "clock", "wall")


def save_blip(folder: Path, *, seed: int = 0, words: tuple[str, ...] = WORDS, tokenizer: bool = True) -> Path:
    """A BLIP-VQA of one layer each; [DEC] and [ENC] stand behind the vocabulary, as in the released ones."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering

    torch.manual_seed(seed)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "initializer_range": 0.5}
    text = {**shared, "vocab_size": len(words) + 2, "encoder_hidden_size": 16, "max_position_embeddings": 40,
            "bos_token_id": len(words), "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config={**shared, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = BlipForQuestionAnswering(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embeddings" in name or "cls.predictions" in name:
                value.normal_(std=0.5)
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_dpt(folder: Path, *, seed: int = 0, hybrid: bool = True) -> Path:
    """A DPT of four layers, by default the hybrid of a small convolutional stem, trained at 64 px."""
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(seed)
    backbone = {"model_type": "bit", "global_padding": "same", "layer_type": "bottleneck", "depths": [1, 1, 1],
                "hidden_sizes": [16, 32, 64], "embedding_size": 16, "num_groups": 4, "embedding_dynamic_padding": True,
                "out_features": ["stage1", "stage2", "stage3"]}
    parts: dict[str, Any] = {"is_hybrid": True, "backbone_config": backbone, "backbone_featmap_shape": [1, 64, 4, 4],
                             "neck_hidden_sizes": [16, 32, 16, 16], "reassemble_factors": [1, 1, 1, 0.5]}
    if not hybrid:
        parts = {"neck_hidden_sizes": [16, 16, 16, 16]}
    config = DPTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
                       patch_size=16, backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=16, initializer_range=0.3, **parts)
    DPTForDepthEstimation(config).eval().save_pretrained(folder)
    return folder


def save_owlv2(folder: Path, *, seed: int = 0) -> Path:
    """An OWLv2 of 16 places with a byte-level tokenizer, whose scores spread over (0, 1)."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

    torch.manual_seed(seed)
    letters = [chr(code) for code in range(33, 127)]
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters[1:], *(letter + "</w>" for letter in letters)]
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**shared, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2,
                     "pad_token_id": 0},
        vision_config={**shared, "image_size": 32, "patch_size": 8}, projection_dim=16)
    model = Owlv2ForObjectDetection(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(("class_head", "box_head")) or "embedding" in name:
                value.normal_(std=0.7)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], pad_token="!").save_pretrained(folder)
    return folder


KINDS = {"DET": {"a", "an", "the", "The", "A"}, "ADP": {"on", "of", "in", "near", "by", "with", "behind"}, "CCONJ": {"and"},
         "AUX": {"is", "was"}, "ADJ": {"red", "blue", "green", "small", "wooden", "round"}, "VERB": {"hidden", "holding"},
         "ADV": {"next"}, "PART": {"to"}, "PUNCT": {".", ","}, "PROPN": {"Bob", "Rome"}}


class Token(NamedTuple):
    """What is read of a spaCy token."""

    idx: int
    text: str
    pos_: str


class Span(NamedTuple):
    """What is read of a spaCy span."""

    start_char: int
    end_char: int


class Doc(list[Token]):
    """What is read of a spaCy document: tokens, and noun chunks as a determiner, adjectives and nouns in a row."""

    @property
    def noun_chunks(self) -> list[Span]:
        chunks, start = [], None
        for place, token in enumerate(self):
            if start is None and token.pos_ in ("DET", "ADJ", "NOUN"):
                start = token.idx
            following = self[place + 1].pos_ if place + 1 < len(self) else ""
            if start is not None and token.pos_ == "NOUN" and following != "NOUN":
                chunks.append(Span(start, token.idx + len(token.text)))
                start = None
        return chunks


def nlp(text: str) -> Doc:
    """A parser by word list, with the parts of spaCy's interface that are used."""
    return Doc(Token(match.start(), match[0], next((kind for kind, words in KINDS.items() if match[0] in words), "NOUN"))
               for match in re.finditer(r"\w+|[^\w\s]", text))
