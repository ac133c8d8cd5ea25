"""Slow references, written from the papers' equations in plain loops, that share no code with what they judge."""
