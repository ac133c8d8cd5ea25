"""The tiny models of ``benchmarks.gpu.families``, made once a session. What takes seconds to import is imported by who runs
tests: see ``isolation.py``.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from nuwa.vlm import (
        Adapter,
        Idefics3Adapter,
        InternVLAdapter,
        LlavaAdapter,
        LlavaNextAdapter,
        LlavaOnevisionAdapter,
        Qwen2_5VLAdapter,
        Qwen2VLAdapter,
        Qwen3VLAdapter,
        SmolVLMAdapter,
    )


@pytest.fixture(scope="session")
def families() -> ModuleType:
    from benchmarks.gpu import families

    return families


@pytest.fixture(scope="session")
def tiny_vlm(families) -> LlavaAdapter:
    return families.tiny_llava()


@pytest.fixture(scope="session")
def tiny_next(families) -> LlavaNextAdapter:
    return families.tiny_next()


@pytest.fixture(scope="session")
def tiny_qwen(families) -> Qwen2_5VLAdapter:
    return families.tiny_qwen()


@pytest.fixture(scope="session")
def tiny_qwen2(families) -> Qwen2VLAdapter:
    return families.tiny_qwen2()


@pytest.fixture(scope="session")
def tiny_onevision(families) -> LlavaOnevisionAdapter:
    return families.tiny_onevision()


@pytest.fixture(scope="session")
def tiny_internvl(families) -> InternVLAdapter:
    return families.tiny_internvl()


@pytest.fixture(scope="session")
def tiny_qwen3(families) -> Qwen3VLAdapter:
    return families.tiny_qwen3()


@pytest.fixture(scope="session")
def tiny_smolvlm(families) -> SmolVLMAdapter:
    return families.tiny_smolvlm()


@pytest.fixture(scope="session")
def tiny_idefics3(families) -> Idefics3Adapter:
    return families.tiny_idefics3()


@pytest.fixture(
    scope="session",
    params=["tiny_qwen2", "tiny_onevision", "tiny_qwen3", "tiny_internvl", "tiny_smolvlm", "tiny_idefics3"],
)
def newer(request) -> Adapter:
    """Families that share their structure with those of ``family`` and are held to less."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def photos(families) -> list[Image.Image]:
    return families.draw_photos()


@pytest.fixture(scope="session", params=["llava", "llava_next", "qwen2_5_vl"])
def family(request, tiny_vlm, tiny_next, tiny_qwen) -> Adapter:
    return {"llava": tiny_vlm, "llava_next": tiny_next, "qwen2_5_vl": tiny_qwen}[request.param]
