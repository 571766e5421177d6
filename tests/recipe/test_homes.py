"""Keys of `memory` that contradict others are refused by name."""

import pytest

from tests.tiny_run import run_cli, write_recipe


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (("method=full", "memory.chunk_tokens=64"), "memory.chunk_tokens: is for frozen weights"),
        (("memory.layer_inputs=host", "memory.gradient_checkpointing=false"), "computes every layer again"),
        (("memory.head=streamed", "lora.modules_to_save=[lm_head]"), "memory.head: is for a frozen embedding and head"),
        (("memory.stream_from=disk", "lora.use_dora=true"), "DoRA reads them all at the start"),
        (("memory.layer_inputs=disk",), '"device", "fewest", "host" or "host_fewest"'),
        (("memory.resident_layers=some",), "memory.resident_layers"),
        (("memory.chunk_tokens=-1",), "memory.chunk_tokens"),
    ],
)
def test_what_does_not_go_together_is_one_message(tmp_path, sets, expected):
    flags = [word for each in sets for word in ("--set", each)]
    done = run_cli("check", write_recipe(tmp_path), *flags)
    assert done.code == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
