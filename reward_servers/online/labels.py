"""What a judge has said so far: keys, features, labels; the newest `capacity` of them, each key once.

A key is prompt and perceptual hash (dHash of 9x8 grey cells), so images that look alike are asked about once (ONI:
dedupe by hash). Thread-safe. Does not own: asking (distilled.py), learning.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from PIL import Image

from reward_servers.online.references import prompt_key

Key = tuple[int, int]


def image_key(prompt: str, image: np.ndarray) -> Key:
    """(prompt, perceptual hash) of a uint8 [H,W,3], 64 bits each."""
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).reshape(-1)
    return prompt_key(prompt), int(np.packbits(bits).view(">u8")[0])


@dataclass(frozen=True)
class Label:
    """features: float32 [F]; score: the judge's; group: labels of one group may be compared."""

    features: np.ndarray
    score: float
    group: int


class Labels:
    """Labels by key, oldest first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[Key, Label] = OrderedDict()
        self._asked: set[Key] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def claim(self, keys: list[Key], number: int) -> list[int]:
        """Rows of at most `number` keys that nobody has asked about; they count as asked about until `give_up`."""
        with self._lock:
            chosen: list[int] = []
            for row, key in enumerate(keys):
                if len(chosen) < number and key not in self._known and key not in self._asked:
                    self._asked.add(key)
                    chosen.append(row)
            return chosen

    def give_up(self, keys: list[Key]) -> None:
        """The judge did not say: ask again when such an image comes."""
        with self._lock:
            self._asked.difference_update(keys)

    def add(self, key: Key, label: Label) -> None:
        with self._lock:
            self._asked.discard(key)
            self._known[key] = label
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)

    def known(self, keys: list[Key]) -> int:
        """How many of the keys have a label."""
        with self._lock:
            return sum(key in self._known for key in keys)

    def all(self) -> list[Label]:
        with self._lock:
            return list(self._known.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, for a version."""
        with self._lock:
            keys, labels = list(self._known), list(self._known.values())
        return {
            "label_keys": np.array(keys, np.uint64).reshape(len(keys), 2),
            "label_scores": np.array([label.score for label in labels], np.float32),
            "label_groups": np.array([label.group for label in labels], np.int64),
            "label_features": np.array([label.features for label in labels], np.float32),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `arrays`."""
        rows = zip(arrays["label_keys"].tolist(), arrays["label_features"], arrays["label_scores"].tolist(),
                   arrays["label_groups"].tolist(), strict=True)  # fmt: skip
        with self._lock:
            self._asked.clear()
            self._known = OrderedDict(((int(a), int(b)), Label(f, s, int(g))) for (a, b), f, s, g in rows)
