"""``python -m benchmarks.demo.train``: makes the demo target and its heads from nothing.

A killed run goes on where it was when started again: unfinished work is kept in ``.demo-build/``.
The model folder is replaced only when everything has been made, with all that is in it: drafters
of other methods (`benchmarks.baselines`) were for the old model and go with it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks.arguments import make_parser
from benchmarks.demo import corpus as text
from benchmarks.demo import heads_prompts
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.export import card, export, provenance
from benchmarks.demo.heads import make_heads, make_sequences
from benchmarks.demo.measure import report_sets
from benchmarks.demo.recipe import Recipe
from benchmarks.demo.stages import new_model, text_loss, train_target
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.files import replaced_folder, write_whole
from vllm_adadecode.training.sequences import write_sequences

HERE = Path(__file__).parent


def run(
    recipe: Recipe,
    corpus: text.Corpus,
    build: Path,
    model_folder: Path,
    prompts_file: Path,
    show: Progress,
) -> None:
    """Everything, from text to the two outputs."""
    started = time.process_time()
    digest = text.digest(corpus)
    show.console.print(
        f"{len(corpus.train)} files to train on, {len(corpus.second_stage)} of them in the second "
        f"stage, {len(corpus.held_out)} held out"
    )
    tokenizer = text.train_tokenizer((s.text for s in corpus.train), recipe.shape.vocab_size)
    tokens = {
        name: text.encode(tokenizer, getattr(corpus, name))
        for name in ("train", "second_stage", "held_out")
    }
    tokens_for_heads = {
        f"heads_{name}": text.encode(tokenizer, corpus.for_heads(name))
        for name in ("train", "second_stage")
    }
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.shape)
    preparing = time.process_time() - started
    training = train_target(model, tokens, recipe, digest, build, show)
    trained = time.process_time()

    # From here on, the weights that will be stored. Parameters only: model.to() would also round
    # the rotary frequencies, which a loaded model computes afresh.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.eval()
    losses = {name: text_loss(model, ids, recipe.exit_layers) for name, ids in tokens.items()}
    for name, values in losses.items():
        show.console.print(f"loss on {name}: " + " ".join(f"{x:.3f}" for x in values))
    sequences = build / f"sequences-{recipe.key(len(recipe.stages) - 1, digest)}.jsonl"
    if not sequences.exists():
        learned = make_sequences(model, tokens_for_heads, recipe.heads, recipe.seed, show)
        write_sequences(sequences, learned)
    choosing = heads_prompts.choosing(tokenizer, corpus)
    prompts = demo_prompts.demo_prompts(tokenizer, corpus, seed=recipe.seed)
    made_with = provenance(recipe, digest)
    with replaced_folder(model_folder, scratch=build) as folder:
        export(folder, model, tokenizer)
        session = make_heads(folder, sequences, choosing, recipe, made_with, build, show)
        measured = report_sets(session, demo_prompts.encoded_sets(prompts, tokenizer))
        minutes = (preparing + training + time.process_time() - trained) / 60
        readme = card(session, recipe, corpus, losses, measured, made_with, minutes)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    write_whole(prompts_file, demo_prompts.dump(prompts).encode())
    show.console.print(f"written: {model_folder}, {minutes:.0f} CPU minutes")


def main() -> None:
    parser = make_parser("benchmarks.demo.train", __doc__)
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch")
    parser.add_argument(
        "--build",
        type=Path,
        default=HERE.parents[1] / ".demo-build",
        help="folder of unfinished work",
    )
    parser.add_argument("--model", type=Path, help="folder to write; default: the demo's own")
    parser.add_argument("--prompts", type=Path, help="file to write; default: the demo's own")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="a target without early-exit training, to compare with, and heads for it (written to "
        "BUILD/plain)",
    )
    args = parser.parse_args()
    place = args.build / "plain" if args.plain else HERE
    recipe = Recipe().plain() if args.plain else Recipe()
    torch.set_num_threads(args.threads)
    with counting(left=True) as show:
        model, prompts = args.model or place / "model", args.prompts or place / "prompts.json"
        run(recipe, text.load_corpus(), args.build, model, prompts, show)


if __name__ == "__main__":
    main()
