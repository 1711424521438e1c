"""The classifier and its tokenizer: from a folder, the cache, the hub, or from scratch."""

import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from batches import Template
from errors import BAD_CONFIG, CANNOT_WRITE, MISSING, Refusal, printable
from subwords import compose

SCRATCH = "scratch"
SCRATCH_VOCABULARY = 16_000  # large: most words are one piece, and its n-grams overlap
HUB_TIMEOUT_S = 10
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # what a classifier is loaded from
# Settings that a model without pretrained weights takes where the configuration has the default:
# nothing is learnt from random weights at a rate meant to leave pretrained ones nearly in place.
# On humour_en_pt_ar 400 steps score far lower, 2,280 lower; bf16 saves no time at this size.
# RESULTS.md has what was tried.
SCRATCH_SETTINGS = {
    "optimizer.lr": 5e-4,
    "train.max_steps": 600,
    "train.label_smoothing": 0.1,
    "train.precision": "fp32",
}


class HubUnreachable(Refusal):
    """The weights are in no folder and no cache, and the hub does not answer."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            MISSING,
            f"model.name: '{printable(name)}' is no folder and not in the cache, and the hub "
            f"cannot be reached ({printable(reason)}); put its files into a folder and name it, "
            "or set HF_HOME to a cache that has it",
        )


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder with its files, or None for `scratch`."""

    name: str
    folder: Path | None

    @property
    def is_scratch(self) -> bool:
        """Whether there are no pretrained weights."""
        return self.folder is None


