"""Models: the paths of their modules, loading, and capturing their forward pass."""
