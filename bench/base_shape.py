#!/usr/bin/env python3
"""Write a checkpoint of XLM-R base's shape (278 M parameters) with random weights.

usage: base_shape.py TOKENIZER_FOLDER OUT_FOLDER

For questions of speed and memory, to which the weights' values do not matter.
"""

import sys

import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification


def main(tokenizer_folder: str, out: str) -> None:
    """The configuration as published for xlm-roberta-base."""
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
    )
    model = XLMRobertaForSequenceClassification(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
