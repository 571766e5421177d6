"""What users' files are like: encodings, odd rows, headers, delimiters, JSON of several shapes, flags of turns, ids that repeat."""

import gzip
import json

import pytest

from qlora_lite.data.read import file_identity, find_format, read_mix
from qlora_lite.errors import DataError

ROWS = [{"question": f"What is {i}?", "answer": f"{i} €"} for i in range(100)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
CSV = ["question,answer", *(f"{row['question']},{row['answer']}" for row in ROWS)]


def pairs(mix):
    return [tuple(message["content"] for message in row.messages) for row in mix]


WANTED = [tuple(row.values()) for row in ROWS]
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": "10 €",
                    "qas": [{"id": 1, "question": "How?", "answers": [{"text": "€", "answer_start": 3}]}],
                }
            ]
        }
    ]
}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "gzip"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
def test_rows_in_another_encoding_are_the_same_rows_and_it_is_said(write, name, encoding):
    text = "\n".join(CSV if name == "rows.csv" else LINES) if name != "rows.json" else f"[{', '.join(LINES)}]"
    data = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    mix = read_mix(write(data, name))
    assert pairs(mix) == WANTED and mix.num_bad == 0
    assert len(mix.notes) == (encoding != "utf-8-sig")
    assert all("byte order mark" in note or "unpacked" in note for note in mix.notes)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_nested_questions_in_another_encoding_are_decoded_whole(write, encoding):
    mix = read_mix(write(json.dumps(SQUAD, ensure_ascii=False).encode(encoding)))
    assert [(row.context, row.answers) for row in mix] == [("10 €", ("€",))]
    assert "byte order mark" in mix.notes[0]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "cp1252"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "squad.json"])
def test_a_file_in_an_unmarked_encoding_is_refused_with_its_name_and_line(write, name, encoding):
    text = "\n".join(CSV if name.endswith("sv") else LINES)
    text = f"[{', '.join(LINES)}]" if name == "rows.json" else text
    text = json.dumps(SQUAD, ensure_ascii=False) if name == "squad.json" else text
    with pytest.raises(DataError) as caught:
        read_mix(write(text.encode(encoding), name))
    assert ("Windows-1252" if encoding == "cp1252" else encoding.upper()) in str(caught.value)
    assert ("line 2" if name.endswith("sv") and encoding == "cp1252" else "line 1") in str(caught.value)


def test_a_name_with_gz_is_the_kind_of_the_name_before_it(write):
    path = write(gzip.compress("\n".join(CSV).encode()), "rows.csv.gz")
    assert pairs(read_mix(path)) == WANTED
    assert file_identity(path)[0] == ".csv"


ODD = {
    "lacks a column": {"question": "only this?"},
    "has another column": {"question": "What?", "answer": "That", "context": "As is known", "messages": []},
    "is empty": {},
    "is a number": 5,
    "is blank": {"question": "What?", "answer": "  "},
    "has other columns": {"instruction": "a", "output": "b"},
    "has a key twice": '{"question": "What?", "answer": "1", "answer": "2"}',
}


@pytest.mark.parametrize("where", [0, 50, 100])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_one_odd_row_of_a_hundred_and_one_changes_nothing_for_the_others(write, name, odd, where):
    row = ODD[odd] if isinstance(ODD[odd], str) else json.dumps(ODD[odd])
    lines = [*LINES[:where], row, *LINES[where:]]
    mix = read_mix(write("\n".join(lines) if name == "rows.jsonl" else f"[{', '.join(lines)}]", name))
    assert mix.format == "prompt_completion"
    is_usable = odd == "has another column"
    assert (mix.num_rows, mix.num_bad) == (100 + is_usable, not is_usable)
    assert [pair for pair in pairs(mix) if pair in WANTED] == WANTED
    place = f"line {where + 1}" if name == "rows.jsonl" else f"row {where + 1}"
    assert all(bad.startswith(f"{place}: ") for bad in mix.bad)


def test_many_odd_rows_at_the_beginning_are_named_and_the_file_is_read(write):
    lines = [*(["[1]", '{"question": "a"}', "{"] * 100), *LINES * 200]
    mix = read_mix(write("\n".join(lines), "rows.jsonl"))
    assert (mix.num_rows, mix.num_bad) == (20_000, 300)


def test_a_column_that_is_blank_in_nearly_every_row_does_not_choose_the_format(write):
    csv = [
        "question,answer,context",
        *(f"{row['question']},{row['answer']}," for row in ROWS),
        "Where?,Here,It is here.",
    ]
    mix = read_mix(write("\n".join(csv), "rows.csv"))
    assert (mix.format, mix.num_rows, mix.num_bad) == ("prompt_completion", 101, 0)


def test_rows_that_lack_an_answer_everywhere_are_told_by_their_columns(write):
    rows = [{"context": "a", "question": f"{i}?", "answer": "", "is_impossible": True} for i in range(3)]
    assert read_mix(write(rows)).format == "squad"


