"""Orchestration: settings, data, cached features, sweeps on Ray, evidence, MLflow, report."""
