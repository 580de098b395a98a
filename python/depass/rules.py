"""The names of the rules by which scores are shared, without torch.

A forward rule shares each MLP output among the parts of a decomposed state. A linear rule needs no parts: one backward pass
through the linearised model scores everything. ``taylor`` is both.
"""

from depass_kernels import names

FORWARD = names.RULES
LINEAR = ("taylor", "half", "up")
RULES = tuple(dict.fromkeys((*FORWARD, *LINEAR)))
