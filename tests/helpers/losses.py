"""The loss as algorithms make it of a model's log-probabilities."""


def loss_of(model, batch):
    """The summed cross-entropy of the supervised tokens."""
    return -model(batch).sum()
