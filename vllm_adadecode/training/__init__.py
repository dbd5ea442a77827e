"""Training heads: prompts, the target's own generations on them, the training itself, the result.

Nothing here is imported by the engine. The way of the data: `prompts.py` reads prompts,
`generate.py` lets the target continue them, `sequences.py` keeps the result, `trainer.py` trains
the heads and their gates on it, and `card.py` writes what a folder of heads says of itself.
"""
