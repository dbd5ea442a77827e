"""The model card of a heads folder: README.md with what they are, how to use them, how they do.

Owns the text alone. Everything in it is read from the heads' config and its provenance, so a card
can be made again from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.heads.resolve import is_relative

CARD_NAME = "README.md"

_TEXT = """\
# AdaDecode heads for {target}

Early-exit heads for self-speculative decoding with [AdaDecode](https://arxiv.org/abs/2506.03700).
They predict tokens from intermediate layers of {target}; every prediction is verified with all
layers, so the output is the target's own.

## Use

With the plugin `vllm-adadecode`:

```
vllm serve {served} --speculative-config '{{"method": "adadecode", "model": "FOLDER_OR_HUB_ID"}}'
```

To publish this folder: `hf upload USER/NAME FOLDER`.{local}

## Heads

{heads}

## Held-out results

Measured on {positions} positions of {sequences} sequences that were not trained on, at confidence
thresholds {thresholds}. *Agreement*: the head's likeliest token is the last layer's. *Coverage*:
the head is confident. *Precision*: agreement where it is confident. In brackets: before training.

{results}
{gates}
## How they were made

{made}
"""


def make_card(config: HeadsConfig) -> str:
    """The card's text, with the front matter that the hub reads.

    Args:
        config: of the heads, with the provenance that `run.py` gives.
    """
    name = config.speculators_config.verifier.name_or_path
    made = config.provenance
    on_hub = not is_relative(name) and not name.startswith(("/", "~"))
    front = ModelCardData(
        library_name="vllm",
        base_model=name if on_hub else None,
        tags=["speculative-decoding", "adadecode", "early-exit"],
        pipeline_tag="text-generation",
    )
    target = f"`{name}`" if on_hub else f"`{made.get('target', name)}`"
    held_out = made["held_out"]
    return f"---\n{front.to_yaml()}\n---\n\n" + _TEXT.format(
        target=target,
        served=name if on_hub else "TARGET",
        local=""
        if on_hub
        else " First put the target's hub id into `verifier.name_or_path` of config.json, or train "
        "with `--target-name`.",
        heads=_table(["", ""], _heads(config)),
        positions=held_out["positions"],
        sequences=held_out["sequences"],
        thresholds=_numbers(dict.fromkeys(config.thresholds)),
        results=results_table(held_out),
        gates=_gates(held_out, config),
        made=_table(["", ""], _made(made)),
    )


def _heads(config: HeadsConfig) -> Iterable[Sequence[str]]:
    yield "exit layers", f"{_numbers(config.exit_layers)} of {config.target.num_hidden_layers}"
    rank = f", rank {config.rank}" if config.rank else ""
    yield "transform T", f"{config.transform}{rank}; the target's final norm: {config.norm} T"
    yield "confidence threshold", _numbers(config.thresholds)
    yield "draft tokens in a step, at most (K)", str(config.num_speculative_tokens)
    if config.gate_thresholds is not None:
        yield "gate threshold", _numbers(config.gate_thresholds)
    if config.draft_vocab_size is not None:
        yield "draft vocabulary", f"{config.draft_vocab_size} of {config.target.vocab_size} tokens"
    if config.lm_head_quantization is not None:
        yield "copy of the LM head", config.lm_head_quantization
    yield "parameters", f"{config.num_parameters:,}"


def results_table(held_out: dict[str, Any]) -> str:
    """Markdown, one row per exit layer: held-out figures, in brackets those before training."""
    rows = []
    for e, after in held_out["exits"].items():
        before = held_out["before_training"][e]
        cells = [f"{after['loss']:.4f} ({before['loss']:.4f})"]
        for name in ("agreement", "coverage", "precision"):
            cells.append(f"{after[name]:.1%} ({before[name]:.1%})")
        rows.append([e, *cells])
    return _table(["exit layer", "loss", "agreement", "coverage", "precision"], rows)


def _gates(held_out: dict[str, Any], config: HeadsConfig) -> str:
    if not config.gate:
        return ""
    rows = [
        [e, *(f"{found[name]:.1%}" for name in ("coverage", "gate_passed", "gate_recall"))]
        for e, found in held_out["exits"].items()
    ]
    table = _table(["exit layer", "coverage", "gate open", "of the covered"], rows)
    return f"\nThe gates, at gate threshold 0.5:\n\n{table}\n"


def _made(made: dict[str, Any]) -> Iterable[Sequence[str]]:
    for key, value in made.items():
        if key == "held_out":
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        yield key.replace("_", " "), f"`{text}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A bar would end the cell.
    return "\n".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines
    )


def _numbers(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
