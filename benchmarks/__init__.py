"""Speed figures anyone can run; see each module for its command."""
