"""What the engines are given to read: questions, passages of a real text, a conversation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench_engine_sides import Messages, Ours

from edgemoa.core.messages import BoardId, ChatMessage
from edgemoa.core.moa import Draft, Room, Synthesis, Write
from edgemoa.core.parts import READ_CHARACTERS
from edgemoa.engine.answer import Reader, load_reader
from edgemoa.models.library import read_manifest

# Each calls for a text of a few hundred words.
QUESTIONS: Final = (
    "Why is the sky blue? Explain it in detail.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain step by step how to bake a loaf of bread at home.",
    "Describe the water cycle to a class of ten-year-olds.",
    "What should I think about before I adopt a dog?",
    "Write a polite letter to my landlord: the heating has been broken for a week.",
    "How did the printing press change Europe?",
    "Give me a plan for learning to play the guitar within a year.",
)
TO_AGGREGATE: Final = "What are the advantages and disadvantages of living in a big city?"
TALK: Final = (
    "I want to grow vegetables on my balcony. Where do I begin?",
    "Which of them are the easiest for somebody who often forgets to water?",
    "What kind of pots and soil should I buy?",
    "How much sun do they need, and what if my balcony faces north?",
    "What do I do about insects without using poison?",
    "When is the right time of the year to start?",
    "Can I keep the seeds for the next year, and how?",
    "How much will all of that cost me?",
    "Which flowers go well with vegetables?",
    "What do I do with the plants in winter?",
)
FOLLOW_UP: Final = "And what would you do first?"

LONG_TOKENS: Final = 1000
LONG_PROMPTS: Final = 2
SHORT_PROMPTS: Final = 4
ARRIVAL_TOKENS: Final = 128
ARRIVALS: Final = 6
PROPOSALS: Final = 4
PROPOSAL_TOKENS: Final = 150
ANSWER_TOKENS: Final = 120  # of a turn in the conversation that is followed up


def asked(content: str) -> Messages:
    """A conversation of one question."""
    return (ChatMessage("user", content),)


@dataclass
class Passages:
    """Prompts of a wanted length around passages of a text, no two of which begin alike."""

    reader: Reader
    text: str

    def __post_init__(self) -> None:
        words = self.text.split()
        self._starts = self._spread(len(words))
        self._words = words * 2

    def prompt(self, tokens: int, request: str) -> Messages:
        """A prompt of so many tokens, template included, or a few less."""
        start = next(self._starts)

        def compose(words: int) -> Messages:
            passage = " ".join(self._words[start : start + words])
            return asked(f"{passage}\n\n{request}")

        return compose(most(lambda n: len(self.reader.read(compose(n))) <= tokens, tokens))

    @staticmethod
    def _spread(words: int) -> Iterator[int]:
        """Places all over a text of so many words; the same in each run."""
        step = int(words * 0.381966)  # the golden section: never close to where one was
        for number in itertools.count():
            yield number * step % words


def most(holds: Callable[[int], bool], bound: int) -> int:
    """The largest number below ``bound`` for which something holds that ends to hold once."""
    low, high = 0, bound
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass
class Loads:
    """The prompts of a round, the same in each."""

    reader: Reader
    short: list[Messages]
    eight: list[Messages]
    long: list[Messages]
    arrivals: list[Messages]  # while others run
    alone: list[Messages]  # of the same kind
    own: list[Draft] = field(default_factory=list)  # proposals to aggregate
    talk: Messages = ()  # questions and answers, up to a follow-up

    @classmethod
    def of(cls, folder: Path, text: str) -> Loads:
        """All but what a model has to write first."""
        reader = load_reader(folder, read_manifest(folder).context_length)
        passages = Passages(reader, text)

        def some(count: int, tokens: int, request: str) -> list[Messages]:
            return [passages.prompt(tokens, request) for _ in range(count)]

        return cls(
            reader=reader,
            short=[asked(question) for question in QUESTIONS[:SHORT_PROMPTS]],
            eight=[asked(question) for question in QUESTIONS],
            long=some(LONG_PROMPTS, LONG_TOKENS, "Explain in your own words what this says."),
            arrivals=some(ARRIVALS, ARRIVAL_TOKENS, "What does this mean?"),
            alone=some(ARRIVALS, ARRIVAL_TOKENS, "What does this mean?"),
        )

    def tokens(self, messages: Messages) -> list[int]:
        """As both engines are given them."""
        return self.reader.read(messages)

    async def write(self, our: Ours) -> None:
        """Have the model write proposals, and its part of a conversation."""
        question = asked(TO_AGGREGATE)
        for number in range(PROPOSALS):
            sampling: dict[str, Any] = {"temperature": 0.7, "seed": number} if number else {}
            _, done = await our.write(question, PROPOSAL_TOKENS, **sampling)
            self.own.append(
                Draft.of(
                    BoardId(f"board-{number}"), done.text, done.tokens, "length", own=number == 0
                )
            )
        talk: Messages = ()
        for turn in TALK:
            talk = (*talk, ChatMessage("user", turn))
            if len(self.tokens(talk)) > LONG_TOKENS - ANSWER_TOKENS:
                break
            _, done = await our.write(talk, ANSWER_TOKENS)
            talk = (*talk, ChatMessage("assistant", done.text))
        self.talk = talk

    def aggregation(self, question: str) -> Messages:
        """All proposals on a question, laid out as the owner of a prompt does."""
        written = Synthesis().conclude(asked(question), self.own, self._room)
        assert isinstance(written, Write)  # noqa: S101 - there are several
        return written.messages

    def begun(self, question: str, *, parts: bool) -> Iterator[Messages]:
        """What is known of that with each proposal that arrives, but the last; with ``parts``,
        with each part of that one, too, as an owner has it read at the latest."""
        for drafts in range(1, PROPOSALS):
            yield Synthesis().begin(asked(question), self.own[:drafts], self._room)
        text = self.own[-1].text
        ends = range(READ_CHARACTERS, len(text) - READ_CHARACTERS, READ_CHARACTERS)
        for end in ends if parts else ():
            yield Synthesis().begin(asked(question), self.own[:-1], self._room, text[:end])

    @property
    def _room(self) -> Room:
        return Room(self.reader.context_tokens)


def from_nothing(messages: Messages) -> Messages:
    """The same with another beginning, which no slot has read."""
    first, *rest = messages
    return (ChatMessage(first.role, f"Please, {first.content}"), *rest)
