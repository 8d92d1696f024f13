"""Plain text for a bidirectional base, which predicts some tokens of a window from the others."""

import zlib
from collections.abc import Sequence

import numpy as np

from lora_domains.tokenization.encoded import EncodedExample

SHARE = 0.15
"""Share of a text's tokens that is predicted (Devlin et al. 2019, BERT)."""


def masked_windows(
    name: str, ids: Sequence[int], size: int, mask: int, around: tuple[Sequence[int], Sequence[int]]
) -> list[EncodedExample]:
    """``ids`` in windows of at most ``size``, some of them replaced by the token ``mask``, with the
    tokens ``around`` them at their beginning and end.

    Which ones depends on ``name`` and nothing else; at least one of each window is.
    """
    before, after = around
    windows = []
    for start in range(0, len(ids), size):
        window = ids[start : start + size]
        random = np.random.default_rng([zlib.crc32(name.encode()), start])
        count = max(1, round(SHARE * len(window)))
        places = np.sort(random.permutation(len(window))[:count]).tolist()
        hidden = list(window)
        for place in places:
            hidden[place] = mask
        answer = tuple(window[place] for place in places)
        masked = tuple(place + len(before) for place in places)
        windows.append(
            EncodedExample(
                f"{name}/{start // size}", (*before, *hidden, *after), answer, masked=masked
            )
        )
    return windows
