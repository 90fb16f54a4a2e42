"""The sentences that tasks are made of. `{adjective}` is a random word of that class, `{3}` argument 3 of the sentence.

In a question, what stands between square brackets is the answer.
"""

from __future__ import annotations

FILLER = (
    "The {adjective} {noun} {verb} the {noun} .",
    "A {noun} {adverb} {verb} one {adjective} {noun} near the {noun} .",
    "{adverb} , the {noun} of the {adjective} {noun} {verb} every {noun} .",
    "The {noun} and the {noun} are {adjective} .",
    "No {adjective} , {adjective} {noun} {verb} a {noun} {adverb} , but the {noun} is {adjective} .",
    "Some {noun} with a {adjective} {noun} {verb} this {noun} {adverb} .",
)

NUMBER_HEADER = "Remember every magic number in this text ."
NUMBER = "The magic number for {0} {1} is {2} {3} {4} ."
ASK_NUMBER = (
    "Question : What is the magic number for {0} {1} ? Answer : The magic number for {0} {1} is [ {2} {3} {4} ] ."
)
ASK_QUERIES = (
    "Question : What are the magic numbers for {0} {1} , {5} {6} , {10} {11} and {15} {16} ? Answer : "
    "The magic number for {0} {1} is [ {2} {3} {4} , for {5} {6} is {7} {8} {9} , for {10} {11} is {12} {13} {14} , "
    "for {15} {16} is {17} {18} {19} ] ."
)
# The key stands before every value, so that each is found like a single one; what is new is to leave out those given.
ASK_VALUES = (
    "Question : What are the four magic numbers for {0} {1} ? Answer : "
    "The magic number for {0} {1} is [ {2} {3} {4} , for {0} {1} is {5} {6} {7} , for {0} {1} is {8} {9} {10} , "
    "for {0} {1} is {11} {12} {13} ] ."
)

STORE_HEADER = "Remember where every value in this text is stored and copied ."
STORE = "The value {0} {1} {2} is stored in {3} ."
COPY = "The value in {0} is copied to {1} ."
# By number of copies; the names follow one another in the chain.
ASK_CHAIN = {
    copies: "Question : Where is the value {0} {1} {2} found ? Answer : The value {0} {1} {2} is stored in [ {3}"
    + "".join(f" , copied to {{{4 + copy}}}" for copy in range(copies))
    + " ] ."
    for copies in (1, 2, 3, 4)
}

RECORD_HEADER = "Remember what every record in this text holds ."
RECORD = "Record {0} {1} {2} {3} holds {4} {5} {6} {7} ."
ASK_RECORD = (
    "Question : What does record {0} {1} {2} {3} hold ? Answer : Record {0} {1} {2} {3} holds [ {4} {5} {6} {7} ] ."
)

WORDS_HEADER = "Remember how often every word in this text occurs ."
ASK_WORDS = (
    "Question : What are the three most frequent words ? "
    "Answer : The three most frequent words are [ {0} , {1} , {2} ] ."
)

ALL_TEXTS = (
    *FILLER, NUMBER_HEADER, NUMBER, ASK_NUMBER, ASK_QUERIES, ASK_VALUES, STORE_HEADER, STORE, COPY,
    *ASK_CHAIN.values(), RECORD_HEADER, RECORD, ASK_RECORD, WORDS_HEADER, ASK_WORDS,
)  # fmt: skip


def words(text: str) -> list[str]:
    """The words and slots of a template, without the brackets around the answer."""
    return [word for word in text.split() if word not in "[]"]


def answer(text: str) -> slice | None:
    """Where among `words` the answer stands, or None where there is none."""
    parts = text.split()
    return slice(parts.index("["), parts.index("]") - 1) if "[" in parts else None
