"""What the base model reads: real text, task examples, and drills that teach copying.

A base that has not learned to copy makes every adapter look useless, because nearly every task here
(JSON slots, SQL values, answers from evidence) is "take these words from the prompt and put them
there". Prose alone teaches that late; the drills teach it early. The demo families (`DEMO_TASKS`)
enter only as unpaired lines: their words become familiar, their mapping stays for the adapters.

    documents (text) -> token pieces per source -> Mixture: shares by tokens -> rows of equal length
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")

PAIRED_TASKS = (
    "json_restaurant8k",
    "gen_sgd",
    "json_sgd_call",
    "gen_e2e",
    "intent_clinc150",
    "intent_banking77",
    "math_gsm8k",
    "qa_strategy",
    "qa_pubmed",
)
DEMO_TASKS = ("qa_babi", "gen_rnnlg", "json_snips", "sql_wikisql", "cmd_tldr", "qa_nq_oracle")

SHARES = {
    "prose": 0.40,
    "python": 0.10,
    "paired": 0.22,
    "unpaired": 0.10,
    "repeats": 0.05,
    "drills": 0.13,
}
# Until EARLY_PART of the run: with the later shares alone, 2.8 M tokens taught no copying at all.
EARLY_SHARES = {"repeats": 0.25, "drills": 0.20}
EARLY_PART = 0.3
LONGEST_PIECE = 1024


def split_of(module: str) -> str:
    """Side of the standard-library split on which a top-level module lies: train, dev or test.

    A hash, not a list: the same on every Python version, and a new module has a side at once.
    """
    bucket = int(hashlib.md5(module.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


# ---------------------------------------------------------------------------------------- documents


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number} is not JSON ({error}). Fetch it again."
                ) from None


def prompt_of(row: dict[str, Any]) -> str:
    """What the user says: the evidence lines, then the input."""
    return "\n".join([*row.get("evidence", []), row["input"]])


def chat(*turns: str) -> str:
    """user, assistant, user, assistant ... as the tokenizer's chat template renders it."""
    marks = ("<|user|>{}", "<|assistant|>{}<|eos|>")
    return "<|bos|>" + "".join(marks[i % 2].format(turn) for i, turn in enumerate(turns))


def plain(text: str) -> str:
    return f"<|bos|>{text}<|eos|>"


def answers_of(task: str, row: dict[str, Any]) -> list[str]:
    if task == "math_gsm8k":
        return [f"{row['meta']['solution']}\n#### {row['references'][0]}"]
    return row["references"]


def paired_documents(data: Path) -> list[str]:
    """Chats of the tasks that the demo never measures."""
    return [
        chat(prompt_of(row), answer)
        for task in PAIRED_TASKS
        for row in read_rows(data / f"{task}.train.jsonl.gz")
        for answer in answers_of(task, row)
    ]


def unpaired_documents(data: Path) -> list[str]:
    """Prompts alone and answers alone of the demo families, never one beside its own other half.

    Each line is its own document and the mixture draws them in random order. Half keep the mark of
    their role, so that the model learns how a turn looks; half are bare text.
    """
    documents = []
    for task in DEMO_TASKS:
        for i, row in enumerate(read_rows(data / f"{task}.train.jsonl.gz")):
            prompt, answer = prompt_of(row), row["references"][0]
            documents.append(plain(prompt if i % 2 else f"<|user|>{prompt}"))
            documents.append(plain(answer if i % 2 else f"<|assistant|>{answer}"))
    return documents


def prose_documents(data: Path, part: str = "train") -> list[str]:
    return [plain(row["text"]) for row in read_rows(data / f"lm_openstax.{part}.jsonl.gz")]


