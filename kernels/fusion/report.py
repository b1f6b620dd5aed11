"""What fuse() makes of a model, in words."""

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """The report on a model; `str()` of it is to be read, in lines of 100 columns."""

    chains: tuple[tuple[str, str], ...]
    """What is fused, such as ("block1.0 + block1.1 + block2.0", "convolution; ReLU + max-pool"): operators by ";"."""
    left: tuple[tuple[str, str], ...]
    """What is not, such as ("block1.2", "batch norm follows the ReLU"): a place and the reason."""

    def __str__(self) -> str:
        chains = [(_shortened(names), became) for names, became in self.chains]
        width = max((len(names) for names, _ in chains), default=0)
        lines = [f"fused, {len(chains)}:", *(f"{names:{min(width, 60)}}  {became}" for names, became in chains)]
        places: dict[str, list[str]] = {}
        for place, reason in self.left:
            places.setdefault(reason, []).append(place)
        if places:
            lines.append(f"left as they were, {len(self.left)}:")
        lines += [f"{', '.join(names)}: {reason}" for reason, names in places.items()]
        return "\n".join(_wrapped(line) for line in lines)


def _shortened(names: str) -> str:
    """What the names of one chain begin with once: "layer1.0: conv1 + bn1"."""
    parts = names.split(" + ")
    parent = parts[0].rpartition(".")[0]
    if len(parts) == 1 or not parent or not all(part.startswith(f"{parent}.") for part in parts):
        return names
    return f"{parent}: {' + '.join(part.removeprefix(f'{parent}.') for part in parts)}"


def _wrapped(line: str) -> str:
    if line.endswith(":"):
        return line
    if len(line) <= 98:
        return f"  {line}"  # columns stay columns
    return textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ")
