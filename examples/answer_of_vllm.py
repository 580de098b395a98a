"""Explain an answer that vLLM gave, from the token ids of its output, with the same weights.

    python examples/answer_of_vllm.py [DIRECTORY] [OUTPUT.json] [MODEL]

In the program that runs vLLM, write the file:

    (output,) = llm.generate(prompt, sampling)
    answers = [{"token_ids": list(answer.token_ids)} for answer in output.outputs]
    json.dump({"prompt_token_ids": output.prompt_token_ids, "outputs": answers}, file)

Without a file, a short output of the default model is explained. The page goes to DIRECTORY.
"""

import json
import sys
from pathlib import Path

from depass import DePass

# "The capital of France is" and " Paris." in the tokens of smollm2
OUTPUT = {"prompt_token_ids": [504, 3575, 282, 4649, 314], "outputs": [{"token_ids": [7042, 30]}]}

directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
output = json.loads(Path(sys.argv[2]).read_text()) if len(sys.argv) > 2 else OUTPUT
dp = DePass.from_pretrained(*sys.argv[3:4])
for number, answer in enumerate(output["outputs"]):
    made = dp.explain(output["prompt_token_ids"], answer["token_ids"])
    made.show()
    made.to_html(directory / f"answer-{number}.html")