def library_files() -> Iterator[Path]:
    """Source files of the standard library's train side (not its tests, not its data tables)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "pydoc_data",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "idlelib",
        "this",
        "antigravity",
    }
    for module in sorted(sys.stdlib_module_names - skipped):
        if split_of(module) != "train":
            continue
        single = root / f"{module}.py"
        files = [single] if single.exists() else sorted((root / module).rglob("*.py"))
        yield from (file for file in files if not skipped & set(file.relative_to(root).parts))


def python_documents() -> list[str]:
    """Source files of the standard library and the help topics, train side only."""
    from pydoc_data.topics import topics

    documents = []
    for file in library_files():
        with contextlib.suppress(UnicodeDecodeError):  # a few encodings tests; not worth a rule
            documents.append(plain(file.read_text(encoding="utf-8")))
    return documents + [plain(text) for name, text in topics.items() if split_of(name) == "train"]


# ------------------------------------------------------------------------------------------- pieces


class Piece(NamedTuple):
    """Token ids of (part of) a document; `learn` is False where the loss must not look."""

    ids: np.ndarray
    learn: np.ndarray


class Shelf:
    """Tokenised documents of one source, drawn without repetition until all were seen."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray, seed: int, start: int = 0, step: int = 1):
        """`ids`: all documents one after another; `ends`: where each ends. `start`, `step`: the
        share of this process, so that two processes never read the same document in an epoch."""
        starts = np.concatenate([[0], ends[:-1]])
        cuts = [
            (at, min(at + LONGEST_PIECE, end))
            for first, end in zip(
                starts[start::step].tolist(), ends[start::step].tolist(), strict=True
            )
            for at in range(first, end, LONGEST_PIECE)
        ]
        if not cuts:
            raise ValueError("A source holds no documents for this process. Check the data folder.")
        self.ids, self.cuts, self.seed, self.drawn = ids, cuts, seed, 0
        self._order = (-1, np.zeros(0, dtype=int))

    def draw(self) -> Piece:
        epoch, at = divmod(self.drawn, len(self.cuts))
        if self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(len(self.cuts)),
            )
        first, end = self.cuts[self._order[1][at]]
        self.drawn += 1
        return Piece(self.ids[first:end].astype(np.int64), np.ones(end - first, dtype=bool))

    def mean_length(self) -> float:
        return sum(end - first for first, end in self.cuts) / len(self.cuts)


