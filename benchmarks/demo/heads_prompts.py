"""``python -m benchmarks.demo.heads_prompts``: draws the prompts of the heads' report.

Owns which files each part of the report is about. The prompts are stored: another Python has
another standard library.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

from tokenizers import Tokenizer

from benchmarks.arguments import make_parser
from benchmarks.demo import prompts as demo_prompts
from benchmarks.demo.corpus import (
    HEADS_CHOOSE_FILES,
    HEADS_MEASURE_FILES,
    Corpus,
    Source,
    load_corpus,
)
from vllm_adadecode.files import write_whole

HERE = Path(__file__).parent
STORED = HERE / "heads_prompts.json"
COUNT = 48  # of each set
CHOOSING_COUNT = 144  # of each set that the shipped setting is chosen on
# A part that is reported, and the set that its settings may be chosen on.
CHOOSING = {"head_held_out": "head_choose", "unseen": "unseen_choose"}
OUT_OF_DOMAIN = ("prose", "c_headers")
LEAST_TEXT = 2000  # characters


def sources(corpus: Corpus) -> dict[str, list[Source]]:
    """The files of every set: neither the heads nor their settings have seen those of a part."""
    choosing, measured = demo_prompts.split_held_out(corpus)
    headers = sorted(Path(sysconfig.get_path("include")).glob("*.h"))
    found = {
        "head_held_out": [s for s in corpus.second_stage if s.path in HEADS_MEASURE_FILES],
        "head_choose": [s for s in corpus.second_stage if s.path in HEADS_CHOOSE_FILES],
        "unseen": list(measured),
        "unseen_choose": list(choosing),
        # The documentation behind help(), and CPython's own headers.
        "prose": [Source(f"pydoc:{name}", text) for name, text in sorted(topics.items())],
        "c_headers": [Source(h.name, h.read_text(encoding="utf-8")) for h in headers],
    }
    for name in OUT_OF_DOMAIN:
        found[name] = [s for s in found[name] if len(s.text) >= LEAST_TEXT]
    return found


def choosing(tokenizer: Tokenizer, corpus: Corpus) -> dict[str, list[list[int]]]:
    """Prompts of the sets that settings are chosen on, by set, as tokens."""
    found = sources(corpus)
    return {
        name: demo_prompts.encoded_sets(
            demo_prompts.draw(tokenizer, found[name], name, CHOOSING_COUNT, 200 + seed),
            tokenizer,
        )[name]
        for seed, name in enumerate(CHOOSING.values())
    }


def main() -> None:
    make_parser("benchmarks.demo.heads_prompts", __doc__).parse_args()
    tokenizer = Tokenizer.from_file(str(HERE / "model" / "tokenizer.json"))
    prompts = [
        prompt
        for seed, (name, files) in enumerate(sources(load_corpus()).items())
        for prompt in demo_prompts.draw(tokenizer, files, name, COUNT, 100 + seed)
    ]
    write_whole(STORED, demo_prompts.dump(prompts).encode())
    print(f"written: {STORED} ({len(prompts)} prompts)")


if __name__ == "__main__":
    main()
