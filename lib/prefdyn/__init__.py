"""What preference optimisation does to a language model, measured: the book's thin library."""

import warnings

# A library we use asks for widgets to draw its bars; ours are text.
warnings.filterwarnings("ignore", message="IProgress not found")
