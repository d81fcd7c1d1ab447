"""From prompts and pictures to model inputs, and from ids back to text.

Each ``<|image|>`` of a prompt gives way to the picture's block of tokens (see :mod:`.image_processor`), then
the BOS id goes in front. The prompt format is Molmo's "role" style (Deitke et al. 2024): turns that read
`` User: ...`` and `` Assistant: ...``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

from ..._files import MOST_JSON_BYTES, read_regular, read_text, reason
from .._shared.section import shown
from .image_processor import CONFIG_FILE, DROPPED, JinaVLMImageProcessor, naming, read_json

if TYPE_CHECKING:
    import os

    from ...images import ImageSource

# several times the largest of today's vocabularies
_MOST_TOKENIZER_BYTES = 128 << 20

# the names under which a released tokenizer holds the ids that the image processor writes
TOKEN_NAMES = {
    "im_start_token_id": "<im_start>",
    "im_end_token_id": "<im_end>",
    "im_patch_token_id": "<im_patch>",
    "im_col_token_id": "<im_col>",
    "image_token_id": "<|image|>",
    "im_slice_token_id": "<im_slice>",
}


class _Sequence(NamedTuple):
    """One prompt, tokenised: its ids and its pictures' crops [T, N, D], masks [T, N] and positions [T, M]."""

    ids: list[int]
    crops: list[torch.Tensor]
    masks: list[torch.Tensor]
    positions: list[torch.Tensor]


