"""The decoder of a packed model as two CUDA graphs, one per direction.

A training step of a small model launches thousands of kernels of a few microseconds, and the host
takes longer to launch them than the GPU to run them. A recorded pass is launched at once:

    embeddings, positions, cu_seqlens ──copied──► forward graph ──► hidden states ─► head and loss
    gradients of parameters and embeddings ◄── backward graph ◄──copied── their gradient

Embedding, head and loss stay outside: the number of supervised tokens changes. A graph has a fixed
number of tokens, of sequences (the missing ones are empty) and a bound for the longest; rows are
filled up. One pair of graphs is kept, for the largest row: a second one would need the memory of
all activations again. Before a graph is used, its outputs and gradients are compared with those of
the plain pass on a row that it was not recorded with. They may not differ by more than four times
what two plain passes differ by (on a GPU attention may sum in no fixed order), or `FLOOR`. A fault
turns graphs off and is said; the plain pass goes on.
"""
