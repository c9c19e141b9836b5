"""ROUGE and BLEU of a model's continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.errors import UserError
from potstill.evaluate.quality import continuation
from potstill.losses.alignment import IGNORE
from potstill.models.chat import end_token_ids
from potstill.models.prompts import completion_text


@dataclass(frozen=True)
class TextQuality:
    """Means over continuations. They compare words: a good answer in other words scores low.

    Args:
        rouge1: F1 of shared words, in [0, 1].
        rouge2: F1 of shared pairs of words.
        rouge_l: F1 of the longest common subsequence.
        bleu: corpus BLEU, in [0, 100], with sacrebleu's defaults.
        bleu_precisions: for n-grams, n = 1 to 4, in [0, 100]; BLEU is their geometric mean times `brevity_penalty`.
        brevity_penalty: below 1 if texts are shorter than their references.
        length_ratio: words of the texts over those of their references.
    """

    rouge1: float
    rouge2: float
    rouge_l: float
    bleu: float
    bleu_precisions: list[float]
    brevity_penalty: float
    length_ratio: float
    texts: int


def text_metrics() -> tuple[Any, Any]:
    """Import the libraries of BLEU and ROUGE, or raise a UserError."""
    try:
        import sacrebleu
        from rouge_score import rouge_scorer
    except ImportError:
        raise UserError(
            "evaluate --generations: expected rouge-score and sacrebleu to be installed, got none. "
            "Install them: pip install 'potstill[generations]'."
        ) from None
    return sacrebleu, rouge_scorer


def text_quality(written: Sequence[str], truths: Sequence[str | Sequence[str]]) -> TextQuality:
    """Compute ROUGE (0 to 1) and BLEU (0 to 100) of texts.

    Of several references of a text, ROUGE uses the closest and BLEU all.

    Raises:
        UserError: the libraries are not installed, or there is no text, or no reference for each.
    """
    if isinstance(written, str) or len(written) != len(truths):
        got = "one text" if isinstance(written, str) else f"{len(written)} and {len(truths)}"
        raise UserError(f"text_quality: expected a list of texts and as many references, got {got}.")
    sacrebleu, rouge_scorer = text_metrics()
    references = [[truth] if isinstance(truth, str) else list(truth) for truth in truths]
    if not written or not all(references):
        raise UserError("evaluate --generations: expected rows with a prompt and text after it, got none.")
    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(names)
    scores = [scorer.score_multi(several, text) for text, several in zip(written, references, strict=True)]
    rouge1, rouge2, rouge_l = (sum(score[name].fmeasure for score in scores) / len(scores) for name in names)
    bleu = sacrebleu.corpus_bleu(list(written), [list(column) for column in zip_longest(*references)])
    length_ratio = bleu.sys_len / max(bleu.ref_len, 1)
    return TextQuality(rouge1, rouge2, rouge_l, bleu.score, bleu.precisions, bleu.bp, length_ratio, len(scores))


def continuations(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Mapping[str, list[int]]], new_tokens: int
) -> tuple[list[str], list[str]]:
    """Continue the prompts of examples greedily, and return the generated texts and the data's own.

    The prompt of an example (input_ids, labels) is what has no labels at its start, else its first half. The data's own
    text goes on to the end of that turn or document.
    """
    ends, written, truths = end_token_ids(tokenizer, model), [], []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        prompt = next((i for i, label in enumerate(labels) if label != IGNORE), 0) or len(ids) // 2
        new = min(new_tokens, len(ids) - prompt)
        if prompt and new > 0:
            text = [*takewhile(lambda label: label != IGNORE, labels[prompt : prompt + new])]
            last = next((i for i, label in enumerate(text, 1) if label in ends), None)
            tokens = continuation(model, ids[:prompt], new, ends)
            written.append(completion_text(tokenizer, ids[:prompt], tokens, ends))
            truths.append(completion_text(tokenizer, ids[:prompt], text[:last], ends))
    return written, truths
