"""Repeated paragraphs: how they are recognised and dropped."""

import hashlib
from collections.abc import Iterable

_FEWEST_WORDS = 5


def paragraph_key(paragraph: str) -> bytes:
    """Return a key that two paragraphs share when they say the same about differently named things.

    Library documentation repeats itself with another class name or number in it ("The output of `BertModel`…"), and a
    model that was trained on one copy has seen the held-out other. Only plain lower-case words count, unless there are
    fewer than five of them (code, tables): then the whole text counts, white space aside. Source: ours.
    """
    tokens = paragraph.split()
    words = [word for token in tokens if (word := token.strip(".,:;()'\"")).isalpha() and word.islower()]
    text = " ".join(words if len(words) >= _FEWEST_WORDS else tokens)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def drop_repeated(documents: Iterable[str], seen: set[bytes]) -> list[str]:
    """Return the documents without the paragraphs whose key is in ``seen``, which grows by each paragraph kept.

    Paragraphs are separated by blank lines. A document of which nothing is left becomes an empty string.

    Args:
        documents: Texts, in the order that decides which of two copies stays.
        seen: Keys to drop; changed in place.
    """
    kept = []
    for document in documents:
        fresh = []
        for paragraph in document.split("\n\n"):
            key = paragraph_key(paragraph)
            if paragraph.strip() and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        kept.append("\n\n".join(fresh))
    return kept
