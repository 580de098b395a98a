"""The decomposed state, and its propagation through a layer."""
