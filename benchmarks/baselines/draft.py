"""A small draft model: the target's own first layers, norm and LM head, trained on.

Owns how it is cut out of the target. It reads tokens only and shares nothing with the target when
it runs, so vLLM's `draft_model` loads it as any other model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines.training import Seen, distil
from vllm_adadecode.training.target_model import FrozenTarget

# Of the target's folder, without which its copy can't be served.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


class DraftModel:
    """
    Args:
        num_layers: of the target's layers, from the first.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, target: FrozenTarget, num_layers: int = 2) -> None:
        config = copy.deepcopy(target.config)
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.to(target.device)
        # Deeper layers of the target are what it has no place for.
        wanted = self.model.state_dict().keys()
        weights = target.model.state_dict()
        self.model.load_state_dict({name: weights[name] for name in wanted})
        self.source = Path(target.name)

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        found: Iterable[torch.nn.Parameter] = self.model.parameters()
        return found

    def learn(self, seen: Seen) -> tuple[torch.Tensor, list[float]]:
        return distil(seen, [self.model(seen.ids, use_cache=False).logits], 1.0)

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()
        self.model.config.dtype = torch.bfloat16
        self.model.save_pretrained(folder)
        for name in FILES:
            if (self.source / name).is_file():
                (folder / name).write_bytes((self.source / name).read_bytes())
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"provenance": provenance}
        path.write_text(json.dumps(config, indent=1) + "\n")
