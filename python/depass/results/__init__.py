"""What comes out: scores with what is needed to read, save and draw them."""
