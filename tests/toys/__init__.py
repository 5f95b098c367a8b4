"""Models and specs that are small enough to be worked out by hand, or quick enough to be run in every test."""
