"""A small causal transformer, for tokens such as the bytes of text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["HEAD_WIDTH", "Transformer"]

HEAD_WIDTH = 16
"""The width of an attention head."""

MLP_FACTOR = 2
INITIAL_STD = 0.02


class Transformer(nn.Module):
    """A causal transformer: from tokens [B, length], outputs [B, vocabulary, length] for the token after each place.

    Blocks normalise in front of attention and of a GELU layer of twice the width; positions are learnt; the embedding
    of tokens is the output layer too. Linear layers have no bias. It works under `torch.func.vmap`. For 256 tokens,
    length 64, width 64 and two layers it has 86,656 parameters.

    Args:
        vocabulary: number of different tokens.
        length: the most tokens of an input; shorter ones are taken.
        width: features of a token, a multiple of 16, the width of an attention head.
        num_layers: number of blocks, at least 1.

    Raises:
        ValueError: a width that is no such multiple, or a number below 1.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, for the order of layers and the
    initial weights.
    """

    def __init__(self, vocabulary: int, length: int, width: int, num_layers: int) -> None:
        super().__init__()
        if min(vocabulary, length, num_layers) < 1 or width < 1 or width % HEAD_WIDTH:
            raise ValueError(
                f"transformer: the width must be a multiple of {HEAD_WIDTH} and all sizes at least 1, got "
                f"vocabulary={vocabulary}, length={length}, width={width}, num_layers={num_layers}"
            )
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, num_layers) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=INITIAL_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """The outputs [B, vocabulary, length] for tokens [B, length] of any integer dtype."""
        features: Tensor = self.tokens(tokens.long()) + self.positions.weight[: tokens.shape[-1]]
        return functional.linear(self.norm(self.blocks(features)), self.tokens.weight).transpose(-1, -2)


class Block(nn.Module):
    """Causal attention and a GELU layer, each behind a norm and added to its input [B, length, width]."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Linear(width, MLP_FACTOR * width, bias=False)
        self.mlp_out = nn.Linear(MLP_FACTOR * width, width, bias=False)
        for layer in (self.attention, self.mlp):
            nn.init.normal_(layer.weight, std=INITIAL_STD)
        for layer in (self.attention_out, self.mlp_out):
            nn.init.normal_(layer.weight, std=INITIAL_STD / math.sqrt(2 * num_layers))

    def forward(self, features: Tensor) -> Tensor:
        """The features [B, length, width] after both."""
        features = features + self.attention_out(_attend(self.attention(self.norm(features))))
        hidden: Tensor = functional.gelu(self.mlp(self.mlp_norm(features)))
        return features.add(self.mlp_out(hidden))


def _attend(projected: Tensor) -> Tensor:
    """Causal attention of queries, keys and values [B, length, 3 width], written out, as vmap needs it."""
    batch, length, triple = projected.shape
    queries, keys, values = projected.view(batch, length, 3, -1, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
    later = torch.ones(length, length, dtype=torch.bool, device=projected.device).triu(1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(HEAD_WIDTH)
    attended: Tensor = scores.masked_fill(later, -math.inf).softmax(-1) @ values
    return attended.transpose(1, 2).reshape(batch, length, triple // 3)
