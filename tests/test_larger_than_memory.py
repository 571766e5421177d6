"""A model whose 4-bit weights are larger than the memory it may have trains from its files, with the same result to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.base.artefact import quantize_base
from qlora_lite.model.policy import Policy
from tests.conftest import REPOSITORY
from tests.tiny_model import save_tiny_llama

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
ENOUGH = 85 * 2**20  # bytes of private memory that a run from disk may take
FROM_DISK = Policy(resident_layers=0, stream_from="disk")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large")
    return quantize_base(save_tiny_llama(root / "model", **SIZES), cache=root / "cache")


@pytest.mark.slow
def test_a_model_larger_than_its_memory_trains_from_disk_and_changes_no_bit(artefact: Path):
    weights = sum(file.stat().st_size for file in artefact.glob("*.safetensors"))
    assert weights > 1.2 * ENOUGH, weights
    resident, from_disk = (in_a_process(artefact, policy) for policy in (Policy(chunk_tokens=4096), FROM_DISK))
    assert from_disk["peak_bytes"] < ENOUGH < weights < resident["peak_bytes"]
    assert from_disk["result"] == resident["result"]
    assert len(resident["result"]["losses"]) == 3


def in_a_process(artefact: Path, policy: Policy) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.test_larger_than_memory", str(artefact), json.dumps(vars(policy))]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed goes back at once, so that only use is measured
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def train_three_steps(artefact: Path, policy: Policy) -> dict[str, Any]:
    """Losses and a hash of the factors after three steps."""
    import hashlib

    import torch

    from qlora_lite.data.batches import pack_batch
    from qlora_lite.data.template import Encoded
    from qlora_lite.model.adapter import Lora, attach_adapter
    from qlora_lite.model.load import load_base
    from qlora_lite.training.footprint import Footprint, apply_footprint
    from qlora_lite.training.optimizer import make_optimizer
    from qlora_lite.training.step import update

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = attach_adapter(
        load_base(artefact, device="cpu", policy=policy).model, Lora(2, 4, target_modules=["q_proj", "down_proj"])
    ).train()
    apply_footprint(model, Footprint(0, policy=policy))
    optimizer = make_optimizer(model.named_parameters(), name="adamw", learning_rate=1e-3, weight_decay=0.0)
    batch = pack_batch([Encoded(torch.randint(5, 90, (24,)).tolist(), ((12, 24),))], range(1))
    scaler, losses = torch.amp.GradScaler("cpu", enabled=False), []
    for _ in range(3):
        losses.append(update(model, optimizer, [batch], scaler=scaler, max_grad_norm=1.0)[0])
        optimizer.zero_grad(set_to_none=True)
    factors = [p.detach().float().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return {"losses": losses, "factors": hashlib.sha256(b"".join(factors)).hexdigest()}


def main() -> None:
    """Print the result and the highest private memory beyond that of a process that has imported everything; files are not private."""
    folder, policy = Path(sys.argv[1]), Policy(**json.loads(sys.argv[2]))
    import qlora_lite.api
    import qlora_lite.training.step  # noqa: F401
    from qlora_lite.memory.anonymous import HostMemoryMeter

    with HostMemoryMeter() as meter:
        result = train_three_steps(folder, policy)
    print(json.dumps({"result": result, "peak_bytes": meter.peak_bytes}))


if __name__ == "__main__":
    main()
