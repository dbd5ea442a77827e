"""Makes a small trained Llama cost what a large one costs, without a change in what it says.

The wide model computes the small one's function: same logits for the same tokens, so that accepted
draft tokens, lengths and texts are those of a trained model, while a step reads the weights of the
wide shape. How each part is kept the same (d: small hidden size, D: wide):

- *Hidden channels.* The wide state is m copies of the small one, times s, then zeros, with m and s
  (a power of two) such that m s^2 d = D: then its mean of squares is the small one's, and every
  norm with gains divided by s, and every gate, is the small one's bit by bit in any precision.
  Matrices read one copy and write all.
- *Rotary embedding.* A head of k times the width has the small one's frequencies at every k-th
  rotary pair. The softmax scale, 1 / sqrt(head width), is made up for in the query projection; if
  the factor is no power of two, the bits that rounding drops are read from the second copy of the
  state.
- *Heads.* Added query and key-value heads read and write nothing. Each small key-value head is kept
  by as many wide ones as its queries need.
- *Vocabulary.* One channel of the state is a small constant, set by the embedding, written by no
  layer and lost in rounding in every norm's sum. Added tokens multiply it with a very negative
  weight: their logits are below -10^4 whatever the state is, their probability is 0.
- *Depth.* Added layers write nothing. They are spread evenly, so an exit stays at its relative
  depth.

Added weights are zeros. Dense matrix products read and multiply them like any others; on a GPU they
draw less power than others would, which matters only where power limits the clock.

`plan.py` owns these choices, `target.py` and `heads.py` apply them, `build.py` makes the folder.
`python -m benchmarks.widen` is the command.
"""
