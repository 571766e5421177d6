"""Readers of model folders: config.json, tokenizer, chat template, safetensors and their index, GGUF."""

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gguf
import jinja2
import jinja2.ext
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.base.gguf_folder import convert_gguf
from qlora_lite.base.published import open_tensors
from qlora_lite.base.quantization import stored_quantization
from qlora_lite.base.skeleton import empty_model
from qlora_lite.base.source import context_window, find_base, load_config, read_config
from qlora_lite.data.rows import Conversation
from qlora_lite.data.template import ChatTemplate, tokenizer_identity
from qlora_lite.merging.checkpoint import open_checkpoint
from qlora_lite.model.load import load_base, load_tokenizer
from qlora_lite.plan import forecast, read_request
from tests.architectures import PUBLISHED
from tests.data.tiny_tokenizer import CHATML, make_tokenizer
from tests.hostile.mutations import mutate_bytes, mutate_json, mutate_keys, mutate_text
from tests.hostile.reader import Reader, is_json, spread
from tests.tiny_model import SIZES, tiny_artefact, tiny_source

_CONFIG_VALUES = (
    *("llama", "gpt2", "mamba", "bloom", "falcon", "gemma3", "sdpa", "eager", "flash_attention_2", "kernels-community/flash-attn"),
    *("float16", "auto", "int8", "yarn", "llama3", "longrope", "dynamic", "sliding_attention", "silu", "gelu"),
    *({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 1.0}),
    *(10**9, 10**12, 2**31 - 1, 64, 3, 1e-5, ["full_attention"] * 2, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    *({"quant_method": "gptq", "bits": 4}, {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}),
)  # fmt: skip
_CONFIG_KEYS = (
    *("auto_map", "attn_implementation", "_attn_implementation", "rope_scaling", "layer_types", "head_dim"),
    *("quantization_config", "pad_token_id", "use_kernels"),
)
_CONVERSATIONS = (
    Conversation("a", ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})),
    Conversation(
        "b",
        (
            {"role": "system", "content": "Be brief."},
            *({"role": role, "content": role} for _ in range(2) for role in ("user", "assistant")),
        ),
        tools=({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},),
    ),
)


def _config_seeds(_: Path) -> list[dict[str, Any]]:
    own = json.loads((tiny_source() / "config.json").read_text(encoding="utf-8"))
    quantized = json.loads((tiny_artefact() / "config.json").read_text(encoding="utf-8"))
    return [own, quantized, *({"vocab_size": 320, **one.config} for one in PUBLISHED.values())]


def _write_config(seed: dict[str, Any], folder: Path, rng: Random | None) -> None:
    text = json.dumps(seed)
    if rng is not None and rng.random() < 0.3:
        seed = {**seed, rng.choice(_CONFIG_KEYS): rng.choice(_CONFIG_VALUES)}
    if rng is not None:
        text = mutate_json(seed, rng, values=_CONFIG_VALUES)
    data = text.encode("utf-8", "surrogatepass")
    (folder / "config.json").write_bytes(mutate_bytes(data, rng) if rng and rng.random() < 0.15 else data)


def _read_config(folder: Path) -> object:
    find_base(str(folder), cache=folder / "cache")
    config = load_config(folder)
    return context_window(config), empty_model(config), stored_quantization(read_config(folder), folder)


def _plan(folder: Path) -> object:
    found = read_request(str(folder))
    return forecast(
        found.rehearsals, found.chosen, found.leanest, found.room, method=found.method, merging=found.merging
    )


def _folder_seeds(_: Path) -> list[dict[str, bytes]]:
    return [files_of(tiny_source()), files_of(tiny_artefact())]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write_files(seed: dict[str, bytes], folder: Path) -> None:
    for name, data in seed.items():
        (folder / name).write_bytes(data)


