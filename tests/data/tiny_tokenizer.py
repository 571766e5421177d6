"""A byte-level BPE tokenizer built in code, with a ChatML template like the small real model's. Its pad token is its stop token."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "Context: Paris is the capital of France.\n\nQuestion: What is the capital?\nAnswer with a short span from the context."
]


def make_tokenizer(
    chat_template: str | None = CHATML, *, special_tokens: tuple[str, ...] = (), **names: str
) -> PreTrainedTokenizerFast:
    """`special_tokens` are added to the vocabulary; `names` such as eos_token="</s>" say which of them are what."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    backend.add_special_tokens(list(special_tokens))
    usual = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **usual | names)
    tokenizer.chat_template = chat_template
    return tokenizer
