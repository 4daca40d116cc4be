"""The decoder of a packed model as two CUDA graphs, one per direction.

A training step of a small model launches thousands of kernels of a few microseconds, and the host
takes longer to launch them than the GPU to run them. A recorded pass is a single launch:

    embeddings, positions, cu_seqlens ──copied──► forward graph ──► hidden states ─► head and loss
    gradients of parameters and embeddings ◄── backward graph ◄──copied── their gradient

Embedding, head and loss stay outside, because the number of supervised tokens varies. A graph has a
fixed number of tokens and of sequences (unused ones are empty) and a maximum sequence length; rows
are padded. One pair of graphs is kept, for the largest row: a second one would need the memory of
all activations again. Before a graph is used, its outputs and gradients are compared with those of
an eager pass on a row that it was not recorded with. They must not differ by more than four times
the difference between two eager passes (attention on a GPU may not be deterministic), or `FLOOR`. A
mismatch disables graphs with a note, and the eager pass is used.
"""
