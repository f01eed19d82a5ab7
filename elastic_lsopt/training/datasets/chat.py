"""Conversations to tokens, and which of them an assistant has said: only these are targets of the loss.

    {% generation %} … {% endgeneration %}   in a template: what lies between is the assistant's (transformers' rule)
    without it                               what an assistant turn adds to the text is the assistant's, its end of
                                             turn included, but for the prompt that starts its turn

The second rule asks the template for the text up to each assistant turn, and after it. It is exact where the tokens of
the one begin the tokens of the other, and of the whole; a conversation of which that is not true is refused (of a
template that drops what an earlier turn has thought, for example): it needs a template with the first rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_lsopt.config.settings import SettingError

Turn = Mapping[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""What the form `conversations: [{from, value}]` calls them."""


class ChatEncoder:
    """Conversations through the tokenizer's chat template, or through the one of a file.

    Raises SettingError where there is no template.
    """

    def __init__(self, tokenizer: Any, name: str, template_file: str | None) -> None:
        if template_file is not None:
            try:
                tokenizer.chat_template = Path(template_file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise SettingError(
                    "chat_template", f"chat_template={template_file} cannot be read: {reason}."
                ) from None
        if not tokenizer.chat_template:
            raise SettingError(
                "tokenizer_name_or_path",
                f"the tokenizer {name!r} has no chat template, and chat data needs one; give the tokenizer of an "
                "instruct model, or a template's file: chat_template: FILE.jinja.",
            )
        self.tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        # Where a token lies in the text only a fast tokenizer knows; the tags are nothing to the second rule.
        self._tagged = bool(_GENERATION.search(self._template)) and tokenizer.is_fast

    def encode(self, turns: Sequence[Turn], place: str) -> tuple[list[int], NDArray[np.bool_]]:
        """(ids, which of them are trained), both [n]. Raises SettingError naming `place`."""
        try:
            return self._by_tags(turns) if self._tagged else self._by_prefixes(turns, place)
        except SettingError:
            raise
        except Exception as error:  # jinja's and the template's own: roles that do not alternate, a missing key
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SettingError("dataset", f"{place}: the chat template refuses it: {reason}.") from None

    def _by_tags(self, turns: Sequence[Turn]) -> tuple[list[int], NDArray[np.bool_]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], [spans] = render_jinja_template(
            [[dict(turn) for turn in turns]], chat_template=self._template, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        trained = np.zeros(len(places), bool)
        for begin, end in np.asarray(spans, np.int64).reshape(-1, 2):
            trained |= (places[:, 0] < end) & (begin < places[:, 1])
        return encoding["input_ids"], trained

    def _by_prefixes(self, turns: Sequence[Turn], place: str) -> tuple[list[int], NDArray[np.bool_]]:
        ids = self._ids(turns)
        trained = np.zeros(len(ids), bool)
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._ids(turns[:i], prompted=True) if i else []
            after = self._ids(turns[: i + 1])
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise SettingError(
                    "dataset",
                    f"{place}: the tokens up to assistant turn {i + 1} do not begin the tokens of the whole, so nobody "
                    "can say which it has said; give a chat_template with {% generation %} around what it says.",
                )
            trained[len(before) : len(after)] = True
        return ids, trained

    def _ids(self, turns: Sequence[Turn], *, prompted: bool = False) -> list[int]:
        text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompted)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def turns_of(conversation: Any, field: str, place: str) -> list[Turn]:
    """The turns, each with role and content; of the form {from, value} too. Raises SettingError naming `place`."""
    if not isinstance(conversation, list) or not conversation:
        raise SettingError(
            "dataset_messages_field",
            f"{place}: field {field!r} must be a list of messages, {{role: …, content: …}}; got {conversation!r:.40}.",
        )
    turns = []
    for number, given in enumerate(conversation, start=1):
        turn = given
        if isinstance(given, Mapping) and {"from", "value"} <= given.keys():
            turn = {"role": _ROLES.get(given["from"], given["from"]), "content": given["value"]}
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise SettingError(
                "dataset_messages_field",
                f"{place}: message {number} of field {field!r} must have role and content; got {given!r:.60}.",
            )
        turns.append(turn)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise SettingError(
            "dataset_messages_field",
            f"{place}: field {field!r} has no message of an assistant, so nothing to train on.",
        )
    return turns
