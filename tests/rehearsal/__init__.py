"""A dress rehearsal of the real day: ``make rehearsal``, and a short form of it in tests/cluster."""
