"""The interface of an algorithm: the rows it accepts, which tokens are supervised, and its loss.

    record ──encode──► k sequences ──pack──► Sample list ──collate──► Batch ──loss──► LossOutput

An algorithm is defined in one file of this folder, or in the user's own
``"my_file.py:MyAlgorithm"``. Importing it must not import torch: settings are checked against it
before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from xtuner.plugins import same_type
from xtuner.types import Conversation, Encoded, Record, RecordEncoder, Text

if TYPE_CHECKING:
    from xtuner.config.schema import Settings
    from xtuner.types import Batch, LossOutput, Sample


class BaseAlgorithm:
    """Supervised learning on one sequence per row; subclasses override what differs.

    Attributes:
        records: Record types that the algorithm accepts.
        sequences_per_row: Number of sequences that `encode` returns per row. They stay together in
            one pack and one batch, and each may have max_length tokens. With 1, `encode` may
            return several, which need not stay together.
        overlong: The value of the setting `overlong` that 'auto' selects.
        overlong_choices: The values of `overlong` that the algorithm supports.
        takes_images: Whether rows may have images.
        continues_text: Whether 'auto' selects the template 'plain' for a model without a chat
            template.
        options: The algorithm's own settings with their defaults, set by `algorithm_options`.
        takes_weights: Whether `loss` and `count` use `batch.weights`. A class that overrides `loss`
            declares it again; otherwise rows with loss weights are refused.
        metrics: Names of the sums that `loss` returns in addition to the loss; the trainer divides
            them by the same count and logs them.
        uncommon: Settings that a copied settings file leaves out.
    """

    records: ClassVar[tuple[type, ...]] = (Conversation, Text)
    sequences_per_row: ClassVar[int] = 1
    overlong: ClassVar[str] = "truncate"
    overlong_choices: ClassVar[tuple[str, ...]] = ("truncate", "drop", "error")
    takes_images: ClassVar[bool] = True
    continues_text: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Any]] = {}
    metrics: ClassVar[tuple[str, ...]] = ()
    uncommon: ClassVar[tuple[str, ...]] = ()
    takes_weights: ClassVar[bool] = True

    def __init__(self, settings: Settings | None = None) -> None:
        given = dict(settings.algorithm_options) if settings else {}
        self.option: dict[str, Any] = {**self.options, **given}

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for every setting that the algorithm does not support."""
        if settings.overlong not in ("auto", *cls.overlong_choices):
            allowed = ", ".join(map(repr, ("auto", *cls.overlong_choices)))
            yield "overlong", f"algorithm = {settings.algorithm!r} supports {allowed}"
        if settings.has_vision and not cls.takes_images:
            yield "algorithm", f"{settings.algorithm!r} does not take images"
        for name, value in settings.algorithm_options:
            if name not in cls.options:
                allowed = ", ".join(cls.options) or "none"
                yield "algorithm_options", f"has no option {name!r}; allowed: {allowed}"
            elif not same_type(value, cls.options[name]):
                default = cls.options[name]
                yield (
                    "algorithm_options",
                    f"{name} = {value!r} must have the type of its default, {default!r}",
                )

    def encode(self, record: Record, encoder: RecordEncoder) -> Sequence[Encoded]:
        """Encode a row to `sequences_per_row` sequences. With 1 it may be several: samples of their
        own.

        Args:
            record: An instance of one of `records`.
            encoder: Encodes conversations and texts to token ids and a loss mask.
        """
        match record:
            case Text():
                return [encoder.text(record)]
            case Conversation():
                return encoder.sequences(record)
        raise NotImplementedError(
            f"{type(self).__name__}.encode does not accept {type(record).__name__}"
        )

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Concatenate samples to one batch."""
        from xtuner.data.collate import concatenate

        return concatenate(samples)

    def count(self, batch: Batch) -> float:
        """What `batch` adds to the divisor of the loss: the sum of the loss weights of its
        supervised tokens, which is their number if the data have no weights."""
        return batch.sum_of_weights

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """The loss of `batch`, *summed*: the trainer divides it once by the total count of the
        step. Each token's loss is multiplied by its weight.

        Args:
            model: Returns the log-probability of each supervised token, float32 ``[S]``.
            batch: A result of `collate`, on the model's device.
        """
        from xtuner.types import LossOutput

        scores, weights = model(batch), batch.weights_of_predicting
        return LossOutput(-(scores if weights is None else scores * weights).sum())
