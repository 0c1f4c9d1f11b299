"""Token ids of what a policy is given: drawing prompts, questions about an image, the unconditional prompt."""

from collections.abc import Mapping

from transformers import ProcessorMixin


class PromptEncoder:
    """Builds prompts with the checkpoint's own chat template and special tokens; nothing is padded.

    Special token ids come from the tokenizer: they differ between Janus-Pro-1B and 7B.
    """

    def __init__(self, processor: ProcessorMixin, *, templates: Mapping[str, str] | None = None):
        """`templates`: text with {question} in it, by question type; a type without one is asked as it is."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.templates = dict(templates or {})
        ids = self.tokenizer.convert_tokens_to_ids
        self.bos_id: int = self.tokenizer.bos_token_id
        self.eos_id: int = self.tokenizer.eos_token_id
        self.pad_id: int = self.tokenizer.pad_token_id
        self.begin_image_id: int = ids(processor.image_start_token)
        self.image_id: int = ids(processor.image_token)

    def draw(self, caption: str) -> list[int]:
        """Prompt of a drawing; ends with the begin-of-image token."""
        text = self._chat([{"type": "text", "text": caption}]) + self.processor.image_start_token
        return self.tokenizer(text)["input_ids"]

    def ask(self, question: str, question_type: str | None = None) -> list[int]:
        """Prompt of a question about one image, with one placeholder per image feature."""
        question = self.templates.get(question_type, "{question}").format(question=question)
        text = self._chat([{"type": "image"}, {"type": "text", "text": question}])
        return self.tokenizer(self._system_prompt() + self._expand_image(text))["input_ids"]

    def match(self, caption: str) -> tuple[list[int], slice]:
        """An image followed by its caption, and where the caption stands: input of the text-image matching reward."""
        head = self.tokenizer(self._system_prompt() + self._expand_image(self.processor.image_token))["input_ids"]
        tail = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
        return head + tail, slice(len(head), len(head) + len(tail))

    def unconditional(self, length: int) -> list[int]:
        """The prompt of the unconditional branch: a drawing prompt of `length` tokens with all but its ends padded out,
        as in Janus's published sampling."""
        return [self.bos_id] + [self.pad_id] * (length - 2) + [self.begin_image_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _chat(self, content: list[dict[str, str]]) -> str:
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _expand_image(self, text: str) -> str:
        token = self.processor.image_token
        expanded = (
            self.processor.image_start_token + token * self.processor.num_image_tokens + self.processor.image_end_token
        )
        return text.replace(token, expanded)

    def _system_prompt(self) -> str:
        if not self.processor.use_default_system_prompt:
            return ""
        from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

        return DEFAULT_SYSTEM_PROMPT
