"""The report of a sweep: one self-contained page, and the same in Markdown."""