def find_source(name: str) -> Source:
    """The model `name`: a folder, in the cache, or fetched from the hub after one short request.

    Raises HubUnreachable (66), or Refusal 66 for a name the hub does not know and a folder that
    holds no safetensors.
    """
    if name == SCRATCH:
        return Source(name, None)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder_source(name, folder)
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or ".." in name:
        raise Refusal(MISSING, f"model.name: no folder '{printable(name)}', and no hub name either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)
        return _folder_source(name, Path(cached))
    except HFValidationError:
        raise Refusal(MISSING, f"model.name: no folder '{name}', and no hub name either") from None
    except (LocalEntryNotFoundError, Refusal, OSError):
        pass  # not in the cache, or only in part
    _ask_hub(name)
    try:
        fetched = snapshot_download(name, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise Refusal(
            MISSING, f"model.name: fetching '{name}' failed: {printable(error)}"
        ) from None
    return _folder_source(name, Path(fetched))


def _ask_hub(name: str) -> None:
    """One request whether the hub has `name`, without retries."""
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise HubUnreachable(name, "HF_HUB_OFFLINE is set")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(f"{endpoint}/{name}/resolve/main/config.json", method="HEAD")
    if token := get_token():
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise Refusal(
                MISSING,
                f"model.name: the hub has no public model '{printable(name)}' "
                f"(HTTP {error.code}); for a private one set HF_TOKEN",
            ) from None
        raise HubUnreachable(name, f"HTTP {error.code}") from None
    except (OSError, ValueError) as error:
        raise HubUnreachable(name, str(getattr(error, "reason", error))) from None


def _folder_source(name: str, folder: Path) -> Source:
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        raise Refusal(MISSING, f"model.name: {printable(folder, 200)} has no config.json")
    if not weights:
        raise Refusal(
            MISSING,
            f"model.name: {printable(folder, 200)} has no .safetensors file; "
            "pickled weights (.bin) are not loaded",
        )
    return Source(name, folder)


def weights_key(source: Source) -> str:
    """A hash of a model's configuration and weights."""
    if source.is_scratch:
        return SCRATCH
    digest = hashlib.sha256()
    for path in [source.folder / "config.json", *sorted(source.folder.glob("*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def load_tokenizer(source: Source, texts: Callable[[], list[str]], cache: Path):
    """The tokenizer of a source; for scratch trained on `texts()` once and kept in `cache`."""
    from transformers import AutoTokenizer

    folder = source.folder
    if source.is_scratch:
        folder = cache
        if not (folder / "tokenizer.json").exists():
            _train_tokenizer(texts(), folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(
            MISSING, f"model.name: no tokenizer in {printable(folder, 200)}: {_first_line(error)}"
        ) from None


def _train_tokenizer(texts: list[str], folder: Path) -> None:
    """A Unigram tokenizer (Kudo 2018, arXiv:1804.10959) with XLM-R's special ids."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    characters = len({c for text in texts for c in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=max(SCRATCH_VOCABULARY, 2 * characters),  # training fails if it cannot hold all
        special_tokens=special,
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _settle_scores(tokenizer, texts, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        sep_token="</s>",
        **dict(zip(names, special, strict=True)),
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        fast.save_pretrained(temporary)
        if not folder.exists():
            temporary.rename(folder)
    except OSError as error:
        raise Refusal(CANNOT_WRITE, f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _settle_scores(tokenizer, texts: list[str], special: list[str]) -> None:
    """Give the pieces ids and scores that depend on the texts alone.

    The trainer adds up in the order of a randomly seeded hash table, so its scores differ from run
    to run. Three rounds of Viterbi training (hard EM) from equal scores do not.
    """
    from tokenizers import models

    pieces = sorted(set(tokenizer.get_vocab()) - set(special))
    scores = [-10.0] * len(pieces)  # equal: the fewest pieces win
    for _ in range(3):
        vocabulary = [(word, 0.0) for word in special] + list(zip(pieces, scores, strict=True))
        tokenizer.model = models.Unigram(vocabulary, unk_id=special.index("<unk>"))
        counts = np.zeros(len(vocabulary))
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            np.add.at(counts, encoding.ids, 1)
        used = counts[len(special) :] + 0.1
        scores = np.log(used / used.sum()).tolist()


def template(tokenizer, max_length: int, truncation: str) -> Template:
    """How `tokenizer` dresses one text, read off an example."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    places = [i for i in range(len(dressed)) if bare and dressed[i : i + len(bare)] == bare]
    if not places:
        raise Refusal(MISSING, "model.name: its tokenizer has no token for the letter a")
    start = places[0]
    prefix, suffix = dressed[:start], dressed[start + len(bare) :]
    if max_length <= len(prefix) + len(suffix):
        raise Refusal(BAD_CONFIG, f"data.max_length: {max_length} leaves no room for a token")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Template(prefix, suffix, pad_id, max_length, truncation)


def load_model(
    source: Source, label_names: list[str], tokenizer, *, max_length: int, seed: int
) -> nn.Module:
    """A sequence classifier over `label_names`, fp32, on the CPU, in training mode.

    A new head is drawn from `seed`; an earlier one is kept if it was trained for the same labels.
    Raises Refusal 66 for files that cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would report the new head as a fault
    logging.disable_progress_bar()
    names = {"num_labels": len(label_names), "id2label": dict(enumerate(label_names))}
    names["label2id"] = {name: i for i, name in enumerate(label_names)}
    torch.manual_seed(seed)
    if source.is_scratch:
        config = _scratch_config(len(tokenizer), max_length)
        config.update(names)
        model = AutoModelForSequenceClassification.from_config(config)
        compose(model, tokenizer)
        # Noise as large as the tokens' vectors otherwise; in few texts it matters which words there
        # are, hardly where.
        nn.init.zeros_(model.roberta.embeddings.position_embeddings.weight)
        nn.init.zeros_(model.roberta.embeddings.token_type_embeddings.weight)
        return model.train()
    try:
        config = _load_config(source)
        same_labels = [config.id2label.get(i) for i in range(config.num_labels)] == label_names
        config.update(names)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            source.folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of the head; anything else is refused below
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        folder = printable(source.folder, 200)
        raise Refusal(
            MISSING, f"model.name: {folder} cannot be loaded: {_first_line(error)}"
        ) from None
    _refuse_partial(source, model.base_model_prefix, loading)
    if not same_labels:
        torch.manual_seed(seed)
        for name, module in model.named_children():
            if name != model.base_model_prefix:
                module.apply(_redraw(config.initializer_range))
    return model.train()


def _refuse_partial(source: Source, base: str, loading: dict) -> None:
    """Refusal 66 if a tensor of the encoder is missing or misshapen; poolers may be new."""
    missing = [(name, "lacks") for name in loading["missing_keys"]]
    misshapen = [(entry[0], "has in another shape") for entry in loading["mismatched_keys"]]
    for name, fault in sorted(missing + misshapen):
        if name.startswith(base + ".") and "pooler" not in name:
            where = printable(source.folder, 200)
            raise Refusal(MISSING, f"model.name: {where} {fault} the tensor {printable(name)}")


def _load_config(source: Source):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a config.json of somebody else's can raise anything there
        raise Refusal(
            MISSING, f"model.name: {printable(source.folder, 200)}: {_first_line(error)}"
        ) from None


def _redraw(std: float) -> Callable[[nn.Module], None]:
    """Initialise a linear layer as BERT does: normal weights of deviation `std`, biases zero."""

    def redraw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    return redraw


def check_positions(source: Source, max_length: int) -> None:
    """Refusal 78 if texts of `max_length` tokens are beyond the positions that the model has."""
    if source.is_scratch:
        return
    config = _load_config(source)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return
    if "roberta" in config.model_type or config.model_type in ("camembert", "xmod", "mpnet"):
        positions -= config.pad_token_id + 1  # they count from pad_token_id + 1
    if max_length > positions:
        raise Refusal(
            BAD_CONFIG, f"data.max_length: {max_length} is beyond the model's {positions} positions"
        )


def _scratch_config(vocabulary: int, max_length: int):
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=max_length + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.4,
        attention_probs_dropout_prob=0.1,
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}", 200)
