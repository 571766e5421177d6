"""The user's message for a question in each format, the same in training, evaluation and `ask`."""

from qlora_lite.data.template import ChatTemplate


def squad_text(question: str, context: str | None) -> str:
    """A question about a passage. The TRL side of the benchmark uses the same text."""
    asked = f"Question: {question}\nAnswer with a short span from the context."
    return asked if context is None else f"Context: {context}\n\n{asked}"


def alpaca_text(instruction: str, added: str) -> str:
    """An instruction and its input, which may be empty."""
    return f"{instruction}\n\n{added}" if added.strip() else instruction


def text_with_context(question: str, context: str | None) -> str:
    """A question of a prompt/completion row or a chat, after its context."""
    return question if context is None else f"{context}\n\n{question}"


def question_prompt(
    template: ChatTemplate, question: str, context: str | None, *, format: str
) -> tuple[list[int], int]:
    """-> (prompt token ids for `question`, the stop token), in the form of training on rows of `format`.

    alpaca: the context is the input; text: the model continues context and question; chat, all others, and "auto" (files of several
    formats): the context comes before the question. Raises ModelError.
    """
    message = text_with_context(question, context)
    if format == "text":
        return template.document_ids(message), template.end_token_id
    if format == "squad":
        message = squad_text(question, context)
    elif format == "alpaca":
        message = alpaca_text(question, context or "")
    return template.prompt_ids([{"role": "user", "content": message}]), template.stop_token_id