class Drills:
    """Endless exercises in copying and looking up, made from `sentences` and random tokens."""

    def __init__(
        self, encode: Callable[[str], list[int]], vocab_size: int, sentences: Sequence[str]
    ):
        self.encode, self.vocab_size = encode, vocab_size
        self.sentences = [s.split() for s in sentences]
        self.kinds: list[tuple[float, Callable[[np.random.Generator], Any]]] = [
            (2.0, self.key_value),
            (1.0, self.list_item),
            (4.0, self.cue_to_fields),
            (1.5, self.quoted_span),
            (2.5, self.slots),
            (1.5, self.named_columns),
            (0.7, self.rewrite),
        ]
        weights = np.array([weight for weight, _ in self.kinds])
        self._p = weights / weights.sum()

    def draw(self, rng: np.random.Generator) -> Piece:
        text = self.kinds[rng.choice(len(self.kinds), p=self._p)][1](rng)
        ids = np.array(self.encode(text)[:LONGEST_PIECE])
        return Piece(ids, np.ones(len(ids), dtype=bool))

    # -- repeated spans, no chat

    def span_ids(self, rng: np.random.Generator) -> np.ndarray:
        n = int(rng.integers(5, 41))
        if rng.random() < 0.6:
            return rng.integers(len(SPECIAL_TOKENS), self.vocab_size, n)
        return np.array(self.encode(" ".join(self.words(rng))))[:n]

    def repeats(self, rng: np.random.Generator) -> Piece:
        """Spans of random tokens or prose, again and again; loss only where it can be foretold."""
        spans = [self.span_ids(rng) for _ in range(rng.integers(1, 4))]
        gaps = rng.random() < 0.5
        parts, learn = [np.array([BOS])], [np.zeros(1, dtype=bool)]
        for turn in range(len(spans) + int(rng.integers(1, 7))):
            seen = turn >= len(spans)
            span = spans[int(rng.integers(len(spans))) if seen else turn]
            gap = self.span_ids(rng)[: rng.integers(0, 12) if gaps else 0]
            known = np.full(len(span), seen)
            known[0] = False  # which span comes is chance; from its second token on it is not
            parts += [span, gap]
            learn += [known, np.zeros(len(gap), dtype=bool)]
        return Piece(np.append(np.concatenate(parts), EOS), np.append(np.concatenate(learn), False))

    # -- words and spans of real sentences

    def words(self, rng: np.random.Generator) -> list[str]:
        words = self.sentences[rng.integers(len(self.sentences))]
        if len(words) > 40:
            first = int(rng.integers(len(words) - 40))
            words = words[first : first + 40]
        return words

    def span(self, rng: np.random.Generator, longest: int = 4) -> str:
        """One to `longest` consecutive words without their punctuation, sometimes in lower case."""
        words = self.words(rng)
        n = int(rng.integers(1, longest + 1))
        first = int(rng.integers(max(1, len(words) - n + 1)))
        text = " ".join(words[first : first + n]).strip(".,;:!?()[]\"“”‘’'") or "none"
        return text.lower() if rng.random() < 0.5 else text

    def names(self, rng: np.random.Generator, n: int) -> list[str]:
        """`n` different identifiers such as `pressure`, `cell_wall`."""
        found: dict[str, None] = {}
        while len(found) < n:
            name = "_".join(re.findall(r"[a-z]+", self.span(rng, 2).lower()))
            if name:
                found[name if rng.random() < 0.9 else f"{name}_{len(found)}"] = None
        return list(found)

    def in_some_form(self, rng: np.random.Generator, fields: dict[str, str]) -> str:
        """The same fields as JSON, a call, lines or a list: the first token of a copied word then
        differs from the one in the prompt (leading space, quote), as it does in real answers."""
        form = rng.integers(6)
        if form <= 2:
            return json.dumps(fields, ensure_ascii=False)
        if form == 3:
            inner = ", ".join(f'{k}="{v}"' for k, v in fields.items())
            return f"find({inner})"
        if form == 4:
            return "\n".join(f"{k}: {v}" for k, v in fields.items())
        return " AND ".join(f'{k} = "{v}"' for k, v in fields.items())

    # -- drills in chat form

    def key_value(self, rng: np.random.Generator) -> str:
        n = int(rng.integers(2, 9))
        keys, values = self.names(rng, n), [self.span(rng, 3) for _ in range(n)]
        equals = ("=", ": ", " = ", " is ")[rng.integers(4)]
        joint = ("; ", "\n", ", ")[rng.integers(3)]
        turns = []
        for i in rng.permutation(n)[:4]:
            turns += [
                f"{keys[i]}?",
                values[i] if rng.random() < 0.6 else json.dumps({keys[i]: values[i]}),
            ]
        turns[0] = (
            joint.join(k + equals + v for k, v in zip(keys, values, strict=True)) + "\n" + turns[0]
        )
        return chat(*turns)

    def list_item(self, rng: np.random.Generator) -> str:
        items = list(dict.fromkeys(self.span(rng, 2) for _ in range(rng.integers(3, 7))))
        ordinals = ("first", "second", "third", "fourth", "fifth", "sixth")[: len(items)]
        asked = {o: items[i] for i, o in enumerate(ordinals)}
        asked |= {"last": items[-1]}
        asked |= {f"after {a}": b for a, b in itertools.pairwise(items)}
        asked |= {f"before {b}": a for a, b in itertools.pairwise(items)}
        joint = (", ", "\n", " | ")[rng.integers(3)]
        turns = []
        for i in rng.permutation(len(asked))[:4]:
            turns += list(list(asked.items())[i])
        turns[0] = joint.join(items) + "\n" + turns[0]
        return chat(*turns)

    def cue_to_fields(self, rng: np.random.Generator) -> str:
        """A sentence and a cue word in it -> the words around the cue, in some form."""
        words = self.words(rng)
        once = [i for i, w in enumerate(words) if words.count(w) == 1 and 0 < i < len(words) - 1]
        if not once:
            return self.quoted_span(rng)
        at = once[rng.integers(len(once))]
        n = int(rng.integers(1, 4))
        clean = [w.strip('"') for w in words]
        around = {
            "after": " ".join(clean[at + 1 : at + 1 + n]),
            "before": " ".join(clean[max(0, at - n) : at]),
        }
        asked = ("after", "before", "both")[rng.integers(3)]
        fields = {"word": clean[at]} if rng.random() < 0.7 else {}
        fields |= around if asked == "both" else {asked: around[asked]}
        sentence = " ".join(words)
        if rng.random() < 0.5:
            return chat(f"{sentence}\n{n} {asked} {clean[at]}", self.in_some_form(rng, fields))
        return chat(f"{n} {asked} {clean[at]}: {sentence}", self.in_some_form(rng, fields))

    def quoted_span(self, rng: np.random.Generator) -> str:
        words = [w.strip('"') for w in self.words(rng)]
        n = int(rng.integers(1, 6))
        first = int(rng.integers(max(1, len(words) - n)))
        span = " ".join(words[first : first + n])
        left, right = (('"', '"'), ("'", "'"), ("`", "`"), ("[", "]"))[rng.integers(4)]
        sentence = " ".join([*words[:first], left + span + right, *words[first + n :]])
        answer = span if rng.random() < 0.4 else self.in_some_form(rng, {"quote": span})
        return chat(f"{sentence}\nquote?", answer)

    def slots(self, rng: np.random.Generator) -> str:
        """A made-up request whose small words tell which span fills which field."""
        marks = {
            "to": "target", "from": "source", "for": "purpose", "with": "tool", "by": "author",
            "at": "place", "in": "group", "on": "day", "about": "topic", "called": "name",
        }  # fmt: skip
        chosen = [list(marks)[i] for i in rng.permutation(len(marks))[: rng.integers(1, 5)]]
        verb = ("send", "move", "put", "open", "write", "show", "keep", "fetch")[rng.integers(8)]
        fields = {"action": verb, "thing": self.span(rng, 3)}
        request = f"{verb} {fields['thing']}"
        for mark in chosen:
            fields[marks[mark]] = self.span(rng, 3)
            request += f" {mark} {fields[marks[mark]]}"
        if rng.random() < 0.3:
            request = request.capitalize() + "."
            return chat(request, self.in_some_form(rng, {k: fields[k] for k in sorted(fields)}))
        return chat(request, self.in_some_form(rng, fields))

    def named_columns(self, rng: np.random.Generator) -> str:
        """Column names, then a question that names two of them and a value -> a call."""
        columns = [name.replace("_", " ") for name in self.names(rng, int(rng.integers(3, 7)))]
        wanted, given = (columns[i] for i in rng.permutation(len(columns))[:2])
        value = self.span(rng, 3) if rng.random() < 0.7 else str(rng.integers(3000))
        question = (
            f"what {wanted} has {given} {value} ?",
            f"which {wanted} when {given} is {value}",
            f"{wanted} with a {given} of {value} ?",
            f"for {given} {value} , tell the {wanted}",
        )[rng.integers(4)]
        answer = f'get {wanted} if {given} is "{value}"'
        if rng.random() < 0.4:
            answer = json.dumps({"get": wanted, "if": given, "is": value}, ensure_ascii=False)
        return chat("\n".join([*columns, question]), answer)

    def rewrite(self, rng: np.random.Generator) -> str:
        words = self.words(rng)[:20]
        text = " ".join(words)
        name, answer = (
            ("repeat", text),
            ("lower", text.lower()),
            ("words", json.dumps(words[:12], ensure_ascii=False)),
            ("quote", f'"{text}"'),
        )[rng.integers(4)]
        return chat(f"{name}: {text}", answer)


