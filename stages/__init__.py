"""One thin module per DVC stage: read settings, call pipelines, write outputs."""
