"""Pictures of one pixel, a line, or far from any model's grid: laid out as stock lays them, or refused for a stated reason."""

from __future__ import annotations

import pytest
from PIL import Image

LINES = [(72, 1), (1, 72), (73, 1), (1, 73), (199, 1), (1, 199), (201, 1), (1, 201)]
SIZES = [(1, 1), (2, 1), (146, 2), (3000, 9), *LINES]
TALL, LONG = "so tall that no column of its local grid is left", "absolute aspect ratio must be smaller than 200"
REASONS = {
    "llava": {},
    # Without its padding no column of the picture is left: transformers shows ends of lines alone.
    "llava_next": {size: TALL for size in LINES if size[0] == 1},
    "qwen2_5_vl": {size: LONG for size in SIZES if max(size) > 200 * min(size)},
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_is_laid_out_as_stock_lays_it_or_refused(family, size):
    reason = REASONS[family.model.config.model_type].get(size)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            family.layout_of(size)
        return

    placeholder = family.processor.tokenizer.convert_ids_to_tokens(family.image_token)
    encoded = family.processor(text=[placeholder], images=[Image.new("RGB", size, "red")], return_tensors="pt")
    layout = family.layout_of(size)
    assert layout.tokens == int((encoded["input_ids"] == family.image_token).sum())
    assert layout.tokens > 0
