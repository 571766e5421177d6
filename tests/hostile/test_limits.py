"""Each limit of limits.py met: what is just below is read, what is above is one clear error."""

import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, normalizers

from qlora_lite.base import source, tensor_files
from qlora_lite.base.gguf_folder import convert_gguf
from qlora_lite.base.gguf_head import check_gguf_head
from qlora_lite.base.quantization import read_quant_state
from qlora_lite.base.source import find_base, read_config
from qlora_lite.data import csv_rows, json_stream
from qlora_lite.data.limited import Limits, TooMuch
from qlora_lite.data.rows import Conversation
from qlora_lite.data.tables import file_kind, open_table
from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import DataError, ModelError
from qlora_lite.files.json_text import parse_json
from qlora_lite.limits import ADAPTER_RANK, GGUF_KEYS, JSON_DEPTH, LAYERS, TEMPLATE_CHARS, TENSORS, VOCABULARY, WIDTH
from qlora_lite.merging.lora import read_adapter
from qlora_lite.model.load import load_tokenizer
from tests.data.tiny_tokenizer import CHATML, make_tokenizer
from tests.hostile.model_readers import write_tiny_gguf


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_nested_as_deep_as_allowed_is_read_and_one_deeper_is_not() -> None:
    assert parse_json(nested(JSON_DEPTH)) is not None
    assert parse_json(nested(3) + " " * 5) == parse_json(nested(3).encode()) == [[[]]]
    for text in (nested(JSON_DEPTH + 1), nested(JSON_DEPTH + 1).encode(), nested(100_000), '{"a": [' * 40 + "]}" * 40):
        with pytest.raises(ValueError, match=f"nested more than {JSON_DEPTH} levels deep"):
            parse_json(text)


def test_many_brackets_beside_each_other_are_not_deep() -> None:
    assert len(parse_json(f"[{', '.join(['[1, {}]'] * 1000)}]")) == 1000


def test_a_text_that_never_ends_is_refused_before_it_fills_the_memory(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(json_stream, "ROW_BYTES", 2**20)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a" * 10}, {"text": "b" * 2**22}]), encoding="utf-8")
    with pytest.raises(DataError, match="a single value of more than 1,048,576 bytes"):
        list(open_table(path, file_kind(path)).rows)


def test_a_row_of_endless_values_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(json_stream, "ROW_VALUES", 100)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a", "more": list(range(90))}]), encoding="utf-8")
    assert len(list(open_table(path, file_kind(path)).rows)) == 1
    path.write_text(json.dumps([{"text": "a", "more": list(range(110))}]), encoding="utf-8")
    with pytest.raises(DataError, match="more than 100 values in one row"):
        list(open_table(path, file_kind(path)).rows)


def test_a_csv_line_or_header_without_end_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(csv_rows, "ROW_BYTES", 50)
    monkeypatch.setattr(csv_rows, "COLUMNS", 5)
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "a" * 60, encoding="utf-8")
    with pytest.raises(DataError, match="a line of more than 50 characters"):
        list(open_table(path, "csv").rows)
    path.write_text("a,b,c,d,e,f\n", encoding="utf-8")
    with pytest.raises(DataError, match="6 columns, allowed 5"):
        open_table(path, "csv")


