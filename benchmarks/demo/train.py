"""``python -m benchmarks.demo.train``: makes the demo target and its heads from nothing.

The heads are trained and calibrated by `adadecode train` and `adadecode calibrate`, so that they
are what a user of these commands gets. The model folder is replaced only when everything has been
made, with all that is in it: drafters of other methods (`benchmarks.baselines`) were for the old
model.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.arguments import make_parser
from benchmarks.demo import corpus as text
from benchmarks.demo.recipe import HeadRecipe, Recipe
from benchmarks.demo.target import (
    Tokens,
    generate,
    native_bf16,
    new_model,
    train_stage,
    windows,
)
from benchmarks.machine import record
from benchmarks.workload import DEMO_MODEL, DEMO_PROMPTS, HERE, dump
from vllm_adadecode.cli.arguments import positive
from vllm_adadecode.cli.progress import counting
from vllm_adadecode.evaluation.costs import ModelShape, costs_from_bytes
from vllm_adadecode.files import replaced_folder, write_json, write_whole
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.training.json_lines import write_json_lines
from vllm_adadecode.training.sequences import Sequence, write_sequences

ROOT = HERE.parent
GENERATED_TOGETHER = 128
# The target only continues text: a chat is the text of its messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

CARD = HERE / "demo" / "card.md"


def make_sequences(
    model: Any, tokens: Mapping[str, Tokens], recipe: HeadRecipe, seed: int, show: Progress
) -> list[Sequence]:
    """What heads learn from: rows of each of the sets, and what the target makes of prompts."""
    found = []
    prompt = recipe.length // 4
    starts = [windows(ids, recipe.generations // 2, prompt, seed) for ids in tokens.values()]
    parts = torch.cat(starts).split(GENERATED_TOGETHER)
    for part in show.track(parts, description="text of the target's own"):
        for row in generate(model, part, recipe.length - prompt).tolist():
            found.append(Sequence(tuple(row[:prompt]), tuple(row[prompt:]), "own"))
    for name, ids in tokens.items():
        for row in windows(ids, recipe.text // 2, recipe.length, seed + 1).tolist():
            found.append(Sequence((), tuple(row), name))
    return found


def write_choosing(build: Path, tokenizer: Tokenizer, corpus: text.Corpus, count: int) -> list[str]:
    """Prompts that settings are chosen on, of files that heads have not seen: names of files."""
    names = []
    known = [s for s in corpus.second_stage if s.path in text.HEADS_CHOOSE_FILES]
    unseen = text.split_held_out(corpus)[0]
    for seed, (name, files) in enumerate({"head_choose": known, "unseen_choose": unseen}.items()):
        prompts = text.draw(tokenizer, files, name, count, 200 + seed)
        write_json_lines(build / f"{name}.jsonl", ({"prompt": p.text} for p in prompts))
        names.append(f"{name}.jsonl")
    return names


def adadecode(build: Path, *arguments: str) -> None:
    """Run the command in ``build``: what it notes then names no other place.

    Raises:
        SystemExit: it failed.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "vllm_adadecode.cli", *arguments]
    ended = subprocess.run(command, cwd=build, env=os.environ | {"PYTHONPATH": path})
    if ended.returncode:
        sys.exit(f"adadecode {arguments[0]} failed")


def make_heads(build: Path, target: str, recipe: Recipe, sequences: str, data: list[str]) -> None:
    """Trained heads with chosen settings in the target's folder.

    Args:
        target, sequences, data: names in ``build``.
    """
    heads = f"{target}/adadecode"
    adadecode(
        build,
        *("train", target, "--output", heads, "--target-name", "..", "--cache", "."),
        *("--data", sequences, "--no-generate", "--max-length", str(recipe.heads.length)),
        *("--exit-layers", *map(str, recipe.exit_layers), "--seed", str(recipe.seed)),
        *("--precision", "bf16" if native_bf16() else "fp32", *recipe.heads.training),
    )
    shape = ModelShape.from_config(LlamaConfig.from_pretrained(build / target))
    costs = costs_from_bytes(shape, HeadsConfig.load(build / heads), "bytes")
    costs = costs.model_copy(update={"verification": recipe.heads.round_cost})
    write_json(build / "costs.json", costs.model_dump())
    adadecode(
        build,
        *("calibrate", heads, "--output", heads, "--overwrite", "--dtype", "float32"),
        *("--data", *data, "--max-tokens", "128", "--costs", "costs.json"),
        *recipe.heads.calibration,
    )


def export(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Puts the target into an empty `folder`; in float32 `model` stays what it is."""
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), text.END_OF_TEXT)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **ends,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def run(
    recipe: Recipe,
    corpus: text.Corpus,
    build: Path,
    model_folder: Path,
    prompts_file: Path,
    show: Progress,
) -> None:
    """Everything, from text to the two outputs."""
    build.mkdir(parents=True, exist_ok=True)
    tokenizer = text.train_tokenizer((s.text for s in corpus.train), recipe.shape.vocab_size)
    tokens = {f: text.encode(tokenizer, getattr(corpus, f)) for f in ("train", "second_stage")}
    for_heads = {f: text.encode(tokenizer, corpus.for_heads(f)) for f in tokens}
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.shape)
    for number, stage in enumerate(recipe.stages):
        train_stage(model, tokens[stage.files], recipe, number, show)
    # From here on, the weights that will be stored. Parameters only: model.to() would also round
    # the rotary frequencies, which a loaded model computes afresh.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.eval()
    sequences = build / "sequences.jsonl"
    write_sequences(sequences, make_sequences(model, for_heads, recipe.heads, recipe.seed, show))
    choosing = write_choosing(build, tokenizer, corpus, recipe.heads.choosing)
    prompts = [
        *text.draw(tokenizer, text.split_held_out(corpus)[1], "held_out", 32, recipe.seed),
        *text.draw(tokenizer, corpus.second_stage, "second_stage", 32, recipe.seed + 1),
    ]
    with replaced_folder(model_folder, scratch=build) as folder:
        export(folder, model, tokenizer)
        show.console.print("training heads")
        make_heads(build, folder.name, recipe, sequences.name, choosing)
        made = record() | {"data_sha1": text.digest(corpus)}
        lines = "\n".join(f"- {name}: `{value}`" for name, value in made.items())
        card = CARD.read_text(encoding="utf-8").format(made_with=lines)
        (folder / "README.md").write_text(card, encoding="utf-8")
    write_whole(prompts_file, dump(prompts).encode())
    show.console.print(f"written: {model_folder}")


def main() -> None:
    parser = make_parser("benchmarks.demo.train", __doc__)
    parser.add_argument("--threads", type=positive, default=2, help="of PyTorch")
    parser.add_argument(
        "--build", type=Path, default=ROOT / ".demo-build", help="folder of unfinished work"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with counting(left=True) as show:
        run(Recipe(), text.load_corpus(), args.build, DEMO_MODEL, DEMO_PROMPTS, show)


if __name__ == "__main__":
    main()
