"""Results: scores, and how to read, save and draw them."""
