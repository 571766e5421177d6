"""Shapes of well-known models: the config fields for weights, attention and length, and the published number of weights.

Only a table; `known.py` reads it. Per model: the hub name, the number of weights on the hub (all tensors of its safetensors),
transformers' config fields. A field is listed if it determines a shape, the attention, tied weights or the longest text; fields
that change only numbers (norm epsilons, dropout, token ids) keep transformers' defaults. If base and instruct model have the same
shapes, the instruct model is listed, as in the shipped recipes (only Qwen2.5's differ, in length: most base models have 131,072
positions).

`not_loaded` counts the published weights outside the language model, and `why` describes them; everywhere else the two numbers
are equal. tests/base/test_known.py builds each model on meta and counts.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownShape:
    """One model: hub name, published number of weights, and config fields, from which `known.known_config` makes a config."""

    source: str  # hub name
    published: int  # weights
    config: dict[str, Any]
    not_loaded: int = 0  # of the published weights
    why: str = ""

    @property
    def num_weights(self) -> int:
        """Weights of the loaded language model; a tied head counts once, as the embedding."""
        return self.published - self.not_loaded


HEAD_TWICE = "the files contain the tied head twice, as head and as embedding; it is loaded and counted once"
VISION = "the checkpoint also contains a vision tower and its projector; only the language model is loaded"


def _llama(hidden: int, inner: int, layers: int, heads: int, key_value: int, **more: Any) -> dict[str, Any]:
    """The fields that Llama's relatives share; `head_dim` only if it differs from hidden / heads."""
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": key_value, **more}