def _write_generation(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    document: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.7, "top_p": 0.9,
                "max_new_tokens": 20}  # fmt: skip
    values = ({"AutoModel": "evil.Evil"}, "static", "evil/custom_generate", ["a"], {"cache_implementation": "x"})
    if rng is not None:
        keys = ("cache_config", "custom_generate", "watermarking_config", "compile_config", "stop_strings")
        document[rng.choice(keys)] = rng.choice(values)
    text = json.dumps(document) if rng is None else mutate_json(document, rng, values=values)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _tokenizer_seeds(folder: Path) -> list[dict[str, bytes]]:
    seeds = []
    for number, template in enumerate((CHATML, None)):
        make_tokenizer(template).save_pretrained(folder / f"fast-{number}")
        seeds.append(files_of(folder / f"fast-{number}"))
    rules = json.loads(seeds[0]["tokenizer.json"])["model"]
    merges = "\n".join(" ".join(pair) for pair in rules["merges"])
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHATML}
    seeds.append(
        {
            "vocab.json": json.dumps(rules["vocab"]).encode(),
            "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
        }
    )
    return seeds


def _write_tokenizer(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    name = spread(sorted(seed), rng)
    if rng is None:
        return
    extra = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "T5Tokenizer", "model_max_length": 10**30,
             "added_tokens_decoder": {"-1": {"content": "x"}}, "chat_template": [{"name": "default", "template": CHATML}]}  # fmt: skip
    values = ("evil.Evil", "LlamaTokenizer", "BertTokenizer", "<|im_end|>", {"content": "<s>", "special": True}, "WordPiece", "Unigram",
              "Split", "(x+x+)+y", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False})  # fmt: skip
    if name.endswith(".json"):
        document = json.loads(seed[name])
        if name == "tokenizer_config.json" and rng.random() < 0.4:
            key = rng.choice(list(extra))
            document[key] = extra[key]
        if "model" in document and rng.random() < 0.7:  # most places of a tokenizer.json are entries of its vocabulary
            part = rng.choice([key for key in document if key != "model"])
            text = mutate_keys(document, [part], rng, values=values)
        else:
            text = mutate_json(document, rng, values=values)
        data = text.encode("utf-8", "surrogatepass")
    else:
        data = mutate_bytes(seed[name], rng)
    (folder / name).write_bytes(mutate_bytes(data, rng) if rng.random() < 0.1 else data)


def _are_json(folder: Path) -> bool:
    return all(is_json(path) for path in folder.glob("*.json"))


def _read_tokenizer(folder: Path) -> object:
    tokenizer = load_tokenizer(folder, special_tokens=["<new>"])
    template = ChatTemplate(tokenizer)
    tokenizer_identity(tokenizer)
    return template.encode(_CONVERSATIONS[0]), template.document("Once upon a time " + "x" * 50)[0]


_TEMPLATES = (
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
    " {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor -%}"
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}",
    "{% macro show(m) %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endmacro %}{% for m in messages %}{{ show(m) }}{% endfor %}",
)  # fmt: skip
_TEMPLATE_WORDS = (
    *r"""
{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}
{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{{ 'a' * 10**10 }}
{{ 9 ** (9 ** 9) }}
{{ range(10**12) | list }}
{{ ''.__class__.__mro__ }}
{{ messages.__class__ }}
{{ cycler.__init__.__globals__ }}
{{ lipsum.__globals__ }}
{{ self }}
{{ '%1000000000d' % 1 }}
{{ 'x' | center(10**10) }}
{{ raise_exception('no') }}
{{ 1 / 0 }}
{{ undefined.x }}
{% break %}
{{ messages.pop() }}
{{ messages | map('x') }}
{% include 'x' %}
{% import 'x' as y %}
{{ '{0.__class__}'.format(1) }}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{{ lipsum(n=10**7) }}
{{ strftime_now('%Y' * 999) }}
{% generation %}
{% endgeneration %}
{% raw %}
{% endfor %}
{% endif %}
{% else %}
{{ loop(messages) }}
""".strip().splitlines(),
    *("{{ (" * 50, "{% if 1 %}" * 60, "messages", "content", "role", "loop.index0", "recursive", "or", "not"),
    *("| tojson", "| join", "| reverse", "| sort", "| length", "[0]", "[-1]", "[::-1]"),
)


