"""BAGEL's text format: tokenizer, segments, and the attention masks of packed contexts.

Every text segment (system, prompt, thinking) is `<|im_start|> ids <|im_end|>`, segments follow each other without
roles or newlines, and an image block is `<|vision_start|> latents <|vision_end|>` at one rotary position.
Source: ByteDance-Seed/Bagel, inferencer and data packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, IMAGE_START, IMAGE_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
PAD, UNKNOWN = "<|endoftext|>", "<|unknown|>"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the markers, looked up by name (BAGEL's llm_config names another bos than BAGEL uses)."""

    bos: int
    eos: int
    image_start: int
    image_end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
        """Raises ValueError naming a marker that the tokenizer lacks."""
        ids = []
        for name in (BOS, EOS, IMAGE_START, IMAGE_END, PAD):
            token = tokenizer.get_vocab().get(name)
            if token is None:
                raise ValueError(f"the tokenizer must know BAGEL's marker {name!r} and does not; add it to tokenizer.json")
            ids.append(token)
        return cls(*ids)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer in Hugging Face format: the markers first, then the words in the order given."""
    names = [PAD, BOS, EOS, IMAGE_START, IMAGE_END, UNKNOWN, *words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
                                   unk_token=UNKNOWN, additional_special_tokens=[IMAGE_START, IMAGE_END])


def encode_segments(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Texts to packed segments.

    Args:
        rows: per sample its texts in order (system, prompt, ...); each becomes one segment. May be empty.
    Returns: tokens (B, L) int64 padded on the right, lengths (B,) int64.
    Raises: ValueError naming the words outside the vocabulary.
    """
    special = SpecialTokens.of(tokenizer)
    texts = [text for row in rows for text in row]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    unknown = tokenizer.get_vocab().get(UNKNOWN)
    packed = []
    for row in rows:
        ids: list[int] = []
        for text in row:
            segment = next(encoded)
            if unknown is not None and unknown in segment:
                words = sorted({w for w in text.split() if tokenizer.convert_tokens_to_ids(w) == unknown})
                raise ValueError(f"a prompt may only use words of the checkpoint's vocabulary; {text!r} has {words}, "
                                 "which tokenizer.json does not list")
            ids += [special.bos, *segment, special.eos]
        packed.append(torch.tensor(ids, dtype=torch.int64))
    lengths = torch.tensor([len(p) for p in packed], dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(packed, batch_first=True, padding_value=special.pad), lengths


def concatenate_rows(first: Tensor, first_lengths: Tensor, second: Tensor, second_lengths: Tensor,
                     pad: int) -> tuple[Tensor, Tensor]:
    """Row-wise concatenation of two right-padded batches, gap-free.

    Args:
        first (B, L1) and second (B, L2) ids, of which the first `lengths` of a row count.
    Returns: (B, max total) ids padded on the right, (B,) lengths.
    """
    lengths = first_lengths + second_lengths
    if second.shape[1] == 0:  # no row adds anything, and there is nothing to gather from
        return first, lengths
    out = first.new_full((len(first), int(lengths.max())), pad)
    columns = torch.arange(out.shape[1], device=out.device)
    out = torch.where(columns < first_lengths[:, None], torch.nn.functional.pad(
        first[:, :out.shape[1]], (0, max(0, out.shape[1] - first.shape[1]))), out)
    behind = columns - first_lengths[:, None]                                             # (B, L) index into second
    take = (behind >= 0) & (behind < second_lengths[:, None])
    return torch.where(take, second.gather(1, behind.clamp(0, max(0, second.shape[1] - 1))), out), lengths


def causal_mask(lengths: Tensor, columns: int) -> Tensor:
    """(B, 1, L, L) bool: a text token sees itself and what precedes it in its row; padding sees only itself."""
    index = torch.arange(columns, device=lengths.device)
    valid = index < lengths[:, None]
    mask = (index[:, None] >= index) & valid[:, None, :]
    return (mask | torch.eye(columns, dtype=torch.bool, device=lengths.device))[:, None]


def packed_mask(lengths: Tensor, columns: int, blocks: int, tokens: int) -> Tensor:
    """Mask of [text | markers of all blocks | latents of all blocks]: each image block sees the text and itself only.

    Args:
        lengths: (B,) text tokens of each row, of `columns` columns.
        blocks: W image blocks, two markers and `tokens` latents each; nothing outside a block may see it.
    Returns: (B, 1, Q, Q) bool with Q = columns + 2 W + W * tokens.
    """
    device = lengths.device
    index = torch.arange(columns, device=device)
    owner = torch.cat([torch.arange(blocks, device=device).repeat_interleave(2),
                       torch.arange(blocks, device=device).repeat_interleave(tokens)])
    text = torch.cat([index[:, None] >= index, index.new_zeros(columns, len(owner), dtype=torch.bool)], dim=1)
    image = torch.cat([index.new_ones(len(owner), columns, dtype=torch.bool), owner[:, None] == owner], dim=1)
    allowed = torch.cat([text, image])
    valid = torch.cat([index < lengths[:, None],
                       torch.ones(len(lengths), len(owner), dtype=torch.bool, device=device)], dim=1)
    eye = torch.eye(allowed.shape[0], dtype=torch.bool, device=device)
    return ((allowed & valid[:, None, :]) | eye)[:, None]
