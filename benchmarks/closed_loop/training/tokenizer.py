"""A small tokenizer with Llama-2's conventions, learned from the instructions that the policy is trained on."""

from string import printable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from benchmarks.closed_loop.simulation.tasks import TASKS
from evla_compile.host.processor import PROMPT

VOCABULARY = 512
"""Rows of the token embedding."""
PAD_ID = 0
"""Row that fills a prompt up to its budget: that of <unk>, which no prompt contains."""

_WORD_BOUNDARY = "\u2581"


def make_tokenizer() -> str:
    """Return a tokenizer.json: byte-pair pieces with "\u2581" for word boundaries, <unk> 0, <s> 1, </s> 2.

    Every printable ASCII character is a piece, so that any English instruction can be written in it.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_WORD_BOUNDARY, prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(replacement=_WORD_BOUNDARY, prepend_scheme="first")
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=[*sorted(set(printable) - set(" \t\r\x0b\x0c")), _WORD_BOUNDARY],
        show_progress=False,
    )
    prompts = [PROMPT.format(instruction=text) for task in TASKS.values() for text in task.instructions]
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str(pretty=True)
