"""BLIP-VQA's probability of yes, by transformers, as T2I-CompBench asks for it.

Three things that `BlipForQuestionAnswering.generate` does otherwise are done here: the question's first token is [ENC], its
padding is not seen when the answer is decoded, and the answer is read from the first step as P(yes) / (P(yes) + P(no)).
Padding is avoided rather than masked, by batches of questions of one length: BLIP's cross-attention in transformers 5.23 drops
the mask that it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unigrpo.evaluation.backends.weights import (
    check_complete,
    check_device,
    exact_float32,
    model_folder,
    weights_sha256,
)

DEFAULT = "Salesforce/blip-vqa-capfilt-large"
SIZE = 480  # px of either side; the aspect is not kept
MAX_TOKENS = 35
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)  # OpenAI's, RGB in [0, 1]
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
# In the vocabulary of the released checkpoints, which is BERT's and two: every id is known, and another one is a mistake.
VOCABULARY, KNOWN_IDS = 30524, {"[DEC]": 30522, "[ENC]": 30523, "yes": 2748, "no": 2053}
REMOVED = re.compile(r"[.!\"()*#:;~]")


class BlipYes:
    """The probability of yes by a BLIP-VQA: a `YesProbability`.

    Args:
        model: transformers' BlipForQuestionAnswering. tokenizer: its tokenizer. digest: sha256 of the weights.
        size: px of either side; the benchmark's 480, another one shows in the name.
        batch: pictures, or questions, that go through the model together.
    Raises: ValueError if the tokenizer does not fit, or patches do not divide the size.
    """

    def __init__(self, model: Any, tokenizer: Any, digest: str, *, device: str = "cpu", size: int = SIZE,
                 batch: int = 16) -> None:
        patch = int(model.config.vision_config.patch_size)
        if size % patch or size < patch:
            raise ValueError(f"BLIP's input size must be a multiple of its patches of {patch} px, got {size}")
        self.model, self.tokenizer, self.device = model.to(check_device(device)).eval(), tokenizer, device
        self.size, self.batch = size, batch
        self.name = "blip_hf" if size == SIZE else f"blip_hf_{size}px"
        self.identity = f"{self.name} {digest}"
        # [DEC] starts an answer and [ENC] a question; BLIP put them behind BERT's vocabulary, in this order.
        vocabulary = int(model.config.text_config.vocab_size)
        self.start = int(model.config.text_config.bos_token_id)
        self.encode = int(tokenizer.get_vocab().get("[ENC]", self.start + 1))
        if max(self.start, self.encode) >= vocabulary:
            raise ValueError(f"[DEC] and [ENC] must lie in BLIP's vocabulary of {vocabulary}, got ids {self.start} and "
                             f"{self.encode}; give a BLIP-VQA such as {DEFAULT}")
        self.yes, self.no = (self._single(word) for word in ("yes", "no"))
        ids = {"[DEC]": self.start, "[ENC]": self.encode, "yes": self.yes, "no": self.no}
        if vocabulary == VOCABULARY and ids != KNOWN_IDS:
            raise ValueError(f"BLIP's ids must be {KNOWN_IDS} in its vocabulary of {VOCABULARY}, got {ids}; the tokenizer is "
                             "not the checkpoint's")

    @classmethod
    def load(cls, name: str | Path = DEFAULT, *, device: str = "cpu", size: int = SIZE, batch: int = 16) -> BlipYes:
        """From a folder or a name on the hub. Raises ValueError for what is no BLIP-VQA."""
        from transformers import AutoTokenizer, BlipForQuestionAnswering

        folder = model_folder(name)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings.get("model_type") != "blip":
            raise ValueError(f"a BLIP was wanted, and {folder} holds a model of the type {settings.get('model_type')!r}")
        loaded: Any = BlipForQuestionAnswering.from_pretrained(folder, use_safetensors=True, dtype=torch.float32,
                                                               output_loading_info=True)
        model, info = loaded
        check_complete(model, info, folder)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise ValueError(f"{folder} lacks its tokenizer: wanted tokenizer.json or vocab.txt")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks whether to run its code
        return cls(model, tokenizer, weights_sha256(folder), device=device, size=size, batch=batch)

    def __call__(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> np.ndarray:
        """The probability that the answer is yes and not no.

        Args:
            images: B arrays (H, W, 3) uint8 RGB, of any sizes. Neighbours that are one array are encoded once.
            questions: B texts, one per image.
        Returns: (B,) float64 in [0, 1].
        Raises: ValueError if the numbers differ, or a probability is not finite.
        """
        if len(images) != len(questions):
            raise ValueError(f"every image needs its question, got {len(images)} images and {len(questions)} questions")
        if not images:
            return np.zeros(0)
        distinct: list[np.ndarray] = []
        places: list[int] = []
        for image in images:
            if not distinct or distinct[-1] is not image:
                distinct.append(image)
            places.append(len(distinct) - 1)
        seen = torch.cat([self._see(distinct[start:start + self.batch]) for start in range(0, len(distinct), self.batch)])
        ids = self.tokenizer([clean(question) for question in questions], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        by_length: dict[int, list[int]] = {}
        for index, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(index)
        result = np.zeros(len(questions))
        for members in by_length.values():
            for start in range(0, len(members), self.batch):
                rows = members[start:start + self.batch]
                result[rows] = self._answer(seen[[places[row] for row in rows]], [ids[row] for row in rows])
        if not np.isfinite(result).all():
            raise ValueError(f"BLIP's probabilities must be finite, and {int((~np.isfinite(result)).sum())} of {len(result)} "
                             f"are not: it is broken on {self.device}")
        return result

    @torch.inference_mode()
    def _see(self, images: Sequence[np.ndarray]) -> Tensor:
        """(B, patches + 1, D) image features."""
        pixels = torch.stack([prepare(image, self.size) for image in images]).to(self.device)
        with exact_float32():
            return self.model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state

    @torch.inference_mode()
    def _answer(self, seen: Tensor, ids: list[list[int]]) -> np.ndarray:
        """(B,) float64 P(yes) / (P(yes) + P(no)) at the first step of the answer, of questions of one length."""
        asked = torch.tensor(ids, device=seen.device)
        asked[:, 0] = self.encode
        start = torch.full((len(ids), 1), self.start, device=seen.device)
        with exact_float32():
            states = self.model.text_encoder(input_ids=asked, encoder_hidden_states=seen).last_hidden_state
            logits = self.model.text_decoder(input_ids=start, encoder_hidden_states=states).logits[:, 0].double()
        return torch.sigmoid(logits[:, self.yes] - logits[:, self.no]).cpu().numpy()  # the softmax's denominator cancels

    def _single(self, word: str) -> int:
        """The id of a word, which must be one token."""
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"BLIP's tokenizer must know {word!r} as one token, got ids {ids}; its vocabulary is not BERT's")
        return int(ids[0])


def prepare(image: np.ndarray, size: int) -> Tensor:
    """A picture as BLIP takes it: (H, W, 3) uint8 RGB -> (3, size, size) float32, bicubic, aspect not kept, normalised."""
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).contiguous()


def clean(question: str) -> str:
    """A question as BLIP was trained on them: lower-case, without . ! \" ( ) * # : ; ~."""
    return REMOVED.sub("", question.lower()).rstrip()
