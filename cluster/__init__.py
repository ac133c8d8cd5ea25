"""Launchers for clusters, and the command that submits a sweep to one."""
