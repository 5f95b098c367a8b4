"""What preference optimisation does to a language model, measured: the book's thin library."""
