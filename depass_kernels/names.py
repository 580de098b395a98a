"""The names that a caller chooses from. Needs no torch, so that a command's help can list them at once."""

from __future__ import annotations

#: How a neuron's output is shared among sources. csrc numbers the rules in this order.
RULES = ("softmax", "max", "relu", "linear", "taylor")
#: Of backends, in the order in which ``auto`` asks them.
NAMES = ("auto", "cpu", "triton", "cuda", "reference")
