"""An answer in progress: chooses its tokens, decodes them, and detects its end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from xtuner.generation.detokenize import Detokenizer, StopWords

Choose = Callable[[Sequence[int], Tensor], Tensor]
"""From the ids so far and logits ``[1, V]`` to the next id ``[1]``."""


class TokenScore(NamedTuple):
    """A generated token: its id, its log-probability under the model (before temperature and
    other options), and the most likely tokens with theirs."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Answer:
    """An answer in progress to the prompt of ids `prompt`.

    Args:
        prompt: Token ids, with those of images.
        words: Finds stop words.
        ends: Token ids that end the answer.
        limit: Maximum number of its tokens.
        choose: Selects the next token.
        inputs: Model inputs of a prompt with images; empty otherwise.
        top_logprobs: How many alternatives `scores` keeps of each token; None keeps no scores.
        keep: Special tokens that are part of the text, such as those that mark tool calls.

    Attributes:
        ids: The prompt and the tokens so far, without an end token.
        num_generated: Tokens generated, with an end token.
        finish: '' until the end; then 'stop' or 'length'.
        scores: Scores of the generated tokens, if requested; without an end token.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        tokenizer: Any,
        words: StopWords,
        ends: frozenset[int],
        limit: int,
        choose: Choose,
        inputs: Mapping[str, Any] | None = None,
        top_logprobs: int | None = None,
        keep: Collection[str] = (),
    ) -> None:
        self.ids, self.ends, self.limit = list(prompt), ends, limit
        self.num_prompt, self.num_generated = len(self.ids), 0
        self.inputs = dict(inputs or {})
        self.finish: Literal["", "stop", "length"] = ""
        self.scores: list[TokenScore] = []
        self._choose, self._top = choose, top_logprobs
        self._words, self._detokenizer = words, Detokenizer(tokenizer, keep=keep)

    def take(self, scores: Tensor) -> str:
        """Choose the next token by its logits `scores` ``[1, V]``; return the text to show."""
        token_id = int(self._choose(self.ids, scores))
        self.num_generated += 1
        if token_id in self.ends:
            self.finish = "stop"
            return self._rest()
        self.ids.append(token_id)
        if self._top is not None:
            self.scores.append(_score(token_id, scores[0], self._top))
        piece = self._words.add(self._detokenizer.add(token_id))
        if self._words.found:
            self.finish = "stop"
        elif self.num_generated >= self.limit:
            self.finish = "length"
            piece += self._rest()
        return piece

    def _rest(self) -> str:
        """The text held back; complete characters only."""
        return self._words.add(self._detokenizer.rest()) + self._words.rest()


def _score(token_id: int, logits: Tensor, top: int) -> TokenScore:
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs))) if top else None
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True) if best else ()
    return TokenScore(token_id, float(logprobs[token_id]), tuple(pairs))
