"""What drafters learn from: the text and the generations that the demo's heads are trained on.

Owns which rows a step sees. Other text comes in as `adadecode train` takes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress
from tokenizers import Tokenizer

from benchmarks.demo import corpus as text
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.heads import NEW_TOKENS, make_sequences
from benchmarks.demo.recipe import HeadRecipe, Recipe
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.data import continue_prompts, load_sets
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.training.batches import MicroBatch, TokenRow, micro_batches, step_rows
from vllm_adadecode.training.sequences import read_sequences, write_sequences
from vllm_adadecode.training.target_model import FrozenTarget

BUILD = Path(__file__).parents[2] / ".demo-build"
ROWS = 16  # of a step, as the heads'
HELD_OUT_PROMPTS = 16


@dataclass(frozen=True)
class Data:
    """
    Attributes:
        sets: rows to learn from; a step takes as many from each.
        held_out: rows that nothing is learned from, the target's own generations behind a prompt.
    """

    sets: tuple[tuple[TokenRow, ...], ...]
    held_out: tuple[TokenRow, ...]

    def batch(self, step: int, rows: int, seed: int) -> MicroBatch:
        """What optimizer step number `step` sees: about `rows` rows, padded to one length."""
        share = max(1, rows // len(self.sets))
        chosen = []
        for i, of in enumerate(self.sets):
            epoch = -(-len(of) // share)
            chosen += step_rows(of, share, seed + i, step, epoch)
        return next(micro_batches(chosen, 1 << 62))


def demo_steps(recipe: HeadRecipe) -> int:
    """Steps of `ROWS` in which the heads see their data."""
    return round(recipe.epochs * (recipe.text + recipe.generations) / ROWS)


def demo_data(target: FrozenTarget, recipe: Recipe) -> Data:
    """The rows that `benchmarks.demo.train` gives to the heads.

    Raises:
        AdaDecodeError: the target has no `tokenizer.json`.
    """
    path = Path(target.name, "tokenizer.json")
    if not path.is_file():
        raise AdaDecodeError(f"{target.name} has no tokenizer.json: name other data with --data")
    tokenizer = Tokenizer.from_file(str(path))
    corpus = text.load_corpus()
    tokens = {
        files: text.encode(tokenizer, corpus.for_heads(files))
        for files in ("train", "second_stage")
    }
    # What the target generates takes minutes: kept for other methods, and for a run after this.
    depends_on = target_fingerprint(target.name), recipe.heads, recipe.seed, text.digest(corpus)
    kept = BUILD / f"baselines-{hashlib.sha1(repr(depends_on).encode()).hexdigest()[:12]}.jsonl"
    if not kept.exists():
        with Progress(disable=True) as quiet:
            made = make_sequences(target.model, tokens, recipe.heads, recipe.seed, quiet)
        BUILD.mkdir(exist_ok=True)
        write_sequences(kept, made)
    found = read_sequences(kept)
    own = tuple(TokenRow(s.ids, 0) for s in found if s.source == "own")
    plain = tuple(TokenRow(s.ids, 0) for s in found if s.source != "own")
    choosing, _ = demo_prompts.split_held_out(corpus)
    drawn = demo_prompts.draw(tokenizer, choosing, "held_out", HELD_OUT_PROMPTS, recipe.seed + 2)
    ids = demo_prompts.encoded_sets(drawn, tokenizer)["held_out"]
    held_out = [
        s for s in continue_prompts(target, ids, NEW_TOKENS, "held_out") if len(s.output_ids) > 1
    ]
    return Data(
        sets=(plain, own),
        held_out=tuple(TokenRow(s.ids, len(s.prompt_ids) - 1) for s in held_out),
    )


def file_data(target: FrozenTarget, specs: ListOf[str], length: int) -> Data:
    """Rows of data as `adadecode eval` takes it: sequences, or prompts that the target continues.

    Raises:
        AdaDecodeError: there are too few, or they can't be read.
    """
    sets = load_sets(specs, target, max_tokens=length // 2)
    rows = [
        TokenRow(s.ids[:length], min(max(0, len(s.prompt_ids) - 1), length - 2))
        for found in sets
        for s in found.sequences
    ]
    usable = [row for row in rows if row.num_trained]
    held_out = usable[::20]
    learned = [row for i, row in enumerate(usable) if i % 20]
    if len(learned) < ROWS:
        raise AdaDecodeError(f"{len(usable)} sequences are too few to learn from: give more data")
    return Data((tuple(learned),), tuple(held_out))
