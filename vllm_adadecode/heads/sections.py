"""The nested parts of a heads checkpoint's config.json, and how complaints about it read.

Owns the sections that other programs read too (vLLM's *speculators* support reads
`SpeculatorsSection`); the heads' own fields are `config.py`'s.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# vLLM's rejection sampler takes no longer proposals.
MAX_SPECULATIVE_TOKENS = 128
DEFAULT_SPECULATIVE_TOKENS = 5

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
        description="K: most early predictions in flight for a request.",
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


def one_line(error: ValidationError) -> str:
    """Every complaint of pydantic's, in one line, without its links."""
    parts = []
    entries = error.errors()
    for entry in entries:
        if entry["type"] == "too_short" and len(entries) > 1:
            continue  # follows from a complaint about an item
        path = ".".join(map(str, entry["loc"]))
        if entry["type"] == "value_error":
            message = str(entry["ctx"]["error"])
        elif entry["type"] == "missing":
            message = "is missing"
        elif entry["type"] == "extra_forbidden":
            message = "is an unknown key (misspelt, or of a newer version?)"
        elif entry["type"] == "too_short":
            message = "is empty"
        else:
            path = f"{path}:"
            message = f"{entry['msg'][0].lower()}{entry['msg'][1:]}, not {entry['input']!r}"
        parts.append(f"{path} {message}" if path else message)
    return "; ".join(parts)
