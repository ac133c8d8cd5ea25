"""Seeded one-line changes of the code between image and answer: none may leave an old identity over new answers."""
