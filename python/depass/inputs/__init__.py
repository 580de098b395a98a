"""Prompts, targets and settings, with their checks."""
