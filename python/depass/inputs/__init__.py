"""What is given: prompts, targets, settings; checked."""
