"""What this package is measured against. Llama-like models without biases; each takes ids ``[N]`` and a token's id."""