def config_folder(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("key", "largest"), [("num_hidden_layers", LAYERS), ("hidden_size", WIDTH), ("head_dim", WIDTH), ("vocab_size", VOCABULARY)]
)  # fmt: skip
@pytest.mark.parametrize("wrong", ["more", 0, -1, True, "16", 1.5, [4]])
def test_a_config_says_no_sizes_that_no_model_has(tmp_path: Path, key: str, largest: int, wrong: Any) -> None:
    assert read_config(config_folder(tmp_path, **{key: largest}))[key] == largest
    with pytest.raises(ModelError, match=f"{key}: expected a whole number from 1 to {largest:,}, got "):
        read_config(config_folder(tmp_path, **{key: largest + 1 if wrong == "more" else wrong}))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 8},
            "num_key_value_heads: 8 does not divide num_attention_heads, 4",
        ),
        ({"attention_dropout": float("nan")}, "attention_dropout: nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: inf"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_before_it_is_rehearsed(
    tmp_path: Path, wrong: Any, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        read_config(config_folder(tmp_path, **wrong))


def test_a_config_names_no_code_and_no_kernel_to_load(tmp_path: Path) -> None:
    foreign = {
        "auto_map": {"AutoConfig": "evil.Evil"},
        "attn_implementation": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "use_kernels": True,
    }
    assert read_config(config_folder(tmp_path, **foreign, hidden_size=64)) == {"model_type": "llama", "hidden_size": 64}


def test_json_of_a_model_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(source, "JSON_BYTES", 30)
    assert read_config(config_folder(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json: larger than 30 bytes"):
        read_config(config_folder(tmp_path, name="x" * 30))


def test_more_tensors_or_shards_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    save_file({f"t{n}": torch.ones(1) for n in range(5)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(tensor_files, "TENSORS", 4)
    with pytest.raises(ModelError, match="5 tensors; allowed: 4"):
        tensor_files.open_safetensors(tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    monkeypatch.setattr(tensor_files, "SHARDS", 2)
    index.write_text(json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(3)}}), encoding="utf-8")
    with pytest.raises(ModelError, match="3 weights in 3 files; allowed 4 in 2"):
        tensor_files.weight_files(tmp_path)


def test_a_safetensors_file_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for declared in (len(head), 2**62):
        path.write_bytes(struct.pack("<Q", declared) + head)
        with pytest.raises(ModelError, match=r"model\.safetensors: missing or damaged safetensors file"):
            tensor_files.open_safetensors(path)


def test_quantization_constants_of_another_size_never_reach_a_kernel() -> None:
    from qlora_lite.base.bnb import bitsandbytes

    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(64, 64), blocksize=64, quant_type="nf4")
    parts = {f"w.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    assert tuple(read_quant_state("w", packed, dict(parts)).shape) == (64, 64)
    for wrong in ({"w.absmax": parts["w.absmax"][:10]}, {"w.quant_map": parts["w.quant_map"][:3]}):
        with pytest.raises(ModelError, match="w: its quantization constants cannot be read"):
            read_quant_state("w", packed, parts | wrong)
    with pytest.raises(ModelError, match=r"they do not match a weight of shape \[64, 64\] in 1,024 bytes"):
        read_quant_state("w", packed[:1024], dict(parts))


def test_a_folder_of_pickled_weights_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = config_folder(tmp_path)
    assert find_base(str(folder), cache=tmp_path / "cache") == folder  # a config alone can be planned
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ModelError) as caught:
            find_base(str(folder), cache=tmp_path / "cache")
        text = str(caught.value)
        assert text.startswith(f"{folder}: has only pickled weights (") and "run code" in text
        assert "python -c " in text and f"save_pretrained('\"'\"'{folder}-safetensors'\"'\"')" in text
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    assert find_base(str(folder), cache=tmp_path / "cache") == folder


def test_pickled_factors_are_named_where_safetensors_are_missing(tmp_path: Path) -> None:
    write_adapter_config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"no such file; adapter_model\.bin is pickled, which is not supported"):
        read_adapter(tmp_path)


def write_adapter_config(folder: Path, **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, True, "4", 2.0, ADAPTER_RANK + 1, [4])),
        *(("lora_alpha", value) for value in (0, -8, "8", None)),
        *(("rank_pattern", value) for value in ({"q_proj": 0}, {"q_proj": "4"}, [4], {"(a+)+$": 4}, {"[": 4}, {"x" * 501: 4})),
        *(("target_modules", value) for value in ("(.*a)*b", 3, ["q_proj", None], "[")),
        *(("trainable_token_indices", value) for value in ([1, 1], {"embed": [-1]}, {"embed": [VOCABULARY]}, 5)),
        ("megatron_config", {"a": 1}),
        ("use_rslora", "yes"),
        ("modules_to_save", "("),
    ],
)  # fmt: skip
def test_adapter_settings_that_are_malformed_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"settings that a merge does not support(.|\n)*{key}: "):
        read_adapter(write_adapter_config(tmp_path, **{key: value}))


def test_patterns_that_people_write_are_not_refused(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {r"^model\.layers\.\d+\.q_proj": 4},
        "target_modules": r"(?:.*?(?:model|text).*?(?:q_proj|v_proj))",
    }
    with pytest.raises(ModelError, match="missing or damaged safetensors file"):  # so the settings were accepted
        read_adapter(write_adapter_config(tmp_path, **patterns))


