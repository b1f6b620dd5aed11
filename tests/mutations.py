"""Random damage to the bytes of a file, from a seed: the same seed gives the same damage."""

import random
from collections.abc import Iterator


def mutations(raw: bytes, count: int, seed: object, tokens: tuple[bytes, ...] = ()) -> Iterator[bytes]:
    """`count` damaged copies of `raw`: cut short, bits flipped, header bytes made extreme, pieces put in or taken out.

    tokens   what is put in besides random bytes
    """
    draw = random.Random(str(seed))
    for _ in range(count):
        damaged = bytearray(raw)
        kind = draw.randrange(4)
        if kind == 0:
            del damaged[draw.randrange(len(raw)) :]
        elif kind == 1:
            for _ in range(draw.randrange(1, 6)):
                damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        elif kind == 2:
            for _ in range(draw.randrange(1, 4)):
                damaged[draw.randrange(min(80, len(raw)))] = draw.choice((0, 127, 128, 255, draw.randrange(256)))
        else:
            start = draw.randrange(len(raw))
            piece = draw.choice(tokens) if tokens and draw.random() < 0.7 else draw.randbytes(draw.randrange(9))
            damaged[start : start + draw.randrange(9)] = piece
        yield bytes(damaged)
