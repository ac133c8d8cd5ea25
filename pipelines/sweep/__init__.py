"""Trials → units of shared work → stored answers → tables."""
