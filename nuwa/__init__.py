"""Visual token pruning for vision-language models: methods, schedules, models, benchmarks."""

UNPRUNED = "unpruned"  # the method every retention is measured against
