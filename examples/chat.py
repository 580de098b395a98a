"""Which sentence of a chat decided the first token of the answer. Usage: python examples/chat.py [FOLDER]"""

import sys
from pathlib import Path

from depass import Contrast, DePass

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()

# the model answers "Anna lives in Paris."
messages = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "Anna lives in Paris. Her brother Tom lives in London. In which city does Anna live?"},
]
res = dp.attribute(messages, target=Contrast("Anna", "Tom"), sources="sentence")
res.show()
res.to_html(folder / "chat.html")

print(f"The answer begins with Anna rather than Tom by {float(res.target_logits[0]):.2f} logits, of which")
for source, score in res.top(4):
    print(f"  {score:+.2f}  {source.label.strip()!r}")
