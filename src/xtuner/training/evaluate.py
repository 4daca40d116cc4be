"""Evaluation during a run: the validation loss and the sample answers.

Both are collective. The validation split is distributed over the data ranks and summed once.
Questions are distributed if every process holds the entire model; if weights are sharded, all
processes answer all questions together, with the token ids of rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.data.loader import Collate
from xtuner.data.packing.pack import PackedDataset
from xtuner.engine.checked_loss import checked_count, checked_loss
from xtuner.engine.hooks.base import Question
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.errors import DataError, XTunerError
from xtuner.generation.batch import continue_prompts, generate_batch
from xtuner.generation.generate import GenerationOptions, stream
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.parallel.processes import Processes
from xtuner.templates.base import Template
from xtuner.training.vision import RunVision
from xtuner.types import Algorithm, Batch, Message


@dataclass(frozen=True)
class Validation:
    """The mean loss on the validation split.

    Attributes:
        strategy: Holds the model.
        dataset: The validation split.
        algorithm: Computes summed losses and their divisor.
        collate: Collates samples to a batch.
    """

    strategy: BaseStrategy
    dataset: PackedDataset
    algorithm: Algorithm
    collate: Collate

    def measure(self) -> float:
        """Measure the validation loss; a collective call.

        Raises:
            DataError: A row can no longer be read, on any process.
        """
        processes, model = self.strategy.processes, self.strategy.model
        total = count = 0.0
        fault: DataError | None = None
        model.eval()
        for index, counts in self._share():
            batch, fault = self._read(index)
            if self._stops(fault):
                break
            assert batch is not None
            with torch.no_grad():
                loss = checked_loss(self.algorithm, model, batch.to(processes.device)).loss
            if counts:
                total, count = total + float(loss), count + checked_count(self.algorithm, batch)
        model.train()
        total, count = processes.of_rows([total, count])
        total, count, faults = processes.sum([total, count, float(fault is not None)])
        if faults:
            messages = processes.gather([str(fault)] if fault else [])
            raise DataError("; ".join(dict.fromkeys(messages))) from fault
        return total / (count or 1.0)

    def _read(self, index: int) -> tuple[Batch | None, DataError | None]:
        try:
            return self.collate(self.dataset[index]), None
        except DataError as error:
            return None, error

    def _stops(self, fault: DataError | None) -> bool:
        """Whether this process stops reading; a joint decision if forward passes are collective."""
        if not self._in_step():
            return fault is not None
        return bool(self.strategy.processes.sum([float(fault is not None)])[0])

    def _in_step(self) -> bool:
        """Whether a forward pass needs other processes."""
        return self.strategy.sharded or self.strategy.processes.sequence is not None

    def _share(self) -> list[tuple[int, bool]]:
        """The packs of this process, and whether each counts. If all processes must make the same
        number of forward passes, the first pack is repeated as padding."""
        processes, packs = self.strategy.processes, len(self.dataset)
        own = list(range(processes.data_rank, packs, processes.data_world_size))
        missing = -(-packs // processes.data_world_size) - len(own)
        filler = [(0, False)] * missing if self._in_step() else []
        return [*((index, True) for index in own), *filler]


@dataclass(frozen=True)
class SampleAnswers:
    """Generates the model's sample answers during training.

    Attributes:
        settings: The run's settings.
        model: The model in training; generation uses it without the wrapper for packed rows.
        tokenizer, template: The run's tokenizer and template.
        processes: The process group.
        sharded: All processes must make the same forward passes.
        vision: Adds images; None if the model takes none.
        entrance: The strategy's module if weights are sharded, otherwise None.
    """

    settings: Settings
    model: PackedCausalLM
    tokenizer: Any
    template: Template
    processes: Processes
    sharded: bool = False
    vision: RunVision | None = None
    entrance: Any = None

    def answer(self, question: str, *images: str) -> str:
        """The answer to one question; a collective call only if weights are sharded."""
        with self._autocast():
            pieces = stream(
                self.model.model,
                self.tokenizer,
                template=self.template,
                messages=self._messages(question, images),
                options=self._options(),
                vision=self.vision.image_input if self.vision else None,
                agree=self._agree(),
                within=self._within(),
            )
            return "".join(pieces)

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The answers to all questions, in order, on every process; a collective call.

        Raises:
            XTunerError: A question cannot be answered, on any process.
        """
        if self.sharded or self.processes.world_size == 1:
            return self._answers(questions)
        rank, world_size = self.processes.rank, self.processes.world_size
        fault: XTunerError | None = None
        try:
            share = self._answers(questions[rank::world_size])
            own = [(rank + world_size * index, text) for index, text in enumerate(share)]
        except XTunerError as error:
            fault = error
            own = [(-1, str(error))]
        found = sorted(self.processes.gather(own))
        if failed := [text for index, text in found if index < 0]:
            raise fault or DataError("; ".join(failed))
        return [text for _, text in found]

    def proceed(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy continuations of `prompts` (token ids), in one batch; a collective call only where
        weights are sharded."""
        with self._autocast():
            return continue_prompts(
                self.model.model,
                self.tokenizer,
                template=self.template,
                prompts=prompts,
                options=GenerationOptions(max_new_tokens=max_new_tokens),
                agree=self._agree(),
            )

    def ask(self, questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to `questions`, in one batch; collective as `proceed`."""
        prompts = [self.template.prompt_ids([Message("user", text)]) for text in questions]
        return self.proceed(prompts, max_new_tokens)

    def _answers(self, questions: Sequence[Question]) -> list[str]:
        """The answers of this process: in one batch, or one by one with images or sharded
        weights."""
        if self.sharded or any(images for _, images in questions):
            return [self.answer(question, *images) for question, images in questions]
        with self._autocast():
            return generate_batch(
                self.model.model,
                self.tokenizer,
                template=self.template,
                conversations=[self._messages(question, ()) for question, _ in questions],
                options=self._options(),
            )

    def _messages(self, question: str, images: Sequence[str]) -> list[Message]:
        asked = self.vision.question(question, images) if self.vision else Message("user", question)
        system = self.settings.evaluation_system
        return [asked] if system is None else [Message("system", system), asked]

    def _options(self) -> GenerationOptions:
        s = self.settings
        return GenerationOptions(
            max_new_tokens=s.evaluation_max_new_tokens, stop_words=s.evaluation_stop_words
        )

    def _autocast(self) -> torch.autocast:
        dtype = self.model.autocast
        return torch.autocast(self.processes.device.type, dtype=dtype, enabled=dtype is not None)

    def _within(self) -> Callable[[Callable[[], Any]], Any] | None:
        """Calls the model through its outermost module, which gathers weights."""
        entrance = self.entrance
        return None if entrance is None else lambda run: entrance(None, run=run)

    def _agree(self) -> Callable[[Tensor], Tensor] | None:
        """Replaces the next token by rank 0's, so that all processes end an answer at the same
        step."""
        return self.processes.broadcast if self.sharded else None
