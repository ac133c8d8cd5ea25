"""The order of test files: those that take longest first.

``make test`` deals whole files to three processes, in this order, as either is done with the one before. Long files last
would leave processes waiting for one; so they come first, and the short ones fill the end. No test may depend on
it: ``tests/isolation.py`` sees to that.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHOWN_S = 20.0  # the end of a run lists files that took longer

# Seconds on one free core, of files that take more than five; the others follow in the order of their paths. What a run
# lists at its end says when this is due to be renewed: only the order counts.
SECONDS = {
    "cluster/test_submit.py": 80,
    "nuwa/test_device_placement.py": 36,
    "pipelines/workers/test_policy.py": 25,
    "pipelines/test_blocks.py": 38,
    "pipelines/test_chaos.py": 38,
    "stages/test_pruner_stage.py": 25,
    "pipelines/test_sweep.py": 32,
    "stages/test_search_stage.py": 30,
    "pipelines/test_dynamic_layouts.py": 28,
    "pipelines/report/test_report_page.py": 33,
    "stages/test_dynamic_pipeline.py": 26,
    "test_gpu_benchmark.py": 20,
    "nuwa/test_masked_reference.py": 20,
    "pipelines/test_results.py": 23,
    "pipelines/test_features.py": 22,
    "pipelines/test_plugins.py": 22,
    "nuwa/test_several_images.py": 25,
    "pipelines/test_swarm_search.py": 21,
    "nuwa/test_generation.py": 13,
    "pipelines/test_published_sizes.py": 19,
    "pipelines/test_plan_stage.py": 19,
    "pipelines/test_tracking.py": 18,
    "nuwa/test_stage1_batching.py": 13,
    "pipelines/test_racing.py": 16,
    "nuwa/test_families.py": 16,
    "test_plugin_example.py": 10,
    "nuwa/benchmarks/test_benchmark_protocol.py": 14,
    "nuwa/pruner/test_pruner_training.py": 14,
    "nuwa/test_checkpoint.py": 13,
    "mutation/test_short_form.py": 12,
    "nuwa/test_inside_methods.py": 12,
    "pipelines/test_profiling.py": 11,
    "nuwa/test_stage1_newer.py": 8,
    "nuwa/test_inside_scorers.py": 6,
    "nuwa/pruner/test_pruner_learner.py": 6,
    "nuwa/test_stage1.py": 10,
    "nuwa/test_learnpruner.py": 7,
    "pipelines/test_identity.py": 10,
    "pipelines/report/test_report_search.py": 10,
    "nuwa/testbed/test_training.py": 9,
    "nuwa/test_flash_attention.py": 6,
    "nuwa/test_decoder.py": 6,
    "nuwa/test_language_models.py": 6,
    "pipelines/test_text_aware_sweep.py": 8,
    "pipelines/test_collection.py": 7,
    "stages/test_pipeline_definition.py": 7,
    "stages/test_experiments.py": 6,
}


def cost(path: Path) -> float:
    """Seconds that the file is known to take, 0 where it is short."""
    return SECONDS.get(path.relative_to(TESTS).as_posix(), 0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; within a file, and among files alike, the order stays."""
    items.sort(key=lambda item: -cost(item.path))


def pytest_terminal_summary(terminalreporter) -> None:
    """What the slowest files took, by the wall, all processes together."""
    took: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            took[getattr(report, "nodeid", "").partition("::")[0]] += getattr(report, "duration", 0.0)
    slow = sorted(((seconds, name) for name, seconds in took.items() if seconds > SHOWN_S), reverse=True)
    if slow:
        terminalreporter.section(f"files above {SHOWN_S:.0f} s (tests/running_order.py)")
        for seconds, name in slow:
            terminalreporter.write_line(f"{seconds:6.0f} s  {name}")
