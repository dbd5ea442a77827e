"""What one line or row of data says: prompt, chat, document or tokens, as token ids.

Owns the accepted fields and tokenising them; where rows come from is `prompts.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_adadecode.errors import AdaDecodeError, first_line
from vllm_adadecode.training.json_lines import BadLineError
from vllm_adadecode.training.sequences import Sequence, parse_sequence

FIELDS = "prompt, messages, text, or prompt_ids (with output_ids)"


@dataclass(frozen=True)
class RecordReader:
    """Makes sequences of JSON objects.

    Attributes:
        tokenizer: of transformers; None: only token ids can be read.
        target: name of the target, for messages.
        field: the field with the prompt, instead of the usual names.
        chat: put a plain prompt into the tokenizer's chat template, as one user message.
    """

    tokenizer: Any | None
    target: str
    field: str | None = None
    chat: bool = False

    def read(self, value: Any, source: str) -> Sequence:
        """The sequence of one line or row.

        A `prompt` may have a `completion`, `response` or `answer`; the last of `messages` may be
        the assistant's; `prompt_ids` may have `output_ids`, which are then taken as they are.

        Raises:
            BadLineError: it is none.
            AdaDecodeError: it is text, but the target has no tokenizer or chat template.
        """
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, Mapping):
            raise BadLineError("is no JSON object")
        named = source if not isinstance(value.get("source"), str) else value["source"]
        if "prompt_ids" in value:
            return parse_sequence({"output_ids": [], **value, "source": named})
        if self.field is not None:
            if self.field not in value:
                raise BadLineError(f"has no field {self.field}")
            content = value[self.field]
            value = {"messages" if isinstance(content, list) else "prompt": content}
        if "messages" in value:
            return self._chat(value["messages"], named)
        if "prompt" in value:
            prompt = _text(value["prompt"], "prompt")
            answers = (value[k] for k in ("completion", "response", "answer") if k in value)
            answer = _text(next(answers, None), "completion", optional=True)
            if self.chat:
                messages = [{"role": "user", "content": prompt}]
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                return self._chat(messages, named)
            return Sequence(self._encode(prompt), self._encode(answer, special=False), named)
        if "text" in value:
            return Sequence((), self._encode(_text(value["text"], "text")), named)
        raise BadLineError(f"has none of the fields {FIELDS}")

    def _encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        if not text:
            return ()
        return tuple(self._tokenizer().encode(text, add_special_tokens=special))

    def _chat(self, messages: Any, source: str) -> Sequence:
        if not isinstance(messages, list) or not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m
            for m in messages
        ):
            raise BadLineError("messages is no list of objects with a role and content")
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        asked = messages[:-1] if answered else messages
        if not asked:
            raise BadLineError("messages has nothing to answer")
        prompt = self._template(asked, generate=True)
        answer: tuple[int, ...] = ()
        if answered:
            whole = self._template(messages, generate=False)
            # A template may write past turns otherwise than the last one: then there is no telling
            # where the answer begins.
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
        return Sequence(prompt, answer, source)

    def _template(self, messages: list[Any], generate: bool) -> tuple[int, ...]:
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise AdaDecodeError(
                f"the data has chats, but the tokenizer of {self.target} has no chat template: "
                "give plain prompts, or add a chat_template.jinja to the target"
            )
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=generate, tokenize=True, return_dict=False
            )
        except Exception as error:
            # A template is a program of the model's author, and may refuse in any way.
            raise BadLineError(f"chat template: {first_line(error)}") from None
        return tuple(ids)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise AdaDecodeError(
                f"{self.target} has no tokenizer: add its files to the target, or give data as "
                "token ids (prompt_ids)"
            )
        return self.tokenizer


def _text(value: Any, field: str, optional: bool = False) -> str:
    if optional and value is None:
        return ""
    if not isinstance(value, str) or (not value and not optional):
        raise BadLineError(f"{field} is {'empty' if value == '' else 'no text'}")
    return value
