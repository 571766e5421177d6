"""A run and a plan written by hand: every section of a page has something to show, and the data try to break out of it."""

import json
import math
from pathlib import Path

EVIL = "<script>alert(1)</script><img src=http://x/y onerror=z>\x1b[2J"
MIB, GIB = 2**20, 2**30
ADAPTER_MIB = {"adapter": 9, "gradients": 19, "optimizer": 20, "activations": 74, "recompute": 31, "logits": 96}
SIZES_MIB = {  # method -> what each part takes
    "qlora": {"weights": 105, "quant_constants": 2, **ADAPTER_MIB, "workspace": 12, "runtime": 0},
    "lora": {"weights": 257, **ADAPTER_MIB, "workspace": 8},
    "full": {"weights": 257, "gradients": 513, "optimizer": 1283, "activations": 1, "workspace": 432},
    "full_8bit": {"weights": 257, "gradients": 513, "optimizer": 513, "activations": 1, "workspace": 432},
}
PHASE_SHARES = {"forward": 0.7, "head": 0.9, "backward": 1.0, "update": 0.5}
REASONS = [
    "device: cpu: torch finds no CUDA device",
    "model.dtype: bf16: the CPU computes in bf16",
    "data.max_seq_length: 512: the smallest multiple of 64 that holds every row; the longest has 467 tokens",
    "memory.gradient_checkpointing: on: keeps one hidden state per layer; costs about a third of the speed",
    "the recipe was made for another card",
    f"data.format: squad: {EVIL}",
]
SETTINGS = {
    "method": "qlora",
    "model": {"base": "smollm2-135m", "quantization": "nf4", "double_quant": True, "revision": None},
    "lora": {"r": 16, "target_modules": "all-linear", "modules_to_save": []},
    "train": {"learning_rate": 2e-4, "optimizer": "paged_adamw_8bit", "examples_per_step": 16},
}
CHECKPOINT_BYTES = {
    "full": 257 * MIB,
    "full_resume": 1539 * MIB,
    "adapter": 9 * MIB,
    "adapter_resume": 28 * MIB,
}


def make_plan(*, budget_bytes: int = 2 * GIB, concessions: bool = True) -> dict:
    """The JSON of `plan`."""
    methods = {name: _method(sizes) for name, sizes in SIZES_MIB.items()}
    ours, full = (methods[name]["peak_bytes"] for name in ("qlora", "full"))
    plan = {
        "model": "smollm2-135m",
        "budget_bytes": budget_bytes,
        "fits": ours <= budget_bytes,
        "num_weights": 134_515_008,
        "num_trained": 4_884_480,
        "settings": SETTINGS,
        "reasons": REASONS,
        "methods": methods,
        "savings_vs_full": {"bytes": full - ours, "percent": 100 * (1 - ours / full)},
        "max_seq_length": 8192,
        "checkpoint_bytes": CHECKPOINT_BYTES,
        "grid": [
            {"max_seq_length": length, "batch": batch, "peak_bytes": size, "fits": size <= budget_bytes}
            for length in (512, 1024, 2048, 4096, 8192)
            for batch in (1, 2, 4, 8, 16)
            for size in [160 * MIB + length * batch * 100_000]
        ],
    }
    given_up = [{"setting": "memory.gradient_checkpointing: on", "saves_bytes": 300 * MIB, "peak_bytes": ours}]
    return plan | ({"concessions": given_up, "slowdown": 1.33} if concessions else {})


def write_run(folder: Path) -> Path:
    """A finished run with every file that a run can leave."""
    folder.mkdir()
    documents = {
        "eval.json": _scores(),
        "memory.json": _memory(),
        "plan.json": {key: value for key, value in make_plan().items() if key != "grid"},
        "merge.json": {
            "adapter_effect": 0.1, "arithmetic_ratio": 1e-4, "storage_ratio": 2e-3, "ratio": 2.1e-3, "peak_host_bytes": GIB,
            "eval": {"adapter": _scores()["after"], "merged": _scores()["after"]},
        },
        "env.json": {
            "schema_version": 1, "base": "models/smollm2-135m", "device": "cpu", "num_threads": 2,
            "versions": {"torch": "2.13.0"}, EVIL: EVIL,
        },
        "train.json": {
            "num_steps": 60, "train_s": 118.0, "wall_s": 214.0, "peak_bytes": _memory()["peak_bytes"], "rss_bytes": GIB,
            "phases_s": {
                "planning": 4.1, "loading the base": 3.2, "scoring the base model": 41.0, "preflight": 2.5, "training": 118.0,
                "checkpoints": 1.2, "scoring the tuned model": 38.0,
            },
        },
    }  # fmt: skip
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "recipe.yaml").write_text(f"method: qlora # {EVIL}\nlora:\n  r: 16\n")
    _write_lines(folder / "steps.jsonl", _steps())
    _write_lines(folder / "predictions.jsonl", _predictions())
    for name, num_bytes in {
        "adapter/adapter_model.safetensors": 30_000,
        "checkpoints/step-000050/state.safetensors": 9000,
    }.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(bytes(num_bytes))
    return folder


