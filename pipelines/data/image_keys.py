"""How tables name what a question shows: an image by its digest, several by theirs in order.

The key of several images is a name like any other where only equality counts: in bootstrap clusters, subsets, units of
work and stored results. What reads images asks here for the images behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

JOINT = "+"


def key_of(digests: Sequence[str]) -> str:
    """The key of images that one question shows in this order; of one image its digest."""
    return JOINT.join(digests)


def digests_of(key: str) -> tuple[str, ...]:
    """The images behind a key."""
    return tuple(key.split(JOINT))


def shows_several(key: str) -> bool:
    return JOINT in key
