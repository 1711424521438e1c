"""The classifier and its tokenizer: from a folder, the cache, the hub, or from scratch."""

import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from batches import Template
from errors import BAD_CONFIG, MISSING, Refusal, printable
from files import building, open_regular, read_bytes, sweep_builders, writing
from subwords import compose

SCRATCH = "scratch"
SCRATCH_VOCABULARY = 16_000  # large: most words are one piece, and its n-grams overlap
HUB_TIMEOUT_S = 10
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]  # what a classifier is loaded from
# Bytes of a file of a model's folder that is opened, by name or else by suffix.
LIMITS = {"tokenizer.json": 512 << 20, "vocab.json": 512 << 20, ".model": 512 << 20}
LIMITS |= {".txt": 512 << 20, ".json": 16 << 20, ".jinja": 16 << 20, ".safetensors": math.inf}
MAX_COUNT = 10_000  # of layers, labels and so on: a configuration would make a list of a trillion
# Of a configuration's settings, those that change what a model returns but not what it computes.
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
OUTPUTS |= {"chunk_size_feed_forward": 0}
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
            f"cannot be reached ({printable(reason, 300)}); put its files into a folder and name "
            "it, or set HF_HOME to a cache that has it",
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
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it would quote the folder's files, unescaped
    if name == SCRATCH:
        return Source(name, None)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return _folder_source(name, folder)
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name) or ".." in name:
        raise Refusal(MISSING, f"model.name: no folder '{printable(name)}', and no hub name either")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    refused = None
    try:
        cached = snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)
        return _folder_source(name, Path(cached))
    except HFValidationError:
        raise Refusal(MISSING, f"model.name: no folder '{name}', and no hub name either") from None
    except Refusal as error:
        refused = error  # in the cache only in part, or never to be used
    except (LocalEntryNotFoundError, OSError):
        pass
    _ask_hub(name, f"; the cache has it, but: {refused.message}" if refused else "")
    try:
        fetched = snapshot_download(name, allow_patterns=HUB_FILES)
    except Exception as error:  # of whichever library fetches
        raise Refusal(
            MISSING, f"model.name: fetching '{name}' failed: {printable(_one_line(error))}"
        ) from None
    return _folder_source(name, Path(fetched))


