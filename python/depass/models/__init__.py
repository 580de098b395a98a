"""Models: where their modules are, how they are loaded, and what of their own pass is captured."""
