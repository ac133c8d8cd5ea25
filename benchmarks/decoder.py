"""The decoder of two versions of this repository side by side: answers per CPU second, peak memory, answers that differ.

Loads, each the same for both versions:

* *default*: trials of a default sweep on the testbed's model, by selection, position strategy and trunk as a sweep runs
  them, 12 questions an image
* *unpruned*: the unpruned trial of the testbed alone
* *refcoco*: random weights, 32 layers of width 512, LLaVA-1.5's 576 tokens, ten questions an image behind a system
  prompt: unpruned, Nüwa at 11 % and FastV at 22 %
* *memory*: random weights of true width in two layers, 2,928 visual tokens, 10 and 100 questions

Versions take turns in processes of their own, one thread each, so that a busy machine slows both alike. Time is CPU time.
The other version is a checked-out folder, whose packages the process imports. The last line is one JSON object.

    python -m benchmarks.decoder ../base
    python -m benchmarks.decoder ../base --loads refcoco --rounds 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parents[1]
LOADS = ("default", "unpruned", "refcoco", "memory")
SEED = 11
TASKS = {"refcoco": 2, "refcocoplus": 2, "refcocog": 2, "pope": 3, "gqa": 2, "textvqa": 1}  # questions of an image
WORDS = 20  # of a RefCOCO question, with its frame
SYSTEM = 35  # tokens of Vicuna's system prompt


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def digest(answers: Sequence[Any]) -> list[str]:
    """A short word for each answer: its tokens and what was kept."""
    return [hashlib.sha256(repr((answer.tokens, answer.kept)).encode()).hexdigest()[:12] for answer in answers]


def run_trunk(trunk: Any, cuts: Sequence[Any], limits: list[int], seed: int = 0) -> list[Any]:
    if not cuts:
        return trunk.finish(limits)
    trunk.advance(cuts[0].layer, frozenset({cuts[0].layer - 1}))
    return trunk.fork(cuts, limits, seed)


# --- the testbed


def grid() -> list[dict[str, Any]]:
    """Trials by the keywords of ``specify``: those of a default sweep that earlier versions know by the same names.

    VisionZip is left out: it merges tokens otherwise since, so its answers may differ for no fault of the decoder.
    """
    budgets, positions = (16, 32, 48), ("perc", "pesp", "rpme")
    trials: list[dict[str, Any]] = [{"method": "unpruned"}]
    for method in ("nuwa", "divprune", "vispruner", "random", "uniform"):
        trials += [
            {"method": method, "budget": budget, "position": position} for budget in budgets for position in positions
        ]
    trials += [{"method": "fastv", "budget": 48, "position": position} for position in positions]
    trials += [{"method": "pyramiddrop", "budget": 80, "position": position} for position in positions]
    trials += [
        {"method": "nuwa", "budget": 16, "stage2": {"layer": layer, "scorer": scorer}}
        for layer in (2, 3, 4, 5, 6)
        for scorer in ("attention_last_token", "attention_all_text", "cosine_mean_text", "random")
    ]
    return trials


def by_trunk(vlm: Any, stride: int) -> list[list[tuple[Any, Any]]]:
    """Every ``stride``-th trial of the grid as (specification, plan), those of one trunk together by rising first cut."""
    from nuwa.methods import specify

    trunks: dict[Any, list[tuple[Any, Any]]] = {}
    for keywords in grid()[::stride]:
        spec = specify(**keywords)
        plan = spec.on(vlm.layout, vlm.layers)
        selection = (spec.stage1, repr(spec.config), spec.seed, plan.schedule.stage1_keep)
        trunks.setdefault((selection, spec.position), []).append((spec, plan))
    for together in trunks.values():
        together.sort(key=lambda one: min((layer for layer, _ in one[1].schedule.cuts), default=vlm.layers))
    return list(trunks.values())


def testbed(images: int, stride: int, only_unpruned: bool) -> dict[str, Any]:
    """Every ``stride``-th trial of the grid on ``images`` images."""
    import numpy as np
    from PIL import Image

    from nuwa.decoder import Trunk
    from nuwa.methods import select_views
    from nuwa.testbed.benchmark import ask, popular_pairs
    from nuwa.testbed.scenes import draw_scene
    from nuwa.vlm import LlavaAdapter

    vlm = LlavaAdapter.load("models/testbed")
    scenes = [draw_scene(np.random.default_rng([SEED, number]), "test") for number in range(images)]
    popular, rng = popular_pairs(scenes), np.random.default_rng(SEED)
    texts = [
        [question.text for task, count in TASKS.items() for question in ask(rng, scene, task, count, popular)]
        for scene in scenes
    ]
    prompts = [[vlm.encode_prompt(text) for text in own] for own in texts]
    names = tuple(f"scene {number}" for number in range(images))
    photos = [Image.fromarray(scene.image) for scene in scenes]
    signals = vlm.signals(vlm.encode(vlm.pixels(photos)), names)
    limits = [16] * sum(map(len, prompts))
    trunks = by_trunk(vlm, len(grid()) if only_unpruned else stride)
    # Choosing tokens is no part of this.
    selections = [select_views(together[0][1], vlm.layout, [signals]) for together in trunks]

    def answer() -> list[str]:
        answers = []
        for selection, together in zip(selections, trunks, strict=True):
            trunk = Trunk(vlm, selection, prompts, together[0][0].position, names)
            for spec, plan in together:
                answers += digest(run_trunk(trunk, spec.cuts(plan.schedule), limits, spec.seed))
        return answers

    if only_unpruned:
        answer()  # warm
    seconds, answers = clock(answer)
    return {"seconds": seconds, "answers": answers, "answers_per_second": len(answers) / seconds}


# --- random weights


def random_llava(layers: int, width: int, heads: int, grid: int) -> Any:
    """A LLaVA adapter around random weights, without a processor: nothing is encoded."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from nuwa.vlm import LlavaAdapter

    torch.manual_seed(SEED)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=14 * grid,
            patch_size=14,
            projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=int(2.6875 * width),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=8192,
            eos_token_id=2,
        ),
        image_token_index=999,
    )
    model = LlavaForConditionalGeneration(config).requires_grad_(False)
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    vlm = LlavaAdapter(model, SimpleNamespace(image_processor=None))
    vlm.end_tokens = ()
    return vlm


