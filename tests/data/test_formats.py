"""Six formats: found by their columns, read into conversations, questions and documents, bad rows told why."""

import json

import pytest

from qlora_lite.data.formats import FORMATS, find_columns, read_row, unused_columns
from qlora_lite.data.rows import BadRow, Conversation, Document, QuestionRow


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


WITH_SYSTEM = (system("s"), user("a"), assistant("b"))
TALK = [user("a"), assistant("b"), user("c"), assistant("d")]
SHAREGPT = [
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
    {"from": "human", "value": "c"},
    {"from": "gpt", "value": "d"},
]
SQUAD = {"context": "The Nile flows.", "question": "Which river?"}
QUESTION = QuestionRow("7", "The Nile flows.", "Which river?", ("The Nile",), 0)

GOOD = [
    ("chat", {"messages": TALK}, Conversation("7", tuple(TALK))),
    ("chat", {"messages": [system(""), *TALK]}, Conversation("7", (system(""), *TALK))),
    ("chat", {"messages": [*TALK, user("left over")]}, Conversation("7", tuple(TALK))),
    ("sharegpt", {"conversations": SHAREGPT}, Conversation("7", tuple(TALK))),
    ("sharegpt", {"conversations": SHAREGPT, "system": "s"}, Conversation("7", (system("s"), *TALK))),
    ("prompt_completion", {"prompt": "a", "completion": "b"}, Conversation("7", (user("a"), assistant("b")))),
    ("prompt_completion", {"question": "a", "answer": "b"}, Conversation("7", (user("a"), assistant("b")))),
    ("prompt_completion", {"prompt": TALK[:3], "completion": TALK[3:]}, Conversation("7", tuple(TALK), first_trained=3)),
    ("prompt_completion", {"prompt": TALK[:3], "completion": "d"}, Conversation("7", tuple(TALK), first_trained=3)),
    ("prompt_completion", {"prompt": "a", "completion": "b", "system": "s"}, Conversation("7", WITH_SYSTEM, first_trained=2)),
    ("prompt_completion", {"prompt": "a", "completion": "b", "context": "c"}, Conversation("7", (user("c\n\na"), assistant("b")))),
    ("prompt_completion", {"prompt": "a", "completion": "b", "context": " "}, Conversation("7", (user("a"), assistant("b")))),
    ("chat", {"messages": [user("a"), assistant("b", weight=1)]}, Conversation("7", (user("a"), assistant("b")))),
    ("alpaca", {"instruction": "c", "output": "d", "history": [["a", "b"]]}, Conversation("7", tuple(TALK))),
    ("alpaca", {"instruction": "a", "output": "b", "history": []}, Conversation("7", (user("a"), assistant("b")))),
    ("alpaca", {"instruction": "a", "input": "", "output": "b"}, Conversation("7", (user("a"), assistant("b")))),
    ("alpaca", {"instruction": "a", "input": "i", "output": "b"}, Conversation("7", (user("a\n\ni"), assistant("b")))),
    ("alpaca", {"instruction": "a", "output": "b", "system": "s"}, Conversation("7", WITH_SYSTEM)),
    ("text", {"text": "Once upon a time"}, Document("7", "Once upon a time")),
    ("squad", {**SQUAD, "answers": {"text": ["The Nile"], "answer_start": [0]}}, QUESTION),
    ("squad", {**SQUAD, "answers": [{"text": "The Nile", "answer_start": 3}]}, QUESTION),
    ("squad", {**SQUAD, "answers": ["The Nile"]}, QUESTION),
    ("squad", {**SQUAD, "answer": "The Nile"}, QUESTION),
    ("squad", {**SQUAD, "answers": {"text": [], "answer_start": []}}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answers": [], "is_impossible": True}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answer": "", "is_impossible": True}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answers": None, "is_impossible": True}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answers": ["The Nile"], "is_impossible": False}, QUESTION),
    ("squad", {**SQUAD, "answers": '["The Nile"]'}, QUESTION),
    ("squad", {**SQUAD, "answers": '{"text": ["The Nile"], "answer_start": [0]}'}, QUESTION),
    ("squad", {**SQUAD, "answers": '[{"text": "The Nile", "answer_start": 0}]', "is_impossible": "False"}, QUESTION),
    ("squad", {**SQUAD, "answers": "The Nile", "is_impossible": ""}, QUESTION),
    ("squad", {**SQUAD, "answers": ""}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answers": '{"text": [], "answer_start": []}'}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {**SQUAD, "answer": "", "is_impossible": "True"}, QuestionRow("7", *SQUAD.values(), ())),
    ("squad", {"context": "As in [3].", "question": "a", "answers": "[3]"}, QuestionRow("7", "As in [3].", "a", ("[3]",), 6)),
    ("squad", {"context": "As in [b].", "question": "a", "answers": "[b]"}, QuestionRow("7", "As in [b].", "a", ("[b]",), 6)),
    ("chat", {"messages": json.dumps(TALK)}, Conversation("7", tuple(TALK))),
    ("sharegpt", {"conversations": json.dumps(SHAREGPT)}, Conversation("7", tuple(TALK))),
    ("alpaca", {"instruction": "c", "output": "d", "history": '[["a", "b"]]'}, Conversation("7", tuple(TALK))),
]  # fmt: skip