class JinaVLMProcessor:
    """Tokenises prompts with pictures for jina-vlm and renders chats.

    Text is only ever text: the names of special tokens are spelled out letter by letter where a prompt
    contains them, so nobody who writes part of a prompt can forge an end of text or a picture. The exceptions
    are the image marker, whose count must match the pictures, and one EOS at the very end, which is dropped.
    Instances may be shared by threads.

    Args:
        tokenizer: a ``tokenizers.Tokenizer`` (copied, never changed) or the path of a ``tokenizer.json``.
        image_processor: how pictures are cut, and all special ids; the released defaults if None.
        chat_template: Jinja source for :meth:`apply_chat_template`; the built-in role format if None.
        always_start_with_space: whether the first turn, too, starts with a space; a template is told as well.
        image_token: the marker that stands for a picture in prompts.

    Raises:
        FileNotFoundError: no file at the tokenizer's path.
        ValueError: the file is not a tokenizer, or the marker is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str | os.PathLike[str],
        image_processor: JinaVLMImageProcessor | None = None,
        *,
        chat_template: str | None = None,
        always_start_with_space: bool = True,
        image_token: str = "<|image|>",
    ) -> None:
        if not image_token:
            raise ValueError("image_token must not be empty")
        self.image_processor = JinaVLMImageProcessor() if image_processor is None else image_processor
        self.chat_template = chat_template
        self.always_start_with_space = always_start_with_space
        self.image_token = image_token
        self.tokenizer = _own_copy(tokenizer)
        self._first_image_id = min(self.image_processor.image_token_ids)
        special = self.tokenizer.get_added_tokens_decoder().get(self.image_processor.eos_token_id)
        self._eos_text = special.content if special is not None else None

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **image_overrides: Any) -> JinaVLMProcessor:
        """Build from a checkpoint directory.

        Reads ``tokenizer.json`` and, where present, ``preprocessor_config.json``, ``processor_config.json``
        and ``chat_template.jinja``. Image ids that the tokenizer knows by name are taken from it, as the
        released model does, unless ``preprocessor_config.json`` gives them.

        Args:
            directory: the checkpoint.
            **image_overrides: keyword arguments of :class:`JinaVLMImageProcessor` that win over the files.

        Raises:
            FileNotFoundError: no such directory, or no ``tokenizer.json`` in it.
            ValueError: a file that cannot be read as what it should be.
        """
        config = read_json(directory, CONFIG_FILE)
        tokenizer = _own_copy(Path(directory) / "tokenizer.json")
        for key, name in TOKEN_NAMES.items():
            if config.get(key) is None:
                config[key] = tokenizer.token_to_id(name)
        with naming(directory, image_overrides):
            image_processor = JinaVLMImageProcessor.from_dict(config, **image_overrides)
        spaced = read_json(directory, "processor_config.json").get("always_start_with_space")
        if spaced not in (True, False, None):
            raise ValueError(
                f"{Path(directory) / 'processor_config.json'}: always_start_with_space must be true or false, "
                f"got {shown(spaced)}"
            )
        return cls(
            tokenizer,
            image_processor,
            chat_template=_read_template(Path(directory) / "chat_template.jinja"),
            always_start_with_space=spaced is not False,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        images: ImageSource | Sequence[Any] | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """Tokenise a prompt, or a batch of prompts, with its pictures.

        A prompt has one marker per picture, or none at all; then the pictures come first, in order. (For
        several pictures without markers the released model's positions are off by one per picture; these are
        right.) A prompt that ends with the EOS token loses it.

        Args:
            prompt: one prompt, or a list of B prompts.
            images: for one prompt: a picture, a list of pictures or None. For a list of prompts: a list of
                the same length with one of these for each prompt, or None. Pictures are whatever
                :func:`vlmkern.images.load_image` takes.

        Returns:
            The model's keyword arguments, padded on the left to the longest prompt, S ids, and to T crops:

            - input_ids: int64 [B, S], padded with -1
            - crops: float32 [B, T, N, P * P * 3], padded with -1; None if no prompt has a picture
            - image_masks: float32 [B, T, N], padded with -1; or None
            - image_input_idx: int64 [B, T, M], positions in ``input_ids``, -10000 where dropped; or None
            - attention_mask: int64 [B, S], 0 for padding

            All are on the CPU.

        Raises:
            ValueError: markers and pictures that do not match, text that encodes to an id reserved for pictures or
                not at all, or an unusable picture.
            TypeError: a prompt that is not a string.
        """
        sequences = [self._encode(text, pictures) for text, pictures in _batch(prompt, images)]
        length = max((len(sequence.ids) for sequence in sequences), default=0)
        input_ids = torch.full((len(sequences), length), -1, device="cpu")
        for row, sequence in zip(input_ids, sequences, strict=True):
            row[length - len(sequence.ids) :] = torch.tensor(sequence.ids, device="cpu")
        batch: dict[str, torch.Tensor | None] = dict.fromkeys(
            ("input_ids", "crops", "image_masks", "image_input_idx", "attention_mask")
        )
        batch["input_ids"] = input_ids
        batch["attention_mask"] = (input_ids != -1).long()
        if any(sequence.crops for sequence in sequences):
            shifted = [
                [_shift(positions, length - len(sequence.ids)) for positions in sequence.positions]
                for sequence in sequences
            ]
            batch["crops"] = _stack([sequence.crops for sequence in sequences], -1.0)
            batch["image_masks"] = _stack([sequence.masks for sequence in sequences], -1.0)
            batch["image_input_idx"] = _stack(shifted, DROPPED)
        return batch

    def chat(self, question: str, num_images: int = 1) -> str:
        """The prompt for one question about ``num_images`` pictures, which come before the question.

        Raises:
            ValueError: a negative number, a question that contains the image marker, or a chat template that
                does not write one marker per picture.
        """
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 0:
            raise ValueError(f"num_images must be an integer of at least 0, got {num_images!r}")
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        prompt = self.apply_chat_template([{"role": "user", "content": content}])
        written = prompt.count(self.image_token)
        if written != num_images:
            raise ValueError(f"the chat template wrote {written} image marker(s) for {num_images} image(s)")
        return prompt

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as a prompt.

        Without a template of the checkpoint's own, a question about a picture becomes
        `` User: <|image|>question Assistant:``. A template runs in Jinja's sandbox and sees ``messages``,
        ``add_generation_prompt``, ``always_start_with_space`` and ``image_prompt_token``; ``bos_token`` and
        ``eos_token`` are empty for it, since ids are added after tokenising.

        Args:
            messages: turns ``{"role": ..., "content": ...}``; the content is a string, in which image markers
                count as pictures, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
            add_generation_prompt: end with the assistant's cue.

        Raises:
            ValueError: malformed messages, an image marker inside a text part, or a failing template.
        """
        for message in messages:
            self._check_message(message)
        if self.chat_template is not None:
            return self._render(messages, add_generation_prompt)
        turns = [f" {turn['role'].capitalize()}: {self._plain(turn['content'])}" for turn in messages]
        prompt = "".join(turns) + (" Assistant:" if add_generation_prompt else "")
        return prompt if self.always_start_with_space else prompt.removeprefix(" ")

    def decode(self, ids: torch.Tensor | Iterable[Any]) -> str | list[str]:
        """Text of generated ids: a string for [n] ids, a list of strings for [B, n].

        EOS, padding, image ids and the tokenizer's special tokens leave no trace.
        """
        values = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
        if values and isinstance(values[0], (list, tuple)):
            return [self.decode(row) for row in values]
        ends = (self.image_processor.bos_token_id, self.image_processor.eos_token_id)
        kept = [value for value in values if 0 <= value < self._first_image_id and value not in ends]
        with _tokenizer_errors("the tokenizer cannot decode the ids"):
            return self.tokenizer.decode(kept, skip_special_tokens=True)

    def _encode(self, prompt: str, images: Sequence[Any]) -> _Sequence:
        # spelled out as text the EOS token is several ids, so it has to go before the text is encoded
        text = prompt.removesuffix(self._eos_text) if self._eos_text else prompt
        pieces = text.split(self.image_token)
        markers = len(pieces) - 1
        if images and not markers:
            pieces = [""] * len(images) + pieces
        elif markers != len(images):
            raise ValueError(
                f"prompt has {markers} {self.image_token} marker(s), but {len(images)} image(s) were given"
            )
        # all text first: a refused prompt should not cost the pixel work
        texts = [self._text_ids(piece) for piece in pieces]
        if text == prompt and texts[-1][-1:] == [self.image_processor.eos_token_id]:
            texts[-1].pop()
        sequence = _Sequence([self.image_processor.bos_token_id, *texts[0]], [], [], [])
        for image, following in zip(images, texts[1:], strict=True):
            inputs = self.image_processor.preprocess(image)
            sequence.crops.append(inputs.crops)
            sequence.masks.append(inputs.image_masks)
            sequence.positions.append(_shift(inputs.image_input_idx, len(sequence.ids)))
            sequence.ids.extend(inputs.tokens.tolist())
            sequence.ids.extend(following)
        return sequence

    def _text_ids(self, text: str) -> list[int]:
        with _tokenizer_errors("the tokenizer cannot encode the text"):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        forged = next((value for value in ids if value >= self._first_image_id), None)
        if forged is not None:
            raise ValueError(
                f"the text encodes to id {forged} ({self.tokenizer.id_to_token(forged)!r}); ids from "
                f"{self._first_image_id} on are reserved for images"
            )
        return ids

    def _check_message(self, message: Any) -> None:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise ValueError(f"each message must be a dict with a role and a content, got {message!r:.200}")
        content = message.get("content")
        if isinstance(content, str):
            return
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"a message's content must be a string or a list of parts, got {content!r:.200}")
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                if self.image_token in part["text"]:
                    raise ValueError(
                        f"a text part contains the image marker {self.image_token}; "
                        'say where pictures go with parts of type "image"'
                    )
            elif kind != "image":
                raise ValueError(
                    f'each part must be {{"type": "image"}} or {{"type": "text", "text": ...}}, got {part!r:.200}'
                )

    def _plain(self, content: str | Sequence[dict[str, str]]) -> str:
        if isinstance(content, str):
            return content
        return "".join(self.image_token if part["type"] == "image" else part["text"] for part in content)

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                always_start_with_space=self.always_start_with_space,
                image_prompt_token=self.image_token,
                bos_token="",
                eos_token="",
            )
        except Exception as error:
            # a template is a program: besides its own errors it can raise whatever python can
            raise ValueError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _read_template(path: Path) -> str | None:
    try:
        return read_text(path, MOST_JSON_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a template ({reason(error)})") from None


@contextmanager
def _tokenizer_errors(message: str) -> Iterator[None]:
    """What goes wrong in the tokenizers library as `ValueError`: it raises bare `Exception`, and on some damaged files
    panics, which arrives as something that is not even one."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{message} ({reason(error)})") from error


def _own_copy(tokenizer: Tokenizer | str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer of our own that treats special tokens as text and neither cuts nor pads."""
    if isinstance(tokenizer, Tokenizer):
        with _tokenizer_errors("tokenizer: the tokenizers library cannot read what it writes of it"):
            own = Tokenizer.from_str(tokenizer.to_str())
    else:
        path = Path(tokenizer)
        try:
            content = read_regular(path, _MOST_TOKENIZER_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; a tokenizer.json is needed") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a tokenizer.json ({reason(error)})") from None
        with _tokenizer_errors(f"{path}: not a tokenizer.json"):
            own = Tokenizer.from_buffer(content)
    own.encode_special_tokens = True
    own.no_truncation()
    own.no_padding()
    return own


def _batch(prompt: Any, images: Any) -> list[tuple[str, list[Any]]]:
    """Pair every prompt with its list of pictures."""
    if isinstance(prompt, str):
        pictures = _as_list(images)
        if len(pictures) == 1 and isinstance(pictures[0], (list, tuple)):
            pictures = list(pictures[0])
        return [(prompt, pictures)]
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(text, str) for text in prompt):
        raise TypeError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
    if images is None:
        images = [None] * len(prompt)
    if not isinstance(images, (list, tuple)) or len(images) != len(prompt):
        given = f"{len(images)}" if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(f"images must be a list with one entry for each of the {len(prompt)} prompts, got {given}")
    return [(text, _as_list(entry)) for text, entry in zip(prompt, images, strict=True)]


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _shift(positions: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.where(positions >= 0, positions + offset, positions)


def _stack(parts: list[list[torch.Tensor]], fill: float) -> torch.Tensor:
    """Join each sequence's tensors [T_i, ...] and pad the sequences to one [B, max T, ...]."""
    like = next(tensors[0] for tensors in parts if tensors)
    joined = [torch.cat(tensors) if tensors else like[:0] for tensors in parts]
    return pad_sequence(joined, batch_first=True, padding_value=fill)
