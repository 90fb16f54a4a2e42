"""Ask a model questions and score its answers.

    examiner = Examiner(model, tokenizer)
    with attach(model, handlers):
        score = examiner.ask(question)                        # Score(exact, share)
    answers = examine(examiner, {"dense": handlers, "mine": others}, questions)  # {"dense": [Answer, ...], ...}

A TokenQuestion is teacher-forced: document, question and right answer in one prefill, and exact where the model
predicts every token of the answer. Its answer is read through sparse attention too. A TextQuestion is answered by
greedy generation, as RULER does it: a sparse prefill, then decode steps, which run dense; exact where the answer
contains all outputs (or any, for match "part"). A LikelihoodQuestion is judged by the log-probabilities of its
choices, each read behind the text in a prefill of its own: exact where the right one's is the highest, its share the
probability of the right one among them; a cloze is exact where every token of its answer is the likeliest. An
ImageQuestion is judged so too; its share is the credit of the chosen candidate (VQA's accuracy, or right or wrong),
and it is exact where that is more than half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from bsfa_kernels.integrations.dense import DenseAttention
from bsfa_kernels.integrations.plan import INSTEAD
from bsfa_kernels.integrations.transformers import Handler, attach, attention_modules, notes

from ..data.image_questions import ImageQuestion
from ..data.likelihood import LikelihoodQuestion
from ..data.multimodal.scoring import followed
from ..data.questions import TextQuestion, TokenQuestion
from ..metrics.logits import Head
from ..models.prompts import Prompt
from ..prefill_tiles import Attending

T = TypeVar("T")
TEACHER_FORCED, GENERATED, LIKELIHOOD = "teacher-forced", "generated", "by likelihood"
Question = TokenQuestion | TextQuestion | LikelihoodQuestion | ImageQuestion


@dataclass(frozen=True)
class Score:
    """`exact`: nothing of the answer is wrong. `share`: of answer tokens, or of the outputs, that are right."""

    exact: bool
    share: float


@dataclass(frozen=True)
class Answer:
    """A contender's score, and the tiles that the whole model kept of those that gates might have dropped (0 of 0: not
    counted).
    """

    question: Question
    score: Score
    kept: int = 0
    candidates: int = 0


def mode(question: Question) -> str:
    """How `Examiner` asks it; belongs beside every result."""
    if isinstance(question, LikelihoodQuestion | ImageQuestion):
        return LIKELIHOOD
    return TEACHER_FORCED if isinstance(question, TokenQuestion) else GENERATED


class Examiner:
    """Asks a model in eval mode; whatever attention it runs at the time of the question is what is examined.

    Raises InputError, as `Head`, for a model whose logits are computed in a way that is not known.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._head = Head(model)
        self._last: tuple[Question | None, object] = None, None

    @torch.no_grad()
    def ask(self, question: Question) -> Score:
        if isinstance(question, TokenQuestion):
            return self._force(question)
        if isinstance(question, LikelihoodQuestion):
            return self._weigh(question)
        if isinstance(question, ImageQuestion):
            return self._look(question)
        return match(self.generate(question), question)

    def _force(self, question: TokenQuestion) -> Score:
        batch = question.batch
        hidden = self._head.hidden(self._once(question, lambda: Prompt.of(question, self.model)))
        logits = self._head.logits(hidden[batch.predicting])
        right = batch.right(logits.argmax(-1)[None].cpu())
        return Score(bool(right.all()), float(right.double().mean()))

    def _once(self, question: Question, make: Callable[[], T]) -> T:
        """What `make` gives, kept until another question comes: contenders are asked the same in turn, and two hundred
        frames take as long to reach a GPU as a small model to look at them.
        """
        if self._last[0] is not question:
            self._last = question, make()
        return self._last[1]

    def _weigh(self, question: LikelihoodQuestion) -> Score:
        totals = []
        for choice in question.choices:
            tokens, count = question.encoded(self.tokenizer, choice)
            hidden = self._head.hidden(torch.tensor(tokens, device=self.model.device))
            log_p = self._head.logits(hidden[-count - 1 : -1]).log_softmax(-1)
            targets = torch.tensor(tokens[-count:], device=log_p.device)
            if len(question.choices) == 1:
                right = log_p.argmax(-1) == targets
                return Score(bool(right.all()), float(right.double().mean()))
            totals.append(_sum_at(log_p, targets))
        shares = torch.stack(totals).softmax(0)
        return Score(int(shares.argmax()) == question.answer, float(shares[question.answer]))

    def _look(self, question: ImageQuestion) -> Score:
        asked = self._once(question, question.asked)
        lengths = [len(tokens) for tokens in asked.continuations]
        totals = []
        last = None  # log-probabilities behind the prompt, all that candidates of one token need
        for tokens in asked.continuations:
            if len(tokens) > 1 or last is None:
                hidden = self._head.hidden(Prompt.of(followed(asked.prompt, tokens[:-1]), self.model))
                log_p = self._head.logits(hidden[-len(tokens) :]).log_softmax(-1)
                last = log_p[:1]
            else:
                log_p = last
            totals.append(float(_sum_at(log_p, torch.tensor(tokens, device=log_p.device))))
        chosen = question.weigh(totals, lengths)
        return Score(chosen.credit > 0.5, chosen.credit)

    @torch.no_grad()
    def generate(self, question: TextQuestion) -> str:
        """The model's greedy answer."""
        tokens = self.tokenizer(question.text, return_tensors="pt", verbose=False).input_ids.to(self.model.device)
        end = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        output = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=question.new_tokens, do_sample=False,
            pad_token_id=end,
        )  # fmt: skip
        return self.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def _sum_at(log_p: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64, of log_p [T, vocabulary] at targets [T]."""
    return log_p.gather(1, targets[:, None]).sum(dtype=torch.float64)


def match(answer: str, question: TextQuestion) -> Score:
    """RULER's string match, blind to case."""
    found = [output.lower() in answer.lower() for output in question.outputs]
    if question.match == "part":
        return Score(any(found), float(any(found)))
    return Score(all(found), sum(found) / len(found))


def dense_handlers(model) -> dict[str, Handler]:
    """PyTorch's attention in every module that could skip tiles: what sparse answers are compared with."""
    able = [path for path, module in attention_modules(model).items() if module.dense_reason is None]
    return dict.fromkeys(able, DenseAttention())


def exact_instead(model) -> list[str]:
    """Why modules of `model` ran exact scores so far although others were asked for; whoever reports of scores that are
    not exact has to look here.
    """
    return sorted({note.reason for note in notes(model) if note.reason.startswith(INSTEAD)})


def examine(
    examiner: Examiner,
    contenders: Mapping[str, Mapping[str, Handler]],
    questions: Iterable[Question],
    step: Callable[[], None] = lambda: None,
) -> dict[str, list[Answer]]:
    """Every question to every contender {name: {module path: handler}} in turn; `step` is called after each answer.

    Handlers with `counts`, as `SparseAttention` with count=True, have them read and reset.
    """
    answers: dict[str, list[Answer]] = {name: [] for name in contenders}
    for question in questions:
        for name, handlers in contenders.items():
            with attach(examiner.model, handlers), Attending(examiner.model) as attending:
                score = examiner.ask(question)
            answers[name].append(Answer(question, score, *attending.read_counts(handlers)))
            step()
    return answers