@pytest.mark.parametrize(("format", "values", "row"), GOOD)
def test_the_format_is_found_from_the_columns_and_read(format, values, row):
    assert find_columns(list(values), format="auto")[0] == format
    assert read_row(format, values | {"id": 7}, "line 3") == read_row(format, values | {"id": "7"}, "line 3") == row
    assert read_row(format, values, "line 3").id == read_row(format, values | {"id": " "}, "line 3").id == "line 3"


def test_every_format_is_tried_above():
    assert {format for format, _, _ in GOOD} == set(FORMATS)


def test_calls_of_tools_are_read_as_chat_templates_expect_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    schema = {"type": "function", "function": {"name": "f"}}
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": ""},
        assistant("b"),
    ]
    for tools in ([schema], '[{"type": "function", "function": {"name": "f"}}]'):
        row = read_row("chat", {"messages": messages, "tools": tools}, "line 1")
        assert row.tools == (schema,)
        assert row.messages[1]["content"] == "" and row.messages[1]["tool_calls"][0]["function"]["arguments"] == {
            "x": 1
        }
        assert row.trained_turns == [1, 3]


@pytest.mark.parametrize("format", ["chat", "sharegpt"])
def test_a_message_of_weight_0_is_not_trained_but_seen_by_those_behind_it(format):
    def row(*weights):
        answers = iter(weights)
        talk = [m | ({"weight": next(answers)} if m["role"] == "assistant" else {}) for m in TALK]
        turns = [{"from": m["role"], "value": m["content"], "weight": m.get("weight")} for m in talk]
        return read_row(format, {"messages": talk} if format == "chat" else {"conversations": turns}, "line 1")

    assert (row(1, 1).trained_turns, row(0, 1).trained_turns, row(1, 0).trained_turns) == ([1, 3], [3], [1])
    assert row(1, 1).messages == tuple(TALK)
    assert [message["content"] for message in row(0, 1).messages] == ["a", "b", "c", "d"]
    assert row(1, 0).messages == tuple(TALK[:2]), "what follows the last trained message is seen by none"
    assert "no assistant message after another message and a weight other than 0" in row(0, 0).reason


def test_columns_that_are_not_read_are_known():
    for format, columns, unused in (
        ("auto", ["id", "context", "question", "answers", "title", "is_impossible"], ("title",)),
        ("auto", ["messages", "system", "tools", "source"], ("source",)),
        ("prompt_completion", ["prompt", "completion", "context", "question", "answer"], ("question", "answer")),
        ("auto", ["instruction", "input", "output", "history", "text"], ("text",)),
        ("auto", ["text", "meta", "id"], ("meta",)),
    ):
        assert unused_columns(columns, format=format) == unused


def test_a_function_call_of_sharegpt_is_a_message_with_tool_calls():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [SHAREGPT[0], {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "2"}]
    row = read_row("sharegpt", {"conversations": [*turns, SHAREGPT[3]]}, "line 1")
    assert row.messages == (
        user("a"),
        assistant("", tool_calls=[{"type": "function", "function": call}]),
        {"role": "tool", "content": "2"},
        assistant("d"),
    )
    assert row.trained_turns == [1, 3]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = read_row("chat", {"messages": [user(parts), assistant("c")]}, "line 1")
    assert row.messages[0] == user("ab")


def called(value):
    return [SHAREGPT[0], {"from": "function_call", "value": value}]


