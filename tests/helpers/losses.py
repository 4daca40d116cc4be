"""The loss that algorithms compute from the model's log-probabilities."""


def loss_of(model, batch):
    """The summed cross-entropy of the supervised tokens."""
    return -model(batch).sum()
