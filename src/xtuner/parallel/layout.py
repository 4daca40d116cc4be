"""The layout of ranks: data ranks take different rows, sequence ranks share the tokens of a row.

    rank = data_rank * sequence_parallel_size + sequence_rank

    8 processes, size 2      data rank     0     1     2     3
                             rank         0 1   2 3   4 5   6 7
                             sequence     0 1   0 1   0 1   0 1

The ranks of one sequence are neighbors, so they are on one node if the size divides the number of
its GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.errors import LaunchError


@dataclass(frozen=True)
class RankLayout:
    """The data rank and sequence rank of one process.

    Attributes:
        rank: Rank of this process among all.
        world_size: Number of processes.
        sequence_world_size: Number of ranks that share the tokens of a row.
    """

    rank: int = 0
    world_size: int = 1
    sequence_world_size: int = 1

    def __post_init__(self) -> None:
        size = self.sequence_world_size
        if self.world_size % size:
            if size > self.world_size:
                raise LaunchError(
                    f"sequence_parallel_size = {size} needs {size} processes or a multiple, but "
                    f"there {_are(self.world_size)}: start {size} with --nproc {size}, or set it "
                    "to 1"
                )
            allowed = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise LaunchError(
                f"sequence_parallel_size = {size}: {self.world_size} processes cannot be split "
                f"into groups of {size}; with this number of processes it can be "
                f"{', '.join(map(str, allowed))}"
            )

    @property
    def data_world_size(self) -> int:
        """Number of ranks that take different rows."""
        return self.world_size // self.sequence_world_size

    @property
    def data_rank(self) -> int:
        """Which rows this process takes."""
        return self.rank // self.sequence_world_size

    @property
    def sequence_rank(self) -> int:
        """Which part of each row this process takes."""
        return self.rank % self.sequence_world_size

    def sequence_groups(self) -> list[list[int]]:
        """The ranks that share the tokens of their rows, one list per data rank."""
        size = self.sequence_world_size
        return [list(range(first, first + size)) for first in range(0, self.world_size, size)]


def _are(count: int) -> str:
    return "is one" if count == 1 else f"are {count}"