def _ask_hub(name: str, cached: str) -> None:
    """One request whether the hub has `name`, without retries; cached: what the cache has of it."""
    from huggingface_hub import get_token

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise HubUnreachable(name, f"HF_HUB_OFFLINE is set{cached}")
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
        raise HubUnreachable(name, f"HTTP {error.code}{cached}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HubUnreachable(name, f"{getattr(error, 'reason', error)}{cached}") from None


def _folder_source(name: str, folder: Path) -> Source:
    _refuse_odd_files(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file():
        best = folder / "best"
        hint = f"; did you mean {printable(best, 200)}?" if best.is_dir() else ""
        _refuse(folder, f"has no config.json{hint}")
    if not weights:
        _refuse(folder, "has no .safetensors file; pickled weights (.bin) are not loaded")
    config = _read_object(folder / "config.json")
    for key in ("transformers_weights", "quantization_config"):  # files elsewhere, other packages
        if config.get(key):
            _refuse(folder / "config.json", f"{key} is not supported")
    for path in folder.glob("*.safetensors.index.json"):
        shards = _read_object(path).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if shard not in [weight.name for weight in weights]:
                _refuse(path, f"names '{printable(shard)}', no .safetensors file of this folder")
    return Source(name, folder)


def _refuse(path: Path, reason: str) -> NoReturn:
    raise Refusal(MISSING, f"model.name: {printable(path, 200)}: {reason}") from None


def _refuse_odd_files(folder: Path) -> None:
    """Refusal 66 for what would be waited for, or not fit the memory, when the folder is loaded."""
    path = folder
    try:
        for path in sorted(folder.iterdir()):
            limit = LIMITS.get(path.name, LIMITS.get(path.suffix))
            if limit is not None:
                with open_regular(path) as file:
                    size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise OSError(errno.EFBIG, f"has {size:,} bytes; expected at most {limit:,}")
    except OSError as error:
        _refuse(path, error.strerror)


def _read_object(path: Path) -> dict:
    """The object in a JSON file of a model; Refusal 66 if it is none, or counts beyond reason."""

    def check(found: dict) -> dict:
        for key, value in found.items():
            number = value if type(value) in (int, float) else 0
            least = 1 if key == "num_hidden_layers" else -math.inf
            if ("layer" in key or "num_" in key) and not least <= number <= MAX_COUNT:
                raise ValueError(f"{key}: {value} is no count up to {MAX_COUNT:,}")
            if "dropout" in key and not 0 <= number <= 0.99:
                raise ValueError(f"{key}: {value} is not at least 0 and at most 0.99")
        return found

    try:
        found = json.loads(read_bytes(path, LIMITS[".json"]).decode(), object_hook=check)
        if not isinstance(found, dict):
            raise ValueError("expected an object in braces")
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, printable(error, 200))
    return found


def weights_key(source: Source) -> str:
    """A hash of a model's configuration and weights."""
    if source.is_scratch:
        return SCRATCH
    digest = hashlib.sha256()
    try:
        for path in [source.folder / "config.json", *sorted(source.folder.glob("*.safetensors"))]:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        _refuse(source.folder, f"cannot be read: {error.strerror}")
    return digest.hexdigest()[:24]


def load_tokenizer(source: Source, texts: Callable[[], list[str]], cache: Path):
    """The tokenizer of a source; for scratch trained on `texts()` once and kept in `cache`."""
    if not source.is_scratch:
        return _read_tokenizer(source.folder)
    sweep_builders(cache.parent)
    with contextlib.suppress(Refusal):  # there is none yet, or it is damaged
        return _read_tokenizer(cache)
    _train_tokenizer(texts(), cache)
    return _read_tokenizer(cache)


def _read_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    _refuse_odd_files(folder)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        tokenizer("a")
        tokenizer.chat_template = None  # it would be saved under names of its own, "../x" too
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust part raises just Exception, or panics with less
        _refuse(folder, f"no tokenizer: {_one_line(error)}")


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
    with writing(folder, Exception), building(folder) as new:  # the Rust part raises just that
        fast.save_pretrained(new)


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


def load_trained(source: Source, tokenizer) -> nn.Module:
    """The sequence classifier as its files have it, fp32, on the CPU, in training mode.

    Raises Refusal 66 for files that cannot be loaded, lack a tensor, be it of the head, or are of a
    model that does not choose one of several labels. These are in its config.id2label.
    """
    config = _load_config(source)
    names = [config.id2label.get(i) for i in range(config.num_labels)]
    if len(names) < 2 or config.problem_type not in (None, "single_label_classification"):
        _refuse(source.folder, "does not choose one of several labels")
    if len({name for name in names if isinstance(name, str)}) < len(names):
        _refuse(source.folder, "its id2label does not give each label a name of its own")
    return load_model(source, names, tokenizer, max_length=0, seed=0, is_trained=True)


def load_model(
    source: Source,
    label_names: list[str],
    tokenizer,
    *,
    max_length: int,
    seed: int,
    is_trained: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """A sequence classifier over `label_names`, fp32, on the CPU, in training mode.

    A new head is drawn from `seed`; an earlier one is kept if it was trained for the same labels,
    and what became of it is said. `is_trained`: nothing may be drawn. Raises Refusal 66 for files
    that cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = {"num_labels": len(label_names), "id2label": dict(enumerate(label_names))}
    names["label2id"] = {name: i for i, name in enumerate(label_names)}
    torch.manual_seed(seed)
    if source.is_scratch:
        return _new_model(tokenizer, max_length, names)
    try:
        config = _load_config(source)
        same_labels = [config.id2label.get(i) for i in range(config.num_labels)] == label_names
        config.update(names | OUTPUTS)
        with _bounded(source):
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
        _refuse_partial(source, model.base_model_prefix, loading, is_trained=is_trained)
        if same_labels and not loading["missing_keys"] and not loading["mismatched_keys"]:
            say("  its head is kept, as it was trained for the same labels")
        elif not same_labels and not loading["missing_keys"]:
            say("  its head is drawn anew, as it was trained for other labels")
        if not same_labels:
            torch.manual_seed(seed)
            for name, module in model.named_children():
                if name != model.base_model_prefix:
                    redraw(module, config.initializer_range)
        _try(model, tokenizer, is_padded=not is_trained)
        return model.train()
    except Refusal:
        raise
    except Exception as error:  # what the files of somebody else's folder can raise there
        _refuse(source.folder, f"cannot be loaded: {_one_line(error)}")


def _new_model(tokenizer, max_length: int, names: dict[str, object]) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    config = _scratch_config(len(tokenizer), max_length)
    config.update(names)
    model = AutoModelForSequenceClassification.from_config(config)
    compose(model, tokenizer)
    # Noise as large as the tokens' vectors otherwise; in few texts it matters which words there
    # are, hardly where.
    nn.init.zeros_(model.roberta.embeddings.position_embeddings.weight)
    nn.init.zeros_(model.roberta.embeddings.token_type_embeddings.weight)
    return model.train()


@contextlib.contextmanager
def _bounded(source: Source) -> Iterator[None]:
    """Within, ValueError once a model under construction has far more parameters than the weights.

    It is built without memory at first; what the weights lack of it would then be given some.
    """
    left = (1 << 24) + sum(p.stat().st_size for p in source.folder.glob("*.safetensors"))

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is not None and parameter.is_meta:
            left -= parameter.numel() + 10_000  # many small ones take their time
        if left < 0:
            raise ValueError("its config.json asks for many more parameters than its weights have")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _try(model: nn.Module, tokenizer, *, is_padded: bool) -> None:
    """Any exception if the model cannot take what the tokenizer makes of texts.

    `is_padded`: nor if padding alters what it computes, as with decoders of another padding token.
    """
    ids, table = tokenizer("a")["input_ids"], model.get_input_embeddings()
    last = max(*ids, *tokenizer.get_vocab().values())
    if isinstance(table, nn.Embedding) and last >= table.num_embeddings:
        raise ValueError(f"the tokenizer has ids up to {last}, the weights {len(table.weight)}")
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        if not logits.isfinite().all():
            raise ValueError("what it computes is not finite")
        if is_padded:
            pad_id = tokenizer.pad_token_id or 0
            padded = {"input_ids": F.pad(inputs["input_ids"], (0, 3), value=pad_id)}
            padded["attention_mask"] = F.pad(inputs["attention_mask"], (0, 3))
            if (model(**padded).logits - logits).abs().max() > 1e-3 * max(1, logits.abs().max()):
                raise ValueError("padding alters what it computes: does it pad with another token?")


def _refuse_partial(source: Source, base: str, loading: dict, *, is_trained: bool) -> None:
    """Refusal 66 if a tensor of the encoder is missing or misshapen; poolers may be new.

    `is_trained`: neither they nor the head may.
    """
    missing = [(name, "lacks") for name in loading["missing_keys"]]
    misshapen = [(entry[0], "has in another shape") for entry in loading["mismatched_keys"]]
    for name, fault in sorted(missing + misshapen):
        is_head = not name.startswith(base + ".") or "pooler" in name
        if is_head and is_trained:
            _refuse(source.folder, f"no trained classification head: {fault} {printable(name)}")
        if not is_head:
            _refuse(source.folder, f"{fault} the tensor {printable(name)}")


def _load_config(source: Source):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a config.json of somebody else's can raise anything there
        _refuse(source.folder, _one_line(error))


def redraw(module: nn.Module, std: float) -> None:
    """Draw linear layers anew as BERT does: normal weights of deviation `std`, biases zero."""
    for layer in (m for m in module.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_positions(source: Source, max_length: int) -> None:
    """Refusal 78 if texts of `max_length` tokens are beyond the positions that the model has."""
    if source.is_scratch:
        return
    positions = positions_of(_load_config(source))
    if positions and positions < max_length:
        raise Refusal(
            BAD_CONFIG, f"data.max_length: {max_length} is beyond the model's {positions} positions"
        )


def positions_of(config) -> int | None:
    """The longest text in tokens that a model has positions for; None where it does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    if "roberta" in config.model_type or config.model_type in ("camembert", "xmod", "mpnet"):
        positions -= (config.pad_token_id or 0) + 1  # they count from pad_token_id + 1
    return positions if positions > 0 else None


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


def _one_line(error: Exception) -> str:
    reason = " ".join(str(error).split()) or "no reason given"
    return printable(f"{type(error).__name__}: {reason}", 200)