def asked_of(count: int) -> list[Any]:
    """Questions that share their first and last words, behind a system prompt."""
    import numpy as np

    from nuwa.vlm import EncodedPrompt

    rng = np.random.default_rng(SEED)
    frame = [tuple(rng.integers(2, 990, size).tolist()) for size in (SYSTEM, 6, 5)]
    return [
        EncodedPrompt(frame[0], (*frame[1], *rng.integers(2, 990, WORDS - 11 + number % 3).tolist(), *frame[2]))
        for number in range(count)
    ]


def kept_tokens(vlm: Any, images: int, keep: int) -> Any:
    import torch

    from nuwa.selection import Selection

    generator = torch.Generator().manual_seed(SEED)
    tokens = vlm.layout.tokens
    features = torch.randn(images, tokens, 64, generator=generator)
    chosen = torch.stack([torch.randperm(tokens, generator=generator)[:keep].sort().values for _ in range(images)])
    rows = torch.arange(images)[:, None]
    return Selection(chosen, features[rows, chosen], torch.ones_like(chosen, dtype=torch.bool))


def refcoco(method: str, images: int, new_tokens: int) -> dict[str, Any]:
    from nuwa.decoder import Trunk
    from nuwa.methods import specify

    vlm = random_llava(32, 512, 8, 24)
    share = {"unpruned": None, "nuwa": 0.11 * 576, "fastv": 0.22 * 576}[method]
    spec = specify(method, budget=share)
    schedule = spec.schedule(vlm.grid, vlm.layers)
    selection = kept_tokens(vlm, images, schedule.stage1_keep)
    prompts = [asked_of(10) for _ in range(images)]
    names = [f"image {number}" for number in range(images)]

    def answer() -> list[str]:
        trunk = Trunk(vlm, selection, prompts, spec.position, names)
        return digest(run_trunk(trunk, spec.cuts(schedule), [new_tokens] * 10 * images))

    seconds, answers = clock(answer)
    return {"seconds": seconds, "answers": answers}


def memory(questions: int) -> dict[str, Any]:
    """Peak memory above weights, in MiB."""
    from nuwa.decoder import Trunk
    from nuwa.stage2 import Cut, get_scorer

    vlm = random_llava(2, 4096, 32, 54)  # 2,916 tokens
    selection = kept_tokens(vlm, 1, vlm.layout.tokens)
    prompts = [asked_of(questions)]
    limits = [2] * questions
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    trunk = Trunk(vlm, selection, prompts, "pesp", ["image"])
    answers = run_trunk(trunk, [Cut(1, 600, get_scorer("attention_all_text"))], limits)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": time.process_time() - began, "answers": digest(answers), "mebibytes": (peak - before) / 1024}


# --- versions side by side


def measure(load: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        if load in ("default", "unpruned"):
            return testbed(options["images"], options["stride"], load == "unpruned")
        if load.startswith("refcoco"):
            return refcoco(load.partition(" ")[2], 1, options["new_tokens"])
        return memory(int(load.partition(" ")[2]))


def in_version(root: Path, load: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run a load in a process that imports the packages of ``root``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", load, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{load} failed in {root}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(base: Path, load: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """The best of ``rounds`` runs of each version, in turns."""
    runs: dict[Path, list[dict[str, Any]]] = {base: [], HERE: []}
    for _ in range(rounds):
        for root, of_version in runs.items():
            of_version.append(in_version(root, load, options))
    before, now = (min(of_version, key=lambda one: one["seconds"]) for of_version in runs.values())
    pairs = list(zip(before["answers"], now["answers"], strict=True))
    differing = sum(one != other for one, other in pairs)
    result = {"speedup": before["seconds"] / now["seconds"], "differing": differing, "answers": len(pairs)}
    result |= {"base_s": before["seconds"], "here_s": now["seconds"]}
    if "mebibytes" in now:
        result |= {"base_mib": before["mebibytes"], "here_mib": now["mebibytes"]}
    print(f"{load}: " + ", ".join(f"{name} {value:.4g}" for name, value in result.items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path, help="folder with the other version checked out")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--stride", type=int, default=4, help="of the default trials, every so many")
    parser.add_argument("--new-tokens", type=int, default=12)
    chosen = parser.parse_args()
    options = {"images": chosen.images, "stride": chosen.stride, "new_tokens": chosen.new_tokens}
    parts = {"refcoco": ["refcoco unpruned", "refcoco nuwa", "refcoco fastv"], "memory": ["memory 10", "memory 100"]}
    loads = [part for load in chosen.loads for part in parts.get(load, [load])]
    print(json.dumps({load: compare(chosen.base.resolve(), load, chosen.rounds, options) for load in loads}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        main()
