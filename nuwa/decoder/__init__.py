"""Answers many questions about many images under a token schedule, computing what is shared once.

All questions of an image stand in one sequence behind the image's prefix, and words with which several of them begin
stand there once: the prefix (system tokens and kept visual tokens) and every common beginning pass each layer once,
however many questions follow. A cut (stage 2) makes every question a row of its own, because from there on each keeps
other visual tokens; the layers below the cut stay shared, between questions and between all cuts forked from the same
trunk.

* ``sequence``: rows and columns, which column sees which, and a pass through layers
* ``caches``: the caches that a model's own layers write to
* ``attention``: queries, keys and values as a model's own layer makes them
* ``cuts``: what is known at a cut, which tokens go on, and the layout above it
* ``generation``: greedy decoding
* ``trunk``: the shared work of a batch of images, its answers and its forks

The layers are the model's own modules; rotary tables, masks and key-value caches are handed to them from outside. Keys
and values that forks share are never written in place. Layers may stand on several devices: hidden states and caches
stay where a layer left them, everything else is kept on the model's first device.
"""

from nuwa.decoder.generation import Answer
from nuwa.decoder.sequence import SharedText, share_beginnings
from nuwa.decoder.trunk import Trunk

__all__ = ["Answer", "SharedText", "Trunk", "share_beginnings"]
