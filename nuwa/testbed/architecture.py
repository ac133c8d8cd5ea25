"""The testbed's model: a small, genuine ``LlavaForConditionalGeneration`` and how it starts its life.

Two choices make a few CPU hours of training enough, and both are plain configuration or initial values:

* The vision tower's position table starts as 2-D Fourier features that are periodic in the grid, and the heads of
  its first layers start as convolution taps on them (each looks at one fixed neighbour). A shifted table is then
  just another phase, so features carry relative but not absolute place: place must travel through the language
  model's position ids, as it does in LLaVA (Nüwa, finding 3).
* The rotary base is chosen so that one rotary wavelength equals the grid's width, which lets a head of the language
  model tell columns apart. Wavelengths beyond the sequence stand still (Llama 3's rotary scaling does just that), and
  some heads start with equal queries and keys on those still dimensions and copy what they look at: a word then looks
  for patches that resemble it, wherever they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from nuwa.testbed.scenes import IMAGE_SIZE

PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
VISION_WIDTH = 128
LANGUAGE_WIDTH = 128
HEADS = 4
VISION_LAYERS = 6
LANGUAGE_LAYERS = 8
STILL_WAVELENGTH = 190  # tokens; slower rotary dimensions carry content only
WORD_LAYERS = (1,)  # where words look for patches that show them
LINK_LAYERS = (2,)  # where answers look for the words of their question
ANSWER_LAYERS = (3, 5)  # where answers look for their evidence
MATCHING_HEADS = 2  # of those layers
MATCHING_GAIN = 1.0
COPYING_GAIN = 0.5
# (row, column) offsets the heads of the first encoder layers start by looking at.
CONVOLUTION_TAPS = (
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((0, -2), (0, 2), (-2, 0), (2, 0)),
    ((0, -1), (0, 1), (-1, 0), (1, 0)),
)
TAP_GAIN = 0.8
PIXEL_GAIN = 0.3


def rope_theta(head_dim: int, wavelength: float, index: int = 2) -> float:
    """Rotary base at which frequency ``index`` of ``head_dim / 2`` has exactly ``wavelength`` tokens."""
    return (wavelength / (2 * math.pi)) ** (head_dim / (2 * index))


def model_config(vocabulary: int, image_token: int, bos: int, eos: int, pad: int) -> LlavaConfig:
    """96x96 pixels in patches of 8 (144 tokens and a CLS), 6 encoder layers, 8 language layers."""
    head_dim = LANGUAGE_WIDTH // HEADS
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            projection_dim=VISION_WIDTH,
            num_hidden_layers=VISION_LAYERS,
            num_attention_heads=HEADS,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_act="gelu_pytorch_tanh",
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=LANGUAGE_WIDTH,
            intermediate_size=3 * LANGUAGE_WIDTH,
            num_hidden_layers=LANGUAGE_LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            # Stretched so far that they stand still, wavelengths above STILL_WAVELENGTH carry content and no place.
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": rope_theta(head_dim, GRID),
                "factor": 1e6,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.05,
                "original_max_position_embeddings": STILL_WAVELENGTH,
            },
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=pad,
        ),
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=True,
    )


def fourier_positions(side: int, row_shift: float = 0, column_shift: float = 0) -> Tensor:
    """Grid-periodic features, ``(side * side, 4 * (side // 2) - 2)``: cos and sin of every frequency per axis.

    The sine of the highest frequency is zero on an even grid and is left out.
    """
    frequencies = 2 * math.pi / side * torch.arange(1, side // 2 + 1)
    index = torch.arange(side, dtype=torch.float32)
    blocks = []
    for axis, shift in ((0, row_shift), (1, column_shift)):
        angle = (index + shift)[:, None] * frequencies
        wave = torch.cat([angle.cos(), angle.sin()[:, :-1]], dim=1)
        blocks.append(wave[:, None].expand(-1, side, -1) if axis == 0 else wave[None].expand(side, -1, -1))
    return torch.cat(blocks, dim=-1).reshape(side * side, -1)


def _tap_rotation(side: int, row: int, column: int) -> Tensor:
    """Matrix R with ``fourier_positions(side) @ R = fourier_positions(side, row, column)``."""
    return torch.linalg.lstsq(fourier_positions(side), fourier_positions(side, row, column)).solution


@torch.no_grad()
def start_vision_tower(tower: PreTrainedModel) -> None:
    """Fourier position table, and convolution taps in the first layers (see the module's docstring)."""
    config = tower.config
    side = config.image_size // config.patch_size
    waves = fourier_positions(side)
    dims = waves.shape[1]
    table = tower.embeddings.position_embedding.weight
    table.normal_(0, 0.01)
    table[1:, :dims] = waves
    # Pixels start quieter than places, else the first layer normalisation would blur the taps.
    fan_in = config.num_channels * config.patch_size**2
    tower.embeddings.patch_embedding.weight.normal_(0, PIXEL_GAIN / math.sqrt(fan_in))
    head_dim = config.hidden_size // config.num_attention_heads
    for layer, taps in zip(tower.encoder.layers, CONVOLUTION_TAPS, strict=False):
        attention = layer.self_attn
        for head, (row, column) in enumerate(taps):
            rows = slice(head * head_dim, head * head_dim + dims)
            attention.q_proj.weight[rows, :dims] += TAP_GAIN * _tap_rotation(side, row, column).T
            attention.k_proj.weight[rows, :dims] += TAP_GAIN * torch.eye(dims)


@torch.no_grad()
def start_language_model(language: PreTrainedModel) -> None:
    """The matching heads start with equal queries and keys on the still dimensions, and copy what they look at.

    Copying: the output projection is the transpose of the value projection, so that a word's direction arrives where
    the head looks from as the direction it was.
    """
    frequencies = language.rotary_emb.inv_freq
    still = torch.cat([frequencies < 1e-3] * 2).nonzero()[:, 0]
    for number in (*WORD_LAYERS, *LINK_LAYERS, *ANSWER_LAYERS):
        attention = language.layers[number].self_attn
        for head in range(MATCHING_HEADS):
            first = head * attention.head_dim
            shared = nn.init.orthogonal_(torch.empty(len(still), attention.q_proj.in_features))
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[first + still] = MATCHING_GAIN * shared
            copied = nn.init.orthogonal_(torch.empty(attention.head_dim, attention.v_proj.in_features))
            attention.v_proj.weight[first : first + attention.head_dim] = copied
            attention.o_proj.weight[:, first : first + attention.head_dim] = COPYING_GAIN * copied.T


def build_model(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """A freshly initialised model in fp32; the caller seeds torch."""
    model = LlavaForConditionalGeneration(config)
    start_vision_tower(model.model.vision_tower)
    start_language_model(model.model.language_model)
    return model


def encode_shifted(tower: PreTrainedModel, pixels: Tensor, shifts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tower's forward with the position table rolled per image by ``shifts`` ``(batch, 2)`` (rows, columns).

    Returns the selected features ``(batch, tokens, dim)`` (hidden states of layer -2 without CLS) and the pooled CLS
    ``(batch, dim)``. With ``shifts=None`` or zeros it equals the stock forward.
    """
    embeddings = tower.embeddings
    side = embeddings.image_size // embeddings.patch_size
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    batch = patches.shape[0]
    table = embeddings.position_embedding.weight

    if shifts is None:
        shifts = torch.zeros(batch, 2, dtype=torch.long, device=pixels.device)
    lines = torch.arange(side, device=pixels.device)
    rows = (lines[None] + shifts[:, :1]) % side
    columns = (lines[None] + shifts[:, 1:]) % side
    index = (rows[:, :, None] * side + columns[:, None, :]).flatten(1) + 1
    cls = (embeddings.class_embedding + table[0]).expand(batch, 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([cls, patches + table[index]], dim=1))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    features = hidden[:, 1:]
    pooled = tower.post_layernorm(tower.encoder.layers[-1](hidden, attention_mask=None)[:, 0])
    return features, pooled
