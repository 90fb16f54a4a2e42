"""Load a Hugging Face causal language model, or say in one sentence why it cannot be.

loaded = load_model("path/or/hub-id", device=resolve_device("auto"), dtype="auto")
loaded.model, loaded.tokenizer, loaded.identity
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from bsfa_kernels import words
from bsfa_kernels.integrations.visual_tokens import visual_ids

from ..environment import resolve_device
from ..errors import BsfaError, InputError, MachineError, UsageError, memory_wanted, said
from ..imports import importing
from . import gguf
from .bundled import find_bundled
from .processor import read_processor
from .random_weights import LABEL_KEY

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.spm")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, and what tells it apart.

    `identity`, JSON values only: id, revision (None where unknown), and the fields of
    `bsfa_kernels.integrations.transformers.model_identity` (architecture, layers, heads, head dim, scale, rope, config
    hash, weights). `label` is a warning to repeat beside every result, or None. `processor` makes a vision-language
    model's inputs of images and text; None for any other model, and where there is none, for the reason `no_processor`.
    """

    model: Any
    tokenizer: Any
    identity: dict[str, Any]
    label: str | None = None
    processor: Any = None
    no_processor: str | None = None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """ "auto" is the checkpoint's own dtype ("auto" again) on a GPU and float32 on a CPU. Raises UsageError."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise UsageError(f"--dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


@contextmanager
def explain_memory(option_to_lower: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or in the host, into a MachineError that says which option to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"out of GPU memory{memory_wanted(error)}; lower {option_to_lower}") from error
    except MemoryError as error:
        raise MachineError(f"out of memory; lower {option_to_lower}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MachineError(f"out of memory{memory_wanted(error)}; lower {option_to_lower}") from error


def load_model(
    name_or_path: str | os.PathLike | None,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | dict[str, str] = "bsfa",
    check_config: Callable[[Any], None] = lambda config: None,
) -> LoadedModel:
    """The model of a directory, GGUF file or Hub id, in eval mode on `device`, or a bundled one (`find_bundled`).

    `device` and `dtype` are names for `resolve_device` and `resolve_dtype` or what these return. `check_config` may
    refuse the model by its configuration, before its weights are read. Raises InputError for a directory,
    configuration, tokenizer or weights that cannot be used, MachineError where memory, a GPU or the network is missing.
    """
    with importing():
        from bsfa_kernels.integrations.transformers import DenseFallback

    # The commands say which modules run dense, from `attention_modules` and `notes`.
    warnings.filterwarnings("ignore", category=DenseFallback)
    device = resolve_device(device) if isinstance(device, str) else device
    dtype = resolve_dtype(dtype, device) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    source, name, prepare = _locate(name_or_path)
    with quiet():
        with importing():
            config = _read_config(source)
            prepare(config)
            check_config(config)
            tokenizer = _read_tokenizer(source)
            processor, no_processor = _find_processor(source, config)
        with explain_memory("--dtype (bfloat16 halves float32), or take a smaller model"):
            model = _read_weights(source, config, dtype, attn_implementation)
            if gguf.is_gguf(source) and hasattr(model.config, "quantization_config"):
                del model.config.quantization_config  # its weights are plain numbers now, as any checkpoint's
            _check_causal(source, model)
            model = model.to(device).eval()
            _check_finite(source, model)  # on its device: a GPU is where that takes least
    identity = _identity(model, name, getattr(config, "_commit_hash", None))
    return LoadedModel(model, tokenizer, identity, getattr(config, LABEL_KEY, None), processor, no_processor)


def load_empty(name_or_path: str | os.PathLike) -> tuple[Any, str, str | None]:
    """(model on the meta device, id, revision): its configuration and modules, but no weights. Errors as `load_model`,
    which this needs neither the tokenizer nor the memory of.
    """
    from bsfa_kernels.integrations.transformers import DenseFallback

    # The commands say which modules run dense, from `attention_modules` and `notes`.
    warnings.filterwarnings("ignore", category=DenseFallback)
    source, name, prepare = _locate(name_or_path)
    with quiet(), torch.device("meta"):
        config = _read_config(source)
        prepare(config)
        try:
            model = _auto_class(config).from_config(config, attn_implementation="bsfa")
        except Exception as error:
            raise _explain(source, "configuration", error) from error
        _check_causal(source, model)
    return model, name, getattr(config, "_commit_hash", None)


def check_model(name_or_path: str | os.PathLike | None) -> None:
    """Raise InputError for what is no directory, file or name of a model, without a look into it or at the Hub."""
    _locate(name_or_path)


def check_positions(config, length: int | None, flag: str) -> None:
    """Raise UsageError, naming `flag`, when `length` tokens are more than the model has positions for."""
    from bsfa_kernels.integrations.modules import most_positions

    most = most_positions(config)
    if most is not None and length is not None and length > most:
        raise UsageError(f"{flag} {length} is past the model's {most} positions (max_position_embeddings)")


def _locate(name_or_path: str | os.PathLike | None) -> tuple[str, str, Callable[[Any], None]]:
    """(directory, file or Hub id; what the model is called; what its name changes in its configuration)."""
    bundled = find_bundled(name_or_path)
    if bundled:
        return str(bundled.folder), bundled.name, bundled.prepare
    source = _source(os.fspath(name_or_path))
    return source, _name(source), lambda config: None


def _source(name: str) -> str:
    """The directory, with `~` expanded, or the Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"model directory {path} is empty")
        if not (path / "config.json").is_file():
            raise InputError(f"model directory {path} has no config.json; expected a Hugging Face checkpoint")
        return str(path)
    if gguf.is_gguf(path) and path.exists():
        gguf.check(path)
        return str(path)
    if path.exists():
        raise InputError(f"model {path} is a file; expected a directory with a Hugging Face checkpoint or a Hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name):
        raise InputError(f"model directory {path} does not exist")
    return name


def _name(source: str) -> str:
    """What a model is called: its folder or file, or its Hub id."""
    return Path(source).resolve().name if os.path.exists(source) else source


def _pretrained(source: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` of transformers takes for `source`."""
    if not os.path.isfile(source):
        return source, {}
    folder, name = os.path.split(source)
    return folder or ".", {"gguf_file": name}


def _read_config(source: str):
    from transformers import AutoConfig

    if os.path.isdir(source):
        try:
            content = json.loads((Path(source) / "config.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}/config.json is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{source}/config.json must hold a JSON object, got {words.kind(content)}")
    try:
        place, options = _pretrained(source)
        config = AutoConfig.from_pretrained(place, **options)
    except Exception as error:
        raise _explain(source, "configuration", error) from error
    architecture = (config.architectures or [None])[0]
    kind = f"architecture {architecture}" if architecture else f"model type {config.model_type}"
    if config.is_encoder_decoder:
        raise InputError(f"model {source} is an encoder-decoder ({kind}); bsfa needs a causal language model")
    if _auto_class(config) is None:
        raise InputError(
            f"model {source} is no causal language model ({kind}); bsfa needs one with a language-model head, and no "
            "encoder"
        )
    return config


def _auto_class(config):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    architecture = (config.architectures or [None])[0]
    for names, auto_class in (
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),
    ):
        found = names.get(config.model_type)
        found = found if isinstance(found, list | tuple) else [found]
        if architecture in found if architecture else found != [None]:
            return auto_class
    return None


def _read_tokenizer(source: str):
    from transformers import AutoTokenizer

    if os.path.isdir(source) and not any(next(Path(source).glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise InputError(f"model directory {source} has no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    try:
        place, options = _pretrained(source)
        return AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise _explain(source, "tokenizer", error) from error


def _find_processor(source: str, config) -> tuple[Any, str | None]:
    """(processor, None) of a vision-language model, (None, why there is none), or (None, None) for any other."""
    if getattr(config, "vision_config", None) is None or not visual_ids(config):
        return None, None
    try:
        return read_processor(source, config), None
    except Exception as error:  # noqa: BLE001 - the model is of use for text all the same
        return None, f"the processor of model {source} cannot be read: {_sentence(error)}"


def _read_weights(source: str, config, dtype, attn_implementation):
    place, options = _pretrained(source)
    try:
        model, info = _auto_class(config).from_pretrained(
            place, **options, config=config, dtype=dtype, attn_implementation=attn_implementation,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        raise _explain(source, "weights", error) from error
    for name, found, expected in sorted(info["mismatched_keys"])[:1]:
        raise InputError(
            f"the weights of model {source} do not fit its config.json: {name} is {list(found)}, "
            f"expected {list(expected)}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"model {source} lacks {len(missing)} weights, among them {missing[0]}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise InputError(
            f"the weights of model {source} do not fit its config.json: {len(unexpected)} have no place in it, among "
            f"them {unexpected[0]} (fewer layers, or another architecture, than the weights were made for?)"
        )
    return model


def _check_finite(source: str, model) -> None:
    """Raise InputError, naming the parameter, for weights that are NaN or infinite."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel() or _is_finite(parameter):
            continue
        count = int((~parameter.isfinite()).sum())
        if count:
            narrow = parameter.dtype == torch.float16 and not parameter.isnan().any()
            raise InputError(
                f"the weights of model {source} are not finite: {name} holds {count:,} values that are NaN or infinite"
                + (" in float16; try --dtype bfloat16" if narrow else "; the checkpoint is damaged")
            )


@torch.no_grad()
def _is_finite(x: torch.Tensor) -> bool:
    """By one pass that needs no mask of its size. Both extremes are NaN where one value is."""
    if x.dtype in DTYPES.values():
        return bool(torch.stack(x.aminmax()).isfinite().all())
    return bool(x.sum(dtype=torch.float64).isfinite())  # a false alarm is settled by the caller's count


def _check_causal(source: str, model) -> None:
    from bsfa_kernels.integrations.transformers import attention_modules

    modules = attention_modules(model)
    if not modules:
        raise InputError(
            f"model {source} ({type(model).__name__}) does not attend through transformers' AttentionInterface, "
            "which bsfa needs"
        )
    if not any(module.causal for module in modules.values()):
        raise InputError(f"model {source} ({type(model).__name__}) is encoder-only: none of its attention is causal")


def _explain(source: str, part: str, error: Exception) -> BsfaError:
    """The failure to read `part` as one sentence of the right class."""
    if isinstance(error, BsfaError):
        return error
    causes = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 8:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    names = {type(cause).__name__ for cause in causes}
    if not os.path.exists(source):
        if names & {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"}:
            return InputError(
                f"model {source} is neither a directory nor a repository on the Hugging Face Hub that you can read"
            )
        if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectTimeout"} or any(
            isinstance(cause, ConnectionError) for cause in causes
        ):
            return MachineError(
                f"model {source} is neither a directory nor in the local Hugging Face cache, and the Hub cannot be "
                "reached from here"
            )
    return InputError(f"cannot read the {part} of model {source}: {_sentence(error)}")


def _sentence(error: BaseException) -> str:
    sentence = re.sub(r"\s+", " ", said(error)).split(". ")[0].rstrip(". ")
    return sentence if len(sentence) <= 300 else sentence[:297] + "..."


def _identity(model, name: str, revision: str | None) -> dict[str, Any]:
    from bsfa_kernels.integrations.transformers import model_identity

    return {"id": name, "revision": revision, **model_identity(model)}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own progress bars and warnings off: what matters of them is raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # the bar of GGUF files knows no verbosity
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
