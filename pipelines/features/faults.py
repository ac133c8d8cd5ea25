"""What is wrong with images and their features, each one line that a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nuwa.errors import UserError
from pipelines.features.signals import signal_dtype
from pipelines.workers import UnitsFailed


class MissingFeatures(UserError, LookupError):
    """An image is not in the store."""

    stops_the_run = True


class UnreadableFeatures(UserError, RuntimeError):
    """A shard cannot be read for now; nothing says that it is damaged, and nothing is done to it."""

    stops_the_run = True
    may_pass = True  # later, or on another machine


class ImpossibleImage(UnitsFailed):
    """An image whose size the model cannot take."""


class BrokenImages(UnitsFailed):
    """Images whose bytes cannot be decoded; all others are stored."""

    @classmethod
    def found(cls, broken: Mapping[str, str], images_path: Path) -> BrokenImages:
        """One line from digest → what is wrong with it; ``images_path`` as :func:`read_images` takes it."""
        image, fault = min(broken.items())
        first = f"image {image[:12]} cannot be decoded ({fault})"
        if len(broken) > 1:
            first = f"{len(broken)} images cannot be decoded, first {image[:12]} ({fault})"
        return cls(
            f"{first}; {_asked_about(image, images_path)}: fetch the published file again or take these rows out of it, "
            "then run the same command again; all other images are encoded and kept"
        )


def _asked_about(image: str, images_path: Path) -> str:
    """The questions about an image, from the table that ``prepare`` leaves beside the images."""
    examples = images_path.with_name("examples.parquet")
    if examples.exists():
        names_it = pc.match_substring(pc.field("image"), image)  # alone, or among several
        held = pq.read_table(examples, columns=["example_id"], filters=names_it)
        names = held["example_id"].to_pylist()
        if names:
            more = f" and {len(names) - 1} more rows" if len(names) > 1 else ""
            return f"it is asked about by {names[0]}{more} of {examples}"
    return f"its questions have image = {image}"


class SignalNotFinite(UnitsFailed):
    """A signal that the store cannot hold; other images would meet it too."""

    stops_the_run = True

    @classmethod
    def found(
        cls, image: str, name: str, value: Tensor, *, stored_dtype: str, model_dtype: str, model: str
    ) -> SignalNotFinite:
        """``value``: the signal as the encoder of ``model`` gave it."""
        if value.isfinite().all():
            end = torch.finfo(signal_dtype(name, stored_dtype)).max
            return cls(
                f"image {image[:12]}: signal {name} goes beyond {end:g}, the end of features.dtype: {stored_dtype}; "
                "set features.dtype: float32"
            )
        remedy = f"mend the weights in {model}" if model_dtype == "float32" else "set model.dtype: float32"
        return cls(
            f"image {image[:12]}: signal {name} is not finite as the encoder gives it in model.dtype: "
            f"{model_dtype}, whatever features.dtype is; {remedy}"
        )


class NoRoom(UnitsFailed):
    """The features of all images do not fit where they are stored."""
