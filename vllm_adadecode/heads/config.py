"""The config.json of a heads checkpoint: its fields, what they mean, what is refused.

Owns the format (a *speculators* config, so that vLLM finds the target by itself: its support for
those reads `SpeculatorsSection`) and the choice of training-free heads. Weights are
`checkpoint.py`'s, the match with a target is `resolve.py`'s.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError, one_line
from vllm_adadecode.files import read_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# Version of the *speculators* layout that the file follows; not a version of our own fields.
SPECULATORS_VERSION = "0.3.0"
# vLLM's rejection sampler takes no longer proposals.
MAX_SPECULATIVE_TOKENS = 128
DEFAULT_SPECULATIVE_TOKENS = 5
DEFAULT_THRESHOLD = 0.75
DEFAULT_GATE_THRESHOLD = 0.5

Norm = Literal["before", "after"]
TransformKind = Literal["identity", "full", "low_rank"]
Quantization = Literal["int8"]
# Strict: JSON's true is no number and 4.0 no count.
Count = Annotated[int, Field(gt=0, strict=True)]


class Section(BaseModel):
    # A misspelt key must not pass for an absent one.
    model_config = ConfigDict(frozen=True, extra="forbid")


class TargetShape(Section):
    """What of the target the heads depend on."""

    hidden_size: Count = Field(description="Width d of the hidden states that the heads read.")
    vocab_size: Count = Field(description="Entries of the target's LM head, as its config says.")
    num_hidden_layers: Count = Field(description="Decoder layers of the target.")
    fingerprint: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        description="`target_fingerprint` of the target the heads were trained on; None: any "
        "target of this shape is accepted.",
    )


class Proposal(Section):
    """One way to propose tokens. vLLM reads the first of the list."""

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: int = Field(
        default=DEFAULT_SPECULATIVE_TOKENS,
        ge=1,
        le=MAX_SPECULATIVE_TOKENS,
        strict=True,
        description="K: most draft tokens of a request in a decode step.",
    )


class Verifier(Section):
    """The target, by name."""

    name_or_path: str = Field(
        min_length=1,
        description='Hub id or folder of the target. ".", ".." and paths that start with "./" or '
        '"../" are relative to the heads folder.',
    )
    architectures: tuple[str, ...] = Field(
        default=(), description="The target's architectures, for readers; nothing depends on it."
    )


class SpeculatorsSection(Section):
    """The part of the file that vLLM's *speculators* support reads."""

    algorithm: Literal["adadecode"] = "adadecode"
    default_proposal_method: Literal["greedy"] = "greedy"
    proposal_methods: tuple[Proposal, ...] = Field(default=(Proposal(),), min_length=1)
    verifier: Verifier