def _write_template(seed: str, folder: Path, rng: Random | None) -> None:
    make_tokenizer(None).save_pretrained(folder)
    if rng is not None and rng.random() < 0.5:
        seed = seed + rng.choice(_TEMPLATE_WORDS) if rng.random() < 0.5 else rng.choice(_TEMPLATE_WORDS) + seed
    if rng is not None and rng.random() < 0.7:
        seed = mutate_text(seed, rng, words=_TEMPLATE_WORDS)
    (folder / "chat_template.jinja").write_bytes(seed.encode("utf-8", "surrogatepass"))


def _is_template(folder: Path) -> bool:
    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(text)
    return True


def _read_template(folder: Path) -> object:
    template = ChatTemplate(load_tokenizer(folder))
    takes_tools = "tools" in (folder / "chat_template.jinja").read_text(encoding="utf-8")
    rows = [row if takes_tools else replace(row, tools=()) for row in _CONVERSATIONS]
    return [template.encode(row) for row in rows]


def write_safetensors(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    if rng is None:
        return
    path = folder / "model.safetensors"
    data = seed[path.name]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(data[: 8 + length], rng) + data[8 + length :])
        return
    if rng.random() < 0.5:  # a sound head that says something else
        _change_head(header, rng)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return
    values = ("F64", "F8_E4M3", "BOOL", "I64", "C64", "F4", [2**40, 2**40], [0], [-1])
    changed = mutate_keys(header, rng.sample(sorted(header), 2), rng, values=values)
    merged = changed.encode("utf-8", "surrogatepass")
    declared = len(merged) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", declared) + merged + (data[8 + length :] if rng.random() < 0.8 else b""))


def _change_head(header: dict[str, Any], rng: Random) -> None:
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    match rng.randrange(6):
        case 0:
            header[rng.choice(("", "x", "../other", f"{other}x", "model.layers.999.mlp.up_proj.weight", "é\0"))] = (
                header.pop(one)
            )
        case 1:
            header[one]["shape"].reverse()
        case 2:
            header[one]["shape"] = [1, 1, math.prod(header[one]["shape"])]
        case 3:
            header[one], header[other] = header[other], header[one]
        case 4:
            header["__metadata__"] = {"format": rng.choice(("pt", "tf", "x" * 1000))}
        case _:
            same_size = {
                "BF16": ["F16", "I16", "U16"],
                "F32": ["I32", "U32"],
                "U8": ["I8", "BOOL", "F8_E4M3", "F8_E5M2"],
            }
            header[one]["dtype"] = rng.choice(same_size.get(header[one]["dtype"], ["BF16"]))


def _has_header(folder: Path) -> bool:
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return length <= len(data) - 8 and isinstance(json.loads(data[8 : 8 + length]), dict)


def _read_safetensors(folder: Path) -> object:
    checkpoint = open_checkpoint(folder, compute_dtype=torch.bfloat16)
    for name in checkpoint.names:
        checkpoint.dtype(name)
        for block in checkpoint.row_blocks(name):
            assert block.dim() == 2
    assert not any("secret" in name for name in checkpoint.names), "a tensor of a file outside the folder was read"
    return load_base(folder, device="cpu")


def _index_seeds(folder: Path) -> list[dict[str, bytes]]:
    source, out = tiny_source(), folder / "sharded"
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, out / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    files = files_of(source) | files_of(out) | {"model.safetensors.index.json": json.dumps(index).encode()}
    del files["model.safetensors"]
    return [files]


def _write_index(seed: dict[str, bytes], folder: Path, rng: Random | None) -> None:
    write_files(seed, folder)
    if rng is None:
        return
    outside = [f"{'../' * depth}outside/secret.safetensors" for depth in (1, 2, 3)]
    outside += [
        str(folder.parent / "outside" / "secret.safetensors"),
        "link.safetensors",
        "folder/model.safetensors",
        "..",
        ".",
        "pipe",
    ]
    (folder / "link.safetensors").symlink_to(folder.parent / "outside" / "secret.safetensors")
    index = json.loads(seed["model.safetensors.index.json"])
    if rng.random() < 0.5:
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = rng.choice(outside)
    text = mutate_json(index, rng, values=outside) if rng.random() < 0.8 else json.dumps(index)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogatepass"))


