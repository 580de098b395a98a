"""The baselines of the benchmarks. Each takes a Llama-like model without biases, ids ``[N]`` and a token id."""
