"""Every kind of training works with all parts of the model elsewhere, and learns the same to the bit as with chunks alone."""

import json

import pytest

from tests.tiny_run import train_cli, write_recipe

CHUNKS = ("memory.chunk_tokens=24",)
AWAY = (
    *CHUNKS, "memory.layer_inputs=host_fewest", "memory.resident_layers=0", "memory.embeddings=host", "memory.head=streamed",
    "memory.keys_values=host",
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        ("lora.use_dora=true",),
        ('data.special_tokens=["<|yes|>"]',),
        ("model.quantization=int8", "memory.stream_from=disk"),
        ("method=lora", "memory.stream_from=disk"),
    ],
    ids=" ".join,
)
def test_training_with_every_part_elsewhere_is_training_with_chunks(settings, tmp_path):
    recipe, losses = write_recipe(tmp_path / "recipe", max_steps=2), []
    plain = tuple(setting for setting in settings if not setting.startswith("memory."))
    for name, asked in (("chunks", (*plain, *CHUNKS)), ("away", (*settings, *AWAY))):
        flags = [word for setting in ("data.eval=null", *asked) for word in ("--set", setting)]
        done = train_cli(recipe, tmp_path / name, *flags, "--json")
        assert done.code == 0, done.stderr
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) == 2
