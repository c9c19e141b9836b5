"""Published chat templates, conversations that try them, and the table of what becomes of each."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from potstill.data.chat_texts import ChatRenderer, ChatText, Conversation
from potstill.errors import DataError

# What templates write as tokens of their own.
SPECIAL = re.compile(
    r"<\|[^|>\s]{1,40}\|>|<｜[^｜>\s]{1,40}｜>|</?s>|<(?:start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]"
    r"|</?think>|</?tool_call>|<\|\w+>|<\w+\|>"
)
EOS = {  # of the tokenizers, by the first letters of the template's name; others have <|im_end|>
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<eos>",
    "gemma": "<eos>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "idefics": "<end_of_utterance>",
    "llama": "<|eot_id|>",
    "llava": "</s>",
    "phi": "<|endoftext|>",
    "smolvlm": "<end_of_utterance>",
}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


FUNCTION = {"name": "sun", "arguments": {"place": "Rome"}}
CALL = {"type": "function", "id": "call00000", "function": FUNCTION}
PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "sun", "description": "tells the weather", "parameters": PLACE}}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([_user("Ask one"), _assistant("Say one")], {}),
    "two turns": ([_user("Ask one"), _assistant("Say one"), _user("Ask two"), _assistant("Say two")], {}),
    "system": ([{"role": "system", "content": "Be brief."}, _user("Ask one"), _assistant("Say one")], {}),
    "thoughts": (
        [
            *(_user("Ask one"), _assistant("Say one", reasoning_content="Think one")),
            *(_user("Ask two"), _assistant("Say two", reasoning_content="Think two")),
        ],
        {},
    ),
    "tool calls": (
        [
            *(_user("Sunny?"), _assistant("", tool_calls=[CALL])),
            {"role": "tool", "name": "sun", "tool_call_id": "call00000", "content": "It shines."},
            _assistant("It is sunny."),
        ],
        {"tools": [TOOL]},
    ),
}


def template_files() -> dict[str, Path]:
    """The templates in the package trl, by name; none where it is not installed. It is not imported."""
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return {}
    files = sorted(Path(spec.submodule_search_locations[0], "chat_templates").glob("*.jinja"))
    return {file.stem: file for file in files}


def tokenizer_of(name: str, template: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that knows the special tokens of a template."""
    eos = next((token for start, token in EOS.items() if name.startswith(start)), "<|im_end|>")
    special = sorted({*SPECIAL.findall(template), eos, "<bos>"})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + len(special)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["a"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<bos>")
    made.chat_template = template
    return made


def outcome(renderer: ChatRenderer, case: str) -> list[ChatText] | str:
    """Render a case; the error where it is refused."""
    messages, options = CASES[case]
    try:
        return renderer.render(Conversation(messages, "row 1", 0, options))
    except DataError as error:
        return str(error)


def table() -> str:
    """The table of docs/chats.md: what becomes of each case with each template, families of one outcome in one line."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, file in template_files().items():
        template = file.read_text(encoding="utf-8")
        renderer = ChatRenderer(tokenizer_of(name, template))
        names.setdefault(tuple(_cell(outcome(renderer, case)) for case in CASES), []).append(name)
    lines = [f"| template | {' | '.join(CASES)} |", "|---" * (len(CASES) + 1) + "|"]
    rows = sorted((", ".join(sorted(group)), cells) for cells, group in names.items())
    return "\n".join([*lines, *(f"| {group} | {' | '.join(cells)} |" for group, cells in rows)])


def _cell(result: list[ChatText] | str) -> str:
    if isinstance(result, str):
        key = re.search(r"renders the (\w+)|reads (tools)", result)
        return f"refused: it leaves out {key[1] or key[2]}" if key else "refused by the template"
    words = {"whole": "one example", "marked": "one example, by its marks", "turn": "one for each turn"}
    words = words | {"turn": "one example"} if len(result) == 1 else words
    cell = words[result[0].layout]
    if any(part.opened for part in result):
        cell += ", opened otherwise"
    return cell if all(part.closed for part in result) else f"{cell}, ended by EOS"