def _llama3(*sizes: int, factor: float = 8.0, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    shared = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": rope}
    return {"model_type": "llama", **_llama(*sizes), **shared, "tie_word_embeddings": False, **more}


def _smollm2(*sizes: int, rope_theta: float) -> dict[str, Any]:
    shared = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    return {"model_type": "llama", **_llama(*sizes), **shared, "rope_theta": rope_theta}


def _qwen(kind: str, *sizes: int, vocab: int, tied: bool, positions: int) -> dict[str, Any]:
    """Qwen's configs define a sliding window and disable it."""
    shared = {"rope_theta": 1000000.0, "use_sliding_window": False, "max_position_embeddings": positions}
    return {"model_type": kind, **_llama(*sizes), "vocab_size": vocab, "tie_word_embeddings": tied, **shared}


def _qwen2(*sizes: int, vocab: int = 152064, tied: bool = False) -> dict[str, Any]:
    return _qwen("qwen2", *sizes, vocab=vocab, tied=tied, positions=32768)


def _qwen3(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return {**_qwen("qwen3", *sizes, vocab=151936, tied=tied, positions=40960), "head_dim": 128}


def _mistral(*sizes: int, vocab: int, rope_theta: float) -> dict[str, Any]:
    shared = {"head_dim": 128, "sliding_window": None, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    return {"model_type": "mistral", **_llama(*sizes), "vocab_size": vocab, "rope_theta": rope_theta, **shared}


def _gemma2(*sizes: int, head_dim: int, query_scale: int) -> dict[str, Any]:
    """Every other layer sees a window of 4,096 tokens; attention and logits are soft-capped."""
    shared = {"vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 10000.0, "sliding_window": 4096}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True}
    own = {"head_dim": head_dim, "query_pre_attn_scalar": query_scale}
    return {"model_type": "gemma2", **_llama(*sizes), **own, **shared, **caps}


def _gemma3(*sizes: int, head_dim: int = 256, query_scale: int = 256, **more: Any) -> dict[str, Any]:
    """Five layers of six see a window; the sizes with a vision tower have 64 more embedding rows and scale rope by 8."""
    rope = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    with_vision: dict[str, Any] = {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024}
    with_vision["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    own = {"head_dim": head_dim, "query_pre_attn_scalar": query_scale, "tie_word_embeddings": True}
    return {"model_type": "gemma3_text", **_llama(*sizes), **own, **rope, **(more or with_vision)}


def _falcon(hidden: int, layers: int, heads: int, key_value: int | None) -> dict[str, Any]:
    """7B shares one key and value among all heads; the larger ones have groups of heads, and two norms in each layer."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    kind = {"new_decoder_architecture": key_value is not None, "multi_query": True, "parallel_attn": True}
    groups = {} if key_value is None else {"num_kv_heads": key_value}
    shared = {"vocab_size": 65024, "max_position_embeddings": 2048, "alibi": False, "bias": False}
    return {"model_type": "falcon", **sizes, **groups, **kind, **shared, "tie_word_embeddings": True}


def _bloom(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """ALiBi: no length anywhere."""
    sizes = {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 250880}
    return {"model_type": "bloom", **sizes, "tie_word_embeddings": True}


PHI_4 = {"model_type": "phi3", **_llama(5120, 17920, 40, 40, 10), "vocab_size": 100352, "tie_word_embeddings": False,
         "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000.0,
         "sliding_window": None}  # fmt: skip
GEMMA_3_1B = {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512}

# sizes: hidden, feed-forward, layers, heads, key-value heads
SHAPES: dict[str, KnownShape] = {
    "llama-3.1-8b": KnownShape("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, _llama3(4096, 14336, 32, 32, 8)),
    "llama-3.1-70b": KnownShape("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496, _llama3(8192, 28672, 80, 64, 8)),
    "llama-3.1-405b": KnownShape(
        "meta-llama/Llama-3.1-405B-Instruct", 405_853_388_800, _llama3(16384, 53248, 126, 128, 8)
    ),
    "llama-3.2-1b": KnownShape("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400,
                        _llama3(2048, 8192, 16, 32, 8, factor=32.0, tie_word_embeddings=True)),
    "llama-3.2-3b": KnownShape("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824,
                        _llama3(3072, 8192, 28, 24, 8, factor=32.0, tie_word_embeddings=True)),
    "llama-3.3-70b": KnownShape("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, _llama3(8192, 28672, 80, 64, 8)),
    "qwen2.5-0.5b": KnownShape("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768, _qwen2(896, 4864, 24, 14, 2, vocab=151936, tied=True)),
    "qwen2.5-1.5b": KnownShape("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True)),
    "qwen2.5-3b": KnownShape("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688, _qwen2(2048, 11008, 36, 16, 2, vocab=151936, tied=True)),
    "qwen2.5-7b": KnownShape("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, _qwen2(3584, 18944, 28, 28, 4)),
    "qwen2.5-14b": KnownShape("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664, _qwen2(5120, 13824, 48, 40, 8)),
    "qwen2.5-32b": KnownShape("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352, _qwen2(5120, 27648, 64, 40, 8)),
    "qwen2.5-72b": KnownShape("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648, _qwen2(8192, 29568, 80, 64, 8)),
    "qwen3-0.6b": KnownShape("Qwen/Qwen3-0.6B", 751_632_384, _qwen3(1024, 3072, 28, 16, 8, tied=True), 155_582_464, HEAD_TWICE),
    "qwen3-1.7b": KnownShape("Qwen/Qwen3-1.7B", 2_031_739_904, _qwen3(2048, 6144, 28, 16, 8, tied=True), 311_164_928, HEAD_TWICE),
    "qwen3-4b": KnownShape("Qwen/Qwen3-4B", 4_022_468_096, _qwen3(2560, 9728, 36, 32, 8, tied=True)),
    "qwen3-8b": KnownShape("Qwen/Qwen3-8B", 8_190_735_360, _qwen3(4096, 12288, 36, 32, 8)),
    "qwen3-14b": KnownShape("Qwen/Qwen3-14B", 14_768_307_200, _qwen3(5120, 17408, 40, 40, 8)),
    "qwen3-32b": KnownShape("Qwen/Qwen3-32B", 32_762_123_264, _qwen3(5120, 25600, 64, 64, 8)),
    "mistral-7b": KnownShape("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552,
                      _mistral(4096, 14336, 32, 32, 8, vocab=32768, rope_theta=1000000.0)),
    "mistral-small-24b": KnownShape("mistralai/Mistral-Small-24B-Instruct-2501", 23_572_403_200,
                             _mistral(5120, 32768, 40, 32, 8, vocab=131072, rope_theta=100000000.0)),
    "gemma-2-9b": KnownShape("google/gemma-2-9b-it", 9_241_705_984, _gemma2(3584, 14336, 42, 16, 8, head_dim=256, query_scale=256)),
    "gemma-2-27b": KnownShape("google/gemma-2-27b-it", 27_227_128_320, _gemma2(4608, 36864, 46, 32, 16, head_dim=128, query_scale=144)),
    "gemma-3-1b": KnownShape("google/gemma-3-1b-it", 999_885_952, _gemma3(1152, 6912, 26, 4, 1, **GEMMA_3_1B)),
    "gemma-3-4b": KnownShape("google/gemma-3-4b-it", 4_300_079_472, _gemma3(2560, 10240, 34, 8, 4), 419_816_304, VISION),
    "gemma-3-12b": KnownShape("google/gemma-3-12b-it", 12_187_325_040, _gemma3(3840, 15360, 48, 16, 8), 421_290_864, VISION),
    "gemma-3-27b": KnownShape("google/gemma-3-27b-it", 27_432_406_640,
                       _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_scale=168), 423_060_336, VISION),
    "phi-4": KnownShape("microsoft/phi-4", 14_659_507_200, PHI_4),
    "falcon-7b": KnownShape("tiiuae/falcon-7b", 7_217_189_760, _falcon(4544, 32, 71, None), 295_469_056, HEAD_TWICE),
    "falcon-40b": KnownShape("tiiuae/falcon-40b", 41_835_970_560, _falcon(8192, 60, 128, 8), 532_676_608, HEAD_TWICE),
    "falcon-180b": KnownShape("tiiuae/falcon-180B", 179_522_565_120, _falcon(14848, 80, 232, 8), 965_476_352, HEAD_TWICE),
    "bloom-560m": KnownShape("bigscience/bloom-560m", 559_214_592, _bloom(1024, 24, 16)),
    "bloom-7b1": KnownShape("bigscience/bloom-7b1", 7_069_016_064, _bloom(4096, 30, 32)),
    "smollm2-135m": KnownShape("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, _smollm2(576, 1536, 30, 9, 3, rope_theta=100000.0)),
    "smollm2-360m": KnownShape("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, _smollm2(960, 2560, 32, 15, 5, rope_theta=100000.0)),
    "smollm2-1.7b": KnownShape("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384,
                        _smollm2(2048, 8192, 24, 32, 32, rope_theta=130000.0)),
}  # fmt: skip