@pytest.mark.parametrize(
    ("header", "delimiter", "said"),
    [
        ("question;answer", ";", "cells are separated by semicolons"),
        ("question\tanswer", "\t", "cells are separated by tabs"),
        ("question|answer", "|", "cells are separated by vertical bars"),
        ("id;QUESTION; Answer", ";", '"QUESTION" as question, " Answer" as answer'),
        ('sep=;\n"question";"answer"', ";", 'the line "sep=;" names the delimiter'),
        ("SEP=,\r\nquestion,answer", ",", 'the line "sep=," names the delimiter'),
        ("\n\nquestion,answer", ",", ""),
        ("Question,Answer", ",", '"Question" as question, "Answer" as answer'),
        (",question,answer", ",", "columns without a name in the header are not read: 1"),
        ("question,answer,", ",", "columns without a name in the header are not read: 3"),
    ],
)
def test_a_csv_file_tells_its_delimiter_and_columns(write, header, delimiter, said):
    names = header.splitlines()[-1].split(delimiter)
    cells = {"question": "a, b; c", "answer": "d"}
    row = delimiter.join('"' + cells.get(name.strip().strip('"').lower(), "") + '"' for name in names)
    mix = read_mix(write(f"{header}\n{row}\n", "rows.csv"))
    assert pairs(mix) == [("a, b; c", "d")]
    assert said in " ".join(mix.notes) and len(mix.notes) <= 2


def test_a_tsv_file_with_commas_is_read_by_its_header(write):
    mix = read_mix(write("\n".join(CSV), "rows.tsv"))
    assert pairs(mix) == WANTED and "separated by commas" in mix.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,answer,answer\na,b,c\n", 'line 1: the header names "answer" (columns 2 and 3) more than once'),
        ("question,answer, answer\na,b,c\n", '"answer" (columns 2 and 3)'),
        ("sep=;\nx;question;x\na;b;c\n", 'line 2: the header names "x" (columns 1 and 3)'),
        ("Question,QUESTION,answer\na,b,c\n", '"Question", "QUESTION" differ only in capitals or spaces'),
        ("a?,b\nc?,d\n", "The first line of a csv file must name its columns"),
        ('question,answer\n"a" b,c\n', "row 1: line 2: wrong quotes"),
        ('question,answer\na,b\n"open,1\nc,d\n"e",f\n', "line 3: a quote that opens in this row is not closed"),
        ('question,answer\na,b\n"open,1\n', "line 3: a quote that opens in this row is not closed"),
        ("\n\n", "no header"),
        (";;\n", "no column has a name"),
    ],
)
def test_a_csv_file_whose_meaning_is_not_plain_is_refused_with_the_line_and_the_way(write, text, said):
    with pytest.raises(DataError) as caught:
        read_mix(write(text, "rows.csv"))
    assert said in str(caught.value)


def test_one_wrong_quote_in_a_hundred_and_one_rows_is_a_bad_row(write):
    mix = read_mix(write("\n".join([*CSV[:40], '"a" b,c', *CSV[40:]]), "rows.csv"))
    assert (mix.num_rows, mix.num_bad) == (100, 1)
    assert mix.bad[0].startswith("row 40: line 41: wrong quotes")
    assert pairs(mix) == WANTED


def columns_of(rows):
    return {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"data": ROWS}, "the list inside its one JSON object"),
        ({"version": 1, "info": {"a": [1]}, "train": ROWS}, "the list inside its one JSON object"),
        ({"schema": {"fields": [{"name": "x"}]}, "data": ROWS}, "the list inside its one JSON object"),
        (columns_of(ROWS), "read by columns"),
        ({name: [row[name] for row in ROWS] for name in ROWS[0]}, "read by columns"),
        ({"columns": ["question", "answer"], "index": [], "data": [list(row.values()) for row in ROWS]}, "split"),
        ({str(i): row for i, row in enumerate(ROWS)}, "index"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_of_another_plain_shape_is_read_and_it_is_said(write, document, said, indent, name):
    mix = read_mix(write(json.dumps(document, indent=indent), name))
    assert pairs(mix) == WANTED
    assert said in mix.notes[0]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_rows_over_several_lines_are_read(write, name):
    mix = read_mix(write("\n".join(json.dumps(row, indent=2) for row in ROWS), name))
    assert pairs(mix) == WANTED and mix.notes == (f"{name}: read as a sequence of JSON objects",)
    assert pairs(read_mix(write(json.dumps(ROWS, indent=2), name))) == WANTED
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert pairs(read_mix(write(json.dumps(talk, indent=2), name))) == [("a", "b")]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"train": ROWS, "test": ROWS}, 'several lists of rows, "train" and "test"'),
        ({"question": {"0": "a", "1": "b"}, "answer": {"0": "c"}}, '"answer" has fewer values'),
        ({"question": {"0": "a"}, "answer": {"7": "c"}}, "different row numbers"),
        ({"question": ["a", "b"], "answer": ["c"]}, '"answer" has fewer values'),
        ([["a", "b"]] * 3, 'df.to_json(path, orient="records", lines=True)'),
        (
            {"question": {"0": "a"}, "answer": {"0": "c"}} | {f"x{i}": {"0": 1} for i in range(64)},
            "more than 64 columns",
        ),
    ],
)
def test_json_whose_meaning_is_not_plain_is_refused_with_the_way(write, document, said):
    with pytest.raises(DataError) as caught:
        read_mix(write(document))
    assert said in str(caught.value)