def test_a_gguf_says_no_more_than_its_file_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    check_gguf_head(path)
    data = path.read_bytes()
    key = data.index(b"general.name") + len(b"general.name")
    endless = struct.pack("<IIQ", 9, 0, 2**60)  # a list of 2**60 bytes
    deep = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000
    for wrong, said in {
        b"GGUF" + data[4:8] + struct.pack("<Q", TENSORS + 1) + data[16:]: "; allowed: ",
        data[:16] + struct.pack("<Q", GGUF_KEYS + 1) + data[24:]: "; allowed: ",
        data[:key] + endless + data[key + 16 :]: "more bytes, but only ",
        data[:key] + deep + data[key:]: "a list of lists",
        data[:4] + struct.pack("<I", 1) + data[8:]: "version 1; expected GGUF, version 2 or 3",
        data[:40]: "announces",
        data[:-100]: "a tensor of shape",
    }.items():
        path.write_bytes(wrong)
        begun = time.monotonic()
        with pytest.raises(ModelError, match=rf"tiny\.gguf: not a readable GGUF file .*{said}"):
            convert_gguf(path, cache=tmp_path / "cache")
        assert time.monotonic() - begun < 5


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "more than 0.3 s of processor time"),
        ("{{ 9 ** (9 ** 9) }}", "more than 0.3 s of processor time"),
        ("{{ 'a' * 10**12 }}", "more than 536,870,912 bytes of memory"),
    ],
)
def test_a_template_without_end_is_a_model_error_that_names_it(template: str, said: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("qlora_lite.data.template.TEMPLATE_SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(ModelError, match=f"tokenizer: the chat template takes {said}"):
        ChatTemplate(make_tokenizer(template + CHATML))
    assert time.monotonic() - begun < 10


def test_a_template_that_loops_on_one_row_stops_the_rows_behind_it_at_once(monkeypatch: Any) -> None:
    monkeypatch.setattr("qlora_lite.data.template.TEMPLATE_SECONDS", 0.3)
    template = ChatTemplate(make_tokenizer(f"{{% if messages[0].content == 'bad' %}}{LOOPS}{{% endif %}}{CHATML}"))
    answer = {"role": "assistant", "content": "x"}
    rows = [Conversation("r", ({"role": "user", "content": text}, answer)) for text in ("ok", "bad", "ok")]
    assert template.encode(rows[0])
    for row in rows[1:]:
        with pytest.raises(ModelError, match=r"row r: .*more than 0\.3 s of processor time"):
            template.encode(row)


def test_a_template_or_what_it_prints_may_not_be_huge(monkeypatch: Any) -> None:
    with pytest.raises(ModelError, match=f"allowed {TEMPLATE_CHARS:,}"):
        ChatTemplate(make_tokenizer(CHATML + "{# " + "x" * TEMPLATE_CHARS + " #}"))
    monkeypatch.setattr("qlora_lite.data.template.RENDERED_CHARS", 1000)
    with pytest.raises(ModelError, match="renders one conversation as 2,107 characters, allowed 1,000"):
        ChatTemplate(make_tokenizer("{{ 'a' * 2000 }}" + CHATML))


@pytest.mark.parametrize(
    "escape", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"]
)  # fmt: skip
def test_templates_are_rendered_in_the_immutable_sandbox(escape: str) -> None:
    with pytest.raises(ModelError, match="cannot render"):
        ChatTemplate(make_tokenizer(CHATML + escape))


def test_an_answer_with_no_token_before_it_is_a_model_error() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^b]"), "")  # of a prompt "a" nothing is left
    template = ChatTemplate(tokenizer)
    row = Conversation("r", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(ModelError, match="no token before the answer"):
        template.encode(row)


def test_code_in_a_tokenizers_folder_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: Any) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Evil: ...\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ModelError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "was-run").exists()


def test_what_a_function_raises_and_returns_passes_through_its_limits() -> None:
    limits = Limits(seconds=1, num_bytes=2**28)
    assert limits.run(lambda: 3) == 3
    with pytest.raises(KeyError):
        limits.run(lambda: {}["x"])
    with pytest.raises(TooMuch, match="memory"):
        limits.run(lambda: bytearray(2**40))
    assert limits.run(lambda: len(bytearray(2**26))) == 2**26  # the process is not limited any more than before


def test_a_process_that_has_grown_since_is_not_taken_for_a_greedy_function() -> None:
    limits = Limits(seconds=5, num_bytes=2**26)
    kept = bytearray(2**28)
    assert limits.run(lambda: len(bytearray(2**25))) == 2**25
    assert len(kept) == 2**28


def test_outside_of_the_main_thread_nothing_is_limited_and_nothing_breaks() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(Limits(seconds=0.01, num_bytes=1).run(lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]