def _method(sizes: dict[str, int]) -> dict:
    parts = {f"{part}_bytes": size * MIB for part, size in sizes.items()}
    peak = sum(parts.values())
    phases = {name: {"peak_bytes": int(share * peak), "parts": {}} for name, share in PHASE_SHARES.items()}
    host = parts["optimizer_bytes"] if sizes is SIZES_MIB["full_8bit"] else 0
    return {
        "peak_bytes": peak,
        "host_bytes": host,
        "parts": parts,
        "phases": phases,
        "max_seq_length": (6 * GIB // peak) * 1024,
    }


def _scores() -> dict:
    before, after = {"exact_match": 6.0, "f1": 28.1, "loss": 2.3}, {"exact_match": 49.0, "f1": 66.2, "loss": 0.5}
    return {
        "before": before | {"num_examples": 100},
        "after": after | {"num_examples": 100},
        "groups": {"untrained": {"before": before, "after": after | {"exact_match": 41.5}}},
    }


def _memory() -> dict:
    planned = {f"{part}_bytes": size * MIB for part, size in SIZES_MIB["qlora"].items()}
    measured = planned | {"activations_bytes": 70 * MIB, "workspace_bytes": None}
    peak = {"planned": sum(planned.values()), "measured": 359 * MIB}
    return {
        "budget_bytes": 2 * GIB,
        "method": "qlora",
        "peak_bytes": peak,
        "rss_bytes": GIB,
        "parts": {part: _both(planned[part], measured[part]) for part in planned},
        "phases": {
            name: _both(int(share * peak["planned"]), int(share * peak["measured"]))
            for name, share in PHASE_SHARES.items()
        },
        "timeline": _timeline(),
        "retries": ["a micro-batch of 4096 tokens did not fit; 2048 did"],
    }


def _both(planned: int, measured: int | None) -> dict:
    return {"planned": planned, "measured": measured, "difference": None if measured is None else measured - planned}


def _timeline() -> list[dict]:
    layers = ["embedding", *map(str, range(30))]
    forward = [{"phase": "forward", "layer": layer, "bytes": (150 + 3 * i) * MIB} for i, layer in enumerate(layers)]
    back = [
        {"phase": "backward", "layer": layer, "bytes": (170 + 3 * i) * MIB}
        for i, layer in reversed(list(enumerate(layers)))
    ]
    head, update = (
        {"phase": "head", "layer": "head", "bytes": 330 * MIB},
        {"phase": "update", "layer": "", "bytes": 160 * MIB},
    )
    return [*forward, head, *back, update]


def _steps() -> list[dict]:
    return [
        {
            "step": step,
            "loss": 0.5 + 2 * math.exp(-step / 12) + 0.15 * math.sin(5 * step),
            "learning_rate": 2e-4 * (1 - step / 61),
            "grad_norm": 0.5 + 0.1 * math.sin(step),
            "eval_loss": 0.7 + 1.4 * math.exp(-step / 15) if step % 20 == 0 else None,
            "step_s": 2.0,
            "num_examples": 10,
            "num_label_tokens": 50,
        }
        for step in range(1, 61)
    ]


def _predictions() -> list[dict]:
    rows = [
        ("What is the capital of Norway?", "The capital is a city in Norway that", "Oslo", ["Oslo"], 100.0, 100.0),
        ("How high is the highest mountain of Spain?", "It is high.", "3,715 m", ["3,715 metres", "3,715 m high"], 0.0, 67.0),
        (EVIL, EVIL, EVIL, ["Oslo", EVIL], 0.0, 0.0),
        ("Which " + "very " * 60 + "long question?", "No.", "", [], 100.0, 100.0),
        ("x" * 400, None, "y" * 300, ["z" * 300], 0.0, 0.0),
    ]  # fmt: skip
    rows += [(f"How many people live in town {n}?", "Many.", str(n), [str(n)], 100.0, 100.0) for n in range(25)]
    return [
        {"id": str(index), "question": question, "prediction": tuned, "gold": gold, "exact_match": exact, "f1": f1}
        | ({} if base is None else {"base_prediction": base})
        for index, (question, base, tuned, gold, exact, f1) in enumerate(rows)
    ]


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
