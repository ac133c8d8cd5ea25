"""What the vision tower is taught, and how well it reads.

The tower learns dense labels per patch (digit, colour, inside an object or not, the object's box relative to the
patch) from the features LLaVA consumes, and which digits and colours are present from CLS, so that CLS attention
means something. The heads are thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuwa.testbed.architecture import GRID, PATCH_SIZE, encode_shifted
from nuwa.testbed.scenes import COLOR_NAMES, Scene, SceneObject, draw_scene

PIXEL_MEAN, PIXEL_STD = (0.18, 0.18, 0.18), (0.16, 0.16, 0.16)
BOX_UNIT = 16.0  # pixels: relative boxes are of order one


def normalize(images: np.ndarray) -> Tensor:
    """``(batch, H, W, 3)`` uint8 → ``(batch, 3, H, W)`` float32, exactly as the saved image processor does it."""
    pixels: np.ndarray = images.astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - np.array(PIXEL_MEAN, np.float32)) / np.array(PIXEL_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


@dataclass(frozen=True)
class PatchLabels:
    """Per patch in raster order; ``-1`` marks background in ``digit`` and ``color``."""

    digit: Tensor  # (batch, tokens) int64
    color: Tensor  # (batch, tokens) int64
    box: Tensor  # (batch, tokens, 4) float32: left, top, right, bottom in pixels
    center: Tensor  # (tokens, 2) float32: x, y of the patch centre in pixels

    @property
    def is_object(self) -> Tensor:
        return self.digit >= 0

    @property
    def relative_box(self) -> Tensor:
        """Box edges from the patch's own centre, in units of ``BOX_UNIT`` pixels."""
        return (self.box - torch.cat([self.center, self.center], dim=-1)) / BOX_UNIT


def object_patches(item: SceneObject) -> np.ndarray:
    """``(tokens,)`` bool: the patches whose centre lies inside the object's box."""
    line = (np.arange(GRID) + 0.5) * PATCH_SIZE
    columns = (line >= item.left) & (line < item.left + item.side)
    rows = (line >= item.top) & (line < item.top + item.side)
    return (rows[:, None] & columns[None]).ravel()


def patch_labels(scenes: list[tuple[SceneObject, ...]]) -> PatchLabels:
    """A patch belongs to an object when its centre lies inside the object's box."""
    line = (np.arange(GRID) + 0.5) * PATCH_SIZE
    x, y = np.tile(line, GRID), np.repeat(line, GRID)
    digit = np.full((len(scenes), GRID * GRID), -1)
    color = digit.copy()
    box = np.zeros((len(scenes), GRID * GRID, 4), dtype=np.float32)
    for row, objects in enumerate(scenes):
        for item in objects:
            right, bottom = item.left + item.side, item.top + item.side
            inside = object_patches(item)
            digit[row, inside], color[row, inside] = item.digit, COLOR_NAMES.index(item.color)
            box[row, inside] = (item.left, item.top, right, bottom)
    center = torch.from_numpy(np.stack([x, y], axis=-1).astype(np.float32))
    return PatchLabels(torch.from_numpy(digit), torch.from_numpy(color), torch.from_numpy(box), center)


class VisionHeads(nn.Module):
    """Training-only read-outs of the tower."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, 10 + len(COLOR_NAMES) + 1 + 4)
        self.presence = nn.Linear(width, 10 + len(COLOR_NAMES))

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``features`` ``(batch, tokens, dim)``, ``pooled`` ``(batch, dim)`` → digit, colour, object, box, presence."""
        out = self.patch(self.norm(features))
        digit, color, inside, box = out.split([10, len(COLOR_NAMES), 1, 4], dim=-1)
        return digit, color, inside[..., 0], box, self.presence(pooled)


def vision_loss(heads: VisionHeads, features: Tensor, pooled: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
    """Cross-entropy on object patches (digit, colour), binary object test, L1 box, multi-label presence from CLS."""
    digit, color, inside, box, presence = heads(features, pooled)
    seen = labels.is_object
    present = torch.zeros_like(presence)
    rows = torch.arange(len(seen), device=seen.device)[:, None].expand_as(seen)[seen]
    present[rows, labels.digit[seen]] = 1.0
    present[rows, 10 + labels.color[seen]] = 1.0
    return {
        "digit": F.cross_entropy(digit[seen], labels.digit[seen]),
        "color": F.cross_entropy(color[seen], labels.color[seen]),
        "object": F.binary_cross_entropy_with_logits(inside, seen.float()),
        "box": F.l1_loss(box[seen], labels.relative_box[seen]),
        "presence": F.binary_cross_entropy_with_logits(presence, present),
    }


@torch.no_grad()
def reading_accuracy(heads: VisionHeads, features: Tensor, pooled: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of objects whose patches' summed logits name the digit and the colour, and of right object patches."""
    labels = patch_labels([scene.objects for scene in scenes])
    digit, color, inside, box, _ = (out.cpu() for out in heads(features, pooled))
    right: dict[str, list[float]] = {"digit": [], "color": []}
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            on_item = (
                labels.box[row] == torch.tensor([item.left, item.top, item.left + item.side, item.top + item.side])
            ).all(-1)
            right["digit"].append(float(digit[row, on_item].log_softmax(-1).sum(0).argmax() == item.digit))
            right["color"].append(
                float(color[row, on_item].log_softmax(-1).sum(0).argmax() == COLOR_NAMES.index(item.color))
            )

    seen = labels.is_object
    return {
        "object_digit": float(np.mean(right["digit"])),
        "object_color": float(np.mean(right["color"])),
        "patch_digit": float((digit.argmax(-1)[seen] == labels.digit[seen]).float().mean()),
        "patch_object": float(((inside > 0) == seen).float().mean()),
        "box_error_px": float((box[seen] - labels.relative_box[seen]).abs().mean()) * BOX_UNIT,
    }


class VisionLearner(nn.Module):
    """The vision phase: tower and heads, trained together."""

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.tower = tower
        self.heads = VisionHeads(tower.config.hidden_size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, pooled = encode_shifted(self.tower, batch["pixels"], batch["shifts"])
        labels = PatchLabels(batch["digit"], batch["color"], batch["box"], batch["center"])
        return vision_loss(self.heads, features, pooled, labels)


def draw_vision_batch(rng: np.random.Generator, size: int, progress: float) -> dict[str, Tensor]:
    """Scenes of two to seven objects (fuller than the benchmark's: more handwriting an image), each table shifted."""
    scenes = [draw_scene(rng, "train", 2, 7) for _ in range(size)]
    labels = patch_labels([scene.objects for scene in scenes])
    return {
        "pixels": normalize(np.stack([scene.image for scene in scenes])),
        "shifts": torch.from_numpy(rng.integers(0, GRID, size=(size, 2))),
        "digit": labels.digit,
        "color": labels.color,
        "box": labels.box,
        "center": labels.center,
    }


@torch.no_grad()
def evaluate_vision(learner: VisionLearner, images: int = 200) -> dict[str, float]:
    """Reading accuracy on validation handwriting, table unshifted."""
    rng = np.random.default_rng(7)
    scenes = [draw_scene(rng, "validation") for _ in range(images)]
    device = next(learner.parameters()).device
    features, pooled = encode_shifted(
        learner.tower, normalize(np.stack([scene.image for scene in scenes])).to(device), None
    )
    return reading_accuracy(learner.heads, features, pooled, scenes)
