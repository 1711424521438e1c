#!/usr/bin/env python3
"""Write a checkpoint of XLM-R's shape, base (278 M parameters) or large, with random weights.

usage: base_shape.py TOKENIZER_FOLDER OUT_FOLDER [large]

For questions of speed and memory, to which the weights' values do not matter.
"""

import sys

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def main(tokenizer_folder: str, out: str, size: str = "base") -> None:
    """The configuration as published for xlm-roberta-base or xlm-roberta-large."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **(LARGE if size == "large" else {}),
    )
    model = XLMRobertaForSequenceClassification(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["base"], ["large"]):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