BAD = [
    ("chat", {"messages": "a"}, "messages: expected a list of messages, got text"),
    ("chat", {"messages": "[{"}, "messages: not JSON"),
    ("sharegpt", {"conversations": called("f()")}, "conversations[1].value: not JSON"),
    ("sharegpt", {"conversations": called("[]")}, "conversations[1].value: expected a call"),
    ("sharegpt", {"conversations": called("{}")}, "tool_calls[0]: expected an object with function.name"),
    ("squad", {**SQUAD, "answers": "", "is_impossible": "false"}, "no answers, but is_impossible is not true"),
    ("squad", {**SQUAD, "answers": "The Nile", "is_impossible": "perhaps"}, "is_impossible: expected true or false, got text"),
    ("chat", {"messages": []}, "no assistant message after another message"),
    ("chat", {"messages": [user("a")]}, "no assistant message after another message"),
    ("chat", {"messages": [assistant("a")]}, "no assistant message after another message"),
    ("chat", {"messages": [user("a"), assistant(" ")]}, "messages[1].content: empty"),
    ("chat", {"messages": [user("a"), assistant(5)]}, "messages[1].content: expected text, got a number"),
    ("chat", {"messages": [user("a"), 5]}, "messages[1]: expected an object with role and content, got a number"),
    ("chat", {"messages": [user("a"), {"role": "bot", "content": "b"}]}, 'messages[1].role: expected one of system'),
    ("chat", {"messages": [user([{"type": "image"}]), assistant("b")]}, "only parts of type text are supported, got image"),
    ("chat", {"messages": [user("a"), assistant("", tool_calls=[{"x": 1}])]}, "tool_calls[0]: expected an object with function.name"),
    ("chat", {"messages": [user("a"), assistant("", tool_calls={"x": 1})]}, "tool_calls: expected a list, got an object"),
    ("chat", {"messages": TALK, "tools": "{"}, "tools: not JSON"),
    ("chat", {"messages": [user("a"), assistant("b", weight=0.5)]}, "weight: expected 1, or 0 for a message that is not trained, got 0.5"),
    ("prompt_completion", {"prompt": TALK[:1], "completion": "b", "context": "c"}, "context: needs prompt as text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]: expected [instruction, answer]"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, "history: expected a list of [instruction, answer], got text"),
    ("squad", {**SQUAD, "answers": ["The Nile"], "is_impossible": True}, "is_impossible is true, but there are 1 answers"),
    ("squad", {**SQUAD, "answers": [], "is_impossible": False}, "no answers, but is_impossible is not true"),
    ("squad", {**SQUAD, "answers": [], "is_impossible": 5}, "is_impossible: expected true or false, got a number"),
    ("chat", {"messages": TALK, "tools": {"a": 1}}, "tools: expected a list of JSON schemas, got an object"),
    ("chat", {"messages": [user("\ud800"), assistant("b")]}, "messages[0].content: contains half of a surrogate pair"),
    ("sharegpt", {"conversations": {}}, "conversations: expected a list, got an object"),
    ("sharegpt", {"conversations": [{"from": ["x"], "value": "a"}]}, "expected one of system"),
    ("sharegpt", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "conversations[0].content: empty"),
    ("prompt_completion", {"prompt": "", "completion": "b"}, "prompt: empty"),
    ("prompt_completion", {"prompt": "a", "completion": None}, "completion: missing"),
    ("prompt_completion", {"question": "a", "answer": ["b"]}, "answer[0]: expected an object with role and content, got text"),
    ("alpaca", {"instruction": "a", "output": ""}, "output: empty"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 5}, "input: expected text, got a number"),
    ("text", {"text": " \n"}, "text: empty"),
    ("squad", {**SQUAD, "answers": {"text": ["Cairo"], "answer_start": [0]}}, '"Cairo" does not occur in the context'),
    ("squad", {**SQUAD, "answer": ""}, "answers[0].text: empty"),
    ("squad", {**SQUAD, "answers": None}, "answers: expected a list, got nothing"),
    ("squad", {"context": "", "question": "a", "answers": []}, "context: empty"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "values", "reason"), BAD)
def test_a_row_that_cannot_be_used_says_why(format, values, reason):
    row = read_row(format, values, "line 3")
    assert isinstance(row, BadRow)
    assert row.name == "line 3" and reason in row.reason
    assert read_row(format, values | {"id": "x"}, "line 3").name == 'id "x"'


def test_a_missing_column_names_the_columns_that_are_there():
    said = find_columns(["instruction", "response"], format="alpaca")
    assert said == 'missing column "output": alpaca needs instruction, output. The file has: instruction, response'
    said = find_columns(["question"], format="prompt_completion")
    assert said.startswith('missing column "answer": prompt_completion needs prompt, completion or question, answer')
    said = find_columns(["instruction", "response"], format="auto")
    assert said.startswith(
        "no format has these columns: instruction, response. Known formats: squad: context, question, answers"
    )


def test_a_named_format_wins_over_what_the_columns_look_like():
    columns = ["messages", "text", "question", "answer", "context"]
    assert find_columns(columns, format="auto")[0] == "squad"
    for format, wanted in (("text", ("text",)), ("chat", ("messages",)), ("prompt_completion", ("question", "answer"))):
        assert find_columns(columns, format=format) == (format, wanted)
