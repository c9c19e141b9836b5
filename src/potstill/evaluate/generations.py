"""How near a model's continuations are to the truth: ROUGE and BLEU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.errors import UserError
from potstill.evaluate.quality import continuation
from potstill.losses.alignment import IGNORE


@dataclass(frozen=True)
class TextQuality:
    """Means over continuations. They compare words: a good answer in other words scores low.

    Args:
        rouge1: F1 of words that both texts have, in [0, 1].
        rouge2: of pairs of words.
        rouge_l: of the longest common subsequence.
        bleu: of the whole corpus, in [0, 100], by sacrebleu's defaults.
        bleu_precisions: what BLEU is the geometric mean of, in [0, 100]: runs of 1, 2, 3 and 4 words that are in a
            reference too.
        brevity_penalty: and what that mean is multiplied by: below 1 where texts are shorter than their references.
        length_ratio: words of the texts over those of their references.
        texts: how many.
    """

    rouge1: float
    rouge2: float
    rouge_l: float
    bleu: float
    bleu_precisions: list[float]
    brevity_penalty: float
    length_ratio: float
    texts: int


def text_quality(written: Sequence[str], truths: Sequence[str | Sequence[str]]) -> TextQuality:
    """ROUGE and BLEU of texts beside their references.

    Args:
        written: one text each.
        truths: the reference of each, or several: ROUGE takes the nearest, BLEU what is in any of them.

    Raises:
        UserError: the libraries are not installed, or there is no text.
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(
            "evaluate --generations: expected rouge-score and sacrebleu to be installed, got none. "
            "Install them: pip install 'potstill[generations]'."
        ) from None
    references = [[truth] if isinstance(truth, str) else list(truth) for truth in truths]
    if not written or not all(references):
        raise UserError("evaluate --generations: expected rows with a beginning and something after it, got none.")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score_multi(several, text) for text, several in zip(written, references, strict=True)]

    def mean(name: str) -> float:
        return sum(score[name].fmeasure for score in scores) / len(scores)

    bleu = sacrebleu.corpus_bleu(list(written), [list(column) for column in zip_longest(*references)])
    return TextQuality(
        rouge1=mean("rouge1"),
        rouge2=mean("rouge2"),
        rouge_l=mean("rougeL"),
        bleu=bleu.score,
        bleu_precisions=bleu.precisions,
        brevity_penalty=bleu.bp,
        length_ratio=bleu.sys_len / max(bleu.ref_len, 1),
        texts=len(scores),
    )


def continuations(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Mapping[str, list[int]]], new_tokens: int
) -> tuple[list[str], list[str]]:
    """How a model goes on, and how the data does.

    Args:
        model: a causal language model.
        tokenizer: its own.
        examples: input_ids and labels. What does not count at the start is the beginning, else the first half.
        new_tokens: at most.

    Returns:
        What was written, and what was to be written.
    """
    written, truths = [], []
    for example in examples:
        ids, labels = example["input_ids"], example["labels"]
        prompt = next((place for place, label in enumerate(labels) if label != IGNORE), 0) or len(ids) // 2
        new = min(new_tokens, len(ids) - prompt)
        if prompt and new > 0:
            written.append(_text(tokenizer, continuation(model, ids[:prompt], new)))
            truths.append(_text(tokenizer, ids[prompt : prompt + new]))
    return written, truths


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
