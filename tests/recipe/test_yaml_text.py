"""Whatever bytes a recipe holds, the answer is a RecipeError with a line, at once."""

import gzip
import pickle
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.errors import RecipeError
from qlora_lite.recipe import load_recipe, yaml_text

BOMB = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "gzip"])
def test_a_recipe_in_another_encoding_is_decoded_whole_and_that_is_said(tmp_path, encoding):
    path = tmp_path / "mine.yaml"
    text = "# fran\u00e7ais\nmethod: lora\n"
    path.write_bytes(gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding))
    recipe = load_recipe(path)
    assert recipe.method == "lora"
    assert any(note.why.startswith("the recipe is ") for note in recipe.notes) == (encoding != "utf-8-sig")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"null\n", "is empty"),
        (b"qlora\n", 'line 1  expected sections and keys such as method: qlora, got "qlora"'),
        (b"- method\n- qlora\n", "line 1  expected sections and keys"),
        (b"method: qlora\nlora: {r: 8\n", "line 3  not valid YAML"),
        (b"method: qlora\n\tlora: 8\n", "line 2  not valid YAML"),
        (b"lora:\n\tr: 8\n", "indent with spaces, not tabs"),
        (b"method: qlora\n---\nmethod: qlora\n", "line 2  a second document starts here"),
        (b"\xef\xbb\xbfmethod: qlora\n\xff\n", "line 2  byte 0xff is not UTF-8 text"),
        ("method: qlora\n".encode("utf-16-le"), "line 1  looks like UTF-16-LE without a byte order mark"),
        ("method: qlora\n".encode("utf-16")[:-1], "line 1  begins as UTF-16, but is not UTF-16 here"),
        (
            "method: qlora\n# fran\u00e7ais\n".encode("latin-1"),
            'line 2  byte 0xe7 is not UTF-8 text; probably Windows-1252 or Latin-1, where it is "\u00e7"',
        ),
        (b"\x7fELF\x01\x02", "line 1  character U+007F is not allowed in YAML"),
        (b"method: qlora\nlora: {r: \x00}\n", "line 2  contains zero bytes"),
        (pickle.dumps({"method": "qlora"}), "line 1  "),
        (BOMB.encode(), "line 1  anchors and aliases (&a, *a) are refused"),
        (b"method: *x\n", "line 1  anchors and aliases"),
        (b"a: &x {<<: *x}\n", "line 1  anchors and aliases"),
        (b"method: !!python/object/apply:os.system [echo]\n", "line 1  tags (tag:yaml.org,2002:python/object"),
        (b"method: !x y\n", "line 1  tags (!x) are refused"),
        (b"lora: {r: !!int x}\n", "line 1  tags"),
        (b"[" * 100_000, "line 1  nested more than 16 levels deep"),
        (b"{a: " * 100_000, "line 1  nested more than 16 levels deep"),
        (b"- " * 100_000, "line 1  nested more than 16 levels deep"),
        (b"\n".join(b" " * n + b"a:" for n in range(1000)), "line 17 nested more than 16 levels deep"),
        (b"? " * 100_000, "line 1  "),
        (b"#" * (2**20 + 1), "larger than 1,048,576 bytes"),
        (b"a: [" + b"1," * 500_000 + b"]", "more than 20,000 values"),
        (b"? [a, b]\n: c\n", "line 1  a key must be a word"),
        (b'method: "\\UFFFFFFFF"\n', "line 1  not valid YAML"),
        (b'method: "\\q"\n', "line 1  not valid YAML"),
        (b"%YAML 9.9\n---\nmethod: qlora\n", "line 1  not valid YAML"),
    ],
)
def test_a_hostile_or_broken_file_is_refused_with_its_line_and_at_once(tmp_path, data, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert time.monotonic() - start < 10
    (problem,) = caught.value.problems
    assert expected in problem
    assert problem.isprintable()


def test_thousands_of_unknown_keys_are_all_reported(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text("".join(f"key_{n}: 1\n" for n in range(2000)))
    with pytest.raises(RecipeError, match="has 2000 problems"):
        load_recipe(path)


def test_a_recipe_in_any_language_and_line_ending_is_read(tmp_path):
    path = tmp_path / "ü.yaml"
    path.write_bytes("\ufeff# Größe 大\r\ndata: {no_answer_text: keine Antwort 🙂}\r\n".encode())
    assert load_recipe(path).data.no_answer_text == "keine Antwort 🙂"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("16", 16),
        ("010", 10),
        ("+1", 1),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("e5", "e5"),
        ("nan", "nan"),
        ("16x", "16x"),
        ("٣", "٣"),
    ],
)
def test_plain_words_and_numbers_mean_what_yaml_1_2_says(text, value):
    found = yaml_text.parse(f"key: {text}\n").value.items[0][1].value
    assert found == value and type(found) is type(value)


def test_quoted_text_stays_text():
    node = yaml_text.parse("a: \"2e-4\"\nb: 'null'\nc: |\n  true\n").value
    assert [inner.value for _, inner in node.items] == ["2e-4", "null", "true\n"]


def test_pyyaml_still_reads_2e_4_as_text_which_is_why_we_do_not_use_its_numbers():
    assert yaml.safe_load("2e-4") == "2e-4"


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text("a:{}[]-?!&*#|>%@`'\" \n\t\\,1e.~\x00é", max_size=60).map(str.encode))
)
def test_any_bytes_are_read_or_refused_and_nothing_else(data):
    try:
        yaml_text.parse(yaml_text.decode(data)[0])
    except yaml_text.YamlProblem as problem:
        assert problem.line >= 1
