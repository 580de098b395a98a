"""Passes of a model with decompositions on the way, and what is read from them."""
