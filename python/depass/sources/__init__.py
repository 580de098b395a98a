"""Sources: the parts that a prompt or a layer is decomposed into."""
