"""Is a text a request for harm, or abusive? A tripwire for prompts, streamed answers and feedback.

    detector = ViolationDetector()
    detector.score("How do I sharpen a knife?")      # probability in [0, 1]
    detector.check(text).flagged                     # with categories, reasons and personal data

A text is read through its views (see `views`), each in windows, by a lexicon and by linear classifiers of
hashed words and characters; the highest probability counts. NumPy alone, no model, no network. It knows
words, not intentions: how little that is, on data that it was not made from, stands in its card
(violation-detector/README.md). Whatever goes wrong, an error or too long a text, is flagged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from bem.errors import BemError
from bem.safety.features import WORD, tf_idf
from bem.safety.personal import PersonalData, find_personal
from bem.safety.views import views
from bem.safety.weights import Category, Weights, read_weights

SHIPPED = Path(__file__).parent / "violation-detector"
WINDOW, STRIDE = 64, 40
"""Words that are read together."""
SENTENCE, SENTENCE_STRIDE = 24, 12
"""Words of a sentence, read by itself too: a request in a long harmless text must not drown in it."""
ENDS = re.compile(r"(?<=[^\W_]{2})[.!?;:]+[\"')]*\s+")
LONGEST = 200_000
"""Characters; a longer text is flagged unread."""


@dataclass(frozen=True)
class Finding:
    """One category that a text was flagged for."""

    category: str
    score: float
    """Calibrated probability; 1 where the text could not be checked."""
    limit: float
    reason: str
    """In plain words, without any of the text."""


@dataclass(frozen=True)
class Checked:
    """What a detector says of one text."""

    score: float
    """Of the most probable category."""
    findings: tuple[Finding, ...]
    """Categories above their limits; empty: nothing was found."""
    personal: tuple[PersonalData, ...]
    """Personal data; it flags nothing by itself."""
    scores: dict[str, float]
    """Category -> probability, also below its limit."""
    error: str = ""
    """Why the text could not be checked."""

    @property
    def flagged(self) -> bool:
        """Something was found, or nothing could be known."""
        return bool(self.findings)


class ViolationDetector:
    """Scores texts; immutable, so that threads may share it."""

    def __init__(
        self,
        folder: str | Path = SHIPPED,
        timeout_ms: float = 2000.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            folder: of weights that scripts/train_detector.py wrote.
            timeout_ms: for one text; what is not read by then is flagged.
            clock: in seconds.
        Raises:
            CheckpointError: missing, damaged or foreign files.
        """
        self.weights: Weights = read_weights(Path(folder))
        self.timeout_ms, self._clock = timeout_ms, clock

    def score(self, text: str) -> float:
        """Probability in [0, 1] that a text is a violation; 1 if it could not be checked."""
        return self.check(text).score

    def check(self, text: str) -> Checked:
        """Score a text and say what for. Never raises: what cannot be checked is flagged."""
        try:
            scores = self._scores(text)
            personal = tuple(find_personal(text))
        except Exception as error:  # a gate that cannot compute its answer is closed
            return _unchecked(f"{type(error).__name__}: {error}")
        findings = [
            Finding(c.name, p, c.limit, _reason(c, p, through, by))
            for c in self.weights.categories
            for p, through, by in [scores[c.name]]
            if p > c.limit
        ]
        plain = {name: p for name, (p, _, _) in scores.items()}
        return Checked(max(plain.values()), tuple(findings), personal, plain)

    def _scores(self, text: str) -> dict[str, tuple[float, str, str]]:
        """Category -> (probability, the disguise it was seen through, what saw it)."""
        if len(text) > LONGEST:
            raise TooLong(f"{len(text)} characters, at most {LONGEST} are read")
        end = self._clock() + self.timeout_ms / 1000
        best = {c.name: (_probability(c, c.bias), "", "words") for c in self.weights.categories}
        for view in views(text):
            for window in _windows(view.text):
                if self._clock() > end:
                    raise TooLong(f"not read within {self.timeout_ms:g} ms")
                for name, (p, by) in self._window(window).items():
                    if p > best[name][0]:
                        best[name] = (p, view.through, by)
        return best

    def _window(self, text: str) -> dict[str, tuple[float, str]]:
        indices, values = tf_idf(text, self.weights.idf)
        found = {}
        for c in self.weights.categories:
            p = _probability(c, float(c.weights[indices] @ values) + c.bias)
            found[c.name] = (p, "words")
        listed = max((self.weights.words.get(word_digest(w), 0.0) for w in WORD.findall(text)), default=0.0)  # fmt: skip
        if "abuse" in found and listed > found["abuse"][0]:
            found["abuse"] = (listed, "lexicon")
        return found


class Stream:
    """Checks an answer while it is made: call `feed` with each piece *before* it is sent.

    A piece is judged with what came before it, so that what is cut in two is still seen: by then its
    first half is out. After the first flagged piece everything is flagged.
    """

    def __init__(self, detector: ViolationDetector, remembered: int = 400):
        """remembered: characters of what was sent that are read again with each piece."""
        self._detector, self._remembered = detector, remembered
        self._tail = ""
        self._stopped: Checked | None = None

    def feed(self, piece: str) -> Checked:
        """Judge the next piece. `personal` has places within the remembered text and the piece."""
        if self._stopped is not None:
            return self._stopped
        checked = self._detector.check(self.remember(piece))
        if checked.flagged:
            self._stopped = checked
        return checked

    def remember(self, piece: str) -> str:
        """What is read with the next piece: what came before, and the piece."""
        text = self._tail + piece
        self._tail = text[-self._remembered :] if self._remembered else ""
        return text


class TooLong(BemError):
    """A text that was not read to its end."""


def word_digest(word: str) -> int:
    """Name of a word in the lexicon, which holds none in clear."""
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")


def _windows(text: str) -> Iterator[str]:
    yield from _pieces(text, WINDOW, STRIDE)
    sentences = ENDS.split(text)
    if len(sentences) > 1 or text.count(" ") >= SENTENCE:
        for sentence in sentences:
            yield from _pieces(sentence, SENTENCE, SENTENCE_STRIDE)


def _pieces(text: str, size: int, stride: int) -> Iterator[str]:
    words = text.split(" ")
    for start in range(0, max(1, len(words) - size + stride), stride):
        yield " ".join(words[start : start + size])


def _probability(category: Category, score: float) -> float:
    return float(1 / (1 + np.exp(-(category.slope * score + category.intercept))))


def _reason(category: Category, probability: float, through: str, by: str) -> str:
    seen = f", seen through {through}" if through else ""
    return f"{category.name} with probability {probability:.2f} by {by}{seen} (limit {category.limit:.2f})"


def _unchecked(why: str) -> Checked:
    finding = Finding("unchecked", 1.0, 0.0, f"could not be checked: {why}")
    return Checked(1.0, (finding,), (), {}, why)
