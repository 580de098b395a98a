"""captum: which tokens and which parts of a template led to the answer. Usage: python with_captum.py [FOLDER]"""

import sys
from pathlib import Path

from captum.attr import TextTemplateInput, TextTokenInput

from depass import DePass
from depass.compat.captum import DePassAttribution, DePassLLMAttribution

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dp = DePass.from_pretrained()
llm = DePassLLMAttribution(DePassAttribution(dp))

result = llm.attribute(TextTokenInput("The Colosseum is in the city of", dp.tokenizer), target=" Rome, Italy")
figure, _ = result.plot_token_attr()
figure.savefig(folder / "captum.png", bbox_inches="tight")

template = TextTemplateInput("{} was built by the {}. It stands in", values=["The Colosseum", "Romans"])
for feature, score in llm.attribute(template, target=" Rome").seq_attr_dict.items():
    print(f"{feature!r} {score:+.2f}")
