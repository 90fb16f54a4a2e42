"""The bundled model's vocabulary: special tokens, the words of the templates, the word classes, and codes.

A code is written in pairs of hexadecimal digits without spaces between ("3fa9c1e2", "482915"): a first pair and
continuing pairs are different tokens, as in WordPiece, so that text goes to tokens and back without loss.
"""

from __future__ import annotations

from .words import CLASSES, OTHERS

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
PAIRS = [f"{pair:02x}" for pair in range(256)]
DECIMAL_PAIRS = [pair for pair in PAIRS if pair.isdecimal()]
CONTINUING = "##"


def _words() -> list[str]:
    words = [PAD, BEGIN, END, UNKNOWN, *PAIRS, *(CONTINUING + pair for pair in PAIRS)]
    words += [word for words_of_class in CLASSES.values() for word in words_of_class]
    return words + OTHERS


WORDS = _words()
IDS = {word: index for index, word in enumerate(WORDS)}
# The first and the last token of a class; they stand one after the other.
RANGES = {name: (IDS[members[0]], IDS[members[-1]]) for name, members in CLASSES.items()}


def build_tokenizer(words: list[str] = WORDS, special: tuple[str, ...] = ()):
    """PreTrainedTokenizerFast that gives the tokens of a generated text back exactly, with BOS in front.

    The words in `special` are split off wherever they stand, as <image> must be.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUING))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix=CONTINUING), decoders.Replace(" :", ":")])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False, **({"additional_special_tokens": list(special)} if special else {}),
    )  # fmt: skip
