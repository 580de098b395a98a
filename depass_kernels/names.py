"""The names of sharing rules and backends. This module needs no torch, so a command's help can list them quickly."""

from __future__ import annotations

#: The rules that share a neuron's output among the sources. csrc numbers the rules in this order.
RULES = ("softmax", "max", "relu", "linear", "taylor")
#: The backends, in the order in which ``auto`` tries them.
NAMES = ("auto", "cpu", "triton", "cuda", "reference")
