"""TransformerLens: attribute a bridge's model, draw with CircuitsVis. Usage: python with_transformer_lens.py [FOLDER]"""

import sys
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from depass import DePass
from depass.compat.transformer_lens import from_bridge

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
smollm2 = DePass.from_pretrained()
bridge = TransformerBridge.boot_transformers("smollm2", hf_model=smollm2.model, tokenizer=smollm2.tokenizer)
dp = from_bridge(bridge)

text = "The Eiffel Tower is in Paris. The Colosseum is in"
res = dp.attribute(text, target=[" Rome", " Paris"])
res.show()
(folder / "circuitsvis.html").write_text(res.to_circuitsvis().local_src)

heads = dp.sweep("heads", text, target=" Rome")
source, score = heads.top(1)[0]
_, cache = bridge.run_with_cache(text)
pattern = cache[f"blocks.{source.layer}.attn.hook_pattern"][0, source.index, -1]
print(f"{source.label} gives {score:+.2f}; it attends to {heads.prompt.tokens[int(pattern[1:].argmax()) + 1]!r}")
