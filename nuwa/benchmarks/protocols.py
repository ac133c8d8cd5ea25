"""Named evaluation protocols: what a harness hands to a model and how it scores the answers.

A protocol is what one published evaluation did. What it asks of one benchmark (text, answer limit, images, reading,
score) is the benchmark's :class:`nuwa.benchmarks.definition.Rules`, in the benchmark's own file; what holds for all of
its benchmarks stands here. Text, images and limit are part of what an example is; scoring is not, so another rule of
scoring needs no answer anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nuwa.errors import UserError
from nuwa.registry import Registry

TESTBED = "testbed"
LLAVA_1_5, LLAVA_NEXT = "llava", "llava_next"  # model types
QWEN2_VL, QWEN2_5_VL, QWEN3_VL = "qwen2_vl", "qwen2_5_vl", "qwen3_vl"


class ProtocolError(UserError, ValueError):
    """A protocol that was never run on such a model."""


@dataclass(frozen=True)
class Protocol:
    """One harness at one version.

    Attributes:
        name: as ``prepare.protocol`` has it.
        source: repository and version whose behaviour this is.
        limits: model type → answer tokens allowed where a benchmark sets none; the model types it was run on. Empty:
            any, each benchmark with a limit of its own.
        note: what a reader of its figures must know.
    """

    name: str
    source: str
    limits: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def limit(self, model_type: str) -> int:
        """Answer tokens allowed where a benchmark sets none.

        Raises:
            ProtocolError: the protocol is not run on models of ``model_type``.
        """
        if model_type not in self.limits:
            raise ProtocolError(
                f"prepare.protocol: {self.name!r} is not run on {model_type or 'this'} models; it is on: "
                f"{', '.join(self.limits) or 'any'}; choose another protocol or model"
            )
        return self.limits[model_type]

    def check_model(self, model_type: str) -> None:
        """Refuse a model that the harness does not run; raises :class:`ProtocolError`."""
        if self.limits:
            self.limit(model_type)


PROTOCOLS: Registry[Protocol] = Registry("protocol")
for _protocol in (
    Protocol(TESTBED, "this repository: published prompts, short answer limits"),
    Protocol(
        "lmms_eval",
        "lmms-eval 0.7.2 (commit 75571cfe), chat class of Qwen2.5-VL, MMMU as its simple class asks it; Qwen2-VL (its one "
        "class) and Qwen3-VL (chat class) as of 0.7.3; grounding is its bbox_rec tasks",
        {LLAVA_1_5: 1024, LLAVA_NEXT: 1024, QWEN2_VL: 128, QWEN2_5_VL: 128, QWEN3_VL: 128},
    ),
    Protocol(
        "lmms_eval_0_3",
        "lmms-eval 0.3.4, which the papers used; 0.3.5 differs on VQAv2, ScienceQA and MMMU",
        {LLAVA_1_5: 1024, LLAVA_NEXT: 1024, QWEN2_5_VL: 128},
    ),
    Protocol(
        "llava",
        "LLaVA's own evaluation scripts (commit c121f04), greedy throughout",
        {LLAVA_1_5: 128, LLAVA_NEXT: 128},
    ),
    Protocol(
        "vscan",
        "the RefCOCO script of VScan that Nüwa's authors ran on Qwen2.5-VL",
        {QWEN2_5_VL: 512},
        "any box of an answer counts, IoU above a half by a formula in whole pixels",
    ),
):
    PROTOCOLS.add(_protocol.name, _protocol)