def _read_index(folder: Path) -> object:
    assert not any("secret" in name for name, _ in open_tensors(folder)), "a file outside the folder was read"
    return _read_safetensors(folder)


def _gguf_seeds(folder: Path) -> list[bytes]:
    path = folder / "tiny.gguf"
    write_tiny_gguf(path)
    return [path.read_bytes()]


def write_tiny_gguf(path: Path) -> None:
    """A whole Llama of one layer, with a tokenizer."""
    tokenizer = make_tokenizer()
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocab])
    writer.add_token_merges([" ".join(pair) for pair in rules["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    hidden, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 2
    shapes = {
        "token_embd": (len(vocab), hidden), "output_norm": (hidden,), "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,),
        "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (kv, hidden), "blk.0.attn_v": (kv, hidden), "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = torch.full(shape, 0.5).numpy()
        writer.add_tensor(f"{name}.weight", values if "norm" in name else values.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf(seed: bytes, folder: Path, rng: Random | None) -> None:
    if rng is not None:
        # Nearly all of the file is tensors and vocabulary: aim at the counts, the keys and their values, the tensors' heads.
        reader = gguf.GGUFReader(_kept(folder, seed))
        fields = [
            field for name, field in reader.fields.items() if "tokenizer.ggml.t" not in name and "merges" not in name
        ]
        places = [8, 16, *(field.offset + rng.randrange(0, 40) for field in fields)]
        places += [tensor.field.offset + rng.randrange(0, 60) for tensor in reader.tensors]
        data = bytearray(seed)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.choice(places)
            number = rng.choice(
                (0, 1, 2, 3, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
            )
            size = rng.choice((1, 4, 8))
            piece = rng.randbytes(1) if rng.random() < 0.3 else struct.pack("<Q", number)[:size]
            data[at : at + len(piece)] = piece
        seed = mutate_bytes(bytes(data), rng) if rng.random() < 0.1 else bytes(data)
    (folder / "tiny.gguf").write_bytes(seed)


def _kept(folder: Path, seed: bytes) -> Path:
    path = folder.parent / "seed.gguf"
    if not path.exists():
        path.write_bytes(seed)
    return path


def _is_gguf(folder: Path) -> bool:
    """Whether its head can be walked: asked of a reader that knows the limits, because the library's would walk for ever."""
    data = (folder / "tiny.gguf").read_bytes()
    magic, version, num_tensors, num_keys = struct.unpack("<4sIQQ", data[:24])
    return magic == b"GGUF" and version in (2, 3) and num_tensors <= 100 and num_keys <= 100


def _read_gguf(folder: Path) -> object:
    converted = convert_gguf(folder / "tiny.gguf", cache=folder / "cache")
    try:
        return load_base(converted, device="cpu")
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)


READERS = (
    Reader("config", _config_seeds, _write_config, lambda folder: is_json(folder / "config.json"), _read_config),
    Reader("plan", _config_seeds, _write_config, lambda folder: is_json(folder / "config.json"), _plan),
    Reader("generation_config", _folder_seeds, _write_generation, _are_json, lambda folder: load_base(folder, device="cpu")),
    Reader("tokenizer", _tokenizer_seeds, _write_tokenizer, _are_json, _read_tokenizer),
    Reader("chat_template", lambda _: list(_TEMPLATES), _write_template, _is_template, _read_template),
    Reader("safetensors", _folder_seeds, write_safetensors, _has_header, _read_safetensors),
    Reader("index", _index_seeds, _write_index, lambda folder: is_json(folder / "model.safetensors.index.json"), _read_index),
    Reader("gguf", _gguf_seeds, _write_gguf, _is_gguf, _read_gguf),
)  # fmt: skip
