"""Padded token sequences: prompts, each followed by a response."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class Batch:
    """Padded token sequences: a prompt followed by a response, N rows of T positions.

    ids: int64 [N, T]. attention: bool [N, T], False on padding (on either side). response: bool [N, T], True on
    the tokens of the response, its end-of-text token included.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor

    def __post_init__(self):
        shapes = {field.name: tuple(getattr(self, field.name).shape) for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.ids.ndim != 2:
            raise ValueError(f"Batch: one shape [N, T] for all is needed, given {shapes}")

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, index: torch.Tensor | slice) -> "Batch":
        """Some rows, without the columns that are padding in all of them."""
        used = self.attention[index].any(0).nonzero()
        keep = slice(int(used.min()), int(used.max()) + 1)
        return Batch(self.ids[index][:, keep], self.attention[index][:, keep], self.response[index][:, keep])

    def take(self, index: torch.Tensor) -> "Batch":
        """Some rows, with all columns."""
        return Batch(self.ids[index], self.attention[index], self.response[index])

    def chunks(self, size: int) -> list["Batch"]:
        """The rows in order, in chunks of at most `size`, each without the columns that it does not use."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def slices(self, size: int) -> list["Batch"]:
        """The rows in order, in chunks of at most `size` with all columns kept, so that results can be concatenated."""
        parts = (getattr(self, field.name).split(size) for field in fields(self))
        return [Batch(*part) for part in zip(*parts, strict=True)]

    def pieces(self, size: int) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], "Batch"]]:
        """Rows of like length together, at most `size`, without the columns that they do not use, each with its place.

        `x[place]` are its entries of any x [N, T]: little is computed for padding, and all finds back to its row.
        """
        for rows in self.attention.sum(-1).argsort(stable=True).split(size):
            columns = self.attention[rows].any(0).nonzero().squeeze(-1)
            columns = torch.arange(int(columns.min()), int(columns.max()) + 1, device=columns.device)
            yield (rows[:, None], columns[None]), self.rows(rows)

    def to(self, device) -> "Batch":
        return Batch(self.ids.to(device), self.attention.to(device), self.response.to(device))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Rows of several batches in one, padded on the right to the longest."""
    width = max(b.ids.shape[1] for b in batches)

    def stack(name: str) -> torch.Tensor:
        parts = [getattr(b, name) for b in batches]
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])

    return Batch(stack("ids"), stack("attention"), stack("response"))


def pad(prompts: Sequence[list[int]], responses: Sequence[list[int]], pad_id: int, side: str = "right") -> Batch:
    """Stack prompts and responses (token ids) into a Batch, padded on one side.

    Raises ValueError if the numbers differ, a sequence is empty or `side` is neither "right" nor "left".
    """
    if side not in ("right", "left"):
        raise ValueError(f"side={side!r}: must be 'right' or 'left'")
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one response a prompt is needed")
    if not all(prompts) or not all(responses):
        raise ValueError("an empty prompt or response: each needs at least one token")
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    attention = torch.zeros((len(prompts), width), dtype=torch.bool)
    response = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        start = 0 if side == "right" else width - len(p) - len(r)
        middle, end = start + len(p), start + len(p) + len(r)
        ids[row, start:end] = torch.tensor([*p, *r])
        attention[row, start:end] = True
        response[row, middle:end] = True
    return Batch(ids, attention, response)