def talk(format, **flags):
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f"turn {i}"} | (flags if i == 1 else {}) for i, role in enumerate(roles)]
    if format == "chat":
        return {"messages": turns}
    renamed = [{"from": turn.pop("role"), "value": turn.pop("content")} | turn for turn in turns]
    return {"conversations": renamed}


@pytest.mark.parametrize("format", ["chat", "sharegpt"])
@pytest.mark.parametrize(
    "flag",
    [
        {"train": False}, {"train": "false"}, {"train": 0}, {"training": "False"}, {"trainable": 0.0}, {"learn": "no"},
        {"loss": False}, {"train_on_turn": False}, {"weight": 0}, {"masked": True}, {"train": False, "weight": 0},
    ],
)  # fmt: skip
def test_a_turn_that_a_flag_leaves_out_is_not_trained_and_it_is_said(write, format, flag):
    mix = read_mix(write([talk(format, **flag)] * 3))
    assert [row.trained_turns for row in mix] == [[3]] * 3
    assert not any(key in message for row in mix for message in row.messages for key in flag if key != "weight")
    assert f'turns not trained because of "{next(iter(flag))}": 3' in mix.notes[0]


@pytest.mark.parametrize("format", ["chat", "sharegpt"])
@pytest.mark.parametrize(
    "flag", [{"train": True}, {"train": "true"}, {"weight": 1.0}, {"masked": False}, {"loss": None}]
)
def test_a_flag_that_keeps_a_turn_changes_nothing(write, format, flag):
    mix = read_mix(write([talk(format, **flag)]))
    assert [row.trained_turns for row in mix] == [[1, 3]] and mix.notes == ()


def test_flags_that_do_not_count_are_said_and_wrong_ones_are_bad_rows(write):
    mix = read_mix(write([talk("chat", compute_loss=False, train_detail=[])]))
    assert [note.partition(": ")[2][:36] for note in mix.notes] == [
        'turns with the key "compute_loss": 1',
        'turns with the key "train_detail": 1',
    ]
    user = {"messages": [{"role": "user", "content": "a", "train": True}, {"role": "assistant", "content": "b"}]}
    assert "only the model's turns are trained" in read_mix(write([user])).notes[0]
    for flags, said in (
        ({"train": "perhaps"}, "messages[1].train: expected 1, or 0 for a message that is not trained, got perhaps"),
        ({"weight": 1, "train": False}, "messages[1]: weight and train contradict each other"),
        ({"masked": 2}, "messages[1].masked: expected false, or true"),
    ):
        with pytest.raises(DataError) as caught:
            read_mix(write([talk("chat", **flags)]))
        assert said in str(caught.value)


def test_a_refusal_says_what_the_rows_are_read_as(write):
    mixed = [{"instruction": "a", "output": "b"}] * 6 + ROWS[:5]
    with pytest.raises(DataError, match="It is read as alpaca, because it has the columns instruction, output"):
        read_mix(write(mixed))
    assert find_format(write(mixed), format="auto")[0] == "alpaca"


@pytest.mark.parametrize("padding", [0, 2**20 - 30, 2**20 - 24, 2**20 - 18])
def test_half_of_a_surrogate_pair_is_a_bad_row_in_every_json_file_and_never_a_question_mark(write, padding):
    halves = ["\\ud83d", "\\udc2a", "\\ud83d x", "\\ud83d\\ud83d\\udc2a"]
    whole = ["\\ud83d\\udc2a", "\\\\ud83d", "\\uD83D\\uDC2A\\n", "\\u00e9"]
    for text in (*halves, *whole):
        rows = [f'{{"question": "{"x" * padding}{text}?", "answer": "1"}}', *LINES]
        for content, name in ((f"[{', '.join(rows)}]", "rows.json"), ("\n".join(rows), "rows.jsonl")):
            if padding and name == "rows.jsonl":
                continue
            mix = read_mix(write(content, name))
            assert (mix.num_rows, mix.num_bad) == ((100, 1) if text in halves or padding > 10**6 else (101, 0)), text
            if text in whole and not padding:
                assert pairs(mix)[0][0] == json.loads(f'"{text}?"')
