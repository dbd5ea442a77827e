"""An EAGLE-3 drafter (arXiv 2503.01840): model, training-time test and format are speculators'.

Owns how it is fed. speculators (`pip install speculators`, vLLM's project for training drafters)
runs beside this package's versions of PyTorch, transformers and vLLM. `make setup` installs it, but
not what it asks for and does not import: torchaudio and torchvision, whose builds break
transformers beside PyTorch's CPU build.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.training import Seen
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.training.target_model import FrozenTarget


class Eagle3:
    """One decoder layer that reads the target's states at three depths.

    Args:
        in_a_row: draft tokens that it learns to make, each from its own state before.

    Raises:
        AdaDecodeError: speculators is not installed, or does not know the target.
    """

    def __init__(self, target: FrozenTarget, in_a_row: int = 3) -> None:
        try:
            from speculators import Eagle3DraftModel
            from speculators.losses import resolve_loss_config
        except ImportError as error:
            raise AdaDecodeError(
                f"EAGLE-3 is trained with speculators, which can't be imported ({error}): "
                "make setup"
            ) from None
        config = copy.deepcopy(target.config)
        if config.model_type not in ("llama", "qwen3"):
            raise AdaDecodeError(
                f"speculators has EAGLE-3 of llama and qwen3, not of {config.model_type}"
            )
        config.num_hidden_layers = 1
        config.tie_word_embeddings = False
        last = target.config.num_hidden_layers
        # speculators' own choice, and as there and in vLLM the number of layers before a state.
        self.aux = tuple(dict.fromkeys((2, last // 2, max(1, last - 3))))
        self.layers = (*self.aux, last)
        self.in_a_row = in_a_row
        self.model: Any = Eagle3DraftModel.from_training_args(
            verifier_config=config,
            verifier_name_or_path=os.path.abspath(target.name),
            draft_vocab_size=config.vocab_size,
            target_layer_ids=list(self.aux),
            norm_before_residual=True,
            norm_before_fc=True,
            norm_output=True,
            ttt_steps=in_a_row,
            draft_attn_impl="eager",
        ).float()
        self.model.to(target.device)
        # Its fused losses are Triton kernels.
        self.loss: Any = resolve_loss_config("kl_div", "eager")

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def learn(self, seen: Seen) -> tuple[torch.Tensor, list[float]]:
        """Row by row: all in one, as speculators packs them, would need a much larger mask."""
        total, shares = torch.zeros((), device=seen.ids.device), []
        for row in range(len(seen.ids)):
            loss, found = self._learn_row(seen, row)
            total = total + loss / len(seen.ids)
            shares.append(found)
        return total, [sum(of) / len(of) for of in zip(*shares, strict=True)]

    def _learn_row(self, seen: Seen, row: int) -> tuple[torch.Tensor, list[float]]:
        # A draft is made of a token and the target's states *before* it (speculators'
        # `shift_batch`).
        ids = seen.ids[row : row + 1, 1:]
        states = torch.cat([seen.hidden[layer][row : row + 1] for layer in self.aux], -1)
        length = ids.shape[1]
        _, loss, metrics = self.model(
            hidden_states=states[:, :-1].float(),
            input_ids=ids,
            document_ids=torch.zeros_like(ids),
            loss_mask=seen.trained[row : row + 1, 1:],
            position_ids=torch.arange(1, length + 1, device=ids.device)[None],
            verifier_last_hidden_states=seen.hidden[self.layers[-1]][row : row + 1, 1:].float(),
            ttt_steps=self.in_a_row,
            loss_config=self.loss,
        )
        return loss, [
            float(metrics[f"full_acc_{k}_sum"] / metrics[f"full_acc_{k}_total"].clamp(min=1))
            for k in range(self.in_a_row)
        ]

    def save(self, folder: Path, provenance: dict[str, Any]) -> None:
        self.model.to(torch.bfloat16).save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"provenance": provenance}
        # Where the target lay when this was trained means nothing elsewhere.
        config["speculators_config"]["verifier"]["name_or_path"] = ".."
        path.write_text(json.dumps(config, indent=1) + "\n")
