"""What a prompt or a layer is decomposed into."""