class HeadsConfig(Section):
    """The heads of one target: where they sit, when they are trusted, how they are computed.

    Logits of the head at exit layer e, from the hidden state h after e layers (residual added):
    ``E* . T . norm(h)`` or ``E* . norm(T . h)`` as `norm` says, with the target's own final norm
    and LM head E*. The confidence is the largest softmax probability (paper, "Confidence"). Three
    optional parts make a head cheaper; verification, and so the output, is the same with and
    without them:

    - a gate, one vector per exit, tells before the head runs whether it will be confident;
    - a draft vocabulary leaves rows of E* out, with a logit per exit for all that is left out:
      ``p = exp(max - logaddexp(logsumexp(draft logits), other logit))``;
    - a quantised copy of (the kept rows of) E* is read instead of E* itself.

    Raises:
        AdaDecodeError: a field is missing, unknown or out of its range, or two contradict.
    """

    architectures: tuple[Literal["AdaDecodeHeads"]] = ("AdaDecodeHeads",)
    speculators_model_type: Literal["adadecode"] = "adadecode"
    speculators_version: str = SPECULATORS_VERSION
    exit_layers: tuple[int, ...] = Field(
        description="Strictly increasing. Exit layer e sits after e decoder layers have run, "
        "0 < e < num_hidden_layers.",
    )
    confidence_threshold: float | tuple[float, ...] = Field(
        default=DEFAULT_THRESHOLD,
        description="Predict early where the largest probability is above it; one for all exits "
        "or one per exit. 1 turns an exit off.",
    )
    transform: TransformKind = Field(
        description="T of each head: identity (no weights), a full d x d matrix, or I + up . down "
        "of rank `rank`."
    )
    rank: Count | None = Field(default=None, description="Rank r of `low_rank`, else None.")
    norm: Norm = Field(
        description="Where the target's final norm is applied: before T or after it."
    )
    gate: StrictBool = Field(
        default=False,
        description="Whether there is a gate, gate(h) = sigmoid(w . rmsnorm(h) + b) in float32: "
        "the probability that the head will be confident.",
    )
    gate_threshold: float | tuple[float, ...] = Field(
        default=DEFAULT_GATE_THRESHOLD,
        description="The head runs only where the gate is above it; one for all exits or one per "
        "exit. 0 lets every head run (the gate is not computed), 1 turns an exit off.",
    )
    draft_vocab_size: Count | None = Field(
        default=None,
        description="Tokens that the heads can predict, listed in the tensor `draft_vocab`; None: "
        "all of the target's.",
    )
    lm_head_quantization: Quantization | None = Field(
        default=None,
        description="The heads read a copy of the LM head quantised per row, which the engine "
        "makes when it loads; None: the target's own.",
    )
    target: TargetShape
    speculators_config: SpeculatorsSection
    transformer_layer_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Empty: the heads have no layers of their own, but vLLM insists on the key.",
    )
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="How the heads came about: command, versions, data."
    )

    # A file may have a key "self" as well.
    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise AdaDecodeError(f"heads config: {one_line(error)}") from None

    # These two are checked by hand: pydantic's complaints about unions and items are long.
    @field_validator("exit_layers", mode="before")
    @classmethod
    def _check_exit_layers(cls, value: Any) -> tuple[int, ...]:
        exits = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
        if not exits or not all(type(e) is int and e > 0 for e in exits):
            raise ValueError(f"must be a list of layer numbers from 1 up, not {value!r}")
        if list(exits) != sorted(set(exits)):
            raise ValueError(f"must be strictly increasing, not {list(exits)}")
        return exits

    @field_validator("confidence_threshold", "gate_threshold", mode="before")
    @classmethod
    def _check_threshold(cls, value: Any) -> float | tuple[float, ...]:
        values = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(type(v) in (int, float) and 0.0 <= v <= 1.0 for v in values):
            raise ValueError(f"must lie in [0, 1], not {value!r}")
        return float(value) if values == (value,) else tuple(map(float, values))

    @model_validator(mode="after")
    def _check_together(self) -> "HeadsConfig":
        exits = self.exit_layers
        if exits[-1] >= self.target.num_hidden_layers:
            raise ValueError(
                f"exit layer {exits[-1]} is out of range: the target has "
                f"{self.target.num_hidden_layers} layers, the last exit can sit after "
                f"{self.target.num_hidden_layers - 1}"
            )
        for name in ("confidence_threshold", "gate_threshold"):
            thresholds = getattr(self, name)
            if isinstance(thresholds, tuple) and len(thresholds) != len(exits):
                raise ValueError(
                    f"{name} has {len(thresholds)} values for {len(exits)} exit layers: "
                    "give one number, or one per exit layer"
                )
        if self.transform == "low_rank":
            if self.rank is None:
                raise ValueError("transform low_rank needs a rank")
            if self.rank >= self.target.hidden_size:
                raise ValueError(
                    f"rank {self.rank} must be below the hidden size {self.target.hidden_size}"
                )
        elif self.rank is not None:
            raise ValueError(f"rank is for transform low_rank, not for {self.transform}")
        if not self.gate and self.gate_threshold != DEFAULT_GATE_THRESHOLD:
            raise ValueError("gate_threshold is for heads with a gate: set gate, or leave it out")
        if (size := self.draft_vocab_size) is not None and size > self.target.vocab_size:
            raise ValueError(
                f"draft_vocab_size {size} is more than the target's {self.target.vocab_size} tokens"
            )
        return self

    # --- what the engine asks -------------------------------------------------------------------

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Confidence threshold per exit layer."""
        return self._per_exit(self.confidence_threshold)

    @property
    def gate_thresholds(self) -> tuple[float, ...] | None:
        """Gate threshold per exit layer; None without a gate."""
        return self._per_exit(self.gate_threshold) if self.gate else None

    def _per_exit(self, value: float | tuple[float, ...]) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.exit_layers)

    @property
    def num_speculative_tokens(self) -> int:
        """K, the most draft tokens of a request in a decode step."""
        return self.speculators_config.proposal_methods[0].speculative_tokens

    @property
    def max_speculative_tokens(self) -> int:
        """Largest K a user may ask for. A head works at any position: vLLM sets the limit."""
        return MAX_SPECULATIVE_TOKENS

    @property
    def transform_parameters(self) -> int:
        """Weights of one head's T."""
        d = self.target.hidden_size
        return d * d if self.transform == "full" else 2 * d * (self.rank or 0)

    @property
    def num_parameters(self) -> int:
        """Weights of all heads together, gates and "other" logits included.

        The shared norm and LM head, and copies of its rows, are the target's.
        """
        vectors = self.gate + (self.draft_vocab_size is not None)
        per_exit = self.transform_parameters + (self.target.hidden_size + 1) * vectors
        return per_exit * len(self.exit_layers)

    def select(self, exit_layers: Iterable[int]) -> "HeadsConfig":
        """The same heads, restricted to some of their exits (given in increasing order).

        Raises:
            AdaDecodeError: an exit has no head here, or the order is wrong.
        """
        wanted = list(exit_layers)
        unknown = [e for e in wanted if e not in self.exit_layers]
        if unknown:
            raise AdaDecodeError(
                f"no head after layer {', '.join(map(str, unknown))}: these heads sit after "
                f"{', '.join(map(str, self.exit_layers))}; choose exit_layers among them"
            )
        data = dict(self) | {"exit_layers": wanted}
        for name in ("confidence_threshold", "gate_threshold"):
            if isinstance(values := getattr(self, name), tuple):
                by_exit = dict(zip(self.exit_layers, values, strict=True))
                data[name] = [by_exit[e] for e in wanted]
        return HeadsConfig(**data)

    # --- making one -----------------------------------------------------------------------------

    @classmethod
    def logit_lens(
        cls,
        hidden_size: int,
        vocab_size: int,
        num_hidden_layers: int,
        exit_layers: Iterable[int] | None = None,
    ) -> "HeadsConfig":
        """Training-free heads: the target's own norm and LM head at intermediate layers.

        Without ``exit_layers`` they sit at 1/4, 1/2 and 3/4 of the depth, fewer in a model too
        shallow for three.

        Raises:
            AdaDecodeError: the model has a single layer, or ``exit_layers`` do not suit it.
        """
        if exit_layers is None:
            exit_layers = default_exit_layers(num_hidden_layers)
        return cls(
            exit_layers=exit_layers,
            transform="identity",
            norm="after",
            target={
                "hidden_size": hidden_size,
                "vocab_size": vocab_size,
                "num_hidden_layers": num_hidden_layers,
            },
            speculators_config={"verifier": {"name_or_path": ".."}},
        )

    @classmethod
    def load(cls, path: str | Path) -> "HeadsConfig":
        """Read ``config.json`` of a heads folder (or the file itself).

        Raises:
            AdaDecodeError: it is missing, no JSON, of something else, or not valid.
        """
        file = Path(path)
        if not file.name.endswith(".json"):
            file = file / CONFIG_NAME
        data = read_json(file)
        kind = data.get("speculators_model_type") if isinstance(data, dict) else None
        if kind != METHOD:
            found = f"speculators of type {kind!r}" if kind else "no heads"
            raise AdaDecodeError(
                f"{file} describes {found}, not AdaDecode heads: give the folder of a heads "
                "checkpoint"
            )
        if "model_type" in data:
            raise AdaDecodeError(
                f"{file} has a top-level model_type, with which vLLM would take it for a model: "
                "remove that key"
            )
        try:
            return cls(**data)
        except AdaDecodeError as error:
            raise AdaDecodeError(f"{file}: {str(error).removeprefix('heads config: ')}") from None

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def is_heads_folder(folder: str | Path) -> bool:
    """Whether a folder's config.json says that it holds AdaDecode heads, valid or not."""
    try:
        data = read_json(Path(folder, CONFIG_NAME))
    except AdaDecodeError:
        return False
    return isinstance(data, dict) and data.get("speculators_model_type") == METHOD


def default_exit_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """Exits at 1/4, 1/2 and 3/4 depth, each once.

    Raises:
        AdaDecodeError: there is no layer to exit before.
    """
    if num_hidden_layers < 2:
        raise AdaDecodeError(
            f"a model of {num_hidden_layers} layers has no intermediate layer to put a head after"
        )
    return tuple(sorted({max(1, num_hidden_layers * i // 4) for i in (1, 2, 3)}))
