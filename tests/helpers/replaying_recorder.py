"""Stands in for `CudaRecorder` on a CPU: a replay calls the function again on the same memory."""

import torch


class ReplayingRecorder:
    """Counts recordings and replays; `broken` selects an error.

    Args:
        broken: 'wait' raises as a recording that waits for the GPU; 'stale' replays with the
            inputs of the recording.
    """

    def __init__(self, broken=""):
        self.broken, self.recorded, self.replayed = broken, 0, 0

    def record(self, function):
        if self.broken == "wait":
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function()
        self.recorded += 1

        def replay():
            self.replayed += 1
            if self.broken != "stale":
                with torch.enable_grad():
                    new = function()
                result.copy_(new)

        return result, replay
