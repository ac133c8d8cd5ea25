"""Visual token pruning for vision-language models: methods, schedules, models, benchmarks."""
