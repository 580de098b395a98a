"""Other tools in their own code, each in an environment of its own, beside this package: ``python -m benchmarks.peers``.

A module per tool has ``PINS``, which pip installs beside torch; perhaps ``WITHOUT_DEPENDENCIES``, which it installs alone;
``METHODS``; and three functions:

- ``load(folder)`` loads a model and returns an object whose ``model`` is transformers' model;
- ``scores(loaded, method, ids, target)`` is what is timed: the scores ``[N]`` of the prompt's tokens, perhaps followed by
  parts of the number that no token gets;
- ``explained(loaded, method, ids, target)`` is the number that the scores explain, or None if they explain no number.

These modules import their tool inside functions, so that the runner can read them without it.
"""
