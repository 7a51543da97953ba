"""What transformers makes of model folders, whichever version of it is imported.

python read_export.py FOLDER ...     prints one JSON object: by folder what `read` gives
"""

from __future__ import annotations

import json
import sys
from typing import Any

TEXT = "Once upon a time, 8+7-4+9=#### 20\n\tDon't  guess: ½ é 东京<|im_end|></s>"
CHAT = [{"role": "user", "content": "What is 8+7?"}]
NUM_IDS = 12


def read(folder: str) -> dict[str, Any]:
    """Tokens of a text, a rendered chat, rotary frequencies, and logits [T, V] of fixed ids."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(NUM_IDS)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model.float()(ids).logits[0, :, :64]
    chat = None
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(TEXT).input_ids
    return {
        "ids": encoded,
        "text": tokenizer.decode(encoded, skip_special_tokens=True),
        "special": sorted(tokenizer.all_special_tokens),
        "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id],
        "stops": model.generation_config.eos_token_id,
        "chat": chat,
        "rotary": model.model.rotary_emb.inv_freq.tolist(),
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    import transformers

    found = {folder: read(folder) for folder in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, "folders": found}))
