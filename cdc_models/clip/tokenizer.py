"""CLIP's byte-pair tokenizer cut to its first merges, for small models.

The rules and the merge list are open_clip's; only how many merges are kept is ours. Fewer merges make a smaller
embedding table, and words that need a dropped merge are simply spelled in more pieces.
"""

from __future__ import annotations

from open_clip.tokenizer import SimpleTokenizer

__all__ = ["cut_tokenizer"]

_BYTE_TOKENS = 512  # 256 bytes, and the same bytes at the end of a word


def cut_tokenizer(merges: int, context_length: int) -> SimpleTokenizer:
    """open_clip's tokenizer with only its first ``merges`` merges.

    The vocabulary is 512 byte tokens, then the merges, then start and end of text, so the end-of-text id is the
    largest one, as CLIP's pooling expects.

    Args:
        merges: how many of the 48,894 merges to keep.
        context_length: length to which texts are padded.

    Raises:
        ValueError: if ``merges`` is out of range.

    Example:
        >>> tokenizer = cut_tokenizer(4000, context_length=24)
        >>> tokenizer.vocab_size, tokenizer.eot_token_id
        (4514, 4513)
        >>> tokenizer(["a photo of a cat."]).shape
        torch.Size([1, 24])
    """
    tokenizer = SimpleTokenizer(context_length=context_length)
    available = len(tokenizer.bpe_ranks)
    if not 0 <= merges <= available:
        raise ValueError(f"merges: expected 0 to {available}, got {merges}")
    special = list(tokenizer.all_special_ids)
    names = [tokenizer.decoder[i] for i in special]
    vocabulary = [tokenizer.decoder[i] for i in range(_BYTE_TOKENS + merges)] + names
    tokenizer.encoder = {token: index for index, token in enumerate(vocabulary)}
    tokenizer.decoder = dict(enumerate(vocabulary))
    tokenizer.bpe_ranks = {pair: rank for pair, rank in tokenizer.bpe_ranks.items() if rank < merges}
    tokenizer.vocab_size = len(vocabulary)
    tokenizer.all_special_ids = [tokenizer.encoder[name] for name in names]
    tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    return tokenizer