# ------------------------------------------------------------------------------------------ mixture


def pack(pieces: Iterable[Piece], rows: int, length: int, left: Piece) -> tuple[Piece, Piece]:
    """`rows` rows of `length + 1` tokens cut from `left` and then `pieces`, and what is left over.

    Neighbouring rows share one token, because the last target of a row is the first input of the
    next: every token of every piece is a target exactly once.
    """
    need = rows * length + 1
    ids, learn, have = [left.ids], [left.learn], len(left.ids)
    source = iter(pieces)
    while have < need:
        piece = next(source)
        ids.append(piece.ids)
        learn.append(piece.learn)
        have += len(piece.ids)
    flat, flags = np.concatenate(ids), np.concatenate(learn)
    windows = np.arange(rows)[:, None] * length + np.arange(length + 1)
    return Piece(flat[windows], flags[windows]), Piece(flat[need - 1 :], flags[need - 1 :])


class Mixture:
    """Rows of tokens in which each source has its share. All state is in `state_dict()`."""

    def __init__(self, shelves: dict[str, Shelf], drills: Drills, seed: int, shares=None):
        self.shelves, self.drills = shelves, drills
        self.made = {"repeats": drills.repeats, "drills": drills.draw}
        self.shares = dict(SHARES if shares is None else shares)
        self.rng = np.random.default_rng(seed)
        self.left = Piece(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
        self._lengths = {name: shelf.mean_length() for name, shelf in shelves.items()}
        for name, make in self.made.items():
            some = np.random.default_rng(0)
            self._lengths[name] = float(np.mean([len(make(some).ids) for _ in range(400)]))

    def chances(self, progress: float) -> dict[str, float]:
        """Chance of each source to give the next piece. Shares count tokens, so they are divided
        by the mean length of a piece."""
        shares = dict(self.shares)
        if progress < EARLY_PART:
            early = {name: share for name, share in EARLY_SHARES.items() if shares.get(name)}
            later = sum(share for name, share in shares.items() if name not in early)
            others = (1 - sum(early.values())) / later
            shares = {name: share * others for name, share in shares.items()} | early
        pieces = {name: share / self._lengths[name] for name, share in shares.items() if share}
        total = sum(pieces.values())
        return {name: count / total for name, count in pieces.items()}

    def _pieces(self, progress: float) -> Iterator[Piece]:
        chances = self.chances(progress)
        names, p = list(chances), np.array(list(chances.values()))
        while True:
            name = names[self.rng.choice(len(names), p=p)]
            yield self.made[name](self.rng) if name in self.made else self.shelves[name].draw()

    def batch(self, rows: int, length: int, progress: float) -> Piece:
        made, self.left = pack(self._pieces(progress), rows, length, self.left)
        return made

    def state_dict(self) -> dict[str, Any]:
        return {
            "rng": self.rng.bit_generator.state,
            "drawn": {name: shelf.drawn for name, shelf in self.shelves.items()},
            "left": (self.left.ids.tolist(), self.left.learn.tolist()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]
        for name, drawn in state["drawn"].items():
            self.shelves[name].drawn = drawn
        ids, learn = state["left"]
        self.left = Piece(np.array(ids, dtype=np.int64), np.array(learn, dtype=bool))
