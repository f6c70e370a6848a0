"""Rows of instruction data in TRL's columns: alpaca, sharegpt and question/answer pairs become `messages`.

Owns the formats that people have, and what makes a row useless for instruction tuning.

    row = with_trl_columns({"instruction": "Add", "input": "1 2", "output": "3"});  problem_of(row)

Leaves out reading files, and what a template or a tokenizer makes of a row.
"""

from typing import Any

# as TRL knows them already
COLUMNS = ("messages", "conversations", "text", "prompt", "completion", "chosen", "rejected", "input_ids")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
# columns of a question and its answer, first of the row that has both
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("prompt", "response"),
)


def turn(given: Any) -> Any:
    """{from, value} as {role, content}; a turn without tools holds nothing else, and no empty columns."""
    if not isinstance(given, dict):
        return given
    if "from" in given:
        given = {"role": given["from"], "content": given.get("value")} | {
            key: value for key, value in given.items() if key not in ("from", "value")
        }
    role = given.get("role")
    kept = {key: value for key, value in given.items() if value is not None or key in ("role", "content")}
    return kept | {"role": ROLES.get(str(role).lower(), role)}


def with_trl_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Alpaca, sharegpt and question/answer rows as `messages`; every other row as it is."""
    if "conversations" in row and "messages" not in row:
        turns = row["conversations"]
        messages = [turn(t) for t in turns] if isinstance(turns, list) else turns
        if isinstance(row.get("system"), str) and row["system"] and isinstance(messages, list):
            messages = [{"role": "system", "content": row["system"]}, *messages]
        return {k: v for k, v in row.items() if k not in ("conversations", "system")} | {"messages": messages}
    pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
    if pair is None or ("prompt" not in pair and any(column in row for column in COLUMNS)):
        return row
    question, answer = row[pair[0]], row[pair[1]]
    extra = row.get("input") if pair[0] == "instruction" else None
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for before in row.get("history") or []:  # alpaca with turns: [[question, answer], ...]
        messages += [{"role": role, "content": c} for role, c in zip(("user", "assistant"), before, strict=False)]
    messages += [
        {"role": "user", "content": f"{question}\n\n{extra}" if extra else question},
        {"role": "assistant", "content": answer},
    ]
    used = {*pair, "input", "system", "history"}
    return {k: v for k, v in row.items() if k not in used} | {"messages": messages}


def problem_of(row: dict[str, Any]) -> str | None:
    """Why a row in TRL's columns teaches nothing, or teaches what nobody means; None for a good one."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        return _problem_of_turns(row["messages"])
    if isinstance(prompt, list) and isinstance(completion, list):
        return _problem_of_turns([*prompt, *completion]) or _problem_of_turns(completion)
    if "completion" in row:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return f"prompt is {_kind(prompt)}, completion {_kind(completion)}: not text"
        return None if completion.strip() else "empty answer"
    if "text" in row:
        text = row["text"]
        return f"text is {_kind(text)}" if not isinstance(text, str) else None if text.strip() else "empty text"
    return f"messages is {_kind(row.get('messages'))}: not a list"


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _problem_of_turns(turns: list[Any]) -> str | None:
    last = None
    num_answers = 0
    for given in turns:
        if not isinstance(given, dict) or not isinstance(given.get("role"), str):
            return "a turn without role"
        role, content = given["role"], given.get("content")
        has_tools = bool(given.get("tool_calls"))
        if not isinstance(content, (str, list)) and not has_tools:
            return f"{role} turn: content is {_kind(content)}"
        if role == "assistant":
            if last == "assistant":
                return "two assistant turns in a row"
            if not has_tools and not (content.strip() if isinstance(content, str) else content):
                return "empty answer"
            num_answers += 1
        last = role
    return None if num_answers else "no assistant turn"
