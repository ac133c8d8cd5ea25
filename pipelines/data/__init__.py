"""Published tables → the questions and images a run asks about."""
