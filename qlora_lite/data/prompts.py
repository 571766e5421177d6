"""How a question is put to the model: the user's message of each format, the same in training, evaluation and `ask`."""

from qlora_lite.data.template import ChatTemplate


def squad_text(question: str, context: str | None) -> str:
    """A question about a passage. The benchmark's other side uses the same text."""
    asked = f"Question: {question}\nAnswer with a short span from the context."
    return asked if context is None else f"Context: {context}\n\n{asked}"


def alpaca_text(instruction: str, added: str) -> str:
    """An instruction and its input, which may be empty."""
    return f"{instruction}\n\n{added}" if added.strip() else instruction


def text_with_context(question: str, context: str | None) -> str:
    """A question of prompt/completion rows or a chat behind the text it is about."""
    return question if context is None else f"{context}\n\n{question}"


def question_prompt(
    template: ChatTemplate, question: str, context: str | None, *, format: str
) -> tuple[list[int], int]:
    """-> (token ids to answer `question` from, the token to stop at), as a model trained on rows of `format` knows questions.

    alpaca: the context is the input; text: context and question are continued; chat, all others, and "auto" (files of several formats):
    the context stands before the question. Raises ModelError.
    """
    message = text_with_context(question, context)
    if format == "text":
        return template.document_ids(message, is_finished=False), template.end_token_id
    if format == "squad":
        message = squad_text(question, context)
    elif format == "alpaca":
        message = alpaca_text(question, context or "")
    return template.prompt_ids([{"role": "user", "content": message}]), template.stop_token_id
